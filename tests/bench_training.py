"""Benchmarks of training: both stages beside transformers' Trainer, and stage 2 beside TRL's SFTTrainer, on the same lessons with the same LoRA.

In stage 2 the others get our way of injecting as a hook in front of the backbone, and batches of similar length. Only ours trains
the query as well; so the losses that are compared are those of the labels, and the rivals of a memory, which the others would not
write, are left out. Stage 1 has no counterpart in TRL."""

import copy
import gc
import logging
import multiprocessing
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from recallnb.embed import write_batch
from recallnb.inject import inject_memory_embedding_to_inputs_embeds
from recallnb.lessons import Batch, Lesson, Lookup, collate
from recallnb.lora import add_lora, fit
from recallnb.model import tiny_config, unwrap
from recallnb.settings import load_settings
from recallnb.stage1 import Stage1, query_loss
from recallnb.stage2 import Stage2
from recallnb.tokens import encode_text, recall_ids, recall_tokens


class Clock(TrainerCallback):
    "Seconds of each step, and the losses."

    def __init__(self):
        self.moments, self.losses = [], []

    def on_step_begin(self, args, state, control, **more):
        self.moments.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **more):
        self.losses += [logs["loss"]] if "loss" in logs else []

    @property
    def per_step(self) -> float:
        return (self.moments[-1] - self.moments[0]) / (len(self.moments) - 1)


def inject_in_front(model, tokenizer, skill) -> None:
    "Let the backbone write the memories of its batch and inject them, as `Stage2` does; they stand behind their pads."
    base, tokens = unwrap(model), recall_tokens(tokenizer)

    def hook(backbone, arguments, given):
        ids = given.get("input_ids")
        if ids is None:
            return None  # the writing pass itself
        embeds, pads = base.get_input_embeddings()(ids), ids == tokens.pad
        texts = [tuple(row[place + 1 + skill.values : row.index(tokens.end, place)]) for row in ids.tolist() for place in [at for at, id in enumerate(row) if id == tokens.recall]]
        if texts:
            rows = {text: number for number, text in enumerate(dict.fromkeys(texts))}
            written = write_batch(model, [[*text, tokens.recall] + [tokens.pad] * skill.values for text in rows], skill)
            embeds = inject_memory_embedding_to_inputs_embeds(embeds, pads, written.values[[rows[text] for text in texts]])
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        kept = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask", "position_ids")}
        return arguments, kept | {"inputs_embeds": embeds, "position_ids": positions}

    base.model.register_forward_pre_hook(hook, with_kwargs=True)


def pad(lessons: list[dict]) -> dict[str, Tensor]:
    "A batch as the others take it."
    longest = max(len(one["input_ids"]) for one in lessons)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**one, "attention_mask": [1] * len(one["input_ids"])} for one in lessons]
    return {name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows]) for name, value in fill.items()}


class PlainStage1(nn.Module):
    "Stage 1 as one writes it first: the whole model over whole sequences, states of all layers, and the one at `<recall>` picked out."

    def __init__(self, model, skill, temperature: float):
        super().__init__()
        self.model, self.skill, self.temperature = model, skill, temperature

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.model(input_ids=batch.ids.to(unwrap(self.model).device), output_hidden_states=True, use_cache=False)
        keys = write_batch(self.model, batch.rows, self.skill).keys[: len(batch.memories)]
        loss = query_loss(outputs.hidden_states[-1].flatten(0, 1)[batch.at], keys, batch, self.temperature)
        return {"loss": loss / max(1, int((batch.found > -2).sum()))}


def arguments(options, cuda: bool, folder: str) -> dict:
    "What the other trainers are told: our settings, and their best."
    return dict(output_dir=folder, per_device_train_batch_size=options.batch_size, num_train_epochs=options.epochs, learning_rate=options.learning_rate, lr_scheduler_type="constant",
                max_grad_norm=1.0, logging_steps=1, report_to=[], save_strategy="no", use_cpu=not cuda, remove_unused_columns=False, disable_tqdm=True,
                train_sampling_strategy="group_by_length", gradient_checkpointing=options.gradient_checkpointing, optim="adamw_torch_fused", seed=options.seed)


