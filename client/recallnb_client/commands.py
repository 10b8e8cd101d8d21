"""What people can order in a chat, in Chinese and English.

Whom an order is about is never taken from its words: it is the sender, by id."""

import re
from dataclasses import dataclass

from .message import shorten

_ADMIN = {"pause", "resume"}  # in groups, by the group's admins and the owners
_WORDS = {
    "help": "帮助 help 菜单 指令",
    "memories": "记忆 我的记忆 memories memory 你记得我什么 你还记得我什么",
    "forget_me": "忘记我 忘了我 忘掉我",
    "unlearn": "不要记住我 别记住我 不要记我 stop_learning",
    "learn": "可以记住我 记住我吧 start_learning",
    "pause": "暂停 pause",
    "resume": "恢复 resume",
    "yes": "确定 确认 yes",
}
_KNOWN = {word.replace("_", " "): name for name, words in _WORDS.items() for word in words.split()} | {
    "forget me": "forget_me", "what do you remember of me": "memories", "what do you remember about me": "memories",
    "do not learn from me": "unlearn", "don't learn from me": "unlearn", "you may learn from me": "learn",
}
_FORGET = re.compile(r"(?:忘记|忘掉|forget)(?:\s+(?!it$|about it$)(.+))?", re.I | re.S)

HELP = """我能听懂这些指令（群里请先 @ 我）：
记忆：看看我记得你什么
忘记 内容：忘掉一条，例如「忘记 生日」或「忘记 #12」；引用自己的一条消息说「忘记」，就忘掉那条消息
忘记我：忘掉关于你的一切（会先问一次）
不要记住我 / 可以记住我：以后不学 / 可以学你说的话
暂停 / 恢复：群里由群主和管理员使用
English: help, memories, forget …, forget me, do not learn from me, you may learn from me, pause, resume"""


@dataclass(frozen=True)
class Command:
    "An order."

    name: str  # help, memories, forget, forget_me, unlearn, learn, pause, resume, yes
    about: str = ""  # what to forget


def read_command(
    words: str,  # without @, prefix and name
    group: bool,
    quoting: bool = False,  # does the message quote another?
) -> Command | None:
    "The order in these words, if they are one and nothing else; a bare 忘记 is one only beside a quoted message."
    plain = re.sub(r"[\s。.!！?？~]+$", "", words).removeprefix("/").strip()
    name = _KNOWN.get(re.sub(r"\s+", " ", plain.lower().replace("’", "'")))
    if name:
        return Command(name) if group or name not in _ADMIN else None
    found = _FORGET.fullmatch(plain)
    return Command("forget", (found[1] or "").strip()) if found and (found[1] or quoting) else None


def matching(
    memories: list[dict],  # of the sender
    about: str,  # what to forget
) -> list[dict]:
    "Those that are meant: by number, or because every word is in them."
    if number := re.fullmatch(r"#\s*(\d+)", about):
        return [memory for memory in memories if memory["id"] == int(number[1])]
    words = re.sub(r"^(关于|about\s+)?(我的|我|my\s+)?", "", about.lower()).split()
    return [memory for memory in memories if words and all(word in f"{memory['text']} {memory.get('relation', '')}".lower() for word in words)]


def list_memories(
    memories: list[dict],  # of the sender
    total: int,
    most: int = 30,  # shown
) -> str:
    "Memories as a reply."
    if not memories:
        return "我还没有记住关于你的事。"
    lines = [f"#{memory['id']} {shorten(memory['text'], 100)}" + (f"（{memory['date']}）" if memory.get("date") else "") for memory in memories[:most]]
    more = [f"……一共 {total} 条"] if total > len(lines) else []
    return "\n".join(["我记得这些：", *lines, *more, "说「忘记 #编号」就忘掉一条。"])
