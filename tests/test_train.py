"""Training: it learns, only what it should, the same whether interrupted or not."""

from __future__ import annotations

import json
import signal
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import write_model
from train_child import at_call, make_rows

from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.recipe import Train
from olpack.train import forward as forward_module
from olpack.train import loop as training_loop
from olpack.train import train
from olpack.train.batches import micro_batches, pack, schedule
from olpack.train.forward import Forward
from olpack.train.loop import learning_rate
from olpack.train.model import load_with_adapter
from olpack.train.ops.flat_parameters import FlatParameters

CPU = torch.device("cpu")
torch.set_num_threads(1)  # matrices this small are slower on two


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return Base("tiny", write_model(tmp_path_factory.mktemp("base")))


def run(base: Base, folder: Path, settings: Train, rows=None, key="k"):
    return train(base, rows or make_rows(24), make_rows(8, seed=9), settings, out=folder / "adapter", checkpoint=folder / "checkpoint", key=key)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for line in (folder / "adapter/metrics.jsonl").read_text().splitlines() if "loss" in (record := json.loads(line))]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_it_learns_and_writes_an_adapter_that_peft_loads(base, tmp_path, quantization):
    result = run(base, tmp_path, Train(quantization=quantization, epochs=12, batch_size=8, learning_rate=1e-2))
    assert result.eval_loss_after < 0.8 * result.eval_loss_before
    assert result.steps == 36
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "settings.json"}
    assert not (tmp_path / "checkpoint").exists()
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted({name.rpartition(".")[2] for name in config["target_modules"]}) == linear

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), tmp_path / "adapter")
    held_out = make_rows(8, seed=9)
    forward = Forward(model.eval(), CPU, checkpointing=False)
    with torch.no_grad():
        loss = forward.loss(pack(held_out, CPU)).item() / sum(row.target_count for row in held_out)
    assert loss == pytest.approx(result.eval_loss_after, rel=1e-4 if quantization == "none" and result.device == "cpu" else 0.1)


def test_fewer_rows_than_a_batch_are_one_step_that_trains(base, tmp_path):
    from safetensors.torch import load_file

    assert run(base, tmp_path, Train(quantization="none", epochs=1, batch_size=64), make_rows(3)).steps == 1
    second = [weight for name, weight in load_file(tmp_path / "adapter/adapter_model.safetensors").items() if "lora_B" in name]
    assert len(second) == 14 and all(weight.any() for weight in second)


def test_the_base_is_quantized_to_nf4_with_double_quantization(base):
    from bitsandbytes.nn import Linear4bit

    model = load_with_adapter(base, Train(), CPU).model
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert all(layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_codes_to_be_sharded_over_gpus_are_not_stored_as_16_bit_numbers(base):
    """A GPU's copies of those keep numbers, and not the bits of what is none (bitsandbytes' issue 1945)."""
    from bitsandbytes.nn import Linear4bit

    model = load_with_adapter(base, Train(), CPU, sharded=True).model
    assert {module.weight.dtype for module in model.modules() if isinstance(module, Linear4bit)} == {torch.float32}


def test_gradients_do_not_depend_on_how_a_batch_is_cut(base):
    rows, gradients = make_rows(8), []
    for budget in (16, 10_000):
        model = load_with_adapter(base, Train(quantization="none"), CPU).model
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
        forward, trained = Forward(model, CPU, checkpointing=False), FlatParameters(model)
        training_loop._backward(forward, trained, rows, training_loop.State(budget=budget))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained.parameters]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_flat_parameters_train_like_single_ones(base, monkeypatch):
    rows, weights, counts = make_rows(8), [], []
    for small, large, most in ((10**9, 0, 0), (2000, 4000, 10**9), (0, 10**9, 9000), (0, 10**9, 10**9)):
        for name, value in {"SMALL": small, "LARGE": large, "_MOST": most}.items():
            monkeypatch.setattr(f"olpack.train.ops.flat_parameters.{name}", value)
        model = load_with_adapter(base, Train(quantization="none", target_modules=["q_proj", "v_proj"], modules_to_save=["norm"]), CPU).model
        trained = FlatParameters(model)
        counts.append(len(trained.parameters))
        optimizer = torch.optim.AdamW(trained.parameters, lr=1e-2)
        for _ in range(2):
            forward = Forward(model, CPU, checkpointing=False)
            training_loop._backward(forward, trained, rows, training_loop.State(budget=10_000))
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert counts[0] == len(weights[0]) > counts[1] > counts[2] > counts[3] == 1
    assert any("norm" in name for name in weights[0])
    for name, parameter in weights[0].items():
        assert all(torch.allclose(parameter, other[name], atol=1e-6) for other in weights[1:])


