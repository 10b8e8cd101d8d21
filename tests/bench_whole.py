"""Benchmarks of whole commands: starting the server, a night, and how the parts of a night grow with the memories."""

import copy
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from recallnb.embed import Written, write_memories
from recallnb.extract import Extracted, remember, resolve
from recallnb.history import History, Message
from recallnb.lora import add_lora, fit
from recallnb.settings import load_settings
from recallnb.stage2 import Stage2
from recallnb.store import MemoryStore
from recallnb.world import World

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, state: str, **options) -> subprocess.Popen:
    "A Python of its own, with an empty state."
    environment = os.environ | {"RECALLNB_PATHS__STATE": state, "RECALLNB_SERVER__PORT": "0", "RECALLNB_LOG__LEVEL": "WARNING"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **options)


def startup(bench) -> dict:
    "Seconds until the server answers, and of importing the settings."
    def serve() -> None:
        with tempfile.TemporaryDirectory() as state:
            server = run("-m", "recallnb.serve", state=state)
            for line in server.stdout:
                if "Stop with" in line:
                    break
            else:
                raise RuntimeError("the server did not start")
            ready.append(time.perf_counter() - began)
            server.terminate()
            server.communicate()

    ready: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        serve()
    imports = "import sys, recallnb.settings; print('torch' in sys.modules)"
    taken = bench.compare({name: lambda code=code: subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
                           for name, code in (("python", "pass"), ("import recallnb.settings", imports), ("import torch", "import torch"))})
    heavy = subprocess.run([sys.executable, "-c", imports], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip() == "True"
    settings = taken["import recallnb.settings"] - taken["python"]
    return {"title": "seconds", "rows": {"recallnb.serve until ready": sorted(ready)[1], **taken, "import recallnb.settings, without Python itself": settings},
            "ratios": {"of 6 s until ready": sorted(ready)[1] / 6, "of 0.3 s for the settings": settings / 0.3, "settings import torch": float(heavy)}}


def night(bench) -> dict:
    "Where a night on the sample data spends its time, by notebook, and by cell where one takes more than a twentieth."
    with tempfile.TemporaryDirectory() as state:
        began = time.monotonic()
        process = run("-m", "recallnb.nightly", state=state)
        output = process.communicate()[0]
        whole = time.monotonic() - began
        if process.returncode not in (0, 3):  # 3: the gate has refused it
            raise RuntimeError(f"the night ended with {process.returncode}: {output[-2000:]}")
        steps = {}
        for file in sorted(Path(state).glob("runs/*/*.ipynb"), key=lambda file: file.stat().st_mtime):
            cells = [cell for cell in json.loads(file.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
            times = [(cell["metadata"].get("papermill", {}).get("duration") or 0.0, "".join(cell["source"])) for cell in cells]
            steps[file.stem] = sum(seconds for seconds, _ in times)
            for seconds, source in times:
                if seconds > whole / 20:
                    first = next(line for line in source.splitlines() if not re.match(r"\s*(#|from|import|$)", line))
                    steps[f"{file.stem}: {first.strip()[:50]}"] = seconds
    parts = sum(seconds for name, seconds in steps.items() if ": " not in name)
    return {"title": "seconds of a night on the sample data", "rows": {"the night": whole, **steps, "the rest: release, report, promotion": whole - parts}, "ratios": {"of 5 minutes": whole / 300}}


def growth(bench) -> dict:
    "Milliseconds per memory of the night's steps that grow with the memories, at 100 to 10,000; and the seconds of a training that may take six."
    taken: dict[str, list[float]] = {}
    for _ in range(min(3, bench.turns)):
        for count in (100, 1000, 10_000):
            with tempfile.TemporaryDirectory() as folder:
                parts, whole = grown(bench, count, Path(folder))
            for name, value in ({name: 1000 * seconds / count for name, seconds in parts.items()} | whole).items():
                taken.setdefault(f"{name}, {count}", []).append(value)
    rows = {name: statistics.median(values) for name, values in taken.items()}
    names = [name.removesuffix(", 10000") for name in rows if name.endswith(", 10000")]
    return {"title": "milliseconds per memory; steps; seconds", "rows": rows, "ratios": {f"{name}, 10,000 against 1,000": rows[f"{name}, 10000"] / rows[f"{name}, 1000"] for name in names if not name.startswith("steps")}}


def grown(bench, count: int, folder: Path) -> tuple[dict[str, float], dict[str, float]]:  # seconds of what is done for each memory; what is not
    "The steps of a night in which so many memories are new, a tenth of them supersedes older ones, and a tenth of the people has a new name."
    from recallnb.prepare import follow_renames, load_asked, make_materials, recall_at_1, save_asked, similarities  # here: it needs datasets, which the benches for a GPU do without
    from recallnb.train import Lessons, Material

    settings, tokenizer, model = load_settings(), bench.processor.tokenizer, bench.model
    world = World(settings.paths.world, seed=1, invent=1.0)
    facts = world.sample_facts(count)
    store, history = MemoryStore(folder / "recallnb.db", "bench"), History(folder / "recallnb.db", settings.chat.bot_name)
    told = [Extracted(fact.memory, fact.relation.label, str(number // 4), [str(number)], "2026-01-01", fact.person.name, f"group:{number // 4 % 10}") for number, fact in enumerate(facts)]
    newer = [replace(one, text=f"{one.text}了", sources=[f"{one.sources[0]}, again"], date="2026-01-02") for one in told[::10]]
    for number in range(0, count, 40):  # the first of ten people
        for name in (facts[number].person.name, f"新{number}"):
            history.append(Message(told[number].scope, told[number].subject, name, "你好", 1.8e9))
    written: list[Written] = []
    parts = {"write": bench.seconds(lambda: written.append(write_memories(model, tokenizer, [one.text for one in told], bench.skill)))}
    parts["compare and store"] = bench.seconds(lambda: stored(store, told, written[0])) + bench.seconds(lambda: stored(store, newer, written[0][: len(newer)]))
    parts["follow new names"] = bench.seconds(lambda: follow_renames(history, store))
    known = {one.text: ["你还记得吗？", "记得吗？"] for one in store.list(limit=-1)}
    made: list[tuple] = []
    parts["gather materials"] = bench.seconds(lambda: made.append(make_materials(model, tokenizer, history, store, known=known)))
    materials: list[Material] = made[0][0]
    save_asked(folder, made[0][1])
    asked, texts = load_asked(folder, 1000), [one.text for one in materials]
    parts["ask a thousand questions"] = bench.seconds(lambda: recall_at_1(similarities(model, tokenizer, bench.skill, texts, asked), texts, asked))
    lessons, drawn = Lessons(2, "default", settings, materials, tokenizer, bench.skill), []
    parts["draw the lessons of an epoch"] = bench.seconds(lambda: drawn.append(lessons(0)[0]))
    options = settings.stage(2, "default")
    stage = Stage2(add_lora(copy.deepcopy(model).float(), options, tokenizer), bench.skill)
    logging.disable(logging.WARNING)  # that the time is over
    trained = bench.seconds(lambda: fit(stage, lambda epoch: drawn, options, tokenizer, progress="", minutes=0.1))
    logging.disable(logging.NOTSET)
    store.close(), history.close()
    return parts, {"steps of an epoch": len(drawn[0]) / options.batch_size, "a training that may take 6 s": trained}


def stored(store: MemoryStore, facts: list[Extracted], written: Written) -> None:
    "Compare facts with what is known and store them, 256 at a time, as `read_history` does."
    for start in range(0, len(facts), 256):
        some = facts[start : start + 256]
        for scope in dict.fromkeys(one.scope for one in some):
            done = resolve(store, scope, some)
            remember(store, done, written[: len(done.new)])
