"""The real ncatbot 4.4.1.post1 against a OneBot v11 server, and each of its traps."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.metadata import version

import pytest
from conftest import ROOT
from fake_client import BOT, message
from fake_onebot import OneBot

from recallnb_client import qq as qq_module
from recallnb_client.config import NapCat
from recallnb_client.port import Missing, NotSent, Unconfirmed
from recallnb_client.qq import NcatbotQQ, NotConnected


@pytest.fixture
def napcat():
    started = []

    def start(**options):
        started.append(OneBot(**options))
        return started[-1]
    yield start
    for one in started:
        one.stop()


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(qq_module, "delays", lambda *_: iter([0.02] * 1000))


def settings(napcat, **changes):
    return NapCat(**{"url": napcat.url, "token": napcat.token, "send_timeout_s": 30} | changes)


@contextlib.asynccontextmanager
async def connected(napcat, number="", **changes):
    "An account that is connected, and the events that it got."
    events, arrived = [], asyncio.Event()

    def receive(event):
        events.append(event)
        arrived.set()
    qq = NcatbotQQ(settings(napcat, **changes), number, receive)
    running = asyncio.create_task(qq.run())
    async with asyncio.timeout(90):
        await qq._connected.wait()
        yield qq, events, arrived
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_the_version_that_all_this_is_about():
    assert version("ncatbot") == "4.4.1.post1" and "ncatbot==4.4.1.post1" in (ROOT / "client/pyproject.toml").read_text(encoding="utf-8")


def test_import_leaves_no_trace(tmp_path):
    "No folder, no settings read or written, no question on stdin, the log handlers as before, and the token nowhere."
    (tmp_path / "config.yaml").write_text("bt_uin: '666'\n", encoding="utf-8")
    code = """
import logging, os, sys
sys.path.insert(0, os.environ["CLIENT"])
logging.basicConfig(level=logging.INFO)
before = logging.getLogger().handlers[:], logging.getLoggerClass(), dict(os.environ)
from recallnb_client.config import NapCat
from recallnb_client.qq import NcatbotQQ, import_ncatbot
import_ncatbot(NapCat(token="s3cret"))
assert (logging.getLogger().handlers, logging.getLoggerClass(), dict(os.environ)) == before
from ncatbot.utils import ncatbot_config
assert ncatbot_config.bt_uin != "666" and ncatbot_config.napcat.remote_mode and not ncatbot_config.napcat.enable_webui
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"CLIENT": str(ROOT / "client")},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["config.yaml"] and "s3cret" not in done.stdout + done.stderr


def test_model_text_is_never_parsed(napcat):
    "CQ codes, entities and the word None arrive as they were written."
    async def scenario():
        async with connected(server := napcat()) as (qq, _, _):
            for words in ("[CQ:at,qq=all] 大家好", "&#91;CQ:at&#93;", "None", "第一行\n第二行 👍🏽"):
                await qq.send("group:9", words)
            assert server.texts("group:9") == ["[CQ:at,qq=all] 大家好", "&#91;CQ:at&#93;", "None", "第一行\n第二行 👍🏽"]
            assert await qq.send("private:42", "好", "77") == "90004"
            assert server.sent[-1] == ("private:42", [{"type": "reply", "data": {"id": "77"}}, {"type": "text", "data": {"text": "好"}}])
            assert {segment["type"] for _, segments in server.sent for segment in segments} == {"text", "reply"}
    asyncio.run(scenario())


def test_events_arrive_raw_and_in_order(napcat):
    "Unknown segments, too, and whatever else ncatbot would drop."
    async def scenario():
        async with connected(server := napcat()) as (_, events, arrived):
            reported = [message("一", {"type": "mface", "data": {}}), message("二", sender=None), message({"type": "contact", "data": {}}, group=9),
                        message("三", group=9, sender={"level": "LV1"}), message(), {"post_type": "notice", "notice_type": "group_recall"}]
            reported += [message(str(number)) for number in range(50)]
            server.event(*reported[:-1], {"post_type": "request"}, {"post_type": "message_sent"}, {}, reported[-1])
            while reported[-1] not in events:
                arrived.clear()
                await arrived.wait()
            assert events == reported
    asyncio.run(scenario())


