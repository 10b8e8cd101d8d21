"""How the QQ client calls the server, over real HTTP."""

import asyncio
import json
import socket
import threading

import pytest
from fake_client import QUICK  # noqa: F401  puts the client on the path
from fake_recallnb import events, reply

from recallnb_client import server as server_module
from recallnb_client.config import Server
from recallnb_client.server import Answer, RecallServer, Refused, Unavailable, download, read_events

PRIVATE = "/api/chat/private"
DONE = {"status": "ok", "reply": " 你住杭州呀。\n", "message_id": "m1", "reason": "stop", "recalls": [], "timing": {}}
BUSY = {"status": "error", "errors": [{"field": None, "problem": "stopping", "remedy": "again"}]}
ERROR = {"status": "error", "errors": [{"field": "content", "problem": "too long", "remedy": "shorten it"}]}


def run(fake, call, **settings):
    "One call of a server object, within its life."
    async def play():
        server = RecallServer(Server(url=fake if isinstance(fake, str) else fake.url + "/", **settings))
        try:
            async with asyncio.timeout(60):
                return await call(server)
        finally:
            await server.close()
    return asyncio.run(play())


def say(server, body=None, scope="private:42", accepted=lambda: None):
    return server.say(scope, body or {"user_id": "42", "content": "你好", "mentioned": True}, accepted)


def chat(recallnb, answer):
    return recallnb(**{"__api__chat__private": answer})


def test_an_answer_by_events(recallnb):
    "Comments, several lines of data, line ends of both kinds, and characters that Python takes for line ends."
    done = json.dumps(DONE | {"reply": "一\u2028二\x85三"}, ensure_ascii=False)
    fake = chat(recallnb, events(
        b": hello\n\n", ("token", {"text": "一"}), ("recall", {"id": 7}), b"event: done\r\ndata: " + done[:9].encode() + b"\r\n", b"data:" + done[9:].encode(), b"\r\n\r\n"))
    accepted = []
    assert run(fake, lambda server: say(server, accepted=lambda: accepted.append(1)), key="s3cret") == Answer("ok", "一\u2028二\x85三")
    method, path, _, headers, body = fake.requests[0]
    assert (method, path, headers["Accept"], headers["Authorization"], accepted) == ("POST", PRIVATE, "text/event-stream", "Bearer s3cret", [1])
    assert json.loads(body) == {"user_id": "42", "content": "你好", "mentioned": True}


def test_characters_may_be_cut_anywhere():
    async def bytewise(stream):
        for byte in stream:
            yield bytes([byte])

    async def read():
        return [found async for found in read_events(bytewise("data: 杭州\n\nevent: x\ndata: 1\ndata: 2\n\ndata: lost".encode()))]
    assert asyncio.run(read()) == [("message", "杭州"), ("x", "1\n2")]


def test_an_answer_in_json(recallnb):
    assert run(chat(recallnb, reply(DONE)), say) == Answer("ok", "你住杭州呀。")
    assert run(chat(recallnb, reply({"status": "stored", "message_id": "m1"}, 202)), say) == Answer("stored")


def test_a_group_is_named_by_its_id(recallnb):
    fake = recallnb(__api__chat__group=reply(DONE))
    run(fake, lambda server: say(server, {"user_id": "42"}, "group:9"))
    assert json.loads(fake.requests[0][4]) == {"user_id": "42", "group_id": "9"}


@pytest.mark.parametrize("stream", [events(("token", {})), events(("error", BUSY)), events(("error", {})), events(b"event: done\ndata: {\n\n"), events(b"event: done\ndata: {}\n\n")])
def test_a_stream_without_an_answer_is_tried_again(recallnb, stream):
    with pytest.raises(Unavailable):
        run(chat(recallnb, stream), say)


def test_a_message_that_is_at_fault_is_not_tried_again(recallnb):
    with pytest.raises(Refused, match="content too long"):
        run(chat(recallnb, events(("error", ERROR))), say)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_tried_again(recallnb, status):
    with pytest.raises(Unavailable, match="too long → shorten it") as error:
        run(chat(recallnb, reply(ERROR, status, **{"Retry-After": "7"})), say)
    assert (error.value.status, error.value.retry_after) == (status, 7.0)


def test_a_server_that_is_asleep_has_a_line_for_people(recallnb):
    for answer in (reply(ERROR | {"status": "asleep", "reply": "我在整理记忆。"}, 503), events(("error", ERROR | {"errors": [ERROR["errors"][0] | {"field": None}], "status": "asleep", "reply": "我在整理记忆。"}))):
        with pytest.raises(Unavailable) as error:
            run(chat(recallnb, answer), say)
        assert error.value.line == "我在整理记忆。"


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_is_refused_is_not(recallnb, status):
    with pytest.raises(Refused, match="content too long") as error:
        run(chat(recallnb, reply(ERROR, status)), say)
    assert error.value.status == status


