"""Evaluations during training: when they are, which adapter is kept, when a run stops early, and what memory decides."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_model
from train_child import make_rows

from olpack.data import TokenRow
from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.model.shape import MetaModel
from olpack.recipe import Train
from olpack.train import TrainResult, loop, planner, train
from olpack.train.forward import Forward
from olpack.train.loop import evaluation_interval
from olpack.train.memory import estimate_training
from olpack.train.processes import ALONE, Ranks

torch.set_num_threads(1)
STEEP = Train(quantization="none", epochs=6, batch_size=8, learning_rate=2e-2, eval_every=1, schedule="constant", warmup=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return Base("tiny", write_model(folder))


def run(base: Base, folder: Path, settings: Train, eval_rows=None) -> TrainResult:
    held_out = eval_rows or make_rows(8, seed=9)
    return train(base, make_rows(24), held_out, settings, out=folder / "adapter", checkpoint=folder / "checkpoint", key="k")


def other_rows() -> list[TokenRow]:
    """Rows that end as those that are learned, and answer otherwise: with them the loss falls first, and rises then."""
    return [replace(row, ids=[*row.ids[:-5], 20, 21, 22, 23, 0]) for row in make_rows(8, seed=9)]


def evaluations(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "adapter/metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def test_the_best_adapter_is_kept_and_metrics_say_which(base, tmp_path):
    best = run(base, tmp_path / "best", STEEP, other_rows())
    losses = evaluations(tmp_path / "best")
    assert list(losses) == list(range(19))
    lowest = min((step for step in losses if step), key=losses.get)
    assert 0 < lowest < 18 and best.steps == 18
    assert best.kept_step == lowest and best.eval_loss_after == losses[lowest] and best.eval_loss_before == losses[0]
    last_line = (tmp_path / "best/adapter/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last_line) == {"step": 18, "kept_step": lowest}
    # It is the adapter of a run that ends at that step.
    run(base, tmp_path / "short", STEEP.model_copy(update={"epochs": lowest * 8 / 24, "keep": "last"}), other_rows())
    kept, short = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("best", "short"))
    assert all(torch.equal(kept[name], short[name]) for name in short)

    last = run(base, tmp_path / "last", STEEP.model_copy(update={"keep": "last"}), other_rows())
    assert last.kept_step == 18 and last.eval_loss_after == losses[18] > losses[lowest]


def test_each_evaluation_has_its_perplexity(base, tmp_path):
    run(base, tmp_path, Train(quantization="none", epochs=1, batch_size=8))
    for line in map(json.loads, (tmp_path / "adapter/metrics.jsonl").read_text().splitlines()):
        assert "eval_loss" not in line or line["perplexity"] == math.exp(line["eval_loss"])


def test_it_stops_early_and_counts_on_after_an_interrupt(base, tmp_path, monkeypatch, capsys):
    settings = STEEP.model_copy(update={"patience": 6})
    result = run(base, tmp_path / "whole", settings, other_rows())
    assert result.steps == result.kept_step + 6 < 18
    said = f"stopped early at step {result.steps} of 18: the held-out loss is lowest at step {result.kept_step}, 6 evaluations ago"
    assert said in capsys.readouterr().err

    real = loop._backward

    def backward(model, trained, rows, state, *rest):
        if state.step == result.kept_step + 1:
            raise KeyboardInterrupt  # one evaluation after the best
        return real(model, trained, rows, state, *rest)

    monkeypatch.setattr(loop, "_backward", backward)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "broken", settings, other_rows())
    monkeypatch.undo()
    assert run(base, tmp_path / "broken", settings, other_rows()).steps == result.steps
    assert evaluations(tmp_path / "broken") == evaluations(tmp_path / "whole")
    kept, whole = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(kept[name], whole[name]) for name in whole)


def test_evaluations_are_ten_or_a_tenth_of_the_work():
    assert evaluation_interval(100, 10_000, 500, Train()) == 25  # four of them: 4 × 500 / 2 is a tenth of 10,000
    assert evaluation_interval(1000, 10_000_000, 500, Train()) == 100
    assert evaluation_interval(100, 100, 5_000, Train()) == 100  # at the end, at least
    assert evaluation_interval(100, 100, 5_000, Train(eval_every=7)) == 7


def test_out_of_memory_halves_the_micro_batch_and_nothing_else(base, tmp_path, monkeypatch, capsys):
    settings = Train(quantization="none", epochs=1, batch_size=8, micro_batch_tokens=128)
    run(base, tmp_path / "enough", settings)
    real, calls = Forward.loss, []

    def forward(self, flat):
        calls.append(flat.ids.numel())
        if len(calls) == 4:  # after some gradients of the batch are there
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, flat)

    monkeypatch.setattr(Forward, "loss", forward)
    run(base, tmp_path / "short", settings)
    assert "going on with micro-batches of 64 tokens, same batch" in capsys.readouterr().err
    assert max(calls[4:]) <= 64 < max(calls[:4])
    one, other = ([json.loads(line) for line in (tmp_path / name / "adapter/metrics.jsonl").read_text().splitlines()] for name in ("enough", "short"))
    assert [list(record.values()) for record in one] == [pytest.approx(list(record.values()), rel=1e-3) for record in other]


def test_a_loss_that_is_no_number_names_the_last_good_checkpoint(base, tmp_path, monkeypatch):
    real = loop._backward

    def backward(forward, trained, rows, state, *rest):
        return float("nan") if state.step == 2 else real(forward, trained, rows, state, *rest)

    monkeypatch.setattr(loop, "_backward", backward)
    with pytest.raises(OlpackError, match=r"not finite at step 3.*checkpoint\.safetensors holds step 2\..*train.learning_rate"):
        run(base, tmp_path, Train(quantization="none", epochs=1, batch_size=8))
    assert (tmp_path / "checkpoint/checkpoint.safetensors").is_file()


SHAPE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@pytest.fixture(scope="module")
def model() -> MetaModel:
    return MetaModel(SHAPE, "shape")


def test_what_fits_is_the_fastest_that_does(model):
    rows = make_rows(400)
    settings = Train(batch_size=64)
    wide = planner.on_gpu(model, rows, settings, 80 << 30)
    assert not wide.checkpointing and wide.bytes < wide.available
    assert wide.tokens >= wide.largest  # a whole step at once, and no more
    assert "no gradient checkpointing" in wide.summary
    checkpointed = planner.on_gpu(model, rows, settings.model_copy(update={"gradient_checkpointing": True}), 80 << 30)
    narrow = planner.on_gpu(model, rows, settings, round(0.5 * (checkpointed.bytes + wide.bytes)))
    assert narrow.checkpointing and narrow.tokens == wide.tokens and narrow.bytes == checkpointed.bytes < narrow.available < wide.bytes
    assert f"without checkpointing {wide.largest:,} tokens would take" in narrow.summary
    tight = planner.on_gpu(model, rows, settings, narrow.bytes - 1, streamable=1 << 30)
    assert tight.offload_head and tight.tokens == narrow.tokens and tight.bytes < narrow.bytes - 50e6
    assert not narrow.offload_head and "output layer offloaded" in tight.summary
    tighter = planner.on_gpu(model, rows, settings, tight.bytes - 1, streamable=1 << 30)
    assert tighter.offload_head and tighter.tokens < narrow.tokens
    none = planner.on_gpu(model, rows, settings, 100 << 20)
    assert none.tokens == max(len(row.ids) for row in rows) and "more than the" in none.summary


def test_an_output_layer_that_embeds_in_a_way_of_its_own_is_not_offloaded():
    """Gemma 3's embedding scales what it looks up, with a number on the GPU."""
    shape = {**SHAPE, "model_type": "gemma3_text", "head_dim": 128, "tie_word_embeddings": True}
    scaled = planner.on_gpu(MetaModel(shape, "shape"), make_rows(400), Train(batch_size=64), 100 << 20)
    assert not scaled.offload_head and scaled.training.head == 0
    shared = planner.on_gpu(MetaModel({**SHAPE, "tie_word_embeddings": True}, "shape"), make_rows(400), Train(batch_size=64), 100 << 20)
    assert shared.offload_head and shared.training.head == 2 * 2048 * 32000


