"""The recallnb server as the client sees it: what is called, and what can go wrong."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx

from . import config

_logger = logging.getLogger(__name__)
SILENCE_S = 60.0  # while it works on an answer, the server says something every ten seconds
_AWAY = {401, 403, 408, 425, 429, 500, 502, 503, 504}  # a wrong key, too: its owner puts it right while messages wait


LONGEST_ID = 128  # characters that the server takes


def merged_id(messages) -> str:  # `Incoming`s
    "One id for messages that become one, all of theirs, so that each can be found by its own."
    return "+".join(message.id for message in messages)


class Unavailable(Exception):
    "The server is away, is restarting or has no time: the same call may succeed later."

    def __init__(
        self,
        problem: str,
        status: int = 0,  # of HTTP; 0: there was no response
        retry_after: float = 0.0,  # seconds
        line: str = "",  # what people are told, where the server says why it does not answer yet
    ):
        super().__init__(f"{status}: {problem}" if status else problem)
        self.status, self.retry_after, self.line = status, retry_after, line


class Refused(Exception):
    "The server will never take this call."

    def __init__(
        self,
        status: int,  # of HTTP
        problem: str,
    ):
        super().__init__(f"{status}: {problem}")
        self.status = status


@dataclass(frozen=True)
class Answer:
    "What came of a message."

    status: str  # ok; or why there is no reply: interrupted, stored (only taken in), paused, refused, retracted
    reply: str = ""
    notice: str = ""  # what the person is to be told along with it


class RecallServer:
    "Calls to one server; each raises Unavailable or Refused."

    def __init__(
        self,
        settings: config.Server,
    ):
        headers = {"Authorization": f"Bearer {settings.key}"} if settings.key else {}
        self._patience = settings.answer_timeout_s
        timeout = httpx.Timeout(settings.answer_timeout_s, connect=10, pool=None)
        # Not through a proxy of the system: the server is on this machine or behind a tunnel.
        self._http = httpx.AsyncClient(base_url=settings.url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False,
                                       limits=httpx.Limits(max_connections=None))

    async def close(self) -> None:
        "Close the connections."
        await self._http.aclose()

    async def say(
        self,
        scope: str,
        body: dict,  # without the group's id
        accepted: Callable[[], None],  # called when the server has the message
    ) -> Answer:
        "Bring a message to the server and wait for its answer; ended early, the call ends the answer."
        kind, _, number = scope.partition(":")
        body = body | ({"group_id": number} if kind == "group" else {})
        headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
        # As ASCII: QQ can hold half of a character of two, which UTF-8 cannot, and the server replaces it.
        request = dict(content=json.dumps(body), headers=headers, timeout=httpx.Timeout(SILENCE_S, connect=10, pool=None))
        with _failures():
            async with asyncio.timeout(self._patience), self._http.stream("POST", f"/api/chat/{kind}", **request) as response:
                await _check(response)
                accepted()
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    return await _last(response.aiter_bytes())
                return _answer(json.loads(await response.aread()))

    async def upload(
        self,
        picture: bytes,
    ) -> str:  # id for `images`
        "Store a picture."
        found = await self._call("POST", "/api/upload", files={"file": ("picture", picture, "application/octet-stream")})
        return str(found["id"])

    async def retract(
        self,
        scope: str,
        message_id: str,
    ) -> bool:  # False: it was not there
        "Delete a message, the answer to it and memories that came from it; if it was merged with others, these as well."
        return bool(await self._call("POST", "/api/messages/retract", json={"scope": scope, "message_id": message_id}, missing_is_fine=True))

    async def memories(
        self,
        subject: str,
        scope: str | None = None,  # None: everywhere
        limit: int = 1000,
    ) -> tuple[list[dict], int]:  # newest first, and how many there are
        "What is remembered of a person."
        params = {"subject": subject, "limit": limit} | ({"scope": scope} if scope else {})
        found = await self._call("GET", "/api/memories", params=params)
        return found["memories"], found["total"]

    async def forget(
        self,
        memory_id: int,
    ) -> None:
        "Delete a memory; one that is not there is no error."
        await self._call("DELETE", f"/api/memories/{memory_id}", missing_is_fine=True)

    async def forget_person(
        self,
        user_id: str,
    ) -> None:
        "Delete all of a person: memories, messages, everywhere."
        await self._call("DELETE", "/api/memories", params={"subject": user_id})

    async def set_learning(
        self,
        user_id: str,
        learning: bool,
    ) -> None:
        "Learn from what this person says, or not."
        await self._call("POST", f"/api/people/{user_id}/learning", json={"learning": learning})

    async def set_paused(
        self,
        scope: str,
        paused: bool,
    ) -> None:
        "Let a chat rest, or go on."
        await self._call("POST", f"/api/chats/{scope}/pause", json={"paused": paused})

    async def ready(self) -> dict:
        "What the server says of itself once its model is loaded."
        await self._call("GET", "/healthz")
        return await self._call("GET", "/readyz")

    async def _call(
        self,
        method: str,
        path: str,
        missing_is_fine: bool = False,
        **request,
    ) -> dict:
        with _failures():
            response = await self._http.request(method, path, **request)
            if response.status_code == 404 and missing_is_fine:
                return {}
            await _check(response)
            return response.json()


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    "Everything that can break on the way, a malformed answer included, is Unavailable."
    try:
        yield
    except (httpx.HTTPError, httpx.StreamError, TimeoutError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error


async def _check(response: httpx.Response) -> None:
    "Raise what a status means."
    if response.is_success:
        return
    body = await response.aread()
    problem = _problem(body)
    if response.status_code in _AWAY:
        raise Unavailable(problem, response.status_code, _seconds(response.headers.get("retry-after", "")), _line(body))
    raise Refused(response.status_code, problem)


def _seconds(text: str) -> float:
    return min(float(text), 60.0) if text.strip().isdigit() else 0.0


def _problem(body: bytes) -> str:
    "What a response about an error says, in one line."
    try:
        return "; ".join(f"{error['field'] or ''} {error['problem']} → {error['remedy']}".strip() for error in json.loads(body)["errors"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def _line(body: bytes) -> str:
    "What a server that is asleep wants people to be told."
    try:
        found = json.loads(body)
        return str(found["reply"]).strip() if found["status"] == "asleep" else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _answer(found: dict) -> Answer:
    return Answer(str(found["status"]), *(str(found.get(name) or "").strip() for name in ("reply", "notice")))


async def _last(chunks: AsyncIterable[bytes]) -> Answer:
    "The answer at the end of a stream of events; Unavailable if there is none, Refused if a field of the message is at fault."
    async for name, data in read_events(chunks):
        if name == "done":
            return _answer(json.loads(data))
        if name == "error":
            problem = _problem(data.encode())
            raise Refused(422, problem) if any(error["field"] for error in json.loads(data)["errors"]) else Unavailable(problem, line=_line(data.encode()))
    raise Unavailable("the stream ended without an answer")


async def read_events(chunks: AsyncIterable[bytes]) -> AsyncIterator[tuple[str, str]]:
    "Name and data of server-sent events. Lines end at line feeds only: a text may hold other characters that Python takes for line ends."
    name, data, rest = "message", [], b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            field, _, value = line.removesuffix(b"\r").decode("utf-8", "replace").partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif not field and not value:
                if data:
                    yield name, "\n".join(data)
                name, data = "message", []


async def download(
    url: str,
    most: int,  # bytes
    timeout: float = 20.0,  # seconds in all
) -> bytes:
    "A picture; ValueError if it is not to be had or too large."
    async with asyncio.timeout(timeout), httpx.AsyncClient(timeout=timeout) as http:
        for _ in range(4):
            if urlsplit(url).scheme not in ("http", "https"):
                raise ValueError("its address is not one of the web")
            async with http.stream("GET", url) as response:
                if response.is_redirect:
                    url = urljoin(url, response.headers["location"])
                    continue
                if not response.is_success:
                    raise ValueError(f"its address answers {response.status_code}")
                return await _read(response, most)
    raise ValueError("its address leads from one to the next")


async def _read(response: httpx.Response, most: int) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > most:
            raise ValueError(f"it has more than {most / 2**20:g} MB")
        parts.append(part)
    return b"".join(parts)
