"""`python -m recallnb_client --check`: what the owner is told."""

import asyncio

import pytest
from fake_onebot import OneBot
from fake_recallnb import reply

from recallnb_client.check import check as check_all
from recallnb_client.config import Config, NapCat, Server

ERROR = {"status": "error", "errors": [{"field": None, "problem": "no", "remedy": "do this"}]}


@pytest.fixture
def napcat():
    server = OneBot()
    yield server
    server.stop()


def check(fake, napcat, **server):
    said = []
    fine = asyncio.run(check_all(Config(server=Server(url=fake, **server), napcat=NapCat(url=napcat.url, token=napcat.token)), said.append))
    return fine, said


def test_check_when_all_is_well(recallnb, napcat):
    fake = recallnb(__healthz=reply({"status": "ok"}), __readyz=reply({"status": "ready", "model": "tiny-recall", "memories": 12}),
                    __api__memories=reply({"total": 0, "memories": []}))
    fine, said = check(fake.url, napcat, key="k")
    assert fine and len(said) == 4 and "tiny-recall" in said[0] and "接受" in said[1] and "小忆" in said[2]


@pytest.mark.parametrize(
    ("answers", "key", "wrong"),
    [
        ({"__healthz": reply({}), "__readyz": reply(ERROR, 503), "__api__memories": reply({"total": 0, "memories": []})}, "", {0: "模型还没有准备好"}),
        ({"__healthz": reply({}), "__readyz": reply({}), "__api__memories": reply(ERROR, 401)}, "", {1: "要求密钥"}),
        ({"__healthz": reply({}), "__readyz": reply({}), "__api__memories": reply(ERROR, 401)}, "k", {1: "不认这个密钥"}),
        ({"__healthz": reply(ERROR, 403), "__readyz": reply({}), "__api__memories": reply(ERROR, 403)}, "k", {0: "拒绝了请求", 1: "拒绝了请求"}),
        ({"__healthz": reply({}, 404), "__api__memories": reply({}, 404)}, "", {0: "不像是 recallnb", 1: "版本要配套"}),
    ],
)
def test_check_when_the_server_is_not(recallnb, napcat, answers, key, wrong):
    fine, said = check(recallnb(**answers).url, napcat, key=key)
    assert not fine
    for line in range(3):
        assert (wrong[line] in said[line]) if line in wrong else said[line].startswith("[正常]")


def test_check_when_nobody_is_there(napcat):
    napcat.token = "another"
    fine, said = check("http://127.0.0.1:1", napcat)
    assert not fine and "隧道" in said[0] and said[1].startswith("[没试]") and said[2].startswith("[正常]")
