"""What the QQ client does with messages, between a QQ and a server without a network."""

import asyncio
import logging
from dataclasses import replace

import pytest
from fake_client import ASLEEP, AWAY, BOT, QUICK, FakeQQ, FakeServer, at, message, picture, quote, recalled, staged, text

from recallnb_client import chat as chat_module
from recallnb_client.chat import GIVEN_UP, NOTICE, TOO_MUCH
from recallnb_client.client import TOO_FAST, Client
from recallnb_client.config import Config, Group, Limits, Lists, Send, Server
from recallnb_client.port import Away, NotSent, Unconfirmed
from recallnb_client.server import Answer, Refused, Unavailable

GROUP = "group:9"


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    "Waits between tries are not what is tested."
    monkeypatch.setattr(chat_module, "delays", lambda *_: iter([0.01] * 1000))


# What is forwarded and answered


def test_private_is_answered():
    async def scenario(stage):
        event = message("你好")
        assert await stage.tell(event) == [("private:42", "听到：你好", "")]
        assert stage.server.history == [("private:42", {
            "user_id": "42", "user_nickname": "LinF", "content": "你好", "timestamp": float(event["time"]), "message_id": str(event["message_id"]), "mentioned": True})]
    staged(scenario)


def test_group_answers_quote_and_others_are_only_stored():
    async def scenario(stage):
        ask = message(at(BOT), " 你好", group=9)
        await stage.tell(message("今天真热", group=9, user=7), ask)
        assert stage.qq.sent == [(GROUP, "听到：你好", str(ask["message_id"]))]
        assert [(body["content"], body["mentioned"]) for _, body in stage.server.history] == [("今天真热", False), ("你好", True)]
    staged(scenario)


def test_a_group_that_does_not_learn_sends_only_what_is_for_the_bot():
    async def scenario(stage):
        await stage.tell(message("今天真热", group=9, user=7), message("小忆你好", group=9))
        assert stage.server.contents() == ["小忆你好"]
    staged(scenario, group=Group(learn=False))


def test_lists_keep_people_and_groups_away():
    async def scenario(stage):
        await stage.tell(message("a", user=66), message(at(BOT), "a", group=8), message("b", user=67))
        assert stage.server.contents() == ["b"]
    staged(scenario, users=Lists(block=("66",)), groups=Lists(allow=("9",)))


def test_a_chance_answer():
    async def scenario(stage):
        await stage.tell(message("今天真热", group=9))
        assert stage.server.asked == ["今天真热"]
    staged(scenario, draw=lambda: 0.1, group=Group(probability=0.2))


def test_nothing_but_an_at():
    async def scenario(stage):
        await stage.tell(message(at(BOT), group=9), message(user=43))
        assert stage.server.contents() == stage.server.asked == ["[叫了你一声]"]
    staged(scenario)


def test_delivered_twice_is_answered_once():
    async def scenario(stage):
        event = message("你好")
        await stage.tell(event, event)
        await stage.tell(event)
        assert len(stage.qq.sent) == 1 and stage.server.contents() == ["你好"]
    staged(scenario)


def test_quotes_go_along_and_quoting_the_bot_is_calling_it():
    async def scenario(stage):
        said = message("我家的猫叫豆芽", group=9, user=7, name="甲")
        await stage.tell(said, message(quote(said["message_id"]), at(BOT), "真可爱", group=9))
        await stage.tell(message(quote("b1"), "再说一次", group=9))
        stage.qq.messages["77"] = message("很久以前", group=9, user=BOT)
        await stage.tell(message(quote(77), "什么意思", group=9), message(quote(78), at(BOT), "这个呢", group=9))
        assert stage.server.contents() == [
            "我家的猫叫豆芽", "[引用 甲：我家的猫叫豆芽]\n真可爱", "[引用 小忆：听到：[引用 甲：我家的猫叫豆芽] 真可爱]\n再说一次",
            "[引用 小忆：很久以前]\n什么意思\n[引用了一条消息]\n这个呢"]
    staged(scenario)


def test_forwarded_texts_go_along():
    async def scenario(stage):
        stage.qq.forwards["f1"] = [{"sender": {"nickname": "甲"}, "message": [text("周六去爬山")]}]
        await stage.tell(message({"type": "forward", "data": {"id": "f1"}}), message({"type": "forward", "data": {"id": "f2"}}, user=43))
        assert stage.server.contents() == ["[转发的聊天记录：甲：周六去爬山]", "[转发的聊天记录]"]
    staged(scenario)


# Parts that belong together


@pytest.fixture
def pictures(monkeypatch):
    "Pictures come from here instead of the network: a function that gives or raises something for an address."
    async def download(url, most):
        if url.endswith("large.png"):
            raise ValueError(f"it has more than {most / 2**20:g} MB")
        return url.encode()
    monkeypatch.setattr(chat_module, "download", download)


