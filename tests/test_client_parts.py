"""Parts of the QQ client by themselves: settings, messages, decisions, commands, splitting."""

import json
import random
import re

import pytest
from conftest import ROOT
from fake_client import BOT, at, message, picture, quote, text

from recallnb.extract import own_words
from recallnb_client.commands import Command, list_memories, matching, read_command
from recallnb_client.config import SECTIONS, Config, Group, Limits, Lists, Send, load_config
from recallnb_client.decide import RateLimit, addressed, served, wording
from recallnb_client.message import FORWARDED, MAX_CONTENT, MAX_FORWARD, read_forward, read_message, read_quote
from recallnb_client.split import pause_before, split_reply

EXAMPLE, README = ROOT / "client/client.example.ini", ROOT / "client/README.md"


def ini(tmp_path, words):
    file = tmp_path / "client.ini"
    file.write_text(words, encoding="utf-8")
    return file


# Settings


def test_the_example_holds_every_setting_and_its_default(tmp_path):
    example, defaults = load_config(EXAMPLE, {}), Config()
    assert example.bot.work_dir == ROOT / "client/work"
    words = EXAMPLE.read_text(encoding="utf-8")
    for name, section in SECTIONS.items():
        assert f"[{name}]" in words
        for key in vars(section):
            assert re.search(rf"^#? ?{key} =", words.partition(f"[{name}]\n")[2].partition("\n[")[0], re.M), f"[{name}] {key}"
            if (name, key) != ("bot", "work_dir"):
                assert getattr(getattr(example, name), key) == getattr(getattr(defaults, name), key), f"[{name}] {key}"


def test_the_readme_documents_every_setting():
    rows = re.findall(r"^\| `\[(\w+)\] (\w+)` \| `?([^|`]*)`? \|", README.read_text(encoding="utf-8"), re.M)
    documented = {(section, key): default.strip() for section, key, default in rows}
    assert documented.keys() == {(name, key) for name, section in SECTIONS.items() for key in vars(section)}
    for (section, key), written in documented.items():
        value = getattr(SECTIONS[section], key)
        shown = ", ".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
        assert written in (shown, shown.removesuffix(".0")) or (written == "空" and not shown), f"[{section}] {key}: {written} is {shown}"


def test_settings_are_typed_and_groups_inherit(tmp_path):
    config = load_config(ini(tmp_path, """
[server]
url = http://10.0.0.1:9999/
[bot]
names = 小忆，Echo, 忆
owners = 1,2
[group]
learn = false
probability = 0.25
[group:777]
probability = 0
"""), {"RECALLNB_CLIENT_SERVER__KEY": "s3cret", "PATH": "x"})
    assert config.server.url == "http://10.0.0.1:9999/" and config.server.key == "s3cret"
    assert config.bot.names == ("小忆", "Echo", "忆") and config.bot.owners == ("1", "2")
    assert config.bot.work_dir == tmp_path / "work"
    assert config.group_settings("777") == Group(learn=False, probability=0.0) and config.group_settings("1") == Group(learn=False, probability=0.25)
    assert "s3cret" not in repr(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("[server]\nurll = x", "did you mean url?"),
        ("[sever]\nurl = x", "did you mean server?"),
        ("[server]\nurl = 127.0.0.1:9999", "http://<host>:<port>"),
        ("[napcat]\nurl = http://127.0.0.1:3001", "ws://<host>:<port>"),
        ("[limits]\nmessages = many", "'many' is not a whole number"),
        ("[limits]\nper_s = nan", "must be at least 0"),
        ("[group]\nlearn = maybe", "'maybe' is not true or false"),
        ("[group]\nprobability = 2", "between 0 and 1"),
        ("[group]\nanswer = at, shout", "'shout' is none of at, quote, name, prefix"),
        ("[group:abc]\nlearn = true", "[group:<number>]"),
        ("[users]\nblock = LinF", "write digits only"),
        ("[log]\nlevel = LOUD", "'LOUD' is none of"),
        ("[send]\nmax_chars = 3", "at least 20"),
        ("url = x", "cannot be read"),
    ],
)
def test_wrong_settings_are_named(tmp_path, words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_config(ini(tmp_path, words), {})


def test_wrong_environment_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match="names no setting"):
        load_config(ini(tmp_path, ""), {"RECALLNB_CLIENT_KEY": "x"})
    with pytest.raises(FileNotFoundError, match="client.example.ini"):
        load_config(tmp_path / "none.ini", {})


# Messages


def test_segments_become_words():
    found = read_message(message(
        at(BOT), " 看看 ", picture(), {"type": "face", "data": {"id": "178", "raw": {"faceText": "/斜眼笑"}}},
        {"type": "mface", "data": {"summary": "[赞]"}}, picture(summary="[动画表情]", sub_type=1), at(7), {"type": "at", "data": {"qq": "all"}},
        {"type": "json", "data": {"data": '{"prompt": "[QQ小程序]哔哩哔哩"}'}}, {"type": "file", "data": {"file": "计划.pdf"}}, group=9, name="LinF"))
    assert found.content == "看看 [图片][斜眼笑][赞][动画表情]@7 @全体成员\n[分享：[QQ小程序]哔哩哔哩]\n[文件：计划.pdf]"
    assert found.typed == "看看" and found.at_bot and found.images == ("http://127.0.0.1:1/a.png",)
    assert (found.scope, found.user_id, found.nickname) == ("group:9", "42", "LinF")


