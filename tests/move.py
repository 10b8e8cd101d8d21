"""How long a message waits while the server moves to another release: `python -m tests.move --out FILE`.

Six people talk to a server without pause, each in a chat of their own, while another process promotes releases and takes them
back, as a night and its owner do. The longest wait of a message that met a move stands beside that of one that did not. It
takes two minutes and wants the machine for itself; the exit status is 1 where a message is lost or refused."""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from recallnb.history import History
from recallnb.model import model_version
from recallnb.release import publish
from recallnb.settings import load_settings
from tests.load import WORDS, Server

ROOT = Path(__file__).resolve().parent.parent
PEOPLE, MEMORIES, MOVES = 6, 200, 6  # who talks; what a release has to write before it can be moved to


def release(state: Path, number: int) -> str:
    "The shipped model with its weights changed by a hair: another version, with vectors of its own."
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(load_settings().paths.model, Path(place) / "model")
        weights = load_file(folder / "model.safetensors")
        weights["model.language_model.norm.weight"] *= 1 + number / 1000
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return publish(folder, state, {}, None, {"base": "", "settings": {}, "data_hash": ""}, model_version(folder)).id


class Talk(threading.Thread):
    "Somebody who says the next thing when the last one is answered."

    def __init__(self, server: Server, person: str):
        super().__init__(daemon=True)
        self.server, self.person, self.over = server, person, threading.Event()
        self.waits: list[tuple[float, float]] = []  # from when to when
        self.failed: list[str] = []

    def run(self) -> None:
        while not self.over.is_set():
            number, began = len(self.waits), time.monotonic()
            answer = self.server.call("POST", "/api/chat/private", {"user_id": self.person, "content": WORDS[number % len(WORDS)], "message_id": f"m{number}"})
            self.waits.append((began, time.monotonic()))
            if answer["status"] != "ok":
                self.failed.append(f"{self.person} m{number}: {answer['status']}")


def move(server: Server, state: Path, *command: str) -> tuple[float, float]:  # from when to when
    "Have another process change the release, and wait until it is served."
    before = server.call("GET", "/readyz")["model"]
    subprocess.run([sys.executable, "-m", "recallnb.release", *command], cwd=ROOT, env=os.environ | {"RECALLNB_PATHS__STATE": str(state)}, check=True, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    while server.call("GET", "/readyz").get("model") == before:
        if time.monotonic() - began > 300:
            raise SystemExit("the server does not move")
        time.sleep(0.02)
    return began, time.monotonic()


def measure(folder: Path) -> dict:
    state = folder / "state"
    first, second = (release(state, number) for number in (1, 2))
    server = Server(state)
    try:
        for number in range(MEMORIES):
            server.call("POST", "/api/memories", {"scope": f"private:{number % PEOPLE}", "subject": str(number % PEOPLE), "text": f"用户LinF的幸运数字是{number}"})
        people = [Talk(server, str(number)) for number in range(PEOPLE)]
        for one in people:
            one.start()
        moves = []
        for number in range(MOVES):
            time.sleep(5)
            moves.append(move(server, state, *(["promote", (first, second)[number]] if number < 2 else ["back"] if number % 2 == 0 else ["promote", second])))
        time.sleep(5)
        for one in people:
            one.over.set()
        for one in people:
            one.join()
    finally:
        server.stop()
    history = History(state / "recallnb.db")
    stored = {one.person: {message.id for message in history.recent(f"private:{one.person}", -1)} for one in people}
    history.close()
    lost = [f"{one.person} m{number}" for one in people for number in range(len(one.waits)) if f"m{number}" not in stored[one.person]]
    waits = [(end - began, any(began < over and end > due for due, over in moves)) for one in people for began, end in one.waits]
    met, others = ([wait for wait, meets in waits if meets is wanted] for wanted in (True, False))
    return {
        "machine": f"CPU ({platform.machine()}, {os.cpu_count()} cores), torch {torch.__version__.split('+')[0]}",
        "people": PEOPLE, "memories": MEMORIES, "moves": len(moves), "messages": len(waits), "lost": lost, "failed": [line for one in people for line in one.failed],
        "move_s": round(statistics.median(over - due for due, over in moves), 2),
        "met_a_move": len(met), "longest_wait_s": round(max(met), 2), "median_wait_s": round(statistics.median(met), 2),
        "longest_wait_elsewhere_s": round(max(others), 2), "median_wait_elsewhere_s": round(statistics.median(others), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.move", description="how long a message waits while the server moves to another release")
    parser.add_argument("--out", type=Path, default=Path("move.json"), help="JSON file for the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recallnb-move-") as folder:
        found = measure(Path(folder))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))
    sys.exit(int(bool(found["lost"] or found["failed"])))


if __name__ == "__main__":
    main()
