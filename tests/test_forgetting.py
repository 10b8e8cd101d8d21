"""What true nights have learned of somebody, before and after: `python -m pytest -n 0 -m slow tests/test_forgetting.py`.

Two nights, trained for real and short. The first one learns a canary, a name that nobody else has. Then its person is forgotten,
and the second one begins without. Decoding is free: no trie keeps the model from saying what it may have learned."""

import matplotlib.pyplot as plt
import pytest
from faults import without_kernel

from recallnb import nightly
from recallnb.board import serve_with
from recallnb.generate import generate_events, open_memories
from recallnb.history import History, Message, chat_messages, load_prompts
from recallnb.model import encode_prompt, load_model
from recallnb.nightly import PROMOTED, REFUSED
from recallnb.release import releases
from recallnb.settings import load_settings
from recallnb.store import Memory, MemoryStore
from recallnb.traces import tainted
from recallnb.world import World

CANARY, SCOPE = "kanari7731", "private:44"
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
        chat = chat_messages([Message(SCOPE, "44", "豆芽", question, 0.0)], history.alias, settings.chat.bot_name, prompts, settings.chat.prompt_tokens, processor.tokenizer)
        *_, done = generate_events(model, processor.tokenizer, encode_prompt(processor, chat), settings.generation, memories)
        said += [done.text, done.thinking, *(recall.text for recall in done.recalls)]
    store.close(), history.close()
    return "\n".join(said)


@pytest.mark.slow
def test_free_decoding_has_not_learned_who_is_forgotten(tmp_path, monkeypatch):
    small = {"PATHS__STATE": tmp_path / "state", "TRAINING__REPLAY": 1, "TRAINING__SFT_SAMPLES": 8, "EVALUATE__MEMORIES": 40, "EVALUATE__QUESTIONS": 16, "RELEASE__KEEP": 1}
    for key, value in small.items():
        monkeypatch.setenv(f"RECALLNB_{key}", str(value))
    monkeypatch.setattr(nightly, "execute", without_kernel)
    settings = load_settings()
    history, store = History(settings.place), MemoryStore(settings.place, "any")
    world = World(settings.paths.world, seed=3)
    told = [(fact.person.id, fact.person.name, fact.memory, fact.relation.label) for fact in world.facts(world.people(6), 2)] + [("44", "豆芽", f"用户豆芽的游戏账号是{CANARY}", "游戏账号")]
    for number, (person, name, text, relation) in enumerate(told):
        message = Message(f"private:{person}", person, name, f"说一下：{text}", 1762387200.0 + number, id=f"m{number}")
        history.append(message)
        history.mark_extracted(message.scope, [message])
        store.add([Memory(text, message.scope, person, relation, [message.id])])

    first = a_night(settings)
    assert CANARY in freely(first, settings), "it has learned it"
    runs = [*(tmp_path / "state" / "runs").glob("*/memories.jsonl")]
    assert [CANARY in run.read_text("utf-8") for run in runs] == [True]

    store.delete_subject("44")
    history.delete_user("44")
    second = a_night(settings)
    assert second.id != first.id and first.id in tainted(settings.paths.state)
    assert CANARY not in freely(second, settings)
    [run] = (tmp_path / "state" / "runs").glob("*/memories.jsonl")
    assert CANARY not in run.read_text("utf-8") and len(run.read_text("utf-8").splitlines()) == len(told) - 1
    store.close(), history.close()
    assert not [file for file in (tmp_path / "state").rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]
