"""A OneBot v11 message as the model reads it.

The raw event is read here, not ncatbot's classes: those drop the whole message where one segment is unknown, and the names
of stickers in any case.

What others have said (a quoted message, a forwarded chat, the title of a shared thing) stands on a line of its own, in brackets behind
a word such as 引用. By that the server tells it from the sender's own words, which alone become memories: `own_words` in its extract."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MAX_CONTENT = 8000  # characters that the server takes
MAX_QUOTE = 200
QUOTE, LOST_QUOTE = "[引用 ", "[引用了一条消息]"  # as the server looks for them
MAX_FORWARD = 2000
FORWARDED = "[转发的聊天记录]"  # stands for texts that are not there
_ANONYMOUS = "80000000"  # one id for everybody who hides in a group


@dataclass(frozen=True)
class Incoming:
    "One message that somebody sent."

    scope: str  # private:<user_id> or group:<group_id>
    id: str
    user_id: str
    nickname: str  # the card in a group
    role: str  # owner, admin or member in a group
    at: float  # seconds since 1970, whole
    seq: int  # running number in the chat; 0: unknown
    content: str  # what the model reads
    typed: str  # what was typed: text segments only
    images: tuple[str, ...] = ()  # addresses
    at_bot: bool = False
    quote: str = ""  # id of the quoted message
    forward: str = ""  # id of forwarded messages whose texts did not come along

    @property
    def order(self) -> tuple[float, int]:
        "Its place in the chat, whatever order it arrived in."
        return self.at, self.seq


def read_message(event: dict) -> Incoming | None:
    "The message in an event; None for what is not from a person who can be told apart: the bot itself, anonymous, QQ's notices."
    user, bot, sender = str(event.get("user_id", "")), str(event.get("self_id", "")), event.get("sender") or {}
    group = str(event.get("group_id", "")) if event.get("message_type") == "group" else ""
    if not user.isdigit() or user in (bot, _ANONYMOUS) or event.get("sub_type") in ("anonymous", "notice"):
        return None
    segments = list(_segments(event.get("message")))
    quotes = [str(data.get("id", "")) for kind, data in segments if kind == "reply"]
    forwards = [data for kind, data in segments if kind == "forward"]
    return Incoming(
        scope=f"group:{group}" if group else f"private:{user}",
        id=str(event.get("message_id", "")),
        user_id=user,
        nickname=((_one_line(sender.get("card") or "") if group else "") or _one_line(sender.get("nickname") or ""))[:200],
        role=str(sender.get("role") or ""),
        at=float(event.get("time") or 0),
        seq=_number(event.get("real_seq")),
        content=_speak_all(segments, bot)[:MAX_CONTENT],
        typed="".join(str(data.get("text", "")) for kind, data in segments if kind == "text").strip(),
        images=tuple(str(data["url"]) for kind, data in segments if kind == "image" and data.get("url") and not _sticker(data)),
        at_bot=any(kind == "at" and str(data.get("qq")) == bot for kind, data in segments),
        quote=quotes[0] if quotes else "",
        forward=str(forwards[0].get("id") or "") if forwards and not forwards[0].get("content") else "",
    )


def read_forward(messages: Iterable[dict]) -> str:
    "Forwarded messages in one line, nested ones by their label only."
    lines = []
    for message in messages:
        sender, found = message.get("sender") or {}, message.get("message") or message.get("content")
        spoken = "".join("[聊天记录]" if kind == "forward" else _speak(kind, data, "") for kind, data in _segments(found))
        lines.append(_one_line(f"{sender.get('nickname') or '某人'}：{spoken}"))
    return f"{FORWARDED[:-1]}：{shorten(' / '.join(lines), MAX_FORWARD)}]" if lines else FORWARDED


def read_quote(
    name: str,  # who said it
    content: str,
) -> str:
    "A quoted message in one line."
    return f"{QUOTE}{_one_line(name)}：{shorten(_one_line(content), MAX_QUOTE)}]"


def shorten(
    text: str,
    most: int,  # characters
) -> str:
    "The text, cut with a mark where it is too long."
    return text if len(text) <= most else text[: most - 1] + "…"


def _one_line(text) -> str:
    return " ".join(str(text).split())


def _number(value) -> int:
    return int(value) if str(value or "").isdigit() else 0


def _segments(message) -> Iterable[tuple[str, dict]]:
    "Type and data of each segment; anything malformed is left out."
    if isinstance(message, str):
        message = _from_cq(message)
    for segment in message if isinstance(message, list) else [message]:
        if isinstance(segment, dict) and isinstance(segment.get("type"), str):
            data = segment.get("data")
            yield segment["type"], data if isinstance(data, dict) else {}


_CQ = re.compile(r"\[CQ:([^,\]]+)((?:,[^\]]*)?)\]")


def _from_cq(text: str) -> list[dict]:
    "Segments of a message that came as a string (NapCat's messagePostFormat = string)."
    def plain(part: str) -> str:
        for code, char in (("&#91;", "["), ("&#93;", "]"), ("&#44;", ","), ("&amp;", "&")):
            part = part.replace(code, char)
        return part

    found, end = [], 0
    for code in _CQ.finditer(text):
        found.append({"type": "text", "data": {"text": plain(text[end : code.start()])}})
        pairs = (pair.partition("=") for pair in code[2].split(",") if pair)
        found.append({"type": code[1], "data": {key: plain(value) for key, _, value in pairs}})
        end = code.end()
    return [*found, {"type": "text", "data": {"text": plain(text[end:])}}]


def _sticker(data: dict) -> bool:
    "Is this picture a sticker, whose name says more than its pixels?"
    return str(data.get("sub_type", data.get("subType", 0))) not in ("0", "") or bool(data.get("emoji_id"))


def _named(label: str, *keys: str) -> Callable[[dict], str]:
    "How a segment with a name of its own is spoken."
    def speak(data: dict) -> str:
        name = next((str(data[key]) for key in keys if data.get(key)), "")
        return f"[{label}：{shorten(_one_line(name), 80)}]" if name else f"[{label}]"
    return speak


def _bracketed(name) -> str:
    "A sticker's name, in one pair of brackets: /微笑 and [微笑] are both [微笑]."
    return f"[{str(name or '').strip('[]/ ') or '表情'}]"


def _card(data: dict) -> str:
    "A shared card by its title."
    try:
        card = json.loads(data.get("data") or "{}")
        return _named("分享", "prompt", "desc")(card)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "[分享]"


def _forwarded(data: dict) -> str:
    content = data.get("content")
    return read_forward(content) if isinstance(content, list) else FORWARDED


_SPOKEN: dict[str, Callable[[dict], str]] = {
    "text": lambda data: str(data.get("text", "")),
    "face": lambda data: _bracketed((data.get("raw") or {}).get("faceText")),
    "mface": lambda data: _bracketed(data.get("summary")),
    "image": lambda data: _bracketed(data.get("summary")) if _sticker(data) else "[图片]",
    "reply": lambda data: "",  # the quoted text goes along by itself
    "forward": _forwarded,
    "json": _card,
    "miniapp": _card,
    "markdown": lambda data: str(data.get("content", "")),
    "share": _named("分享", "title", "url"),
    "music": _named("音乐", "title"),
    "location": _named("位置", "title", "content"),
    "file": _named("文件", "name", "file"),
    "onlinefile": _named("文件", "fileName"),
    "flashtransfer": _named("文件"),
    "contact": _named("名片"),
    "record": _named("语音"),
    "video": _named("视频"),
    "dice": _named("骰子", "result"),
    "rps": _named("猜拳", "result"),
    "poke": _named("戳一戳"),
    "shake": _named("窗口抖动"),
}


_CARRYING = {"forward", "json", "miniapp", "share", "music", "location", "file", "onlinefile", "flashtransfer"}  # words of others


def _speak_all(segments: list[tuple[str, dict]], bot: str) -> str:
    "A message as text, with what it carries of others on lines of its own."
    text = ""
    for kind, data in segments:
        words = _speak(kind, data, bot)
        text = f"{text.rstrip()}\n{words}\n" if kind in _CARRYING else text + words
    return text.strip()


def _speak(kind: str, data: dict, bot: str) -> str:
    "One segment as text; a type that nobody knows by its name."
    if kind == "at":
        number = str(data.get("qq", ""))
        name = "".join(str(data.get("name") or "").split()).removeprefix("@")  # one word, so that it is seen where it ends
        return "" if bot and number == bot else "@全体成员 " if number == "all" else f"@{name or number} "
    try:
        return _SPOKEN[kind](data) if kind in _SPOKEN else f"[{shorten(kind, 30)}]"
    except (TypeError, ValueError, AttributeError, RecursionError):
        return f"[{shorten(kind, 30)}]"
