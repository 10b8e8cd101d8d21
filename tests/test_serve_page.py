"""The page in a real browser.

    apt install chromium && python -m pip install -e '.[dev,browser]'
    TEST_SHOTS=shots python -m pytest -m browser

The second line runs these tests; with TEST_SHOTS screenshots are written to that folder. Without a browser they are not run,
and the summary says why (as expected failures: a test that is skipped counts as failed in this project)."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import BROWSER
from test_serve_more import Client
from test_serve_release import release

from recallnb.limits import Keys

pytestmark = pytest.mark.browser
SHOTS = os.environ.get("TEST_SHOTS")
PHONE = {"width": 390, "height": 780}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # here: this file is also collected where it is not installed

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


# What can be undone stays for 10 s, in which a busy machine may not come to press the button; the page asks for news every 10 s, too.
_PATIENT = """const later = window.setTimeout;
window.setTimeout = (deed, ms, ...more) => later(deed, String(deed).includes("activeElement") ? 1e6 : ms, ...more);"""


@pytest.fixture
def page(browser, client):
    "A page whose scripts may not complain, nor ask anybody else for anything."
    errors, strangers = [], []
    page = browser.new_page(viewport={"width": 1000, "height": 760}, base_url=f"http://127.0.0.1:{client.port}")
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: strangers.append(request.url) if not re.match(rf"(blob:)?http://127\.0\.0\.1:{client.port}/|data:", request.url) else None)
    page.add_init_script(_PATIENT)
    page.set_default_timeout(60_000)
    yield page
    page.close()
    assert (errors, strangers) == ([], [])


def shot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def wait_for_count(page, selector, count):
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=60_000)


def chat(page, user, text):
    "Say something on the page and wait until the answer is complete."
    page.goto("/")
    page.fill("#user", user)
    page.fill("#name", "LinF")
    page.fill("#words-said", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".said:not(.mine):not(.waiting)")
    return page.locator(".said:not(.mine)").last.text_content()


def test_chat_shows_the_recall(page, client):
    "The reply is what the server has stored, and the card shows what was found."
    client.tell("1", "用户LinF现居杭州")
    reply = chat(page, "1", "我现在住在哪个城市？")
    assert reply == client.call("GET", "/api/chats/private:1/history")[1]["messages"][-1]["content"]
    assert "用户LinF现居杭州" in page.locator(".card summary").first.text_content()
    assert page.locator(".card li.chosen .bar-of").count() == 1 and client.settings.chat.notice in page.locator(".note").all_text_contents()
    shot(page, "chat")
    assert page.locator("button:has-text('停下')").count() == 0  # there is nothing left to stop
    page.reload()
    page.fill("#user", "1")
    page.keyboard.press("Tab")
    page.wait_for_selector(".said.mine")


def test_a_first_visit_sees_a_recall(page, client):
    "Somebody to be and something to ask is offered where nothing was said; who one is, another page does not forget."
    client.tell("5", "用户LinF的生日为11月6日")
    page.goto("/")
    page.click("#talk button:has-text('我的生日是哪天？')")
    page.wait_for_selector(".card li.chosen")
    page.wait_for_selector(".said:not(.mine):not(.waiting)")
    assert client.call("GET", "/api/chats/private:5/history")[1]["messages"][0]["content"] == "我的生日是哪天？"
    page.goto("/map")
    page.goto("/")
    page.wait_for_selector(".said.mine")
    assert (page.input_value("#user"), page.input_value("#name"), page.locator("#talk button").count()) == ("5", "LinF", 0)


def test_memories_are_searched_corrected_deleted_and_brought_back(page, client):
    "What is brought back has its sources again."
    client.tell("2", "用户LinF现居杭州")
    client.say("2", "我家猫叫豆芽", message_id="m1")
    assert client.call("POST", "/api/memories", {"scope": "private:2", "subject": "2", "text": "用户LinF养的猫叫豆芽", "relation": "猫", "date": "2025-11-06", "sources": ["m1"]})[0] == 201
    page.goto("/memories")
    page.fill("#find", "LinF 豆芽")
    wait_for_count(page, "#rows li", 1)
    page.click("text=来源")
    page.wait_for_selector("#rows blockquote:has-text('我家猫叫豆芽')")
    shot(page, "memories")
    page.click("[data-correct]")
    page.fill("#rows form input", "用户LinF养的猫叫豆芽菜")
    page.keyboard.press("Enter")
    page.wait_for_selector("#rows .text:has-text('豆芽菜')")
    page.click("[data-delete]")
    page.wait_for_selector("#toast.on")
    wait_for_count(page, "#rows li", 0)
    assert client.call("GET", "/api/memories?subject=2")[1]["total"] == 1
    page.click("#toast button")
    page.wait_for_selector("#rows .text:has-text('豆芽菜')")
    brought, _ = client.call("GET", "/api/memories?subject=2")[1]["memories"]
    assert (brought["relation"], brought["date"], brought["sources"], brought["state"]) == ("猫", "2025-11-06", ["m1"], "active")


def test_memories_by_keyboard(page, client):
    "Where one was, the focus is again: after Escape, after saving, at the undo, and on what came back."
    client.tell("6", "用户LinF养的狗叫团团")
    page.goto("/memories")
    page.fill("#find", "团团")
    wait_for_count(page, "#rows li", 1)
    focused = lambda: page.evaluate("(({ dataset, textContent }) => dataset.correct ? 'correct' : dataset.delete ? 'delete' : textContent)(document.activeElement)")
    while focused() != "correct":
        page.keyboard.press("Tab")
    for key in ("Enter", "Escape"):
        page.keyboard.press(key)
    assert focused() == "correct" and page.locator("#rows form").count() == 0
    for key in ("Enter", "End", "圆", "Enter"):
        page.keyboard.insert_text(key) if key == "圆" else page.keyboard.press(key)
    page.wait_for_selector("#rows li:has-text('团团圆') [data-correct]:focus")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#toast button:focus")
    assert client.call("GET", "/api/memories?subject=6")[1]["total"] == 0
    page.keyboard.press("Enter")
    page.wait_for_selector("#rows li button:focus")
    assert client.call("GET", "/api/memories?subject=6")[1]["memories"][0]["text"] == "用户LinF养的狗叫团团圆"


def test_trouble_is_told_in_the_pages_language(browser, client):
    "On a page of its own, since the browser complains of such things."
    page = browser.new_page(base_url=f"http://127.0.0.1:{client.port}")
    page.goto("/memories")
    page.click(".add summary")
    for name, value in {"scope": "private:7", "subject": "7", "text": "长" * 1001}.items():
        page.fill(f"#add [name={name}]", value)
    page.keyboard.press("Enter")
    page.wait_for_selector("#toast.on:has-text('这样写不行')")
    page.context.set_offline(True)
    page.keyboard.press("Enter")
    page.wait_for_selector("#toast.on:has-text('连不上服务器')")
    page.close()


def test_map_shows_where_a_question_falls(page, client):
    for text in ("用户LinF现居杭州", "用户LinF养的猫叫豆芽", "用户LinF的生日为11月6日"):
        client.tell("3", text)
    page.goto("/map")
    page.select_option("#map-scope", "private:3")
    wait_for_count(page, "#map circle", 3)
    page.fill("#map-query", "我住在哪？")
    page.keyboard.press("Enter")
    page.wait_for_selector("#map path")
    assert page.locator("#neighbours li").count() == page.locator("#map text").count() == 3
    assert page.locator("#legend span").all_text_contents() == ["3"]
    shot(page, "map")


def test_a_night_is_started_from_the_page(page, client):
    "Its state is shown; the run itself is tried in test_night.py, so it is ended here."
    page.goto("/nights")
    page.check("#smoke")
    page.click("#start button")
    page.wait_for_selector("#night strong:has-text('正在进行')")
    shot(page, "nights")
    started = client.app.extensions["night"].process
    started.terminate()
    started.wait(60)
    page.wait_for_selector("#night strong:has-text('没有在进行')")


def test_the_report_of_a_night_that_has_failed(page, client):
    "It has made no release; what it says is a click away all the same."
    state = client.settings.paths.state
    run = state / "runs/20260101T000000Z"
    run.mkdir(parents=True, exist_ok=True)
    (run / "night.html").write_text("<h1>The night has failed in train_stage1</h1>")
    (state / "nightly.json").write_text(json.dumps({"run": run.name, "step": "ended", "started": "2026-01-01T00:00:00Z", "ended": "2026-01-01T00:10:00Z", "status": 1}))
    page.goto("/nights")
    page.wait_for_selector("#night:has-text('上次失败了')")
    page.click("#night a")
    page.wait_for_selector("h1:has-text('failed in train_stage1')")


def test_a_release_is_served_and_rolled_back_from_the_page(page, client, tmp_path):
    older, newer = (release(client, tmp_path / f"model{number}", number, {"right_memory_at_1": 0.9 + number / 20, "free_decode_exact": 0.95 - number / 50, "draws": 3}) for number in (0, 1))
    page.goto("/nights")
    for id in (newer, older):
        page.click(f"[data-promote='{id}']")
        page.wait_for_selector(f"#releases li:has(span:text-is('{id}')) strong:has-text('正在使用')", timeout=300_000)
    assert client.engine.served.name == older and page.locator("#releases .trend").count() == 2
    shot(page, "releases")


def test_log_in_and_out(browser, tmp_path):
    "In a browser, which sends an Origin with every form; a key that is revoked leads back to the door."
    client = Client(tmp_path)
    page = browser.new_page(base_url=f"http://127.0.0.1:{client.port}")
    page.add_init_script(_PATIENT)
    page.set_default_timeout(60_000)
    try:
        client.tell("1", "用户LinF现居杭州")
        keys = Keys(client.engine.history.database)
        key = keys.add("owner")
        page.goto("/memories")
        for typed, seen in (("rnb_wrong", "[role=alert]"), (key, "#talk button")):
            page.fill("[name=key]", typed)
            page.keyboard.press("Enter")
            page.wait_for_selector(seen)
        page.click("#talk button")
        page.wait_for_selector(".card")
        page.goto("/memories")
        page.click("[data-delete]")
        page.click("#toast button")
        page.wait_for_selector("#rows li button:focus")
        page.click("form[action='/logout'] button")
        page.wait_for_selector("[name=key]")
        page.fill("[name=key]", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#talk")
        keys.add("another")
        keys.revoke(1)
        page.goto("/nights")
        page.wait_for_selector("[name=key]")
    finally:
        page.close()
        client.close()


def test_on_a_phone_in_the_dark_with_a_keyboard_in_english(browser, client):
    client.tell("4", "用户LinF现居杭州")
    page = browser.new_page(viewport=PHONE, color_scheme="dark", base_url=f"http://127.0.0.1:{client.port}")
    page.set_default_timeout(60_000)
    chat(page, "4", "我现在住在哪个城市？")
    shot(page, "phone")
    for path in ("/", "/memories", "/map", "/nights", "/docs"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than a phone"
    page.goto("/language?to=en&next=/memories")
    assert page.locator("nav a[aria-current]").text_content() == "Memories"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Chat"
    page.wait_for_selector("#rows li")
    shot(page, "phone-memories")
    page.close()
