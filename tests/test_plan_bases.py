"""Bases as people have them: SentencePiece vocabularies, leftovers in config.json, weights that are not there."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny_models import converter, write_adapter, write_fast_sentencepiece, write_model, write_sentencepiece, write_vision_model
from tokenizers import Tokenizer

from olpack.data import Renderer
from olpack.errors import OlpackError
from olpack.export import Target, TokenText, check_export
from olpack.model.base import BUILTIN, Base, resolve
from olpack.model.shape import MetaModel, adapter_shapes
from olpack.recipe import Train
from olpack.train.checks import check_training
from olpack.train.model import load_with_adapter

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "num_hidden_layers": 4}
KINDS = {
    "deepseek_v2": {
        "tied": False,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gemma3_text": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_oss": {"tied": False, **LOCAL_EXPERTS},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "mamba2": {"num_heads": 8, "head_dim": 64},  # its config.json holds an infinite number
    "mixtral": {"tied": False, **LOCAL_EXPERTS},
    "phi3": {"tied": False},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {"tied": False, "shared_expert_intermediate_size": 256, **EXPERTS, **DELTA},
}


GEMMA = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>",
         "add_dummy_prefix": False, "remove_extra_whitespaces": False}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def sentencepiece_model(folder: Path, kind: str, special: list[str], begin: str, files: list[str], **trainer: object) -> Path:
    """A model whose tokenizer is in the files named."""
    write_sentencepiece(folder.parent / "tokenizer", **trainer)
    size = write_fast_sentencepiece(folder.parent / "tokenizer", special, begin)
    write_model(folder, kind, vocab_size=size)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    for name in (*files, "tokenizer_config.json"):
        shutil.copy(folder.parent / "tokenizer" / name, folder)
    return folder


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.model"], ["tokenizer.json", "tokenizer.model"]])
def test_a_sentencepiece_vocabulary_has_its_end_of_turn(tmp_path, files):
    """ggml-org/llama.cpp#14715 and the like: the token's text is compared with text, not with the bytes that the converter keeps."""
    source = sentencepiece_model(tmp_path / "model", "llama", ["<unk>", "<s>", "</s>"], "<s>", files)
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")], end_of_turn="</s>")
    fields = GGUFReader(file.path).fields
    ends = [fields[key].contents() for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in fields]
    assert 2 in ends
    with pytest.raises(OlpackError, match="ends a turn with '<|no|>', which is no token"):
        converter().export(source, [Target("Q8_0", tmp_path / "b.gguf")], end_of_turn="<|no|>")


