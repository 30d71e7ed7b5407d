"""Bases that are GGUF files: blocks against ggml's functions, logits against llama.cpp's on the same file, training and merging on them.

The files are made by llama.cpp's converter and quantizer from small models with random weights, norms and biases.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_models import IDS, MODELS, QUANTS, has_experts, llama_cpps, make, ours
from gguf_tensors import tensors
from oracle import make_workspace, olpack, write_base
from tiny_models import converter, write_adapter

from olpack.errors import OlpackError
from olpack.export import Target
from olpack.export.lora import export_adapter
from olpack.llamacpp import library
from olpack.llamacpp.activations import input_products
from olpack.model.base import resolve
from olpack.model.gguf_architectures import ARCHITECTURES, architecture_table, config_of, rope_factors, weights_of
from olpack.model.gguf_base import open_gguf
from olpack.model.gguf_blocks import INTEGERS, TYPES
from olpack.model.shape import MetaModel
from olpack.recipe import Train
from olpack.train.checks import check_training
from olpack.train.frozen import BlockLinear
from olpack.train.gguf_model import frozen_bytes, load_frozen
from olpack.train.layer_inputs import LayerInputs

# llama.cpp rounds a layer's input to 16 bits where the weight has 16, and to 8 where it has fewer; olpack computes in float32. The largest difference
# of a logit, in standard deviations of the logits, was 0.015 and 0.27; with experts, where a rounded input can choose another one, 0.1 and 2.3
# (benchmarks/gguf_base.md). A wrong order of rows or a missing offset gives more than 2 in F16.
BOUND = {"F16": 0.05, "quantized": 0.6}
BOUND_WITH_EXPERTS = {"F16": 0.3, "quantized": 3.5}


@pytest.mark.parametrize("number", [number for number, type_ in TYPES.items() if type_.name not in INTEGERS], ids=lambda number: TYPES[number].name)
def test_blocks_are_dequantized_to_ggmls_bits(number):
    type_ = TYPES[number]
    known = gguf.GGMLQuantizationType(number)
    assert known.name == type_.name
    assert gguf.GGML_QUANT_SIZES[known] == (type_.weights, type_.bytes)
    blocks = np.random.default_rng(number).integers(0, 256, (9, type_.row_bytes(1024)), dtype=np.uint8)
    expected = np.empty((9, 1024), np.float32)
    if type_.name == "F32":
        expected = blocks.view(np.float32)
    else:
        library.dequantize_rows(number, blocks, expected)
    by_torch = type_.by_torch(torch.from_numpy(blocks).view(-1, type_.bytes)).float().numpy().reshape(9, 1024)
    for found in (type_.dequantize(torch.from_numpy(blocks)).numpy(), by_torch, gguf.quants.dequantize(blocks, known)):
        defined = ~np.isnan(expected)
        assert np.array_equal(np.isnan(found), ~defined)
        assert np.array_equal(found[defined].view(np.uint32), expected[defined].view(np.uint32))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_inputs_of_layers_are_llama_cpps_on_the_same_file(name, tmp_path):
    files = converter().export(make(tmp_path, name), [Target(quant, tmp_path / f"{quant}.gguf") for quant in QUANTS])
    for file in files:
        found, expected = ours(open_gguf(file.path)), llama_cpps(file.path)
        bound = BOUND_WITH_EXPERTS if has_experts(name) else BOUND
        largest = np.abs(found - expected).max() / expected.std()
        assert largest < bound.get(file.quant, bound["quantized"]), file.quant
        if file.quant == "F16":
            assert_inputs_are_llama_cpps(name, file.path)


def assert_inputs_are_llama_cpps(name: str, gguf: Path) -> None:
    """Rows of several lengths in one micro-batch. A model whose heads stand in another order than in the file is left to llama.cpp."""
    tensors = open_gguf(gguf).tensors.items()
    names = [one for one, tensor in tensors if one.startswith("blk.") and len(tensor.shape) == 2 and tensor.type.name == "F16"]
    rows = [IDS, IDS[:5], IDS[:9][::-1]]
    expected = input_products(gguf, rows, names, torch.device("cpu"), threads=1)
    inputs = LayerInputs.load(gguf, expected, len(IDS), torch.device("cpu"), 1 << 40)
    assert (inputs is None) == (name in ("qwen35-values", "qwen35moe"))
    assert LayerInputs.load(gguf, expected, len(IDS), torch.device("cpu"), 1 << 20) is None  # too little memory
    if inputs is not None:
        read: list[int] = []
        with torch.inference_mode():
            found = inputs.products(rows, expected, read.append)
        assert sum(read) == sum(map(len, rows)) and found.keys() == expected.keys()
        for one, products in expected.items():
            assert found[one].count == products.count
            assert (found[one].sums - products.sums).norm() < 0.02 * products.sums.norm(), one


def test_every_architecture_is_among_those_that_are_compared():
    assert set(ARCHITECTURES) <= {name.removesuffix("-sentencepiece") for name in MODELS}


def test_the_page_on_training_has_the_table_of_architectures():
    page = Path(__file__).parents[1] / "docs/training.md"
    assert architecture_table() in page.read_text(encoding="utf-8"), "python -m olpack.model.gguf_architectures"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder with `model`, its F32, Q4_0 and Q8_0 files, and an adapter on all of its linear layers."""
    folder = tmp_path_factory.mktemp("llama")
    source = make(folder, "llama")
    converter().export(source, [Target(quant, folder / f"{quant}.gguf") for quant in ("F32", "Q4_0", "Q8_0")])
    write_adapter(folder / "adapter", source)
    return folder


