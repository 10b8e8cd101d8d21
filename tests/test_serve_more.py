"""What clients rely on beyond a plain answer: events, wishes, pictures, OpenAI's language, keys. One server in this process, over real sockets."""

import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image, ImageDraw
from waitress import create_server

from recallnb import engine as engine_module
from recallnb.engine import Engine
from recallnb.history import Message
from recallnb.limits import Keys
from recallnb.rules import Censor
from recallnb.serve import create_app
from recallnb.settings import load_settings


class Client:
    "Calls to a server in this process."

    def __init__(self, folder, per_user=0):
        self.settings = load_settings()
        self.settings.paths.state, self.settings.server.per_user, self.settings.server.per_key = folder, per_user, 0
        self.engine = Engine(self.settings)
        self.app = create_app(self.settings, self.engine)
        self.server = create_server(self.app, host="127.0.0.1", port=0, threads=24, channel_request_lookahead=1)
        self.port = self.server.effective_port
        threading.Thread(target=self.server.run, daemon=True).start()
        self.engine.wait()

    def close(self):
        self.engine.stop()
        self.server.task_dispatcher.shutdown()
        self.engine.close()

    def open(self, method, path, body=None, **headers):
        "Begin a request: connection and response."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        return connection, connection.getresponse()

    def call(self, method, path, body=None, **headers):
        connection, response = self.open(method, path, body, **headers)
        try:
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def say(self, user_id, content, **fields):
        return self.call("POST", "/api/chat/private", {"user_id": user_id, "user_nickname": "LinF", "content": content} | fields)

    def begin(self, user_id, content, **fields):
        "Begin a streamed answer; returns when the server has the message."
        connection, response = self.open("POST", "/api/chat/private", {"user_id": user_id, "content": content} | fields, Accept="text/event-stream")
        assert response.status == 200 and response.readline() == b": accepted\n"
        return connection, response

    def tell(self, user_id, text):
        status, found = self.call("POST", "/api/memories", {"scope": f"private:{user_id}", "subject": user_id, "text": text})
        assert status == 201, found
        return found["memory"]["id"]

    def wait_idle(self):
        "Return when nobody waits and nothing is being answered."
        deadline = time.monotonic() + 120
        while self.engine.load != {"waiting": 0, "running": 0}:
            assert time.monotonic() < deadline
            self.engine.run(lambda: None)


def events(response):
    "Name and data of the events that follow."
    name = ""
    for line in response:
        line = line.decode().rstrip("\n")
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def picture(color=(220, 40, 40)):
    "A disc of this colour, as PNG."
    image, out = Image.new("RGB", (64, 64), "white"), io.BytesIO()
    ImageDraw.Draw(image).ellipse((16, 14, 48, 46), fill=color)
    image.save(out, "PNG")
    return out.getvalue()


def upload(client, data, **headers):
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="../../a.png"\r\nContent-Type: image/png\r\n\r\n' + data + b"\r\n--x--\r\n"
    return client.call("POST", "/api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"} | headers)


def test_events_make_up_the_answer(client):
    memory = client.tell("1", "用户LinF现居杭州")
    connection, response = client.begin("1", "我现在住在哪个城市？", user_nickname="LinF")
    seen = [*events(response)]
    connection.close()
    name, answer = seen[-1]
    assert name == "done" and answer["status"] == "ok" and answer["notice"] == client.settings.chat.notice
    assert "".join(data["text"] for name, data in seen if name == "token") == answer["reply"]
    recalls = [data for name, data in seen if name == "recall"]
    assert recalls == answer["recalls"] and recalls[0]["id"] == memory and recalls[0]["candidates"][0]["id"] == memory
    assert answer["timing"]["prompt_tokens"] > 10 and "</think>" not in answer["reply"]


def test_newer_message_interrupts_the_stream(client):
    "The older call ends with `interrupted`, the next prompt holds both messages, the history no half answer."
    connection, response = client.begin("2", "在吗？", message_id="older")
    status, newer = client.say("2", "我回来了", message_id="newer")
    older = [*events(response)][-1][1]
    connection.close()
    assert newer["status"] == "ok" and older["status"] in ("interrupted", "ok")  # the older one may have been done by then
    history = client.call("GET", "/api/chats/private:2/history")[1]["messages"]
    assert [one["role"] for one in history].count("assistant") == (2 if older["status"] == "ok" else 1)
    assert client.say("2", "我回来了", message_id="newer")[1] == newer
    assert newer["timing"]["prompt_tokens"] > client.say("20", "我回来了")[1]["timing"]["prompt_tokens"]


