"""What olpack says that a model takes, against llama.cpp, transformers, bitsandbytes and peft; and which quant it recommends for it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import converter, write_model

from olpack.cli import main
from olpack.commands.recommend import advise, estimate_model
from olpack.errors import OlpackError
from olpack.export import Target
from olpack.machine import GIB, Machine
from olpack.memory.footprint import Footprint, plan, read
from olpack.memory.job import Setting
from olpack.memory.model_source import Subject, find, typical
from olpack.memory.recommend import place
from olpack.memory.table import print_estimate
from olpack.model.base import config_of
from olpack.model.shape import MetaModel
from olpack.train.memory import adapter_parameters, estimate_training, frozen_bytes

REPOSITORY = Path(__file__).parents[1]

# The public values of google/gemma-3-4b-it.
GEMMA = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 896,
    },
}


@pytest.fixture(scope="module")
def gemma() -> Subject:
    return Subject("gemma-3-4b-it", GEMMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("memory") / "model")


@pytest.fixture(scope="module")
def files(folder) -> dict[str, Path]:
    targets = [Target(quant, folder.parent / f"{quant}.gguf") for quant in ("Q4_0", "Q4_K_M", "Q8_0")]
    converter().export(folder, targets)
    return {target.quant: target.path for target in targets}


@pytest.fixture
def olpack(tmp_path, monkeypatch, capsys):
    """The command line in a folder of its own: words to (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["olpack", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            main()
        return end.value.code, *capsys.readouterr()

    return run


# -- llama.cpp -----------------------------------------------------------------------------------------------------------------------------

# Loads a file as it is served, and prints the bytes of llama.cpp's buffers by kind.
LOAD = """
import os, re, sys
from olpack.llamacpp.library import captured_log, load_llama_cpp, tensor_type
llama = load_llama_cpp()
with captured_log() as log:
    params = llama.llama_model_default_params()
    params.load_mode = llama.LLAMA_LOAD_MODE_NONE
    model = llama.llama_model_load_from_file(os.fsencode(sys.argv[1]), params)
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.swa_full = int(sys.argv[2]), 512, 512, False
    params.type_k = params.type_v = tensor_type(sys.argv[3])
    llama.llama_init_from_model(model, params)
print("".join(log))
"""


@pytest.mark.parametrize(("quant", "context", "kv_type"), [("Q4_0", 256, "f16"), ("Q4_K_M", 2048, "q8_0"), ("Q8_0", 2048, "f16")])
def test_an_estimate_is_what_llama_cpp_then_allocates(files, quant, context, kv_type):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LOAD, str(files[quant]), str(context), kv_type]
    log = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    sizes: dict[str, float] = {}
    for kind, size in re.findall(r"(model|KV|compute|output) buffer size =\s*([\d.]+) MiB", log):
        sizes[kind] = sizes.get(kind, 0) + float(size) * (1 << 20)
    found, layout = read(files[quant], Setting(context, kv_type))
    assert found.weights == pytest.approx(sizes["model"], abs=20_000)  # the log has two decimals, and tensors are aligned
    assert found.cache == pytest.approx(sizes["KV"], abs=20_000)
    assert found.buffers == pytest.approx(sizes["compute"] + sizes["output"], abs=20_000)
    assert (found.quant, layout.architecture, layout.layers, layout.sliding, layout.recurrent) == (quant, "qwen3", 2, (), False)
    assert found.tied and 0 < found.process_bytes < 50e6


def test_the_kv_cache_is_what_the_shape_says(files):
    for kv_type, value in (("f16", 2), ("q8_0", 34 / 32), ("q4_0", 18 / 32)):
        found = read(files["Q8_0"], Setting(2048, kv_type))[0]
        assert found.cache == pytest.approx(2 * 2 * 2048 * 2 * 64 * value, abs=20_000)  # layers, K and V, cells, KV heads, width


def test_a_model_without_its_weights_is_estimated_like_its_file(folder, files, tmp_path):
    config = tmp_path / "config.json"
    config.write_text((folder / "config.json").read_text())
    setting = Setting(1024)
    planned, layout = plan(find(str(config)), list(files), setting)
    for footprint in planned:
        whole, of_file = read(files[footprint.quant], setting)
        for part in ("layer_weights", "input_weights", "output_weights", "tied", "layer_cache", "compute_bytes", "output_bytes"):
            assert getattr(footprint, part) == getattr(whole, part), part
        assert layout == of_file


def test_sliding_windows_as_llama_cpp_allocates_them(gemma):
    (footprint,), layout = plan(gemma, ["Q4_K_M"], Setting(8192))
    assert (layout.architecture, layout.layers, len(layout.sliding)) == ("gemma3", 34, 29)
    assert 5 not in layout.sliding and 11 not in layout.sliding
    cell = 2 * 4 * 256 * 2  # keys and values, KV heads, width, bytes
    # A sliding layer holds its window and one micro-batch, in steps of 256 cells.
    assert footprint.cache == pytest.approx(cell * (5 * 8192 + 29 * (1024 + 512)), rel=1e-3)
    assert footprint.tied and footprint.on_gpu(footprint.layers) > footprint.weights + footprint.cache


# The public values of models that keep less than keys and values of the whole context in each layer.
CACHES = {
    # 10 of 62 layers keep all, the others a window of 1,024.
    "gemma-3-27b-it": (
        11.4,
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "mm_tokens_per_image": 256,
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "num_hidden_layers": 62,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "head_dim": 128,
                "query_pre_attn_scalar": 168,
                "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
            "vision_config": GEMMA["vision_config"],
        },
    ),
    # Every other layer keeps a window of 128; the published weights are quantized.
    "gpt-oss-20b": (
        3.2,
        {
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "vocab_size": 201088,
            "attention_bias": True,
            "max_position_embeddings": 131072,
            "rope_theta": 150000,
            "tie_word_embeddings": False,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        },
    ),
    # A latent vector of 512 and a rotary key of 64 for each token.
    "DeepSeek-V2-Lite": (
        4.1,
        {
            "model_type": "deepseek_v2",
            "architectures": ["DeepseekV2ForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 102400,
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
        },
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_the_cache_of_windows_and_latent_attention(name, tmp_path, olpack):
    """unslothai/unsloth#4757, gpustack/gguf-parser-go#28, alvarobartt/hf-mem#60."""
    gigabytes, config = CACHES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, printed, message = olpack("estimate", "config.json", "--context", "131072", "--quant", "Q4_K_M", "--json")
    assert code == 0, message
    (found,) = json.loads(printed)["llama_cpp"]
    assert found["kv"] / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_hybrid_without_its_weights_has_figures(tmp_path):
    """Qwen3-Next, whose config.json says nothing of layers for multi-token prediction: fewer layers and experts than the published one has."""
    config = {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "vocab_size": 151936,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 262144,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = estimate_model(str(tmp_path / "config.json"), context=131_072, quants=["Q4_K_M"])
    (quant,) = found.quants
    assert (found.layout.architecture, found.layout.layers, found.layout.recurrent) == ("qwen3next", 8, True)
    assert quant.cache - quant.state_bytes == pytest.approx(2 * 2 * 131_072 * 2 * 256 * 2, rel=1e-3)  # layers that attend, K and V, heads, width
    state = 4 * 32 * 128 * 128 + 4 * (4 - 1) * (2 * 16 * 128 + 32 * 128)  # float32: of the delta rule, and the convolution's last inputs
    assert quant.state_bytes == pytest.approx(6 * state, rel=0.01)


def test_experts_and_what_of_them_is_active(tmp_path):
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
    }
    model = MetaModel(config, "Qwen3-30B-A3B")
    assert model.parameters.total == pytest.approx(30.5e9, rel=0.01) and model.parameters.active == pytest.approx(3.3e9, rel=0.03)
    assert (model.shape.experts, model.shape.experts_used, model.shape.intermediate) == (128, 8, 768)
    assert sum(map(math.prod, model.checkpoint().values())) == model.parameters.total
    # bitsandbytes leaves stacked experts alone.
    assert sum(frozen_bytes(model, "nf4")) > 2 * model.parameters.experts
    assert estimate_training(model, rank=16, tokens=64, precision="nf4").total(checkpointing=True) is not None


# -- transformers, bitsandbytes, peft ------------------------------------------------------------------------------------------------------


def test_the_figures_that_were_measured_for_gemma_3_4b(gemma):
    parameters = gemma.model.parameters
    assert parameters.total == pytest.approx(4.3e9, rel=0.01) and parameters.head == 0
    assert parameters.towers == pytest.approx(0.42e9, rel=0.05)
    for precision, gigabytes in (("float32", 17.2), ("bfloat16", 8.6), ("nf4", 3.17)):
        assert frozen_bytes(gemma.model, precision)[0] == pytest.approx(gigabytes * 1e9, rel=0.01)
    shape = gemma.model.shape
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary) == (34, 8, 4, 256, 262208)
    assert (shape.tied, shape.window, shape.kinds.count("sliding")) == (True, 1024, 29)
    assert shape.kv_bytes(8192, 2) == 2 * 2 * 4 * 256 * (5 * 8192 + 29 * 1024)


def test_frozen_bytes_are_what_bitsandbytes_makes(folder):
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    states = [module.weight.quant_state for module in model.modules() if isinstance(module, Linear4bit)]
    constants = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    weights, estimated = frozen_bytes(MetaModel(config_of(str(folder)), "tiny"), "nf4")
    buffers = sum(buffer.nbytes for buffer in model.buffers())  # of the rotary embedding
    assert weights == model.get_memory_footprint() - buffers
    assert estimated == pytest.approx(constants, rel=0.02)


def test_an_adapters_parameters_are_what_peft_makes(folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for targets in ("all-linear", ["q_proj", "v_proj"]):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        made = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert adapter_parameters(MetaModel(config_of(str(folder)), "tiny"), 4, targets) == made


# One step of LoRA (rank 16, all linear layers, bfloat16 base) on an NVIDIA H100 with torch 2.11, transformers 5.17 and peft: by how many MB
# torch.cuda.max_memory_allocated rose above what lay there before, adapter gradients included; without and with gradient checkpointing.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
MEASURED = [(LLAMA, 1024, 2048, 3953.8, 889.4), (LLAMA, 128256, 2048, 7303.4, 3887.9), (QWEN, 151936, 4096, 17311.9, 9052.1)]


@pytest.mark.parametrize(("config", "vocabulary", "tokens", "kept", "checkpointed"), MEASURED)
def test_a_plain_training_step_takes_what_a_gpu_showed(config, vocabulary, tokens, kept, checkpointed):
    model = MetaModel({**config, "vocab_size": vocabulary}, "shape")
    found = estimate_training(model, rank=16, tokens=tokens, precision="bfloat16", fused=False)
    before = found.weights + found.adapter + found.optimizer + found.workspace
    assert found.total(checkpointing=False) - before == pytest.approx(kept * 1e6, rel=0.03)
    assert found.total(checkpointing=True) - before == pytest.approx(checkpointed * 1e6, rel=0.03)


def test_65_billion_parameters_are_tuned_on_48_gigabytes():
    config = {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 32000,
    }
    found = estimate_training(MetaModel(config, "LLaMA 65B"), rank=64, tokens=512, precision="nf4")
    assert 34e9 < found.total(checkpointing=True) < 48e9
    assert 4 * found.checkpointed < found.activations


def test_olpacks_own_functions_keep_what_they_say():
    # benchmarks/train_8b.md: 8,192 tokens more took 28.1 GiB more without checkpointing, 0.7 GiB of them for gradients that now take the
    # place of what they are computed from.
    model = MetaModel({**LLAMA, "num_hidden_layers": 2, "vocab_size": 128256}, "shape")
    less, more = (estimate_training(model, rank=16, tokens=tokens, precision="nf4") for tokens in (8192, 16384))
    layers = 32 * (sum(more.layer.values()) - sum(less.layer.values()))
    assert layers + more.working - less.working == pytest.approx((28.1 - 0.7) * (1 << 30), rel=0.05)
    plain = estimate_training(model, rank=16, tokens=8192, precision="nf4", fused=False)
    assert plain.total(checkpointing=True) > less.total(checkpointing=True)


# -- which quant ---------------------------------------------------------------------------------------------------------------------------


def footprint(layers: int = 10, layer: int = GIB, tied: bool = False) -> Footprint:
    half = GIB // 2
    return Footprint("Q4_K_M", Setting(4096), (layer,) * layers, half, half, tied, (GIB / 10,) * layers, 0, half, 0, 0)


def test_layers_that_fit_a_gpu():
    whole = footprint()
    assert whole.total == whole.weights + whole.cache + whole.buffers == 12.5 * GIB
    sizes = [whole.on_gpu(count) for count in range(12)]
    assert sizes[0] == 0 and sizes == sorted(sizes) and sizes[1] == GIB  # output layer and compute buffer
    assert whole.on_gpu(11) + whole.in_ram(11) == whole.total
    assert whole.on_gpu(5) + whole.in_ram(5) == whole.total + whole.compute_bytes  # both sides compute
    found = place(whole, Machine(32 * GIB, (8 * GIB,)))
    assert (found.where, found.gpu_layers, found.layers) == ("split", 6, 11)  # 1 + 5 × 1.1 of 7 GiB
    assert place(whole, Machine(32 * GIB, (16 * GIB,))).where == "gpu"
    assert place(whole, Machine(32 * GIB, (7 * GIB, 8 * GIB))).where == "gpu"
    assert place(whole, Machine(16 * GIB)).where == "ram" and place(whole, Machine(8 * GIB)).where == "nowhere"
    assert place(whole, Machine(6 * GIB, (8 * GIB,))).where == "nowhere"
    assert footprint(tied=True).on_gpu(1) == GIB + GIB // 2  # a copy of the embedding


def test_seven_billion_parameters_on_8_gigabytes():
    advice = advise(params="7B", vram=8, ram=16)
    places = {candidate.quant: candidate.place.where for candidate in advice.candidates}
    assert places["Q4_K_M"] == places["Q6_K"] == "gpu" and places["Q8_0"] == "split"
    assert (advice.best.quant, advice.fastest.quant) == ("Q6_K", "Q4_K_M")
    assert any("Mistral-7B-v0.3" in note for note in advice.notes) and any("chooses Q5_K_M: 5.4 GB" in note for note in advice.notes)
    found = {candidate.quant: candidate.footprint.weights for candidate in advice.candidates}
    assert found["Q4_K_M"] == pytest.approx(4.37e9, rel=0.005)  # the published file of this model has 4.37 GB


def test_thirty_four_billion_parameters_on_24_gigabytes():
    advice = advise(params="34b", vram=24, ram=64, quants=["Q4_K_M", "Q5_K_M", "Q8_0"])
    assert [candidate.place.where for candidate in advice.candidates] == ["gpu", "split", "split"]
    assert advice.best.quant == advice.fastest.quant == "Q4_K_M"
    # Where the rule of thumb misleads: it chooses Q4_K_M for any context, and eight times the context no longer fits.
    assert any("chooses Q4_K_M: 20.6 GB" in note for note in advice.notes)
    short = advice.candidates[0].footprint
    long = replace(short, layer_cache=tuple(8 * size for size in short.layer_cache))
    assert place(long, advice.machine).where == "split"


def test_files_of_a_model(files):
    advice = advise([str(path) for path in files.values()], vram=0, ram=4, max_loss=0.05)
    assert [candidate.quant for candidate in advice.candidates] == ["Q4_0", "Q4_K_M", "Q8_0"]
    assert (advice.best.quant, advice.fastest.quant) == ("Q8_0", "Q4_K_M") and "within the 5.0% accepted" in advice.fastest.reason
    assert advise([str(path) for path in files.values()], vram=0, ram=4, max_loss=0.0001).fastest is None


@pytest.mark.parametrize(("size", "parameters"), [("8B", 8e9), ("1.5b", 1.5e9), ("500M", 500e6), ("13B", 13e9), ("110B", 110e9)])
def test_a_typical_shape_has_the_size_that_was_asked_for(size, parameters):
    assert typical(size).model.parameters.total == pytest.approx(parameters, rel=0.06)


# -- the verbs -----------------------------------------------------------------------------------------------------------------------------


def test_recommend_in_words_and_in_json(files, olpack):
    words = ("recommend", *map(str, files.values()), "--vram", "0", "--ram", "8", "--context", "512")
    code, printed, _ = olpack(*words)
    assert code == 0 and "Best:    Q8_0 loses least of those that fit in RAM" in printed and "Llama 3 8B on wikitext-2" in printed
    found = json.loads(olpack(*words, "--json")[1])
    assert found["machine"] == {"ram_bytes": 8 * GIB, "gpu_bytes": [], "found": False} and found["best"]["quant"] == "Q8_0"
    row = found["quants"][0]
    assert row["total_bytes"] == row["weights_bytes"] + row["kv_bytes"] + row["buffer_bytes"] + row["process_bytes"] == row["ram_bytes"]
    assert (row["where"], row["loss_measured"], found["setting"]["context"]) == ("ram", False, 512)


def test_estimate_of_a_file_in_words_and_in_json(files, olpack):
    code, printed, _ = olpack("estimate", str(files["Q8_0"]))
    assert code == 0 and "qwen3" in printed and "A GGUF cannot be trained" in printed
    found = json.loads(olpack("estimate", str(files["Q8_0"]), "--json")[1])
    assert [row["quant"] for row in found["llama_cpp"]] == ["Q8_0"] and found["transformers"] == []


def test_estimate_of_a_model_without_its_weights(folder):
    found = estimate_model(str(folder), rank=8, tokens=256, quants=["q4_k_m"])
    printed = StringIO()
    print_estimate(found, Console(file=printed, width=100))
    for part in ("2 layers, hidden 256, 4 heads, 2 KV heads of 64", "4-bit NF4", "Q4_K_M", "QLoRA, checkpointing", "get_memory_footprint"):
        assert part in printed.getvalue()
    data = found.as_json()
    assert [row["precision"] for row in data["transformers"]] == ["float32", "bfloat16", "int8", "nf4"]
    assert data["transformers"][0]["weights"] == 4 * data["parameters"]["total"] == data["transformers"][0]["rule"]
    assert data["training"]["QLoRA"]["peak"] > data["training"]["QLoRA"]["peak_checkpointing"] > 0
    assert json.loads(json.dumps(data)) and [row["quant"] for row in data["llama_cpp"]] == ["Q4_K_M"]


def test_an_architecture_that_llama_cpp_does_not_know_still_has_figures(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    strange = {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM"],
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": config["vocab_size"],
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(strange))
    found = estimate_model(str(path))
    assert found.quants == [] and found.loaded and any("No figures of llama.cpp" in note for note in found.notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recommend",), "Either models"),
        (("recommend", "--params", "many"), "is not a number of parameters"),
        (("recommend", "absent"), "There is no modelfiles/absent/recipe.yaml"),
        (("recommend", "absent.gguf"), "There is no file absent.gguf"),
        (("recommend", "--params", "8B", "--kv", "q2_K"), "KV cache cannot have the type"),
        (("estimate", "--params", "8B", "--quant", "Q4_X"), "no quant type"),
        (("estimate", "./absent"), "There is no ./absent"),
        (("estimate", "text.json"), "cannot be read as JSON"),
        (("estimate", "empty.json"), "names no model_type"),
        (("estimate", "unknown.json"), "makes no model"),
        (("estimate", "broken.gguf"), "no whole GGUF"),
    ],
)
def test_what_cannot_be_answered_has_an_error_of_one_line(words, message, tmp_path, olpack):
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "unknown.json").write_text('{"model_type": "of-tomorrow"}')
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    code, _, printed = olpack(*words)
    assert code == 1 and message in printed and len(printed.splitlines()) == 1, printed


def test_a_header_that_llama_cpp_refuses(files, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(files["Q8_0"].read_bytes().replace(b"qwen3.embedding_length", b"qwen3.embedding_lengtx"))
    with pytest.raises(OlpackError, match=r"llama.cpp cannot load broken.gguf"):
        read(broken, Setting(512))
