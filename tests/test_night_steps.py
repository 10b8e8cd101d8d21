"""What a night decides, with its notebooks replaced by functions: no training, so that every turn can be tried."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook

from recallnb import nightly, prepare
from recallnb.board import FLOORS, current_figures, judge
from recallnb.embed import Skill, load_skill, save_skill
from recallnb.extract import Extracted, ExtractReport, extract_memories
from recallnb.history import History, Message
from recallnb.model import load_model, model_version
from recallnb.nightly import FAILED, NOTHING, PROMOTED, REFUSED, main, night
from recallnb.nights import STEPS, night_report, night_state
from recallnb.prepare import Reading, people, read_history
from recallnb.release import ReleaseError, current_id, newest_good, releases, roll_back, verify
from recallnb.rules import Rules
from recallnb.settings import load_settings
from recallnb.store import Memory, MemoryStore
from recallnb.traces import note_people, tainted
from recallnb.train import Material, load_materials, save_materials

PROCESSOR = SimpleNamespace(tokenizer=None)
GOOD = {name: float(floor > 0.5) for name, floor in FLOORS.items()} | {"kept_apart": 1.0}


class Night:
    "A state folder with one memory, and nights whose model is the shipped one with another threshold."

    def __init__(self, state, monkeypatch):
        self.settings, self.threshold, self.board = load_settings(), 0.0, GOOD
        self.settings.paths.state, self.state, self.ran = state, state, []
        store = MemoryStore(state / "recallnb.db", model_version(self.settings.paths.model))
        store.add([Memory("用户LinF现居杭州", "private:42", "42", "住处")])
        store.close()
        monkeypatch.setattr(nightly, "execute", self.execute)

    def run(self, **arguments):
        self.ran = []
        return night(self.settings, **arguments)

    def execute(self, notebook, run, parameters):
        "Stands for a notebook of the night."
        self.ran.append(notebook.stem)
        if notebook.stem == "prepare_memories":
            store, history = MemoryStore(self.state / "recallnb.db", "any"), History(self.state / "recallnb.db")
            note_people(run, people(history, store))
            if found := store.list():
                save_materials(run, [Material(memory.text, "LinF") for memory in found])
            store.close(), history.close()
        elif notebook.stem == "train_stage2":
            model = run / "stage2" / "model"
            shutil.copytree(self.settings.paths.model, model)
            self.threshold += 0.001
            save_skill(replace(load_skill(model), threshold=self.threshold), model)
            for stage in ("stage1", "stage2"):
                (run / stage / "checkpoint").mkdir(parents=True)
                (run / stage / "metrics.json").write_text("{}")
        elif notebook.stem == "evaluate_night":
            board = self.board | {"model_version": model_version(run / "stage2" / "model")}
            (run / "metrics.json").write_text(json.dumps(board))
            (run / "refused.json").write_text(json.dumps(judge(board, current_figures(self.settings))))
        write(new_notebook(cells=[new_code_cell("1 + 1")]), run / notebook.name)
        return run / notebook.name

    def tell(self, text, user_id="42"):
        "A further memory."
        store = MemoryStore(self.state / "recallnb.db", "any")
        store.add([Memory(text, f"private:{user_id}", user_id, text)])
        store.close()

    def forget(self, user_id):
        "What the server does when somebody says so."
        store, history = MemoryStore(self.state / "recallnb.db", "any"), History(self.state / "recallnb.db")
        store.delete_subject(user_id)
        history.delete_user(user_id)
        store.close(), history.close()

    def holding(self, text):
        "Files of the state that hold a text, in any of the ways in which programs write one."
        ways = [text.encode(), text.encode("utf-16-le"), json.dumps(text)[1:-1].encode()]
        return [str(file.relative_to(self.state)) for file in self.state.rglob("*") if file.is_file() and any(way in file.read_bytes() for way in ways)]

    def versions(self):
        "Which models have written vectors."
        store = MemoryStore(self.state / "recallnb.db", "any")
        found = {version for (version,) in store.database.connection.execute("SELECT DISTINCT version FROM vector")}
        store.close()
        return found


@pytest.fixture
def nights(tmp_path, monkeypatch):
    return Night(tmp_path / "state", monkeypatch)


def files(folder):
    "Name, size and time of everything in a folder."
    return {str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_a_second_night_on_the_same_history_changes_nothing(nights, capsys):
    assert nights.run() == PROMOTED
    [release] = releases(nights.state)
    assert [one["step"] for one in night_state(nights.state)["steps"] if one["state"] == "over"] == list(json.loads((nights.state / "nightly.json").read_text())["steps"])[:-1] == [*STEPS]
    before, versions = files(nights.state / "releases"), nights.versions()
    assert nights.run() == NOTHING and nights.ran == ["prepare_memories"]
    assert f"release {release.id} was made of the same" in capsys.readouterr().out
    assert files(nights.state / "releases") == before and nights.versions() == versions
    nights.tell("用户LinF养的猫叫豆芽")
    assert nights.run() == PROMOTED and current_id(nights.state) != release.id


@pytest.mark.parametrize("what", ["setting", "chats", "file", "model"])
def test_other_settings_are_another_night(nights, what, tmp_path):
    chats = tmp_path / "chats"  # may be a folder
    chats.mkdir()
    shutil.copy(nights.settings.paths.sft, chats / "some.jsonl")
    nights.settings.paths.sft = str(chats)
    assert nights.run() == PROMOTED
    if what == "setting":
        nights.settings.stage2.learning_rate /= 2
    elif what == "chats":
        lines = (chats / "some.jsonl").read_text("utf-8").splitlines()
        (chats / "some.jsonl").write_text("\n".join(lines[1:]), "utf-8")
    elif what == "file":
        nights.settings.paths.guides = shutil.copytree(nights.settings.paths.guides, tmp_path / "guides")
        next(nights.settings.paths.guides.iterdir()).write_text("嗯，\n", "utf-8")
    else:
        nights.settings.paths.model = shutil.copytree(nights.settings.paths.model, tmp_path / "model")
        save_skill(replace(load_skill(tmp_path / "model"), threshold=0.9), tmp_path / "model")
    assert nights.run() == PROMOTED and len(releases(nights.state)) == 2


def test_a_refused_model_is_neither_served_nor_trained_again(nights):
    assert nights.run() == PROMOTED
    served = current_id(nights.state)
    nights.tell("用户LinF养的猫叫豆芽")
    nights.board = GOOD | {"right_memory_at_1": 0.5}
    assert nights.run() == REFUSED and current_id(nights.state) == served
    newest = releases(nights.state)[0]
    assert newest.id != served and "right_memory_at_1" in newest.manifest["refused"][0]
    assert "The gate refuses it" in (newest.path / "report.html").read_text("utf-8")
    assert nights.run() == NOTHING


def test_what_its_owner_took_back_does_not_return_by_itself(nights):
    assert nights.run() == PROMOTED
    first = current_id(nights.state)
    nights.tell("用户LinF养的猫叫豆芽")
    assert nights.run() == PROMOTED
    assert roll_back(nights.state).id == first
    assert nights.run() == NOTHING and current_id(nights.state) == first


def kill(nights, monkeypatch, step):
    "A night that dies in this step of `nightly`; no `except Exception` catches that."
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(nightly, step, die)
        with pytest.raises(KeyboardInterrupt):
            nights.run()


def test_what_its_owner_took_back_from_a_killed_night_does_not_return_either(nights, monkeypatch):
    assert nights.run() == PROMOTED
    first = current_id(nights.state)
    nights.tell("用户LinF养的猫叫豆芽")

    kill(nights, monkeypatch, "prune")
    taken_back = current_id(nights.state)
    assert taken_back != first and roll_back(nights.state).id == first
    assert nights.run() == NOTHING and current_id(nights.state) == first


def test_a_night_that_died_while_it_deleted_is_completed(nights, monkeypatch):
    assert nights.run() == PROMOTED
    nights.forget("42")
    nights.tell("用户豆芽现居杭州", "44")

    kill(nights, monkeypatch, "prune")
    promoted = current_id(nights.state)
    assert len(releases(nights.state)) == 2, "one was trained on somebody who is forgotten"
    assert nights.run() == PROMOTED and [one.id for one in releases(nights.state)] == [promoted]


def test_a_night_that_died_before_promoting_is_completed(nights, monkeypatch):
    kill(nights, monkeypatch, "promote")
    [release] = releases(nights.state)
    assert current_id(nights.state) is None
    assert nights.run() == PROMOTED and nights.ran == ["prepare_memories"]
    assert current_id(nights.state) == release.id and len(releases(nights.state)) == 1


@pytest.mark.parametrize("step", ["execute", "train_stage2", "publish", "write_vectors"])
def test_a_failure_leaves_a_report_and_the_old_release(nights, monkeypatch, step):
    assert nights.run() == PROMOTED
    served = current_id(nights.state)
    nights.tell("用户LinF养的猫叫豆芽")

    def fail(*_):
        raise OSError(28, "No space left on device")

    def cut_off(notebook, run, parameters):
        if notebook.stem != "train_stage2":
            return nights.execute(notebook, run, parameters)
        (run / notebook.name).write_text('{"cells": [')
        fail()

    with monkeypatch.context() as patched:
        if step == "train_stage2":
            patched.setattr(shutil, "copytree", fail)
        else:
            patched.setattr(nightly, step, cut_off if step == "execute" else fail)
        assert nights.run() == FAILED
    assert current_id(nights.state) == served and json.loads((nights.state / "nightly.json").read_text())["status"] == FAILED
    newest = max((run for run in (nights.state / "runs").iterdir() if run.is_dir()), key=lambda run: run.name)
    report = (newest / "night.html").read_text("utf-8")
    assert report.index("has failed in") < report.index("No space left on device")
    assert night_state(nights.state)["report"] and night_report(nights.state) == newest / "night.html"
    assert len(json.loads((newest / "params.json").read_text("utf-8"))["data_hash"]) == 64, "what a failed night was made of is known, too"
    assert nights.run() == PROMOTED and current_id(nights.state) != served


def test_a_flipped_byte_is_refused_and_the_previous_release_serves(nights, caplog):
    ids = []
    for text in ("用户LinF养的猫叫豆芽", "用户LinF的职业是教师"):
        nights.tell(text)
        assert nights.run() == PROMOTED
        ids.append(current_id(nights.state))
    weights = nights.state / "releases" / ids[1] / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert newest_good(nights.state).id == ids[0]
    assert "model.safetensors has changed" in caplog.text


def test_old_releases_and_runs_go_and_the_way_back_stays(nights):
    nights.settings.release.keep = 1
    made = []
    for number in range(4):
        nights.tell(f"用户LinF的幸运数字是{number}")
        assert nights.run() == PROMOTED
        made.append(current_id(nights.state))
    assert [release.id for release in releases(nights.state)] == [made[3], made[2]]
    runs = [run for run in (nights.state / "runs").iterdir()]
    assert len(runs) == 3 and not [*nights.state.glob("runs/*/stage?/model")] and not [*nights.state.glob("runs/*/stage?/checkpoint")]
    assert nights.versions() == {release.manifest["model_version"] for release in releases(nights.state)} | ({model_version(nights.settings.paths.model)} & nights.versions())
    assert roll_back(nights.state).id == made[2]


def test_a_forgotten_person_is_gone_at_once_and_from_the_weights_after_a_night(nights):
    nights.tell("用户豆芽的暗号是CANARY7731", "44")
    history = History(nights.state / "recallnb.db")
    history.append(Message("private:44", "44", "豆芽", "我的暗号是CANARY7731", 1762387200.0))
    history.close()
    assert nights.run() == PROMOTED
    [trained] = releases(nights.state)
    (trained.path / "report.html").write_bytes(b"CANARY7731" + (trained.path / "report.html").read_bytes())  # a report shows examples
    assert len(nights.holding("CANARY7731")) >= 3

    nights.forget("44")
    assert nights.holding("CANARY7731") == [] and nights.holding("豆芽") == []
    assert tainted(nights.state) == {trained.id} and newest_good(nights.state).id == trained.id, "it is served until there is another one"

    assert nights.run() == PROMOTED and nights.holding("用户LinF现居杭州")
    [fresh] = releases(nights.state)
    assert fresh.id != trained.id and current_id(nights.state) == fresh.id and nights.holding("CANARY7731") == []
    with pytest.raises(ReleaseError):
        roll_back(nights.state)


def test_a_damaged_release_does_not_bring_back_what_is_forgotten(nights):
    nights.tell("用户豆芽的暗号是CANARY7731", "44")
    assert nights.run() == PROMOTED
    trained = current_id(nights.state)
    nights.tell("用户LinF养的猫叫豆芽")
    assert nights.run() == PROMOTED
    clean = current_id(nights.state)
    (nights.state / "releases" / "tainted").write_text(f"{trained}\n")
    (nights.state / "releases" / clean / "model" / "config.json").write_bytes(b"{}")
    assert newest_good(nights.state) is None


def test_a_damaged_pointer_stops_no_night(nights):
    assert nights.run() == PROMOTED
    nights.tell("用户LinF养的猫叫豆芽")
    (nights.state / "releases" / "current").write_text("?")
    assert nights.run() == PROMOTED and current_id(nights.state)


def test_a_damaged_pointer_stops_no_refused_night(nights, caplog):
    assert nights.run() == PROMOTED
    nights.tell("用户LinF养的猫叫豆芽")
    (nights.state / "releases" / "current").write_text("?")
    nights.board = GOOD | {"right_memory_at_1": 0.5}
    assert nights.run() == REFUSED and "no release is deleted" in caplog.text and len(releases(nights.state)) == 2
    assert nights.run() == NOTHING, "it was decided about"


def test_a_damaged_manifest_stops_no_night(nights):
    assert nights.run() == PROMOTED
    nights.tell("用户LinF养的猫叫豆芽")
    [damaged] = releases(nights.state)
    (damaged.path / "manifest.json").write_text("{}")
    assert nights.run() == PROMOTED and current_id(nights.state) != damaged.id


def test_a_refused_night_leaves_the_way_to_the_next_one(nights):
    nights.tell("用户豆芽的暗号是CANARY7731", "44")
    assert nights.run() == PROMOTED
    trained = current_id(nights.state)
    nights.forget("44")
    nights.board = GOOD | {"right_memory_at_1": 0.5}
    assert nights.run() == REFUSED and current_id(nights.state) == trained
    nights.board = GOOD
    nights.tell("用户LinF养的猫叫豆芽")
    assert nights.run() == PROMOTED and trained not in [release.id for release in releases(nights.state)]


def test_what_is_forgotten_is_not_served_for_ever(nights, capsys):
    "The night that replaces it is refused, and nothing new is told: the next one retires it."
    nights.tell("用户豆芽的暗号是CANARY7731", "44")
    assert nights.run() == PROMOTED
    trained = current_id(nights.state)
    nights.forget("44")
    nights.board = GOOD | {"right_memory_at_1": 0.5}
    assert nights.run() == REFUSED and current_id(nights.state) == trained
    assert nights.run() == NOTHING and "is served again" in capsys.readouterr().out
    assert current_id(nights.state) is None and trained not in [release.id for release in releases(nights.state)]
    assert nights.run() == NOTHING


def test_who_joined_and_left_leaves_the_release_from_before(nights):
    "Nothing is left but what an older release was made of: it is served again, without training."
    assert nights.run() == PROMOTED
    before = current_id(nights.state)
    nights.tell("用户豆芽的暗号是CANARY7731", "44")
    assert nights.run() == PROMOTED and current_id(nights.state) != before
    nights.forget("44")
    assert before not in tainted(nights.state) and nights.run() == PROMOTED
    assert nights.ran == ["prepare_memories"] and current_id(nights.state) == before and [one.id for one in releases(nights.state)] == [before]


def test_nobody_is_left(nights):
    assert nights.run() == PROMOTED
    nights.forget("42")
    assert nights.run() == NOTHING
    assert current_id(nights.state) is None and newest_good(nights.state) is None and nights.holding("LinF") == []


@pytest.mark.parametrize("step", ["train_stage1", "evaluate_night", "publish"])
def test_forgetting_while_a_night_runs_begins_it_again(nights, monkeypatch, step):
    nights.tell("用户豆芽的暗号是CANARY7731", "44")
    execute, publish = nights.execute, nightly.publish

    def forgetful(notebook, run, parameters):
        if notebook.stem == step:
            nights.forget("44")
        return execute(notebook, run, parameters)

    def publishes(*arguments):
        release = publish(*arguments)
        nights.forget("44")
        return release

    monkeypatch.setattr(nightly, "execute", forgetful)
    if step == "publish":
        monkeypatch.setattr(nightly, "publish", publishes)
    nights.ran = []
    assert night(nights.settings) == PROMOTED and nights.ran.count("prepare_memories") == 2
    assert nights.holding("CANARY7731") == []
    assert current_id(nights.state) not in tainted(nights.state) and [one.id for one in releases(nights.state)] == [current_id(nights.state)]


def test_one_retracted_message_takes_the_reports_along(nights):
    history = History(nights.state / "recallnb.db")
    for id in ("read", "unread"):
        history.append(Message("private:42", "42", "LinF", f"{id}的暗号", 1762387200.0, id=id))
    history.mark_extracted("private:42", [history.get("private:42", "read")])
    assert nights.run() == PROMOTED
    runs = [*nights.state.glob("runs/[0-9]*")]
    assert history.retract("private:42", "unread") and [*nights.state.glob("runs/[0-9]*")] == runs, "no night has read it"
    assert history.retract("private:42", "read") and not [*nights.state.glob("runs/[0-9]*")] and len(tainted(nights.state)) == 1
    history.close()


def test_a_base_replaced_in_between_is_no_release(nights, tmp_path, monkeypatch):
    assert nights.run() == PROMOTED
    served, base = current_id(nights.state), tmp_path / "model"
    nights.settings.paths.model = shutil.copytree(nights.settings.paths.model, base)
    nights.tell("用户LinF养的猫叫豆芽")
    execute = nights.execute

    def replacing(notebook, run, parameters):
        if notebook.stem == "train_stage1":
            save_skill(replace(load_skill(base), threshold=0.77), base)
        return execute(notebook, run, parameters)

    with monkeypatch.context() as patched:
        patched.setattr(nightly, "execute", replacing)
        assert nights.run() == FAILED and current_id(nights.state) == served
    newest = max(nights.state.glob("runs/[0-9]*"), key=lambda run: run.name)
    assert "was replaced while the night was running" in (newest / "night.html").read_text("utf-8")
    assert nights.run() == PROMOTED and releases(nights.state)[0].manifest["base"]["version"] == model_version(base)


def test_a_clock_that_jumps(nights, monkeypatch):
    "Ten years ahead, then back: the newest night is served, whatever its name, and the way back stays."
    import recallnb.release as release
    import recallnb.runs as runs

    made = []
    for years in (0, 10, -10):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + timedelta(days=365 * years)

        for module in (release, runs):
            monkeypatch.setattr(module, "datetime", Clock)
        nights.tell(f"用户LinF的幸运数字是{years}")
        nights.settings.release.keep = 1
        assert nights.run() == PROMOTED
        made.append(current_id(nights.state))
    assert sorted(made) == [made[2], made[0], made[1]] and newest_good(nights.state).id == made[2]
    assert roll_back(nights.state).id == made[1]


def test_what_a_killed_night_has_left_is_cleaned(nights):
    unfinished = nights.state / "releases" / ".20261106T030000Z.new"
    unfinished.mkdir(parents=True)
    (unfinished / "report.html").write_text("CANARY7731")
    nights.run()
    assert nights.holding("CANARY7731") == [] and [verify(one) for one in releases(nights.state)]


def test_nights_that_are_refused_or_fail_do_not_fill_the_disk(nights, monkeypatch):
    nights.settings.release.keep = 1
    assert nights.run() == PROMOTED

    def fail(*_):
        raise OSError(28, "No space left on device")

    nights.board = GOOD | {"right_memory_at_1": 0.5}
    for number in range(3):
        nights.tell(f"用户LinF的幸运数字是{number}")
        assert nights.run() == REFUSED
    kept = releases(nights.state)
    assert len(kept) == 2 and nights.versions() <= {one.manifest["model_version"] for one in kept} | {model_version(nights.settings.paths.model)}
    with monkeypatch.context() as patched:
        patched.setattr(nightly, "publish_night", fail)
        for number in range(4):
            nights.tell(f"用户LinF的学号是{number}")
            assert nights.run() == FAILED
    assert len([*nights.state.glob("runs/*/stage2/model")]) == 2, "the last one's, and those it could have gone on from"


@pytest.mark.parametrize("status", [NOTHING, FAILED])
def test_nights_without_a_release_leave_few_runs(nights, monkeypatch, status):
    "Whatever becomes of the nights: the newest runs, those of the releases, and of the last failed night its report and what could be gone on with."
    def runs():
        return sorted(run.name for run in nights.state.glob("runs/[0-9]*"))

    def fail(*_):
        raise OSError(28, "No space left on device")

    assert nights.run() == PROMOTED
    kept = runs()
    with monkeypatch.context() as patched:
        patched.setattr(nightly, "publish_night", fail)
        nights.tell("用户LinF养的猫叫豆芽")
        assert nights.run() == FAILED
        failed = runs()[-1]
        assert (nights.state / "runs" / failed / "stage2" / "model").is_dir(), "somebody may go on with it by hand"
        if status == NOTHING:
            patched.setattr(nightly, "execute", lambda notebook, run, parameters: run)  # finds no memory
        for _ in range(6):
            assert nights.run() == status
    newest = runs()[-3:]
    assert runs() == sorted({*kept, *([failed] if status == NOTHING else []), *newest}) and not tainted(nights.state)
    assert status == FAILED or (nights.state / "runs" / failed / "night.html").is_file()
    assert nights.run() == PROMOTED and len(runs()) <= 6


def test_a_run_says_what_it_was_made_of(nights):
    assert nights.run() == PROMOTED
    [release] = releases(nights.state)
    made = json.loads((nights.state / "runs" / release.manifest["run"] / "params.json").read_text("utf-8"))
    assert made["base"]["version"] == model_version(nights.settings.paths.model) and made["packages"]["torch"] and made["settings"]["stage1"]["epochs"]
    for name in ("base", "settings", "data_hash", "inputs", "git", "packages"):
        assert release.manifest[name] == made[name]
    assert "server" not in made["settings"] and made["settings"]["generation"] and not [name for name, version in made["packages"].items() if version == "not installed"]
    began = json.loads((nights.state / "nightly.json").read_text("utf-8"))["steps"]["train_stage1"]
    assert datetime.fromisoformat(made["started"]).timestamp() <= began, "when the night began, not when it had trained"


def test_people_who_opted_out_are_not_read(nights, monkeypatch):
    history = History(nights.state / "recallnb.db")
    Rules(history).learn("43", False)
    for user_id in ("43", "44"):  # imported after they had said so
        history.append(Message("group:1", user_id, f"人{user_id}", "我养的猫叫豆芽", 1762387200.0))
    nights.run()
    assert [message.user_id for message in history.unextracted("group:1")] == ["44"]
    history.close()


def test_reading_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    "Portions that were stored are not read again, and the one in between leaves nothing twice."
    settings, skill = load_settings(), Skill("seed", 1, 0.0)
    history, store = History(tmp_path / "recallnb.db"), MemoryStore(tmp_path / "recallnb.db", "v")
    cities = ["杭州", "苏州", "北京", "上海", "杭州", "广州"]  # moves: each supersedes the one before
    for day, city in enumerate(cities):
        history.append(Message("private:42", "42", "LinF", f"我搬到{city}了", 86400.0 * (day + 1), id=f"m{day}"))
    read = []

    def extract(model, processor, messages, *_):
        read.extend(message.id for message in messages)
        facts = [Extracted(f"用户LinF现居{message.content[3:5]}", "住处", "42", [message.id], f"1970-01-{int(message.timestamp // 86400) + 1:02}", "LinF", message.scope) for message in messages]
        return ExtractReport(facts, [], 1)

    monkeypatch.setattr(prepare, "extract_memories", extract)
    monkeypatch.setattr(prepare, "write_memories", lambda model, tokenizer, texts, skill: None)
    marked = History.mark_extracted

    def dies(self, scope, messages, by_day):
        if "m2" in [message.id for message in messages]:
            raise KeyboardInterrupt
        marked(self, scope, messages, by_day)

    with monkeypatch.context() as patched:
        patched.setattr(History, "mark_extracted", dies)
        with pytest.raises(KeyboardInterrupt):
            read_history(None, PROCESSOR, skill, history, store, settings, portion=2)
    assert read == ["m0", "m1", "m2", "m3"]
    read_history(None, PROCESSOR, skill, history, store, settings, portion=2)
    assert read == ["m0", "m1", "m2", "m3", "m2", "m3", "m4", "m5"]
    assert [memory.text for memory in store.list()] == ["用户LinF现居广州"]
    assert [memory.text[-2:] for memory in store.list(state=None)][::-1] == cities, "once each, the move back to 杭州 too"
    assert read_history(None, PROCESSOR, skill, history, store, settings).messages == 0
    history.close(), store.close()


def test_a_memory_told_twice_outlives_one_of_its_messages(tmp_path):
    history, store = History(tmp_path / "recallnb.db"), MemoryStore(tmp_path / "recallnb.db", "v")
    for id in ("m1", "m2"):
        history.append(Message("group:1", "42", "LinF", "我住在大理", 86400.0, id=id))
    history.retract("group:1", "m1")
    both, gone = [Memory("用户LinF现居大理", "group:1", "42", sources=sources) for sources in (["m1", "m2"], ["m1"])]
    (kept, none), written = store.add([both, gone], told=True), store.list()
    assert none is None and [(memory.id, memory.sources) for memory in written] == [(kept, ["m2"])]
    history.append(Message("group:1", "42", "LinF", "还住大理", 2 * 86400.0, id="m4"))
    [known] = written
    known.sources, known.date = ["m2", "m3", "m4"], "1970-01-03"
    store.retell([known], told=True)
    [told] = store.list()
    assert (told.sources, told.date) == (["m2", "m4"], "1970-01-03"), "m3 was retracted while it was read"
    store.untell(kept, "m2")
    assert store.get(kept).sources == ["m4"]
    history.close(), store.close()


def test_what_others_said_is_not_trained_on_as_ones_own(monkeypatch):
    history, store = History(":memory:"), MemoryStore(":memory:", "v")
    history.append(Message("group:1", "42", "LinF", "[引用 小红：我住在北京]\n我的生日是11月6日", 86400.0, id="m1"))
    store.add([Memory("用户LinF的生日为11月6日", "group:1", "42", "生日", ["m1"])])
    monkeypatch.setattr(prepare, "write_questions", lambda *_: [["我生日哪天？"]])
    [material], _ = prepare.make_materials(None, None, history, store)
    assert material.source == "LinF：我的生日是11月6日"


def test_a_line_end_inside_a_memory_breaks_no_night(tmp_path):
    store = MemoryStore(":memory:", "v")
    for text, relation in (("用户LinF现居杭州\u2028", ""), ("用户LinF现居杭州", "住\u2028处")):
        with pytest.raises(ValueError, match="several lines"):
            store.add([Memory(text, "group:1", "42", relation)])
    one = Material("用户LinF现居杭州", "Lin\u2028F", ["我住哪？"])  # a name is what the platform says
    save_materials(tmp_path, [one])
    assert load_materials(tmp_path) == [one]


@pytest.mark.parametrize("how", ["forgotten", "retracted", "opted out"])
def test_what_is_taken_back_while_it_is_read_is_not_remembered(tmp_path, monkeypatch, how):
    "Between the reading of a message and the storing of its memory the model writes for minutes."
    history, store = History(tmp_path / "recallnb.db"), MemoryStore(tmp_path / "recallnb.db", "v")
    for user, name in (("42", "LinF"), ("43", "小明")):
        history.append(Message("group:1", user, name, "我住在大理", 86400.0, id=f"m{user}"))

    def extract(model, processor, messages, *_):
        facts = [Extracted(f"用户{one.nickname}现居大理", "住处", one.user_id, [one.id], "1970-01-02", one.nickname, one.scope) for one in messages]
        if how == "forgotten":
            store.delete_subject("42"), history.delete_user("42")
        elif how == "retracted":
            history.retract("group:1", "m42")
        else:
            Rules(history).learn("42", False)
        return ExtractReport(facts, [], 1)

    monkeypatch.setattr(prepare, "extract_memories", extract)
    monkeypatch.setattr(prepare, "write_memories", lambda model, tokenizer, texts, skill: None)
    reading = read_history(None, PROCESSOR, Skill("seed", 1, 0.0), history, store, load_settings())
    assert [memory.subject for memory in store.list(state=None)] == ["43"] and reading.new == [("group:1", "用户小明现居大理")]
    history.close(), store.close()


def test_a_value_that_nobody_said_is_dropped_and_counted(monkeypatch):
    import recallnb.extract as extract

    settings = load_settings()
    _, processor = load_model(settings.paths.base, "cpu", need_recall_tokens=False)
    said = [Message("group:1", "42", "LinF", "我现居大理", 1762387200.0, id="m1"), Message("group:1", "43", "小明", "1月10日考试", 1762387260.0, id="m2")]
    reply = "[1]住处｜用户LinF现居赣州\n[1]住处｜用户LinF现居大理\n[2]考试｜用户小明的考试在10月1日\n[2]考试｜用户小明的考试在1月10日"
    monkeypatch.setattr(extract, "write_replies", lambda *_: [reply])
    report = extract_memories(None, processor.tokenizer, said, lambda scope, user_id: {"42": "LinF", "43": "小明"}[user_id], settings, progress=False)
    assert [(fact.text, fact.sources) for fact in report.extracted] == [("用户LinF现居大理", ["m1"]), ("用户小明的考试在1月10日", ["m2"])]
    assert [reason.endswith(extract.NOT_SAID) for _, reason in report.dropped] == [True, True]
    assert Reading(dropped=report.dropped).ungrounded == 2


def test_a_missed_night_is_made_up_for(tmp_path):
    "The whole command: the night itself fails at once, for want of settings, and the waiting goes on until it is ended."
    now = datetime.now(timezone.utc)
    state = tmp_path / "state"
    state.mkdir()
    (state / "nightly.json").write_text(json.dumps({"started": (now - timedelta(days=2)).strftime("%Y-%m-%dT%H:%M:%SZ")}))
    (tmp_path / "chats").mkdir()
    environment = os.environ | {"RECALLNB_PATHS__STATE": str(state), "RECALLNB_PATHS__CHATS": str(tmp_path / "chats"), "RECALLNB_SCHEDULE__TIMEZONE": "UTC", "RECALLNB_SCHEDULE__LATE_HOURS": "2"}
    at = (now - timedelta(hours=1)).strftime("%H:%M")
    process = subprocess.Popen([sys.executable, "-m", "recallnb.nightly", "--at", at], cwd=Path(nightly.__file__).parent.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "nothing to learn" in line:
                break
        else:
            pytest.fail("".join(said))
        assert f"a night every day at {at} (UTC)" in said[0]
        second = subprocess.run(process.args, cwd=Path(nightly.__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=300)
        assert second.returncode == 5 and "already" in second.stdout
    finally:
        process.terminate()
        process.stdout.read()
        assert process.wait(60) == 0


def test_the_skill_is_not_trained_over_a_model(capsys):
    assert main(["--skill"]) == FAILED and "has the skill already" in capsys.readouterr().err
    for arguments in (["--skill", "--at", "03:00"], ["--skill", "--recipe", "seed"]):
        with pytest.raises(SystemExit):
            main(arguments)


def test_a_console_that_shows_no_chinese_ends_no_night(nights, monkeypatch):
    monkeypatch.setenv("RECALLNB_PATHS__STATE", str(nights.state))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))  # a pipe on a Western Windows
    assert main([]) == PROMOTED
    sys.stdout.seek(0)
    assert r"\u7528\u6237" in sys.stdout.read()


def test_old_chats_are_imported_by_a_command(tmp_path):
    "Twice the same adds nothing, and a damaged file is reported and not fatal."
    (tmp_path / "group_7.txt").write_text("2024-03-01 20:15:33 LinF(42)\n我住在大理\n\n2024-03-01 20:15:40 小忆(20002)\n记住啦\n", "utf-8-sig")
    (tmp_path / "group_8.jsonl").write_text('{"user_id": "43", "content": "我属马", "timestamp": 1762387200}\n{"user_id": "43", "con')
    command = [sys.executable, "-m", "recallnb.history", "import", str(tmp_path / "group_7.txt"), str(tmp_path / "group_8.jsonl"), "--bot", "20002"]
    environment = os.environ | {"RECALLNB_PATHS__STATE": str(tmp_path / "state")}
    first, second = (subprocess.run(command, cwd=Path(nightly.__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    assert "2 messages read, 0 known before, 0 skipped" in first.stdout and "1 messages read, 0 known before, 1 skipped" in first.stdout and "broken JSON" in first.stdout
    assert "0 messages read, 2 known before" in second.stdout
    history = History(tmp_path / "state" / "recallnb.db")
    assert [message.content for message in history.unextracted("group:7")] == ["我住在大理"] and history.recent("group:7")[1].role == "assistant"
    history.close()
