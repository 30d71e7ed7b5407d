"""Several processes, as on several GPUs: here two on the CPU, through torchrun and gloo."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import write_model
from train_child import at_call, make_rows

from olpack import progress
from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.recipe import Train
from olpack.train import loop, train
from olpack.train.launch import launcher, run_launched
from olpack.train.processes import partition

torch.set_num_threads(1)
TWO = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Also where there is one: two processes cannot share it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return Base("tiny", write_model(folder, hidden_size=64, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1))


def run(base: Base, folder: Path, settings: Train, rows=None):
    return train(base, rows or make_rows(24), make_rows(8, seed=9), settings, out=folder / "adapter", checkpoint=folder / "checkpoint", key="k")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "adapter/metrics.jsonl").read_text().splitlines()]


def alike(one: list[dict], other: list[dict]) -> None:
    assert [record.keys() for record in one] == [record.keys() for record in other]
    assert [list(record.values()) for record in one] == [pytest.approx(list(record.values()), rel=2e-3) for record in other]


def test_a_base_spread_over_two_processes_learns_what_it_does_in_one(base, tmp_path, capfd):
    settings = Train(epochs=2, batch_size=8, learning_rate=1e-2, eval_every=2, gradient_checkpointing=True)
    run(base, tmp_path / "one", settings)
    capfd.readouterr()
    result = run(base, tmp_path / "two", settings.model_copy(update={"launch": TWO, "sharding": "full"}))
    alike(records(tmp_path / "two"), records(tmp_path / "one"))
    assert result.steps == 6 and result.kept_step == 6
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"adapter"}
    said = capfd.readouterr().err
    assert len(re.findall(r"^eval loss before", said, re.MULTILINE)) == 1  # the first process alone tells


def test_a_run_goes_on_with_another_number_of_processes(base, tmp_path, monkeypatch, capfd):
    settings = Train(epochs=40, batch_size=8, learning_rate=1e-3, eval_every=30)
    run(base, tmp_path / "unbroken", settings)

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_backward", at_call(loop._backward, 10, stop))
        run(base, tmp_path / "changed", settings)
    show = progress.Relay.show

    def ctrl_c(relay, event):
        show(relay, event)
        if event.get("task") == "training":
            monkeypatch.undo()
            raise KeyboardInterrupt  # as a signal would, in the middle of reading

    monkeypatch.setattr(progress.Relay, "show", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "changed", settings.model_copy(update={"launch": TWO}))
    assert (step := re.search(r"stopped at step (\d+) of 120; the same command goes on from step \1$", capfd.readouterr().err, re.MULTILINE))
    assert 9 < int(step[1]) < 120
    run(base, tmp_path / "changed", settings)
    alike(records(tmp_path / "changed"), records(tmp_path / "unbroken"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            ['{"event": "crash", "text": "IndexError: no such token"}', '{"event": "crash", "text": "the peer is gone"}'],
            r"A training process ended with exit code 1: IndexError: no such token The same command goes on from the last checkpoint",
        ),
        (
            ['{"event": "crash", "text": "the peer is gone"}', '{"event": "error", "problem": "Too long.", "remedy": "Shorten."}'],
            r"^Too long\. Shorten\.$",
        ),
        (["a banner", "[1]"], "A training process ended with exit code 1: it printed no reason"),
    ],
)
def test_what_goes_wrong_in_a_process_is_a_sentence(tmp_path, said, expected):
    script = tmp_path / "launcher.py"
    script.write_text("import sys\n" + "".join(f"print({line!r})\n" for line in said) + "sys.exit(1)\n")
    with pytest.raises(OlpackError, match=expected):
        run_launched([sys.executable, str(script)], {})


def test_rows_are_dealt_evenly_and_none_is_lost():
    rows = make_rows(25)
    hands = partition(rows, 4)
    assert sorted(row.source for hand in hands for row in hand) == sorted(row.source for row in rows)
    tokens = [sum(len(row.ids) for row in hand) for hand in hands]
    assert max(tokens) - min(tokens) <= max(len(row.ids) for row in rows)
    assert [len(hand) for hand in partition(rows[:2], 4)] == [1, 1, 0, 0]


def test_a_launcher_that_is_not_there_and_gpus_that_are_not():
    assert launcher(Train()) is None
    with pytest.raises(OlpackError, match="no-such-program, which is no program"):
        launcher(Train(launch="no-such-program --nodes 2"))
    with pytest.raises(OlpackError, match=r"`train.gpus` is 64, and \d+ can be seen"):
        launcher(Train(gpus=64))