def test_a_picture_and_its_text_are_one_turn(pictures):
    async def scenario(stage):
        await stage.tell(message(picture("http://x/1.png"), group=9), message(at(BOT), "这是什么", group=9))
        assert stage.server.asked == ["[图片]\n这是什么"] and stage.server.uploads == [b"http://x/1.png"]
        assert stage.server.history[0][1]["images"] == ["u1"] and len(stage.qq.sent) == 1
    staged(scenario)


def test_people_are_not_mixed_and_order_is_kept():
    async def scenario(stage):
        await stage.tell(*(message(f"{user}{part}", group=9, user=user) for part in "ab" for user in (7, 8)), message(at(BOT), "c", group=9, user=7))
        assert stage.server.contents() == ["7a\n7b\nc", "8a", "8b"] and stage.server.asked == ["7a\n7b\nc"]
    staged(scenario)


def test_a_burst_keeps_every_id():
    "An id has room for eleven of QQ's: what is taken back later must be found."
    async def scenario(stage):
        burst = [message(at(BOT), f"第{number}句", group=9) | {"message_id": 2_000_000_000 + number} for number in range(13)]
        await stage.tell(*burst)
        ids = [one["message_id"] for _, one in stage.server.history]
        assert [id for joined in ids for id in joined.split("+")] == [str(one["message_id"]) for one in burst] and max(map(len, ids)) <= 128
    staged(scenario)


def test_pictures_of_a_quoted_message_and_pictures_that_cannot_be_had(pictures):
    async def scenario(stage):
        shown = message(picture("http://x/1.png"), picture("http://x/large.png"), group=9, user=7)
        await stage.tell(shown)
        assert not stage.server.uploads
        await stage.tell(message(quote(shown["message_id"]), at(BOT), "这是什么", group=9))
        assert stage.server.uploads == [b"http://x/1.png"] and stage.server.history[-1][1]["images"] == ["u1"]
    staged(scenario)


def test_at_most_so_many_pictures(pictures):
    async def scenario(stage):
        await stage.tell(message(*(picture(f"http://x/{number}.png") for number in range(9))))
        assert len(stage.server.uploads) == 4
    staged(scenario)


def test_parts_in_the_wrong_order_are_put_right():
    async def scenario(stage):
        first, second = message("第一"), message("第二")
        await stage.tell(second, first)
        assert stage.server.contents() == ["第一\n第二"]
    staged(scenario)


# Interruption


def test_a_newer_message_ends_the_answer_at_once():
    async def scenario(stage):
        _, started = stage.server.hold("慢")
        stage.receive(message("慢慢说"))
        await started.wait()
        await stage.tell(message("算了，快点"))
        assert stage.qq.texts() == ["听到：算了，快点"] and stage.server.contents() == ["慢慢说", "算了，快点"]
    staged(scenario)


def test_interrupted_before_the_server_had_it():
    "It is brought there all the same, before the newer one, to be learned from."
    async def scenario(stage):
        going, say = asyncio.Event(), stage.server.say

        async def slow(scope, body, accepted):
            if body["content"] == "一" and body["mentioned"]:
                going.set()
                await asyncio.Event().wait()
            return await say(scope, body, accepted)
        stage.server.say = slow
        stage.receive(message("一"))
        await going.wait()
        await stage.tell(message("二"))
        assert [(body["content"], body["mentioned"]) for _, body in stage.server.history] == [("一", False), ("二", True)]
    staged(scenario)


def test_another_chat_is_not_disturbed():
    async def scenario(stage):
        gate, started = stage.server.hold("慢")
        stage.receive(message("慢慢说"))
        await started.wait()
        stage.receive(message("你好", user=43), message("今天真热", group=9, user=42))
        gate.set()
        await stage.settle()
        assert set(stage.qq.texts()) == {"听到：慢慢说", "听到：你好"}
    staged(scenario)


def test_what_is_not_for_the_bot_interrupts_nothing():
    async def scenario(stage):
        gate, started = stage.server.hold("慢")
        stage.receive(message(at(BOT), "慢慢说", group=9))
        await started.wait()
        stage.receive(message("今天真热", group=9, user=7))
        await stage.bundled()
        gate.set()
        await stage.settle()
        assert stage.qq.texts() == ["听到：慢慢说"] and stage.server.contents() == ["慢慢说", "今天真热"]
    staged(scenario)


def test_after_some_interruptions_an_answer_is_finished():
    "Each message comes while the one before it is being answered; the third answer is brought to its end, and then the newest."
    async def scenario(stage):
        gate, started = stage.server.hold("慢")
        for number in range(3):
            stage.receive(message(at(BOT), f"慢{number}!", group=9))
            await started.wait()
            started.clear()
        for number in (3, 4):
            stage.receive(message(at(BOT), f"慢{number}!", group=9, user=number))
        await stage.bundled()
        assert stage.qq.texts() == []
        gate.set()
        await stage.settle()
        assert [words[-3:] for words in stage.qq.texts()] == ["慢2!", "慢4!"]
        assert [content[-3:] for content in stage.server.contents(GROUP)] == ["慢0!", "慢1!", "慢2!", "慢3!", "慢4!"]
    staged(scenario, limits=Limits(debounce_s=0.01, interruptions=2))