def fit_ours(stage: nn.Module, loss: str, tokenizer, lessons: list[Lesson], options) -> tuple[float, list[float]]:
    "Seconds of a step and losses, with `fit`."
    moments: list[float] = []
    stage.register_forward_pre_hook(lambda *_: moments.append(time.perf_counter()))
    log = fit(stage, lambda epoch: [lessons], options, tokenizer, progress="", weights={name: float(name == loss) for name in ("query", "decode")})  # the others have one loss, too
    return (moments[-1] - moments[0]) / (len(moments) - 1), [row.get(loss, 0.0) for row in log]  # a step of lessons without a recall has no query


def find_with(kind: str, model, tokenizer, skill, lessons: list[Lesson], options) -> tuple[float, list[float]]:
    "Stage 1: seconds of a step and losses per query, with `ours` or `Trainer`."
    wrapped = add_lora(model.float(), options, tokenizer)
    if kind == "ours":
        return fit_ours(Stage1(wrapped, skill, options.temperature), "query", tokenizer, lessons, options)
    clock, data = Clock(), [{"input_ids": one.ids, "lesson": one} for one in lessons]
    with tempfile.TemporaryDirectory() as folder:
        given = TrainingArguments(**arguments(options, unwrap(model).device.type == "cuda", folder))
        Trainer(PlainStage1(wrapped, skill, options.temperature), given, train_dataset=data, callbacks=[clock],
                data_collator=lambda rows: {"batch": collate([row["lesson"] for row in rows], tokenizer, skill)}).train()
    return clock.per_step, clock.losses


def train_with(kind: str, model, tokenizer, skill, lessons: list[Lesson], options) -> tuple[float, list[float]]:
    "Stage 2: seconds of a step and losses per label, with `ours`, `Trainer` or `TRL`."
    wrapped = add_lora(model.float(), options, tokenizer)
    if kind == "ours":
        return fit_ours(Stage2(wrapped, skill), "decode", tokenizer, lessons, options)
    inject_in_front(wrapped, tokenizer, skill)
    clock, data = Clock(), [{"input_ids": one.ids, "labels": one.labels} for one in lessons]
    with tempfile.TemporaryDirectory() as folder:
        common = arguments(options, unwrap(model).device.type == "cuda", folder)
        if kind == "Trainer":
            trainer = Trainer(wrapped, TrainingArguments(**common), train_dataset=data, data_collator=pad, callbacks=[clock])
        else:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            unwrap(wrapped).get_output_embeddings().bias = None  # newer versions ask for it, and peft's wrapper of the trained rows has none
            given = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, bf16=False)
            trainer = SFTTrainer(wrapped, given, train_dataset=Dataset.from_list(data), data_collator=pad, processing_class=tokenizer, callbacks=[clock])
        trainer.train()
    return clock.per_step, clock.losses


def kinds() -> list[str]:
    return ["ours", "Trainer"] + ["TRL"] * (find_spec("trl") is not None)


