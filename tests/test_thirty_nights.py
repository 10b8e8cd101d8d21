"""Thirty nights in a row: does a bot that learns every night get worse?

    python -m pytest -n 0 -m slow tests/test_thirty_nights.py -s

takes more than an hour. `NIGHTS=5` or `MEMORIES=50` in the environment makes it shorter, and then it proves as much less.
The nights are true ones, but for their length (one epoch, and at most 40 seconds of training) and their notebooks, which run in
this process to save the time of kernels. The figures are those that the nights publish; they and the plot are in the folder that it prints at the end (pytest
keeps the newest three)."""

import json
import math
import os
import random

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from faults import without_kernel

from recallnb import nightly
from recallnb.evaluate import quality_board
from recallnb.history import History, Message
from recallnb.model import load_model
from recallnb.nightly import PROMOTED, REFUSED
from recallnb.release import releases
from recallnb.settings import load_settings
from recallnb.sft import load_sft, sft_sample
from recallnb.store import Memory, MemoryStore
from recallnb.world import ASPECTS, World, say

NIGHTS, MEMORIES, CORRECTED = int(os.environ.get("NIGHTS", 30)), int(os.environ.get("MEMORIES", 1000)), 0.05
WATCHED = ("trigger_recall", "right_memory_at_1", "free_decode_exact", "answer_guarded")  # of people whom nobody trains
OWN = ("night_recall_at_1", "night_decode_exact")  # of the memories of that night, by questions that are kept out
QUESTIONS, NOISE = 100, 0.06  # of a fraction of so many questions, nearly three standard errors


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


def a_night(settings):
    "The newest release, promoted or refused: what is asked here is whether it is worse, not whether it is good enough."
    status = nightly.night(settings)
    assert status in (PROMOTED, REFUSED), f"exit status {status}"
    plt.close("all")
    return releases(settings.paths.state)[0]


def draw(rows, file):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name in WATCHED + OWN:
        axes[0].plot([row.get(name) or math.nan for row in rows], "--" if name in OWN else "-", label=name)
    axes[0].set(xlabel="night", ylim=(0, 1.02))
    axes[0].legend(fontsize=7)
    axes[1].plot([row["perplexity"] for row in rows], "k")
    axes[1].set(xlabel="night", ylabel="perplexity of held-out chats", ylim=(0, None))
    figure.savefig(file)


@pytest.mark.slow
def test_thirty_nights_do_not_wear_it_out(tmp_path, monkeypatch):
    "The board on people who are never trained, and chats kept out of training: after every night, beside the model at the start."
    rows, sft = [*load_sft(load_settings().paths.sft)], tmp_path / "sft.jsonl"
    held_out = rows[::10]
    sft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for place, row in enumerate(rows) if place % 10), "utf-8")
    short = {"PATHS__STATE": tmp_path / "state", "PATHS__SFT": sft, "STAGE1__EPOCHS": 1, "STAGE2__EPOCHS": 1, "TRAINING__REPLAY": 0.5, "TRAINING__MINUTES": 2 / 3, "RELEASE__KEEP": 2, "EVALUATE__QUESTIONS": QUESTIONS}
    for key, value in short.items():
        monkeypatch.setenv(f"RECALLNB_{key}", str(value))
    monkeypatch.setattr(nightly, "execute", without_kernel)
    settings, rng = load_settings(), random.Random(0)
    world = World(settings.paths.world, seed=1, heldout=ASPECTS)
    people, known = world.people(-(-MEMORIES // 10)), {}
    history, store = History(settings.paths.state / "recallnb.db"), MemoryStore(settings.paths.state / "recallnb.db", "any")

    figures = [quality_board(settings.paths.model, 200, 1, QUESTIONS, settings) | {"perplexity": perplexity(settings.paths.model, held_out)}]
    for night in range(NIGHTS):
        one_day(history, store, world, rng, people, known, night)
        release = a_night(settings)
        figures.append(release.metrics | {"perplexity": perplexity(release.model, held_out), "memories": store.count(), "seconds": release.manifest["seconds"], "refused": release.manifest["refused"]})
        (tmp_path / "thirty_nights.json").write_text(json.dumps(figures, indent=1))
        draw(figures, tmp_path / "thirty_nights.png")
        print(f"night {night + 1}: {({name: figures[-1].get(name) for name in (*WATCHED, *OWN, 'perplexity', 'memories', 'seconds', 'refused')})}", flush=True)
    print(tmp_path / "thirty_nights.png")
    assert store.count() == MEMORIES
    first, last = figures[1], figures[-5:]
    for name in WATCHED:
        late = sum(row[name] for row in last) / len(last)
        assert late >= first[name] - NOISE, f"{name}: {first[name]:.3f} after the first night, {late:.3f} over the last five"
    assert figures[-1]["perplexity"] <= 1.05 * first["perplexity"], (first["perplexity"], figures[-1]["perplexity"])
    store.close(), history.close()