def test_full_queue(client, monkeypatch):
    "The client is told when to come back; nothing was stored, so that the message can be sent again."
    monkeypatch.setattr(client.engine, "_entering", client.settings.server.queue)  # as if so many were on their way
    connection, response = client.open("POST", "/api/chat/private", {"user_id": "21", "content": "你好", "message_id": "m1"})
    wrong = json.loads(response.read())["errors"][0]
    connection.close()
    assert response.status == 503 and int(response.headers["Retry-After"]) > 0 and "waiting" in wrong["problem"] and wrong["remedy"]
    assert client.call("GET", "/api/chats/private:21/history")[1]["messages"] == []
    monkeypatch.undo()
    assert client.say("21", "你好", message_id="m1")[1]["status"] == "ok"


def test_client_that_leaves_frees_its_row(client):
    "The answer ends; the message stays, and gets its answer when it is sent again."
    connection, response = client.begin("3", "今天好累", message_id="m1")
    with client.engine.lock("private:3"):  # no answer is stored meanwhile
        job = client.engine._running.get("private:3") or client.engine._waiting["private:3"]
        response.close()
        connection.close()
        assert job.interrupt.wait(60)
    client.wait_idle()
    assert client.say("3", "今天好累", message_id="m1")[1]["status"] == "ok"


def test_retraction_reaches_memories(client):
    client.say("4", "我住在桂林", message_id="m1")
    memory = client.tell("4", "用户LinF现居桂林")
    with client.engine.history.database.transaction() as connection:
        connection.execute("UPDATE memory SET sources = ? WHERE id = ?", ('["m1"]', memory))
    shown = client.call("GET", f"/api/memories/{memory}")[1]["memory"]
    assert [one["content"] for one in shown["messages"]] == ["我住在桂林"]
    body = {"scope": "private:4", "message_id": "m1"}
    assert client.call("POST", "/api/messages/retract", body)[0] == 200
    assert client.call("GET", "/api/chats/private:4/history")[1]["messages"] == [] and client.call("GET", f"/api/memories/{memory}")[0] == 404
    assert client.call("POST", "/api/messages/retract", body)[0] == 404


def test_a_quoted_picture_goes_with_its_message(client):
    ids = [upload(client, picture())[1]["id"] for _ in range(2)]
    for user, content, more in (("50", "[图片]", {"message_id": "shown"}), ("51", "[引用 甲：[图片]]\n[图片]跟这个比呢？", {"images": ids})):
        assert client.call("POST", "/api/chat/group", {"group_id": "48", "user_id": user, "content": content, "mentioned": False} | more)[0] == 202
    files = [client.settings.paths.state / "uploads" / f"{id}.png" for id in ids]
    assert client.call("POST", "/api/messages/retract", {"scope": "group:48", "message_id": "shown"})[0] == 200
    (left,) = client.engine.history.recent("group:48", 9)
    assert (left.content, left.images) == ("[引用了一条消息]\n[图片]跟这个比呢？", ids[:1]) and [file.is_file() for file in files] == [True, False]


@pytest.mark.parametrize("what", ["person", "message"])
def test_answers_end_although_traces_cannot_be_deleted(client, monkeypatch, what):
    "The words are gone by then, and a repetition would find nothing more of them."
    ended, spoil = [], client.engine._spoil

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    def spy(scopes, hit, outcome):
        ended.append(scopes)
        spoil(scopes, hit, outcome)
    message = {"group_id": "49", "user_id": "52", "content": "我的暗号是8731", "message_id": what, "mentioned": False}
    assert client.call("POST", "/api/chat/group", message)[1]["status"] == "stored"
    with client.engine.history.database.transaction() as connection:
        connection.execute("UPDATE message SET extracted = 1 WHERE scope = 'group:49'")
    monkeypatch.setattr("recallnb.history.erase_traces", fail)
    monkeypatch.setattr(client.engine, "_spoil", spy)
    if what == "person":
        assert client.call("DELETE", "/api/memories?subject=52&scope=group:49")[0] == 503 and not client.engine.history.recent("group:49", 9)
    else:
        assert client.call("POST", "/api/messages/retract", {"scope": "group:49", "message_id": what})[0] == 503
    assert ended == [{"group:49"}]


