"""Two servers over one PostgreSQL, as a proxy that pins chats would use them: what one is told, the other one knows."""

import zlib

import pytest
from test_postgres import new_database, postgres  # noqa: F401 (a fixture)
from test_serve_more import Client, events

from recallnb.generate import Recall


@pytest.fixture(scope="module")
def servers(postgres, tmp_path_factory):  # noqa: F811
    "Two servers, each with a state folder of its own, and one database."
    folder = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECALLNB_DATABASE__URL", new_database(postgres))
        clients = [Client(folder / name) for name in ("first", "second")]
    yield clients
    for client in clients:
        client.close()
    assert not [*folder.rglob("recallnb.db")]  # nobody has written to a file


def home(servers, user_id):
    "The server of a private chat, as the proxy picks it; and the other one."
    number = zlib.crc32(f"private:{user_id}".encode()) % 2
    return servers[number], servers[1 - number]


def roles(client, user_id):
    return [one["role"] for one in client.call("GET", f"/api/chats/private:{user_id}/history")[1]["messages"]]


def test_told_here_recalled_there_forgotten_everywhere(servers):
    first, second = servers
    memory = first.tell("1", "用户LinF现居杭州")
    answer = second.say("1", "我现在住在哪个城市？")[1]
    assert [one["id"] for one in answer["recalls"]] == [memory] and "杭州" in answer["reply"]
    assert first.call("DELETE", f"/api/memories/{memory}")[0] == 200
    assert second.call("GET", f"/api/memories/{memory}")[0] == 404
    assert first.engine.history.delete_user("1") and roles(first, "1") == []
    assert roles(second, "1") == []
    answer = second.say("1", "我现在住在哪个城市？")[1]
    assert memory not in [one["id"] for one in answer["recalls"]] and "杭州" not in answer["reply"]


def test_a_repeated_message_has_one_answer(servers):
    "Wherever it arrives."
    first, second = servers
    answer = first.say("2", "你好", message_id="m1")[1]
    assert answer["status"] == "ok" and second.say("2", "你好", message_id="m1")[1] == answer
    assert roles(first, "2") == ["user", "assistant"]


def test_newer_message_interrupts(servers):
    "At the chat's home, while the other server answers another chat; the next prompt holds both messages, the history no half answer."
    user = "3"
    here, there = home(servers, user)
    connection, response = here.begin(user, "在吗？", message_id="older")
    other = next(id for id in map(str, range(4, 99)) if home(servers, id)[0] is there)
    assert there.say(other, "你好")[1]["status"] == "ok"
    assert home(servers, user)[0].say(user, "我回来了", message_id="newer")[1]["status"] == "ok"
    older = [*events(response)][-1][1]
    connection.close()
    assert older["status"] in ("interrupted", "ok")  # it may have been done by then
    assert roles(there, user).count("assistant") == (2 if older["status"] == "ok" else 1) and roles(there, user)[:1] == ["user"]
    assert there.say(user, "我回来了", message_id="newer")[1] == here.say(user, "我回来了", message_id="newer")[1]


def test_a_memory_that_goes_while_it_is_spoken(servers, monkeypatch):
    "Deleted at the other server between the recall and the next token: the running answer begins again without it."
    first, second = servers
    memory, hear, deleted = first.tell("5", "用户LinF现居桂林"), first.engine._hear, []

    def hears(job, event):
        hear(job, event)
        if isinstance(event, Recall) and job.message.scope == "private:5" and not deleted:
            deleted.append(second.call("DELETE", f"/api/memories/{memory}")[0])

    monkeypatch.setattr(first.engine, "_hear", hears)
    connection, response = first.begin("5", "我现在住在哪个城市？", user_nickname="LinF")
    seen = [*events(response)]
    connection.close()
    recalled = next(found for name, found in seen if name == "recall")
    assert recalled["id"] == memory and deleted == [200]
    assert "restart" in [name for name, _ in seen] and "桂林" not in seen[-1][1]["reply"]
    assert first.call("GET", "/api/memories?scope=private:5")[1]["total"] == 0
