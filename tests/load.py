"""How the server bears a crowd: `python -m tests.load --out FILE`.

Chats talk one at a time and fifty at once, in turns, some interrupting themselves; what slows the machine down for a while slows
both down. What each chat was told and what the history holds afterwards are compared message by message. It takes five minutes
and wants the machine for itself; the exit status is 1 where a figure misses its target."""

import argparse
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CITIES = ["杭州", "大连", "桂林", "苏州", "厦门", "成都", "昆明", "青岛", "洛阳", "南宁"]
WORDS = ["我现在住在哪个城市？", "你好", "在吗？", "今天好累", "晚上一起吃饭吗？", "我回来了"]
TURNS = 8  # messages of one chat; then another person begins to talk
ROUNDS = 3  # of one chat at a time, then all at once
INTERRUPTING = 0.15  # share of the messages that are followed by another one at once
MOST = {"lost": 0, "doubled": 0, "crossed": 0, "idle_first_token_p50_ms": 150, "rss_growth": 0.05}
LEAST = {"speedup": 4}


class Server:
    "A server with an empty state and without limits per person. One core is the model's, unless the environment says otherwise; HTTP and the crowd need the other."

    def __init__(self, folder: Path):
        settings = {"PATHS__STATE": str(folder), "SERVER__PORT": "0", "SERVER__PER_USER": "0", "SERVER__PER_KEY": "0", "LOG__LEVEL": "WARNING"}
        environment = {"RECALLNB_MODEL__THREADS": "1"} | os.environ | {f"RECALLNB_{name}": value for name, value in settings.items()}
        self.local = threading.local()
        self.process = subprocess.Popen([sys.executable, "-m", "recallnb.serve"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if found := re.search(r" at http://127\.0\.0\.1:(\d+)\n", line):
                self.port = int(found[1])
            if "Stop with" in line:
                return
        raise SystemExit("the server did not start")

    @property
    def connection(self) -> http.client.HTTPConnection:
        "The calling thread's, which stays open as that of a bot does."
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        return self.local.connection

    def call(self, method: str, path: str, body: dict | None = None) -> dict:
        self.connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        return json.loads(self.connection.getresponse().read())

    def stream(self, body: dict) -> tuple[dict, float | None, float]:  # answer, first token and whole answer in seconds
        "Say something and read the events."
        began, first, name, answer = time.monotonic(), None, "", {"status": "cut"}
        self.connection.request("POST", "/api/chat/private", json.dumps(body), {"Content-Type": "application/json", "Accept": "text/event-stream"})
        response = self.connection.getresponse()
        if response.status != 200:
            response.read()
            return {"status": f"http {response.status}"}, None, time.monotonic() - began
        for line in response:
            if line.startswith(b"event: "):
                name = line[7:-1].decode()
            elif line.startswith(b"data: ") and name == "token":
                first = first or time.monotonic() - began
            elif line.startswith(b"data: ") and name in ("done", "error"):
                answer = json.loads(line[6:]) | ({"status": "error"} if name == "error" else {})
        return answer, first, time.monotonic() - began

    def memory(self) -> int:
        "Resident kB."
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Crowd:
    "People who talk, what they sent and what they got."

    def __init__(self, server: Server, phase: str):
        self.server, self.phase, self.lock = server, phase, threading.Lock()
        self.sent: dict[str, list[str]] = {}  # person -> message ids
        self.answers: list[tuple[str, str, dict, float | None, float]] = []
        self.memories: dict[str, int] = {}  # person -> id of their memory
        self.resident: list[int] = []  # kB of the server, twice a second
        self.tokens, self.until = 0, 0.0  # of answers that came while everybody talked; when that ends (monotonic seconds)

    def say(self, person: str, text: str) -> None:
        with self.lock:
            id = f"{person}-{len(self.sent[person])}"
            self.sent[person].append(id)
        answer, first, whole = self.server.stream({"user_id": person, "user_nickname": "LinF", "content": text, "message_id": id})
        with self.lock:
            self.answers.append((person, id, answer, first, whole))
            if answer["status"] == "ok" and time.monotonic() < self.until:
                self.tokens += answer["timing"]["tokens"]

    def talk(self, name: str, seed: int) -> None:
        "One place in the crowd: person after person, until the time is over."
        chance, number = random.Random(seed), 0
        while time.monotonic() < self.until:
            person, number = f"{self.phase}-{name}-{number}", number + 1
            self.sent[person] = []
            told = self.server.call("POST", "/api/memories", {"scope": f"private:{person}", "subject": person, "text": f"用户LinF现居{chance.choice(CITIES)}"})
            self.memories[person] = told["memory"]["id"]
            for _ in range(TURNS):
                if time.monotonic() > self.until:
                    break
                if chance.random() < INTERRUPTING:
                    running = threading.Thread(target=self.say, args=(person, chance.choice(WORDS)))
                    running.start()
                    running.join(chance.random() * 0.3)
                    self.say(person, chance.choice(WORDS))
                    running.join()
                else:
                    self.say(person, chance.choice(WORDS))

    def run(self, places: int, seconds: float) -> float:  # tokens per second
        self.until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.talk, args=(str(place), place)) for place in range(places)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self.resident.append(self.server.memory())
            time.sleep(0.5)
        return self.tokens / seconds

    def check(self) -> dict[str, int]:
        "Compare what was sent and answered with what the history holds."
        lost = doubled = crossed = 0
        for person, ids in self.sent.items():
            messages = self.server.call("GET", f"/api/chats/private:{person}/history?limit=500")["messages"]
            there = Counter(message["id"] for message in messages if message["role"] == "user")
            mine = [answer for who, _, answer, _, _ in self.answers if who == person]
            finished = sum(answer["status"] == "ok" for answer in mine)
            replies = sum(message["role"] == "assistant" for message in messages)
            lost += sum(there[id] == 0 for id in ids) + max(0, finished - replies) + len(ids) - len(mine)
            doubled += sum(count > 1 for count in there.values()) + max(0, replies - finished)
            crossed += sum(id not in ids for id in there)
        for person, id, answer, _, _ in self.answers:
            crossed += answer.get("message_id", id) != id or any(recall["id"] not in (None, self.memories[person]) for recall in answer.get("recalls", ()))
        return {"lost": lost, "doubled": doubled, "crossed": crossed}


def growth(resident: list[int]) -> float:
    "By how much the server's memory has grown from the middle third of the time to the last one; caches are full by then."
    third = len(resident) // 3
    return max(resident[-third:]) / max(resident[third:-third]) - 1


def spread(values: list[float]) -> tuple[float, float]:  # p50 and p95, in ms
    cuts = statistics.quantiles(values, n=20) if len(values) > 1 else [values[0]] * 19
    return round(1000 * cuts[9], 1), round(1000 * cuts[18], 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON")
    parser.add_argument("--chats", type=int, default=50, help="chats at once")
    parser.add_argument("--seconds", type=float, default=180, help="how long they talk; one at a time a third of it")
    given = parser.parse_args()
    if given.seconds < 10:
        parser.error("--seconds must be at least 10")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            figures = measure(server, given.chats, given.seconds)
        finally:
            server.stop()
    given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
    missed = [f"{name} is {figures[name]}, at most {most} is wanted" for name, most in MOST.items() if figures[name] > most]
    missed += [f"{name} is {figures[name]}, at least {least} is wanted" for name, least in LEAST.items() if figures[name] < least]
    if missed:
        sys.exit("\n".join(missed))


def measure(server: Server, chats: int, seconds: float) -> dict:
    "The same people one by one and in a crowd."
    Crowd(server, "warm").run(chats, min(10.0, seconds / 6))
    idle, crowds = ([Crowd(server, f"{name}{turn}") for turn in range(ROUNDS)] for name in ("idle", "crowd"))
    speeds = [(one.run(1, seconds / ROUNDS / 3), crowd.run(chats, seconds / ROUNDS)) for one, crowd in zip(idle, crowds)]
    answers = [answer for crowd in crowds for answer in crowd.answers]
    ok = [(first, whole) for _, _, answer, first, whole in answers if answer["status"] == "ok"]
    quiet = [first for one in idle for _, _, answer, first, _ in one.answers if answer["status"] == "ok" and first]
    p50, p95 = spread([first for first, _ in ok if first])
    whole50, whole95 = spread([whole for _, whole in ok])
    wrong = sum((Counter(one.check()) for one in idle + crowds), Counter())
    alone, together = (statistics.median(some) for some in zip(*speeds))
    resident = [kilobytes for crowd in crowds for kilobytes in crowd.resident]
    return {name: wrong[name] for name in ("lost", "doubled", "crossed")} | {
        "first_token_p50_ms": p50, "first_token_p95_ms": p95, "answer_p50_ms": whole50, "answer_p95_ms": whole95,
        "idle_first_token_p50_ms": spread(quiet)[0], "speedup": round(statistics.median(crowd / one for one, crowd in speeds), 2),
        "speedup_of_each_round": [round(crowd / one, 2) for one, crowd in speeds], "rss_growth": round(growth(resident), 3), "rss_mb": round(resident[-1] / 1024),
        "tokens_per_second": round(together, 1), "tokens_per_second_alone": round(alone, 1), "answers": len(ok), "messages": len(answers),
        "statuses": Counter(answer["status"] for _, _, answer, _, _ in answers)}


if __name__ == "__main__":
    main()
