"""Rules of the project that no single notebook can check."""

import ast
import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT
from fastcore.nbio import nb_frontmatter, read_nb

import recallnb
from recallnb.settings import Settings, load_settings

PACKAGE = ROOT / "recallnb"
MODULES = sorted(PACKAGE.rglob("*.py"))


def notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def parameter_cells(path):
    return [cell for cell in notebook(path)["cells"] if "parameters" in cell["metadata"].get("tags", [])]


def export(folder):
    "The package as it comes out of the notebooks, from nothing but its version."
    shutil.copytree(NOTEBOOKS, folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "recallnb").mkdir()
    (folder / "recallnb/__init__.py").write_text(f'__version__ = "{recallnb.__version__}"\n', encoding="utf-8")
    command = Path(sysconfig.get_path("scripts")) / "nbdev-export"
    subprocess.run([str(command)], cwd=folder, check=True, capture_output=True)
    return folder / "recallnb"


def texts(package):
    return {str(path.relative_to(package)): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}


def test_modules_are_what_the_notebooks_export(tmp_path):
    "Also finds modules whose notebook is gone, and notebooks that were not exported."
    exported, ours = texts(export(tmp_path)), texts(PACKAGE)
    assert sorted(ours) == sorted(exported), "run nbdev-export, and delete modules without a notebook"
    differing = [name for name in ours if ours[name] != exported[name]]
    assert not differing, f"run nbdev-export, and never edit modules: {differing}"


