"""Every field of every call, fuzzed from the server's own OpenAPI document: no 500, and every refusal names a problem and a remedy."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from test_serve_more import Client

QUIETLY = settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=[*HealthCheck])


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    "Its answers are a few tokens long, and its nights do not begin."
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))  # not into the checkout
    patch = pytest.MonkeyPatch()
    patch.setattr("recallnb.nights.start_night", lambda *_: True)
    client = Client(tmp_path_factory.mktemp("fuzz"))
    client.settings.generation.max_new_tokens = 4
    yield client
    client.close()
    patch.undo()


def bombard(operation):
    "Its cases, one after the other."

    @QUIETLY
    @given(case=operation.as_strategy())
    def check(case):
        response = case.call()
        assert response.status_code < 500, f"{operation.label}: {response.text[:500]}"
        if response.status_code >= 400 and operation.path.startswith("/api/"):
            wrong = response.json()
            assert wrong["status"] == "error" and all(one["problem"] and one["remedy"] for one in wrong["errors"]), f"{operation.label}: {wrong}"

    check()


def test_no_server_error(client):
    "Schemathesis makes the cases, valid and not; they are sent in this process."
    tried = []
    for found in schemathesis.openapi.from_wsgi("/openapi.json", client.app).get_all_operations():
        bombard(found.ok())
        tried.append(found.ok().label)
    assert {"POST /api/chat/private", "GET /api/memories", "POST /v1/chat/completions", "DELETE /api/memories/{memory_id}"} <= set(tried)
    assert client.engine.ready and client.say("1", "你好")[1]["status"] == "ok"
