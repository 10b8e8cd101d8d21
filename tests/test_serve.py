"""The server as its users meet it: `python -m recallnb.serve` in a process of its own, over real HTTP, through restarts and kill -9.

The tests go through one server's life in order; the last ones end it and start it again on the same state."""

import http.client
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from recallnb.history import History

COMMAND = [sys.executable, "-m", "recallnb.serve"]
SAMPLES = ROOT / "data/memories/sample.jsonl"


class Server:
    "A server process on a free port."

    def __init__(self, folder):
        self.folder, self.environment = folder, os.environ | {"RECALLNB_PATHS__STATE": str(folder / "state"), "RECALLNB_SERVER__PORT": "0", "PYTHONFAULTHANDLER": "1"}

    def start(self):
        "Start it and return what it printed; it is ready then."
        self.log = open(self.folder / "log", "ab")
        self.process = subprocess.Popen(COMMAND, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=self.log, text=True)
        guard = threading.Timer(300, self.process.kill)
        guard.start()
        printed = ""
        while "Stop with" not in printed:
            line = self.process.stdout.readline()
            assert line, f"no start:\n{(self.folder / 'log').read_text()[-3000:]}"
            printed += line
        guard.cancel()
        self.port = int(re.search(r" at http://127\.0\.0\.1:(\d+)\n", printed)[1])
        return printed

    def end(self, number, main=True):
        "Send a signal, to the main thread or to another one; wait for the end, and return the exit code. If it does not come, the log says where the threads stand."
        threads = map(int, os.listdir(f"/proc/{self.process.pid}/task"))
        os.kill(next(thread for thread in threads if (thread == self.process.pid) == main), number)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            code = self.process.wait(60)
        self.process.stdout.close()
        self.log.close()
        return code

    def call(self, method, path, body=None, **headers):
        "Send one request: status and JSON."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def say(self, user_id, content, path="private", **fields):
        "Say something: status and answer."
        return self.call("POST", f"/api/chat/{path}", {"user_id": user_id, "user_nickname": "LinF" if path == "private" else f"LinF{user_id}", "content": content, "timestamp": time.time()} | fields)

    def tell(self, user_id, text, **fields):
        "Add a memory of a private chat and return its id."
        status, found = self.call("POST", "/api/memories", {"scope": f"private:{user_id}", "subject": user_id, "text": text} | fields)
        assert status == 201, found
        return found["memory"]["id"]

    def history(self, scope):
        "What the database holds of a chat: role and content."
        history = History(self.folder / "state/recallnb.db")
        try:
            return [(message.role, message.content) for message in history.recent(scope)]
        finally:
            history.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve"))
    server.printed = server.start()
    yield server
    assert server.end(signal.SIGINT) == 0, (server.folder / "log").read_text()[-3000:]


def recalled(answer):
    "Ids of the memories that an answer names."
    return [recall["id"] for recall in answer["recalls"]]


def test_first_start_recalls_a_sample(server):
    "What is printed works as it stands: the curl line asks for a sample memory, and the answer names it."
    samples = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert server.call("GET", "/healthz") == (200, {"status": "ok"})
    status, ready = server.call("GET", "/readyz")
    assert status == 200 and ready["memories"] == len(samples) > 0
    curl = shlex.split(next(line for line in server.printed.splitlines() if "curl" in line))
    body = json.loads(curl[curl.index("-d") + 1])
    path = next(part for part in curl if "/api/chat/" in part)
    status, answer = server.call("POST", path[path.index("/api/"):], body)
    assert status == 200 and answer["status"] == "ok" and answer["reply"]
    recall = answer["recalls"][0]
    assert recall["text"] in [sample["text"] for sample in samples if sample["subject"] == body["user_id"]]
    assert recall["decoded"] == recall["text"] and -1 <= recall["score"] <= 1


def test_told_and_recalled_at_once(server):
    "The answer names the memory's id and holds its value; nothing of it is in the history."
    ids = [server.tell("101", text) for text in ("用户LinF现居杭州", "用户LinF的生日为11月6日", "用户LinF养的猫叫豆芽")]
    status, page = server.call("GET", "/api/memories?scope=private:101&limit=2&offset=1")
    assert status == 200 and page["total"] == 3 and [memory["id"] for memory in page["memories"]] == ids[1::-1]
    status, answer = server.say("101", "我现在住在哪个城市？")
    assert status == 200 and answer["status"] == "ok"
    assert recalled(answer) == ids[:1] and "杭州" in answer["reply"]


