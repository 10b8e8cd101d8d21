"""Every notebook is a test: by nbdev-test as it stands, or, where it has parameters, by papermill as a smoke run."""

import multiprocessing
import os
import subprocess
import sys

import pytest
from conftest import NOTEBOOKS, ROOT
from fastcore.nbio import nb_frontmatter, read_nb
from nbdev.test import nbdev_test

ALL = [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if not any(part[0] in "._" for part in path.relative_to(NOTEBOOKS).parts)]
SKIPPED = [path for path in ALL if nb_frontmatter(read_nb(path)).get("skip_exec")]


# The processes that run notebooks are forks of one that has imported what takes seconds: torch, transformers, peft.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["peft", "recallnb.serve", "nbdev.test", "matplotlib.pyplot"])


def _nbdev_test(path, log):
    "nbdev-test from the root, its output in a file."
    os.chdir(ROOT)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    nbdev_test(str(path))


@pytest.mark.parametrize("path", [path for path in ALL if path not in SKIPPED], ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    "Run in a process of its own, so that no notebook sees another one's seeds, environment or memory."
    process = FORKS.Process(target=_nbdev_test, args=(path, log := tmp_path / "log"))
    process.start()
    process.join()
    assert process.exitcode == 0, f"nbdev-test {path} returned {process.exitcode}\n{log.read_text(errors='replace')[-8000:]}"


@pytest.mark.parametrize("path", SKIPPED, ids=lambda path: path.stem)
def test_notebook_with_parameters(path, tmp_path):
    "The smoke run from an empty state: each of these notebooks works by itself, and takes seconds."
    command = [sys.executable, "-m", "papermill", path, tmp_path / path.name, "-p", "smoke", "True", "--cwd", ROOT]
    environment = os.environ | {"RECALLNB_PATHS__STATE": str(tmp_path / "state")}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"papermill {path} returned {done.returncode}\n{done.stdout[-8000:]}"
