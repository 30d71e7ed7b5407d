"""Block scales of a quant, trained to keep what the unquantized model predicts, after its matrices were rounded (`rounding: learned`).

Each block has one or two half-precision numbers: what scales its levels, and what scales its lows where its type has them. They are multiplied by
factors that Adam trains by the KL divergence of the quant's predictions from the unquantized model's on training rows. Codes and the small integers
beside them stay, so the file has the same form. The fewer bits, the more is gained (benchmarks/rounding.md).
"""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from olpack import progress
from olpack.data import TokenRow
from olpack.errors import OlpackError
from olpack.llamacpp import library
from olpack.llamacpp.grids import HALVES
from olpack.machine import this_machine
from olpack.model.gguf_architectures import ARCHITECTURES, config_of, weights_of
from olpack.model.gguf_base import GgufBase, open_gguf
from olpack.model.gguf_blocks import TYPES, BlockType
from olpack.model.shape import MetaModel, Shape
from olpack.train import free_memory
from olpack.train.batches import by_length, padded
from olpack.train.device import pick_device, working_dtype
from olpack.train.frozen import BlockLinear
from olpack.train.gguf_model import activation_bytes, frozen_bytes, load_frozen
from olpack.train.ops import blocks, pointwise
from olpack.workspace import write_atomically

ROWS_A_STEP = 16
LONGEST = 1_024  # tokens of a row that are read, and of a micro-batch
_LOGITS = 1 << 27  # of a micro-batch, at most
_LEARNING_RATE, _WARMUP = 2e-3, 5
_SET_ASIDE = 32  # rows that measure the gain, at most a fifth
_MEASURE_EVERY = 25  # steps
_KEEP_EVERY = 300  # seconds
_NUMBER = 22  # bytes of a trained number in memory: itself, its factor and its gradient, what Adam knows of it, the number that was rounded
_RANK = 16  # of an adapter: none of the kernels that dequantize depends on it
_LOGIT_COPIES = 5  # in float32: of both models, their logarithms, the gradient


@dataclass(frozen=True)
class TrainedScales:
    """What a training of block scales gave.

    Attributes:
        before, after: KL divergence from the unquantized model on training rows that were set aside, nats a token.
        steps: after which these scales were the best ones; 0 where training gained nothing.
    """

    before: float
    after: float
    steps: int


def trains(architecture: str) -> bool:
    """Whether olpack computes models of an architecture, as llama.cpp calls it, from their GGUF files."""
    return any(name.partition(" ")[0] == architecture for name in ARCHITECTURES)


def train_block_scales(
    gguf: Path, matrices: Mapping[str, tuple[str, Path]], rows: Sequence[TokenRow], out: Path, *, steps: int, title: str
) -> TrainedScales | None:
    """Train the block scales of a quant, or go on where that was interrupted, and write the best ones to `out`.

    Args:
        gguf: the unquantized model, in 16 or 8 bits.
        matrices: ggml's name of a tensor to its type in the quant and the file of its rounded blocks. Those that are no linear layer of the model
            as transformers has it keep their scales.
        rows: training rows. Every token counts; of a long row those up to its last target token, at most `LONGEST`.
        out: safetensors, by tensor float16 [numbers of a block, rows, blocks] in the order of `HALVES`; beside it is what an interrupted run needs.
        steps: of Adam, with `ROWS_A_STEP` rows each.
        title: of the progress bar.

    Returns:
        None where none of the matrices is such a layer; then nothing is written.

    Raises:
        OlpackError: an architecture that olpack does not train on from a GGUF; predictions that are no numbers; too little memory.
    """
    try:
        return _train(gguf, matrices, rows, out, steps, title)
    except torch.OutOfMemoryError:
        raise OlpackError("Training block scales ran out of the GPU's memory.", _WITHOUT) from None
    finally:
        free_memory()


_WITHOUT = "Free memory, or leave it out: `export: {scale_steps: 0}`, or --scale-steps 0."


