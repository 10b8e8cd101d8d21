"""One chat: its messages reach the server in order, and only the newest is answered.

Parts that follow each other closely (a picture and its text) are one turn. A newer turn ends the answer to an older one at
once, but after some interruptions in a row an answer is brought to its end, so that a busy group still gets one."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace

from .config import Config
from .lane import Lane, delays
from .message import LOST_QUOTE, MAX_CONTENT, QUOTE, Incoming, shorten
from .owed import Owed
from .port import QQ, Away, NotSent, Unconfirmed
from .server import LONGEST_ID, Answer, RecallServer, Refused, Unavailable, download, merged_id
from .split import pause_before, split_reply

_logger = logging.getLogger(__name__)

NOTICE = "我这边的服务器暂时没有回应，你的话我先记着，连上了马上回你。"
GIVEN_UP = "服务器一直没有回应，刚才那条没能回答，请过一会儿再发一次。"
TOO_MUCH = "这条消息我处理不了，可能太长了，试试分几条发给我。"
_TICK = 0.02  # seconds by which a timer may come early: 16 ms on Windows before Python 3.13


@dataclass(frozen=True)
class Part:
    "A message, ready for the server."

    message: Incoming
    content: str  # with what it quotes or forwards
    images: tuple[str, ...]  # addresses, those of a quoted message too
    quoted_user: str = ""  # who wrote what it quotes


@dataclass(eq=False)
class Turn:
    "What becomes one message on the server."

    parts: list[Part]
    token: int  # its number among what was addressed to the bot; 0: it was not
    protected: bool = False  # is it answered whatever comes?
    accepted: bool = False  # does the server have it?
    recalled: bool = False  # is it to have no effect any more?
    image_ids: list[str] | None = None  # once uploaded
    alarm: asyncio.TimerHandle | None = None  # brings it back into the lane
    since: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    @property
    def user(self) -> str:
        "Who wrote it."
        return self.parts[-1].message.user_id

    @property
    def id(self) -> str:
        "The message that an answer quotes."
        return self.parts[-1].message.id

    @property
    def key(self) -> str:
        "Its id on the server."
        return merged_id(part.message for part in self.parts)


@dataclass(eq=False)
class _Bundle:
    "Parts of one person that may be one turn."

    latest: float  # time of the loop by which it ends
    due: float = 0.0
    token: int = 0
    parts: list[Part] = field(default_factory=list)


class _Newer(Exception):
    "A newer message has come."


class Chat:
    "The messages of one scope on their way."

    def __init__(
        self,
        scope: str,
        config: Config,
        server: RecallServer,
        qq: QQ,
        sent: Callable[[str, str], None] = lambda message_id, text: None,  # told of what the bot said
        owed: Owed | None = None,  # deletions
    ):
        self.scope, self._config, self._server, self._qq, self._sent, self._deletions = scope, config, server, qq, sent, owed or Owed()
        self.lane = Lane(scope)
        self._bundles: dict[str, _Bundle] = {}  # by person, oldest first
        self._turns: list[Turn] = []  # on their way, oldest first
        self._turn: Turn | None = None  # the one that is being answered
        self._newer = asyncio.Event()  # ends its answer
        self._token, self._newest = 0, (0.0, 0)
        self._streak = 0  # answers interrupted in a row
        self._away_since: float | None = None  # None: the server is there
        self._noticed = False  # was it said that the server is away?
        self._told_asleep = False  # was it said that it sleeps?
        self._owed: dict[str, str] = {}  # by person: a notice of the server that was not shown yet
        self._retractions = Lane(f"{scope} retractions")  # what is not taken back in its turn

    def hear(
        self,
        part: Part,
        mentioned: bool,  # is it for the bot?
    ) -> None:
        "Take in a message. One that arrives after a newer one is not answered."
        loop, wait = asyncio.get_running_loop(), self._config.limits.debounce_s
        token = self._address(part.message.order) if mentioned and part.message.order >= self._newest else 0
        if (begun := self._bundles.get(part.message.user_id)) and len(merged_id(one.message for one in [*begun.parts, part])) > LONGEST_ID:
            self._close_bundles(everything=True)
        bundle = self._bundles.setdefault(part.message.user_id, _Bundle(loop.time() + 4 * wait))
        bundle.parts.append(part)
        bundle.token = max(bundle.token, token)
        bundle.due = min(loop.time() + wait, bundle.latest)
        loop.call_at(bundle.due, self._close_bundles)

    def command(
        self,
        job: Callable[[], Awaitable[None]],
        order: tuple[float, int],  # of its message
    ) -> None:
        "Do something in the order of messages; it ends a running answer like any message to the bot."
        self._close_bundles(everything=True)
        self._address(order)
        self.lane.put(job)

    def recall(
        self,
        message_id: str,
    ) -> None:
        "Somebody took a message back: it is not forwarded, its answer ends, and the server deletes what it has of it."
        self._unquote(lambda part: part.message.quote == message_id)
        for user, bundle in list(self._bundles.items()):
            if _without(bundle.parts, message_id):
                if not bundle.parts:
                    del self._bundles[user]
                return
        for turn in self._turns:
            if message_id not in [part.message.id for part in turn.parts]:
                continue
            if turn is not self._turn and not turn.accepted and len(turn.parts) > 1:
                _without(turn.parts, message_id)
                return
            self._end(turn)
            message_id = turn.key
        self._take_back(message_id)

    def drop(
        self,
        user_id: str,
    ) -> None:
        "Nothing of this person that is still on its way shall have an effect."
        self._bundles.pop(user_id, None)
        self._unquote(lambda part: part.quoted_user == user_id)
        for turn in self._turns:
            if turn.user == user_id:
                under_way = turn is self._turn and not turn.accepted
                self._end(turn)
                if under_way:  # the server may store it behind the deletion
                    self._take_back(turn.key)

    async def say(
        self,
        text: str,
        quote: str = "",  # id of a message
        still: Callable[[], bool] = lambda: True,  # is it still worth sending?
    ) -> bool:  # False: it certainly did not arrive
        "Send one text. What QQ refuses is tried again some times, what finds no connection as long as one may come back, what may have arrived never."
        loop, waits, refused, problem = asyncio.get_running_loop(), delays(1.0, 15.0), 0, "a newer message has come"
        end = loop.time() + self._config.server.give_up_s
        while still():
            try:
                self._sent(await self._qq.send(self.scope, text, quote if self.scope.startswith("group:") else ""), text)
                return True
            except Unconfirmed as error:
                _logger.warning("%s: a text may or may not have arrived, and is not repeated: %s", self.scope, error)
                return True
            except NotSent as error:
                problem, refused = str(error), refused + (not isinstance(error, Away))
                _logger.info("%s: a text was not sent: %s", self.scope, error)
            if refused >= self._config.send.attempts or loop.time() > end:
                break
            await asyncio.sleep(next(waits))
        _logger.error("%s: a text of %d characters was given up: %s", self.scope, len(text), problem)
        return False

    async def tell(
        self,
        text: str,
        quote: str,  # id of a message
    ) -> None:
        "Send a text in parts, to the end."
        for number, part in enumerate(split_reply(text, self._config.send.max_chars)):
            if number:
                await asyncio.sleep(pause_before(part, self._config.send))
            if not await self.say(part, "" if number else quote):
                return

    async def close(self) -> int:  # turns that had not reached the server
        "End everything."
        waiting = sum(len(bundle.parts) for bundle in self._bundles.values()) + sum(not turn.accepted for turn in self._turns)
        self._bundles.clear()
        for turn in self._turns:
            if turn.alarm:
                turn.alarm.cancel()
        await self.lane.close()
        await self._retractions.close()
        return waiting

    def _unquote(self, gone: Callable[[Part], bool]) -> None:
        "What is not on its way yet shall not bring the server words and pictures that are taken back."
        for parts in [bundle.parts for bundle in self._bundles.values()] + [turn.parts for turn in self._turns]:
            parts[:] = [_without_quote(part) if gone(part) else part for part in parts]
        for turn in self._turns:
            if any(map(gone, turn.parts)):
                turn.image_ids = None

    def _address(self, order: tuple[float, int]) -> int:
        "Something new is for the bot: its token. An older answer ends."
        self._token, self._newest = self._token + 1, max(self._newest, order)
        if self._turn and not self._turn.protected:
            self._newer.set()
        return self._token

    def _end(self, turn: Turn) -> None:
        "Take a turn back. While a request is on its way it is not cut off: the server might store it after it was told to delete it."
        turn.recalled = True
        if turn is self._turn and turn.accepted:
            self._newer.set()

    def _close_bundles(self, everything: bool = False) -> None:
        "Make turns of the bundles that are complete, in order."
        now = asyncio.get_running_loop().time()
        for user, bundle in list(self._bundles.items()):
            if bundle.due > now + _TICK and not everything:
                break
            del self._bundles[user]
            parts = sorted(bundle.parts, key=lambda part: part.message.order)
            for turn in [Turn(parts, bundle.token)] if bundle.token else [Turn([part], 0) for part in parts]:
                self._enqueue(turn)

    def _enqueue(self, turn: Turn) -> None:
        self._turns.append(turn)
        waiting = [old for old in self._turns if not old.recalled and old is not self._turn]
        if len(waiting) > self._config.limits.waiting:
            least = next((old for old in waiting if not old.token), waiting[0])
            least.recalled = True
            _logger.error("%s: more than %d messages wait: %s is dropped", self.scope, self._config.limits.waiting, least.id)
        self.lane.put(lambda: self._forward(turn))

    def _fresh(self, turn: Turn) -> bool:
        "Is it still to be answered?"
        return bool(turn.token) and not turn.recalled and (turn.protected or turn.token == self._token)

    async def _forward(self, turn: Turn) -> None:
        "Bring a turn to the server and its answer to the chat."
        again, turn.alarm = turn.accepted, None  # after a sleep: the server has it, may have been told to forget it, and answers the newest
        if turn.token and not turn.recalled and turn.token != self._token and not again:
            self._streak += 1  # overtaken before it has begun
        turn.protected = bool(turn.token) and self._streak >= self._config.limits.interruptions and not again
        self._turn, self._newer = turn, asyncio.Event()
        try:
            answer = None if again and not self._fresh(turn) else await self._ask(turn)
            if answer and answer.notice:
                self._owed[turn.user] = answer.notice
            if answer and answer.status == "ok" and self._fresh(turn):
                self._streak = 0
                await self._speak(turn, answer.reply)
            elif answer and answer.status == "ok" and turn.token:
                self._streak += 1  # overtaken at the last moment
        finally:
            self._turn = None
            if not turn.alarm:
                self._turns.remove(turn)

    async def _put_off(self, turn: Turn, line: str, delay: float) -> None:
        "A server that sleeps has the message, and needs no model for deletions and what is not for the bot: they do not wait behind it."
        turn.accepted = True
        if self._fresh(turn) and not self._told_asleep:
            self._told_asleep = True
            await self.say(line, turn.id)
        if self._fresh(turn):
            turn.alarm = asyncio.get_running_loop().call_later(delay, self.lane.put, lambda: self._forward(turn))

    async def _ask(self, turn: Turn) -> Answer | None:
        "The server's answer, however long the server is away; None if there is none for this turn, or none yet because the server sleeps."
        loop, settings, waits = asyncio.get_running_loop(), self._config.server, delays()
        while not turn.recalled:
            began = loop.time()
            try:
                answer = await self._request(turn)
                self._away_since, self._noticed = None, False
                self._told_asleep &= answer.status != "ok"  # anything else needs nobody awake
                return answer
            except _Newer:
                self._streak += 1
                if turn.accepted:
                    return None
            except Refused as error:
                _logger.error("%s: the server refuses message %s: %s", self.scope, turn.id, error)
                if self._fresh(turn) and error.status in (413, 422):
                    await self.say(TOO_MUCH, turn.id)
                return None
            except Unavailable as error:
                if self._away_since is None:
                    self._away_since = began
                waited, delay = self._waited(turn), max(next(waits), error.retry_after)
                _logger.warning("%s: message %s waits for the server (%.0f s): %s", self.scope, turn.id, waited, error)
                if error.line and turn.token:
                    self._away_since = None  # it is there, and sleeps
                    await self._put_off(turn, error.line, delay)
                    return None
                if waited > settings.give_up_s:
                    _logger.error("%s: message %s is given up", self.scope, turn.id)
                    if self._fresh(turn):
                        await self.say(GIVEN_UP, turn.id)
                    return None
                fresh = next(filter(self._fresh, self._turns), None)  # it may stand behind others that nobody waits for
                if fresh and self._waited(fresh) >= settings.notice_after_s and not self._noticed:
                    self._noticed = True
                    await self.say(NOTICE, fresh.id)
                await asyncio.sleep(delay)
        return None

    def _waited(self, turn: Turn) -> float:
        "For how many seconds this turn has waited for a server that is away."
        return asyncio.get_running_loop().time() - max(turn.since, self._away_since or 0.0)

    async def _request(self, turn: Turn) -> Answer:
        "One try; a turn that is no longer the newest is only brought for learning."
        def accepted() -> None:
            turn.accepted = True
            if turn.recalled:
                self._newer.set()

        turn.accepted = False  # of this try: cut off, it might be stored behind a deletion
        if self._fresh(turn):
            if turn.image_ids is None:
                turn.image_ids = await self._unless_newer(self._upload(turn))
            return await self._unless_newer(self._server.say(self.scope, self._body(turn, True), accepted))
        return await self._server.say(self.scope, self._body(turn, False), accepted)

    def _body(self, turn: Turn, mentioned: bool) -> dict:
        last = turn.parts[-1].message
        content = shorten("\n".join(part.content for part in turn.parts), MAX_CONTENT)
        return {"user_id": last.user_id, "user_nickname": last.nickname, "content": content, "timestamp": last.at, "message_id": turn.key,
                "mentioned": mentioned} | ({"images": turn.image_ids} if turn.image_ids else {})

    async def _upload(self, turn: Turn) -> list[str]:
        "Ids of the turn's pictures on the server; one that cannot be had stays a word in the text."
        limits, ids = self._config.limits, []
        own = [url for part in turn.parts for url in part.message.images]  # quoted ones last, so that the server can tell
        for url in list(dict.fromkeys(own + [url for part in turn.parts for url in part.images]))[: limits.images]:
            try:
                ids.append(await self._server.upload(await download(url, int(limits.image_mb * 2**20))))
            except Unavailable:
                raise
            except Exception as error:  # whatever an address from outside may cause
                _logger.warning("%s: a picture of message %s is left out: %s", self.scope, turn.id, error or type(error).__name__)
        return ids

    async def _speak(self, turn: Turn, reply: str) -> None:
        "Send an answer in parts, like a person, and then a notice that is owed; a newer message ends it between two of them."
        for number, part in enumerate([*split_reply(reply, self._config.send.max_chars), *filter(None, [self._owed.get(turn.user)])]):
            try:
                if number:
                    await self._unless_newer(asyncio.sleep(pause_before(part, self._config.send)))
            except _Newer:
                return
            if not self._fresh(turn) or not await self.say(part, "" if number else turn.id, lambda: self._fresh(turn)):
                return
        self._owed.pop(turn.user, None)

    def _take_back(self, message_id: str) -> None:
        self._deletions.add(self.scope, message_id)
        if self._turn and self._turn.key != message_id:
            self._retractions.put(lambda: self._retract(message_id))
        else:
            self.lane.put(lambda: self._retract(message_id), first=True)

    async def _retract(self, message_id: str, waits: Iterator[float] | None = None) -> None:
        "Let the server delete a message: behind its own request, but beside what else is on its way, as often as it takes."
        try:
            await self._server.retract(self.scope, message_id)
            self._deletions.discard(self.scope, message_id)
        except Refused as error:
            _logger.error("%s: the recalled message %s was not deleted: %s", self.scope, message_id, error)
            self._deletions.discard(self.scope, message_id)
        except Unavailable as error:
            _logger.warning("%s: the recalled message %s waits to be deleted: %s", self.scope, message_id, error)
            if waits:
                await asyncio.sleep(max(next(waits), error.retry_after))
            self._retractions.put(lambda: self._retract(message_id, waits or delays()), first=True)

    async def _unless_newer(self, work: Awaitable):
        "The result of this work; _Newer, and the work is ended, if something newer comes first."
        task, newer = asyncio.ensure_future(work), asyncio.ensure_future(self._newer.wait())
        try:
            await asyncio.wait({task, newer}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Newer
            return task.result()
        finally:
            for one in (task, newer):
                one.cancel()
            await asyncio.gather(task, newer, return_exceptions=True)


def _without_quote(part: Part) -> Part:
    first, line, rest = part.content.partition("\n")
    return replace(part, content=LOST_QUOTE + line + rest if first.startswith(QUOTE) else part.content, images=part.message.images)


def _without(parts: list[Part], message_id: str) -> bool:
    "Take a message out of these parts, if it is there."
    before = len(parts)
    parts[:] = [part for part in parts if part.message.id != message_id]
    return len(parts) < before