def test_modules_import_only_from_those_before_them():
    "The number of a module's notebook is its place in the one direction in which data flows."
    number = {}
    for path in MODULES:
        if found := re.search(r"^# %% (?:\.\./)+nbs/(\d+)\w*_", path.read_text(encoding="utf-8"), re.M):
            number[path.relative_to(PACKAGE).with_suffix("").parts] = int(found[1])
    assert len(number) > 60
    for module, place in number.items():
        tree = ast.parse((PACKAGE / Path(*module)).with_suffix(".py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            package = module[: len(module) - node.level]
            named = package + tuple((node.module or "").split(".") if node.module else ())
            for target in [named, *(named + (alias.name,) for alias in node.names)]:
                assert number.get(target, 0) <= place, f"{'.'.join(module)} imports {'.'.join(target)}, which comes after it"


def is_unsafe(node):
    "Does this syntax node read or write pickles?"
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in UNSAFE for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return (node.module or "").split(".")[0] in UNSAFE or any(name in UNSAFE_CALLS for name in names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return ast.unparse(node.func) in UNSAFE_CALLS
    return isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only")


UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "cloudpickle", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle(path):
    "A pickle runs code when it is read: weights are safetensors, vectors are raw bytes."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unsafe = [f"line {node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree) if is_unsafe(node)]
    assert not unsafe, unsafe


@pytest.mark.parametrize(
    "code", ["import pickle", "torch.load('x')", "from torch import load", "import dill as d", "f(x, allow_pickle=True)", "torch.save(a, b)"]
)
def test_the_check_for_pickle_works(code):
    assert any(is_unsafe(node) for node in ast.walk(ast.parse(code)))


def with_parameters():
    "Notebooks that papermill runs: those that nbdev-test leaves out, and those of the night."
    nights = [path for kind in ("prepare_*", "train_*") for path in NOTEBOOKS.glob(f"{kind}.ipynb")]
    skipped = [path for path in NOTEBOOKS.glob("*.ipynb") if nb_frontmatter(read_nb(path)).get("skip_exec")]
    return sorted({*nights, *skipped})


def test_parameters_are_tagged():
    "nbdev-clean can strip the tag, and papermill would then pass over every -p without a word."
    for path in with_parameters():
        cells = parameter_cells(path)
        assert len(cells) == 1, f"{path.name} has {len(cells)} cells tagged parameters"
        source = "".join(cells[0]["source"])
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
        assert all(isinstance(node, (ast.Assign, ast.AnnAssign)) for node in ast.parse(source).body), f"{path.name}: only assignments"
        assert all("#" in line for line in lines), f"{path.name}: a comment on each parameter"
        assert re.search(r"^smoke\b", source, re.M), f"{path.name} has no parameter smoke"
        assert nb_frontmatter(read_nb(path)).get("skip_exec"), f"{path.name}: nbdev-test would run it for real"


def test_nbdev_keeps_the_tags():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    assert "tags" in config["allowed_cell_metadata_keys"] and not config.get("clear_all")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_whole(path):
    "A title and a line under it, no error in the outputs, and no path of somebody's machine."
    cells = notebook(path)["cells"]
    assert re.match(r"# \S.*\n+> \S", "".join(cells[0]["source"])), "begin with '# Title' and '> one line'"
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if any("widget" in kind for kind in output.get("data", {}))], "a widget is stored as other bytes at each run"
    found = re.search(r"(/home/|/Users/|/root/|/tmp/)[^\s\"']*", json.dumps([o for o in outputs if "image/png" not in o.get("data", {})]))
    assert not found, f"an output shows {found[0]}"


def test_only_widgets_are_left_to_jupyterlab():
    "`nbdev-test` passes over a cell with `eval: false`, `Run All Cells` does not: there, a program would start, or end the kernel."
    for path in NOTEBOOKS.glob("*.ipynb"):
        for source in ("".join(cell["source"]) for cell in notebook(path)["cells"] if cell["cell_type"] == "code"):
            assert "eval: false" not in source or ("except ImportError: print(" in source and "else: interact(" in source), f"{path.name}: {source}"
            assert "__main__" not in source or 'if __name__ == "__main__" and "__file__" in globals():' in source, f"{path.name}: {source}"


def test_outputs_are_small():
    "They are in every clone, for ever."
    size = sum(len(json.dumps(cell.get("outputs", []))) for path in NOTEBOOKS.glob("*.ipynb") for cell in notebook(path)["cells"])
    assert size < 6e6, f"{size / 1e6:.1f} MB of outputs: make pictures smaller, or print less"


# The course: what each of its lessons has, in English and in Chinese.
REFERENCE = "00_sections 00_settings 01_figures 01_world 02_pictures 09_extract 10_sft 19_site style lab_touch".split()
LESSONS = [path.stem for path in sorted(NOTEBOOKS.glob("[01]*.ipynb")) if path.stem not in REFERENCE]
PARTS = {
    "question": r"\*\*The question here:\*\* |\*\*这一课的问题：\*\*",
    "picture in text": r"^```(text)?$",
    "exercises": r"^## (Exercises|练习)$",
    "folded solutions": r"<details><summary>(Solutions|解答)</summary>",
    "where to read on": r"^## (Where to read on|延伸阅读)$",
}


@pytest.mark.parametrize("name", [*LESSONS, *REFERENCE, *(path.stem for path in sorted(NOTEBOOKS.glob("zh_*.ipynb")))])
def test_lesson_has_its_parts(name):
    text = "\n\n".join("".join(cell["source"]) for cell in notebook(NOTEBOOKS / f"{name}.ipynb")["cells"] if cell["cell_type"] == "markdown")
    wanted = PARTS | ({} if name in REFERENCE else {"what goes wrong": r"^##+.* (goe?s? wrong|会出什么错)"})
    assert not [part for part, mark in wanted.items() if not re.search(mark, text, re.M)]
    exercises, solutions = re.split(r"<details><summary>", re.split(r"^## (?:Exercises|练习)$", text, flags=re.M)[1])[:2]
    numbers = [re.findall(r"^(\d)\. ", part, re.M) for part in (exercises, solutions)]
    assert numbers[0] == numbers[1] and 2 <= len(numbers[0]) <= 4, f"exercises {numbers[0]}, solutions {numbers[1]}"


def test_chinese_lessons_show_what_the_english_ones_define():
    "They import it; so a name that is gone is found, and each names its counterpart."
    for path in NOTEBOOKS.glob("zh_*.ipynb"):
        text = "".join("".join(cell["source"]) for cell in notebook(path)["cells"])
        assert (NOTEBOOKS / path.name[3:]).is_file() and f"]({path.name[3:]})" in text
        assert not re.search(r"^#\| *export", text, re.M)


def test_shipped_settings_are_the_defaults(monkeypatch):
    "settings.ini shows what the code does without it."
    for name in ("RECALLNB_SETTINGS", "RECALLNB_PATHS__STATE"):
        monkeypatch.delenv(name, raising=False)
    shipped, defaults = load_settings(ROOT / "settings.ini").model_dump(), Settings().model_dump()
    paths = defaults.pop("paths")
    assert shipped.pop("paths") == {key: type(value)(ROOT / value) for key, value in paths.items()}
    assert shipped == defaults