def test_memory_that_runs_out_while_gradients_are_flat_counts_none_twice(base, monkeypatch):
    monkeypatch.setattr("olpack.train.ops.flat_parameters.SMALL", 0)
    rows, gradients = make_rows(8), []
    for fails in (False, True):
        model = load_with_adapter(base, Train(quantization="none"), CPU).model
        forward, trained = Forward(model, CPU, checkpointing=False), FlatParameters(model)
        state = training_loop.State(budget=2 * max(len(row.ids) for row in rows))
        with monkeypatch.context() as patch:
            if fails:  # in the second micro-batch, when there are gradients already
                patch.setattr(forward_module, "pack", at_call(forward_module.pack, 2, lambda: raise_out_of_memory()))
            budget = state.budget
            training_loop._backward(forward, trained, rows, state)
            assert (state.budget < budget) == fails
        gradients.append(trained.parameters[0].grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def raise_out_of_memory():
    raise torch.OutOfMemoryError


def test_gradient_checkpointing_gives_the_same_run(base, tmp_path):
    for checkpointing in (False, True):
        run(base, tmp_path / str(checkpointing), Train(epochs=1, batch_size=8, gradient_checkpointing=checkpointing))
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)


def test_the_model_is_gone_when_the_gpus_memory_is_freed(base, tmp_path, monkeypatch):
    models, alive = [], []

    def load(*given, **named):
        adapted = load_with_adapter(*given, **named)
        models.append(weakref.ref(adapted.model.get_base_model()))
        return adapted

    monkeypatch.setattr(training_loop, "load_with_adapter", load)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(models[0]()))
    run(base, tmp_path, Train(quantization="none", epochs=1, batch_size=8))
    assert alive == [None]


def test_an_interrupted_run_goes_on_where_it_was(base, tmp_path, monkeypatch):
    settings = Train(epochs=3, batch_size=8, learning_rate=1e-3, dropout=0.1)
    run(base, tmp_path / "whole", settings)

    # In the middle of the fourth step, which must still be finished.
    backward = at_call(training_loop._backward, 4, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(training_loop, "_backward", backward)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "broken", settings)
    assert not (tmp_path / "broken/adapter").exists()
    assert (tmp_path / "broken/checkpoint/checkpoint.safetensors").is_file()
    run(base, tmp_path / "broken", settings)
    assert backward.calls == 9  # none of the steps was done twice
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_checkpoint_of_other_settings_is_not_used(base, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_loop, "_backward", stop)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path, Train(epochs=1), key="one")
    monkeypatch.undo()
    assert run(base, tmp_path, Train(epochs=1), key="two").steps == 2


def test_a_loss_that_is_not_finite_ends_with_a_remedy(base, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "_backward", lambda *_: float("nan"))
    with pytest.raises(OlpackError, match=r"not finite at step 1.*train.learning_rate"):
        run(base, tmp_path, Train(epochs=1))
    assert not (tmp_path / "adapter").exists()


def test_unknown_target_modules(base, tmp_path):
    with pytest.raises(OlpackError, match="target_modules"):
        run(base, tmp_path, Train(target_modules=["no_such_layer"]))


def test_schedule_is_a_permutation_for_each_epoch_and_repeatable():
    steps = schedule(10, 2.5, 4, seed=3)
    flat = [index for step in steps for index in step]
    assert len(flat) == 25
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert steps == schedule(10, 2.5, 4, seed=3) != schedule(10, 2.5, 4, seed=4)


def test_micro_batches_stay_within_the_budget_and_lose_no_row():
    rows = make_rows(40)
    groups = list(micro_batches(rows, 64))
    assert sorted(row.source for group in groups for row in group) == sorted(row.source for row in rows)
    assert all(sum(len(row.ids) for row in group) <= 64 for group in groups)
    assert [len(group) for group in micro_batches(rows[:3], 1)] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(kind):
    settings = Train(schedule=kind, warmup=0.1, learning_rate=1e-3)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] > 0
    assert max(rates) == 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < (2e-5 if kind != "constant" else 1)
