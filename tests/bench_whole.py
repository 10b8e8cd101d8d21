"""Benchmarks of whole commands: starting the server, a night, and how the parts of a night grow with the memories."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recallnb.embed import write_memories
from recallnb.settings import load_settings
from recallnb.store import Memory, MemoryStore

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
    "Milliseconds per memory of the night's steps that grow with the memories, at 100 to 10,000, and the steps of an epoch."
    from recallnb.train import Lessons, Material  # here: it needs datasets, which the benches for a GPU do without

    settings, tokenizer, rows = load_settings(), bench.processor.tokenizer, {}
    options = settings.stage(2, "default")
    for count in (100, 1000, 10_000):
        texts = bench.texts(count)
        materials = [Material(text, "LinF", ["你还记得吗？"], text) for text in texts]
        store = MemoryStore(":memory:", "bench")
        lessons = Lessons(2, "default", settings, materials, tokenizer, bench.skill)
        written, parts = [], {}
        parts["write"] = bench.seconds(lambda: written.append(write_memories(bench.model, tokenizer, texts, bench.skill)))
        parts["store"] = bench.seconds(lambda: store.add([Memory(text, f"private:{number % 10}", "1") for number, text in enumerate(texts)], written[0]))
        drawn = []
        parts["draw the lessons of an epoch"] = bench.seconds(lambda: drawn.append(lessons(0)[0]))
        rows |= {f"{name}, {count}": 1000 * seconds / count for name, seconds in parts.items()}
        rows[f"steps of an epoch, {count}"] = len(drawn[0]) / options.batch_size
    return {"title": "milliseconds per memory; and steps", "rows": rows,
            "ratios": {f"{name}, a memory among 10,000 against one among 100": rows[f"{name}, 10000"] / rows[f"{name}, 100"] for name in ("write", "store", "draw the lessons of an epoch")}}