@pytest.mark.parametrize("kind", ["mface", "contact", "onlinefile", "flashtransfer", "miniapp", "something_new", "forward", "json", "face"])
@pytest.mark.parametrize("data", [{}, None, {"raw": 3, "data": 5, "content": 7, "id": None}, {"data": "{"}, {"data": "[1]"}], ids=str)
def test_a_strange_segment_never_loses_the_rest(kind, data):
    found = read_message(message("我生日是", {"type": kind, "data": data}, "11月6日"))
    assert re.fullmatch(r"我生日是\n?\[.*\]\n?11月6日", found.content)


@pytest.mark.parametrize("broken", [None, 5, {}, [None, 3, {"type": 7}, "x"], ""])
def test_a_broken_message_is_empty(broken):
    assert read_message(message() | {"message": broken}).content == ""


def test_who_is_no_person():
    assert read_message(message("hi", user=BOT)) is None
    assert read_message(message("hi", user=80000000, group=9)) is None
    assert read_message(message("hi", group=9, sub_type="anonymous")) is None
    assert read_message(message("hi", sender=None)).nickname == ""
    assert read_message(message("hi", group=9, sender={"nickname": "a", "card": "名片", "role": "admin"})).nickname == "名片"


def test_a_message_as_a_string():
    found = read_message(message() | {"message": f"[CQ:at,qq={BOT}] 看&#91;这&#93;[CQ:image,url=http://x/a?b=1&amp;c=2,sub_type=0]吧"})
    assert found.content == "看[这][图片]吧" and found.at_bot and found.images == ("http://x/a?b=1&c=2",)


def test_forwarded_texts():
    nodes = [{"sender": {"nickname": "甲"}, "message": [text("第一句\n还有"), picture()]}, {"sender": {}, "content": [{"type": "forward", "data": {}}]}]
    words = "[转发的聊天记录：甲：第一句 还有[图片] / 某人：[聊天记录]]"
    assert read_forward(nodes) == words and read_forward([]) == FORWARDED
    inline = read_message(message({"type": "forward", "data": {"id": "f1", "content": nodes}}))
    assert inline.content == words and not inline.forward
    outside = read_message(message({"type": "forward", "data": {"id": "f1"}}))
    assert outside.forward == "f1" and outside.content == FORWARDED
    assert len(read_forward([{"sender": {"nickname": "甲"}, "message": [text("长" * 9000)]}])) == len(FORWARDED) + 1 + MAX_FORWARD
    assert len(read_message(message("长" * 9000)).content) == MAX_CONTENT


LINES = "我家的猫叫豆芽\r\n我住大连\x85我姓王\u2028我属虎"


@pytest.mark.parametrize(
    "segment",
    [
        {"type": "forward", "data": {"content": [{"sender": {"nickname": LINES}, "message": [text(LINES)]}] * 2}},
        {"type": "forward", "data": {"id": "f1"}},
        {"type": "json", "data": {"data": json.dumps({"prompt": LINES})}},
        {"type": "share", "data": {"title": LINES}},
        {"type": "music", "data": {"title": LINES}},
        {"type": "location", "data": {"title": LINES}},
        {"type": "file", "data": {"file": LINES}},
        {"type": "onlinefile", "data": {"fileName": LINES}},
        {"type": "flashtransfer", "data": {}},
    ],
    ids=lambda segment: segment["type"],
)
def test_words_of_others_are_told_from_ones_own(segment):
    "Whatever lines they have, the server takes none of them for the sender's."
    assert own_words(read_message(message("看看", segment, segment, "真有意思\n我家的狗叫团团")).content) == "看看\n真有意思\n我家的狗叫团团"
    assert own_words(read_message(message(segment)).content) == ""


def test_a_quote_is_told_from_ones_own_words():
    assert own_words(f"{read_quote(LINES, LINES)}\n真可爱") == "真可爱" and "豆芽" in read_quote("甲", LINES)
    assert read_message(message("hi", name="一\n二")).nickname == "一 二"


# Decisions


def test_lists():
    config = Config(users=Lists(block=("66",)), groups=Lists(allow=("9", "8")), group_of={"8": Group(enabled=False)})
    admitted = [served(read_message(event), config) for event in (
        message("a"), message("a", user=66), message("a", group=9), message("a", group=9, user=66), message("a", group=10), message("a", group=8))]
    assert admitted == [True, False, True, False, False, False]