def test_the_output_layer_stays_where_offloading_gains_nothing():
    wide = MetaModel({**SHAPE, "vocab_size": 262_144}, "shape")
    rows, settings = make_rows(400), Train(batch_size=64)
    found = [planner.on_gpu(wide, rows, settings, available) for available in range(1 << 30, 5 << 30, 64 << 20)]
    assert any(one.offload_head for one in found)
    assert all(one.training.total(True) > one.available for one in found if one.offload_head)


def test_an_output_layer_with_an_adapter_is_not_offloaded(model):
    settings = Train(batch_size=64, target_modules=["q_proj", "lm_head"])
    assert planner.on_gpu(model, make_rows(400), settings, 100 << 20).training.head == 0


def test_attention_outputs_are_offloaded_where_they_fit_and_the_run_is_long(model):
    rows = make_rows(400)
    settings = Train(batch_size=64, epochs=40, gradient_checkpointing=True)
    pinnable = 64 << 30
    offloaded = planner.on_gpu(model, rows, settings, 80 << 30, pinnable=pinnable)
    assert offloaded.offload_attention and "attention outputs offloaded" in offloaded.summary
    without = planner.on_gpu(model, rows, settings, 80 << 30)
    assert not without.offload_attention and without.bytes < offloaded.bytes and without.tokens == offloaded.tokens
    assert not planner.on_gpu(model, rows, settings, 80 << 30, pinnable=sum(offloaded.pinned_parts.values()) - 1).offload_attention
    assert not planner.on_gpu(model, rows, settings, offloaded.bytes - 1, pinnable=pinnable, streamable=pinnable).offload_attention
    assert not planner.on_gpu(model, rows, settings.model_copy(update={"epochs": 1}), 80 << 30, pinnable=pinnable).offload_attention