def test_a_group_whose_every_question_is_overtaken_before_it_is_asked_still_gets_answers():
    async def scenario(stage):
        stage.receive(*[message(at(BOT), f"{number}!", group=9, user=10 + number) for number in range(6)])
        await stage.settle()
        assert [words[-2:] for words in stage.qq.texts()] == ["1!", "3!", "5!"]
    staged(scenario, limits=Limits(debounce_s=0.01, interruptions=2))


def test_an_answer_that_was_overtaken_is_not_sent():
    "The newer message comes in the moment in which the answer is there."
    async def scenario(stage):
        def reply(body):
            if body["content"] == "一":
                stage.receive(message("二"))
            return body["content"]
        stage.server.reply = reply
        await stage.tell(message("一"))
        assert stage.qq.texts() == ["二"]
    staged(scenario)


def test_a_newer_message_ends_an_answer_between_its_parts():
    async def scenario(stage):
        stage.server.reply = lambda body: "这是很长很长很长很长的第一句话呀。这是很长很长很长很长的第二句话呀。" if body["content"] == "一" else "好"
        stage.receive(message("一"))
        while not stage.qq.sent:
            await asyncio.sleep(0.005)
        await stage.tell(message("停"))
        assert stage.qq.texts() == ["这是很长很长很长很长的第一句话呀。", "好"]
    staged(scenario, send=Send(max_chars=20, pause_s=30, max_pause_s=30))


def test_a_message_that_arrives_late_is_stored_and_not_answered():
    async def scenario(stage):
        late, newer = message("早的"), message("晚的")
        await stage.tell(newer)
        await stage.tell(late)
        assert stage.server.asked == ["晚的"] and stage.server.contents() == ["晚的", "早的"]
    staged(scenario)


def test_an_answer_that_the_server_interrupted_is_not_sent():
    async def scenario(stage):
        async def say(scope, body, accepted):
            accepted()
            return Answer("interrupted")
        stage.server.say = say
        assert await stage.tell(message("你好")) == []
    staged(scenario)


# A server that is away


def test_messages_wait_for_the_server_in_order():
    async def scenario(stage):
        stage.server.faults = [AWAY] * 5
        await stage.tell(message("一", group=9), message("小忆，二", group=9, user=7), message("三", group=9, user=8))
        assert stage.server.contents() == ["一", "小忆，二", "三"] and stage.qq.texts() == ["听到：小忆，二"]
    staged(scenario, server=Server(notice_after_s=60))


def test_a_polite_line_once_per_absence():
    async def scenario(stage):
        stage.server.faults = [AWAY] * 5
        await stage.tell(message("一"))
        assert stage.qq.texts() == [NOTICE, "听到：一"]
        stage.server.faults = [AWAY] * 2
        await stage.tell(message("二"))
        assert stage.qq.texts()[2:] == [NOTICE, "听到：二"]
    staged(scenario)


def test_what_was_not_for_the_bot_gets_no_polite_line():
    async def scenario(stage):
        stage.server.faults = [AWAY] * 5
        await stage.tell(message("一", group=9))
        assert stage.qq.sent == [] and stage.server.contents() == ["一"]
    staged(scenario)


def test_a_polite_line_for_a_question_behind_what_was_not_for_the_bot():
    "Neither the line nor giving up waits until what stands before it has been given up."
    async def scenario(stage):
        stage.server.faults, began = [AWAY] * 1000, asyncio.get_running_loop().time()
        ask = message(at(BOT), "在吗", group=9)
        stage.receive(message("一", group=9, user=7), message("二", group=9, user=8), ask)
        await stage.until(lambda: stage.qq.sent)
        assert stage.qq.sent == [(GROUP, NOTICE, str(ask["message_id"]))] and asyncio.get_running_loop().time() - began < 1
        await stage.settle()
        assert stage.qq.texts() == [NOTICE, GIVEN_UP] and asyncio.get_running_loop().time() - began < 4 and not stage.server.history
    staged(scenario, server=Server(notice_after_s=0.1, give_up_s=2))


def test_given_up_after_a_while():
    async def scenario(stage):
        stage.server.faults = [AWAY] * 100
        await stage.tell(message("一"))
        assert stage.qq.texts() == [GIVEN_UP] and len(stage.server.faults) > 50
    staged(scenario, server=Server(notice_after_s=60, give_up_s=0.05))


def test_a_server_that_is_asleep_says_so_itself():
    "With its own line, once; and no message is given up, however long the night is."
    async def scenario(stage):
        stage.server.faults = [Unavailable("asleep", 503, line="我在整理记忆。")] * 100
        await stage.tell(message("一"))
        assert stage.qq.texts() == ["我在整理记忆。", "听到：一"]
    staged(scenario, server=Server(notice_after_s=60, give_up_s=0.05))


