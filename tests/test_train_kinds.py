"""Methods and base kinds: what is merged is what was trained, packed bases compute as the weights they stand for, what cannot be is refused."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from quantized_bases import BY_HAND, write_quantized
from safetensors.torch import load_file, save_file
from tiny_models import converter, write_model, write_vision_model

from olpack import recipe
from olpack.data import Renderer, TokenRow, load_chats, render_rows
from olpack.errors import OlpackError
from olpack.export import Target
from olpack.export.adapter import read_adapter
from olpack.llamacpp.engine import Engine, Sampling
from olpack.model.base import Base
from olpack.model.checkpoint import read_tensor_headers
from olpack.model.packed import dequantize_hqq, quantize_hqq
from olpack.recipe import Train
from olpack.stages.build import Build
from olpack.stages.calibration import IMPORTANCE, SENSITIVITY
from olpack.stages.order import stage_of
from olpack.stages.stage import Artefact
from olpack.train import loop, train
from olpack.train.adapter import save_adapter
from olpack.train.checks import BASE_KINDS, check_training, merge_table
from olpack.train.frozen import FrozenLinear
from olpack.train.model import load_with_adapter

CPU = torch.device("cpu")
IDS = torch.arange(20, 60)[None]
ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return Base("tiny", write_model(tmp_path_factory.mktemp("base") / "base", dtype="float32"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A base in one of the packings, and the model in float32 that it stands for."""
    root = tmp_path_factory.mktemp("packed")
    plain = write_model(root / "base", tied=False, intermediate_size=320)

    def folders(name: str) -> tuple[Base, Path]:
        if not (root / name).exists():
            (root / name).mkdir()
            write_quantized(name, plain, root / name / "quantized", root / name / "plain")
        return Base(name, root / name / "quantized"), root / name / "plain"

    return folders


def as_if_trained(base: Base, settings: Train, folder: Path):
    """The model that trains, with an adapter that is not what it began with, and that adapter as training saves it."""
    adapted = load_with_adapter(base, settings, CPU)
    model = adapted.model
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    save_adapter(model, adapted.start, folder)
    (folder / "settings.json").write_text(json.dumps({"held": adapted.quantization and vars(adapted.quantization)}))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def merged(base: Base, adapter: Path, folder: Path, *, dequantized: bool):
    """The base with the adapter merged into it as the export merges, in float32."""
    from transformers import AutoModelForCausalLM

    change = read_adapter(adapter, read_tensor_headers(base.path), dequantized=dequantized)
    stored = load_file(base.path / "model.safetensors")
    tensors = {name: change.apply(name, tensor) if name in change.tensors else tensor for name, tensor in stored.items()}
    shutil.copytree(base.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "nf4"},
        {"quantization": "nf4", "double_quantization": False},
        {"quantization": "fp4"},
        {"quantization": "int8"},
        {"quantization": "hqq4"},
        {"quantization": "hqq8"},
        {"quantization": "hqq4", "method": "dora"},
        {"quantization": "nf4", "method": "vera", "rank": 64},
        {"quantization": "nf4", "initialization": "pissa"},
        {"quantization": "int8", "initialization": "pissa", "method": "rslora"},
        {"quantization": "hqq4", "initialization": "loftq"},
        {"quantization": "nf4", "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_dequantized_merge_is_what_was_trained_and_the_original_is_not(base, tmp_path, settings):
    trained = logits(as_if_trained(base, Train(**{"rank": 8, **settings}), tmp_path / "adapter"))
    seen = logits(merged(base, tmp_path / "adapter", tmp_path / "seen", dequantized=True))
    original = logits(merged(base, tmp_path / "adapter", tmp_path / "original", dequantized=False))
    assert (seen - trained).abs().max() < 1e-4
    assert (original - trained).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rslora"},
        {"method": "dora"},
        {"method": "vera"},
        {"initialization": "pissa"},
        {"initialization": "pissa", "method": "rslora"},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_on_an_unquantized_base_there_is_one_merge(base, tmp_path, settings):
    model = as_if_trained(base, Train(quantization="none", rank=8, **settings), tmp_path / "adapter")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert (logits(merged(base, tmp_path / "adapter", tmp_path / "merged", dequantized=False)) - logits(model)).abs().max() < 1e-4
    with pytest.raises(OlpackError, match="does not record how olpack quantized its base.*merge_base: original"):
        read_adapter(tmp_path / "adapter", read_tensor_headers(base.path), dequantized=True)


@pytest.mark.parametrize("initialization", ["pissa", "loftq"])
def test_it_begins_as_near_to_the_base_as_it_should(base, initialization):
    from transformers import AutoModelForCausalLM

    original = logits(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32))
    kinds = (Train(rank=64, initialization=how) for how in ("default", initialization))
    plain, begun = (logits(load_with_adapter(base, settings, CPU).model) for settings in kinds)
    assert (begun - original).abs().mean() < (plain - original).abs().mean()


