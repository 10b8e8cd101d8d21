"""The quality board: what its data must be, and that its figures can be wrong."""

import json
import re
from datetime import date

import pytest
from conftest import ROOT

from recallnb.ablate import Trial, load_table, read_changes, run_table, table_text
from recallnb.cards import card_table, serving_bytes, training_bytes
from recallnb.evaluate import main as evaluate
from recallnb.extract import Extracted
from recallnb.model import qwen3vl_4b_config
from recallnb.natural import HALVES, holds, load_natural, match
from recallnb.own import load_set
from recallnb.settings import TrainSettings, load_settings

BOT = "小忆"
CHATS = {half: load_natural(ROOT / "data/natural", half) for half in HALVES}


def everything():
    return [chat for chats in CHATS.values() for chat in chats]


def people(chat):
    return {name for name, _ in chat.messages} - {BOT}


def test_there_is_enough_natural_language():
    assert len(everything()) >= 40 and {chat.kind for chat in everything()} == {"group", "private"}
    for chats in CHATS.values():
        questions = [question for chat in chats for question in chat.questions]
        assert len(questions) >= 100 and sum(question.memory is None for question in questions) >= 20
        assert len([kept for chat in chats for kept in chat.memories]) >= 60


def test_names_and_texts_are_unique_over_both_halves():
    "All memories of a half lie in one scope, and what is locked is not shown elsewhere."
    names = [name for chat in everything() for name in people(chat)]
    texts = [kept.text for chat in everything() for kept in chat.memories]
    assert len(names) == len(set(names)) and len(texts) == len(set(texts)) and len({chat.id for chat in everything()}) == len(everything())


@pytest.mark.parametrize("chat", everything(), ids=lambda chat: chat.id)
def test_natural_chat_is_whole(chat):
    assert date.fromisoformat(chat.date) and len(chat.messages) >= 8 and all(text.strip() for _, text in chat.messages)
    assert len(people(chat)) == 1 if chat.kind == "private" else len(people(chat)) >= 2 and BOT not in dict(chat.messages)
    assert {person for person, _ in chat.talk} | {question.person for question in chat.questions} <= people(chat)
    for kept in chat.memories:
        assert kept.person in people(chat) and kept.text.startswith(f"用户{kept.person}") and kept.category
        assert holds(kept.text, kept.values), f"{kept.text} holds none of {kept.values}"
        assert kept.messages and all(chat.messages[number - 1][0] != BOT for number in kept.messages), f"nobody tells {kept.text}"
    assert {question.memory for question in chat.questions if question.memory} <= set(chat.memories)


def test_no_template_of_the_world_is_in_the_chats():
    "What the model was trained on would say nothing about people."
    relations = json.loads((ROOT / "data/world/relations.json").read_text("utf-8"))
    pieces = {piece for relation in relations for side in relation["statements"].values() for template in side for piece in template.split("{value}") if len(piece) > 8}
    lines = [text for chat in everything() for name, text in chat.messages if name != BOT]
    assert not [(piece, line) for line in lines for piece in pieces if piece in line]


@pytest.mark.parametrize(("text", "values", "right"), [("生日是6月8号", ["6月8日"], True), ("6.8见", ["6月8日", "6.8"], True), ("坐237路", ["37"], False), ("ID fries_04", ["fries_0"], False), ("", ["猫"], False)])
def test_a_value_stands_by_itself(text, values, right):
    assert holds(text, values) == right


def test_a_line_counts_once_and_for_its_person_only():
    chat = CHATS["development"][0]
    kept = chat.memories[0]
    line = Extracted(kept.text, "座位", kept.person, ["4"], chat.date, kept.person, "group:1")
    assert match([line], [kept, kept]) == [line, None]
    assert match([Extracted(kept.text, "座位", "x", ["4"], chat.date, "别人", "group:1")], [kept]) == [None]


def test_the_board_takes_any_set_of_memories(tmp_path):
    own, out = tmp_path / "own.jsonl", tmp_path / "metrics.json"
    own.write_text(json.dumps({"text": "用户小明养的猫叫豆芽", "alias": "小明", "questions": ["我的猫叫什么？"], "values": ["豆芽"]}, ensure_ascii=False), "utf-8")
    evaluate(["--model", str(load_settings().paths.model), "--axes", "set", "--set", str(own), "--memories", "12", "--draws", "1", "--questions", "4", "--out", str(out)])
    rows = json.loads(out.read_text("utf-8"))["axes"]["set"]
    assert [row["memories"] for row in rows] == [1, 12] and all(row["answer_guarded_cases"] == 1 for row in rows)


@pytest.mark.parametrize(("content", "told"), [('{"text": "x"}', "line 1: alias"), ('\n{"alias": "x"}', "line 2: text"), ("", "no memory")])
def test_a_set_that_is_wrong_says_where(tmp_path, content, told):
    file = tmp_path / "own.jsonl"
    file.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=told):
        load_set(file)


def test_a_table_of_trials_keeps_failures_and_runs_nothing_twice(tmp_path, monkeypatch):
    ran = []

    def training(trial, *_):
        ran.append(trial.changes)
        raise RuntimeError("out of memory | or so")
    monkeypatch.setattr("recallnb.ablate.train_trial", training)
    settings, trials = load_settings(), [Trial({}), Trial(read_changes(["values=8"])), Trial({})]
    rows = run_table(trials, settings.paths.model, tmp_path, settings)
    assert len(rows) == 2 == len(ran) and all("out of memory" in row["error"] for row in rows) and "out of memory / or so" in table_text(rows)
    assert run_table(trials, settings.paths.model, tmp_path, settings) == rows == load_table(tmp_path) and len(ran) == 2
    assert re.search(r"--lessons 4096 --seed 0 .*values=8$", rows[1]["command"])


def test_memory_on_a_card_adds_up():
    config = qwen3vl_4b_config()
    short, long = (training_bytes(config, TrainSettings(batch_size=1, max_tokens=tokens, gradient_checkpointing=True), 64) for tokens in (512, 1024))
    assert short.keys() == long.keys() and {name for name in short if short[name] != long[name]} == {"layers"}
    assert sum(training_bytes(config, TrainSettings(), 64, frozen="bfloat16").values()) < sum(training_bytes(config, TrainSettings(), 64).values())
    assert serving_bytes(config, width=2)["weights"] * 2 == serving_bytes(config, width=4)["weights"]
    assert [row["what"] for row in card_table(config)][0] == "serving"
