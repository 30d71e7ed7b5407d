"""llama.cpp's converter as a library: a model's tensors by their GGUF names, still to be loaded, and the keys of its header.

Runs in the worker process only, because it imports the converter's own `gguf` package.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.export import pretokenizer
from olpack.export.adapter import Adapter
from olpack.export.quantized import replace_dequantization
from olpack.model.checkpoint import TOKENIZER_FILES, read_tensor_headers
from olpack.workspace import scratch

FLOATS = ("F32", "F16", "BF16")  # types of GGUF tensors that can be quantized

# Facts of llama.cpp's `src/llama-vocab.cpp`: parts of `general.name`, and the tokens that a model of such a name must have.
PHI3_NAMES = ("phi-3", "phi3")
_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def use_converter(source: Path) -> None:
    """Make `gguf` and `conversion` of llama.cpp's source tree the ones that this process imports."""
    os.environ.pop("NO_LOCAL_GGUF", None)
    logging.disable(logging.CRITICAL)  # what matters of the converter's news becomes an error or a warning of ours
    gc.disable()  # these imports make a million objects that all stay: looking for garbage among them takes most of a second
    # Before the converter, so that an installation without bytecode (uv's) gets it: compiling these modules takes most of the imports' time.
    import torch
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401 — imported when they are named, and used by the converter

    _defer_activations()
    sys.dont_write_bytecode = True  # the folder's files are compared with the release, and compiling them takes a third of a second
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import conversion  # noqa: F401
    import gguf

    gc.freeze()
    gc.enable()
    torch.set_num_threads(1)  # tensors are loaded in many threads, each of which would start a team of its own
    assert Path(gguf.__file__).is_relative_to(source), "another gguf was imported before the converter's own"
    _keep_floats(gguf)