def test_retractions_at_once_leave_no_memory(client):
    for round in range(8):
        ids = [f"{round}{name}" for name in "abc"]
        for id in ids:
            client.say("44", "我住在桂林", message_id=id, mentioned=False)
        memory = client.call("POST", "/api/memories", {"scope": "private:44", "subject": "44", "text": f"用户LinF现居第{round}城", "sources": ids})[1]["memory"]["id"]
        threads = [threading.Thread(target=client.call, args=("POST", "/api/messages/retract", {"scope": "private:44", "message_id": id})) for id in ids]
        for step in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                step(thread)
        assert client.call("GET", f"/api/memories/{memory}")[0] == 404


def test_an_id_that_comes_again_means_the_newer_message(client):
    now = time.time()
    for content, at in (("从前的", now - 5 * 86400), ("现在的", now)):
        client.say("45", content, message_id="777", timestamp=at, mentioned=False)
    assert client.call("POST", "/api/messages/retract", {"scope": "private:45", "message_id": "777"})[0] == 200
    assert [one.content for one in client.engine.history.recent("private:45", 9)] == ["从前的"]


def test_a_retraction_deletes_no_file_of_others(client):
    "An imported message may name anything as its picture."
    folder = client.settings.paths.state
    id = upload(client, picture())[1]["id"]
    client.say("46", "看", images=[id], mentioned=False)
    (folder.parent / "victim.png").write_bytes(b"x")
    client.engine.history.append(Message("private:47", "47", "乙", "图", time.time(), id="m1", images=["../../victim", id]))
    assert client.call("POST", "/api/messages/retract", {"scope": "private:47", "message_id": "m1"})[0] == 200
    assert (folder.parent / "victim.png").is_file() and (folder / "uploads" / f"{id}.png").is_file()


def test_pictures_leave_room_for_words(client, monkeypatch):
    "A photo of Qwen3-VL takes half a prompt: the newest is shown, the others are named."
    monkeypatch.setattr(engine_module, "picture_tokens", lambda processor, image: 400)
    ids = [upload(client, picture(color))[1]["id"] for color in ("red", "blue", "green")]
    assert client.say("48", "看", images=ids, mentioned=False)[0] == 202
    shown = client.engine._pictures(client.engine.history.recent("private:48", 9))
    assert client.settings.chat.prompt_tokens == 1024 and [*shown] == ids[2:]


def test_the_language_link_leads_nowhere_else(client):
    for place, target in (("/memories?q=杭州", "/memories?q=%E6%9D%AD%E5%B7%9E"), ("//evil.com", "/"), ("/\\evil.com", "/"), ("/\t/evil.com", "/"), ("/\r", "/")):
        answer = client.app.test_client().get("/language", query_string={"next": place})
        assert (answer.status_code, answer.headers["Location"]) == (302, target)


def test_replies_go_with_their_memory(client):
    "Whether it is deleted or corrected: what was said out of it is in no later prompt. Other replies stay, and so does what the person has said."
    first, second = client.tell("41", "用户LinF现居桂林"), client.tell("41", "用户LinF养的猫叫豆芽")
    for number, text in enumerate(("我现在住在哪个城市？", "你还记得我家猫的名字吗", "你好")):
        answer = client.say("41", text, message_id=f"m{number}")[1]
        assert [one["id"] for one in answer["recalls"]] == [[first], [second], []][number]

    def said():
        return [(one["role"], one["id"] if one["role"] == "user" else "") for one in client.call("GET", "/api/chats/private:41/history")[1]["messages"]]

    reply, asked = ("assistant", ""), [("user", f"m{number}") for number in range(3)]
    assert client.call("DELETE", f"/api/memories/{first}")[0] == 200 and said() == [asked[0], asked[1], reply, asked[2], reply]
    assert client.call("PATCH", f"/api/memories/{second}", {"text": "用户LinF养的猫叫团团"})[0] == 200 and said() == [*asked, reply]
    assert client.engine.history.answer_of("private:41", "m2")["recalls"] == []