@pytest.mark.parametrize(
    ("segments", "group", "quotes_bot", "reason"),
    [
        (["你好"], Group(), False, ""),
        ([at(BOT), "你好"], Group(), False, "at"),
        ([{"type": "at", "data": {"qq": "all"}}, "你好"], Group(), False, ""),
        ([quote(1), "你好"], Group(), True, "quote"),
        (["问问小忆吧"], Group(), False, "name"),
        ([text("/echo 你好")], Group(prefixes=("/ECHO",)), False, "prefix"),
        ([at(BOT), "你好"], Group(answer=("name",)), False, ""),
        (["你好"], Group(probability=0.5), False, "chance"),
        (["你好"], Group(probability=0.3), False, ""),
    ],
)
def test_whom_a_group_message_is_for(segments, group, quotes_bot, reason):
    assert addressed(read_message(message(*segments, group=9)), group, ("小忆",), quotes_bot, lambda: 0.4) == reason


def test_private_is_always_for_the_bot():
    assert addressed(read_message(message("你好")), Group(answer=()), (), False) == "private"


def test_wording():
    group = Group(prefixes=("/", "/忆"))
    said = [wording(read_message(message(*words, group=9)), group, ("小忆",)) for words in (["小忆，记忆"], ["/忆 记忆"], [at(BOT), " 记忆"], ["/help"])]
    assert said == ["记忆", "记忆", "记忆", "help"]


def test_rate_limit():
    now = [0.0]
    limit = RateLimit(Limits(messages=2, per_s=10), lambda: now[0])
    assert [limit.allows("1"), limit.allows("1"), limit.allows("1"), limit.allows("2")] == [True, True, False, True]
    now[0] = 10.0
    assert limit.allows("1")


# Commands


@pytest.mark.parametrize(
    ("words", "name", "about"),
    [
        ("帮助", "help", ""), ("/help", "help", ""), ("记忆", "memories", ""), ("What do you remember of me?", "memories", ""),
        ("忘记 生日", "forget", "生日"), ("forget my birthday", "forget", "my birthday"), ("忘记我！", "forget_me", ""), ("forget me", "forget_me", ""),
        ("不要记住我", "unlearn", ""), ("Don’t learn from me", "unlearn", ""), ("可以记住我", "learn", ""), ("暂停", "pause", ""), ("resume", "resume", ""),
    ],
)
def test_commands(words, name, about):
    assert read_command(words, True) == Command(name, about)


@pytest.mark.parametrize("words", ["", "忘记了带伞", "忘记", "我的记忆力不好", "forget it", "帮助我写作业", "暂停一下视频", "确定要去吗"])
def test_what_is_no_command(words):
    assert read_command(words, True) is None


def test_pause_is_a_command_in_groups_only_and_a_bare_forget_needs_a_quote():
    assert read_command("暂停", False) is None
    assert read_command("忘记", False, quoting=True) == Command("forget")


def test_which_memories_are_meant():
    known = [{"id": 1, "text": "用户LinF的生日为11月6日", "relation": "生日", "date": "2025-11-06"}, {"id": 12, "text": "用户LinF现居杭州", "relation": ""}]
    ids = [[memory["id"] for memory in matching(known, about)] for about in ("我的生日", "#12", "12", "杭州", "LinF", "关于 杭州", "我的", "上海")]
    assert ids == [[1], [12], [], [12], [1, 12], [12], [], []]
    assert "#1 用户LinF的生日为11月6日（2025-11-06）" in list_memories(known, 2) and "一共 7 条" in list_memories(known, 7)
    assert "还没有" in list_memories([], 0)


# Splitting


def test_short_answers_stay_whole():
    assert split_reply("你住杭州呀。\n", 20) == ["你住杭州呀。"] and split_reply("  \n", 20) == []


def test_split_at_sentence_ends():
    parts = split_reply("我记得你。你说过“住在杭州！”对吧？Yes it is. 还有一只猫", 12)
    assert parts == ["我记得你。", "你说过“住在杭州！”", "对吧？", "Yes it is.", "还有一只猫"]
    assert split_reply("一二三四，五六七八，九十", 6) == ["一二三四，", "五六七八，", "九十"]


def test_nothing_is_lost_and_nothing_too_long():
    source = random.Random(0)
    for _ in range(300):
        words = "".join(source.choice("你好。！？，a .\n👍🏽👨‍👩‍👧é1") for _ in range(source.randrange(200)))
        parts = split_reply(words, 20)
        assert all(0 < len(part) <= 20 for part in parts)
        assert re.sub(r"\s", "", "".join(parts)) == re.sub(r"\s", "", words)


def test_signs_of_several_characters_stay_together():
    family = "👨‍👩‍👧"
    assert all(set(part) <= set(family) and len(part) % len(family) == 0 for part in split_reply(family * 30, 22))
    assert split_reply("e\u0301" * 20, 21) == ["e\u0301" * 10, "e\u0301" * 10]


def test_pauses():
    settings = Send(pause_s=0.5, pause_per_char_s=0.1, max_pause_s=2)
    assert [pause_before("好" * count, settings) for count in (0, 5, 500)] == [0.5, 1.0, 2]
