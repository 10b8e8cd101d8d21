"""What can go wrong around a server: it is killed, the disk is full, the database locked or damaged, clients are slow or hostile.

What was acknowledged stays, nobody gets a 500, the error says what to do, and nothing has to be put right by hand."""

import contextlib
import http.client
import json
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_serve import Server
from test_serve_more import Client, events, picture, upload

import recallnb.serve
from recallnb.history import History, Message
from recallnb.settings import load_settings


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A process that is killed and started again; pictures and people without limits. Its state is on a small tmpfs where one can be mounted."
    server = Server(tmp_path_factory.mktemp("faults"))
    state = server.folder / "state"
    state.mkdir()
    server.small = shutil.which("mount") and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "recallnb", state], capture_output=True).returncode
    try:
        server.environment |= {"RECALLNB_SERVER__PER_USER": "0", "RECALLNB_SERVER__PER_KEY": "0"}
        server.start()
        yield server
        assert server.end(signal.SIGINT) == 0, (server.folder / "log").read_text()[-3000:]
    finally:
        if server.small:
            subprocess.run(["umount", "--lazy", state], check=True)


def kill(server):
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server.start()


def trouble(answer):
    "Status, problem and remedy of an error."
    status, body = answer
    return status, body["errors"][0]["problem"], body["errors"][0]["remedy"]


def test_killed_in_the_middle_of_answers(server):
    "Eight chats are being answered, one of them has begun to speak. Sent again, each message has one answer; what was returned before is returned again."
    def ask(number):
        with contextlib.suppress(OSError, http.client.HTTPException):  # the connection breaks
            return server.say(str(number), "你好", message_id="m1")

    with ThreadPoolExecutor(8) as pool:
        asked = {number: pool.submit(ask, number) for number in range(300, 308)}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.request("POST", "/api/chat/private", json.dumps({"user_id": "308", "content": "在吗？", "message_id": "m1"}), {"Content-Type": "application/json", "Accept": "text/event-stream"})
        response = connection.getresponse()  # kept: a client that leaves ends the answer by itself
        assert next(events(response))[0] in ("token", "recall")
        kill(server)
        before = {number: one.result() for number, one in asked.items()}
        connection.close()
    left = server.history("private:308")
    assert left[0] == ("user", "在吗？") and len(left) < 3  # a stalled test may come when the answer is stored already
    assert server.say("308", "在吗？", message_id="m1")[1]["status"] == "ok" and len(server.history("private:308")) == 2
    for number, answer in before.items():
        again = ask(number)
        assert again == answer if answer and answer[0] == 200 else again[1]["status"] == "ok"
        assert server.history(f"private:{number}") == [("user", "你好"), ("assistant", again[1]["reply"])]


def test_killed_in_the_middle_of_uploads(server):
    "Every picture whose id was returned is there, and nothing else."
    data, kept, enough = picture(), [], threading.Event()

    def send():
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                status, found = upload(server, data)
                assert status == 201
                kept.append(found["id"])
                if len(kept) >= 12:
                    enough.set()

    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(send) for _ in range(4)]
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(b"POST /api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n" + data)
        assert enough.wait(120)
        server.process.kill()
        [one.result() for one in sent]
        half.close()
    folder = server.folder / "state/uploads"
    (folder / f".{'0' * 32}.new").write_bytes(data[:50])  # as a crash between two lines leaves them
    (folder / f"{'0' * 32}.png").write_bytes(data)
    kill(server)
    database = sqlite3.connect(server.folder / "state/recallnb.db")
    rows = {f"{id}.png" for (id,) in database.execute("SELECT id FROM upload")}
    database.close()
    assert {file.name for file in folder.iterdir()} == rows >= {f"{id}.png" for id in kept}
    assert server.say("310", "这是什么颜色？", images=kept[-8:])[1]["status"] == "ok"


@contextlib.contextmanager
def files_cannot_grow(server):
    unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1, unlimited[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)


@contextlib.contextmanager
def disk_is_full(server):
    if not server.small:
        pytest.xfail("a tmpfs cannot be mounted here: run as root")
    filler = server.folder / "state/filler"
    try:
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        yield
    finally:
        filler.unlink()


@pytest.mark.parametrize(("user", "trial"), [("320", files_cannot_grow), ("321", disk_is_full)])
def test_full_disk(server, user, trial):
    "Nothing is acknowledged, and everything works when there is room again."
    server.call("DELETE", f"/api/memories/{server.tell(user, '用户LinF喜欢猫')}")  # leaves an empty write-ahead log
    memory, answer = server.tell(user, "用户LinF现居杭州"), server.say(user, "你好", message_id="m1")
    before = server.history(f"private:{user}")

    def attempts():
        yield server.say(user, "在吗？", message_id="m2")
        yield server.call("POST", "/api/memories", {"scope": f"private:{user}", "subject": user, "text": "用户LinF养的猫叫豆芽"})
        yield server.call("PATCH", f"/api/memories/{memory}", {"text": "用户LinF现居大连"})
        yield upload(server, picture())

    with trial(server):
        for status, problem, remedy in map(trouble, attempts()):
            assert status == 503 and "disk" in problem and "send it again" in remedy
        assert server.call("GET", "/healthz")[0] == server.call("GET", "/readyz")[0] == 200
    assert server.history(f"private:{user}") == before and server.say(user, "你好", message_id="m1") == answer
    assert [status for status, _ in attempts()] == [200, 201, 200, 201]
    assert server.say(user, "在吗？", message_id="m2")[1]["status"] == "ok"