def test_one_question_to_a_server_that_sleeps_holds_up_nobody():
    "What is not for the bot needs no model: it arrives, and none of it is dropped. The question is answered in the morning, once."
    async def scenario(stage):
        stage.server.asleep = True
        ask = message(at(BOT), "你好", group=9)
        stage.receive(ask)
        await stage.until(lambda: stage.server.tries.count("你好") > 3)
        stage.receive(*(message(f"{number}", group=9, user=100 + number) for number in range(30)))
        await stage.until(lambda: len(stage.server.contents()) == 31)
        assert stage.server.contents() == ["你好", *map(str, range(30))]
        tries = len(stage.server.tries)
        await stage.until(lambda: len(stage.server.tries) > tries + 3)
        assert stage.qq.sent == [(GROUP, ASLEEP, str(ask["message_id"]))]
        stage.server.asleep = False
        await stage.settle()
        assert stage.server.asked == ["你好"] and stage.qq.texts() == [ASLEEP, "听到：你好"]
        assert len(stage.server.history) == 31 and stage.client._chats[GROUP]._turns == []
        stage.server.asleep = True
        stage.receive(message(at(BOT), "晚安", group=9))
        await stage.until(lambda: stage.server.tries.count("晚安") > 3)
        assert stage.qq.texts()[2:] == [ASLEEP]  # the next night is said again
    staged(scenario, limits=Limits(debounce_s=0.01, waiting=40))


def test_of_several_questions_to_a_server_that_sleeps_the_newest_is_answered():
    "All are there at once, in order, and one line is said; however many there were, none comes before a newer one in the morning."
    async def scenario(stage):
        stage.server.asleep = True
        for number in range(5):
            stage.receive(message(at(BOT), f"{number}", group=9, user=100 + number))
            await stage.until(lambda: f"{number}" in stage.server.contents())
        await stage.until(lambda: stage.server.tries.count("4") > 3 and len(stage.client._chats[GROUP]._turns) == 1)
        assert stage.server.contents() == list("01234") and stage.qq.texts() == [ASLEEP]
        stage.server.asleep = False
        await stage.settle()
        assert stage.server.asked == ["4"] and stage.qq.texts() == [ASLEEP, "听到：4"] and len(stage.server.history) == 5
    staged(scenario, limits=Limits(debounce_s=0.01, interruptions=1))


def test_a_sleep_does_not_count_as_an_absence():
    "Nobody is told a second time, however long it lasts, and what comes between is no sign that it is over."
    async def scenario(stage):
        stage.server.asleep = True
        stage.receive(message(at(BOT), "一", group=9))
        for number in range(5):
            stage.receive(message(f"听{number}", group=9, user=7))
            await stage.until(lambda: f"听{number}" in stage.server.contents())
            tries = stage.server.tries.count("一")
            await stage.until(lambda: stage.server.tries.count("一") > tries + 2)
        assert stage.qq.texts() == [ASLEEP]
        stage.server.asleep = False
        await stage.settle()
        assert stage.qq.texts() == [ASLEEP, "听到：一"]
    staged(scenario, server=Server(notice_after_s=60, give_up_s=0.01))


def test_a_client_that_is_closed_while_the_server_sleeps_leaves_nothing(monkeypatch):
    monkeypatch.setattr(chat_module, "delays", lambda *_: iter([3600.0] * 9))

    async def scenario(stage):
        stage.server.asleep = True
        stage.receive(message("你好"))
        await stage.until(lambda: stage.client._chats and not stage.client._chats["private:42"].lane._task and stage.server.tries)
        (turn,) = stage.client._chats["private:42"]._turns
        assert turn.alarm and not turn.alarm.cancelled()
        await stage.client.close()
        assert turn.alarm.cancelled() and asyncio.all_tasks() == {asyncio.current_task()}
    staged(scenario)


def test_a_superseded_message_is_brought_to_the_server_all_the_same():
    "The server is away; a newer message comes; both arrive, in order, and only the newer one is answered."
    async def scenario(stage):
        back, tried = asyncio.Event(), asyncio.Event()
        say = stage.server.say

        async def away(*arguments):
            tried.set()
            if not back.is_set():
                raise AWAY
            return await say(*arguments)
        stage.server.say = away
        stage.receive(message("一"))
        await tried.wait()
        stage.receive(message("二"))
        await stage.heard()
        back.set()
        await stage.settle()
        assert [(body["content"], body["mentioned"]) for _, body in stage.server.history] == [("一", False), ("二", True)]
        assert stage.qq.texts() == ["听到：二"]
    staged(scenario, server=Server(notice_after_s=60))


@pytest.mark.parametrize(("status", "said"), [(413, [TOO_MUCH]), (422, [TOO_MUCH]), (404, [])])
def test_what_the_server_refuses_is_not_tried_again(status, said):
    async def scenario(stage):
        stage.server.faults = [Refused(status, "no")]
        await stage.tell(message("一"))
        assert stage.qq.texts() == said and stage.server.faults == []
    staged(scenario)


def test_a_full_queue_drops_what_was_not_for_the_bot_first(caplog):
    async def scenario(stage):
        gate, started = stage.server.hold("慢")
        stage.receive(message(at(BOT), "慢", group=9))
        await started.wait()
        stage.receive(*(message(f"{number}", group=9, user=number) for number in range(1, 5)))
        await stage.bundled()
        gate.set()
        await stage.settle()
        assert stage.server.contents() == ["慢", "3", "4"] and "is dropped" in caplog.text
    staged(scenario, limits=Limits(debounce_s=0.01, waiting=2))


