"""Nights that are killed, starved and tricked, while a server serves.

    python -m tests.faults --out faults.json [--kills 10]

An unharmed night is recorded first: how long each of its phases takes, and how often it calls fsync, renames or deletes.
Then night after night is killed (SIGKILL), at moments spread over each phase, and before and after each of those calls;
after each of them, everything that is visible must be whole, and a night that nobody disturbs must succeed. Then come a
full disk, a damaged row, a notebook that raises, two nights at once, a clock that jumps, and a model replaced in between.
Meanwhile somebody talks to a server all the time.

The nights are real, but for their training: stand-ins write what the training notebooks would write. Each is forked from
a process that has imported everything, and only the notebook during which it is killed gets a kernel of its own: the
campaign takes minutes per ten kills. Of JSON's keys, `kills`, `messages_lost`, `mixed_releases` and `failed_next_nights`
tell the result."""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import datetime, timedelta
from pathlib import Path

from nbformat import read, write
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("prepare_memories", "train_stage1", "train_stage2", "evaluate_night", "vectors")  # phases killed at moments
COUNTED = ("publish", "promote", "prune")  # phases killed around their calls
SECONDS = 900  # the longest that a night may take here
_PARAMETERS = "run = ''  # folder\nrecipe = ''  # name\nsmoke = False  # bool"
_STAND_INS = {
    "train_stage1": """
import os, time
from pathlib import Path
new, folder = Path(run, "stage1", "checkpoint.new"), Path(run, "stage1", "checkpoint")
new.mkdir(parents=True)
(new / "trained.safetensors").write_bytes(bytes(100_000))
os.replace(new, folder)
time.sleep(0.5)
Path(run, "stage1", "log.json").write_text("[]")""",
    "train_stage2": """
import json, random, shutil
from pathlib import Path
from recallnb.settings import load_settings
model = Path(run, "stage2", "model")
shutil.copytree(load_settings().paths.model, model)
skill = json.loads((model / "recall.json").read_text())
(model / "recall.json").write_text(json.dumps(skill | {"threshold": random.random() / 10}))
Path(run, "stage2", "metrics.json").write_text("{}")""",
    "evaluate_night": """
from pathlib import Path
Path(run, "metrics.json").write_text("{}")
Path(run, "refused.json").write_text("[]")""",
}


def without_kernel(notebook, run, parameters):
    "What `recallnb.runs.execute` does, in this process, which has imported everything; nothing of what the cells show is kept."
    names = {}
    for cell in read(notebook, 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, notebook.name, "exec"), names)
            names |= parameters if "parameters" in cell.metadata.get("tags", ()) else {}
    return Path(shutil.copy(notebook, run))


class Hooks:
    "Inside of a night: knows its phase, counts its calls, and does what the fault says."

    def __init__(self, fault):
        from recallnb import nightly, release, runs

        self.fault, self.phase, self.began, self.calls, self.seconds, self.full = fault, "start", time.monotonic(), {}, {}, False
        self.note, nightly.note = nightly.note, self.notes
        self.execute, nightly.execute = nightly.execute, self.executes
        for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
            setattr(module, name, self.counted(getattr(module, name)))
        if days := fault.get("days"):
            class Clock(datetime):
                @classmethod
                def now(cls, tz=None):
                    return datetime.now(tz) + timedelta(days=days)

            nightly.datetime = release.datetime = runs.datetime = Clock

    def notes(self, state, **facts):
        if step := facts.get("step"):
            self.seconds[self.phase] = time.monotonic() - self.began
            self.phase, self.began = step, time.monotonic()
            if step == self.fault.get("phase") and "seconds" in self.fault:
                killer = threading.Timer(self.fault["seconds"], os.kill, (os.getpid(), signal.SIGKILL))
                killer.daemon = True  # a night that is faster than the recorded one ends unharmed
                killer.start()
        self.note(state, **facts)

    def executes(self, notebook, run, parameters):
        "A kernel where it matters; elsewhere the cells run in this process, which has imported all that they need."
        from recallnb.model import model_version

        if self.fault.get("kernels") or self.fault.get("phase") == notebook.stem:
            out = self.execute(notebook, run, parameters)
        else:
            out = without_kernel(notebook, run, parameters)
        if (board := run / "metrics.json").is_file():
            board.write_text(json.dumps(json.loads(board.read_text()) | {"model_version": model_version(run / "stage2" / "model")}))
        return out

    def counted(self, function):
        writes = function is os.fsync  # on a full disk one can still rename and delete

        def call(*arguments, **options):
            number = self.calls[self.phase] = self.calls.get(self.phase, 0) + 1
            meant = (self.phase, number) == (self.fault.get("phase"), self.fault.get("call"))
            self.full = self.full or meant and self.fault["do"] == "full"
            if self.full and writes:  # and it stays full
                raise OSError(28, "No space left on device")
            if meant and self.fault["do"] == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if meant and self.fault["do"] == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call