def test_locked_database(tmp_path, monkeypatch):
    "Somebody else writes for too long: whoever wants to write is told so, whoever reads is not disturbed."
    monkeypatch.setattr("recallnb.database._PATIENCE", 0.3)
    client = Client(tmp_path)
    try:
        client.tell("1", "用户LinF现居杭州")
        other = sqlite3.connect(tmp_path / "recallnb.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for call in (lambda: client.say("1", "你好", message_id="m1"), lambda: client.call("POST", "/api/memories", {"scope": "private:1", "subject": "1", "text": "用户LinF喜欢猫"}),
                     lambda: client.call("DELETE", "/api/memories?subject=1"), lambda: upload(client, picture())):
            status, problem, remedy = trouble(call())
            assert status == 503 and "locked" in problem and "end what holds it" in remedy
        assert client.call("GET", "/api/memories?scope=private:1")[1]["total"] == 1
        other.execute("ROLLBACK")
        assert client.say("1", "你好", message_id="m1")[1]["status"] == "ok"
    finally:
        client.close()


def test_damaged_database(tmp_path):
    "Found while it runs: no call fails without a reason, and with the file put back the same process goes on."
    client = Client(tmp_path)
    file = tmp_path / "recallnb.db"
    try:
        history = History(file)
        for number in range(300):
            history.append(Message("private:1", "1", "LinF", "很长的一句话" * 20, float(number)))
        history.database.erase()
        history.close()
        whole = file.read_bytes()
        with open(file, "r+b") as data:
            data.seek(4096)
            data.write(b"\xff" * (len(whole) - 4096))
        for call in (("GET", "/api/chats/private:1/history"), ("POST", "/api/chat/private", {"user_id": "1", "content": "你好", "message_id": "m1"}),
                     ("POST", "/api/memories", {"scope": "private:1", "subject": "1", "text": "用户LinF喜欢猫"})):
            status, problem, remedy = trouble(client.call(*call))
            assert status == 503 and "damaged" in problem and "backup" in remedy, call
        assert client.call("GET", "/healthz")[0] == 200
        with open(file, "r+b") as data:
            data.write(whole)
        assert client.say("1", "你好", message_id="m1")[1]["status"] == "ok"
    finally:
        client.close()


@pytest.mark.parametrize(("content", "said"), [(b"buy milk\n" * 1000, "is not an SQLite database"), (None, "damaged")])
def test_refuses_to_start_on_a_damaged_database(tmp_path, monkeypatch, content, said):
    "With the file's name and what to do."
    file = tmp_path / "recallnb.db"
    if content is None:
        History(file).close()
        content = bytearray(file.read_bytes())
        content[100:4096] = b"\xff" * 3996
    file.write_bytes(content)
    monkeypatch.setenv("RECALLNB_PATHS__STATE", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handlers of the tests stay
    with pytest.raises(SystemExit, match=f"recallnb.db.*{said}.*(move it away|backup)"):
        recallnb.serve.main([])


def test_readers_that_do_not_read(client):
    "Their answers end all the same and free their rows; others are not kept waiting; in the end nothing is missing."
    slow = [client.begin(str(number), "你好", user_nickname="LinF") for number in range(400, 412)]
    half = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(30)]
    for number, one in enumerate(half):
        one.sendall(b"POST /api/chat/private HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"[: 20 + 5 * number])
    assert client.say("412", "你好")[1]["status"] == "ok"
    client.wait_idle()
    for connection, response in slow:
        *said, (name, answer) = events(response)
        assert name == "done" and answer["status"] == "ok" and "".join(data["text"] for kind, data in said if kind == "token") == answer["reply"]
        connection.close()
    for one in half:
        one.close()


def test_a_server_whose_model_has_died_ends(tmp_path, monkeypatch):
    "Whatever watches it can then start it anew; a process that answers 503 for ever looks alive."
    def no_card():
        raise RuntimeError("no card")

    def broken(engine, url):
        engine._work = no_card
        with engine._changed:
            engine._changed.notify_all()  # the round that waits ends, the next one fails

    monkeypatch.setattr(recallnb.serve, "_greet", broken)
    settings = load_settings()
    settings.paths.state, settings.server.port = tmp_path / "state", 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(RuntimeError, match="start the server again"):
            recallnb.serve.serve(settings)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