def test_another_scope_does_not_recall(server):
    memory = server.tell("111", "用户LinF现居桂林")
    for answer in (server.say("112", "我现在住在哪个城市？")[1], server.say("111", "我现在住在哪个城市？", "group", group_id="100001")[1]):
        assert answer["status"] == "ok" and memory not in recalled(answer) and "桂林" not in answer["reply"]


def test_deleted_is_not_recalled(server):
    "The history is emptied before it is asked for again, so that the answer cannot come from there."
    memory = server.tell("121", "用户LinF现居大连")
    answer = server.say("121", "我现在住在哪个城市？")[1]
    assert recalled(answer) == [memory] and "大连" in answer["reply"]
    history = History(server.folder / "state/recallnb.db")
    history.delete_user("121")
    history.close()
    assert server.call("DELETE", f"/api/memories/{memory}") == (200, {"status": "ok", "deleted": memory})
    assert server.call("DELETE", f"/api/memories/{memory}")[0] == 404
    answer = server.say("121", "我现在住在哪个城市？")[1]
    assert memory not in recalled(answer) and "大连" not in answer["reply"]


def test_repeated_delivery(server):
    "At the same time or later: one answer, stored once."
    with ThreadPoolExecutor(3) as pool:
        answers = [*pool.map(lambda _: server.say("131", "你好", message_id="m1"), range(3))]
    answers.append(server.say("131", "你好", message_id="m1"))
    assert answers[0][0] == 200 and answers[0][1]["status"] == "ok" and answers[0][1]["message_id"] == "m1"
    assert all(answer == answers[0] for answer in answers)
    assert server.history("private:131") == [("user", "你好"), ("assistant", answers[0][1]["reply"])]


def test_overheard_is_stored_and_not_answered(server):
    status, answer = server.say("141", "晚上一起吃饭吗？", "group", group_id="141141", mentioned=False, message_id="m1")
    assert (status, answer) == (202, {"status": "stored", "message_id": "m1"})
    assert server.history("group:141141") == [("user", "晚上一起吃饭吗？")]