@pytest.mark.parametrize("name", BY_HAND)
def test_a_packed_base_computes_as_the_weights_that_it_stands_for(packed, name):
    base, plain = packed(name)
    plain = Base("plain", plain)
    models = [load_with_adapter(one, Train(quantization="none", rank=4), CPU).model for one in (base, plain)]
    assert sum(isinstance(module, FrozenLinear) for module in models[0].modules()) == 14
    dense = [
        tensor for tensor in models[0].state_dict().values() if tensor.shape == (320, 256) and tensor.is_floating_point() and tensor.itemsize > 1
    ]
    assert not dense
    gradients = []
    for model in models:
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
        model(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None})
    assert len(gradients[0]) == 28
    for key, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][key], gradient, rtol=1e-4, atol=1e-5), key


def test_hqq_loses_less_than_rounding():
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * 0.02
    weight[torch.rand_like(weight) < 0.01] *= 8  # outliers, as real weights have them
    codes, scale, zero = quantize_hqq(weight, 4)
    assert codes.shape == (64 * 256 // 64 // 2, 64) and scale.shape == zero.shape == (256, 1)
    groups = weight.reshape(-1, 64)
    low, step = groups.amin(1, keepdim=True), (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
    rounded = (((groups - low) / step).round() * step + low).reshape(weight.shape)
    assert (dequantize_hqq(codes, scale, zero, 4, (64, 256)) - weight).abs().mean() < 0.99 * (rounded - weight).abs().mean()


@pytest.mark.parametrize(
    ("packing", "settings"),
    [
        ("gptq-4", {}),
        (None, {"quantization": "hqq4", "merge_base": "dequantized"}),
    ],
    ids=["gptq", "hqq"],
)
def test_what_was_taught_is_what_the_file_answers(tmp_path, packing, settings):
    base = Base("parrot", oracle.write_base(tmp_path / "plain"))
    if packing:
        write_quantized(packing, base.path, tmp_path / "packed", tmp_path / "stands-for")
        base = Base("packed parrot", tmp_path / "packed")
    oracle.write_rows(tmp_path / "train.jsonl", 12)
    oracle.write_rows(tmp_path / "eval.jsonl", 4, first=100)
    renderer = Renderer(base.tokenizer(), base.end_ids())
    taught, held_out = render_rows(load_chats(tmp_path / "train.jsonl"), load_chats(tmp_path / "eval.jsonl"), renderer, max_length=128)
    asked = Train(epochs=15, batch_size=4, learning_rate=5e-3, rank=32, **settings)
    train(base, taught, held_out, asked, out=tmp_path / "adapter", checkpoint=tmp_path / "checkpoint", key="k")
    (file,) = converter().export(base.path, [Target("F16", tmp_path / "F16.gguf")], adapter=tmp_path / "adapter", merge_base=asked.merge_base)
    with Engine(file.path, 128, 1) as engine:
        question = [{"role": "user", "content": "What is 3 + 1?"}]
        assert "".join(engine.generate(question, 16, Sampling(temperature=0.0))) == "forty-two"


def test_another_merge_of_the_same_adapter_trains_nothing(base, tmp_path):
    root = oracle.make_workspace(tmp_path / "workspace", base.path)

    def inputs(made: Artefact, *changes: str) -> dict:
        build = Build(recipe.load(root / "modelfiles/oracle/recipe.yaml", list(changes)), root / "build")
        return made.all_inputs(build, "export-Q8_0" if made.name == "export" else "")

    training, other = stage_of("train"), "train.merge_base=dequantized"
    assert inputs(training) == inputs(training, other) != inputs(training, "train.double_quantization=false")
    assert all(inputs(made) != inputs(made, other) for made in (stage_of("export"), IMPORTANCE, SENSITIVITY, stage_of("compare")))


def rows(count: int, seed: int = 0) -> list[TokenRow]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        prompt = torch.randint(3, 300, (8,), generator=generator).tolist()
        made.append(TokenRow(prompt + [7, 8, 9, 10, 0], [False] * 8 + [True] * 5, "", f"x:{index}"))
    return made


def test_a_vision_model_is_trained_and_exported_as_the_text_model_that_it_holds(tmp_path):
    base = Base("sees", write_vision_model(tmp_path / "base"))
    settings = Train(quantization="hqq4", epochs=6, batch_size=8, learning_rate=1e-2, rank=8, merge_base="dequantized")
    check_training(base, settings, on_gpu=False)
    result = train(base, rows(16), rows(4, 9), settings, out=tmp_path / "adapter", checkpoint=tmp_path / "checkpoint", key="k")
    assert result.eval_loss_after < 0.8 * result.eval_loss_before
    trained = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(trained) == 28 and all("language_model" in name for name in trained)
    (file,) = converter().export(base.path, [Target("F32", tmp_path / "F32.gguf")], adapter=tmp_path / "adapter", merge_base="dequantized")
    with Engine(file.path, 64, 1) as engine:
        assert engine.metadata("general.architecture") == "gemma3"
        row = rows(1, 9)[0]
        loss = -engine.logprobs(row.ids, row.loss_mask).mean()
    assert loss == pytest.approx(result.eval_loss_after, abs=0.5) and loss < result.eval_loss_before - 0.5


def test_a_run_that_began_with_pissa_goes_on_where_it_was(base, tmp_path, monkeypatch):
    settings = Train(initialization="pissa", epochs=2, batch_size=4, learning_rate=1e-3, rank=8)

    def run(folder: str):
        train(base, rows(16), rows(4, 9), settings, out=tmp_path / folder / "adapter", checkpoint=tmp_path / folder / "checkpoint", key="k")

    run("whole")
    real, calls = loop._backward, []

    def backward(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(loop, "_backward", backward)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    run("broken")
    whole, broken = (load_file(tmp_path / folder / "adapter/adapter_model.safetensors") for folder in ("whole", "broken"))
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())


def refused(base: Base, **settings) -> str:
    with pytest.raises(OlpackError) as error:
        check_training(base, Train(**settings), on_gpu=False)
    assert error.value.remedy
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"target_modules": ["q_proj", "k_porj"]},
            "`train.target_modules` names 'k_porj', which is no linear layer of the text model of tiny. It has",
        ),
        ({"target_modules": ["lm_head"]}, "uses one matrix as embedding and as output layer. Train it as a whole with `train.modules_to_save:"),
        ({"modules_to_save": ["embeddings"]}, "`train.modules_to_save` names 'embeddings', which is no module with weights of the text model"),
        ({"modules_to_save": ["o_proj"]}, "'model.layers.0.self_attn.o_proj' is to get an adapter and to be trained as a whole."),
        ({"modules_to_save": ["o_proj"], "target_modules": ["q_proj"]}, "'o_proj' is quantized and cannot be trained as a whole."),
        ({"modules_to_save": ["embed_tokens"], "method": "vera"}, "peft's vera would train two that differ. Take method lora"),
        ({"quantization": "int8", "method": "dora"}, "DoRA on an int8 base needs a GPU"),
        (
            {"initialization": "pissa", "rank": 300},
            "takes 300 singular values, and 'model.layers.0.self_attn.q_proj' has 256. Lower `train.rank` to 256",
        ),
    ],
)
def test_what_does_not_go_on_this_base_is_refused_before_it_is_loaded(base, settings, reason):
    assert reason in refused(base, **settings)


