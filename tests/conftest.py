"""What all tests share: an environment of their own, and the rule that a skipped test is a failed one.

A test that cannot run everywhere gets a marker (slow, gpu, browser), which pyproject.toml leaves out by default."""

import os
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"


def pytest_configure(config):
    "Before any test imports torch: no settings of the caller, no network, no window, one thread, state in a temporary folder."
    for name in [name for name in os.environ if name.startswith("RECALLNB_")]:
        del os.environ[name]
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
    )


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