def test_a_receiver_that_fails_does_not_end_the_connection(napcat, caplog):
    async def scenario():
        server, got = napcat(), asyncio.Event()

        def receive(event):
            if event["message_id"] == 1:
                raise RuntimeError("a bug")
            got.set()
        qq = NcatbotQQ(settings(server), "", receive)
        running = asyncio.create_task(qq.run())
        await asyncio.wait_for(qq._connected.wait(), 60)
        server.event(message("一", message_id=1), message("二"))
        await asyncio.wait_for(got.wait(), 60)
        assert server.greeted == 1 and "a bug" in caplog.text
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    asyncio.run(scenario())


def test_looking_up(napcat):
    async def scenario():
        async with connected(server := napcat()) as (qq, _, _):
            said = message("一", {"type": "mface", "data": {}})
            server.messages[str(said["message_id"])] = said
            assert await qq.message(str(said["message_id"])) == said
            with pytest.raises(Missing):
                await qq.message("1")
            with pytest.raises(Missing):
                await qq.forwarded("1")
    asyncio.run(scenario())


def test_sends_that_fail(napcat):
    "What was refused may be tried again; what timed out, by NapCat's word or by its silence, may have arrived."
    async def scenario():
        server = napcat(refuse=1, late=1)
        async with connected(server) as (qq, _, _):
            with pytest.raises(NotSent, match="EventChecker"):
                await qq.send("private:42", "一")
            with pytest.raises(Unconfirmed, match="Timeout"):
                await qq.send("private:42", "二")
            server.answers, patient = False, qq._settings
            qq._settings = replace(patient, send_timeout_s=0.3)
            with pytest.raises(Unconfirmed, match="in time"):
                await qq.send("private:42", "三")
            qq._settings = patient
            await asyncio.to_thread(server.wait, lambda: len(server.sent) == 2)
            assert server.texts() == ["二", "三"]
            server.answers, server.swallow = True, 1
            with pytest.raises(Unconfirmed, match="lost"):
                await qq.send("private:42", "四")
            assert not qq._bot.adapter.pending_requests
    asyncio.run(scenario())


def test_a_silent_napcat_blocks_nothing(napcat):
    "Many sends wait for a confirmation, without a thread each, while events still come in."
    async def scenario():
        server = napcat()
        async with connected(server) as (qq, _, arrived):
            threads = threading.active_count()
            server.answers = False
            waiting = [asyncio.create_task(qq.send("private:42", str(number))) for number in range(50)]
            await asyncio.to_thread(server.wait, lambda: len(server.sent) == 50)
            server.event(message("hi"))
            await arrived.wait()
            assert threading.active_count() <= threads + 1  # the one of to_thread
            for one in waiting:
                one.cancel()
    started = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - started < 60  # 300 s if an answer were awaited in a thread


def test_a_slow_napcat_holds_nobody_up(napcat):
    "Confirmations that take their time overlap."
    async def scenario():
        async with connected(server := napcat(slow=1)) as (qq, _, _):
            started = time.monotonic()
            ids = await asyncio.gather(*(qq.send(f"private:{user}", "好") for user in range(20)))
            assert len(set(ids)) == 20 and 1 <= time.monotonic() - started < 20  # one after another: 20 and more
            assert len(server.sent) == 20
    asyncio.run(scenario())


def test_not_connected_is_not_sent(napcat):
    async def scenario():
        server = napcat()
        qq = NcatbotQQ(settings(server), "", print)
        with pytest.raises(NotSent):
            await qq.send("private:42", "一")
        with pytest.raises(Missing):
            await qq.message("1")
    asyncio.run(scenario())


def test_connects_anew_as_often_as_needed(napcat):
    "The connection is cut; NapCat goes away for a while; each time events come again, once each."
    async def scenario():
        server = napcat()
        async with connected(server) as (qq, events, arrived):
            server.cut()
            await asyncio.to_thread(server.wait_connected, 2)
            server.stop()
            while qq._connected.is_set():
                await asyncio.sleep(0.01)
            again = napcat(port=server.port)
            await asyncio.to_thread(again.wait_connected)
            arrived.clear()
            again.event(message("da"))
            await arrived.wait()
            await qq._connected.wait()
            assert len(events) == 1 and await qq.send("private:42", "ja") and again.texts() == ["ja"]
    asyncio.run(scenario())


