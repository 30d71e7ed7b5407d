"""A model's folder, checked by its names, its configuration and the headers of its safetensors files. Loads no weight."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.model.settings import check_tokenizer, read_config_file

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_FILES = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
_MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
_LONGEST_NAME = 255  # bytes of a file's name
_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}  # others: one byte or less


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as a safetensors header describes it.

    Attributes:
        dtype: as safetensors spells it, "BF16".
        shape: dimensions, outermost first.
        file: where its data is.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path


def read_config(source: Path) -> dict:
    """config.json of a model folder.

    Raises:
        OlpackError: `source` is no model folder.
    """
    if not source.is_dir():
        raise OlpackError(f"There is no model folder '{source}'.", "Name a folder with config.json, a tokenizer and safetensors.")
    path = source / "config.json"
    if not path.is_file():
        refuse_adapter(source)
        ggufs = sorted(source.glob("*.gguf"))
        if ggufs:
            raise OlpackError(
                f"'{source}' contains a GGUF ({ggufs[0].name}) and no config.json.", "Name the GGUF itself, or the folder of the model."
            )
        raise OlpackError(f"'{source}' is no model folder: it has no config.json.", "Name a folder with config.json, a tokenizer and safetensors.")
    return read_config_file(path)


def refuse_adapter(source: Path) -> None:
    """Raises OlpackError if the folder contains an adapter, naming the base that it was trained on."""
    path = source / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = bounded_json.read_object(path, "Save the adapter again.").get("base_model_name_or_path")
    except OlpackError:
        base = None
    raise OlpackError(
        f"'{source}' is an adapter, no model; its base is {base or 'not named in adapter_config.json'}.",
        f"Name {base or 'the base'} as the model, and this folder with --adapter; or make a package of it with `olpack import {source}`.",
    )


def check_tokenizer_files(source: Path) -> None:
    """Raises OlpackError if the folder contains no tokenizer, a pointer in place of one, or one whose settings have a wrong shape."""
    found = [source / name for name in TOKENIZERS if (source / name).is_file()]
    for file in found:
        _refuse_pointer(file)
    if not found:
        raise OlpackError(
            f"'{source}' has no tokenizer (no {' or '.join(TOKENIZERS[:2])}).",
            "Put the tokenizer of the base model there; AutoTokenizer.save_pretrained writes it.",
        )
    check_tokenizer(source)


def _refuse_pointer(file: Path) -> None:
    """Raises OlpackError if Git left the address of a large file in its place."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise OlpackError(
                f"'{file}' is a Git LFS pointer and not the file itself.",
                "Run `git lfs pull` in its folder, or download the model with `hf download`.",
            )


def read_tensor_headers(source: Path) -> dict[str, TensorHeader]:
    """Every tensor of a model folder, by its name in the checkpoint.

    Raises:
        OlpackError: no safetensors, a missing shard, a truncated or damaged file.
    """
    files = _weight_files(source)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        tensors.update(read_safetensors_header(file))
    index = source / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(set(_weight_map(index)) - set(tensors))
        if missing:
            raise OlpackError(
                f"'{index}' names {len(missing)} tensors that its files lack, the first is '{missing[0]}'.", "Download the model again."
            )
    if not tensors:
        raise OlpackError(f"The safetensors in '{source}' contain no tensors.", "Download the model again.")
    return tensors


def _weight_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(source / name for name in set(_weight_map(index).values()))
    else:
        files = _all_shards(sorted(source.glob("model*.safetensors")))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise OlpackError(
            f"'{source}' lacks {', '.join(missing[:3])}{' and more' if missing[3:] else ''} of its weights.",
            "Finish the download of the model.",
        )
    if files:
        return files
    pickles = sorted([*source.glob("pytorch_model*.bin"), *source.glob("*.pt"), *source.glob("*.pth")])
    if pickles:
        raise OlpackError(
            f"'{source}' has its weights as pickle only ({pickles[0].name}), which can run code when it is read.",
            "Take a revision with safetensors, or save the model with save_pretrained(safe_serialization=True).",
        )
    raise OlpackError(f"'{source}' contains no weights (no model*.safetensors).", "Finish the download of the model.")


def _all_shards(files: list[Path]) -> list[Path]:
    """The files, and those that their names (`model-00001-of-00003`) imply, unless one file contains the whole model."""
    if any(file.name == "model.safetensors" for file in files):
        return files
    spoken = {
        file.with_name(f"{match[1]}-{number:05}-of-{match[2]}.safetensors")
        for file in files
        if (match := _SHARD.fullmatch(file.name))
        for number in range(1, int(match[2]) + 1)
    }
    return sorted(spoken | set(files))


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME


def _weight_map(index: Path) -> dict[str, str]:
    _refuse_pointer(index)
    found = bounded_json.read_object(index, "Download it again.").get("weight_map")
    if not isinstance(found, dict) or not all(_is_file_name(name) for name in found.values()):
        raise OlpackError(f"'{index}' has no valid 'weight_map'.", "Download it again.")
    return found


def read_safetensors_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, after a check that the file has all the bytes that its header declares.

    Raises:
        OlpackError: the file is truncated, longer than its header declares, or no safetensors file.
    """
    _refuse_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise OlpackError(f"'{file}' is truncated within its header, or no safetensors file.", "Download it again.")
        try:
            header = bounded_json.loads(opened.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            tensors = {name: TensorHeader(entry["dtype"], tuple(entry["shape"]), file) for name, entry in entries.items()}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            for name, entry in entries.items():
                width = _BYTES.get(entry["dtype"])
                start, stop = entry["data_offsets"]
                numbers = [*entry["shape"], start, stop]
                if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers) or start > stop or len(numbers) > 10:
                    raise OlpackError(f"'{file}' is damaged: '{name}' has an impossible shape or place in the file.", "Download it again.")
                if width is not None and stop - start != width * math.prod(entry["shape"]):
                    raise OlpackError(f"'{file}' is damaged: the size of '{name}' does not fit its shape.", "Download it again.")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise OlpackError(f"'{file}' is no safetensors file: its header cannot be read.", "Download it again.") from error
    if size != 8 + length + end:
        raise OlpackError(
            f"'{file}' has {size:,} bytes, and its header declares {8 + length + end:,}.",
            "It is truncated or was swapped: download it again.",
        )
    return tensors
