"""The page in a real browser: `python -m pytest -m browser tests/test_serve_page.py` (Debian: apt install chromium).

Screenshots are written to the folder in TEST_SHOTS, if that is set."""

import os
import re
import shutil
from pathlib import Path

import pytest
from test_serve_more import Client

pytestmark = pytest.mark.browser
SHOTS = os.environ.get("TEST_SHOTS")
PHONE = {"width": 390, "height": 780}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # here: this file is also collected where it is not installed

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "no browser on this machine: apt install chromium, or leave these tests out (they are by default)"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    client = Client(tmp_path_factory.mktemp("page"), per_user=0, per_key=0)
    yield client
    client.close()


@pytest.fixture
def page(browser, client):
    "A page whose scripts may not complain, nor ask anybody else for anything."
    errors, strangers = [], []
    page = browser.new_page(viewport={"width": 1000, "height": 760}, base_url=f"http://127.0.0.1:{client.port}")
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: strangers.append(request.url) if not re.match(rf"(blob:)?http://127\.0\.0\.1:{client.port}/|data:", request.url) else None)
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
    page.reload()
    page.fill("#user", "1")
    page.keyboard.press("Tab")
    page.wait_for_selector(".said.mine")


def test_memories_are_searched_corrected_deleted_and_brought_back(page, client):
    for text in ("用户LinF现居杭州", "用户LinF养的猫叫豆芽"):
        client.tell("2", text)
    page.goto("/memories")
    page.fill("#find", "LinF 豆芽")
    wait_for_count(page, "#rows li", 1)
    page.click("text=来源")
    page.wait_for_selector(".details")
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
    assert client.call("GET", "/api/memories?subject=2")[1]["total"] == 2


def test_map_shows_where_a_question_falls(page, client):
    for text in ("用户LinF现居杭州", "用户LinF养的猫叫豆芽", "用户LinF的生日为11月6日"):
        client.tell("3", text)
    page.goto("/map")
    page.select_option("#map-scope", "private:3")
    wait_for_count(page, "#map circle", 3)
    page.fill("#map-query", "我住在哪？")
    page.keyboard.press("Enter")
    page.wait_for_selector("#map path")
    assert page.locator("#neighbours li").count() == 3
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