def test_inputs_that_torch_checkpoints_are_on_the_gpu():
    """Layers that share keys go through torch's own checkpoint."""
    shared = MetaModel({**SHAPE, "model_type": "gemma3n_text", "head_dim": 128, "num_kv_shared_layers": 4, "num_hidden_layers": 10}, "shape")
    found = estimate_training(shared, rank=4, tokens=1024, precision="nf4")
    assert not found.host_inputs and not found.host_results
    assert found.checkpointed >= 10 * 2 * 1024 * 2048


def test_several_processes_choose_by_the_one_that_has_least(base, monkeypatch):
    class Accelerator:
        """Of two processes, whose other one has 100 MiB on its GPU."""

        num_processes, process_index, device = 2, 0, torch.device("cpu")

        def reduce(self, number: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "max"
            return torch.maximum(number, torch.tensor(-(100 << 20)))

    monkeypatch.setattr(planner, "free_gpu_memory", lambda _: 80 << 30)
    chosen = planner.choose(base, make_rows(40), Train(), torch.device("cuda"), Ranks(Accelerator()))
    assert chosen.available == 100 << 20
    assert planner.choose(base, make_rows(40), Train(), torch.device("cuda"), ALONE).available == 80 << 30


def test_what_the_recipe_sets_is_left_as_it_is(model):
    settings = Train(batch_size=64, micro_batch_tokens=100, gradient_checkpointing=False)
    found = planner.on_gpu(model, make_rows(400), settings, 1 << 20)
    assert (found.tokens, found.checkpointing) == (100, False)


def test_layers_are_sharded_where_they_do_not_fit_into_one_gpu(model):
    rows, settings = make_rows(400), Train(batch_size=64)
    whole = planner.on_gpu(model, rows, settings.model_copy(update={"sharding": "none"}), 80 << 30, gpus=4)
    spread = planner.on_gpu(model, rows, settings.model_copy(update={"sharding": "full"}), 80 << 30, gpus=4)
    assert spread.training.weights < whole.training.weights
    assert not planner.on_gpu(model, rows, settings, 80 << 30, gpus=4).sharded
    smallest = {"sharding": "none", "micro_batch_tokens": 20, "gradient_checkpointing": True}
    least = planner.on_gpu(model, rows, settings.model_copy(update=smallest), 0, gpus=4)
    assert planner.on_gpu(model, rows, settings, least.bytes - (20 << 20), gpus=4).sharded
