"""Another process promotes a release while people talk: the server moves to it, and nobody notices."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_serve_more import Client, events

from recallnb import follow
from recallnb.model import model_version
from recallnb.release import publish
from recallnb.served import borrowed
from recallnb.store import Memory


def release(client, folder, number, metrics=None):
    "The shipped model with its weights changed by a hair: another version, with vectors of its own."
    shutil.copytree(client.settings.paths.model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"] *= 1 + number / 1000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return publish(folder, client.settings.paths.state, metrics or {}, None, {"base": "", "settings": {}, "data_hash": ""}, model_version(folder)).id


def command(client, *arguments):
    "What an owner types, in a process of its own."
    environment = os.environ | {"RECALLNB_PATHS__STATE": str(client.settings.paths.state)}
    done = subprocess.run([sys.executable, "-m", "recallnb.release", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def wait_until_served(client, name):
    deadline = time.monotonic() + 300
    while client.call("GET", "/readyz")[1].get("model") != name:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_moves_to_a_new_release_and_back(client, tmp_path, monkeypatch):
    """Six people talk all the time; the night's process promotes, an owner goes back twice. Every message has its answer, all of
    an answer is by one model, and memories of all times are found."""
    first, second = (release(client, tmp_path / f"model{number}", number) for number in (1, 2))
    client.tell("1", "用户LinF现居杭州")
    over, sent, wrong, speakers, hear = threading.Event(), {}, [], {}, client.engine._hear

    def hears(job, event):
        speakers.setdefault(job.row, set()).add(client.engine.served.name)
        hear(job, event)

    monkeypatch.setattr(client.engine, "_hear", hears)

    def talk(user):
        while not over.is_set():
            id = f"m{sent[user]}"
            try:
                status, answer = client.say(user, "你好", message_id=id)
            except Exception as error:  # a thread of its own: it would end unseen
                wrong.append(error)
                return
            if status != 200 or answer["status"] != "ok" or answer["message_id"] != id:
                wrong.append((user, id, status, answer))
            sent[user] += 1

    people = [threading.Thread(target=talk, args=(str(user),)) for user in range(10, 16)]
    sent.update((str(user), 0) for user in range(10, 16))
    for one in people:
        one.start()
    try:
        command(client, "promote", first)
        wait_until_served(client, first)
        client.tell("1", "用户LinF养的猫叫豆芽")
        command(client, "promote", second)
        wait_until_served(client, second)
        command(client, "back")
        wait_until_served(client, first)
        client.tell("1", "用户LinF最喜欢的水果为杨梅")
        assert client.call("POST", f"/api/releases/{second}/promote", {}) == (200, {"status": "ok", "current": second})
        wait_until_served(client, second)
    finally:
        over.set()
        for one in people:
            one.join()
    assert not wrong
    assert {len(models) for models in speakers.values()} == {1} and {first, second} <= set().union(*speakers.values())
    for user, count in sent.items():
        history = client.engine.history.recent(f"private:{user}", 1000)
        assert sorted(one.id for one in history if one.role == "user") == sorted(f"m{number}" for number in range(count)) and len(history) == 2 * count
    listed = client.call("GET", "/api/releases")[1]
    assert listed["current"] == listed["serving"] == second == client.engine.served.name
    assert client.engine.store.version == client.engine.served.version and not client.engine.store.missing()
    assert client.call("GET", "/api/memories?scope=private:1&meaning=%E4%BD%A0%E5%A5%BD")[1]["total"] == 3


def test_a_damaged_release_is_passed_over(client, tmp_path):
    "It was promoted before it was damaged; what is served goes on being served, and the next good one is moved to."
    served, damaged, good = (release(client, tmp_path / f"model{number}", number) for number in (6, 3, 4))
    command(client, "promote", served)
    wait_until_served(client, served)
    state = client.settings.paths.state
    file = next((state / "releases" / damaged / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    (state / "releases" / "current").write_text(f"{damaged}\n{served}\n")
    client.engine.look()
    deadline = time.monotonic() + 300
    while client.engine._asked != damaged:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert client.say("20", "你好")[1]["status"] == "ok" and client.call("POST", f"/api/releases/{damaged}/promote", {})[0] == 409
    command(client, "promote", good)
    wait_until_served(client, good)
    assert client.say("20", "你好")[1]["status"] == "ok"


def test_gives_up_its_model_for_a_night(tmp_path, monkeypatch):
    "[training] unload: running answers end, what is said during the night is stored, and answered by what the night has promoted."
    monkeypatch.setenv("RECALLNB_TRAINING__UNLOAD", "true")
    client = Client(tmp_path / "state")
    try:
        tomorrow = release(client, tmp_path / "model", 5)
        connection, response = client.begin("2", "你好")
        with borrowed(client.settings):
            assert next(client.engine.served.model.parameters()).is_meta and [*events(response)][-1][1]["status"] == "ok"
            status, found = client.say("1", "你好", message_id="m1")
            assert (status, found["status"], found["reply"]) == (503, "asleep", client.settings.chat.asleep)
            assert [one.id for one in client.engine.history.recent("private:1", 10)] == ["m1"]
            status, found = client.call("POST", "/api/memories", {"scope": "private:1", "subject": "1", "text": "用户LinF现居杭州"})
            assert status == 503 and "nothing was stored" in str(found)
            status, found = client.call("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "我的生日是11月6日"}], "user": "7"})
            assert status == 503 and not client.engine.history.recent("private:7", 10)
            assert client.call("GET", "/api/memories?scope=private:1")[0] == 200 and client.call("GET", "/readyz")[0] == 503
            command(client, "promote", tomorrow)
        connection.close()
        wait_until_served(client, tomorrow)
        assert client.say("1", "你好", message_id="m1")[1]["status"] == "ok" and len(client.engine.history.recent("private:1", 10)) == 2
        write, full = follow.write_missing, [sqlite3.OperationalError("database or disk is full")]

        def write_once_full(*arguments):
            if full:
                raise full.pop()
            write(*arguments)
        monkeypatch.setattr(follow, "write_missing", write_once_full)
        with borrowed(client.settings):
            client.engine.store.add([Memory("用户LinF现居杭州", "private:1", "1", "住处")])  # by the night
        deadline = time.monotonic() + 300
        while client.engine.asleep or client.engine.store.missing():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not full and client.say("1", "你好", message_id="m2")[1]["status"] == "ok"
        with borrowed(client.settings):
            client.engine.stop()  # a stop during a night, too
    finally:
        client.close()