def check_memory(shape: Shape, file_bytes: int, numbers: int, available: int, full: int) -> bool:
    """Whether activations have to be computed again in the backward pass, because all of them would not fit.

    Args:
        shape: of the model.
        file_bytes: of the unquantized model's weights as they are in memory, and of the quant's.
        numbers: of all blocks, which are trained.
        available: bytes of memory.
        full: bytes of an activation.

    Raises:
        OlpackError: it does not fit even so.
    """
    tokens = _tokens(shape.vocabulary)
    fixed = file_bytes + _NUMBER * numbers + 4 * _LOGIT_COPIES * tokens * shape.vocabulary
    of_layer = activation_bytes(shape, tokens, full)
    least = fixed + of_layer + tokens * full * shape.layers * shape.hidden
    if least > available:
        needed, there = progress.quantity(least, "B"), progress.quantity(available, "B")
        raise OlpackError(f"Training block scales needs {needed} of memory for both models, and {there} are free.", _WITHOUT)
    return fixed + shape.layers * of_layer > available


def _tokens(vocabulary: int) -> int:
    """Of a micro-batch."""
    return max(1, min(LONGEST, _LOGITS // vocabulary))


def _train(gguf: Path, matrices: Mapping[str, tuple[str, Path]], rows: Sequence[TokenRow], out: Path, steps: int, title: str) -> TrainedScales | None:
    from safetensors.torch import save

    quant = _Quant(open_gguf(gguf), matrices, pick_device())
    if not quant.layers:
        return None
    drawn = random.Random(0).sample(list(rows), len(rows))
    aside = max(1, min(_SET_ASIDE, len(drawn) // 5))
    measured_on, train_on = drawn[:aside], drawn[aside:] or drawn
    run = _Run(quant, steps, out.with_suffix(".state"))
    with progress.task(title, total=steps, unit="steps", done=run.step) as bar:
        if not run.measured:
            run.measure(measured_on)
        while run.step < steps:
            start = run.step * ROWS_A_STEP
            loss = run.take([train_on[(start + index) % len(train_on)] for index in range(ROWS_A_STEP)])
            if run.step % _MEASURE_EVERY == 0 or run.step == steps:
                run.measure(measured_on)
            elif time.monotonic() - run.kept_at > _KEEP_EVERY:
                run.keep()
            bar.advance(note=f"KL divergence {1000 * loss:.2f} mnat")
    before = run.measured[0]
    after, best = min((divergence, step) for step, divergence in run.measured.items())
    write_atomically(out, save(run.best))
    run.state.unlink(missing_ok=True)
    return TrainedScales(before, after, best)


def training_tokens(rows: Sequence[TokenRow], steps: int) -> int:
    """About how many tokens `train_block_scales` reads."""
    return steps * ROWS_A_STEP * sum(min(LONGEST, len(row.ids)) for row in rows) // max(1, len(rows))


class _Run:
    """A training under way: a step at a time, kept in a file now and then.

    Attributes:
        step: how many are done.
        kept_at: the monotonic clock's time when it was kept.
        measured: KL divergence by step, nats a token.
        best: the scales with the smallest one, by tensor.
    """

    def __init__(self, quant: _Quant, steps: int, state: Path):
        self.quant, self.state, self.step, self.measured = quant, state, 0, dict[int, float]()
        self.best: dict[str, torch.Tensor] = {}
        self.kept_at = time.monotonic()
        self._optimizer = torch.optim.Adam([layer.factors for layer in quant.layers.values()], lr=_LEARNING_RATE, betas=(0.9, 0.99))
        self._rate = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        if state.is_file():
            self._load()

    def take(self, rows: Sequence[TokenRow]) -> float:
        """One step. Returns the KL divergence on its rows, nats a token."""
        total, windows = 0.0, self.quant.windows(rows)
        for divergence in self.quant.divergences(windows):
            divergence.backward()  # of the sum: Adam takes the same step whatever it is multiplied by
            total += float(divergence.detach())
        if math.isfinite(total):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._rate.step()
        self.quant.write()
        self.step += 1
        return total / sum(map(len, windows))

    def measure(self, rows: Sequence[TokenRow]) -> None:
        """Measure the KL divergence on rows, keep the scales if it is the smallest so far, and put everything into the file."""
        windows = self.quant.windows(rows)
        with torch.inference_mode():
            divergence = sum(map(float, self.quant.divergences(windows))) / sum(map(len, windows))
        if not self.measured and not math.isfinite(divergence):
            raise OlpackError("The model's predictions are no numbers.", "Take another checkpoint, or train again with a lower learning rate.")
        if divergence < min(self.measured.values(), default=math.inf):
            self.best = self.quant.scales()
        self.measured[self.step] = divergence
        self.keep()

    def keep(self) -> None:
        """Put everything into the file."""
        factors = {name: layer.factors.detach() for name, layer in self.quant.layers.items()}
        kept = {"step": self.step, "measured": self.measured, "best": self.best, "factors": factors}
        data = io.BytesIO()
        torch.save(kept | {"optimizer": self._optimizer.state_dict(), "rate": self._rate.state_dict()}, data)
        write_atomically(self.state, data.getvalue())
        self.kept_at = time.monotonic()

    def _load(self) -> None:
        try:
            kept: dict[str, Any] = torch.load(self.state, weights_only=True, map_location=self.quant.device)
        except Exception as error:  # torch raises whatever it meets in a damaged file
            progress.warn(f"'{self.state}' is damaged ({type(error).__name__}), so the training of block scales begins anew")
            return
        self.step, self.measured, self.best = kept["step"], kept["measured"], kept["best"]
        self._optimizer.load_state_dict(kept["optimizer"])
        self._rate.load_state_dict(kept["rate"])
        for name, layer in self.quant.layers.items():
            layer.factors.data.copy_(kept["factors"][name])
        self.quant.write()


class _Quant:
    """The unquantized model, whose linear layers compute as those of a quant where that is wanted."""

    def __init__(self, base: GgufBase, matrices: Mapping[str, tuple[str, Path]], device: torch.device):
        self.device = device
        dtype, meta = working_dtype(device), MetaModel(config_of(base), str(base.paths[0]))
        self._tokens = _tokens(meta.shape.vocabulary)
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else min(psutil.virtual_memory().available, this_machine().ram)
        sizes = [(path.stat().st_size, TYPES[library.tensor_type(one)].bytes, len(HALVES[one])) for one, path in matrices.values()]
        weights_bytes = frozen_bytes(base, dtype.itemsize) + sum(size for size, _, _ in sizes)
        again = check_memory(meta.shape, weights_bytes, sum(size // block * count for size, block, count in sizes), free, dtype.itemsize)
        self._model = load_frozen(base, device, dtype)
        pointwise.use_kernels(device, dtype, self._model.config.get_text_config().to_dict(), _RANK)
        if again:
            self._compute_activations_again()
        self.layers: dict[str, ScaledLinear] = {}
        self._orders: dict[str, torch.Tensor] = {}  # row of the file by row of the model
        for name, weight in weights_of(base, meta.module).items():
            tensor, module = weight.tensors[0], name.removesuffix(".weight")
            if len(weight.tensors) > 1 or tensor not in matrices or not isinstance(plain := self._model.get_submodule(module), BlockLinear):
                continue
            type_name, path = matrices[tensor]
            order = self._orders[tensor] = weight.rows(torch.arange(plain.out_features)[:, None])[:, 0]
            packed = torch.from_numpy(np.fromfile(path, np.uint8).reshape(plain.out_features, -1))[order]
            layer = self.layers[tensor] = ScaledLinear(plain, TYPES[library.tensor_type(type_name)], HALVES[type_name], packed.to(device))
            self._model.set_submodule(module, layer)

    def _compute_activations_again(self) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        self._model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        for layer in self._model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True  # it computes again in training mode only; what is in it stays in evaluation mode, without dropout

    def windows(self, rows: Sequence[TokenRow]) -> list[Sequence[int]]:
        """The tokens of each row that are read, from the shortest row to the longest: at most as many as a micro-batch has, and of a longer row those
        up to its last target token."""
        found: list[Sequence[int]] = []
        for row in sorted(rows, key=lambda row: len(row.ids)):
            last = max((place for place, counts in enumerate(row.loss_mask) if counts), default=len(row.ids) - 1)
            found.append(row.ids[max(0, last + 1 - self._tokens) :][: self._tokens])
        return found

    def divergences(self, windows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """KL divergence of the quant from the unquantized model for each micro-batch, summed over its tokens, in nats."""
        for group in by_length(windows, self._tokens):
            ids, places = padded(group, self.device)
            with torch.no_grad():
                exact = self._log_probabilities(ids, places, quantized=False)
            yield F.kl_div(self._log_probabilities(ids, places, quantized=True), exact, reduction="sum", log_target=True)

    def _log_probabilities(self, ids: torch.Tensor, places: torch.Tensor, *, quantized: bool) -> torch.Tensor:
        for layer in self.layers.values():
            layer.quantized = quantized
        return self._model(ids, use_cache=False).logits[places].float().log_softmax(-1)

    def write(self) -> None:
        """Put the scales that the factors give into all blocks."""
        for layer in self.layers.values():
            layer.write()

    def scales(self) -> dict[str, torch.Tensor]:
        """Those of the blocks, float16 [numbers of a block, rows, blocks] by tensor, rows in the order of the file."""
        found = {}
        for name, layer in self.layers.items():
            numbers = layer.halves().cpu()
            found[name] = torch.empty_like(numbers)
            found[name][:, self._orders[name]] = numbers
        return found


class ScaledLinear(nn.Module):
    """A linear layer of a quant, whose block scales are trained, and the same layer of the unquantized model.

    Args:
        exact: the latter.
        block_type, places: of the quant's blocks, and the bytes of their half-precision numbers.
        packed: uint8 [rows, bytes of a row]. Its scales change.

    Attributes:
        factors: float32 [numbers of a block, rows, blocks], the logarithms of what the scales are multiplied by.
        quantized: whether it computes as the quant's layer.
    """

    def __init__(self, exact: BlockLinear, block_type: BlockType, places: Sequence[int], packed: torch.Tensor):
        super().__init__()
        self.exact, self.block_type, self.quantized = exact, block_type, True
        self._blocks = packed.contiguous()
        self._places = [slice(at, at + 2) for at in places]
        self._rounded = self.halves().float()
        self.factors = nn.Parameter(torch.zeros_like(self._rounded))

    def _of_blocks(self, packed: torch.Tensor) -> torch.Tensor:
        return packed.view(len(packed), -1, self.block_type.bytes)

    def halves(self) -> torch.Tensor:
        """The half-precision numbers of the blocks, float16 [numbers of a block, rows, blocks]."""
        each = self._of_blocks(self._blocks)
        return torch.stack([each[..., place].contiguous().view(torch.float16)[..., 0] for place in self._places])

    @torch.no_grad()
    def write(self) -> None:
        """Put the scales that the factors give into the blocks."""
        each = self._of_blocks(self._blocks)
        for place, numbers in zip(self._places, (self._rounded * self.factors.exp()).half(), strict=True):
            each[..., place] = numbers[..., None].view(torch.uint8)

    def dequantize(self, *, lows: bool = True) -> torch.Tensor:
        """The quant's weight, [rows, columns] in the dtype that the model computes in; without `lows` only what the levels give of it."""
        packed = self._blocks
        if not lows:
            packed = packed.clone()
            self._of_blocks(packed)[..., self._places[1]] = 0
        return blocks.dequantize(self.block_type, packed, self.exact.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ScaledProduct.apply(x.to(self.exact.compute_dtype), self.factors, self) if self.quantized else self.exact(x)


class _ScaledProduct(torch.autograd.Function):
    """x @ W.T + bias with gradients of the factors of W's scales. W is linear in its scales, so that a factor's gradient is the sum, over the weights
    of its block, of W's gradient times the part of W that the scale gives."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, factors: torch.Tensor, layer: ScaledLinear) -> torch.Tensor:
        context.layer = layer
        context.save_for_backward(x)
        return F.linear(x, layer.dequantize(), layer.exact.bias)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        layer: ScaledLinear = context.layer
        (x,) = context.saved_tensors
        weight = layer.dequantize()
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)

        def of_blocks(part: torch.Tensor) -> torch.Tensor:
            return (of_weight * part).unflatten(1, (-1, layer.block_type.weights)).sum(-1, dtype=torch.float32)

        sums = [of_blocks(weight)]
        if len(layer.factors) > 1:
            levels = of_blocks(layer.dequantize(lows=False))
            sums = [levels, sums[0] - levels]
        return gradient @ weight, torch.stack(sums), None