# Sending


def test_long_answers_come_in_parts_and_only_the_first_quotes():
    async def scenario(stage):
        stage.server.reply = lambda body: "这是很长很长很长很长的第一句话呀。这是很长很长很长很长的第二句话呀。"
        ask = message(at(BOT), "说", group=9)
        await stage.tell(ask)
        assert [quoted for _, _, quoted in stage.qq.sent] == [str(ask["message_id"]), ""]
    staged(scenario, send=Send(max_chars=20, pause_s=0, pause_per_char_s=0))


def test_a_notice_of_the_server_follows_the_answer():
    async def scenario(stage):
        stage.server.notice = "我会记住聊天里说过的事。"
        await stage.tell(message("你好"))
        assert stage.qq.texts() == ["听到：你好", "我会记住聊天里说过的事。"]
        stage.server.notice = ""
        await stage.tell(message("再见"))
        assert len(stage.qq.sent) == 3
    staged(scenario)


def test_a_notice_that_had_no_time_comes_with_the_next_answer_to_that_person():
    "The server sends it with the first answer only; a newer message comes before it was shown."
    async def scenario(stage):
        stage.server.notice = "我会记住聊天里说过的事。"
        stage.receive(message(at(BOT), "一", group=9))
        while not stage.qq.sent:
            await asyncio.sleep(0.005)
        stage.server.notice = ""
        stage.receive(message(at(BOT), "二", group=9, user=7))
        while len(stage.qq.sent) < 2:
            await asyncio.sleep(0.005)
        await stage.tell(message(at(BOT), "三", group=9))
        await stage.tell(message(at(BOT), "四", group=9))
        assert stage.qq.texts() == ["听到：一", "听到：二", "听到：三", "我会记住聊天里说过的事。", "听到：四"]
    staged(scenario, send=Send(pause_s=1, pause_per_char_s=0))


def test_an_empty_answer_is_no_message():
    async def scenario(stage):
        stage.server.reply = lambda body: ""
        assert await stage.tell(message("你好")) == []
    staged(scenario)


def test_what_was_not_sent_is_sent_again(caplog):
    async def scenario(stage):
        stage.qq.faults = [NotSent("muted"), NotSent("muted")]
        await stage.tell(message("你好"))
        assert stage.qq.texts() == ["听到：你好"] and stage.server.asked == ["你好"]
        stage.qq.faults = [NotSent("muted")] * 9
        await stage.tell(message("再见"))
        assert len(stage.qq.texts()) == 1 and len(stage.qq.faults) == 5 and "was given up: muted" in caplog.text
    with caplog.at_level(logging.INFO, "recallnb_client"):
        staged(scenario)


def test_an_answer_waits_for_the_connection_to_qq():
    async def scenario(stage):
        stage.qq.faults = [Away("gone")] * 20 + [NotSent("muted")]
        await stage.tell(message("你好"))
        assert stage.qq.texts() == ["听到：你好"]
    staged(scenario)


def test_what_may_have_arrived_is_never_sent_again(caplog):
    async def scenario(stage):
        stage.qq.faults = [Unconfirmed("no answer")]
        await stage.tell(message("你好"))
        assert stage.qq.sent == [] and stage.qq.faults == [] and "is not repeated" in caplog.text
    staged(scenario)


def test_too_many_messages_are_stored_and_not_answered():
    async def scenario(stage):
        for number in range(5):
            await stage.tell(message(f"{number}"))
        assert stage.server.asked == ["0", "1"] and stage.server.contents() == list("01234")
        assert stage.qq.texts() == ["听到：0", "听到：1", TOO_FAST]
        await stage.tell(message("主人", user=1), message("主人", user=1), message("主人", user=1))
        assert stage.server.asked[-1] == "主人\n主人\n主人"
        await stage.tell(message("忘记我"))
        await stage.tell(message("确定"))
        assert [call[0] for call in stage.server.calls] == ["forget_person"]  # whoever talks too much may still be forgotten
    staged(scenario, limits=Limits(messages=2, debounce_s=0.01))


# Recalled messages


def test_recalled_before_it_was_forwarded():
    async def scenario(stage):
        first, second = message("密码是1234"), message("你好")
        stage.receive(first, second)
        await stage.tell(recalled(first))
        assert stage.server.contents() == ["你好"] and stage.server.calls == []
    staged(scenario)


@pytest.mark.parametrize("how", ["recalled", "forgotten"])
def test_a_quote_that_waits_loses_what_is_taken_back(pictures, how):
    async def scenario(stage):
        (go, started), secret = stage.server.hold("慢"), message("密码是1234", picture("http://x/1.png"), group=9, user=7)
        stage.receive(message(at(BOT), "慢", group=9))
        await started.wait()
        stage.receive(secret, message(quote(secret["message_id"]), at(BOT), "笑死", picture("http://x/2.png"), group=9, user=8))
        await stage.heard()
        if how == "recalled":
            stage.receive(recalled(secret))
            await stage.heard()
        else:
            stage.client._chat(GROUP).drop("7")
        go.set()
        await stage.settle()
        assert stage.server.contents() == ["慢", "[引用了一条消息]\n笑死[图片]"] and stage.server.uploads == [b"http://x/2.png"]
    staged(scenario)


