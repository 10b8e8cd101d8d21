"""The QQ client as its users run it: `python -m recallnb_client` in a process and a folder of its own, NapCat's side and a server around it."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from fake_client import BOT, at, message, quote, recalled
from fake_onebot import OneBot
from fake_recallnb import FakeRecallnb, events, reply
from test_serve import Server

from recallnb.history import History

DONE = {"status": "ok", "message_id": "", "reason": "stop", "recalls": [], "timing": {}}


class Bot:
    "A client process."

    def __init__(self, folder, server_url, napcat, **settings):
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True)
        (self.home / "config.yaml").write_text("bt_uin: '666'\n", encoding="utf-8")  # what an earlier ncatbot may have left
        sections = {"server": {"url": server_url, "notice_after_s": 1000}, "napcat": {"url": napcat.url}, "limits": {"debounce_s": 0.2, "messages": 1000},
                    "send": {"pause_s": 0, "pause_per_char_s": 0}}
        for name, values in settings.items():
            sections.setdefault(name, {}).update(values)
        lines = [line for name, values in sections.items() for line in (f"[{name}]", *(f"{key} = {value}" for key, value in values.items()))]
        self.config = folder / "client.ini"
        self.config.write_text("\n".join(lines), encoding="utf-8")
        self.environment = os.environ | {"PYTHONPATH": str(ROOT / "client"), "RECALLNB_CLIENT_NAPCAT__TOKEN": napcat.token}

    def start(self, *arguments):
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "recallnb_client", "--config", str(self.config), *arguments], cwd=self.home, env=self.environment,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def end(self, number=signal.SIGTERM):
        "Send a signal, wait for the end: exit code."
        self.process.send_signal(number)
        return self.process.wait(60)

    def end_well(self):
        "End it if it runs; there must be no error in its log."
        if self.process.poll() is None:
            assert self.end() == 0, self.log[-3000:]
        assert "Traceback" not in self.log, self.log[-3000:]

    @property
    def log(self):
        return (self.folder / "log").read_text(encoding="utf-8")


@pytest.fixture
def napcat():
    napcat = OneBot()
    yield napcat
    napcat.stop()


@pytest.fixture
def bot(tmp_path, napcat):
    "Start a client in front of a server; it must end cleanly."
    started = []

    def start(server_url, **settings):
        started.append(Bot(tmp_path / f"bot{len(started)}", server_url, napcat, **settings).start())
        napcat.wait_connected(len(started))
        return started[-1]
    yield start
    for one in started:
        one.end_well()


# With a server that says what the test wants


@pytest.fixture
def scripted(recallnb):
    "A server that answers every chat with one text."
    def start(words):
        chat = events(("token", {"text": words}), ("done", DONE | {"reply": words}))
        return recallnb(__api__chat__private=chat, __api__chat__group=chat, __healthz=reply({}), __readyz=reply({"model": "m", "memories": 0}),
                        __api__memories=reply({"total": 0, "memories": []}))
    return start


def test_a_cq_code_of_the_model_arrives_as_text(napcat, bot, scripted):
    bot(scripted("[CQ:at,qq=all]&#91;开会了").url)
    ask = napcat.say(message(at(BOT), "说", group=9))
    napcat.say(message("说"))
    napcat.wait(lambda: len(napcat.sent) == 2)
    words = {"type": "text", "data": {"text": "[CQ:at,qq=all]&#91;开会了"}}
    assert sorted(napcat.sent) == [("group:9", [{"type": "reply", "data": {"id": str(ask["message_id"])}}, words]), ("private:42", [words])]


def test_out_of_order_twice_and_slowly(napcat, bot, scripted):
    "Two messages delivered in the wrong order, and twice: one turn, in the right order, one answer."
    server = scripted("好")
    bot(server.url, limits={"debounce_s": 5})
    napcat.slow = 0.5
    first, second = message("第一"), message("第二")
    napcat.event(second, first, second, first)
    napcat.wait(lambda: napcat.sent)
    napcat.say(message("第三"))
    napcat.wait(lambda: len(napcat.sent) == 2)
    assert [json.loads(body)["content"] for *_, body in server.requests] == ["第一\n第二", "第三"] and napcat.texts() == ["好", "好"]


def test_nothing_is_left_about_and_nothing_told(napcat, bot, scripted):
    "The folder that it is started in stays as it was; the log holds neither the token, nor the key, nor what was said."
    one = bot(scripted("秘密的回答").url, server={"key": "s3cret-key"}, log={"level": "DEBUG"})
    napcat.say(message("秘密的问题"))
    napcat.wait(lambda: napcat.sent)
    assert one.end(signal.SIGINT) == 0
    assert os.listdir(one.home) == ["config.yaml"] and os.listdir(one.folder / "work") == ["client.lock"]
    assert not re.search("s3cret|t0ken|秘密", one.log) and "connected to NapCat" in one.log


def test_one_client_per_folder(napcat, bot, scripted):
    one = bot(scripted("好").url)
    second = subprocess.run([sys.executable, "-m", "recallnb_client", "--config", str(one.config)], cwd=one.home, env=one.environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 1 and "another client runs" in second.stderr


def test_wrong_settings_are_one_line(tmp_path, napcat):
    one = Bot(tmp_path / "bot", "127.0.0.1:1", napcat)
    assert one.start().process.wait(120) == 1
    assert one.log.count("\n") == 1 and "[server] url" in one.log


def test_check(tmp_path, napcat, scripted):
    right, wrong = Bot(tmp_path / "a", scripted("好").url, napcat), Bot(tmp_path / "b", "http://127.0.0.1:1", napcat)
    for one in (right, wrong):
        one.start("--check")
    assert right.process.wait(120) == 0 and "都正常" in right.log
    assert wrong.process.wait(120) == 1 and "隧道" in wrong.log
    assert not napcat.sent


def test_a_lost_confirmation_a_cut_and_a_restart_of_napcat(napcat, bot, scripted):
    "The answer whose confirmation was lost is not repeated; a refused one is; after each loss the client comes back."
    one = bot(scripted("好").url)
    napcat.swallow = 1
    napcat.say(message("一"))
    napcat.wait_connected(2)
    assert napcat.texts() == ["好"]
    napcat.refuse = 1
    napcat.say(message("二"))
    napcat.wait(lambda: len(napcat.sent) == 2)
    napcat.stop()
    again = OneBot(port=napcat.port)
    try:
        again.wait_connected()
        event = message("三")
        again.event(event, event)
        again.wait(lambda: again.sent)
        assert one.end() == 0
        assert again.texts() == ["好"] and napcat.texts() == ["好", "好"]
    finally:
        again.stop()


def test_it_waits_for_napcat(tmp_path, scripted):
    "Started first, with NapCat away; ended while it waits."
    gone = OneBot()
    gone.stop()
    one = Bot(tmp_path / "bot", scripted("好").url, gone).start()
    again = OneBot(port=gone.port)
    try:
        again.wait_connected()
        again.say(message("一"))
        again.wait(lambda: again.sent)
        again.stop()
        assert one.end() == 0
    finally:
        again.stop()


# With the real server and the small model


NOTICE = "我会记住聊天里说过的事。"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve"))
    server.environment["RECALLNB_CHAT__NOTICE"] = NOTICE
    server.start()
    server.environment["RECALLNB_SERVER__PORT"] = str(server.port)  # after a restart, too
    yield server
    assert server.end(signal.SIGINT) == 0, (server.folder / "log").read_text()[-3000:]


@pytest.fixture(scope="module")
def qq(server, tmp_path_factory):
    "One client in front of it for all that follows; each test has people and groups of its own."
    napcat = OneBot()
    bot = Bot(tmp_path_factory.mktemp("qq") / "bot", f"http://127.0.0.1:{server.port}", napcat).start()
    napcat.wait_connected()
    yield napcat
    bot.end_well()
    napcat.stop()


def replies(qq, scope):
    "What the bot said in a chat, without the notice of the first contact."
    return [words for words in qq.texts(scope) if words != NOTICE]


def tell(qq, *words, **fields):
    "Say something in QQ and wait for what the bot says next: the event, and that."
    scope = f"group:{fields['group']}" if "group" in fields else f"private:{fields['user']}"
    before = len(replies(qq, scope))
    event = qq.say(message(*words, **fields))
    return event, qq.wait(lambda: replies(qq, scope)[before:], 300)[0]


@functools.cache
def reader():
    "What reads the history, and what is needed to write its memories."
    from recallnb.embed import load_skill
    from recallnb.model import load_model, model_version

    folder = ROOT / "data/tiny-recall"
    return load_model(folder, "cpu", "float32"), load_skill(folder), model_version(folder)


def learn(server):
    "Extract memories from what was said since: the night's first step, here by hand."
    from recallnb.prepare import read_history
    from recallnb.settings import load_settings
    from recallnb.store import MemoryStore

    (model, processor), skill, version = reader()
    parameter = next(model.parameters())
    history = History(server.folder / "state/recallnb.db")
    store = MemoryStore(history.database.path, version, parameter.device, parameter.dtype)
    try:
        read_history(model, processor, skill, history, store, load_settings(), progress=False)
    finally:
        store.close()
        history.close()


def empty_history(server, user_id):
    "What is answered from now on comes out of a memory."
    history = History(server.folder / "state/recallnb.db")
    history.delete_user(user_id)
    history.close()
    assert server.history(f"private:{user_id}") == []


def memories(server, **query):
    return server.call("GET", "/api/memories?" + "&".join(f"{key}={value}" for key, value in query.items()))[1]["memories"]


def ask(server, qq, words, **fields):
    "Ask through QQ: the text that arrives, and ids of the memories that were recalled for it."
    event, said = tell(qq, words, **fields)
    kind, group = ("group", {"group_id": str(fields["group"])}) if "group" in fields else ("private", {})
    body = {"user_id": str(fields["user"]), "content": words, "message_id": str(event["message_id"])} | group
    answer = server.call("POST", f"/api/chat/{kind}", body)[1]  # the same message again gets the same answer
    assert answer["reply"].strip() == said
    return said, [recall["id"] for recall in answer["recalls"]]


FACTS = {301: ("我现在住在杭州", "我现在住在哪个城市？", "杭州"), 302: ("我生日是11月6日", "你还记得我的生日吗？", "11月6日"), 303: ("我养了一只猫叫豆芽", "你还记得我家猫的名字吗", "豆芽")}


def test_told_in_private_and_recalled_later_there_only(server, qq):
    """Told in QQ, asked when the chat's history is gone: the segment that arrives holds it, and the answer names the memory.
    Another person, and the same one in a group, do not get it."""
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda user: tell(qq, FACTS[user][0], user=user), FACTS))
        learn(server)
        known = {memory["text"]: memory["id"] for user in FACTS for memory in memories(server, scope=f"private:{user}")}
        for user in FACTS:
            empty_history(server, str(user))
        alone = [pool.submit(ask, server, qq, question, user=user) for user, (_, question, _) in FACTS.items()]
        others = [pool.submit(ask, server, qq, question, user=user + 10) for user, (_, question, _) in FACTS.items()]
        others += [pool.submit(ask, server, qq, f"小忆，{question}", user=user, group=user) for user, (_, question, _) in FACTS.items()]
    found = 0
    for (_, _, value), answer in zip(FACTS.values(), alone):
        words, ids = answer.result()
        wanted = [id for text, id in known.items() if value in text]
        found += bool(wanted) and ids[:1] == wanted and value in words
    assert found >= 2, f"{found} of {len(FACTS)} facts came back; memories: {known}"
    for (_, _, value), answer in zip([*FACTS.values()] * 2, others):
        words, ids = answer.result()
        assert value not in words and not set(ids) & set(known.values())


def test_the_first_contact_brings_a_notice_once(server, qq):
    "A newer message that ends the first answer early does not make it disappear."
    qq.say(message("在吗", user=305))
    qq.wait(lambda: replies(qq, "private:305"), 300)
    tell(qq, "我回来了", user=305)
    qq.wait(lambda: NOTICE in qq.texts("private:305"), 300)
    tell(qq, "你好", user=305)
    assert qq.texts("private:305").count(NOTICE) == 1


def test_recalled_messages_and_forgetting_reach_the_memories(server, qq):
    with ThreadPoolExecutor(2) as pool:
        (told, _), _ = pool.map(lambda fact: tell(qq, fact[0], user=fact[1]), [("我现在住在大连", 321), ("我现在住在桂林", 322)])
    learn(server)
    (memory,) = memories(server, subject=321)
    assert "大连" in memory["text"] and memory["sources"] == [str(told["message_id"])]
    qq.event(recalled(told))
    until(lambda: not memories(server, subject=321) and not server.history("private:321"))
    assert "大连" not in ask(server, qq, "我现在住在哪个城市？", user=321)[0]

    assert len(memories(server, subject=322)) == 1
    assert "桂林" in tell(qq, "记忆", user=322)[1]
    tell(qq, "忘记我", user=322)
    tell(qq, "确定", user=322)
    assert not memories(server, subject=322) and not server.history("private:322")
    assert "桂林" not in ask(server, qq, "我现在住在哪个城市？", user=322)[0]


def test_a_part_of_what_was_merged_is_recalled(server, qq):
    "Two messages that the server has as one go together."
    first, second = message("密码是1234", user=325), message("别告诉别人", user=325)
    qq.event(first, second)
    until(lambda: ("user", "密码是1234\n别告诉别人") in server.history("private:325"))
    qq.event(recalled(first))
    until(lambda: not server.history("private:325"))


def test_what_is_not_learned(server, qq):
    "What somebody who does not want it says; what others have said, quoted or forwarded."
    for said in ("不要记住我", "我现在住在大连"):
        tell(qq, said, user=331)
    said = qq.say(message("我现在住在桂林", user=332, group=339))
    qq.say(message(quote(said["message_id"]), "我现在住在大连", user=333, group=339))
    texts = [{"sender": {"nickname": "甲"}, "message": [{"type": "text", "data": {"text": "我现在住在大连"}}]}]
    qq.say(message({"type": "forward", "data": {"content": texts}}, user=334, group=339))
    until(lambda: len(server.history("group:339")) == 3)
    learn(server)
    assert not memories(server, subject=331) and not memories(server, subject=334)
    learned = {user: "".join(memory["text"] for memory in memories(server, subject=user)) for user in (332, 333)}
    assert "桂林" in learned[332] and "桂林" not in learned[333], learned


def test_pausing(server, qq):
    scope = "group:349"
    tell(qq, at(BOT), "暂停", user=342, group=349, role="admin")
    qq.say(message(at(BOT), "你好", user=342, group=349))
    until(lambda: ("user", "你好") in server.history(scope))
    tell(qq, at(BOT), "恢复", user=342, group=349, role="owner")
    _, said = tell(qq, at(BOT), "在吗", user=342, group=349)
    assert ("assistant", said) == server.history(scope)[-1] and len(replies(qq, scope)) == 3


def test_a_picture_and_its_text(server, qq):
    "Downloaded, uploaded, and in the history as one message with the words."
    source = FakeRecallnb({"/p.png": lambda body: (200, {"Content-Type": "image/png"}, PNG)})
    try:
        shown = {"type": "image", "data": {"file": "p.png", "url": f"{source.url}/p.png", "sub_type": 0}}
        qq.event(message(shown, user=351), message("这是什么", user=351))
        qq.wait(lambda: replies(qq, "private:351"), 300)
        history = History(server.folder / "state/recallnb.db")
        said = history.recent("private:351")[0]
        history.close()
        assert said.content == "[图片]\n这是什么" and len(said.images) == 1
    finally:
        source.stop()


PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc0000003010100c9fe92ef0000000049454e44ae426082")


def test_a_newer_message_interrupts(server, qq):
    "While many others are answered, one chat sends a second message before the first has its answer: only the second gets one."
    with ThreadPoolExecutor(31) as pool:
        for user in range(37700, 37720):  # the first answer may be over before the second message comes
            others = [pool.submit(server.say, f"{user}{number}", "你好") for number in range(31)]
            qq.say(message("在吗？", user=user))
            until(lambda: server.history(f"private:{user}"))
            newer = qq.say(message("我回来了", user=user))
            until(lambda: ("user", "我回来了") in (told := server.history(f"private:{user}")) and told[-1][0] == "assistant")
            assert {other.result()[1]["status"] for other in others} == {"ok"}
            if len(server.history(f"private:{user}")) == 3:
                break
    said = server.say(str(user), "我回来了", message_id=str(newer["message_id"]))[1]["reply"]
    assert server.history(f"private:{user}") == [("user", "在吗？"), ("user", "我回来了"), ("assistant", said)]
    qq.wait(lambda: replies(qq, f"private:{user}") == [said.strip()], 300)


def until(condition, timeout=300):
    "Wait for something in another process."
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not in {timeout} s"
        time.sleep(0.05)


def test_two_hundred_messages_with_the_server_killed(server, qq):
    """20 chats, private and groups, 10 messages each, some delivered twice; the server is killed amid them and started again.
    Every message is in the history, in order; no message is answered twice; the last of each chat has its answer in QQ."""
    chats = [{"user": 400 + number} | ({"group": 500 + number} if number % 2 else {}) for number in range(20)]
    scopes = [f"group:{chat['group']}" if "group" in chat else f"private:{chat['user']}" for chat in chats]

    def said(scope):
        return [line for role, content in server.history(scope) if role == "user" for line in content.split("\n")]

    def send(rounds):
        for number in rounds:
            for chat in chats:
                event = message(*([at(BOT)] if "group" in chat else []), f"第{number}句", **chat)
                qq.say(event)
                if number % 3 == 0:
                    qq.event(event)
            time.sleep(0.3)  # more than the debounce: mostly each is a message of its own

    send(range(3))
    killing = threading.Timer(0.2, server.end, (signal.SIGKILL,))
    killing.start()
    send(range(3, 7))
    killing.join()
    server.start()
    send(range(7, 10))
    for scope in scopes:
        until(lambda: said(scope)[-1:] == ["第9句"])
    until(lambda: all(server.history(scope)[-1][0] == "assistant" for scope in scopes))
    answers = {scope: [content for role, content in server.history(scope) if role == "assistant"] for scope in scopes}
    for scope in scopes:
        qq.wait(lambda: replies(qq, scope)[-1:] == answers[scope][-1:], 300)
        assert said(scope) == [f"第{number}句" for number in range(10)]
        assert len(replies(qq, scope)) <= len(answers[scope])
        quoted = [segment["data"]["id"] for where, segments in qq.sent if where == scope for segment in segments if segment["type"] == "reply"]
        assert len(quoted) == len(set(quoted)) == (len(replies(qq, scope)) if scope.startswith("group:") else 0)