def test_wishes(client):
    "Pause and learning, as the client's commands use them."
    assert client.call("POST", "/api/chats/private:5/pause", {"paused": True}) == (200, {"status": "ok", "scope": "private:5", "paused": True})
    assert client.say("5", "你好")[1]["status"] == "paused"
    said = {"user": "5", "messages": [{"role": "user", "content": "你好"}]}
    assert client.call("POST", "/v1/chat/completions", said)[1]["choices"][0]["message"]["content"] == ""
    client.call("POST", "/api/chats/private:5/pause", {"paused": False})
    assert client.say("5", "你好")[1]["status"] == "ok"
    assert client.call("POST", "/api/people/5/learning", {"learning": False})[0] == 200
    client.say("5", "我喜欢猫")
    assert client.engine.history.unextracted("private:5") == []
    assert client.call("POST", "/api/chats/5/pause", {"paused": True})[0] == client.call("POST", "/api/people/a%20b/learning", {"learning": True})[0] == 404


def test_banned_words_are_not_even_overheard(client, monkeypatch):
    monkeypatch.setattr(client.engine, "censor", Censor("坏蛋"))
    for mentioned, status in ((True, 200), (False, 202)):
        found, answer = client.call("POST", "/api/chat/group", {"group_id": "51", "user_id": "51", "content": "你这个坏蛋", "mentioned": mentioned})
        assert (found, answer["status"]) == (status, "refused")
    assert client.call("GET", "/api/chats/group:51/history")[1]["messages"] == []


def test_a_search_by_meaning_has_pages(client):
    "Of one person only what is that person's, however much nearer the others are."
    for number in range(6):
        assert client.call("POST", "/api/memories", {"scope": "group:61", "subject": str(610 + number // 3), "text": f"用户LinF{number}现居杭州"})[0] == 201
    find = "/api/memories?scope=group:61&meaning=%E6%88%91%E4%BD%8F%E5%9C%A8%E5%93%AA%E9%87%8C%EF%BC%9F&limit=2"
    pages = [client.call("GET", f"{find}&offset={offset}")[1] for offset in (0, 2, 4, 6)]
    found = [one for page in pages for one in page["memories"]]
    assert {page["total"] for page in pages} == {6} and len({one["id"] for one in found}) == len(found) == 6
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    for subject in ("610", "611"):
        page = client.call("GET", f"{find}&subject={subject}")[1]
        assert page["total"] == 3 and [one["subject"] for one in page["memories"]] == [subject] * 2


def test_memories_are_found_corrected_exported_and_forgotten(client):
    first, second = client.tell("6", "用户LinF现居杭州"), client.tell("6", "用户LinF养的猫叫豆芽")
    find = "/api/memories?scope=private:6&"
    assert [one["id"] for one in client.call("GET", find + "text=LinF%20%E8%B1%86%E8%8A%BD")[1]["memories"]] == [second]
    found = client.call("GET", find + "meaning=%E6%88%91%E4%BD%8F%E5%9C%A8%E5%93%AA%E9%87%8C%EF%BC%9F")[1]["memories"]
    assert {one["id"] for one in found} == {first, second} and found[0]["score"] >= found[1]["score"]
    status, corrected = client.call("PATCH", f"/api/memories/{first}", {"text": "用户LinF现居苏州"})
    assert status == 200 and corrected["memory"]["text"] == "用户LinF现居苏州"
    assert client.call("PATCH", "/api/memories/999999", {"text": "用户LinF现居苏州"})[0] == 404
    exported = client.call("GET", "/api/memories/export?subject=6")[1]["memories"]
    assert {one["text"] for one in exported} == {"用户LinF现居苏州", "用户LinF养的猫叫豆芽"} and "messages" in exported[0] and "recalls" in exported[0]
    client.say("6", "你好")
    status, gone = client.call("DELETE", "/api/memories?subject=6")
    assert status == 200 and gone["deleted"]["memories"] == 2 and gone["deleted"]["messages"] == 2
    assert client.call("GET", find)[1]["total"] == 0 and client.call("GET", "/api/chats/private:6/history")[1]["messages"] == []


def test_pictures_belong_to_their_chat(client):
    status, found = upload(client, picture())
    assert status == 201
    where = f"/api/uploads/{found['id']}?scope=private:"
    assert client.call("GET", where + "7")[0] == 404
    answer = client.say("7", "这是什么颜色？", images=[found["id"]])[1]
    assert answer["status"] == "ok" and answer["timing"]["prompt_tokens"] > 20
    assert client.open("GET", where + "7")[1].read(8) == b"\x89PNG\r\n\x1a\n" and client.call("GET", where + "8")[0] == 404
    status, wrong = client.say("8", "看", images=[found["id"]])
    assert status == 422 and wrong["errors"][0]["field"] == "images"
    assert client.say("7", "", images=[found["id"]])[1]["status"] == "ok" and client.say("7", "")[0] == 422
    for data in (b"", b"GIF89a", picture()[:60], b"<svg/>", b"\x00" * 10_000):
        assert upload(client, data)[0] == 422
    assert upload(client, b"\x00" * 9_000_000)[0] == 413


def test_the_model_names_what_it_sees(client):
    "Colours are what the shipped model can tell apart, in 98 of 100 pictures; two of three must be right here."
    replies = {}
    for number, (name, color) in enumerate({"红色": (220, 40, 40), "蓝色": (40, 70, 220), "绿色": (40, 160, 60)}.items()):
        found = upload(client, picture(color))[1]["id"]
        replies[name] = client.say(str(70 + number), "这是什么颜色？", images=[found])[1]["reply"]
    assert sum(color in reply for color, reply in replies.items()) >= 2, replies


def test_openai_package(client):
    "The official client: whole and streamed answers, recall included, several at once, and its errors."
    import openai

    client.tell("alice", "用户alic现居杭州")
    remote = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)
    assert remote.models.list().data[0].id == client.engine.served.name
    ask = {"model": "any", "user": "alice", "temperature": 0, "messages": [
        {"role": "system", "content": "说话简短。"}, {"role": "user", "content": "以前说过的话"}, {"role": "assistant", "content": "嗯。"}, {"role": "user", "content": "我现在住在哪个城市？"}]}
    whole = remote.chat.completions.create(**ask, presence_penalty=0.5, extra_body={"enable_thinking": False})  # what it does not know is ignored
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage.completion_tokens > 0
    streamed = [*remote.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})]
    assert "".join(one.choices[0].delta.content or "" for one in streamed if one.choices) == whole.choices[0].message.content
    assert streamed[-1].usage.completion_tokens == whole.usage.completion_tokens
    users = [one["content"] for one in client.call("GET", "/api/chats/private:alice/history")[1]["messages"] if one["role"] == "user"]
    assert users == ["我现在住在哪个城市？"] * 2
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's"):
        remote.chat.completions.create(model="any", messages=[{"role": "assistant", "content": "嗯"}])