def race(bench, number: int, train: Callable, names: list[str], memories: int) -> dict:
    "Samples per second of a stage, each trainer in turns, over one epoch of a night's lessons."
    from recallnb.train import Lessons, Material  # here: it needs datasets, which the benches for a GPU do without

    settings, tokenizer = load_settings(), bench.processor.tokenizer
    materials = [Material(text, "LinF", ["你还记得吗？"], text) for text in bench.texts(memories)]
    lessons = Lessons(number, "default", settings, materials, tokenizer, bench.skill)(0)[0]
    if number == 2:
        lessons = [replace(one, lookups=[replace(lookup, rivals=()) for lookup in one.lookups]) for one in lessons if len(one.lookups) < 2]
    options = settings.stage(number, "default").model_copy(update={"epochs": 1, "warmup": 0.0})
    taken, losses = {name: [] for name in names}, {}
    for _ in range(2):
        for name in names:
            per_step, losses[name] = train(name, copy.deepcopy(bench.model), tokenizer, bench.skill, lessons, options)
            taken[name].append(per_step)
    speeds = {name: options.batch_size / min(seconds) for name, seconds in taken.items()}
    means = {f"mean loss of the epoch, {name}": statistics.mean(some) for name, some in losses.items()}  # the same lessons, in other orders
    tokens = statistics.mean(one.lookups[0].at + 1 if number == 1 and one.lookups else len(one.ids) for one in lessons)  # stage 1 reads no further
    layers = sum(p.numel() for p in bench.model.model.language_model.layers.parameters())
    limit = 1 / bench.multiply(4 * layers * tokens)  # forward, and backward to the activations: the weights themselves are frozen
    return {"title": f"samples per second of stage {number}, {tokens:.0f} tokens each", "rows": speeds | {"limit: the matrices' arithmetic": limit} | means,
            "ratios": {f"against {name}": speeds["ours"] / speeds[name] for name in speeds if name != "ours"},
            "curves": {name: [round(statistics.mean(some[at : at + 4]), 4) for at in range(0, len(some), 4)] for name, some in losses.items()}}  # the means of four steps


def finding(bench, memories: int = 64) -> dict:
    "Stage 1."
    return race(bench, 1, find_with, ["ours", "Trainer"], memories)


def training(bench, memories: int = 64) -> dict:
    "Stage 2."
    return race(bench, 2, train_with, kinds(), memories)


class Peak:
    "The most memory in use while the block ran, above what was in use before, in bytes; looked at every millisecond on a CPU."

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def __enter__(self):
        gc.collect()
        self.before = self.most = self.now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.most = max(self.most, self.now())

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated()
        self.bytes = self.most - self.before


def long_lesson(tokenizer, skill, tokens: int) -> Lesson:
    "A chat of so many tokens that ends in a recall, which alone has labels."
    text = "用户LinF的生日为11月6日，最喜欢的水果为杨梅"
    ids, labels = recall_ids(tokenizer, text, skill.values)
    before = (encode_text(tokenizer, "今天中午和同事一起吃了火锅。") * tokens)[: tokens - len(ids)]
    return Lesson(before + ids, [-100] * len(before) + labels, [Lookup(text, text, at=len(before))])


def peak(number: int, kind: str, config: dict, device: str, tokenizer, skill, tokens: int) -> int:
    "Bytes that two steps need beyond the weights, of a model of this shape; in a process of its own, which has loaded its libraries before."
    logging.disable(logging.WARNING)
    options, train = load_settings().stage(number, "default").model_copy(update={"epochs": 1, "batch_size": 1}), find_with if number == 1 else train_with

    def steps(shape: Qwen3VLConfig, tokens: int) -> int:
        with torch.device(device):
            model = Qwen3VLForConditionalGeneration._from_config(shape, attn_implementation="sdpa").float()
        with Peak(model.device) as watch:
            train(kind, model, tokenizer, skill, [long_lesson(tokenizer, skill, tokens)] * 2, options)
        return watch.bytes

    steps(tiny_config(tokenizer), 64)
    return steps(Qwen3VLConfig(**config), tokens)


def training_memory(bench, tokens: int = 3000, words: int = 151_936) -> dict:
    "Megabytes beyond the weights while a chat of 3,000 tokens is trained, with the 4B model's vocabulary."
    tokenizer, rows = bench.processor.tokenizer, {}
    config = bench.model.config if bench.model.config.text_config.vocab_size >= words else tiny_config(tokenizer, rows=words)
    for number, name in [(1, "ours"), (1, "Trainer"), *((2, name) for name in kinds())]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            rows[f"stage {number}, {name}"] = alone.submit(peak, number, name, config.to_dict(), bench.device.type, tokenizer, bench.skill, tokens).result() / 2**20
    shares = {name: rows[f"{name[:7]}, ours"] / size for name, size in rows.items() if not name.endswith("ours")}
    return {"title": f"megabytes beyond the weights, {tokens} tokens, {words} words", "rows": rows, "ratios": {f"{name[:7]}: share of {name[9:]}": share for name, share in shares.items()}}