def one_night(notebooks, fault, log):
    "The night's process."
    from recallnb import nightly
    from recallnb.settings import load_settings

    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    hooks = Hooks(fault)
    try:
        status = nightly.night(load_settings(), notebooks=notebooks)
    except nightly.NightRunning:
        status = nightly.RUNNING
    if record := fault.get("record"):
        Path(record).write_text(json.dumps({"seconds": hooks.seconds, "calls": hooks.calls}))
    sys.exit(status)


class Talk(threading.Thread):
    "Somebody who talks to the server without end."

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.stopped = url, threading.Event()
        self.accepted, self.failed, self.longest = [], [], 0.0

    def run(self):
        for number in itertools.count():
            if self.stopped.wait(2):
                return
            id, began = f"talk-{number}", time.monotonic()
            try:
                post(f"{self.url}/api/chat/private", user_id="77", user_nickname="阿木", content=f"我的第{number}句话", message_id=id, timestamp=time.time())
                self.accepted.append(id)
            except OSError as error:
                self.failed.append(f"{id}: {error}")
            self.longest = max(self.longest, time.monotonic() - began)


def post(url, **body):
    "The answer of the server; OSError for any other than 2xx."
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


class Campaign:
    "A state folder with a server on it, and nights that something happens to."

    def __init__(self, folder, out):
        self.out = out
        self.folder, self.state, self.model, self.notebooks = folder, folder / "state", folder / "model", folder / "nbs"
        shutil.copytree(ROOT / "data" / "tiny-recall", self.model)
        settings = {"PATHS__STATE": self.state, "PATHS__MODEL": self.model, "PATHS__CHATS": folder / "none", "RELEASE__KEEP": 1, "SERVER__PORT": 0, "SERVER__PER_USER": 0, "LOG__LEVEL": "WARNING"}
        environment = {"RECALLNB_SETTINGS": str(ROOT / "settings.ini"), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}
        os.environ |= environment | {f"RECALLNB_{name}": str(value) for name, value in settings.items()}
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["recallnb.nightly", "recallnb.prepare", "matplotlib.pyplot"])
        self.result = {"kills": 0, "messages_lost": 0, "mixed_releases": 0, "failed_next_nights": 0, "left_behind": [], "kills_by_phase": {}, "faults": {}}
        self.told, self.memories, self.rng = 0, [], random.Random(0)
        self.notebooks.mkdir()
        shutil.copy(ROOT / "nbs" / "prepare_memories.ipynb", self.notebooks)
        self.stand_in()

    def stand_in(self, **other):
        kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        for name, source in (_STAND_INS | other).items():
            cells = [new_code_cell(_PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(source.strip())]
            write(new_notebook(cells=cells, metadata=kernel), self.notebooks / f"{name}.ipynb")

    def serve(self):
        "Start the server; its address."
        self.server = subprocess.Popen([sys.executable, "-m", "recallnb.serve"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in self.server.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                threading.Thread(target=self.server.stdout.read, daemon=True).start()
                return found[0]
        raise RuntimeError("the server did not start")

    def tell(self):
        "Something new, so that there is a reason for a night, and something to read; there is never much of it."
        self.told += 1
        added = post(f"{self.url}/api/memories", scope="private:42", subject="42", text=f"用户LinF的幸运数字是{self.told}", relation=f"数字{self.told}")
        self.memories.append(added["memory"]["id"])
        if len(self.memories) > 3:
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/api/memories/{self.memories.pop(0)}", method="DELETE"), timeout=300).close()
        post(f"{self.url}/api/chat/private", user_id="42", user_nickname="LinF", content=f"我的门牌号是{self.told}", mentioned=False, timestamp=time.time())

    def start(self, **fault):
        process = self.processes.Process(target=one_night, args=(self.notebooks, fault, self.folder / "night.log"))
        process.start()
        return process

    def end(self, process):
        "The exit status of a night; the signal's number below zero where it was killed."
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise RuntimeError(f"a night takes longer than {SECONDS} s: {(self.folder / 'night.log').read_text()[-3000:]}")
        return process.exitcode

    def night(self, **fault):
        "Run a night to its end, whatever that is; its exit status."
        return self.end(self.start(**fault))

    def look(self):
        "Is everything that can be seen whole?"
        from recallnb.release import ReleaseError, current, releases, verify

        try:
            for release in releases(self.state):
                verify(release)
            current(self.state)
        except ReleaseError as error:
            print("mixed:", error, flush=True)
            self.result["mixed_releases"] += 1

    def next_night(self, what):
        "One that nobody disturbs."
        self.look()
        status = self.night()
        self.look()
        if status not in (0, 4):
            print(f"the night after {what} has ended with {status}", flush=True)
            self.result["failed_next_nights"] += 1
        unfinished = [file for place in (self.state, self.state / "releases", self.state / "runs") for file in place.glob(".*") if not file.name.startswith(".current.")]  # that one may be the server's; it goes after a day
        self.result["left_behind"] += [f"{file.relative_to(self.state)} after {what}" for file in unfinished]
        self.save()

    def save(self):
        "What is known so far: the campaign may be interrupted, too."
        self.out.write_text(json.dumps(self.result, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def moments(self, most):
        "Faults that kill: six in every phase that takes time, since one may come too late, and all around calls; in turn."
        seconds, _ = self.recorded(kernels=True)
        self.recorded()  # the first two have nothing to prune
        _, calls = self.recorded()
        timed = [{"phase": phase, "seconds": round(seconds[phase] * (place + self.rng.random()) / 6, 2)} for place in range(6) for phase in TIMED]
        around = [[{"phase": phase, "call": number + 1, "do": do} for number in range(calls[phase]) for do in ("before", "after")] for phase in COUNTED]
        for calls_of_phase in around:
            self.rng.shuffle(calls_of_phase)
        every = itertools.zip_longest(timed, (fault for some in itertools.zip_longest(*around) for fault in some if fault))
        return [fault for pair in every for fault in pair if fault][:most]

    def recorded(self, **fault):
        "How long each phase of an unharmed night takes, and how many calls it makes."
        self.tell()
        record = self.folder / "record.json"
        if self.night(record=str(record), **fault) != 0:
            raise RuntimeError(f"a night that nobody disturbs has failed: {(self.folder / 'night.log').read_text()[-3000:]}")
        seen = json.loads(record.read_text())
        return seen["seconds"], seen["calls"]

    def kill(self, fault):
        self.tell()
        status = self.night(**fault)
        if status == -signal.SIGKILL:
            self.result["kills"] += 1
            counts = self.result["kills_by_phase"]
            counts[fault["phase"]] = counts.get(fault["phase"], 0) + 1
        print(f"{time.strftime('%H:%M:%S')}  {self.result['kills']} kills: {fault}, exit status {status}", flush=True)
        self.next_night(fault)

    def others(self):
        "Everything but a kill: what the night itself has to say, and the night after it."
        def expect(name, found, wanted):
            self.result["faults"][name] = found == wanted
            print(f"{name}: exit status {found}", flush=True)
            self.next_night(name)

        self.tell()
        expect("a full disk", self.night(phase="publish", call=5, do="full"), 1)
        self.tell()
        with sqlite3.connect(self.state / "recallnb.db", timeout=30) as database:
            database.execute("INSERT INTO message (scope, id, user_id, nickname, content, timestamp, role, images, mentioned) VALUES ('private:43', 'damaged', '43', CAST(x'ff' AS TEXT), '', 'when', 'user', '{', 1)")
        database.close()
        expect("a damaged row", self.night(), 0)
        self.stand_in(train_stage1="1 / 0")
        self.tell()
        status = self.night(kernels=True)
        self.stand_in()
        expect("a notebook that raises", status, 1)
        self.tell()
        expect("two nights at once", sorted(self.end(one) for one in [self.start(), self.start()]), [0, 5])
        for days in (400, -400):
            self.tell()
            expect(f"a clock {days} days off", self.night(days=days), 0)
        skill = self.model / "recall.json"
        changed = json.loads(skill.read_text()) | {"threshold": 0.123}
        self.stand_in(train_stage1=f"from pathlib import Path\nPath({str(skill)!r}).write_text({json.dumps(changed)!r})")
        self.tell()
        status = self.night()
        self.stand_in()
        expect("a model replaced in between", status, 1)

    def run(self, most):
        self.url = self.serve()
        post(f"{self.url}/api/people/77/learning", learning=False)  # what is only said to see whether anybody listens
        talk = Talk(self.url)
        talk.start()
        try:
            for fault in self.moments(most):
                self.kill(fault)
            self.others()
        finally:
            talk.stopped.set()
            talk.join()
            self.server.terminate()
            served = self.server.wait(60)
        with sqlite3.connect(self.state / "recallnb.db") as database:
            stored = {id for (id,) in database.execute("SELECT id FROM message WHERE user_id = '77'")}
        self.result["messages_lost"] = len({*talk.accepted} - stored)
        self.result["faults"]["the server serves throughout"] = served == 0 and not talk.failed
        self.result |= {"messages": len(talk.accepted), "messages_failed": talk.failed[:20], "longest_answer_s": round(talk.longest, 2)}
        self.save()
        return self.result


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="tests.faults", description="nights that are killed, starved and tricked, while a server serves")
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="JSON file for the result")
    parser.add_argument("--kills", type=int, help="only so many of the kills, spread evenly; 60 are six or more in every phase. Without it, all: before and after every call")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="recallnb-faults-") as folder:
        result = Campaign(Path(folder), given.out.resolve()).run(given.kills)
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return int(bool(result["messages_lost"] or result["mixed_releases"] or result["failed_next_nights"] or result["left_behind"] or not all(result["faults"].values())))


if __name__ == "__main__":
    sys.exit(main())
