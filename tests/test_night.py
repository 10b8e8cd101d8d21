"""The night from its command: a release in the end, or a reason and the right exit status."""

import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from papermill.exceptions import PapermillExecutionError

from recallnb.embed import load_skill
from recallnb.history import History
from recallnb.model import load_model, model_version
from recallnb.nightly import NOTHING, PROMOTED, RUNNING, main, move_to, night, only_night
from recallnb.release import current_id, releases, verify
from recallnb.runs import check_parameters, execute, new_run, newest_run, notebook_file
from recallnb.settings import load_settings
from recallnb.store import MemoryStore
from recallnb.traces import tainted


def settings_in(state):
    settings = load_settings()
    settings.paths.state = state
    return settings


def command(state, *arguments, **environment):
    "Run `python -m recallnb.nightly` as a user does; its output is in `stdout`."
    return subprocess.run(
        [sys.executable, "-m", "recallnb.nightly", *arguments],
        cwd=ROOT,
        env=os.environ | environment | {"RECALLNB_PATHS__STATE": str(state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def smoke_night(tmp_path_factory):
    "One smoke night from an empty state: the state's folder, the run's folder, and what was printed."
    state = tmp_path_factory.mktemp("night") / "state"
    done = command(state, "--smoke")
    assert done.returncode == PROMOTED, done.stdout[-8000:]
    [run] = [entry for entry in (state / "runs" / "smoke").iterdir() if entry.is_dir()]
    return state, run, done.stdout


def test_a_night_publishes_a_release(smoke_night):
    state, run, printed = smoke_night
    [release] = releases(state)
    manifest = verify(release).manifest
    assert manifest["run"] == run.name and manifest["recipe"] == "default" and len(manifest["data_hash"]) == 64
    assert manifest["model_version"] == model_version(release.model)
    assert current_id(state) is None, "a smoke run's model has learned nothing"
    model, processor = load_model(release.model)
    assert load_skill(release.model).space == "written" and "<recall>" in processor.tokenizer.get_added_vocab()
    assert release.metrics["trigger_recall"] >= 0 and "trigger_recall" in printed


def test_a_run_can_be_explained(smoke_night):
    _, run, _ = smoke_night
    made = json.loads((run / "params.json").read_text("utf-8"))
    assert made["parameters"] == {"recipe": "default", "smoke": True} and made["packages"]["torch"] and made["settings"]["stage2"]["epochs"] == 1
    for stage in ("stage1", "stage2"):
        metrics = json.loads((run / stage / "metrics.json").read_text("utf-8"))
        assert metrics["steps"] > 0 and metrics["memories"] > 0


def test_reports_hide_code_and_need_no_network(smoke_night):
    state, run, _ = smoke_night
    for name in ("prepare_memories", "train_stage1", "train_stage2", "evaluate_night", "night"):
        report = (run / f"{name}.html").read_text("utf-8")
        assert "run_stage(" not in report and "<img" in report
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=.https?://", report)
    assert (releases(state)[0].path / "report.html").read_text("utf-8") == (run / "night.html").read_text("utf-8")


def test_promotion_finds_all_vectors(smoke_night):
    "Before a release is served, it has written every memory; afterwards the vectors of the skill checkpoint are still there."
    state, _, _ = smoke_night
    [release] = releases(state)
    store = MemoryStore(state / "recallnb.db", release.manifest["model_version"])
    assert store.missing() == []
    settings = settings_in(state)
    assert move_to(release, settings) == [] and current_id(state) == release.id
    assert store.missing(model_version(settings.paths.model)) == []


def holding(state, texts, vectors=()):
    "Which files hold one of these texts, in any of the ways in which a night writes them, or the beginning of one of these vectors."
    ways = {way.encode() for text in texts for way in (text, json.dumps(text)[1:-1], html.escape(text))} | {vector[:64] for vector in vectors}
    return {file.relative_to(state).as_posix() for file in state.rglob("*") if file.is_file() and any(way in file.read_bytes() for way in ways)}


def test_who_is_forgotten_is_in_no_file_of_the_night(smoke_night, tmp_path):
    "Rows, vectors, notebooks, reports, the release's report: all that a true night writes. What others have said stays."
    state = shutil.copytree(smoke_night[0], tmp_path / "state")
    history, store = History(state / "recallnb.db"), MemoryStore(state / "recallnb.db", "any")
    said = {}  # user id -> what this person has said, and nobody else
    for message in (message for scope in history.scopes() for message in history.recent(scope, -1) if len(message.content) > 6):
        said.setdefault(message.content, set()).add(message.user_id)
    trained = (smoke_night[1] / "memories.jsonl").read_text("utf-8")
    subject = next(memory.subject for memory in store.list(limit=-1) if memory.text in trained)
    texts = [memory.text for memory in store.list(subject=subject, state=None, limit=-1)] + [content for content, people in said.items() if people == {subject}]
    rows = store.database.connection.execute("SELECT key, value, version FROM vector JOIN memory ON memory.id = memory_id WHERE subject = ?", (subject,)).fetchall()
    vectors = [bytes(blob) for key, value, _ in rows for blob in (key, value)]
    assert len({version for *_, version in rows}) == 2, "of the skill checkpoint and of the release"
    assert "recallnb.db" in holding(state, [], vectors) and set(texts) & set(store.texts(history.scopes()))
    before = holding(state, texts)
    assert "recallnb.db" in before and {name.rpartition("/")[2] for name in before} >= {"memories.jsonl", "prepare_memories.ipynb", "prepare_memories.html", "report.html"}

    store.delete_subject(subject)
    history.delete_user(subject)
    assert holding(state, texts, vectors) == set()
    assert not set(texts) & set(store.texts(history.scopes())), "guarded decoding speaks nothing else"
    assert {release.id for release in releases(state)} == tainted(state) and [verify(release) for release in releases(state)]
    assert store.count() > 0, "the others are still remembered"
    store.close(), history.close()


def test_a_second_night_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECALLNB_PATHS__STATE", str(tmp_path))
    with only_night(tmp_path):
        assert main(["--smoke"]) == RUNNING and str(os.getpid()) in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_empty_history_publishes_nothing(tmp_path, monkeypatch, capfd):
    (tmp_path / "chats").mkdir()
    monkeypatch.setenv("RECALLNB_PATHS__STATE", str(tmp_path / "state"))
    monkeypatch.setenv("RECALLNB_PATHS__CHATS", str(tmp_path / "chats"))
    assert main([]) == NOTHING and "nothing to learn" in capfd.readouterr().out
    assert releases(tmp_path / "state") == [] and not [*tmp_path.rglob("memories.jsonl")]
    [report] = tmp_path.rglob("prepare_memories.html")
    assert "The history is empty" in report.read_text("utf-8")


@pytest.mark.parametrize("name", ["prepare_memories", "train_stage1", "train_stage2", "evaluate_night", "train_skill"])
def test_an_unknown_parameter_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.ipynb has no parameter smkoe: it takes .*smoke"):
        check_parameters(notebook_file(name), {"smkoe": True})
    with pytest.raises(ValueError, match="smkoe"):
        execute(notebook_file(name), tmp_path, {"smkoe": True})
    assert not [*tmp_path.iterdir()]


def test_a_failing_notebook_leaves_its_report(tmp_path):
    with pytest.raises(PapermillExecutionError, match="no training stage"):
        execute(notebook_file("train_stage1"), tmp_path, {"run": str(tmp_path), "recipe": "nonsense", "smoke": True})
    report = (tmp_path / "train_stage1.html").read_text("utf-8")
    assert report.index("Failed") < report.index("no training stage") < report.index("Stage 1: finding")
    assert "no training stage" in (tmp_path / "train_stage1.ipynb").read_text("utf-8")


def test_a_skill_is_made_of_a_base_model(tmp_path, monkeypatch):
    "The command, its notebook and its report; a smoke run installs nothing."
    monkeypatch.setenv("RECALLNB_PATHS__STATE", str(tmp_path / "state"))
    assert main(["--skill", "--smoke"]) == PROMOTED
    [run] = (tmp_path / "state" / "runs" / "smoke").iterdir()
    assert load_skill(run / "model").values == load_settings().recall.values and json.loads((run / "model" / "metrics.json").read_text("utf-8"))["lessons"] == 16
    assert "<img" in (run / "train_skill.html").read_text("utf-8")


def test_a_night_without_notebooks_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install -e"):
        night(settings_in(tmp_path / "state"), notebooks=tmp_path)
    assert not (tmp_path / "state").exists()


def test_the_seed_recipe_runs_in_two_processes(smoke_night, tmp_path):
    "Stage 2 alone, on the memories of a night: it runs stage 1 by itself, and both train under `accelerate launch`."
    settings, out = settings_in(tmp_path / "state"), tmp_path / "out.ipynb"
    prepared = new_run(settings, smoke=True)
    for name in ("memories.jsonl", "questions.jsonl", "people.json"):
        shutil.copy(smoke_night[1] / name, prepared)
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"  # several processes; on which device is in the settings
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "nbs/train_stage2.ipynb", str(out), "-p", "smoke", "True", "-p", "recipe", "seed", "-p", "launch", launch],
        cwd=ROOT,
        env=os.environ | {"RECALLNB_PATHS__STATE": str(settings.paths.state), "RECALLNB_MODEL__DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    run = newest_run(settings, "seed", smoke=True)
    assert run == prepared and load_skill(run / "stage2" / "model").space == "seed"
    assert "--num_processes 2" in out.read_text("utf-8")
    for number in (1, 2):  # the questions kept out are asked after the epoch, in several processes too
        assert len(json.loads((run / f"stage{number}" / "metrics.json").read_text("utf-8"))["recall_at_1_epochs"]) == 1
    assert newest_run(settings, "default", smoke=True) is None and newest_run(settings, "seed") is None
    assert new_run(settings).parent == settings.paths.state / "runs"