def test_newer_message_interrupts(server):
    "While others are answered, one chat sends two messages: only the second is answered, and the others are not disturbed."
    with ThreadPoolExecutor(16) as pool:
        for attempt in range(20):  # the first answer may be over before the second message comes
            others = [pool.submit(server.say, f"{attempt}{number}", "你好") for number in range(150, 162)]
            older = pool.submit(server.say, f"{attempt}149", "在吗？")
            while not server.history(f"private:{attempt}149"):
                time.sleep(0.005)
            newer = pool.submit(server.say, f"{attempt}149", "我回来了").result()[1]
            older = older.result()[1]
            assert newer["status"] == "ok" and {other.result()[1]["status"] for other in others} == {"ok"}
            if older["status"] == "interrupted":
                break
    assert older["status"] == "interrupted" and older["reply"] == ""
    assert server.history(f"private:{attempt}149") == [("user", "在吗？"), ("user", "我回来了"), ("assistant", newer["reply"])]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "field"),
    [
        ("chat/private", b"{", {}, 400, None),
        ("chat/private", {"user_id": "1", "content": "你好"}, {"Content-Type": "text/plain"}, 415, None),
        ("chat/private", {"user_id": "1", "content": "你好"}, {"Host": "evil.example"}, 403, None),
        ("chat/private", {"user_id": "1", "content": "你好"}, {"Origin": "http://evil.example"}, 403, None),
        ("chat/private", {"user_id": "1"}, {}, 422, "content"),
        ("chat/private", {"user_id": "1", "content": "你好", "mentoined": True}, {}, 422, "mentoined"),
        ("chat/group", {"user_id": "1", "content": "你好"}, {}, 422, "group_id"),
        ("chat/private", {"user_id": "1", "content": "a" * 10 * 2**20}, {}, 413, None),
        ("memories", {"scope": "1", "subject": "1", "text": "用户LinF现居杭州"}, {}, 422, "scope"),
        ("memories", {"scope": "private:1", "subject": "1", "text": "用户LinF" + "非常" * 200 + "喜欢猫"}, {}, 422, "text"),
        ("memory", {}, {}, 404, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_field_and_remedy(server, path, body, headers, status, field):
    found, answer = server.call("POST", f"/api/{path}", body, **headers)
    assert found == status and answer["status"] == "error"
    assert answer["errors"][0]["field"] == field and answer["errors"][0]["problem"] and answer["errors"][0]["remedy"]


def test_refuses_to_start(server, tmp_path):
    "An address that others reach, a second server on the same state, a port that is taken."
    wrong = [{"SERVER__HOST": "0.0.0.0"}, {}, {"PATHS__STATE": str(tmp_path), "SERVER__PORT": str(server.port)}]
    environments = [server.environment | {f"RECALLNB_{key}": value for key, value in more.items()} for more in wrong]
    started = [subprocess.Popen(COMMAND, cwd=ROOT, env=one, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for one in environments]
    errors = [process.communicate(timeout=300)[1].splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [1, 1, 1]
    for error, said in zip(errors, ("server.host = '0.0.0.0'", "another server runs on", f"cannot listen on 127.0.0.1 port {server.port}")):
        assert said in error


def test_stops_cleanly_and_loses_nothing(server):
    """Told to stop in the middle of a crowd: requests that wait are told so, and none is left without a word before the door closes.
    Sent again after the restart, each message has one answer, the same as before where there was one."""
    memory = server.tell("181", "用户LinF养的猫叫团团")
    memories, answered = server.call("GET", "/readyz")[1]["memories"], threading.Event()

    def ask(user):
        return server.say(user, "你好", message_id="m1")

    def crowd(number):
        "Person after person says hello until the server does not answer any more: who, and what came back (None: no connection)."
        found = []
        while not found or found[-1][1] and found[-1][1][0] == 200:
            user = f"182{number:02}{len(found):03}"
            try:
                found.append((user, ask(user)))
                answered.set()
            except (OSError, http.client.HTTPException):
                found.append((user, None))
        return found

    with ThreadPoolExecutor(24) as pool:
        crowds = [pool.submit(crowd, number) for number in range(24)]
        assert answered.wait(300)
        assert server.end(signal.SIGTERM, main=False) == 0  # the kernel may hand a signal to any thread
        before = [answer for one in crowds for answer in one.result()]
    assert {answer[0] for _, answer in before if answer} == {200, 503}
    server.start()
    assert server.call("GET", "/readyz")[1]["memories"] == memories
    assert server.call("GET", "/api/memories?scope=private:181")[1]["memories"][0]["id"] == memory
    for user, answer in before:
        again = ask(user)
        assert again == answer if answer and answer[0] == 200 else again[1]["status"] == "ok"
        assert server.history(f"private:{user}") == [("user", "你好"), ("assistant", again[1]["reply"])]


def test_killed_after_an_answer_loses_nothing(server):
    memory = server.tell("211", "用户LinF现居杭州")
    answer = server.say("211", "你好", message_id="m1")
    before = server.history("private:211")
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server.start()
    assert server.say("211", "你好", message_id="m1") == answer
    assert server.history("private:211") == before == [("user", "你好"), ("assistant", answer[1]["reply"])]
    assert [one["id"] for one in server.call("GET", "/api/memories?scope=private:211")[1]["memories"]] == [memory]


def test_log_names_requests_and_holds_no_words(server):
    "The line of an answer, written by another thread, carries the number of its request, too; nothing that was said or remembered in this file is in the log."
    status, answer = server.call("POST", "/api/chat/private", {"user_id": "221", "content": "今天好累"}, **{"X-Request-Id": "line-7"})
    assert status == 200 and answer["status"] == "ok"
    log = (server.folder / "log").read_text("utf-8")
    assert "recallnb.engine [line-7]: private:221: answered in" in log and "[line-7]: POST /api/chat/private 200 in" in log
    assert not [said for said in ("今天好累", "你好", "杭州", "豆芽", "LinF", answer["reply"]) if said in log]