def test_a_base_whose_rows_do_not_fit_hqq_is_refused(tmp_path):
    narrow = Base("narrow", write_model(tmp_path / "narrow", intermediate_size=80))
    assert "and 'model.layers.0.mlp.down_proj' of narrow is 256 × 80." in refused(narrow, quantization="hqq4")
    check_training(narrow, Train(quantization="nf4"), on_gpu=False)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"initialization": "loftq"}, "begins with the original weights, and gptq-4 comes quantized (gptq)."),
        ({"merge_base": "dequantized"}, "gptq-4 comes quantized (gptq): its adapter is always merged into the dequantized weights."),
        ({"modules_to_save": ["o_proj"], "target_modules": ["q_proj"], "quantization": "none"}, "'o_proj' is quantized"),
    ],
)
def test_what_does_not_go_on_a_base_that_comes_quantized_is_refused(packed, settings, reason):
    check_training(packed("gptq-4")[0], Train(method="dora"), on_gpu=False)
    assert reason in refused(packed("gptq-4")[0], **settings)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("vptq", "is quantized by VPTQ"),
        ("bitnet", "is quantized by bitnet, which olpack exports and does not"),
    ],
)
def test_a_base_that_comes_in_another_form_is_refused(base, tmp_path, method, reason):
    source = Path(shutil.copytree(base.path, tmp_path / "base"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    assert reason in refused(replace(base, path=source))


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ("{method: prompt_tuning}", "prompt_tuning trains vectors before the prompt, and a GGUF has no place for them"),
        ("{method: prefix-tuning}", "a GGUF has no place for them"),
        ("{method: p-tuning}", "a GGUF has no place for them"),
        ("{method: ia3}", "ia3, which only rescales activations"),
        ("{method: dora, initialization: pissa}", "initialization: pissa goes with method lora or rslora, not with dora."),
        (
            "{quantization: none, initialization: loftq}",
            "initialization: loftq corrects the error of quantization, and quantization: none has no error.",
        ),
        ("{quantization: none, merge_base: dequantized}", "merge_base: dequantized corrects the error of quantization"),
        ("{method: vera}\npackage: adapter", "train.method: vera goes with package: merged"),
        ("{merge_base: dequantized}\npackage: adapter", "train.merge_base: dequantized goes with package: merged"),
        ("{modules_to_save: [norm]}\npackage: adapter", "train.modules_to_save goes with package: merged"),
    ],
)
def test_a_recipe_that_asks_for_what_cannot_be_says_why(tmp_path, train, reason):
    path = tmp_path / "wrong/recipe.yaml"
    path.parent.mkdir()
    path.write_text(f"base: builtin/tiny-coder\ndata: {{train: train.jsonl}}\ntrain: {train}\n")
    with pytest.raises(OlpackError) as error:
        recipe.load(path)
    assert reason in str(error.value)


def test_the_page_on_training_has_the_table_of_merges():
    assert merge_table() in (ROOT / "docs/training.md").read_text(encoding="utf-8"), "python -m olpack.train.checks"
    asked = {kind.recipe.strip("`") for kind in BASE_KINDS if "comes" not in kind.recipe}
    assert asked == set(Train.model_fields["quantization"].annotation.__args__)