def test_nobody_there_and_nonsense(recallnb):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound by us, so that nobody else listens there
        with pytest.raises(Unavailable):
            run(url, say)
    with pytest.raises(Unavailable):
        run(chat(recallnb, lambda body: (200, {}, b"<html>")), say)
    with pytest.raises(Unavailable):
        run(chat(recallnb, lambda body: (200, {}, b"[]")), say)


def test_a_server_that_falls_silent_or_takes_too_long_is_tried_again(recallnb, monkeypatch):
    ended = threading.Event()

    def slow(words):
        def parts():
            while not ended.wait(0.05):
                yield words
        return lambda body: (200, {"Content-Type": "text/event-stream"}, parts())
    monkeypatch.setattr(server_module, "SILENCE_S", 0.3)
    try:
        with pytest.raises(Unavailable, match="ReadTimeout"):
            run(chat(recallnb, slow(b"")), say)
        monkeypatch.setattr(server_module, "SILENCE_S", 60)
        with pytest.raises(Unavailable, match="TimeoutError"):
            run(chat(recallnb, slow(b": ping\n\n")), say, answer_timeout_s=0.5)
    finally:
        ended.set()


def test_an_ended_call_closes_the_stream(recallnb):
    "The server notices, so that it can end the answer."
    closed, begun = threading.Event(), threading.Event()

    def endless(body):
        def parts():
            try:
                while True:
                    begun.set()
                    yield b"event: token\ndata: {}\n\n" * 1000
            finally:
                closed.set()
        return 200, {"Content-Type": "text/event-stream"}, parts()

    async def call(server):
        task = asyncio.create_task(say(server))
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await asyncio.to_thread(closed.wait, 60)
    run(chat(recallnb, endless), call)


def test_the_other_calls(recallnb):
    fake = recallnb(
        __api__upload=reply({"status": "ok", "id": "i1"}, 201), __api__messages__retract=reply({"status": "ok"}), __api__memories__7=reply({"status": "ok"}),
        __api__memories=reply({"status": "ok", "total": 1, "memories": [{"id": 7}]}), **{"__api__people__42__learning": reply({}), "__api__chats__group:9__pause": reply({})})

    async def call(server):
        assert await server.upload(b"\x89PNG") == "i1"
        assert await server.retract("private:42", "m1")
        assert await server.memories("42", "group:9") == ([{"id": 7}], 1)
        await server.forget(7)
        await server.forget_person("42")
        await server.set_learning("42", False)
        await server.set_paused("group:9", True)
    run(fake, call)
    assert b"\x89PNG" in fake.requests[0][4] and b'name="file"' in fake.requests[0][4]
    made = [(method, path, query, json.loads(body or b"null")) for method, path, query, _, body in fake.requests[1:]]
    assert made == [
        ("POST", "/api/messages/retract", {}, {"scope": "private:42", "message_id": "m1"}),
        ("GET", "/api/memories", {"subject": ["42"], "limit": ["1000"], "scope": ["group:9"]}, None),
        ("DELETE", "/api/memories/7", {}, None),
        ("DELETE", "/api/memories", {"subject": ["42"]}, None),
        ("POST", "/api/people/42/learning", {}, {"learning": False}),
        ("POST", "/api/chats/group:9/pause", {}, {"paused": True}),
    ]


def test_half_of_a_character_of_two_reaches_the_server(recallnb):
    fake = chat(recallnb, reply(DONE))
    assert run(fake, lambda server: server.say("private:42", {"content": "\ud83d 你好"}, lambda: None)).status == "ok"
    assert json.loads(fake.requests[-1][-1])["content"] == "\ud83d 你好"


def test_no_proxy_of_the_system(recallnb, monkeypatch):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert run(chat(recallnb, reply(DONE)), say).status == "ok"


def test_pictures(recallnb):
    fake = recallnb(__a=lambda body: (302, {"Location": "/b"}, b""), __b=lambda body: (200, {}, b"x" * 100), __loop=lambda body: (302, {"Location": "/loop"}, b""),
                    __file=lambda body: (302, {"Location": "file:///etc/passwd"}, b""), __gone=reply({}, 404), __long=lambda body: (200, {}, iter([b"x" * 60] * 9)))
    assert asyncio.run(download(fake.url + "/a", 100)) == b"x" * 100
    for path, said in (("/a", "more than"), ("/long", "more than"), ("/loop", "from one to the next"), ("/file", "not one of the web"), ("/gone", "404")):
        with pytest.raises(ValueError, match=said):
            asyncio.run(download(fake.url + path, 99))
    with pytest.raises(ValueError, match="not one of the web"):
        asyncio.run(download("/etc/passwd", 99))


def test_pictures_take_only_so_long(recallnb):
    def slow(body):
        def parts():
            while not ended.wait(0.02):
                yield b"x"
        return 200, {}, parts()
    ended = threading.Event()
    fake = recallnb(__slow=slow)
    try:
        with pytest.raises(TimeoutError):
            asyncio.run(download(fake.url + "/slow", 10**9, 0.3))
    finally:
        ended.set()