def test_tokens_that_tokenizer_json_calls_special_are_control_tokens(tmp_path):
    """unslothai/unsloth#5070: Gemma's marks of a turn lie within its SentencePiece table."""
    marks = ["<start_of_turn>", "<end_of_turn>"]
    source = sentencepiece_model(
        tmp_path / "model",
        "gemma3_text",
        ["<pad>", "<eos>", "<bos>", "<unk>", *marks],
        "<bos>",
        ["tokenizer.json", "tokenizer.model"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*marks, "<own>"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    fast = json.loads((source / "tokenizer.json").read_text())
    own = {"id": 6, "content": "<own>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    edit(source / "tokenizer.json", added_tokens=[*fast["added_tokens"], own])
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")], end_of_turn=marks[1])
    fields = GGUFReader(file.path).fields
    assert fields["tokenizer.ggml.token_type"].contents()[:7] == [3, 3, 3, 2, 3, 3, 4]
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 5


@pytest.mark.parametrize("promised", [0, 1])
def test_a_head_for_more_tokens_that_is_only_promised(tmp_path, promised):
    source = write_model(tmp_path / "model", "qwen3_5_text", **DELTA)
    edit(source / "config.json", mtp_num_hidden_layers=promised)
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")])
    fields = GGUFReader(file.path).fields
    assert fields["qwen35.block_count"].contents() == 4
    assert not any("nextn" in name for name in fields)


def test_a_head_for_more_tokens_that_nothing_speaks_of(tmp_path):
    """ggml-org/llama.cpp#24737: Qwen3-Next's config.json has no key for it, and the converter counts on its weights."""
    source = write_model(tmp_path / "model", "qwen3_next", **KINDS["qwen3_next"])
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")])
    fields, tensors = GGUFReader(file.path).fields, GGUFReader(file.path).tensors
    assert fields["qwen3next.block_count"].contents() == 4
    assert not any("nextn" in name for name in [*fields, *(tensor.name for tensor in tensors)])


def test_a_head_that_would_be_random_is_refused(copy):
    edit(copy / "config.json", tie_word_embeddings=False)
    with pytest.raises(OlpackError, match="has no 'lm_head.weight': training would begin with random numbers there"):
        check_training(Base("copy", copy), Train(), on_gpu=False)


def test_whole_bases_lack_nothing(model, tmp_path):
    for source in (model, write_vision_model(tmp_path / "vision"), write_model(tmp_path / "untied", "llama", tied=False)):
        check_training(Base(source.name, source), Train(), on_gpu=False)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_bases_of_many_kinds_lack_nothing(tmp_path, kind):
    source = write_model(tmp_path / kind, kind, **KINDS[kind])
    check_training(Base(kind, source), Train(), on_gpu=False)
    tensors = load_file(source / "model.safetensors")
    lost = next(name for name in sorted(tensors) if re.search(r"\b(layers|h)\.1\.", name) and name.endswith("weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OlpackError, match=f"has no '{re.escape(lost)}': training would begin with random numbers"):
        check_training(Base(kind, source), Train(), on_gpu=False)


@pytest.mark.parametrize(
    ("kind", "pattern", "other"),
    [
        ("gpt2", r"^transformer\.", ""),  # openai-community/gpt2
        ("bloom", r"^transformer\.", ""),  # bigscience/bloom-560m
        ("llama", r"^model\.", ""),  # saved from AutoModel
        ("gemma3", r"^language_model\.model\.", "model.language_model."),
    ],
)
def test_weights_by_another_of_their_names_are_there(tmp_path, kind, pattern, other):
    vision = kind == "gemma3"
    source = write_vision_model(tmp_path / kind) if vision else write_model(tmp_path / kind, kind, **KINDS.get(kind, {}))
    renamed = {re.sub(pattern, other, name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    base = Base(kind, source)
    assert [name for name in MetaModel(base.config, kind).lacking(renamed) if "vision" not in name] == []
    check_training(base, Train(), on_gpu=False)


def test_an_adapter_goes_where_peft_puts_one_on_mamba(tmp_path):
    """The linear layers of the plan are those of the adapter: peft refuses `out_proj`, whose weight Mamba's kernel takes without the layer."""
    base = Base("mamba2", write_model(tmp_path / "model", "mamba2", **KINDS["mamba2"]))
    settings = Train(quantization="none", rank=4)
    model = load_with_adapter(base, settings, torch.device("cpu")).model
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert adapted == set(adapter_shapes(MetaModel(base.config, "mamba2"))) == {f"backbone.layers.{layer}.mixer.in_proj" for layer in range(2)}
    with pytest.raises(OlpackError, match="names 'out_proj', which is no linear layer"):
        check_training(base, Train(target_modules=["out_proj"]), on_gpu=False)


def test_a_base_in_mxfp4_is_called_quantized(tmp_path):
    """The published gpt-oss has `gate_up_proj_blocks` and `_scales` in place of its experts' weights: none of them is missing."""
    source = write_model(tmp_path / "oss", "gpt_oss", **KINDS["gpt_oss"])
    edit(source / "config.json", quantization_config={"quant_method": "mxfp4"})
    tensors = {
        name.replace("_proj", "_proj_blocks") if name.endswith("_proj") else name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OlpackError, match="quantized by mxfp4, which olpack exports and does not train on"):
        check_training(Base("oss", source), Train(), on_gpu=False)


def test_a_setting_of_the_wrong_kind_is_one_sentence(copy):
    edit(copy / "config.json", hidden_size="wide")
    with pytest.raises(OlpackError, match="config.json: hidden_size must be an integer, and is 'wide'"):
        check_training(Base("copy", copy), Train(), on_gpu=False)


def test_rotary_factors_of_long_contexts_are_in_the_file(tmp_path):
    """ggml-org/llama.cpp#24820: Phi-4's LongRoPE, written as transformers 5 writes it, in `rope_parameters`."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 256,
        "partial_rotary_factor": 1.0,
    }
    source = write_model(
        tmp_path / "model", "phi3", tied=False, max_position_embeddings=4096, original_max_position_embeddings=256, rope_parameters=rope
    )
    edit(source / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")])
    read = GGUFReader(file.path)
    factors = {tensor.name: tensor.data.tolist() for tensor in read.tensors if tensor.name.startswith("rope_factors")}
    assert factors == {"rope_factors_short.weight": [1.0] * 32, "rope_factors_long.weight": [2.0] * 32}
    attention = math.sqrt(1 + math.log(4096 / 256) / math.log(256))
    assert read.fields["phi3.rope.scaling.attn_factor"].contents() == pytest.approx(attention, rel=1e-6)
    assert read.fields["phi3.rope.scaling.original_context_length"].contents() == 256


def test_a_turn_that_ends_with_a_token_of_its_own(tmp_path):
    """ggml-org/llama.cpp#7271: the tokenizer's end of text is `<|endoftext|>`, and turns end otherwise."""
    source = Path(shutil.copytree(BUILTIN / "tiny-coder", tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text((source / name).read_text().replace("<|im_end|>", "<turn/>"))
    edit(source / "tokenizer_config.json", eos_token="<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        edit(source / name, eos_token_id=0)
    base = Base("turns", source)
    end = Renderer(base.tokenizer(), base.end_ids()).end_of_turn()
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")], end_of_turn=end)
    fields = GGUFReader(file.path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()] for key in ("eos", "eot")] == ["<|endoftext|>", "<turn/>"]
    assert fields["tokenizer.ggml.token_type"].contents()[tokens.index("<turn/>")] == 3


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4194304\n"
INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def cut(folder: Path) -> None:
    os.truncate(shards(folder)[1], shards(folder)[1].stat().st_size - 100)


def lose_one_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    shards(folder)[1].unlink()


def name_a_tensor_that_no_file_has(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(folder / INDEX, weight_map={**index["weight_map"], "model.layers.1.none.weight": shards(folder)[1].name})


def leave_pickles_only(folder: Path) -> None:
    for file in [folder / INDEX, *shards(folder)]:
        file.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"a pickle")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("sharded") / "model", shard="800KB")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shards(folder)[1].unlink(), r"lacks model-00002-of-0000\d\.safetensors of its weights"),
        (lose_one_without_an_index, r"lacks model-00002-of-0000\d\.safetensors of its weights"),
        (cut, "bytes, and its header declares"),
        (lambda folder: shards(folder)[1].write_text(POINTER), r"model-00002-of-0000\d\.safetensors' is a Git LFS pointer"),
        (lambda folder: (folder / INDEX).write_text(POINTER), r"index\.json' is a Git LFS pointer"),
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), r"tokenizer\.json' is a Git LFS pointer"),
        (name_a_tensor_that_no_file_has, r"names 1 tensors that its files lack, the first is 'model\.layers\.1\.none\.weight'"),
        (leave_pickles_only, "pickle"),
    ],
)
def test_a_download_that_is_not_whole_is_refused_by_both_readers(sharded, tmp_path, damage: Callable[[Path], None], reason):
    source = Path(shutil.copytree(sharded, tmp_path / "copy"))
    damage(source)
    with pytest.raises(OlpackError, match=reason):
        converter().check(source, ["Q8_0"])
    with pytest.raises(OlpackError, match=reason):
        check_training(resolve(str(source), relative_to=tmp_path), Train(), on_gpu=False)


def test_weights_in_another_form_beside_are_not_read(sharded, tmp_path):
    """ggml-org/llama.cpp#8807, #7486: consolidated.safetensors and pickles of the same model in one folder."""
    source = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (before,) = converter().export(source, [Target("Q8_0", tmp_path / "before.gguf")], name="one")
    shutil.copy(shards(source)[0], source / "consolidated.safetensors")
    (source / "consolidated-00001-of-00002.safetensors").write_text(POINTER)
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (after,) = converter().export(source, [Target("Q8_0", tmp_path / "after.gguf")], name="one")
    assert before.sha256 == after.sha256
    check_training(resolve(str(source), relative_to=tmp_path), Train(), on_gpu=False)


def test_a_convolution_never_reaches_into_the_next_row(tmp_path):
    """unslothai/unsloth#7249: rows of LFM2 are trained one by one, the plan says so, and the file has the loss that training printed."""
    write_model(tmp_path / "base", "lfm2", dtype="float32", **KINDS["lfm2"])
    edit(tmp_path / "base/tokenizer_config.json", chat_template=oracle.CHAT)
    root = oracle.make_workspace(tmp_path / "workspace", tmp_path / "base")
    small = ["train.quantization=none", "train.epochs=2", "quants=[F16]", "compare.reference=false"]
    changes = [word for change in small for word in ("--set", change)]
    code, _, message = oracle.olpack(root, "build", "oracle", "--no-deploy", *changes)
    assert code == 0, message
    message = " ".join(message.split())
    assert "carry a state from token to token" in message and "rows one by one" in message
    loss = float(re.search(r"eval loss [\d.]+ -> ([\d.]+)", message)[1])
    results = json.loads((root / "build/oracle/compare/results.json").read_text())
    assert math.log(results["quants"][0]["perplexity"]["value"]) == pytest.approx(loss, abs=0.01)


def test_a_leftover_quantization_is_not_believed(copy):
    edit(copy / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    base = Base("copy", copy)
    assert base.leftover_quantization and "quantization_config" not in base.config
    check_training(base, Train(), on_gpu=False)


def test_an_adapter_is_called_one(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", model)
    for refuse in (lambda: converter().check(adapter, ["Q8_0"]), lambda: resolve(str(adapter), relative_to=tmp_path)):
        with pytest.raises(OlpackError, match=f"is an adapter, no model; its base is {model}") as error:
            refuse()
        assert "--adapter" in error.value.remedy


def test_a_setting_that_is_missing_is_not_the_tokenizers(tmp_path):
    source = write_model(tmp_path / "model", "cohere2", num_hidden_layers=4)
    with pytest.raises(OlpackError, match=r"misses 'rotary_pct' in '.*config\.json'"):
        converter().check(source, ["Q8_0"])


def test_a_context_that_the_configuration_leaves_to_its_default(tmp_path):
    folder = tmp_path / "gemma"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 64}}))
    assert Base("gemma", folder).context_length == 131_072


def test_a_vocabulary_that_the_configuration_leaves_to_its_default(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MetaModel(Base("gemma", tmp_path).config, "gemma").shape.vocabulary == 262_208


def test_a_tokenizer_of_mistrals_own_is_one(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    (copy / "tekken.json").write_text("{}")
    assert resolve(str(copy), relative_to=copy).path == copy


@pytest.mark.parametrize(
    ("kind", "special", "begin", "trainer"),
    [
        ("llama", ["<unk>", "<s>", "</s>"], "<s>", {}),
        ("mistral", ["<unk>", "<s>", "</s>"], "<s>", {}),
        ("gemma2", ["<pad>", "<unk>", "<bos>", "<eos>"], "<bos>", GEMMA),
        ("gemma", ["<pad>", "<unk>", "<bos>", "<eos>"], "<bos>", GEMMA),
    ],
)
def test_a_sentencepiece_vocabulary_in_tokenizer_json_alone_makes_the_tokens_of_training(tmp_path, kind, special, begin, trainer):
    """peft and transformers 5 save no tokenizer.model, and without it the converter knew no order of merges, or refused Gemma."""
    source = sentencepiece_model(tmp_path / "model", kind, special, begin, ["tokenizer.json"], **trainer)
    if trainer:
        edit(source / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    lines = [line for line in Path(__file__).read_text().splitlines() if line.strip()][:150]
    texts = [TokenText(f"line {at}", [line], tokenizer.encode(line, add_special_tokens=False).ids) for at, line in enumerate(lines)]
    plan = check_export(source, ["Q8_0"], texts=texts)
    assert plan.texts == len(texts) and [one.source for one in plan.differences] == []
