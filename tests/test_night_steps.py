"""What a night decides, with its notebooks replaced by functions: no training, so that every turn can be tried."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook

from recallnb import nightly
from recallnb.embed import Skill, load_skill, save_skill
from recallnb.extract import ExtractReport, extract_memories
from recallnb.history import History, Message
from recallnb.model import load_model, model_version
from recallnb.nightly import FAILED, NOTHING, PROMOTED, REFUSED, main, night
from recallnb.prepare import read_history
from recallnb.release import current_id, newest_good, releases, roll_back
from recallnb.rules import Rules
from recallnb.settings import load_settings
from recallnb.store import Memory, MemoryStore
from recallnb.train import Material, save_materials

GOOD = {"trigger_recall": 1.0, "false_recall": 0.0, "right_memory_at_1": 1.0, "free_decode_exact": 1.0, "answer_guarded": 1.0}


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
            store = MemoryStore(self.state / "recallnb.db", "any")
            save_materials(run, [Material(memory.text, "LinF") for memory in store.list()])
            store.close()
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
            (run / "refused.json").write_text(json.dumps(nightly_judge(board, self.state)))
        write(new_notebook(cells=[new_code_cell("1 + 1")]), run / notebook.name)
        return run / notebook.name

    def tell(self, text):
        "A further memory."
        store = MemoryStore(self.state / "recallnb.db", "any")
        store.add([Memory(text, "private:42", "42", text)])
        store.close()

    def versions(self):
        "Which models have written vectors."
        store = MemoryStore(self.state / "recallnb.db", "any")
        found = {version for (version,) in store.database.connection.execute("SELECT DISTINCT version FROM vector")}
        store.close()
        return found


def nightly_judge(board, state):
    from recallnb.board import current_figures, judge

    return judge(board, current_figures(state))


@pytest.fixture
def nights(tmp_path, monkeypatch):
    return Night(tmp_path / "state", monkeypatch)


def files(folder):
    "Name, size and time of everything in a folder."
    return {str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_a_second_night_on_the_same_history_changes_nothing(nights, capsys):
    assert nights.run() == PROMOTED
    [release] = releases(nights.state)
    before, versions = files(nights.state / "releases"), nights.versions()
    assert nights.run() == NOTHING and nights.ran == ["prepare_memories"]
    assert f"release {release.id} was made of the same" in capsys.readouterr().out
    assert files(nights.state / "releases") == before and nights.versions() == versions
    nights.tell("用户LinF养的猫叫豆芽")
    assert nights.run() == PROMOTED and current_id(nights.state) != release.id


@pytest.mark.parametrize("what", ["setting", "file", "model"])
def test_other_settings_are_another_night(nights, what, tmp_path):
    assert nights.run() == PROMOTED
    if what == "setting":
        nights.settings.stage2.learning_rate /= 2
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


def test_a_night_that_died_before_promoting_is_completed(nights, monkeypatch):
    class Killed(BaseException):
        "No `except Exception` catches it."

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(nightly, "promote", die)
        with pytest.raises(Killed):
            nights.run()
    [release] = releases(nights.state)
    assert current_id(nights.state) is None
    assert nights.run() == PROMOTED and nights.ran == ["prepare_memories"]
    assert current_id(nights.state) == release.id and len(releases(nights.state)) == 1


@pytest.mark.parametrize("step", ["train_stage2", "publish", "write_vectors"])
def test_a_failure_leaves_a_report_and_the_old_release(nights, monkeypatch, step):
    assert nights.run() == PROMOTED
    served = current_id(nights.state)
    nights.tell("用户LinF养的猫叫豆芽")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if step == "train_stage2":
            patched.setattr(shutil, "copytree", fail)
        else:
            patched.setattr(nightly, step, fail)
        assert nights.run() == FAILED
    assert current_id(nights.state) == served and json.loads((nights.state / "nightly.json").read_text())["status"] == FAILED
    newest = max((run for run in (nights.state / "runs").iterdir() if run.is_dir()), key=lambda run: run.name)
    report = (newest / "night.html").read_text("utf-8")
    assert report.index("has failed in") < report.index("No space left on device")
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


def test_a_run_says_what_it_was_made_of(nights):
    assert nights.run() == PROMOTED
    [release] = releases(nights.state)
    made = json.loads((nights.state / "runs" / release.manifest["run"] / "params.json").read_text("utf-8"))
    assert made["base"]["version"] == model_version(nights.settings.paths.model) and made["packages"]["torch"] and made["settings"]["stage1"]["epochs"]
    for name in ("base", "settings", "data_hash", "inputs", "git", "packages"):
        assert release.manifest[name] == made[name]
    assert "server" not in made["settings"]


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
    import recallnb.prepare as prepare
    from recallnb.extract import Extracted

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

    def dies(self, scope, messages):
        if "m2" in [message.id for message in messages]:
            raise KeyboardInterrupt
        marked(self, scope, messages)

    class Processor:
        tokenizer = None

    with monkeypatch.context() as patched:
        patched.setattr(History, "mark_extracted", dies)
        with pytest.raises(KeyboardInterrupt):
            read_history(None, Processor, skill, history, store, settings, portion=2)
    assert read == ["m0", "m1", "m2", "m3"]
    read_history(None, Processor, skill, history, store, settings, portion=2)
    assert read == ["m0", "m1", "m2", "m3", "m2", "m3", "m4", "m5"]
    assert [memory.text for memory in store.list()] == ["用户LinF现居广州"]
    assert [memory.text[-2:] for memory in store.list(state=None)][::-1] == cities, "once each, the move back to 杭州 too"
    assert read_history(None, Processor, skill, history, store, settings).messages == 0
    history.close(), store.close()


def test_a_value_that_nobody_said_is_dropped_and_counted(monkeypatch):
    import recallnb.extract as extract

    settings = load_settings()
    _, processor = load_model(settings.paths.base, "cpu", need_recall_tokens=False)
    said = [Message("group:1", "42", "LinF", "我现居大理", 1762387200.0, id="m1"), Message("group:1", "43", "小明", "1月10日考试", 1762387260.0, id="m2")]
    reply = "[1]住处｜用户LinF现居赣州\n[1]住处｜用户LinF现居大理\n[2]考试｜用户小明的考试在10月1日\n[2]考试｜用户小明的考试在1月10日"
    monkeypatch.setattr(extract, "write_replies", lambda *_: [reply])
    report = extract_memories(None, processor, said, lambda scope, user_id: {"42": "LinF", "43": "小明"}[user_id], settings, progress=False)
    assert [(fact.text, fact.sources) for fact in report.extracted] == [("用户LinF现居大理", ["m1"]), ("用户小明的考试在1月10日", ["m2"])]
    assert [reason.endswith(extract.NOT_SAID) for _, reason in report.dropped] == [True, True]


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
