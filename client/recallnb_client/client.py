"""The client: events of QQ come in, each goes to its chat."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import commands
from .chat import Chat, Part
from .commands import Command, read_command
from .config import Config, Group
from .decide import RateLimit, addressed, served, wording
from .lane import Lane
from .message import FORWARDED, LOST_QUOTE, MAX_CONTENT, Incoming, read_forward, read_message, read_quote, shorten
from .owed import Owed
from .port import QQ, Missing
from .server import RecallServer, Refused, Unavailable

_logger = logging.getLogger(__name__)
_SEEN, _RECENT = 10_000, 2_000  # messages
_CONFIRM_S = 60.0  # seconds in which 忘记我 can be confirmed

TOO_FAST = "你发得太快啦，歇一会儿再和我说吧。"
CALLED = "[叫了你一声]"  # a message that is nothing but an @


@dataclass(frozen=True)
class _Said:
    "What may be quoted."

    name: str
    content: str
    images: tuple[str, ...] = ()
    user: str = ""  # id; empty: the bot


class Client:
    "Between one QQ account and one server."

    def __init__(
        self,
        config: Config,
        server: RecallServer,
        qq: QQ,
        draw: Callable[[], float] | None = None,  # from 0 to 1, for answers by chance
        owed: Path | None = None,  # file of the deletions that the server has still to carry out; None: they are lost with the process
    ):
        self._config, self._server, self._qq = config, server, qq
        self._draw = {"draw": draw} if draw else {}
        self._limit = RateLimit(config.limits)
        self._owed = Owed(owed)
        self._chats: dict[str, Chat] = {}
        self._inboxes: dict[str, Lane] = {}
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._said: OrderedDict[tuple[str, str], _Said] = OrderedDict()
        self._own: set[tuple[str, str]] = set()  # what of it the bot said
        self._asked: dict[tuple[str, str], float] = {}  # (scope, person) -> when the question about 忘记我 lapses
        self._warned: dict[str, float] = {}  # person -> when TOO_FAST may be said again

    def receive(
        self,
        event: dict,  # of OneBot v11
    ) -> None:
        "Take an event in; returns at once, and the events of a chat stay in order."
        if event.get("post_type") == "message":
            message = read_message(event)
            if message is None or not served(message, self._config) or not self._first_time(message.scope, message.id):
                return
            self._inbox(message.scope).put(partial(self._take_in, message))
        elif event.get("notice_type") in ("group_recall", "friend_recall"):
            kind, lists = ("group", self._config.groups) if event["notice_type"] == "group_recall" else ("private", self._config.users)
            number = str(event.get("group_id" if kind == "group" else "user_id"))
            if lists.admits(number):
                scope = f"{kind}:{number}"
                self._inbox(scope).put(partial(self._recall, scope, str(event.get("message_id", ""))))

    def resume(self) -> None:
        "Go on with the deletions that an earlier run has left."
        for scope, message_id in [*self._owed]:
            self._chat(scope).recall(message_id)

    async def idle(self) -> None:
        "Return when every chat has nothing left to do and nothing waits for its second part."
        await asyncio.gather(*(lane.idle() for lane in self._inboxes.values()))
        await asyncio.gather(*(chat.lane.idle() for chat in self._chats.values()))

    async def close(self) -> None:
        "End everything."
        await asyncio.gather(*(lane.close() for lane in self._inboxes.values()))
        if waiting := sum(await asyncio.gather(*(chat.close() for chat in self._chats.values()))):
            _logger.warning("%d messages had not reached the server", waiting)

    def _inbox(self, scope: str) -> Lane:
        return self._inboxes.setdefault(scope, Lane(f"{scope} in"))

    def _chat(self, scope: str) -> Chat:
        if scope not in self._chats:
            self._chats[scope] = Chat(scope, self._config, self._server, self._qq, partial(self._spoke, scope), self._owed)
        return self._chats[scope]

    def _first_time(self, scope: str, message_id: str) -> bool:
        "Was this message not here before? QQ sometimes delivers twice."
        key = (scope, message_id)
        if key in self._seen:
            _logger.info("%s: message %s came again and is left alone", *key)
            return False
        self._seen[key] = None
        _trim(self._seen, _SEEN)
        return True

    def _spoke(self, scope: str, message_id: str, text: str) -> None:
        "Remember what the bot said, so that quoting it is noticed."
        if message_id:
            self._own.add((scope, message_id))
            self._keep(scope, message_id, _Said(self._name, text))

    def _keep(self, scope: str, message_id: str, said: _Said) -> None:
        self._said[scope, message_id] = said
        for key in _trim(self._said, _RECENT):
            self._own.discard(key)

    @property
    def _name(self) -> str:
        return next(iter(self._config.bot.names), "机器人")

    async def _take_in(self, message: Incoming) -> None:
        "Find out what a message quotes and whom it is for, and pass it on."
        config, chat = self._config, self._chat(message.scope)
        group = config.group_settings(message.scope.partition(":")[2])
        self._keep(message.scope, message.id, _Said(message.nickname or message.user_id, message.content, message.images, message.user_id))
        part, quotes_bot = await self._with_context(message)
        reason = addressed(message, group, config.bot.names, quotes_bot, **self._draw)
        order = self._order(message, group, reason)
        forgetting = order and order.name in ("yes", "forget_me", "unlearn")  # nobody talks too much for that
        if not forgetting and not self._may_speak(message, bool(reason), chat):
            order, reason = None, ""
        if order:
            _logger.info("%s: %s asks for %s", message.scope, message.user_id, order.name)
            chat.command(partial(self._obey, order, message, chat), message.order)
        elif reason or group.learn or message.scope.startswith("private:"):
            if not part.content and message.at_bot:
                part = Part(message, CALLED, ())
            if part.content:
                chat.hear(part, bool(reason))

    def _may_speak(self, message: Incoming, addressed: bool, chat: Chat) -> bool:
        "Is this within the person's limit? Who talks to the bot alone is told once if it is not."
        user, now = message.user_id, asyncio.get_running_loop().time()
        if not addressed or user in self._config.bot.owners or self._limit.allows(user):
            return True
        _logger.info("%s: %s sends more than [limits] messages", message.scope, user)
        if message.scope.startswith("private:") and self._warned.get(user, 0.0) <= now:
            self._warned[user] = now + self._config.limits.per_s
            chat.lane.put(partial(chat.say, TOO_FAST))
        return False

    async def _with_context(self, message: Incoming) -> tuple[Part, bool]:
        "The message with the texts that it quotes and forwards, and whether it quotes the bot."
        content, images, quotes_bot, said = message.content, message.images, False, None
        if message.forward:
            try:
                content = content.replace(FORWARDED, read_forward(await self._qq.forwarded(message.forward)), 1)
            except Missing as error:
                _logger.info("%s: the forwarded texts in %s are not to be had: %s", message.scope, message.id, error)
        if message.quote:
            said, quotes_bot = await self._quoted(message)
            quote = read_quote(said.name, said.content) if said else LOST_QUOTE
            content, images = f"{quote}\n{content}", images + (said.images if said else ())
        return Part(message, shorten(content.strip(), MAX_CONTENT), images, said.user if said else ""), quotes_bot

    async def _quoted(self, message: Incoming) -> tuple[_Said | None, bool]:
        "What a message quotes, and whether the bot said it."
        key = (message.scope, message.quote)
        if key not in self._said:
            try:
                event = await self._qq.message(message.quote)
            except Missing as error:
                _logger.info("%s: the quoted message %s is not to be had: %s", *key, error)
                return None, False
            if found := read_message({**event, "self_id": ""}):
                own = found.user_id == str(event.get("self_id"))
                self._keep(*key, _Said(self._name if own else found.nickname or found.user_id, found.content, found.images, "" if own else found.user_id))
                self._own |= {key} if own else set()
        return self._said.get(key), key in self._own

    async def _recall(self, scope: str, message_id: str) -> None:
        "Somebody took a message back."
        if (scope, message_id) not in self._own:
            self._said.pop((scope, message_id), None)
            self._chat(scope).recall(message_id)

    def _order(self, message: Incoming, group: Group, reason: str) -> Command | None:
        "The command in a message, where it may hold one: in private, or said to the bot."
        is_group = message.scope.startswith("group:")
        order = read_command(wording(message, group, self._config.bot.names), is_group, bool(message.quote))
        if order and order.name == "yes":
            lapses = self._asked.pop((message.scope, message.user_id), 0.0)
            return order if lapses > asyncio.get_running_loop().time() else None
        return order if reason not in ("", "chance") else None

    async def _obey(self, order: Command, message: Incoming, chat: Chat) -> None:
        "Carry a command out and say what came of it."
        try:
            reply = await getattr(self, f"_do_{order.name}")(order, message)
        except (Unavailable, Refused) as error:
            _logger.error("%s: %s failed: %s", message.scope, order.name, error)
            reply = "现在连不上服务器，这件事没有办成，请稍后再试一次。" if isinstance(error, Unavailable) else "服务器没有接受，这件事没有办成。"
        await chat.tell(reply, message.id)

    async def _do_help(self, order: Command, message: Incoming) -> str:
        return commands.HELP

    def _where(self, message: Incoming) -> str | None:
        "In a group only what was said there is shown; who asks in private sees all of it."
        return message.scope if message.scope.startswith("group:") else None

    async def _do_memories(self, order: Command, message: Incoming) -> str:
        return commands.list_memories(*await self._server.memories(message.user_id, self._where(message)))

    async def _do_forget(self, order: Command, message: Incoming) -> str:
        if not order.about:
            return await self._forget_quoted(message)
        memories, _ = await self._server.memories(message.user_id, self._where(message))
        meant = commands.matching(memories, order.about)
        if not meant:
            return f"我没有关于「{shorten(order.about, 40)}」的记忆。说「记忆」可以看看我记得什么。"
        if len(meant) > 1:
            return f"有好几条，请用编号告诉我是哪一条，例如「忘记 #{meant[0]['id']}」。\n{commands.list_memories(meant, len(meant))}"
        await self._server.forget(meant[0]["id"])
        return f"已经忘掉了：{shorten(meant[0]['text'], 100)}"

    async def _forget_quoted(self, message: Incoming) -> str:
        "Forget one message; only who wrote it may order that."
        try:
            event = await self._qq.message(message.quote)
        except Missing:
            return "我看不到你引用的那条消息，说「记忆」看看有没有要忘掉的。"
        if str(event.get("user_id") or (event.get("sender") or {}).get("user_id")) != message.user_id:
            return "只能忘掉你自己说的话。"
        if not await self._server.retract(message.scope, message.quote):
            return "那条消息我这里没有，没有什么要忘掉的。"
        return "好的，那条消息和由它记下的事都忘掉了。"

    async def _do_forget_me(self, order: Command, message: Incoming) -> str:
        self._asked[message.scope, message.user_id] = asyncio.get_running_loop().time() + _CONFIRM_S
        return "真的要我忘掉关于你的一切吗？你说过的话和我记下的事都会删除，不能恢复。一分钟内回复「确定」就办。"

    async def _do_yes(self, order: Command, message: Incoming) -> str:
        for chat in self._chats.values():
            chat.drop(message.user_id)
        await self._server.forget_person(message.user_id)
        return "好的，关于你的一切我都忘掉了。"

    async def _do_unlearn(self, order: Command, message: Incoming) -> str:
        await self._server.set_learning(message.user_id, False)
        return "好的，以后你说的话我不再记住。想让我重新记住，就说「可以记住我」。"

    async def _do_learn(self, order: Command, message: Incoming) -> str:
        await self._server.set_learning(message.user_id, True)
        return "好的，我会记住你说的事。"

    async def _do_pause(self, order: Command, message: Incoming) -> str:
        if not self._rules(message):
            return "只有群主和管理员可以让我暂停。"
        await self._server.set_paused(message.scope, True)
        return "好的，我先安静一会儿。群主或管理员说「恢复」我再回来。"

    async def _do_resume(self, order: Command, message: Incoming) -> str:
        if not self._rules(message):
            return "只有群主和管理员可以让我恢复。"
        await self._server.set_paused(message.scope, False)
        return "我回来啦。"

    def _rules(self, message: Incoming) -> bool:
        return message.role in ("owner", "admin") or message.user_id in self._config.bot.owners


def _trim(kept: OrderedDict, most: int) -> list:
    "Let the oldest go; their keys."
    return [kept.popitem(last=False)[0] for _ in range(len(kept) - most)]