def test_an_adapter_merges_into_a_gguf_as_into_the_folder(llama, tmp_path):
    adapter = llama / "adapter"
    of_folder, of_file = (
        converter().export(source, [Target("F32", tmp_path / f"{source.stem}.gguf")], adapter=adapter)[0].path
        for source in (llama / "model", llama / "F32.gguf")
    )
    found, expected = tensors(of_file), tensors(of_folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["blk.0.attn_q.weight"], tensors(llama / "F32.gguf")["blk.0.attn_q.weight"])
    opened, before = open_gguf(of_file), open_gguf(llama / "F32.gguf")
    assert {key: value for key, value in opened.metadata.items() if key.startswith("tokenizer")} == {
        key: value for key, value in before.metadata.items() if key.startswith("tokenizer")
    }


def test_an_adapter_on_a_quantized_gguf_is_merged_into_its_dequantized_weights(llama, tmp_path):
    quantized = open_gguf(llama / "Q4_0.gguf")
    files = converter().export(
        llama / "Q4_0.gguf", [Target(quant, tmp_path / f"{quant}.gguf") for quant in ("F32", "Q4_0")], adapter=llama / "adapter"
    )
    merged = tensors(files[0].path)
    change = tensors(llama / "F32.gguf")["blk.1.attn_k.weight"], quantized.dequantized("blk.1.attn_k.weight")
    assert not torch.equal(merged["blk.1.attn_k.weight"], change[1])
    assert (merged["blk.1.attn_k.weight"] - change[1]).abs().max() < 0.2 * change[0].abs().max()
    again = open_gguf(files[1].path)
    assert torch.equal(again.blocks("token_embd.weight"), quantized.blocks("token_embd.weight"))  # the file's own blocks, where nothing changed


def test_an_adapter_by_itself_adds_what_is_merged(llama, tmp_path):
    export_adapter(llama / "Q4_0.gguf", llama / "adapter", tmp_path / "adapter.gguf")
    (merged,) = converter().export(llama / "F32.gguf", [Target("F32", tmp_path / "merged.gguf")], adapter=llama / "adapter")
    assert_added(tmp_path / "adapter.gguf", tensors(llama / "F32.gguf"), tensors(merged.path))


