"""LoRA on stacked experts: peft's `target_parameters`, where one A and one B hold the factors of every expert of a layer.

With E experts of rank r, A is [r * E, a] with the experts outside, and B is [b, r * E] with the experts inside. Which side of the parameter
[E, s1, s2] is a's and which is b's depends on peft's version: up to 0.18 a = s1, since 0.19.1 the layer's input, which is s2 where the experts
are stored as [out, in], as nearly all are; 0.19.0 did the opposite of that. Where s1 and s2 differ, the shapes decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from olpack.errors import OlpackError

if TYPE_CHECKING:
    import torch

# Parameters of a layer's experts in the order in which transformers registers them, with the names of their parts in a checkpoint that stores
# each expert by itself: rows of the first part come first.
_PARAMETERS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "up_proj": (("up_proj",),), "down_proj": (("down_proj",), ("w2",))}
_BY_INPUT = (0, 19, 1)  # the first version of peft that takes the layer's input for A's side, whichever way the experts are stored


@dataclass(frozen=True)
class Stack:
    """How the change of one tensor comes out of the factors of all experts.

    Attributes:
        count: experts.
        swapped: an expert's change is B @ A, else the transpose of that.
        expert: which one, where the tensor is of one expert; None for the whole stack.
        rows: of that expert's change, where the tensor is a part of it.
    """

    count: int
    swapped: bool
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def delta(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """The change without its scale, [experts, s1, s2] or [rows, s2].

        Args:
            b: [b, rank * experts], float32.
            a: [rank * experts, a], float32.
        """
        import torch

        a = a.reshape(self.count, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.count).permute(2, 0, 1)
        if self.expert is not None:
            a, b = a[self.expert : self.expert + 1], b[self.expert : self.expert + 1]
        change = torch.bmm(b, a)
        if not self.swapped:
            change = change.transpose(1, 2).contiguous()
        if self.expert is None:
            return change
        return change[0] if self.rows is None else change[0, self.rows[0] : self.rows[1]].contiguous()


def find_stacks(
    folder: Path,
    config: dict,
    module: str,
    a: tuple[int, ...],
    b: tuple[int, ...],
    base: Mapping[str, tuple[int, ...]],
    find: Callable[[str], str | None],
) -> Iterator[tuple[str, str, int, Stack]]:
    """The base's tensors that one pair of factors changes.

    Args:
        folder: of the adapter, for messages.
        config: its configuration.
        module: that the factors are saved for; peft wraps a module once for each parameter, so ".base_layer" is at its end for all but the last.
        a: shape of A.
        b: shape of B.
        base: shapes of the base's tensors.
        find: the base's name of a tensor, None where there is none.

    Yields:
        (tensor, parameter, rank, how its change is computed).

    Raises:
        OlpackError: the base has no such parameter, or neither shapes nor version decide which side is which.
    """
    layer, depth = module, 0
    while layer.endswith(".base_layer"):
        layer, depth = layer.removesuffix(".base_layer"), depth + 1
    targets_asked = config.get("target_parameters") or []
    targets = [name for name in _PARAMETERS if any(f".{layer}.{name}".endswith(f".{target}") for target in targets_asked)]
    if depth >= len(targets):
        raise OlpackError(
            f"The adapter '{folder}' changes parameters of '{layer}' that cannot be merged ({', '.join(map(str, targets_asked))}).",
            "Merge it with peft (merge_and_unload) and export the merged folder.",
        )
    parameter = targets[-1 - depth]
    name = f"{layer}.{parameter}"
    stacked = _stacked(layer, parameter, base, find)
    parts = [] if stacked else _parts_of_experts(layer, parameter, base)
    if not stacked and not parts:
        raise OlpackError(
            f"The adapter is for another base: it changes '{name}', which the base does not have.", "Name the base that it was trained on."
        )
    if stacked:
        count, *sides = base[stacked]
    else:
        count, sides = 1 + max(part.expert for part in parts), [max(part.stop for part in parts), base[parts[0].tensor][1]]
    swapped = _swapped(folder, config, name, a[-1], b[0], (sides[0], sides[1]), bool(stacked) and _transposed(layer, base, find))
    if a[0] % count or a[0] != b[-1]:
        raise OlpackError(
            f"The adapter '{folder}' has {a[0]} rows of A for the {count} experts of '{name}'.", "Name the base that it was trained on."
        )
    rank = a[0] // count
    if stacked:
        yield stacked, name, rank, Stack(count, swapped)
    for part in parts:
        yield part.tensor, name, rank, Stack(count, swapped, part.expert, (part.start, part.stop))


@dataclass(frozen=True)
class _Part:
    """A tensor of one expert, and the rows of that expert's parameter that it is."""

    tensor: str
    expert: int
    start: int
    stop: int


def _stacked(layer: str, parameter: str, base: Mapping[str, tuple[int, ...]], find: Callable[[str], str | None]) -> str | None:
    """The base's tensor with a parameter of all experts, None where it stores each expert by itself."""
    names = (find(name) for name in (f"{layer}.{parameter}", f"{layer}.{parameter}.weight"))
    return next((name for name in names if name is not None and len(base[name]) == 3), None)


def _parts_of_experts(layer: str, parameter: str, base: Mapping[str, tuple[int, ...]]) -> list[_Part]:
    """The base's tensors that are a parameter of the experts, one for each part of each expert."""
    block = re.match(r".*?\.\d+\.", f"{layer}.")
    stem = block[0] if block else ""
    for parts in _PARAMETERS[parameter]:
        pattern = re.compile(rf"(?:.*\.)?{re.escape(stem.removeprefix('model.'))}(?:\w+\.)?experts\.(\d+)\.({'|'.join(parts)})\.weight")
        found = [(name, int(match[1]), parts.index(match[2])) for name in base if (match := pattern.fullmatch(name))]
        if found:
            height = base[found[0][0]][0]
            return [_Part(name, expert, height * part, height * (part + 1)) for name, expert, part in found]
    return []


def _transposed(layer: str, base: Mapping[str, tuple[int, ...]], find: Callable[[str], str | None]) -> bool:
    """Whether stacked experts are stored as [in, out] (gpt-oss): the first matrix takes what the second one gives."""
    first, second = (find(f"{layer}.{name}") for name in ("gate_up_proj", "down_proj"))
    if first is None or second is None:
        return False
    (rows, columns), (middle, out) = base[first][-2:], base[second][-2:]
    return rows == out and columns == 2 * middle


def _swapped(folder: Path, config: dict, name: str, a: int, b: int, sides: tuple[int, int], transposed: bool) -> bool:
    first, second = sides
    fits = {swapped for swapped, wanted in ((True, (second, first)), (False, (first, second))) if (a, b) == wanted}
    if not fits:
        raise OlpackError(
            f"The adapter '{folder}' is for another base: its experts' matrices for '{name}' make {[b, a]}, and the base has {list(sides)} there.",
            "Name the base that it was trained on.",
        )
    if len(fits) == 1:
        return fits.pop()
    version = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(config.get("peft_version") or ""))
    if version is None:
        raise OlpackError(
            f"The adapter '{folder}' does not name the version of peft that made it (peft_version), and '{name}' is square: versions "
            "before 0.19 mean its sides the other way round.",
            "Put the version into its adapter_config.json, or merge it with the peft that made it.",
        )
    number = tuple(int(part or 0) for part in version.groups())
    if number < _BY_INPUT:
        return transposed and number[:2] == _BY_INPUT[:2]
    return not transposed
