"""The notebooks as a site, and whether each exported name says what it is for."""

import ast
import io
import json
import re
import shutil
import tokenize

import nbformat
import pytest
from conftest import BROWSER, NOTEBOOKS, ROOT
from nbclient import NotebookClient

from recallnb.site import _draw_math, broken_links, build_site, reading_order

# Parameters that mean the same everywhere in this project and are explained where they first occur.
OBVIOUS = set(
    "self cls tokenizer processor model world rng skill settings store connection engine history limits args kwargs arguments "
    "scope scopes user_id group_id message_id subject message messages memory memories fact facts text seed progress limit offset".split()
)
# Types that say what a value is made of and not what it means; a parameter of any other type is clear from it.
PLAIN = set("str int float bool bytes list dict set tuple object type Tensor torch Path Iterable Iterator Sequence Mapping Callable Any".split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A book of the index and two notebooks, of which the second imports from the first."
    root = tmp_path_factory.mktemp("book")
    (root / "nbs").mkdir()
    for name in ("02_tokens", "06_inject", "13_stage2"):
        shutil.copy(NOTEBOOKS / f"{name}.ipynb", root / "nbs")
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Index\n> A part.\n\n| read |\n|---|\n| [b](nbs/06_inject.ipynb) |\n| [a](nbs/02_tokens.ipynb) |\n\n`encode_text()`, `tokens.encode_text`, `encode`"}]
    (root / "nbs/index.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    build_site(root, root / "_site")
    return root / "_site"


def test_names_are_links(site):
    index = (site / "index.html").read_text("utf-8")
    href = "02_tokens.html#recallnb.tokens.encode_text"
    assert f'<a href="{href}"><code>encode_text()</code></a>' in index and f'<a href="{href}"><code>tokens.encode_text</code></a>' in index
    assert "<code>encode</code></a>" not in index
    assert 'id="recallnb.tokens.encode_text"' in (site / "02_tokens.html").read_text("utf-8")


def test_contents_follow_the_index(site):
    for page in site.glob("*.html"):
        links = re.findall(r'<a href="(\w+)\.html"', page.read_text("utf-8").partition("<nav")[2].partition("</nav>")[0])
        assert links == ["index", "06_inject", "13_stage2", "02_tokens", "names"], "an unnamed notebook stands behind the last named one before it by number"


def test_sections_for_the_search(site):
    text = (site / "search.js").read_text("utf-8")
    found = json.loads(text.removeprefix("const SECTIONS = ").rstrip(";\n"))
    assert "</" not in text, "it would end a script element"
    assert {"encode_text", "RecallTokens"} <= {one["heading"] for one in found if one["name"]}
    assert any(one["heading"] == "Adding them" and one["url"] == "02_tokens.html#Adding-them" and "OneGen" in one["text"] for one in found)


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)="([^"]*)"', page.read_text("utf-8"))
        assert all(re.match(r"data:image/|[\w-]+\.(css|js)$", source) for source in loaded), page.name
    assert "http" not in (site / "site.js").read_text("utf-8")
    fetched = re.findall(r"url\((.*?)\)", (site / "style.css").read_text("utf-8"))
    assert fetched == ['"recallnb-cjk.otf"'] and (site / "recallnb-cjk.otf").is_file() and (site / "OFL.txt").is_file()


def test_links_of_the_small_book(site):
    "Only what the small book leaves out may be missing."
    assert all(re.search(r": (\d\d_\w+|nbs/.*)\.ipynb", link) for link in broken_links(site)), broken_links(site)


def test_links_between_notebooks_lead_to_files():
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "markdown")
        for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", re.sub(r"```.*?```", "", text, flags=re.S)):
            assert (path.parent / link).exists() or (ROOT / link).exists(), f"{path.name} links to {link}"


def test_every_formula_can_be_drawn():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                _draw_math("".join(cell["source"]))


def test_every_notebook_has_its_place():
    order = reading_order(NOTEBOOKS)
    assert sorted(order) == sorted(NOTEBOOKS.glob("*.ipynb")) and order[0].stem == "index"