def test_own_pictures_come_before_quoted_ones(pictures):
    "So that the server knows which go when the quoted message is taken back."
    async def scenario(stage):
        shown = message(picture("http://x/1.png"), group=9, user=7)
        await stage.tell(shown)
        await stage.tell(message(quote(shown["message_id"]), at(BOT), "这个", group=9), message(picture("http://x/2.png"), group=9))
        assert stage.server.contents()[-1] == "[引用 LinF：[图片]]\n这个\n[图片]" and stage.server.uploads == [b"http://x/2.png", b"http://x/1.png"]
    staged(scenario)


def test_recalled_while_it_is_answered():
    async def scenario(stage):
        _, started = stage.server.hold("密码")
        event = message("密码是1234")
        stage.receive(event)
        await started.wait()
        await stage.tell(recalled(event))
        assert stage.qq.sent == [] and stage.server.calls == [("retract", "private:42", str(event["message_id"]))]
    staged(scenario)


def test_recalled_while_it_is_on_its_way():
    "The request is not cut off before the server has the message: it would be stored after it was retracted."
    async def scenario(stage):
        going, arrived, order = asyncio.Event(), asyncio.Event(), []

        async def say(scope, body, accepted):
            going.set()
            await arrived.wait()
            order.append("stored")
            accepted()
            await asyncio.Event().wait()
        stage.server.say = say
        event = message("密码是1234")
        stage.receive(event)
        await going.wait()
        stage.receive(recalled(event))
        await stage.heard()
        assert stage.server.calls == []
        arrived.set()
        await stage.settle()
        assert order == ["stored"] and [call[0] for call in stage.server.calls] == ["retract"]
    staged(scenario)


def test_recalled_later_and_as_a_part(pictures):
    async def scenario(stage):
        shown, asked = message(picture("http://x/1.png"), group=9), message(at(BOT), "这是什么", group=9)
        await stage.tell(shown, asked)
        stage.server.faults = [AWAY]
        await stage.tell(recalled(shown))
        assert stage.server.contents() == ["[图片]\n这是什么"] and stage.server.history[0][1]["message_id"] == f"{shown['message_id']}+{asked['message_id']}"
        assert stage.server.calls == [("retract", GROUP, str(shown["message_id"]))]
    staged(scenario)


def test_a_retraction_waits_for_the_server_as_long_as_it_takes_and_holds_up_nobody():
    async def scenario(stage):
        away, there = [], asyncio.Event()
        retract = stage.server.retract

        async def refusing(*arguments):
            away.append(arguments)
            if not there.is_set():
                raise AWAY
            await retract(*arguments)
        stage.server.retract = refusing
        event = message("密码是1234")
        await stage.tell(event)
        stage.receive(recalled(event), message("你好"))
        while len(stage.qq.sent) < 2 or len(away) < 5:
            await asyncio.sleep(0.005)
        assert stage.qq.texts()[-1] == "听到：你好" and stage.server.calls == []
        there.set()
        await stage.settle()
        assert [call[0] for call in stage.server.calls] == ["retract"]
    staged(scenario, server=Server(give_up_s=0.01))


def test_a_retraction_that_waits_outlives_the_client(tmp_path):
    async def play():
        server, event = FakeServer(), message("密码是1234")
        for run in range(3):
            server.faults = [AWAY] * 1000 if run == 0 else []
            client = Client(Config(**QUICK), server, FakeQQ(), owed=tmp_path / "owed.jsonl")
            client.resume()
            if run == 0:
                client.receive(recalled(event))
                while len(server.faults) > 995:
                    await asyncio.sleep(0.005)
            else:
                await client.idle()
            await client.close()
            assert server.calls == [("retract", "private:42", str(event["message_id"]))] * (run > 0)
    asyncio.run(play())


def test_a_retraction_does_not_wait_for_the_answer_to_another_message():
    async def scenario(stage):
        event = message("密码是1234", group=9, user=7)
        await stage.tell(event)
        gate, started = stage.server.hold("慢")
        stage.receive(message(at(BOT), "慢", group=9))
        await started.wait()
        stage.receive(recalled(event))
        await stage.until(lambda: stage.server.calls)
        assert stage.server.calls == [("retract", GROUP, str(event["message_id"]))] and stage.qq.sent == []
        gate.set()
        await stage.settle()
        assert stage.qq.texts() == ["听到：慢"] and len(stage.server.calls) == 1
    staged(scenario)


