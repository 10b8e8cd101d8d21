"""The night from its command: a release in the end, or a reason and the right exit status."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from papermill.exceptions import PapermillExecutionError

from recallnb.embed import load_skill
from recallnb.model import load_model, model_version
from recallnb.nightly import NOTHING, PROMOTED, RUNNING, move_to, night, only_night
from recallnb.release import current_id, releases, verify
from recallnb.runs import check_parameters, execute, new_run, newest_run, notebook_file
from recallnb.settings import load_settings
from recallnb.store import MemoryStore


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
        assert "run_stage(" not in report and "image/png" in report or name == "prepare_memories"
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


def test_a_second_night_is_refused(tmp_path):
    with only_night(tmp_path):
        done = command(tmp_path, "--smoke")
    assert done.returncode == RUNNING and str(os.getpid()) in done.stdout, done.stdout[-4000:]
    assert not (tmp_path / "runs").exists()


def test_an_empty_history_publishes_nothing(tmp_path):
    (tmp_path / "chats").mkdir()
    done = command(tmp_path / "state", RECALLNB_PATHS__CHATS=str(tmp_path / "chats"))
    assert done.returncode == NOTHING and "nothing to learn" in done.stdout, done.stdout[-4000:]
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


def test_a_skill_is_made_of_a_base_model(tmp_path):
    "The command, its notebook and its report; a smoke run installs nothing."
    done = command(tmp_path / "state", "--skill", "--smoke")
    assert done.returncode == PROMOTED, done.stdout[-8000:]
    [run] = (tmp_path / "state" / "runs" / "smoke").iterdir()
    assert load_skill(run / "model").values == load_settings().recall.values and json.loads((run / "model" / "metrics.json").read_text("utf-8"))["lessons"] == 16
    assert "image/png" in (run / "train_skill.html").read_text("utf-8")


def test_a_night_without_notebooks_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install -e"):
        night(settings_in(tmp_path / "state"), notebooks=tmp_path)
    assert not (tmp_path / "state").exists()


def test_the_seed_recipe_runs_from_its_notebook(tmp_path):
    "Stage 2 alone, from nothing: it prepares memories and runs stage 1 by itself."
    state, out = tmp_path / "state", tmp_path / "out.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "nbs/train_stage2.ipynb", str(out), "-p", "smoke", "True", "-p", "recipe", "seed"],
        cwd=ROOT,
        env=os.environ | {"RECALLNB_PATHS__STATE": str(state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    settings = settings_in(state)
    run = newest_run(settings, "seed", smoke=True)
    assert load_skill(run / "stage2" / "model").space == "seed"
    assert newest_run(settings, "default", smoke=True) is None and newest_run(settings, "seed") is None
    assert new_run(settings).parent == state / "runs"