def test_the_openai_package_repeats_nothing_that_is_stored(client, monkeypatch):
    import openai

    def too_late(*arguments):
        raise TimeoutError
    monkeypatch.setattr("recallnb.openai.wait_for", too_late)
    remote = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=2)
    with pytest.raises(openai.InternalServerError):
        remote.chat.completions.create(model="any", user="53", messages=[{"role": "user", "content": "你好"}])
    client.wait_idle()
    assert [one.role for one in client.engine.history.recent("private:53", 9)].count("user") == 1


@pytest.mark.parametrize(("method", "body", "status", "kind", "said"), [
    ("GET", None, 405, "invalid_request_error", "does not take this method"),
    ("POST", b"{", 400, "invalid_request_error", "not JSON"),
    ("POST", b"x" * 10 * 2**20, 413, "invalid_request_error", "at most 8 MB"),
    ("POST", {"messages": [{"role": "nobody", "content": "你好"}]}, 400, "invalid_request_error", "messages: 0.role: Input should be"),
    ("POST", {"messages": [{"role": "user", "content": "长" * 5000}]}, 400, "invalid_request_error", "shorten"),
    ("POST", {"messages": [{"role": "user", "content": "你好"}]}, 503, "server_error", "chats are waiting"),
])
def test_openai_errors_say_what_is_wrong(client, monkeypatch, method, body, status, kind, said):
    "In the one place where such clients look."
    if status == 503:
        monkeypatch.setattr(client.engine, "_entering", client.settings.server.queue)  # as if so many were on their way
    found, answer = client.call(method, "/v1/chat/completions", body)
    assert (found, answer["error"]["type"]) == (status, kind) and said in answer["error"]["message"]


