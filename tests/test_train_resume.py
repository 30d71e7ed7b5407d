"""A run that was killed, ran out of disk, or was stopped, and went on: its loss curve and its adapter are those of an unbroken run."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import write_model
from train_child import child

from olpack.recipe import Train
from olpack.train.checkpoint import Checkpoint, State

torch.set_num_threads(1)
SETTINGS = Train(quantization="none", epochs=2, batch_size=8, learning_rate=1e-2, dropout=0.1, eval_every=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), hidden_size=64, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1)


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    done = child(base, out, SETTINGS)
    assert done.code == 0, done.said
    return out / "adapter"


def same(made: Path, expected: Path) -> None:
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        assert (made / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize(("at", "call"), [("backward", 4), ("logged", 2), ("evaluate", 2), ("replace", 6), ("written", 1)])
def test_killed_and_run_again_equals_an_unbroken_run(base, unbroken, tmp_path, at, call):
    killed = child(base, tmp_path, SETTINGS, at=at, call=call)
    assert killed.code == -signal.SIGKILL
    assert not (tmp_path / "adapter").exists()
    again = child(base, tmp_path, SETTINGS)
    assert again.code == 0, again.said
    assert ("going on from step" in again.said) == (at != "logged")  # that was the first step, before any checkpoint
    same(tmp_path / "adapter", unbroken)
    assert not (tmp_path / "checkpoint").exists()


def test_killed_again_and_again(base, unbroken, tmp_path):
    for _ in range(3):
        assert child(base, tmp_path, SETTINGS, at="backward", call=2).code == -signal.SIGKILL
    assert child(base, tmp_path, SETTINGS).code == 0
    same(tmp_path / "adapter", unbroken)


def test_a_full_disk_ends_no_training_and_loses_no_checkpoint(base, unbroken, tmp_path):
    full = child(base, tmp_path, SETTINGS, at="backward", call=4, limit=20_000)
    assert full.code == 1
    assert full.said.count("there is no checkpoint of step") == 1  # said once, though each step tried
    assert "that of step 3 stays" in full.said
    assert "Free some space; the same command goes on from the checkpoint of step 3." in full.said.splitlines()[-1]
    assert not (tmp_path / "adapter").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    again = child(base, tmp_path, SETTINGS)
    assert again.code == 0 and "going on from step 3" in again.said
    same(tmp_path / "adapter", unbroken)


def test_a_checkpoint_that_cannot_be_read_is_said_and_left_aside(tmp_path, capsys):
    saved = Checkpoint(tmp_path, "k")
    saved.file.write_bytes(b"half a file")
    assert saved.load(None, None) is None
    assert "cannot be read" in capsys.readouterr().err


def test_a_flipped_bit_in_a_checkpoint_is_found_wherever_it_is(tmp_path, capsys):
    model, optimizer = torch.nn.Linear(4, 4), None
    model = get_peft_model(torch.nn.Sequential(model), LoraConfig(target_modules=["0"], r=2))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    saved = Checkpoint(tmp_path, "k")
    assert saved.save(model, optimizer, State(step=3, seconds=1.5))
    whole = saved.file.read_bytes()
    digest = whole.index(b'"digest"')  # a checkpoint without one is of an earlier version
    for place in [*range(digest, digest + 8), *random.Random(0).sample(range(8, len(whole)), 100)]:
        saved.file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert saved.load(model, optimizer) is None, whole[place - 20 : place + 20]
        assert "training starts from the beginning" in capsys.readouterr().err
    saved.file.write_bytes(whole)
    assert saved.load(model, optimizer).step == 3


def test_a_checkpoint_of_another_version_is_named_so(tmp_path, capsys):
    saved = Checkpoint(tmp_path, "k")
    record = {"form": 3, "key": "k", "state": {"step": 1, "a field of later": 2}}
    save_file({"adapter.a": torch.zeros(1)}, saved.file, {name: json.dumps(value) for name, value in record.items()})
    assert saved.load(None, None) is None
    printed = capsys.readouterr().err
    assert "is of another version of olpack" in printed and "cannot be read" not in printed
