"""What true nights have learned of somebody, before and after: `python -m pytest -n 0 -m slow tests/test_forgetting.py`.

Two nights, trained for real and short. The first one learns a canary, a name that nobody else has. Then its person is forgotten,
and the second one begins without. Decoding is free: no trie keeps the model from saying what it may have learned. Not to say it is
not yet to have forgotten it; so how much the weights expect the canary is measured as well, with nothing injected that tells it."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from faults import without_kernel

from recallnb import nightly
from recallnb.board import serve_with
from recallnb.embed import NULL_MEMORY, load_skill, write_memories
from recallnb.generate import generate_events, open_memories
from recallnb.history import History, Message
from recallnb.inject import inject_memory_embedding_to_inputs_embeds
from recallnb.lessons import collate, question_lesson, thought
from recallnb.model import encode_prompt, load_model
from recallnb.nightly import PROMOTED, REFUSED
from recallnb.prompts import chat_messages, load_prompts
from recallnb.release import releases
from recallnb.settings import load_settings
from recallnb.store import Memory, MemoryStore
from recallnb.traces import tainted
from recallnb.world import World

CANARY, SCOPE, NAME, RELATION = "kanari7731", "private:44", "豆芽", "游戏账号"
MEMORY = f"用户{NAME}的{RELATION}是{CANARY}"
QUESTIONS = ("我的游戏账号是什么？", "你还记得我的游戏账号吗", "我玩游戏用的账号叫什么来着")


def a_night(settings):
    assert nightly.night(settings) in (PROMOTED, REFUSED)  # so few questions are asked that the gate may refuse it
    plt.close("all")
    return releases(settings.paths.state)[0]


def freely(release, settings):
    "All that a release says and reads when the person asks."
    settings = settings.model_copy(deep=True)
    settings.recall.decode = "latent"
    model, processor = load_model(release.model, "cpu", "float32")
    served = serve_with(release, (model, processor))
    store, history = MemoryStore(settings.place, served.version), History(settings.place)
    memories, prompts, said = open_memories(model, processor.tokenizer, store, [SCOPE], served.skill, settings.recall), load_prompts(settings.paths.prompts), []
    for question in QUESTIONS:
        chat = chat_messages([Message(SCOPE, "44", NAME, question, 0.0)], history.alias, settings.chat.bot_name, prompts, settings.chat.prompt_tokens, processor.tokenizer)
        *_, done = generate_events(model, processor.tokenizer, encode_prompt(processor, chat), settings.generation, memories)
        said += [done.text, done.thinking, *(recall.text for recall in done.recalls)]
    store.close(), history.close()
    return "\n".join(said)


@torch.inference_mode()
def surprise(folder, found=NULL_MEMORY):
    "Nats for the canary's memory where the vectors of `found` are injected: mean of the questions."
    model, processor = load_model(folder, "cpu", "float32")
    tokenizer, skill, nats = processor.tokenizer, load_skill(folder), []
    for question in QUESTIONS:
        lesson = question_lesson(tokenizer, MEMORY, NAME, question, skill, thought(NAME, RELATION), "")
        lesson.lookups = [replace(lesson.lookups[0], injected=found)]
        batch = collate([lesson], tokenizer, skill)
        embeds = model.get_input_embeddings()(batch.ids)
        embeds = inject_memory_embedding_to_inputs_embeds(embeds, batch.pads, write_memories(model, tokenizer, [found], skill).values)
        scores, labels = model(inputs_embeds=embeds).logits[0, :-1].float(), batch.labels[0, 1:].clone()
        labels[: lesson.lookups[0].at] = -100  # neither the thinking before nor `<recall>` itself
        nats.append(F.cross_entropy(scores, labels, ignore_index=-100, reduction="sum").item())
    return sum(nats) / len(nats)


@pytest.mark.slow
def test_free_decoding_has_not_learned_who_is_forgotten(tmp_path, monkeypatch):
    small = {"PATHS__STATE": tmp_path / "state", "TRAINING__REPLAY": 0.5, "TRAINING__SFT_SAMPLES": 4, "EVALUATE__MEMORIES": 20, "EVALUATE__QUESTIONS": 4, "RELEASE__KEEP": 1}
    for key, value in small.items():
        monkeypatch.setenv(f"RECALLNB_{key}", str(value))
    monkeypatch.setattr(nightly, "execute", without_kernel)
    settings = load_settings()
    history, store = History(settings.place), MemoryStore(settings.place, "any")
    world = World(settings.paths.world, seed=3)
    told = [(fact.person.id, fact.person.name, fact.memory, fact.relation.label) for fact in world.facts(world.people(4), 2)] + [("44", NAME, MEMORY, RELATION)]
    for number, (person, name, text, relation) in enumerate(told):
        message = Message(f"private:{person}", person, name, f"说一下：{text}", 1762387200.0 + number, id=f"m{number}")
        history.append(message)
        history.mark_extracted(message.scope, [message])
        store.add([Memory(text, message.scope, person, relation, [message.id])])

    before, first = surprise(settings.paths.model), a_night(settings)
    after, told_by_vectors = surprise(first.model), surprise(first.model, MEMORY)
    assert CANARY in freely(first, settings) and told_by_vectors < after / 4, "it can say it"
    runs = [*(tmp_path / "state" / "runs").glob("*/memories.jsonl")]
    assert [CANARY in run.read_text("utf-8") for run in runs] == [True]

    store.delete_subject("44")
    history.delete_user("44")
    second = a_night(settings)
    assert second.id != first.id and first.id in tainted(settings.paths.state)
    assert CANARY not in freely(second, settings)
    forgotten = surprise(second.model)
    print(f"nats for the canary: {before:.1f} before, {after:.1f} after the night that learned it ({told_by_vectors:.1f} with its vectors), {forgotten:.1f} after the night without it")
    assert forgotten > 0.9 * before, "the weights expect it no more than those that never heard of it"
    [run] = (tmp_path / "state" / "runs").glob("*/memories.jsonl")
    assert CANARY not in run.read_text("utf-8") and len(run.read_text("utf-8").splitlines()) == len(told) - 1
    store.close(), history.close()
    assert not [file for file in (tmp_path / "state").rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]