def test_recalled_while_the_server_sleeps():
    "What it has is deleted before the night reads it, the question as a whole, too; neither is brought again."
    async def scenario(stage):
        stage.server.asleep = True
        heard, first, second = message("密码是1234", group=9, user=7), message(at(BOT), "我的卡号是", group=9), message("5678", group=9)
        stage.receive(heard, first, second)
        await stage.until(lambda: len(stage.server.tries) > 4)
        stage.receive(recalled(heard))
        await stage.until(lambda: stage.server.calls)
        stage.receive(recalled(second))
        await stage.until(lambda: len(stage.server.calls) == 2)
        key = f"{first['message_id']}+{second['message_id']}"
        assert stage.server.calls == [("retract", GROUP, str(heard["message_id"])), ("retract", GROUP, key)]
        tries = len(stage.server.tries)
        stage.server.asleep = False
        await stage.settle()
        assert len(stage.server.tries) == tries and stage.server.asked == [] and stage.qq.texts() == [ASLEEP]
    staged(scenario)


def test_forgotten_by_a_command_while_the_server_sleeps():
    "The command is obeyed at once, and the question that it takes back does not come again behind it."
    async def scenario(stage):
        stage.server.asleep = True
        ask = message(at(BOT), "我住杭州", group=9)
        stage.qq.messages[str(ask["message_id"])] = ask
        stage.receive(ask)
        await stage.until(lambda: len(stage.server.tries) > 3)
        stage.receive(message(quote(ask["message_id"]), at(BOT), "忘记", group=9))
        await stage.until(lambda: stage.server.calls)
        tries = len(stage.server.tries)
        await stage.settle()
        assert stage.server.calls == [("retract", GROUP, str(ask["message_id"]))] and len(stage.server.tries) == tries
    staged(scenario)


def test_recalled_after_a_restart_and_in_a_group_that_is_not_served():
    async def scenario(stage):
        await stage.tell(recalled(message("x", group=9)), recalled(message("x", group=8)))
        assert [call[:2] for call in stage.server.calls] == [("retract", GROUP)]
    staged(scenario, groups=Lists(block=("8",)))


# Commands


MEMORIES = [
    {"id": 1, "text": "用户LinF的生日为11月6日", "relation": "生日", "scope": "private:42", "subject": "42", "date": ""},
    {"id": 2, "text": "用户LinF现居杭州", "relation": "现居", "scope": GROUP, "subject": "42", "date": ""},
    {"id": 3, "text": "用户甲现居大连", "relation": "现居", "scope": GROUP, "subject": "7", "date": ""},
]


def test_memories_of_the_sender_only_and_nothing_private_in_a_group():
    async def scenario(stage):
        stage.server.known = MEMORIES
        await stage.tell(message("记忆"), message(at(BOT), "记忆", group=9))
        private, group = stage.qq.texts("private:42")[0], stage.qq.texts(GROUP)[0]
        assert "#1" in private and "#2" in private and "#3" not in private
        assert "#2" in group and "#1" not in group and "#3" not in group
        assert stage.server.contents() == []
    staged(scenario)


def test_many_memories_come_in_parts():
    async def scenario(stage):
        stage.server.known = [MEMORIES[0] | {"id": number, "text": "用户LinF记得" + "很长的事" * 20, "scope": GROUP} for number in range(100, 140)]
        ask = message(at(BOT), "记忆", group=9)
        await stage.tell(ask)
        assert len(stage.qq.sent) > 3 and all(len(words) <= 800 for words in stage.qq.texts())
        assert [quoted for *_, quoted in stage.qq.sent] == [str(ask["message_id"])] + [""] * (len(stage.qq.sent) - 1)
        assert all(f"#{number} " in "".join(stage.qq.texts()) for number in range(100, 130)) and "一共 40 条" in stage.qq.texts()[-1]
    staged(scenario)


def test_a_nickname_gives_no_rights():
    async def scenario(stage):
        stage.server.known = MEMORIES
        await stage.tell(message("忘记 #1", user=66, name="LinF"), message("忘记 #2", user=66, name="42"))
        assert stage.server.calls == [] and all("没有" in words for words in stage.qq.texts())
    staged(scenario)


def test_forget_one_memory():
    async def scenario(stage):
        stage.server.known = MEMORIES
        await stage.tell(message("忘记 我的生日"))
        assert stage.server.calls == [("forget", 1)] and "11月6日" in stage.qq.texts()[-1]
        await stage.tell(message("忘记 LinF"))
        assert stage.server.calls == [("forget", 1)] and "忘记 #1" in stage.qq.texts()[-1]
        await stage.tell(message(at(BOT), "忘记 #1", group=9))
        assert stage.server.calls == [("forget", 1)]
    staged(scenario)


def test_forget_a_quoted_message():
    async def scenario(stage):
        own, foreign = message("我住杭州", group=9), message("我住大连", group=9, user=7)
        stage.qq.messages = {str(event["message_id"]): event for event in (own, foreign)}
        await stage.tell(message(quote(foreign["message_id"]), at(BOT), "忘记", group=9))
        assert stage.server.calls == []
        await stage.tell(message(quote(own["message_id"]), at(BOT), "忘记", group=9))
        assert stage.server.calls == [("retract", GROUP, str(own["message_id"]))] and "没有" in stage.qq.texts()[-1]
        await stage.tell(own, message(quote(own["message_id"]), at(BOT), "忘记", group=9))
        assert stage.server.calls[1:] == stage.server.calls[:1] and "都忘掉了" in stage.qq.texts()[-1]
    staged(scenario)