def test_a_connection_that_falls_silent_is_replaced(napcat, monkeypatch):
    "Heartbeats every tenth of a second, then none."
    monkeypatch.setattr(qq_module, "LOOK_S", 0.1)

    async def scenario():
        server = napcat()
        async with connected(server):
            server.heartbeat(interval=100)
            await asyncio.to_thread(server.wait_connected, 2)
    asyncio.run(scenario())


def test_the_loop_is_never_blocked(napcat):
    "Not while connecting, not while the connection is lost, not while there is nobody to connect to."
    async def scenario():
        server, longest, paused, over = napcat(), 0.0, 0.0, threading.Event()

        def stalls():
            "How long this machine lets nobody work: no fault of the loop's."
            nonlocal paused
            while not over.is_set():
                before = time.monotonic()
                over.wait(0.01)
                paused = max(paused, time.monotonic() - before)
        threading.Thread(target=stalls).start()
        async with connected(server) as (qq, _, _):
            async def watch():
                nonlocal longest
                while True:
                    before = time.monotonic()
                    await asyncio.sleep(0.01)
                    longest = max(longest, time.monotonic() - before)
            watching = asyncio.create_task(watch())
            server.stop()
            await asyncio.sleep(1.5)
            watching.cancel()
        over.set()
        assert longest < 1.0 + paused  # ncatbot's own way: 15 s
    asyncio.run(scenario())


def probe(server, number="", **changes):
    return asyncio.run(NcatbotQQ(settings(server, **changes), number, print).probe())


def test_probe_says_who_is_logged_in(napcat):
    assert probe(napcat()) == f"小忆（{BOT}）"
    assert probe(napcat(heartbeat_first=True), str(BOT)) == f"小忆（{BOT}）"


@pytest.mark.parametrize(
    ("faults", "changes", "number", "said"),
    [
        ({}, {"token": "wrong"}, "", "token"),
        ({"greets": False}, {}, "", "lifecycle"),
        ({"online": False}, {}, "", "重新登录"),
        ({"answers": False}, {}, "", "不回答请求"),
        ({}, {}, "666", f"登录的是 {BOT}"),
    ],
)
def test_probe_says_what_is_wrong(napcat, monkeypatch, faults, changes, number, said):
    monkeypatch.setattr(qq_module, "FIRST_FRAME_S", 10 if faults.get("greets", True) else 1)
    monkeypatch.setattr(qq_module, "LOOKUP_S", 0.5 if faults.get("answers") is False else 30)
    server = napcat(**faults)
    with pytest.raises(NotConnected, match=said) as error:
        probe(server, number, **changes)
    assert server.token not in str(error.value) and "wrong" not in str(error.value)


def test_probe_without_anybody_and_with_somebody_else():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{free.getsockname()[1]}"  # bound by us, so that nobody else listens there
        with pytest.raises(NotConnected, match="没有程序在监听"):
            asyncio.run(NcatbotQQ(NapCat(url=url), "", print).probe())
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    other = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        with pytest.raises(NotConnected, match="不是 WebSocket 服务器|关闭了连接"):
            asyncio.run(NcatbotQQ(NapCat(url=f"ws://127.0.0.1:{other.server_port}"), "", print).probe())
    finally:
        other.shutdown()
        other.server_close()


def test_no_proxy_stands_between(napcat, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.org")
    assert probe(napcat())
    assert os.environ["no_proxy"] == "127.0.0.1,example.org"


def test_wrong_token_is_said_once_and_tried_again(napcat, caplog):
    async def scenario():
        server = napcat()
        right, server.token = server.token, "another"
        qq = NcatbotQQ(settings(server, token=right), "", print)
        running = asyncio.create_task(qq.run())
        await asyncio.to_thread(server.wait, lambda: server.turned_away >= 3)
        server.token = right
        await asyncio.wait_for(qq._connected.wait(), 60)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    with caplog.at_level(logging.INFO, "recallnb_client"):
        asyncio.run(scenario())
    said = [record.getMessage() for record in caplog.records if record.name == "recallnb_client.qq" and record.levelno == logging.ERROR]
    assert len(said) == 1 and "token" in said[0]
    assert json.dumps("t0ken&+ 1")[1:-1] not in caplog.text
