"""The quant types by name: llama.cpp's file types, and the tag that each has in Ollama's library.

quant_type("q4_k_m")    # QuantType(name="Q4_K_M", tag="q4_K_M", ftype=15)
quant_type("4.6bpw")    # QuantType(name="4.6BPW", tag="4.6bpw", ftype=None, budget=Budget(bits_per_weight=4.6))
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from olpack.errors import OlpackError

# How a quantized type's blocks are made: as ggml makes them, with scales that a search finds to give the smallest error, or so that the outputs
# of each matrix on the training rows change least.
Rounding = Literal["ggml", "search", "learned"]

# Tensor types whose block scales are worth a training; that of Q4_K, Q4_1 and IQ4_NL gained nothing (benchmarks/LOG.md).
FEW_BITS = ("Q2_K", "Q3_K", "Q4_0")


@dataclass(frozen=True)
class Budget:
    """How much a file may hold whose tensors get the types that lose least. One of the two is given.

    Attributes:
        bits_per_weight: bits of tensor data per parameter of the model.
        size: bytes of the whole file.
    """

    bits_per_weight: float | None = None
    size: int | None = None


@dataclass(frozen=True)
class QuantType:
    """One of llama.cpp's file types: a mix of tensor types under one name. Or a budget, for which the mix is chosen.

    Attributes:
        name: as llama.cpp spells it, "Q4_K_M".
        tag: as Ollama's library spells it, "q4_K_M".
        ftype: the value of `enum llama_ftype` in llama.h, written to `general.file_type`. None for a budget whose mix is still to be
            chosen; then that of the nearest mix.
        budget: None for a mix of llama.cpp's.
    """

    name: str
    tag: str
    ftype: int | None
    budget: Budget | None = None


# `enum llama_ftype` of llama.h. Not here: MXFP4_MOE and NVFP4, formats that a model is trained in, and numbers whose types were removed.
_FTYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "Q2_K_S": 21,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ1_S": 24,
    "IQ1_M": 31,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ3_XXS": 23,
    "IQ3_XS": 22,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "Q1_0": 40,
    "Q2_0": 41,
}

# The types of single tensors in ggml that its quantizer makes.
TENSOR_TYPES = (
    "f32",
    "f16",
    "bf16",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_K",
    "q3_K",
    "q4_K",
    "q5_K",
    "q6_K",
    "iq1_s",
    "iq1_m",
    "iq2_xxs",
    "iq2_xs",
    "iq2_s",
    "iq3_xxs",
    "iq3_s",
    "iq4_nl",
    "iq4_xs",
    "tq1_0",
    "tq2_0",
    "q1_0",
    "q2_0",
)

# Conversions with nothing to choose: an importance matrix changes none of their bytes.
_UNWEIGHTED = ("f32", "f16", "bf16", "q8_0")

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(BPW|[KMGT]B)")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

# What llama-quantize understands too.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def _tag(name: str) -> str:
    """Lower case, but a K and what follows it stay as they are: q4_0, q4_K_M, q6_K, iq4_xs, f16."""
    head, separator, rest = name.partition("_K")
    return head.lower() + separator + rest


QUANT_TYPES: dict[str, QuantType] = {name: QuantType(name, _tag(name), ftype) for name, ftype in _FTYPES.items()}


def quant_type(name: str) -> QuantType:
    """The quant type of a name, in any case: "q4_k_m", "Q4_K_M" and the tag "q4_K_M" are the same. "4.6bpw" and "5GB" are budgets.

    Raises:
        OlpackError: no such type; the message names the nearest and lists all.
    """
    wanted = str(name).strip().upper()
    if match := _BUDGET.fullmatch(wanted):
        number, unit = float(match[1]), match[2]
        if number > 0:
            budget = Budget(bits_per_weight=number) if unit == "BPW" else Budget(size=bytes_of(wanted))
            return QuantType(f"{number:g}{unit}", f"{number:g}{unit}".lower(), None, budget)
    wanted = _ALIASES.get(wanted, wanted)
    if wanted in QUANT_TYPES:
        return QUANT_TYPES[wanted]
    near = difflib.get_close_matches(wanted, QUANT_TYPES, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise OlpackError(f"There is no quant type '{name}'.", f"{hint}llama.cpp has: {', '.join(QUANT_TYPES)}.")


def type_of_file(file_type: object, largest: str) -> QuantType:
    """The quant type of a GGUF that is there already.

    Args:
        file_type: its `general.file_type`.
        largest: the tensor type of most of its weights, "MXFP4": its name where the number is none that llama.cpp's quantizer makes.
    """
    known = next((kind for kind in QUANT_TYPES.values() if type(file_type) is int and kind.ftype == file_type), None)
    return known or QuantType(largest, largest.lower(), None)


def bytes_of(text: str) -> int:
    """Bytes of a size as people write it: "4GB", "500 MB", "1.5G". Units are decimal.

    Raises:
        OlpackError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if not match or not (size := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise OlpackError(f"'{text}' is no size.", "Write it like 4GB or 500MB.")
    return size


def check_tensor_types(tensor_types: Mapping[str, str]) -> dict[str, str]:
    """Patterns for tensor names with the types that they get, each type spelled as ggml does: "Q6_k" is "q6_K".

    Raises:
        OlpackError: a pattern is no regular expression, or there is no such type; the message names the nearest and lists all.
    """
    spelled = {known.lower(): known for known in TENSOR_TYPES}
    checked = {}
    for pattern, name in tensor_types.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise OlpackError(f"'{pattern}' is no regular expression: {error}.", "Write a part of a tensor's name, such as 'attn_v'.") from None
        wanted = str(name).strip().lower()
        if wanted not in spelled:
            near = difflib.get_close_matches(wanted, spelled, n=1, cutoff=0.5)
            hint = f"Did you mean {spelled[near[0]]}? " if near else ""
            raise OlpackError(f"There is no tensor type '{name}'.", f"{hint}ggml has: {', '.join(TENSOR_TYPES)}.")
        checked[pattern] = spelled[wanted]
    return checked


def overridable(quant: QuantType) -> bool:
    """Whether types that are chosen for single tensors, or a rounding, decide anything in a file type: only in quantized ones."""
    return quant.name not in ("F32", "F16", "BF16")


def has_few_bits(quant: QuantType, tensor_types: Mapping[str, str]) -> bool:
    """Whether a file may have matrices in Q2_K, Q3_K or Q4_0: a budget decides that by what it measures."""
    return quant.budget is not None or any(one.upper().startswith(FEW_BITS) for one in (quant.name, *tensor_types.values()))


def gains_by_importance(quant: QuantType, tensor_types: Mapping[str, str]) -> bool:
    """Whether an importance matrix decides anything in a file of this type, with these types for single tensors (pattern to name)."""
    if not overridable(quant):
        return False
    return quant.name.lower() not in _UNWEIGHTED or any(type_ not in _UNWEIGHTED for type_ in tensor_types.values())
