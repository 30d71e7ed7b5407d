"""Trackers: what is sent to them, which is what metrics.jsonl has, and that a missing one is said before anything is done."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny_models import write_model
from train_child import make_rows

from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.recipe import Train
from olpack.train import train
from olpack.train.metrics import check_trackers

torch.set_num_threads(1)

# The parts of each package that are called, which write down what they are given.
WANDB = """
import json, os, pathlib

def note(**call):
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def log(self, values, step=None):
        note(log=values, step=step)
    def finish(self):
        note(finish=True)

class Config:
    def update(self, values, allow_val_change):
        note(config=values)

config = Config()

def init(**named):
    note(init=named)
    return Run()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return Base("tiny", write_model(folder, hidden_size=64, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1))


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name; the file in which its calls are."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("TRACKED", str(tmp_path / "calls"))
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    yield tmp_path / "calls"
    sys.modules.pop("wandb", None)


def test_weights_and_biases_gets_each_record_and_no_token(base, tmp_path, wandb):
    settings = Train(quantization="none", epochs=1, batch_size=8, trackers=["wandb"])
    build = tmp_path / "my-package"
    train(base, make_rows(24), make_rows(8, seed=9), settings, out=build / "adapter", checkpoint=build / "checkpoint", key="k")
    calls = [json.loads(line) for line in wandb.read_text().splitlines()]
    assert calls[0]["init"]["project"] == "olpack" and calls[0]["init"]["name"] == "my-package"
    assert calls[1]["config"]["rank"] == 16
    assert calls[-1] == {"finish": True}
    records = [json.loads(line) for line in (build / "adapter/metrics.jsonl").read_text().splitlines()][:-1]
    assert [{"step": call["step"], **call["log"]} for call in calls[2:-1]] == records
    assert not any("a-secret" in path.read_text(errors="replace") for path in [wandb, *build.rglob("*.json*")])


def test_a_tracker_that_is_not_installed_is_said_with_the_command():
    with pytest.raises(OlpackError, match=r"asks for no_such_tracker, which is not installed. Install it: pip install no_such_tracker"):
        check_trackers(["no_such_tracker"])
