"""How fast it is, beside what else could do the work: `python -m tests.bench NAME --out FILE`.

Everything that is compared runs in one process, in turns, and the median of the turns counts; a limit is what the machine
could do at best, measured in the same run. NAME is one of those listed by `--help`; nbs/benchmarks.ipynb tells their story.
`all` is for the shipped model and takes about a quarter of an hour on two quiet cores; the night and `search_large` are not in it. `gpu` is a model of the size of Qwen3-VL-4B with
random weights on a GPU."""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch
import transformers
from transformers import CompileConfig, GenerationConfig, Qwen3VLForConditionalGeneration

from recallnb.batch import Batch
from recallnb.embed import Skill, Written, load_skill, write_batch, write_memories, writing_ids
from recallnb.generate import Recalling, Token, open_memories, recall_generate
from recallnb.model import encode_prompt, forward_backbone, load_model, load_processor, pick_device, pick_dtype, qwen3vl_4b_config, unwrap
from recallnb.settings import GenerationSettings, load_settings
from recallnb.step import pack
from recallnb.store import Memory, MemoryStore
from recallnb.world import World

QUESTION = "我现在住在哪个城市？"
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Bench:
    "What the benches share."

    model: Qwen3VLForConditionalGeneration
    served: Qwen3VLForConditionalGeneration  # the same as the server holds it: packed on a CPU
    processor: transformers.ProcessorMixin
    skill: Skill
    turns: int  # of everything that is compared

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prompt(self, *turns: str) -> dict:
        "A chat: what the person and the bot said in turn."
        roles = ["user", "assistant"] * len(turns)
        messages = [{"role": "system", "content": "你是小忆，正在和LinF私聊。"}, *({"role": role, "content": text} for role, text in zip(roles, turns))]
        return encode_prompt(self.processor, messages)

    def texts(self, count: int) -> list[str]:
        "Memories of people who do not exist, each another one."
        world, found = World(load_settings().paths.world, seed=1, invent=1.0), {}
        while len(found) < count:
            found |= dict.fromkeys(fact.memory for fact in world.facts(world.people(100), 4))
        return [*found][:count]

    def seconds(self, call: Callable) -> float:
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def compare(self, calls: dict[str, Callable], turns: int | None = None) -> dict[str, float]:
        "Median seconds of each call, all of them in turns, after one turn that does not count."
        for call in calls.values():
            call()
        taken = [{name: self.seconds(call) for name, call in calls.items()} for _ in range(turns or self.turns)]
        return {name: statistics.median(turn[name] for turn in taken) for name in calls}

    def read(self, data: torch.Tensor) -> float:
        "Seconds to read these numbers once."
        return self.compare({"read": data.sum}, 10)["read"]

    def multiply(self, operations: float) -> float:
        "Seconds for this many multiplications and additions inside large matrices, in the model's precision."
        side = 4096 if self.device.type == "cuda" else 1024
        matrix = torch.randn(side, side, device=self.device, dtype=self.model.dtype)
        return self.compare({"multiply": lambda: matrix @ matrix}, 10)["multiply"] * operations / (2 * side**3)


def weights(model) -> int:
    "Bytes that a step reads: the layers, and the head."
    parameters = [*unwrap(model).model.language_model.layers.parameters(), unwrap(model).lm_head.weight]
    return sum(p.numel() * p.element_size() for p in parameters)


def open_bench(size: str, device: str, turns: int) -> Bench:
    "The shipped model, or one of the size of the 4B model with random weights; neither ever ends an answer by itself."
    settings = load_settings()
    if size == "tiny":
        model, processor = load_model(settings.paths.model, device)
    else:
        where = pick_device(device)
        torch.manual_seed(0)
        torch.set_default_dtype(pick_dtype(where))
        with where:
            model = Qwen3VLForConditionalGeneration._from_config(qwen3vl_4b_config(), attn_implementation="sdpa").eval()
        torch.set_default_dtype(torch.float32)
        model.generation_config = GenerationConfig()
        processor = load_processor(settings.paths.model)
    model.generation_config.eos_token_id = model.config.text_config.vocab_size - 1
    served = copy.deepcopy(model) if model.device.type == "cpu" else model
    pack(served)
    return Bench(model, served, processor, load_skill(settings.paths.model), turns)