def test_completions_do_not_interrupt_each_other(client):
    answers = []

    def complete():
        answers.append(client.call("POST", "/v1/chat/completions", {"user": "bob", "messages": [{"role": "user", "content": "你好"}]}))

    threads = [threading.Thread(target=complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [200] * 4 and all(one["choices"][0]["finish_reason"] in ("stop", "length") for _, one in answers)


def test_garbage(client):
    "Nothing that can be sent is a 500, and the server answers afterwards."
    garbage = [b"\xff" * 1000, b"[" * 100_000, b'{"user_id": "1", "content": "' + b"a" * 7_000_000 + b'"}', b'{"user_id": 1e999, "content": "x"}', b"null", b"\x00",
               b'{"user_id": "9", "content": "\\ud800", "timestamp": -1}', b'{"user_id": {"a": 1}, "content": ["x"], "images": "y", "message_id": []}']
    for path in ("/api/chat/private", "/api/memories", "/api/messages/retract", "/api/training", "/v1/chat/completions", "/api/people/9/learning"):
        for body in garbage:
            status = client.call("POST", path, body)[0]
            assert 400 <= status < 500, (path, body[:40], status)
    for path in ("/api/uploads/..%2f..%2frecallnb.db?scope=private:1", "/static/..%2fwords.json", "/api/memories/99999999999999999999", "/api/chats/%00/history", "/api/releases/..%2f..%2fx/report"):
        assert client.call("GET", path)[0] in (404, 422), path
    for header in ({"Origin": "http://[::1"}, {"Host": "[::1"}, {"Cookie": "session=%ff; language=%00"}, {"Accept": "\xff"}, {"Authorization": "Bearer \xff"}):
        assert client.open("GET", "/", **header)[1].status in (200, 403), header
    assert client.call("GET", "/healthz")[0] == 200


def test_half_a_character_is_no_reason_not_to_answer(client):
    "JSON can carry the first half of an emoji; files in UTF-8 cannot."
    status, answer = client.call("POST", "/api/chat/private", b'{"user_id": "77", "user_nickname": "Lin\\ud83d", "content": "\\u4f60\\u597d\\ud83d"}')
    assert (status, answer["status"]) == (200, "ok") and client.engine.history.recent("private:77", 2)[0].content == "你好?"


def test_metrics_and_request_ids(client):
    client.tell("79", "用户LinF现居杭州")  # a series is there once it has counted something
    client.say("79", "我现在住在哪个城市？")
    text = client.open("GET", "/metrics")[1].read().decode()
    for name in ("recallnb_tokens_total", 'recallnb_answers_total{status="ok"}', "recallnb_first_token_seconds_bucket", "recallnb_waiting", 'recallnb_recalls_total{outcome="found"}'):
        assert name in text, name
    assert client.open("GET", "/healthz", **{"X-Request-Id": "abc-1"})[1].headers["X-Request-Id"] == "abc-1"
    assert "sandbox" not in client.open("GET", "/")[1].headers["Content-Security-Policy"]


def test_keys_and_limits(tmp_path):
    "With a key every call needs one; revoked, it opens nothing; the page asks for it, and its changes need the session's token."
    import openai

    client = Client(tmp_path, per_user=2)
    try:
        assert client.call("GET", "/api/memories")[0] == 200
        keys = Keys(client.engine.history.database)
        bearer = {"Authorization": f"Bearer {(key := keys.add('QQ'))}"}
        assert client.call("GET", "/api/memories")[0] == 401 and client.call("GET", "/api/memories", Authorization="Bearer x")[0] == 401
        assert client.call("GET", "/api/memories", **bearer)[0] == client.call("GET", "/healthz")[0] == 200
        base = f"http://127.0.0.1:{client.port}/v1"
        assert openai.OpenAI(base_url=base, api_key=key, max_retries=0).models.list().data[0].id == client.engine.served.name
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=base, api_key="rnb_wrong", max_retries=0).models.list()
        assert client.open("GET", "/")[1].headers["Location"].endswith("/login")
        assert client.open("POST", "/login", b"key=wrong", **{"Content-Type": "application/x-www-form-urlencoded"})[1].status == 401
        response = client.open("POST", "/login", f"key={key}".encode(), **{"Content-Type": "application/x-www-form-urlencoded"})[1]
        cookie = {"Cookie": response.headers["Set-Cookie"].split(";")[0]}
        assert "HttpOnly" in response.headers["Set-Cookie"] and "SameSite=Strict" in response.headers["Set-Cookie"]
        page = client.open("GET", "/", **cookie)[1].read().decode()
        token = {"X-CSRF-Token": page.split('name="csrf" content="')[1].split('"')[0]}
        assert client.call("DELETE", "/api/memories?subject=1", **cookie)[0] == client.call("DELETE", "/api/memories?subject=1", **cookie, **{"X-CSRF-Token": "é"})[0] == 403
        assert client.call("DELETE", "/api/memories?subject=1", **cookie | token)[0] == 200
        body = {"user_id": "1", "content": "你好"}
        statuses = [client.call("POST", "/api/chat/private", body, **bearer)[0] for _ in range(3)]
        assert statuses == [200, 200, 429]
        body = {"user": "1", "messages": [{"role": "user", "content": "你好"}]}  # the same person, by whatever way
        assert [client.call("POST", "/v1/chat/completions", body, **bearer, **scope)[0] for scope in ({}, {"X-Scope": "group:7"})] == [429, 429]
        assert client.call("POST", "/v1/chat/completions", body | {"user": "2"}, **bearer, **{"X-Scope": "group:7"})[0] == 200
        assert keys.revoke(1)
        keys.add("another")
        assert client.call("GET", "/api/memories", **bearer)[0] == 401 and client.call("GET", "/api/memories", **cookie)[0] == 401
        assert key not in (tmp_path / "recallnb.db").read_bytes().decode("latin-1")
    finally:
        client.close()


def test_persona_thinking_words_and_notice_are_settings(tmp_path, monkeypatch):
    for name, value in {"BOT_NAME": "阿福", "PERSONA": "说话简短，爱开玩笑。", "SHOW_THINKING": "true", "BANNED_WORDS": "坏蛋,杭州,LinF的", "NOTICE": "none"}.items():
        monkeypatch.setenv(f"RECALLNB_CHAT__{name}", value)
    client = Client(tmp_path)
    try:
        assert all(client.engine.prompts[kind].endswith("爱开玩笑。") for kind in ("private", "group")) and "爱开玩笑" not in client.engine.prompts["extract"]
        seen = []
        with monkeypatch.context() as patched:
            patched.setattr(client.engine, "complete", lambda message, turns, settings: seen.extend(turns) or (_ for _ in ()).throw(ValueError("enough")))
            assert client.call("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "你好"}]})[0] == 400
        assert seen[0]["content"].startswith("你是阿福，") and "爱开玩笑" in seen[0]["content"]
        client.tell("1", "用户LinF现居杭州")
        connection, response = client.begin("1", "我现在住在哪个城市？", user_nickname="LinF")
        *seen, (_, answer) = events(response)
        connection.close()
        said = {thinking: "".join(data["text"] for name, data in seen if name == "token" and bool(data.get("thinking")) == thinking) for thinking in (True, False)}
        assert said[False] == answer["reply"] and "＊＊" in answer["reply"] and "杭州" not in answer["reply"]
        assert "＊" in said[True] and "LinF的" not in said[True]  # a word of several tokens
        assert answer["thinking"] and answer["thinking"] not in answer["reply"] and "notice" not in answer
        assert client.say("1", "你这个坏蛋")[1]["status"] == "refused" and len(client.call("GET", "/api/chats/private:1/history")[1]["messages"]) == 2
    finally:
        client.close()


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_lines_of_the_readme(client, tmp_path, readme):
    "Every block of curl lines works as it stands, but for the port, and one after the other; the question of the stream is answered out of the memory told before it."
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.DOTALL) if "curl" in block]
    assert len(blocks) >= 8
    for block in blocks:
        script = block.replace("127.0.0.1:9999", f"127.0.0.1:{client.port}").replace("curl ", "curl -fsS ")
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert "event: " not in done.stdout or "event: recall" in done.stdout, done.stdout


def test_load_command_says_what_it_takes():
    "The command itself takes minutes; here only that it is there."
    done = subprocess.run([sys.executable, "-m", "tests.load", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout
