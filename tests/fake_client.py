"""What the tests of the QQ client share: its package on the path, events of QQ, and a QQ and a server without a network."""

import asyncio
import itertools
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "client"))

from recallnb_client.client import Client  # noqa: E402
from recallnb_client.config import Bot, Config, Limits, Send, Server  # noqa: E402
from recallnb_client.port import Missing  # noqa: E402
from recallnb_client.server import Answer, Unavailable  # noqa: E402

BOT, ASLEEP = 10000, "我在整理记忆。"
_ids, _clock = itertools.count(5_000), itertools.count(1_762_387_200)


def text(words):
    return {"type": "text", "data": {"text": words}}


def at(number):
    return {"type": "at", "data": {"qq": str(number)}}


def quote(message_id):
    return {"type": "reply", "data": {"id": str(message_id)}}


def picture(url="http://127.0.0.1:1/a.png", **data):
    return {"type": "image", "data": {"file": "a.png", "url": url, "sub_type": 0} | data}


def message(*segments, user=42, group=None, name="LinF", role="member", **fields):
    "A OneBot v11 message event as NapCat sends it; texts may stand for themselves."
    event = {
        "time": next(_clock), "self_id": BOT, "post_type": "message", "message_type": "group" if group else "private",
        "sub_type": "normal" if group else "friend", "user_id": user, "message_id": next(_ids), "real_seq": str(next(_ids)),
        "sender": {"user_id": user, "nickname": name, "card": ""} | ({"role": role} if group else {}),
        "message": [text(one) if isinstance(one, str) else one for one in segments], "raw_message": "", "font": 14,
    }
    return event | ({"group_id": group} if group else {}) | fields


def recalled(event):
    "The notice that the message of this event was taken back."
    notice = {"time": next(_clock), "self_id": BOT, "post_type": "notice", "user_id": event["user_id"], "message_id": event["message_id"]}
    if "group_id" in event:
        return notice | {"notice_type": "group_recall", "group_id": event["group_id"], "operator_id": event["user_id"]}
    return notice | {"notice_type": "friend_recall"}


class FakeQQ:
    "A QQ that keeps what it is given."

    def __init__(self):
        self.sent, self.faults, self.messages, self.forwards = [], [], {}, {}

    async def send(self, scope, text, quote=""):
        if self.faults and (fault := self.faults.pop(0)):
            raise fault
        self.sent.append((scope, text, quote))
        return f"b{len(self.sent)}"

    async def message(self, message_id):
        if message_id not in self.messages:
            raise Missing("no such message")
        return self.messages[message_id]

    async def forwarded(self, forward_id):
        if forward_id not in self.forwards:
            raise Missing("no such forward")
        return self.forwards[forward_id]

    def texts(self, scope=None):
        return [text for where, text, _ in self.sent if scope in (None, where)]


class FakeServer:
    """A server that answers each message with its words, once the test lets it.

    `gates` holds, for a word in a message, the event that its answer waits for; `faults` is what the next calls raise;
    while it is `asleep` it stores everything and answers nothing, and `tries` holds what was brought to it, again and again."""

    def __init__(self):
        self.history, self.tries, self.asked, self.calls, self.faults, self.gates, self.started = [], [], [], [], [], {}, {}
        self.known, self.uploads, self.notice, self.asleep, self.reply = [], [], "", False, lambda body: f"听到：{body['content']}"

    def hold(self, word):
        "Let answers to messages with this word wait for the event that is returned first; the second one says that one is asked for."
        self.gates[word], self.started[word] = asyncio.Event(), asyncio.Event()
        return self.gates[word], self.started[word]

    async def say(self, scope, body, accepted):
        await self._fail()
        self.tries.append(body["content"])
        if body["message_id"] not in [known["message_id"] for where, known in self.history if where == scope]:
            self.history.append((scope, body))
        if body["mentioned"] and self.asleep:
            raise Unavailable("asleep", 503, line=ASLEEP)
        accepted()
        if not body["mentioned"]:
            return Answer("stored")
        self.asked.append(body["content"])
        for word in self.gates:
            if word in body["content"]:
                self.started[word].set()
                await self.gates[word].wait()
        return Answer("ok", self.reply(body), self.notice)

    async def upload(self, data):
        await self._fail()
        self.uploads.append(data)
        return f"u{len(self.uploads)}"

    async def memories(self, subject, scope=None, limit=1000):
        await self._fail()
        found = [memory for memory in self.known if memory["subject"] == subject and scope in (None, memory["scope"])]
        return found, len(found)

    async def _fail(self):
        if self.faults and (fault := self.faults.pop(0)):
            raise fault

    async def retract(self, scope, message_id):
        await self._fail()
        self.calls.append(("retract", scope, message_id))
        return any(message_id == body["message_id"] for where, body in self.history if where == scope)

    def __getattr__(self, name):
        "Every other call is written down."
        async def call(*arguments):
            await self._fail()
            self.calls.append((name, *arguments))
        return call

    def contents(self, scope=None):
        return [body["content"] for where, body in self.history if scope in (None, where)]


QUICK = dict(server=Server(notice_after_s=0, give_up_s=60), limits=Limits(debounce_s=0.01), send=Send(pause_s=0, pause_per_char_s=0),
             bot=Bot(owners=("1",)))


class Stage:
    "A client between the fakes; `settle` waits until nothing is left to do."

    def __init__(self, draw=None, **sections):
        self.config = Config(**QUICK | sections)
        self.qq, self.server = FakeQQ(), FakeServer()
        self.client = Client(self.config, self.server, self.qq, draw)

    def receive(self, *events):
        for event in events:
            self.client.receive(event)
        return events[0]

    async def heard(self):
        "Wait until what was received is known to its chats."
        await asyncio.gather(*(lane.idle() for lane in self.client._inboxes.values()))

    async def bundled(self):
        "Wait until nothing waits for its second part."
        await self.heard()
        while any(chat._bundles for chat in self.client._chats.values()):
            await asyncio.sleep(self.config.limits.debounce_s)

    async def until(self, condition):
        while not condition():
            await asyncio.sleep(0.005)

    async def settle(self):
        await self.client.idle()
        while any(chat._bundles or chat._turns or chat.lane._task or chat._retractions._task for chat in self.client._chats.values()):
            await asyncio.sleep(self.config.limits.debounce_s)
            await self.client.idle()

    async def tell(self, *events):
        self.receive(*events)
        await self.settle()
        return self.qq.sent


def staged(scenario, **sections):
    "Run a scenario on a stage within a limit of time."
    async def play():
        stage = Stage(**sections)
        async with asyncio.timeout(60):
            await scenario(stage)
        await stage.client.close()
    asyncio.run(play())


AWAY = Unavailable("away")