def assert_added(adapter: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """What was merged into each tensor is the product of the adapter's two."""
    low_rank = {one.name: torch.from_numpy(one.data.astype(np.float32)) for one in gguf.GGUFReader(str(adapter)).tensors}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {f"{name}.lora_{which}" for name in changed for which in "ab"} == set(low_rank)
    for name in changed:
        product = 2 * low_rank[f"{name}.lora_b"] @ low_rank[f"{name}.lora_a"]  # alpha 8 of rank 4
        assert torch.allclose(after[name] - before[name], product, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen35-values", "mistral3 with yarn"])
def test_an_adapter_where_the_converter_orders_rows_and_columns_anew(name, tmp_path):
    source = make(tmp_path, name)
    converter().export(source, [Target("F32", tmp_path / "F32.gguf")])
    write_adapter(tmp_path / "adapter", source)
    of_folder, of_file = (
        converter().export(base, [Target("F32", tmp_path / f"{base.stem}-merged.gguf")], adapter=tmp_path / "adapter")[0].path
        for base in (source, tmp_path / "F32.gguf")
    )
    before, after, expected = tensors(tmp_path / "F32.gguf"), tensors(of_file), tensors(of_folder)
    assert after.keys() == expected.keys() and all(torch.equal(after[name], expected[name]) for name in expected)
    export_adapter(tmp_path / "F32.gguf", tmp_path / "adapter", tmp_path / "adapter.gguf")
    assert_added(tmp_path / "adapter.gguf", before, after)


def test_a_merge_into_the_types_of_the_base_is_warned_of(llama):
    for options in ({"adapter": llama / "adapter"}, {"requantize": True}):  # after training, and before it
        own, other = (converter().check(llama / "Q4_0.gguf", [quant], **options).warnings for quant in ("Q4_0", "Q8_0"))
        assert any(warning.startswith("Q4_0 has the steps of the base's own quantization") for warning in own)
        assert not any("steps of the base" in warning for warning in other)


def test_layers_stay_in_blocks_and_give_the_gradients_of_their_dequantized_weights(llama):
    base = open_gguf(llama / "Q4_0.gguf")
    model = load_frozen(base, torch.device("cpu"), torch.float32)
    layers = [module for module in model.modules() if isinstance(module, BlockLinear)]
    assert len(layers) == 14
    assert all(layer.get_buffer("blocks").nbytes == layer.out_features * layer.in_features * 18 // 32 for layer in layers)
    layer = model.model.layers[0].self_attn.o_proj
    assert layer.get_buffer("blocks").untyped_storage().data_ptr() == base.blocks("blk.0.attn_output.weight").untyped_storage().data_ptr()  # mapped
    x = torch.randn(5, 256, requires_grad=True)
    layer(x).square().sum().backward()
    found, x.grad = x.grad, None
    (x @ layer.dequantize().T).square().sum().backward()
    assert torch.equal(found, x.grad)


@pytest.fixture(scope="module", params=["llama", "qwen3moe", "gpt-oss", "qwen35-values"])
def quantized(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (file,) = converter().export(make(folder, request.param), [Target("Q4_0", folder / "Q4_0.gguf")])
    return file.path


def test_a_model_in_blocks_computes_what_its_dequantized_weights_do(quantized):
    base = open_gguf(quantized)
    frozen = load_frozen(base, torch.device("cpu"), torch.float32)
    meta = MetaModel(config_of(base), "it")
    dense = {name: weight.read(base, torch.float32) for name, weight in weights_of(base, meta.module).items()}
    plain = type(meta.module).from_pretrained(None, config=meta.config, state_dict=dense, dtype=torch.float32, experts_implementation="eager")
    factors = rope_factors(base)
    for name, frequencies in plain.named_buffers():
        if factors is not None and name.endswith("inv_freq"):
            frequencies.div_(factors)
    results = []
    for model in (frozen, plain):
        x = model.get_input_embeddings()(torch.tensor([IDS])).detach().requires_grad_()
        logits = model(inputs_embeds=x).logits
        logits.square().sum().backward()
        results.append((logits.detach(), x.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_planned_bytes_are_those_of_the_loaded_model(quantized, dtype):
    base = open_gguf(quantized)
    model = load_frozen(base, torch.device("cpu"), dtype)
    taken = sum(parameter.nbytes for parameter in model.parameters())
    taken += sum(blocks.nbytes for blocks in model.buffers() if blocks.dtype == torch.uint8)
    assert frozen_bytes(base, dtype.itemsize) == taken


@pytest.mark.parametrize(("name", "head_dim"), [("qwen3moe", 64), ("gemma4-sentencepiece", 128), ("gemma4-experts-sentencepiece", 64)])
def test_experts_and_layers_with_heads_of_their_own_are_trained_on(name, head_dim, tmp_path):
    (file,) = converter().export(make(tmp_path, name), [Target("Q4_0", tmp_path / "Q4_0.gguf")])
    base = resolve(str(file.path), relative_to=tmp_path)
    check_training(base, Train(), on_gpu=False)
    assert MetaModel(base.config, base.label).shape.head_dim == head_dim  # of the layers with the largest cache


def test_training_on_a_gguf_lowers_the_loss(tmp_path):
    source = write_base(tmp_path / "model")
    converter().export(source, [Target("Q4_0", tmp_path / "base.gguf")])
    folder = make_workspace(tmp_path, tmp_path / "base.gguf")
    code, _, err = olpack(folder, "train", "oracle")
    assert code == 0, err
    assert "base.gguf (Q4_0)" in err
    lines = [json.loads(line) for line in (folder / "build/oracle/adapter/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


# -- files that are not read ----------------------------------------------------------------------------------------------------------------


def rewritten(source: Path, out: Path, *, architecture: str | None = None, extra: str | None = None) -> Path:
    """A GGUF with another architecture, or with one more tensor."""
    reader = gguf.GGUFReader(str(source))
    old = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(out), architecture or old)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value, kinds = field.contents(), field.types
            writer.add_key_value(key.replace(f"{old}.", f"{architecture or old}.", 1), value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if extra is not None:
        writer.add_tensor(extra, np.zeros(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_an_architecture_that_is_not_compared_is_refused_with_those_that_are(llama, tmp_path):
    file = rewritten(llama / "Q4_0.gguf", tmp_path / "other.gguf", architecture="bloom")
    with pytest.raises(OlpackError, match="of the architecture 'bloom', on whose GGUF files olpack does not train") as refused:
        config_of(open_gguf(file))
    assert "llama, llama with experts" in refused.value.remedy


def test_a_tensor_that_the_model_has_not_is_refused(llama, tmp_path):
    base = open_gguf(rewritten(llama / "Q4_0.gguf", tmp_path / "more.gguf", extra="blk.0.attn_q_norm.weight"))
    with pytest.raises(OlpackError, match=r"has 'blk\.0\.attn_q_norm\.weight', which LlamaForCausalLM of transformers has not"):
        weights_of(base, MetaModel(config_of(base), "it").module)


def test_a_truncated_file_is_refused(llama, tmp_path):
    whole = (llama / "Q4_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-1000])
    with pytest.raises(OlpackError, match=r"is truncated: it has [\d,]+ bytes, and '\S+' ends at byte"):
        open_gguf(tmp_path / "cut.gguf")


def test_a_file_that_takes_the_place_of_another_is_read_anew(tmp_path):
    path, new = tmp_path / "model.gguf", tmp_path / "new.gguf"

    def write(target: Path, value: float) -> None:
        writer = gguf.GGUFWriter(target, "llama")
        writer.add_tensor("output.weight", np.full((1, 32), value, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write(path, 1)
    first = open_gguf(path)
    assert first.dequantized("output.weight").unique().tolist() == [1]
    write(new, 2)
    new.replace(path)
    second = open_gguf(path)
    assert first.dequantized("output.weight").unique().tolist() == [1]  # which stays mapped
    write(new, 3)
    new.replace(path)
    assert open_gguf(path).dequantized("output.weight").unique().tolist() == [3]
    with pytest.raises(OlpackError, match="was replaced while it was read"):
        second.dequantized("output.weight")
