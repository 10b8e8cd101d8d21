"""A backup is made, and put back, by its command, while a server answers."""

import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from load import Server

from recallnb.release import publish, releases
from recallnb.settings import load_settings


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "state")
    yield server
    server.process.terminate()
    assert server.process.wait(60) == 0


def backup(state, *arguments):
    "Run `python -m recallnb.backup` as an owner does."
    return subprocess.run([sys.executable, "-m", "recallnb.backup", *map(str, arguments)], cwd=ROOT, env=os.environ | {"RECALLNB_PATHS__STATE": str(state)}, capture_output=True, text=True)


def say(server, user_id, content, **fields):
    return server.call("POST", "/api/chat/private", {"user_id": user_id, "user_nickname": "LinF", "content": content} | fields)


def lives(server):
    "Where LinF lives: what is recalled, and what is said."
    answer = say(server, "42", "我现在住在哪个城市？")
    return [one["decoded"] for one in answer["recalls"]], answer["reply"]


def test_made_and_put_back_while_somebody_talks(server, tmp_path):
    "What was told before is back, what was told since is gone, nobody's message fails, and the next one is answered out of it."
    state, kept = tmp_path / "state", tmp_path / "kept"
    kept.mkdir()
    told = server.call("POST", "/api/memories", {"scope": "private:42", "subject": "42", "text": "用户LinF现居杭州"})["memory"]["id"]
    say(server, "42", "你好", message_id="before")
    over, failed, count = threading.Event(), [], 0

    def talk():
        nonlocal count
        while not over.is_set():
            try:
                answer = say(server, "7", "你好", message_id=f"m{count}")
            except Exception as error:  # a thread of its own: it would end unseen
                failed.append(error)
                return
            count += 1
            if answer["status"] not in ("ok", "retracted"):  # retracted: its own question was put away
                failed.append(answer)

    talking = threading.Thread(target=talk)
    talking.start()
    try:
        made = backup(state, kept)
        assert made.returncode == 0, made.stderr
        server.call("DELETE", f"/api/memories/{told}")
        later = server.call("POST", "/api/memories", {"scope": "private:42", "subject": "42", "text": "用户LinF现居桂林"})["memory"]["id"]
        say(server, "42", "在吗？", message_id="after")
        publish(load_settings().paths.model, state, {}, None, {"base": "", "settings": {}, "data_hash": ""}, "later")
        assert lives(server)[0] == ["用户LinF现居桂林"]
        back = backup(state, "--restore", made.stdout.strip())
        assert back.returncode == 0 and "-before-" in back.stdout, back.stderr
        assert lives(server)[0] == ["用户LinF现居杭州"] and "杭州" in lives(server)[1]
    finally:
        over.set()
        talking.join()
    assert failed == [] and count > 2
    known = server.call("GET", "/api/memories?scope=private:42")["memories"]
    assert [one["id"] for one in known] == [told] and later != told and releases(state) == []
    ids = [one["id"] for one in server.call("GET", "/api/chats/private:42/history")["messages"]]
    assert "before" in ids and "after" not in ids
    [old] = tmp_path.glob("state-before-*")
    assert len(releases(old)) == 1 and (old / "recallnb.db").is_file()


def test_a_damaged_one_changes_nothing(server, tmp_path):
    made = backup(tmp_path / "state", tmp_path).stdout.strip()
    with open(f"{made}/recallnb.db", "r+b") as file:
        file.seek(4000)
        file.write(b"x")
    server.call("POST", "/api/memories", {"scope": "private:42", "subject": "42", "text": "用户LinF现居桂林"})
    back = backup(tmp_path / "state", "--restore", made)
    assert back.returncode == 1 and "recallnb.db is missing, changed" in back.stderr
    assert lives(server)[0] == ["用户LinF现居桂林"] and not [*tmp_path.glob("state-before-*")]