def drain(batch: Batch) -> int:
    "Step until all answers have ended; how many ids they have."
    count = 0
    while len(batch):
        count += sum(isinstance(event, Token) for _, event in batch.step())
    return count


def decode(bench: Bench, rows: int = 1, tokens: int = 64) -> dict:
    "Tokens per second of the loop and of `model.generate`, greedily, recall off."
    calls = generates(bench, rows, tokens) | {"batch": batch(bench, rows, tokens)}
    if bench.device.type == "cuda":
        calls["batch, compiled"] = batch(bench, rows, tokens, compiled=True)
    if rows == 1:
        given = plain(bench, 1, tokens)
        calls["loop"] = lambda: bench.model.generate(**given, custom_generate=recall_generate, recall_tokenizer=bench.processor.tokenizer)
    taken = bench.compare(calls)
    speeds = {name: rows * tokens / seconds for name, seconds in taken.items()}
    speeds["limit: reading the weights"] = rows / bench.read(torch.ones(weights(bench.model) // 4, device=bench.device))
    ours = {name: speeds[name] / speeds["generate"] for name in ("loop", "batch", "batch, compiled") if name in speeds}
    best = max(speed for name, speed in speeds.items() if not name.startswith(("generate", "limit")))
    ratios = ours | {"best against the best generate": best / max(speed for name, speed in speeds.items() if name.startswith("generate")),
                     "share of the limit": best / speeds["limit: reading the weights"]}
    return {"title": f"tokens per second, {rows} at a time", "rows": speeds, "ratios": ratios}


def plain(bench: Bench, rows: int, tokens: int) -> dict:
    "What `generate` is told."
    inputs = {name: value.expand(rows, -1).to(bench.device) for name, value in bench.prompt(QUESTION).items()}
    return inputs | {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(inputs["input_ids"])}


def generates(bench: Bench, rows: int, tokens: int) -> dict[str, Callable]:
    "The ways of `model.generate`."
    given, config = plain(bench, rows, tokens), CompileConfig()
    config._compile_all_devices = True
    return {
        "generate": lambda: bench.model.generate(**given),
        "generate, static cache": lambda: bench.model.generate(**given, cache_implementation="static", disable_compile=True),
        "generate, static cache, compiled": lambda: bench.model.generate(**given, cache_implementation="static", compile_config=config),
    }


def batch(bench: Bench, rows: int, tokens: int, compiled: bool = False, change: Callable[[Batch], None] | None = None) -> Callable:
    "The running batch; `change`: without packed matrices, and changed before it runs."
    made, inputs, settings = Batch(bench.model if change else bench.served, bench.processor.tokenizer, compiled=compiled), bench.prompt(QUESTION), GenerationSettings(max_new_tokens=tokens)
    if change:
        change(made)

    def answer() -> None:
        for _ in range(rows):
            made.add(inputs, settings)
        assert drain(made) == rows * tokens
    return answer


def compiling(bench: Bench, tokens: int = 48) -> dict:
    "Tokens per second of the running batch on a CPU as it is, and with a step that inductor has compiled, which no setting offers there."
    def compile_step(made: Batch) -> None:
        stepper = made._cache._stepper
        rows = torch.compile(stepper._rows, dynamic=True)

        def step(embeds: torch.Tensor, lengths: list[int], offsets: list[int]) -> torch.Tensor:
            stepper.reserve(len(lengths), max(lengths) + 1)
            return rows(embeds, torch.tensor([lengths, [length + offset for length, offset in zip(lengths, offsets)]]), max(lengths) + 1)
        stepper.step = step

    calls = {f"{name}, {count} at a time": call for count in (1, 16) for name, call in (generates(bench, count, tokens) | {"batch": batch(bench, count, tokens), "batch, compiled": batch(bench, count, tokens, change=compile_step)}).items()}
    began = time.perf_counter()
    calls["batch, compiled, 1 at a time"]()
    waited = time.perf_counter() - began
    taken = bench.compare(calls)
    speeds = {name: int(name.split(", ")[-1].split()[0]) * tokens / seconds for name, seconds in taken.items()}
    ratios = {f"{count} at a time, against {name}": speeds[f"batch, compiled, {count} at a time"] / speeds[f"{name}, {count} at a time"] for count in (1, 16) for name in ("batch", "generate", "generate, static cache, compiled")}
    return {"title": "tokens per second, and seconds until the first compiled answer", "rows": speeds | {"the first compiled answer": waited}, "ratios": ratios}


def rows(bench: Bench, tokens: int = 48) -> dict:
    "Tokens per second of the running batch, by the number of chats in it."
    taken = bench.compare({count: batch(bench, count, tokens) for count in (1, 2, 4, 8, 16, 32)})
    speeds = {f"{count} chats": count * tokens / seconds for count, seconds in taken.items()}
    return {"title": "tokens per second of the running batch", "rows": speeds, "ratios": {"16 at once against one after another": speeds["16 chats"] / speeds["1 chats"]}}


def recall(bench: Bench, memories: int = 1000) -> dict:
    "What a recall costs besides the positions it takes: each is measured behind a step, which leaves little of it in the caches."
    hidden, count = bench.model.config.text_config.hidden_size, bench.skill.values
    store, tokenizer = MemoryStore(":memory:", "bench", bench.device, bench.model.dtype), bench.processor.tokenizer
    keys = torch.nn.functional.normalize(torch.randn(memories, hidden), dim=1)
    store.add([Memory(text, "private:1", "1") for text in bench.texts(memories)], Written(keys, torch.randn(memories, count, hidden)))
    recalling = Recalling(tokenizer, open_memories(bench.served, tokenizer, store, ["private:1"], bench.skill))
    batch = Batch(bench.served, tokenizer)
    batch.add(bench.prompt(QUESTION), GenerationSettings(max_new_tokens=10**6))
    queries = keys[:: memories // 40].to(bench.device)
    taken = {"a step": [], f"search and choice among {memories}, for the first time": [], "the same again": []}
    bench.compare({"warm": batch.step, "up": lambda: recalling.begin(-queries[0])}, 3)
    steps, first, again = taken.values()
    for times in (first, *[again] * 10):
        for query in queries:
            steps.append(bench.seconds(batch.step))
            times.append(bench.seconds(lambda: recalling.begin(query)))
    rows = {name: 1000 * statistics.median(seconds) for name, seconds in taken.items()}
    step, first, again = rows.values()
    return {"title": "milliseconds", "rows": rows, "ratios": {"share of a step": again / step, "share of a step, for the first time": first / step}}


def prefill(bench: Bench) -> dict:
    "The first token of a chat's tenth turn; and the longest wait of a running chat while a long prompt joins."
    said = [text for number in range(10) for text in (f"第{number}件事：今天中午和同事一起吃了火锅，然后去公园散步，晚上打算早点休息。", "听起来不错呀，好好休息。")][:-1]
    one, tokenizer = GenerationSettings(max_new_tokens=1), bench.processor.tokenizer
    before, tenth = bench.prompt(*said[:-2]), bench.prompt(*said)
    batch = Batch(bench.served, tokenizer)
    batch.add(before, one, key="chat")
    drain(batch)
    known = dict(batch.kept)

    def first(key: str | None) -> None:
        batch.kept.update(known)  # as it was after the ninth turn
        batch.add(tenth, one, key=key)
        drain(batch)

    taken = bench.compare({"anew": lambda: first(None), "with what the ninth turn has computed": lambda: first("chat")}, 2 * bench.turns)
    anew, again = taken.values()
    gaps = {name: statistics.median(longest_gap(bench, tenth, chunk) for _ in range(bench.turns)) for name, chunk in (("whole", 10**6), ("in chunks of 64", 64))}
    whole, chunks = gaps.values()
    return {"title": f"milliseconds to the first token of the tenth turn, {tenth['input_ids'].shape[1]} tokens; and the longest wait of another chat while it joins",
            "rows": {f"first token, {name}": 1000 * seconds for name, seconds in taken.items()} | {f"longest wait, {name}": 1000 * seconds for name, seconds in gaps.items()},
            "ratios": {"sooner with reuse": anew / again, "shorter wait in chunks": whole / chunks}}


def longest_gap(bench: Bench, inputs: dict, chunk: int) -> float:
    "Seconds: the longest step of a running chat while this prompt joins."
    batch = Batch(bench.served, bench.processor.tokenizer, chunk)
    batch.add(bench.prompt(QUESTION), GenerationSettings(max_new_tokens=10**6))
    batch.step()
    row = batch.add(inputs, GenerationSettings(max_new_tokens=1))
    longest = 0.0
    while not row.out:
        longest = max(longest, bench.seconds(batch.step))
    return longest


def embedding(bench: Bench, memories: int = 10_000) -> dict:
    "Memories written per second: in our batches, one by one, and as sentence-transformers batches (sorted by characters, 32 at a time, with a mask)."
    texts, tokenizer = bench.texts(memories), bench.processor.tokenizer
    some = texts[:: max(1, memories // 512)]

    @torch.inference_mode()
    def one_by_one() -> None:
        for text in some[:128]:
            write_batch(bench.model, [writing_ids(tokenizer, text, bench.skill)], bench.skill)

    @torch.inference_mode()
    def masked() -> None:
        ordered = [writing_ids(tokenizer, text, bench.skill) for text in sorted(some, key=len, reverse=True)]
        for start in range(0, len(ordered), 32):
            batch = ordered[start : start + 32]
            longest = max(map(len, batch))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=bench.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=bench.device)
            forward_backbone(bench.model, input_ids=ids, attention_mask=mask, use_cache=False)

    calls = {"one by one": one_by_one, "sorted batches of 32, masked": masked, "ours": lambda: write_memories(bench.served, tokenizer, some, bench.skill)}
    taken = bench.compare(calls, 3)
    speeds = {name: (128 if name == "one by one" else len(some)) / seconds for name, seconds in taken.items()}
    speeds[f"ours, {memories} at once"] = memories / bench.seconds(lambda: write_memories(bench.served, tokenizer, texts, bench.skill))
    layers = sum(p.numel() for p in bench.model.model.language_model.layers.parameters())
    length = statistics.mean(len(writing_ids(tokenizer, text, bench.skill)) for text in some)
    speeds["limit: the matrices' arithmetic"] = 1 / bench.multiply(2 * layers * length)
    return {"title": "memories written per second", "rows": speeds, "ratios": {f"against {name}": speeds["ours"] / speeds[name] for name in list(calls)[:2]}}


def main() -> None:
    from tests.bench_search import search, search_large
    from tests.bench_training import finding, training, training_memory
    from tests.bench_whole import growth, night, startup

    benches = {"decode": decode, "decode16": lambda bench: decode(bench, 16), "compiling": compiling, "rows": rows, "recall": recall, "prefill": prefill, "embedding": embedding,
               "search": search, "search_large": search_large, "finding": finding, "training": training, "training_memory": training_memory, "growth": growth, "startup": startup, "night": night}
    sets = {"all": [name for name in benches if name not in ("night", "search_large")], "gpu": ["decode", "decode16", "rows", "recall", "prefill", "embedding", "search", "training_memory"]}
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*benches, *sets], metavar="NAME", help=f"{', '.join(benches)}; all: every one but the night and search_large; gpu: {', '.join(sets['gpu'])}, with --model 4b --device cuda")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON; a folder if NAME is all or gpu")
    parser.add_argument("--model", choices=("tiny", "4b"), help="4b: the size of Qwen3-VL-4B, random weights (default: tiny)")
    parser.add_argument("--device", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--turns", type=int, default=5, help="turns of everything that is compared; the median counts")
    given, failed = parser.parse_args(), []
    size, device = ("4b", "cuda") if given.name == "gpu" else ("tiny", "auto")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as state:
        os.environ |= {"RECALLNB_PATHS__STATE": state, "TORCHINDUCTOR_CACHE_DIR": f"{state}/inductor"}
        bench = open_bench(size := given.model or size, given.device or device, given.turns)
        for name in sets.get(given.name, [given.name]):
            began = time.monotonic()
            try:
                found = benches[name](bench)
            except Exception:  # the others are worth having
                traceback.print_exc()
                failed.append(name)
                continue
            found |= {"machine": machine(bench), "model": size, "seconds": round(time.monotonic() - began)}
            file = given.out / f"{name}.json" if given.name in sets else given.out
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{name}, {found['seconds']} s", json.dumps(found["ratios"], ensure_ascii=False), flush=True)
    if failed:
        sys.exit(f"no figures for {', '.join(failed)}")


def machine(bench: Bench) -> str:
    "What it was measured on."
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    beside = [f"{name} {version(name)}" for name in ("transformers", "trl", "faiss-cpu", "usearch") if find_spec(name.split("-")[0])]
    return ", ".join([device, f"torch {torch.__version__.split('+')[0]}", *beside])


if __name__ == "__main__":
    main()