@pytest.mark.browser
def test_search_in_a_browser(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("encode_t")
        page.wait_for_selector("#found a")
        assert "02_tokens.html#recallnb.tokens.encode_text" == page.locator("#found a").first.get_attribute("href")
        page.keyboard.press("Enter")
        page.wait_for_url("**/02_tokens.html#recallnb.tokens.encode_text")
        page.fill("#search", "no such words anywhere")
        page.wait_for_selector("#found li")
        assert page.locator("#found").inner_text() == "nothing found" and not errors
        browser.close()


@pytest.mark.browser
def test_chinese_without_a_system_font(site):
    "Each Chinese word of the page is drawn in a font that has it; `local()` sources are taken out, as on a machine without Chinese."
    from playwright.sync_api import sync_playwright

    (site / "bare.css").write_text(re.sub(r"local\(.*?\), ", "", (site / "style.css").read_text("utf-8")), "utf-8")
    (site / "zh.html").write_text('<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="bare.css"><nav id="contents"><a href="#a">它做什么</a><a>05 记忆库</a></nav><main><h1>记忆</h1><p>想一想 <code>回忆</code></p></main>', "utf-8")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((site / "zh.html").as_uri())
        page.evaluate("document.fonts.ready.then(() => 0)")
        page.screenshot()
        tools = page.context.new_cdp_session(page)
        for domain in ("DOM", "CSS"):
            tools.send(f"{domain}.enable")
        root = tools.send("DOM.getDocument")["root"]["nodeId"]
        for node in tools.send("DOM.querySelectorAll", {"nodeId": root, "selector": "a, h1, code"})["nodeIds"]:
            fonts = tools.send("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]
            assert sum(font["glyphCount"] for font in fonts if font["familyName"] == "recallnb CJK") >= 2, (tools.send("DOM.getOuterHTML", {"nodeId": node})["outerHTML"], fonts)
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if "from ipywidgets import" in path.read_text("utf-8")], ids=lambda path: path.stem)
def test_widgets_move(path):
    "Each interactive cell runs, and again after each of its controls was moved. Takes minutes: `python -m pytest -m slow tests/test_site.py`"
    notebook = nbformat.read(path, 4)
    move = """
for control in _.widget.kwargs_widgets:
    control.value = control.options[-1] if hasattr(control, "options") else "我的猫叫什么名字？" if isinstance(control.value, str) else control.max
    assert not [o for o in _.widget.out.outputs if o["output_type"] == "error"], (control, _.widget.out.outputs)"""
    for cell in notebook.cells:
        if "interact(" in cell.source:
            cell.source = cell.source.replace("else: interact(", "else: _ = interact(") + move
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    assert "interact(" in str(notebook)


def undocumented(source, module):
    "Exported names without a docstring, and `name(parameter)` for each parameter without a comment."
    tree = ast.parse(source)
    exported = next((ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"), [])
    comments = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in exported:
            yield from function_lacks(node, f"{module}.{node.name}", comments)
        if isinstance(node, ast.ClassDef) and node.name in exported:
            if not ast.get_docstring(node):
                yield f"{module}.{node.name}"
            for place, member in enumerate(node.body):
                if isinstance(member, ast.FunctionDef) and (member.name == "__init__" or not member.name.startswith("_")):
                    yield from function_lacks(member, f"{module}.{node.name}.{member.name}", comments)
                if isinstance(member, ast.AnnAssign) and not speaks(member.target.id, member.annotation):
                    told = node.body[place + 1 : place + 2]
                    described = isinstance(member.value, ast.Call) and any(keyword.arg == "description" for keyword in member.value.keywords)
                    if member.end_lineno not in comments and not described and not (told and isinstance(told[0], ast.Expr)):
                        yield f"{module}.{node.name}({member.target.id})"


def function_lacks(node, name, comments):
    is_property = any(ast.unparse(one).endswith(("property", "setter")) for one in node.decorator_list)
    if not ast.get_docstring(node) and not name.endswith((".__init__", ".forward")) and not (is_property and node.lineno in comments):
        yield name
    for one in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
        if not speaks(one.arg, one.annotation) and one.end_lineno not in comments:
            yield f"{name}({one.arg})"


def speaks(name, annotation):
    "Is a parameter clear from its name or type?"
    return name in OBVIOUS or (annotation is not None and re.match(r"\w+", ast.unparse(annotation).strip("'"))[0] not in PLAIN)


def test_the_check_for_documentation_works():
    source = '__all__ = ["f", "C", "g"]\ndef f(a: int, b: str): # both\n    "Says."\ndef g(model, a: Tensor): ...\nclass C:\n    "Says."\n    x: int\n    y: int # counts\n    w: int = Field(1, description="counts")\n    def m(self, z): "Says."\n'
    assert list(undocumented(source, "m")) == ["m.g", "m.g(a)", "m.C(x)", "m.C.m(z)"]


@pytest.mark.parametrize("path", sorted((ROOT / "recallnb").glob("*.py")), ids=lambda path: path.stem)
def test_exported_names_are_documented(path):
    lacks = sorted(set(undocumented(path.read_text("utf-8"), path.stem)))
    assert not lacks, f"say what it is, by a docstring or a comment behind the parameter: {lacks}"