class _Activations:
    """Stands for `transformers.activations.ACT2FN` where configurations look up the name of an activation: the common ones are known without it."""

    _KNOWN = frozenset({"gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "silu", "swish", "tanh"})

    def __len__(self) -> int:
        return len(self._KNOWN)

    def __contains__(self, name: object) -> bool:
        return name in self._KNOWN or name in self.keys()

    def keys(self) -> Collection[str]:
        from transformers.activations import ACT2FN

        return ACT2FN.keys()


def _defer_activations() -> None:
    """Keep transformers' configurations from importing its activations, and with them a thousand modules of torch that no conversion uses."""
    name = "transformers.activations"
    if name in sys.modules:
        return
    sys.modules[name] = stand_in = ModuleType(name)
    stand_in.ACT2FN = _Activations()  # type: ignore[attr-defined]  # a module's attributes are not declared
    try:
        with suppress(ImportError):  # another version of transformers, which needs more of it
            import transformers.utils.type_validators  # noqa: F401 — keeps the name ACT2FN
    finally:
        del sys.modules[name]


def _keep_floats(gguf: Any) -> None:
    """Let the arrays that the converter prepares for its own 16-bit rounding remember the values before it."""
    rounded = gguf.quants.quantize

    def quantize(data: Any, qtype: Any) -> Any:
        result = rounded(data, qtype)
        if isinstance(result, gguf.LazyNumpyTensor) and qtype.name in FLOATS:
            result.before_rounding = data
        return result

    gguf.quants.quantize = quantize


@dataclass
class SourceTensor:
    """A tensor of the model under its GGUF name.

    Attributes:
        name: in the GGUF.
        origin: its name in the checkpoint, for messages; the last one where several became one.
        shape: dimensions, outermost first.
        type_name: the type it has in llama.cpp's own BF16 file, "BF16", "F32".
        nbytes: in that type.
        stored: the quantized type in which the source has these very values, and the bytes in it; a file that wants that type gets them.
        changed: the quantized type in which the source has the values to which an adapter is added.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    _load: Callable[[], np.ndarray] | None
    stored: tuple[int, Callable[[], np.ndarray]] | None = None
    changed: int | None = None

    @property
    def elements(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    def load(self) -> np.ndarray:
        """Its values: float32 [rows, columns] where `type_name` is a float type, else the bytes, uint8 [bytes]. Can be called once."""
        load, self._load = self._load, None  # the function keeps what the converter needs to compute the values
        assert load is not None, f"{self.name} was loaded before"
        return load()


@dataclass
class SourceModel:
    """A model as llama.cpp's converter sees it.

    Attributes:
        architecture: llama.cpp's name.
        tensors: by GGUF name, in the converter's order.
        keys: the header in the converter's writer, key to `GGUFValue`, in order.
        packed: arrays among their values as a file has them, by `id`. To pack a vocabulary takes most of a second, and all files have the same.
    """

    architecture: str
    tensors: dict[str, SourceTensor]
    keys: dict[str, Any]
    packed: dict[int, bytes] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Weights in the model. Tensors that the converter adds (factors of a rotary embedding) are too few to matter and count."""
        return sum(tensor.elements for tensor in self.tensors.values())

    def key(self, name: str) -> Any:
        """The value of a header key, None if it is not there."""
        found = self.keys.get(name)
        return None if found is None else found.value


def open_model(
    source: Path,
    *,
    adapter: Adapter | None = None,
    name: str | None = None,
    chat_template: str | None = None,
    end_of_turn: str | None = None,
    metadata: Mapping[str, str] | None = None,
    vocabulary: bool = True,
    tokenizer: Path | None = None,
) -> SourceModel:
    """Open a model folder with llama.cpp's converter. Reads configuration, tokenizer and tensor headers; no weight is loaded.

    The arguments are those of `olpack.export.export`, and `vocabulary`: False where the folder has no tokenizer and only shapes are
    needed. llama.cpp loads such a model, but can turn no text into tokens with it. `tokenizer`: a folder whose tokenizer takes the place of
    the model's own, because the adapter's vocabulary is another.

    Raises:
        OlpackError: what the converter does not know or refuses, with its own message.
    """
    import torch

    with torch.inference_mode(), ExitStack() as stack:
        model = _construct(source, name)
        origins = _record_origins(model)
        replace_dequantization(model)
        if adapter is not None:
            _merge(model, adapter)
        if tokenizer is not None:
            _replace_tokenizer(model, tokenizer, stack.enter_context(scratch()))
        _read_sentencepiece_from_json(model)
        if not vocabulary:
            model.set_vocab = lambda: _set_empty_vocabulary(model)
        try:
            model.prepare_tensors()
        except (ValueError, NotImplementedError, KeyError, AssertionError) as error:
            raise _refused(source, error) from error
        model.set_gguf_parameters = _named_settings(model.set_gguf_parameters, source)
        try:
            model.prepare_metadata(vocab_only=False)
        except OlpackError:
            raise
        except (AssertionError, IndexError) as error:
            raise OlpackError(
                f"The tokenizer in '{source}' has more tokens than the model's embedding has rows.",
                "Resize the embedding (resize_token_embeddings) and save the model, or use the tokenizer it came with.",
            ) from error
        except (ValueError, NotImplementedError, KeyError, TypeError, OSError) as error:
            raise OlpackError(
                f"llama.cpp's converter cannot read the tokenizer in '{source}': {_words(error)}.",
                "Take the tokenizer files from the model's publisher.",
            ) from error
    writer = model.gguf_writer
    path = (tokenizer or source) / "tokenizer.json"
    if path.is_file():
        fast = bounded_json.read_object(path, "Save it again with save_pretrained, or download it again.")
        _rank_merges(fast, writer)
        _mark_special(fast, writer)
    _check_vocabulary(source, writer)
    set_keys(writer, chat_template, end_of_turn, metadata or {})
    tensors = {}
    for info_name, info in writer.tensors[0].items():
        tensors[info_name] = SourceTensor(
            info_name,
            origins.get(info_name, info_name),
            tuple(int(n) for n in info.shape),
            info.dtype.name,
            info.nbytes,
            _loader(info.tensor, info.dtype.name),
        )
        info.tensor = None
    return SourceModel(writer.arch, tensors, dict(writer.kv_data[0]))


def _construct(source: Path, name: str | None) -> Any:
    import conversion
    import gguf

    class_name = None
    try:
        hparams = conversion.ModelBase.load_hparams(source, False)
        class_name = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        model_class = conversion.get_model_class(class_name)
    except (NotImplementedError, ValueError, KeyError) as error:
        what = f"the architecture '{class_name}'" if class_name else "this model (its config.json names no architecture)"
        raise OlpackError(
            f"llama.cpp's converter does not know {what}, so '{source}' cannot become a GGUF.",
            "Take a base of an architecture that llama.cpp runs: Llama, Qwen, Gemma, Mistral, Phi and about 150 more.",
        ) from error
    if model_class.supports_mtp_export:
        # Set for each model, because the classes live as long as the process. The weights decide: config.json goes on promising a head that
        # transformers does not save.
        model_class.no_mtp = not _predicts_ahead(read_tensor_headers(source), hparams)
    try:
        model = model_class(source, gguf.LlamaFileType.MOSTLY_BF16, source / "unused.gguf", model_name=name)
    except (ValueError, KeyError, TypeError, AssertionError, ImportError) as error:
        raise _refused(source, error) from error
    model = getattr(model, "impl", model)  # that of Mistral 3 hands its work to another one
    _recognize_pretokenizer(model, source)
    return model


def _predicts_ahead(names: Iterable[str], hparams: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has layers for multi-token prediction: under names of their own, or numbered after the last layer."""
    layers = hparams.get("num_hidden_layers") or (hparams.get("text_config") or {}).get("num_hidden_layers")
    for name in names:
        if re.search(r"(^|\.)mtp\.", name):
            return True
        number = re.search(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.", name)
        if layers and number and int(number[1]) >= layers:
            return True
    return False


def _named_settings(read: Callable[[], None], source: Path) -> Callable[[], None]:
    """`set_gguf_parameters`, whose failures are those of config.json and not of the tokenizer that is read beside it."""

    def set_gguf_parameters() -> None:
        try:
            read()
        except KeyError as error:
            raise OlpackError(
                f"llama.cpp's converter misses {error} in '{source / 'config.json'}'.",
                "Add it as the model's publisher has it, or take another base.",
            ) from error
        except (ValueError, NotImplementedError, AssertionError, TypeError, AttributeError) as error:
            raise _refused(source, error) from error

    return set_gguf_parameters


def _read_sentencepiece_from_json(model: Any) -> None:
    """Where the converter's class for a model reads tokenizer.model only (Gemma, Gemma 2) and the folder has none, have it read tokenizer.json,
    which holds the same vocabulary: peft and transformers 5 save no tokenizer.model."""
    read = model._set_vocab_sentencepiece

    def set_vocab_sentencepiece(*arguments: Any, **named: Any) -> None:
        if (Path(model.dir_model) / "tokenizer.model").is_file():
            return read(*arguments, **named)
        try:
            return model._set_vocab_llama_hf()
        except TypeError as error:  # the file holds a byte-level vocabulary, which other methods of the converter read
            raise FileNotFoundError(f"{model.dir_model}/tokenizer.model") from error

    model._set_vocab_sentencepiece = set_vocab_sentencepiece


def _rank_merges(fast: Mapping[str, Any], writer: Any) -> None:
    """Give the tokens of a SentencePiece vocabulary that was read from tokenizer.json the scores that its merges imply.

    llama.cpp merges the pair whose token has the highest score first, and the converter gives all of them the same one.

    Args:
        fast: what tokenizer.json contains.
        writer: of the converter.
    """
    import gguf

    keys = writer.kv_data[0]
    scores = keys.get(gguf.Keys.Tokenizer.SCORES)
    if scores is None or len(set(scores.value)) > 1:
        return
    merges = (fast.get("model") or {}).get("merges") or []
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    if not ranks:
        return
    tokens = keys[gguf.Keys.Tokenizer.LIST].value
    scores.value[:] = [float(-ranks.get(_text(token), len(ranks))) for token in tokens]


def _mark_special(fast: Mapping[str, Any], writer: Any) -> None:
    """Give the tokens that tokenizer.json adds to its vocabulary the type of such: control tokens where it calls them special, else user-defined.

    The converter looks for them in tokenizer_config.json, where transformers 5 no longer writes them, and llama.cpp reads a token without that
    type as plain text.

    Args:
        fast: what tokenizer.json contains.
        writer: of the converter.
    """
    import gguf

    types = writer.kv_data[0].get(gguf.Keys.Tokenizer.TOKEN_TYPE)
    if types is None:
        return
    for token in fast.get("added_tokens") or []:
        if token["id"] < len(types.value) and types.value[token["id"]] in (gguf.TokenType.NORMAL, gguf.TokenType.UNUSED):
            types.value[token["id"]] = int(gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED)


def _set_empty_vocabulary(model: Any) -> None:
    model.gguf_writer.add_tokenizer_model("no_vocab")
    model.gguf_writer.add_vocab_size(model.gguf_writer.tensors[0]["token_embd.weight"].shape[0])


def _recognize_pretokenizer(model: Any, source: Path) -> None:
    """Where the converter's table does not know the tokenizer, look at its split patterns."""
    by_hash = model.get_vocab_base_pre

    def get_vocab_base_pre(tokenizer: Any) -> str:
        try:
            return by_hash(tokenizer)
        except NotImplementedError:
            return pretokenizer.recognize(source)

    model.get_vocab_base_pre = get_vocab_base_pre


def _record_origins(model: Any) -> dict[str, str]:
    """Note for each GGUF tensor which tensor of the checkpoint it came from, as the converter renames them."""
    origins: dict[str, str] = {}
    modify = model.modify_tensors

    def modify_tensors(data: Any, name: str, block: int | None) -> Any:
        for new_name, new_data in modify(data, name, block):
            origins[new_name] = name
            yield new_name, new_data

    model.modify_tensors = modify_tensors
    return origins


def _merge(model: Any, adapter: Adapter) -> None:
    """Have each tensor that the adapter changes load as the base's value with the change in it."""
    import torch
    from conversion import LazyTorchTensor

    dequantize = model.dequant_model
    if adapter.untied:
        model.hparams["tie_word_embeddings"] = False  # else some architectures leave the output layer out
    if adapter.vocabulary:
        model.hparams["vocab_size"] = adapter.vocabulary

    def dequantize_then_merge() -> None:
        dequantize()
        stored = dict(model.model_tensors)
        for name in sorted(adapter.tensors):
            kept = type(model).filter_tensors((name, lambda: None))
            if name in adapter.untied:
                same = type(model).filter_tensors((adapter.untied[name], lambda: None))
                if kept is None or same is None:
                    raise OlpackError(
                        f"The adapter changes embedding and output layer differently, and llama.cpp knows {model.hf_arch} "
                        "with one matrix for both only.",
                        "Train with ensure_weight_tying: true in peft's configuration, or without the two.",
                    )
                stored[kept[0]] = stored[same[0]]
                model.model_tensors = {kept[0]: stored[kept[0]], **model.model_tensors}  # in front, as sorted names have it
            if kept is None or kept[0] not in model.model_tensors:
                raise OlpackError(
                    f"The adapter changes '{name}', which is not part of the text model that llama.cpp runs.",
                    "Train an adapter for the language model's layers only.",
                )

            def load(base: Callable[[], Any] = stored[kept[0]], name: str = name) -> Any:
                weight = base()
                meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, adapter.shape(name, tuple(weight.shape)))
                return LazyTorchTensor(meta=meta, args=(weight,), func=lambda eager: adapter.apply(name, eager))

            model.model_tensors[kept[0]] = load

    model.dequant_model = dequantize_then_merge


def _replace_tokenizer(model: Any, tokenizer: Path, scratch: Path) -> None:
    """Have the converter read the tokenizer of another folder, with the model's own settings beside it."""
    for folder, wanted in ((Path(model.dir_model), False), (tokenizer, True)):
        for file in folder.iterdir():
            if file.is_file() and (file.name in TOKENIZER_FILES if wanted else file.suffix == ".json" and file.name not in TOKENIZER_FILES):
                shutil.copyfile(file, scratch / file.name)
    if not (scratch / "chat_template.jinja").is_file() and (own := Path(model.dir_model) / "chat_template.jinja").is_file():
        shutil.copyfile(own, scratch / own.name)
    dequantize = model.dequant_model

    def dequantize_then_replace() -> None:
        dequantize()
        model.dir_model = scratch  # no weight is read by this name from here on

    model.dequant_model = dequantize_then_replace


def _loader(tensor: Any, type_name: str) -> Callable[[], np.ndarray]:
    import gguf

    values = getattr(tensor, "before_rounding", None)

    def load() -> np.ndarray:
        import torch

        with torch.inference_mode():
            if type_name not in FLOATS:
                return np.ascontiguousarray(gguf.LazyNumpyTensor.to_eager(tensor)).reshape(-1).view(np.uint8)
            array = gguf.LazyNumpyTensor.to_eager(values if values is not None else tensor)
            return np.ascontiguousarray(array, dtype=np.float32).reshape(-1, array.shape[-1] if array.ndim else 1)

    return load


def _check_vocabulary(source: Path, writer: Any) -> None:
    """Two rules of llama.cpp that it enforces only when a model is loaded, the second one with an abort."""
    tokens = writer.kv_data[0].get("tokenizer.ggml.tokens")
    embedding = writer.tensors[0].get("token_embd.weight")
    if tokens is None or embedding is None:
        return
    if len(tokens.value) != embedding.shape[0]:
        raise OlpackError(
            f"'{source}' has a vocabulary of {len(tokens.value):,} tokens, and its embedding has {embedding.shape[0]:,} rows.",
            "Correct vocab_size in config.json, or resize the embedding (resize_token_embeddings) and save the model.",
        )
    if len(set(tokens.value)) != len(tokens.value):
        twice, _ = Counter(tokens.value).most_common(1)[0]
        raise OlpackError(
            f"The tokenizer in '{source}' has the token {_text(twice)!r} twice, which llama.cpp refuses.",
            "Take the tokenizer files from the model's publisher.",
        )


def _text(token: str | bytes) -> str:
    """A token as text: of SentencePiece vocabularies the converter keeps bytes."""
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else token


def set_keys(writer: Any, chat_template: str | None, end_of_turn: str | None, metadata: Mapping[str, str]) -> None:
    """Put the keys of an export's options into a `GGUFWriter`. The arguments are those of `olpack.export.export`."""
    import gguf

    if chat_template is not None:
        writer.add_chat_template(chat_template)
    if end_of_turn is not None:
        tokens = [_text(token) for token in writer.kv_data[0][gguf.Keys.Tokenizer.LIST].value]
        if end_of_turn not in tokens:
            raise OlpackError(
                f"The chat template ends a turn with '{end_of_turn}', which is no token of the tokenizer.",
                "Take the chat template that belongs to this tokenizer.",
            )
        eos = writer.kv_data[0].get(gguf.Keys.Tokenizer.EOS_ID)
        if eos is None or tokens[eos.value] != end_of_turn:
            writer.add_eot_token_id(tokens.index(end_of_turn))
    for key, value in metadata.items():
        writer.add_string(key, value)
    _check_name(writer.kv_data[0])


def _check_name(keys: Mapping[str, Any]) -> None:
    """llama.cpp takes a model for Phi-3 by its name, sets how its special tokens treat spaces, and refuses a model that lacks one of them."""
    name, tokens = (keys[key].value if key in keys else "" for key in ("general.name", "tokenizer.ggml.tokens"))
    alike = next((part for part in PHI3_NAMES if part in name.lower()), None)
    if alike is None or not tokens:
        return
    known = set(map(_text, tokens))
    if lacking := next((token for token in _PHI3_TOKENS if token not in known), None):
        raise OlpackError(
            f"llama.cpp takes a model with '{alike}' in its name for a Phi-3, and could not load '{name}', whose vocabulary has no '{lacking}'.",
            "Give it another name: --name, the package's name, or that of the model's folder.",
        )


def _refused(source: Path, error: Exception) -> OlpackError:
    return OlpackError(
        f"llama.cpp's converter cannot convert '{source}': {_words(error)}.",
        "Compare config.json and the weights with the model's publisher, or take another base.",
    )


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")
