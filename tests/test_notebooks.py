"""Every notebook is a test: by nbdev-test as it stands, or, where it has parameters, by papermill as a smoke run."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT
from fastcore.nbio import nb_frontmatter, read_nb

ALL = [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if not any(part[0] in "._" for part in path.relative_to(NOTEBOOKS).parts)]
SKIPPED = [path for path in ALL if nb_frontmatter(read_nb(path)).get("skip_exec")]


def run(*command, **environment):
    "Run a command from the root; its output is the failure's message."
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command} returned {done.returncode}\n{done.stdout[-8000:]}"


@pytest.mark.parametrize("path", [path for path in ALL if path not in SKIPPED], ids=lambda path: path.stem)
def test_notebook(path):
    "Run in a process of its own, so that no notebook sees another one's seeds, environment or memory."
    run(Path(sysconfig.get_path("scripts")) / "nbdev-test", path)


@pytest.mark.parametrize("path", SKIPPED, ids=lambda path: path.stem)
def test_notebook_with_parameters(path, tmp_path):
    "The smoke run from an empty state: each of these notebooks works by itself, and takes seconds."
    state = tmp_path / "state"
    run(sys.executable, "-m", "papermill", path, tmp_path / path.name, "-p", "smoke", "True", "--cwd", ROOT, RECALLNB_PATHS__STATE=str(state))
