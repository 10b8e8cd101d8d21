"""The benchmark of searching: our exact search beside faiss, usearch and pgvector, on keys that look like a model's."""

import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from recallnb.matrix import MemoryMatrix, _ScopeRows, unit

SCOPES = 100  # that the memories belong to, in the scoped search
QUERIES = 16


def keys_like(count: int, hidden: int, seed: int) -> Tensor:  # (count, hidden), unit vectors
    "Ten to each of many directions, as memories of one kind of fact lie near each other."
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, count // 10), hidden, generator=chance)
    return F.normalize(centres[torch.randint(len(centres), (count,), generator=chance)] + 0.7 * torch.randn(count, hidden, generator=chance), dim=1)


def matrix_of(keys: Tensor, scopes: int, device: torch.device) -> MemoryMatrix:
    "Our matrix with these keys, spread over scopes; without values."
    matrix = MemoryMatrix("bench", device, torch.float32)
    for scope in range(scopes):
        rows = matrix.scopes[f"group:{scope}"] = _ScopeRows((0, keys.shape[1]), device, torch.float32)
        some = keys[scope::scopes]
        rows.append(range(scope, len(keys), scopes), some, some.new_zeros(len(some), 0, keys.shape[1]))
    return matrix


def halves(keys: Tensor) -> Callable[[Tensor], list[int]]:
    "The 64 best by float16, then exactly."
    small = keys.half()

    def search(query: Tensor) -> list[int]:
        best = F.linear(query.half()[None], small)[0].topk(64).indices
        return best[(keys[best] @ query).topk(10).indices].tolist()
    return search


def faiss_index(keys: Tensor, kind: str) -> Callable[[Tensor], list[int]]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(keys.shape[1]) if kind == "flat" else faiss.IndexHNSWFlat(keys.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(keys.numpy())
    if kind == "hnsw":
        index.hnsw.efSearch = 64
    return lambda query: index.search(query.numpy()[None], 10)[1][0].tolist()


def usearch_index(keys: Tensor) -> Callable[[Tensor], list[int]]:
    from usearch.index import Index

    index = Index(ndim=keys.shape[1], metric="ip", dtype="f32", expansion_search=64)
    index.add(numpy.arange(len(keys)), keys.numpy(), threads=torch.get_num_threads())
    return lambda query: index.search(query.numpy(), 10).keys.tolist()


def pgvector_table(keys: Tensor) -> Callable[[Tensor], list[int]]:
    "HNSW in the database that PGVECTOR names, a connection string of libpq."
    import psycopg
    from pgvector.psycopg import register_vector

    connection = psycopg.connect(os.environ["PGVECTOR"], autocommit=True)
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    connection.execute(f"CREATE TEMPORARY TABLE memory (id int, key vector({keys.shape[1]}))")
    with connection.cursor().copy("COPY memory FROM STDIN WITH (FORMAT BINARY)") as copy:
        copy.set_types(["int4", "vector"])
        for id, key in enumerate(keys.numpy()):
            copy.write_row((id, key))
    if keys.shape[1] <= 2000:  # wider ones pgvector cannot index
        connection.execute("CREATE INDEX ON memory USING hnsw (key vector_ip_ops)")
        connection.execute("SET hnsw.ef_search = 64")
    return lambda query: [id for (id,) in connection.execute("SELECT id FROM memory ORDER BY key <#> %s LIMIT 10", (query.numpy(),))]


def others() -> dict[str, Callable]:
    "What is installed here to compare with."
    found = {}
    if find_spec("faiss"):
        found |= {"faiss IndexFlatIP": lambda keys: faiss_index(keys, "flat"), "faiss HNSW": lambda keys: faiss_index(keys, "hnsw")}
    if find_spec("usearch"):
        found["usearch"] = usearch_index
    if "PGVECTOR" in os.environ:
        found["pgvector"] = pgvector_table
    return found


def search(bench) -> dict:
    "Milliseconds, recall@10, seconds to build, and bytes a key, for each size; graphs are built for up to 100,000 keys."
    sizes = [(count, hidden) for hidden in (256, 2560) for count in (1_000, 10_000, 100_000, 1_000_000) if count * hidden <= 1_000_000 * 256]
    if bench.device.type == "cuda":
        sizes.append((1_000_000, 2560))
    table, ratios = [], {}
    for count, hidden in sizes:
        table += compare_at(bench, count, hidden, ratios)
    return {"title": "milliseconds of a search for the ten nearest", "table": table, "rows": {f"{row['memories']} × {row['hidden']}, {row['by']}": row["ms"] for row in table}, "ratios": ratios}


def compare_at(bench, count: int, hidden: int, ratios: dict) -> list[dict]:
    "One size."
    keys, device = keys_like(count, hidden, 0), bench.device
    queries = [unit(key + 0.3 * hidden**-0.5 * torch.randn(hidden, generator=torch.Generator().manual_seed(number)), "query", hidden)
               for number, key in enumerate(keys[:: count // QUERIES][:QUERIES])]
    there = keys.to(device)
    asked = [query.to(device) for query in queries]
    exact = [set((keys.double() @ query.double()).topk(10).indices.tolist()) if count * hidden <= 10**8 else set((keys @ query).topk(10).indices.tolist()) for query in queries]
    whole, split = (built(matrix_of, there, scopes, device) for scopes in (1, SCOPES))
    scoped = [f"group:{number * count // QUERIES % SCOPES}" for number in range(QUERIES)]
    searches = {
        "ours": (lambda i: [id for id, _ in whole[0].rank(asked[i], ["group:0"], 10)], whole[1], 4 * hidden + (hidden + 8)),
        "ours, in one of 100 scopes": (lambda i: [id for id, _ in split[0].rank(asked[i], [scoped[i]], 10)], split[1], None),
        "one product in float32": (lambda i: (there @ asked[i]).topk(10).indices.tolist(), 0.0, 4 * hidden),
        "float16, 64 best again": (lambda i, half=halves(there): half(asked[i]), 0.0, 6 * hidden),
    }
    for name, build in others().items():
        if count * hidden > 100_000 * 256 and name != "faiss IndexFlatIP":
            continue  # building a graph would take minutes
        index, seconds = built(build, keys)
        searches[name] = lambda i, index=index: index(queries[i]), seconds, None
    taken = bench.compare({name: lambda call=call: [call(i) for i in range(QUERIES)] for name, (call, _, _) in searches.items()}, 5)
    rows = [{"memories": count, "hidden": hidden, "by": name, "ms": 1000 * taken[name] / QUERIES, "build s": round(seconds, 3), "bytes a key": size,
             "recall@10": None if "scopes" in name else statistics.mean(len(exact[i] & set(call(i))) / 10 for i in range(QUERIES))}
            for name, (call, seconds, size) in searches.items()]
    bits = count * hidden * 4
    rows.append({"memories": count, "hidden": hidden, "by": "limit: reading float32 keys once", "ms": 1000 * bench.read(bits), "build s": None, "bytes a key": 4 * hidden, "recall@10": 1.0})
    ratios[f"{count} × {hidden}: one product / ours"] = taken["one product in float32"] / taken["ours"]
    if "faiss IndexFlatIP" in taken:
        ratios[f"{count} × {hidden}: faiss IndexFlatIP / ours"] = taken["faiss IndexFlatIP"] / taken["ours"]
    return rows


def built(build: Callable, *arguments) -> tuple:
    "What it builds, and the seconds."
    began = time.perf_counter()
    return build(*arguments), time.perf_counter() - began
