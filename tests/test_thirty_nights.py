"""Thirty nights in a row: does a bot that learns every night get worse?

    python -m pytest -m slow tests/test_thirty_nights.py -s

takes hours on two CPU cores. `NIGHTS=5` in the environment makes it shorter, and then it proves as much less.
The figures and the plot are in `state/` of the folder that it prints at the end (pytest keeps the newest three)."""

import json
import math
import os
import random
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from recallnb.evaluate import quality_board
from recallnb.history import History, Message
from recallnb.model import load_model
from recallnb.nightly import PROMOTED, REFUSED
from recallnb.release import releases
from recallnb.settings import load_settings
from recallnb.sft import load_sft, sft_sample
from recallnb.store import Memory, MemoryStore
from recallnb.world import ASPECTS, World, say

NIGHTS, MEMORIES, CORRECTED = int(os.environ.get("NIGHTS", 30)), 1000, 0.05
WATCHED = ("trigger_recall", "right_memory_at_1", "free_decode_exact", "answer_guarded")
NOISE = 0.06  # of a fraction of 200 questions, twice its standard error


@torch.inference_mode()
def perplexity(folder, rows, tokens=512):
    "Of the replies in chats that no night has trained."
    model, processor = load_model(folder, "cpu", "float32")
    total, count = 0.0, 0
    for row in rows:
        ids, labels = sft_sample(processor.tokenizer, row["messages"], tokens)
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total += F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    return math.exp(total / count)


def one_day(history, store, world, rng, people, known, night):
    "New memories up to this night's share of all, and corrections of old ones, as the chats and the extraction would leave them."
    def tell(fact):
        scope, told = f"private:{fact.person.id}", f"n{night}-{rng.random()}"
        history.append(Message(scope, fact.person.id, fact.person.name, say(world, fact), 1762387200.0 + 86400 * night, id=told))
        history.mark_extracted(scope, history.unextracted(scope))
        [id] = store.add([Memory(fact.memory, scope, fact.person.id, fact.relation.label, [told], f"2026-01-{night % 28 + 1:02}")])
        key = fact.person.id, fact.relation.id
        if key in known:
            store.supersede(known[key][0], id)
        known[key] = id, fact

    for key in rng.sample(sorted(known), round(CORRECTED * len(known))):
        old = fact = known[key][1]
        while fact.value == old.value:
            fact = world.fact(old.person, old.relation)
        tell(fact)
    untold = [(person, relation) for person in people for relation in world.relations if (person.id, relation.id) not in known]
    for person, relation in rng.sample(untold, len(untold)):
        if len(known) >= MEMORIES * (night + 1) // NIGHTS:
            break
        tell(world.fact(person, relation))


def a_night(state, sft):
    "The newest release, promoted or refused: what is asked here is whether it is worse, not whether it is good enough."
    environment = {"PATHS__STATE": state, "PATHS__SFT": sft, "STAGE1__EPOCHS": 1, "STAGE2__EPOCHS": 1, "TRAINING__REPLAY": 1.0, "RELEASE__KEEP": 2}
    done = subprocess.run([sys.executable, "-m", "recallnb.nightly"], cwd=ROOT, env=os.environ | {f"RECALLNB_{key}": str(value) for key, value in environment.items()},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode in (PROMOTED, REFUSED), f"exit status {done.returncode}\n{done.stdout[-6000:]}"
    return releases(state)[0]


def draw(rows, file):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name in WATCHED:
        axes[0].plot([row[name] for row in rows], label=name)
    axes[0].set(xlabel="night", ylim=(0, 1.02))
    axes[0].legend(fontsize=7)
    axes[1].plot([row["perplexity"] for row in rows], "k")
    axes[1].set(xlabel="night", ylabel="perplexity of held-out chats", ylim=(0, None))
    figure.savefig(file)


@pytest.mark.slow
def test_thirty_nights_do_not_wear_it_out(tmp_path):
    "The board on people who are never trained, and chats kept out of training: after every night, beside the model at the start."
    settings, state, rng = load_settings(), tmp_path / "state", random.Random(0)
    rows = [*load_sft(settings.paths.sft)]
    held_out, sft = rows[::10], tmp_path / "sft.jsonl"
    sft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for place, row in enumerate(rows) if place % 10), "utf-8")
    world = World(settings.paths.world, seed=1, heldout=ASPECTS)
    people, known = world.people(MEMORIES // 10), {}
    history, store = History(state / "recallnb.db"), MemoryStore(state / "recallnb.db", "any")

    def measure(folder):
        board = quality_board(folder, 1000, 1, 200, settings)
        return {name: board[name] for name in WATCHED} | {"perplexity": perplexity(folder, held_out), "memories": store.count()}

    figures = [measure(settings.paths.model)]
    for night in range(NIGHTS):
        one_day(history, store, world, rng, people, known, night)
        release = a_night(state, sft)
        figures.append(measure(release.model) | {"refused": release.manifest["refused"]})
        (state / "thirty_nights.json").write_text(json.dumps(figures, indent=1))
        draw(figures, state / "thirty_nights.png")
        print(f"night {night + 1}: {figures[-1]}", flush=True)
    assert store.count() == MEMORIES
    first, last = figures[1], figures[-1]
    print(f"{state / 'thirty_nights.png'}")
    for name in WATCHED:
        late = sum(row[name] for row in figures[-5:]) / len(figures[-5:])
        assert late >= first[name] - NOISE, f"{name}: {first[name]:.3f} after the first night, {late:.3f} over the last five"
    assert last["perplexity"] <= 1.05 * first["perplexity"], (first["perplexity"], last["perplexity"])
    store.close(), history.close()
