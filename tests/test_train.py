"""Several processes train as one: the same losses from the same global batch, default recipe and seed recipe, float32 and bfloat16."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from recallnb.prepare import save_asked, world_materials
from recallnb.settings import load_settings
from recallnb.train import main, save_materials


def losses(run, stage, processes, batch, recipe="default", **options):
    "Train one short epoch in `run` with a global batch of `batch`; the rows of its log."
    run.mkdir()
    materials, asked = world_materials(load_settings().paths.world, 7)
    save_materials(run, materials + materials[:2])  # a memory twice: two processes may write the same text
    save_asked(run, asked)
    section = f"{'seed_' if recipe == 'seed' else ''}stage{stage}"
    options = {"epochs": 1, "batch_size": batch // processes, "max_tokens": 384, **options}
    environment = {f"RECALLNB_{section}__{key}".upper(): str(value) for key, value in options.items()}
    environment |= {"RECALLNB_TRAINING__SFT_SAMPLES": "5", "RECALLNB_TRAINING__REPLAY": "1.0", "RECALLNB_MODEL__DEVICE": "cpu"}
    # --multi_gpu only means several processes here: the trainer asks for the CPU. With --cpu, and without MPI, accelerate starts a single one.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    start = load_settings().paths.base if recipe == "seed" else load_settings().paths.model
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "recallnb.train", "--stage", str(stage), "--run", str(run), "--recipe", recipe, "--start", str(start)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:]
    assert (run / f"stage{stage}" / "model" / "model.safetensors").is_file()
    return json.loads((run / f"stage{stage}" / "log.json").read_text("utf-8"))


def compare(one, two, tolerance):
    assert [row.keys() for row in one] == [row.keys() for row in two] and len(one) > 2
    for first, second in zip(one, two):
        for name in first:
            assert second[name] == pytest.approx(first[name], abs=tolerance, rel=tolerance), (name, first, second)


def test_two_processes_train_stage2_as_one(tmp_path):
    "Batches of 4 against 2 + 2: negatives are gathered, labels counted over both; an odd number of lessons leaves one process without."
    one = losses(tmp_path / "one", 2, 1, 4)
    assert any("query" in row for row in one) and any("query" not in row for row in one)  # memories, and chats
    compare(one, losses(tmp_path / "two", 2, 2, 4), 1e-4)


def test_two_processes_with_accumulation(tmp_path):
    "A step of 4 as two batches of 1 on each of two processes; regression has no negatives, so it is the same as one batch."
    one = losses(tmp_path / "one", 1, 1, 4, "seed", learning_rate=1e-3)
    compare(one, losses(tmp_path / "two", 1, 2, 2, "seed", learning_rate=1e-3, gradient_accumulation=2), 1e-4)


def test_two_processes_with_mixed_precision_and_frozen_bfloat16(tmp_path, monkeypatch):
    one = losses(tmp_path / "one", 1, 1, 4)
    compare(one, losses(tmp_path / "two", 1, 2, 4, mixed_precision="bf16"), 5e-2)  # bfloat16 has three digits, and the temperature multiplies cosines by 20
    monkeypatch.setenv("RECALLNB_TRAINING__FROZEN", "bfloat16")
    compare(one, losses(tmp_path / "three", 1, 1, 4), 5e-2)


def test_frozen_weights_of_four_bits(tmp_path, monkeypatch):
    "They are near the true ones, what is trained beside them is saved beside the true ones, and a missing package is named."
    one = losses(tmp_path / "one", 2, 1, 4, epochs=2)
    monkeypatch.setenv("RECALLNB_TRAINING__FROZEN", "nf4")
    compare(one, losses(tmp_path / "two", 2, 1, 4, epochs=2), 0.3)  # the second epoch comes after the questions
    start, plain, four = (load_file(folder / "model.safetensors") for folder in (load_settings().paths.model, tmp_path / "one/stage2/model", tmp_path / "two/stage2/model"))
    assert start.keys() == plain.keys() == four.keys()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    moved = [(new[name].float() - start[name].float()).norm() for new in (plain, four)]
    assert 0.5 < moved[1] / moved[0] < 2  # by a night, and not by the rounding to four bits, which is much more
    monkeypatch.setattr("recallnb.model.find_spec", lambda package: None)
    with pytest.raises(SystemExit, match=r"nf4 needs the package bitsandbytes: python -m pip install"):
        main(["--stage", "2", "--run", str(tmp_path / "one"), "--start", str(load_settings().paths.model)])