def test_forget_me_asks_once():
    async def scenario(stage):
        await stage.tell(message("忘记我"))
        assert stage.server.calls == [] and "确定" in stage.qq.texts()[-1]
        await stage.tell(message("确定", user=43), message("确定", group=9))
        assert stage.server.calls == []
        await stage.tell(message("确定"))
        assert stage.server.calls == [("forget_person", "42")]
        await stage.tell(message("确定"))
        assert stage.server.calls == [("forget_person", "42")] and stage.server.asked[-1] == "确定"
    staged(scenario)


def test_forgetting_covers_what_is_still_on_its_way():
    async def scenario(stage):
        gate, started = stage.server.hold("慢")
        stage.receive(message(at(BOT), "慢", group=9, user=7))
        await started.wait()
        stage.receive(message("我住杭州", group=9))
        await stage.bundled()
        for words in ("忘记我", "确定"):
            stage.receive(message(words))
            await stage.heard()
            await stage.client._chats["private:42"].lane.idle()
        gate.set()
        await stage.settle()
        assert "我住杭州" not in stage.server.contents()
    staged(scenario)


def test_forgetting_covers_what_the_server_is_just_being_told():
    "The server may store the message behind the deletion: so it is taken back as well."
    async def scenario(stage):
        going, arrived, say = asyncio.Event(), asyncio.Event(), stage.server.say

        async def slow(scope, body, accepted):
            if scope != GROUP:
                return await say(scope, body, accepted)
            going.set()
            await arrived.wait()
            accepted()
            await asyncio.Event().wait()
        stage.server.say = slow
        stage.receive(message(at(BOT), "我住杭州", group=9))
        await going.wait()
        for words in ("忘记我", "确定"):
            stage.receive(message(words))
            await stage.heard()
            await stage.client._chats["private:42"].lane.idle()
        arrived.set()
        await stage.settle()
        assert [call[0] for call in stage.server.calls] == ["forget_person", "retract"]
    staged(scenario)


@pytest.mark.parametrize(("words", "call"), [("不要记住我", False), ("可以记住我", True)])
def test_learning_is_the_senders_choice(words, call):
    async def scenario(stage):
        await stage.tell(message(words))
        assert stage.server.calls == [("set_learning", "42", call)]
    staged(scenario)


@pytest.mark.parametrize(("role", "user", "allowed"), [("member", 42, False), ("admin", 42, True), ("owner", 42, True), ("member", 1, True)])
def test_pause_and_resume(role, user, allowed):
    async def scenario(stage):
        await stage.tell(message(at(BOT), "暂停", group=9, role=role, user=user))
        await stage.tell(message(at(BOT), "恢复", group=9, role=role, user=user))
        assert stage.server.calls == ([("set_paused", GROUP, True), ("set_paused", GROUP, False)] if allowed else [])
        assert len(stage.qq.sent) == 2
    staged(scenario)


def test_commands_in_a_group_are_said_to_the_bot():
    async def scenario(stage):
        await stage.tell(message("忘记我", group=9), message("帮助", group=9))
        assert stage.qq.sent == [] and stage.server.contents() == ["忘记我", "帮助"]
        await stage.tell(message("小忆，帮助", group=9))
        assert "忘记我" in stage.qq.texts()[-1]
    staged(scenario)


def test_a_command_ends_a_running_answer_and_says_when_it_failed():
    async def scenario(stage):
        _, started = stage.server.hold("慢")
        stage.receive(message("慢"))
        await started.wait()
        stage.server.faults = [AWAY]
        await stage.tell(message("不要记住我"))
        assert len(stage.qq.sent) == 1 and "没有办成" in stage.qq.texts()[0] and stage.server.calls == []
    staged(scenario)


def test_an_error_in_one_message_does_not_end_the_chat(caplog):
    async def scenario(stage):
        stage.server.faults = [RuntimeError("a bug")]
        await stage.tell(message("一"))
        await stage.tell(message("二"))
        assert stage.qq.texts() == ["听到：二"] and "a bug" in caplog.text
    staged(scenario)


def test_two_hundred_messages_of_twenty_chats_with_a_server_that_comes_and_goes():
    async def scenario(stage):
        stage.server.faults = [AWAY if number % 3 else None for number in range(120)]
        for number in range(10):
            stage.receive(*(message(f"{number}", user=user) for user in range(100, 120)))
            await asyncio.sleep(0.02)
        await stage.settle()
        for user in range(100, 120):
            scope = f"private:{user}"
            assert "".join(stage.server.contents(scope)).replace("\n", "") == "0123456789"
            assert stage.qq.texts(scope)[-1].endswith("9") and len(set(stage.qq.texts(scope))) == len(stage.qq.texts(scope))
    staged(scenario, server=replace(QUICK["server"], notice_after_s=60))
