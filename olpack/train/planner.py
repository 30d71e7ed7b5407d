"""Micro-batch and gradient checkpointing: the fastest choice that fits into a GPU's memory.

Without checkpointing nothing is computed twice, so that is chosen where it takes enough tokens to keep the GPU busy; with it, the largest
micro-batch that fits: in a long run with attention outputs offloaded, and where little would fit otherwise with the output layer offloaded.
Where no micro-batch fits beside the frozen layers, as many of these are streamed as the largest micro-batch needs (`olpack.train.ops.layer_stream`):
a copy of a layer serves all tokens of a micro-batch, so the larger it is, the less the copies delay.
The memory is estimated from the model's shape and from the training rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from olpack.machine import GPU_MARGIN
from olpack.model.gguf_architectures import QUANTIZED_AS
from olpack.model.gguf_blocks import FLOATS
from olpack.model.quantized import quantization_of
from olpack.progress import quantity
from olpack.train.batches import micro_batches, schedule
from olpack.train.ops.limits import SLOTS

if TYPE_CHECKING:
    import torch

    from olpack.data import TokenRow
    from olpack.model.base import Base
    from olpack.model.shape import MetaModel
    from olpack.recipe import Train
    from olpack.train.memory import TrainingMemory
    from olpack.train.processes import Ranks

CPU_TOKENS = 512  # a CPU is fastest where activations stay in its cache
_MOST = 16_384  # tokens beyond which a GPU gets no faster (benchmarks/multi_gpu.md)
_BUSY = 4_096  # tokens below which it does, by more than it costs to compute activations again (benchmarks/train_8b.md)
_FP8_SIZE = 1 << 25  # tokens of a micro-batch times hidden size, from which on fp8 is faster by a sixth and more (benchmarks/fp8.md)
_COUNTED = 1_024  # tokens for which activations are counted; they grow with their number
SHARDABLE = ("nf4", "fp4", "none")  # `train.quantization` of frozen layers that can be sharded over GPUs
_SLACK = 0.05  # of a GPU's memory that is lost between allocations
_WORTH = 50  # micro-batches, from which on it pays to pin memory for attention outputs: 3 s beside the loading, and 4 % of each step gained
_PINNABLE_SHARE = 0.25  # of the host's free memory: it is locked, and nothing else can use it meanwhile
_STREAMABLE_SHARE = 0.8  # of the same, for frozen layers that the GPU has no memory for
# At least so much is lost between allocations where layers are streamed: 16 of the pieces in which torch maps memory. Of 2.4 GB a loss of 0.26 GB was
# more than an 8B had left, and 0.34 GB less (benchmarks/streaming.md).
_LOST = 16 * (20 << 20)
_STEPS = 400  # at most so many steps are looked at for the largest micro-batch


@dataclass(frozen=True)
class Pace:
    """What bounds the speed of a run whose layers are streamed.

    Attributes:
        link: bytes/s from pinned memory to the GPU.
        products: floating-point operations/s of a large product in 16 bits; None where no GPU is there to measure it.
    """

    link: float
    products: float | None = None


ASSUMED_PACE = Pace(12e9)  # of a GPU that is not there: 16 lanes of PCIe 3, or 8 of PCIe 4


@dataclass(frozen=True)
class Fit:
    """How a run uses memory.

    Attributes:
        tokens: of a micro-batch at most; what the loop calls its budget.
        largest: of the micro-batch that takes most, among the rows that there are.
        checkpointing: whether activations are computed again in the backward pass.
        sharded: whether the frozen layers are sharded over all GPUs.
        offload_attention: whether attention outputs are offloaded to pinned memory, so that they are not computed again.
        offload_head: whether the output layer is in pinned memory except for the loss.
        in_fp8: whether the products with frozen weights are computed in fp8.
        streamed: frozen layers that are in pinned memory except while they compute.
        loads_in_host_memory: whether the base loads there, because the GPU has no memory for what is offloaded afterwards. With streamed layers it
            does so in any case.
        pace: with streamed layers, what bounds their speed; else None.
        expected_tokens_per_s: with streamed layers, the most that follows from that; else None.
        training: the estimate, by purpose; None on a CPU.
        bytes: estimated GPU memory at the peak; None where it cannot be estimated.
        available: bytes of GPU memory that the run may use; None on a CPU.
        summary: the choice and its reason, in one line; "" where there was nothing to choose.
    """

    tokens: int
    largest: int
    checkpointing: bool
    sharded: bool = False
    offload_attention: bool = False
    offload_head: bool = False
    in_fp8: bool = False
    streamed: int = 0
    loads_in_host_memory: bool = False
    pace: Pace | None = None
    expected_tokens_per_s: float | None = None
    training: TrainingMemory | None = None
    bytes: int | None = None
    available: int | None = None
    summary: str = ""

    @property
    def fits(self) -> bool:
        """Whether the estimate is within the available memory."""
        return self.bytes is not None and self.available is not None and self.bytes <= self.available

    @property
    def parts(self) -> dict[str, int]:
        """`bytes` by purpose, also where not all can be estimated."""
        if self.training is None:
            return {}
        return self.training.parts(
            self.checkpointing, offload_attention=self.offload_attention, offload_head=self.offload_head, streamed=self.streamed
        )

    @property
    def pinned_parts(self) -> dict[str, int]:
        """Bytes of pinned memory for each GPU, by purpose."""
        if self.training is None or self.bytes is None or not self.checkpointing:
            return {}
        return self.training.pinned_parts(offload_attention=self.offload_attention, offload_head=self.offload_head, streamed=self.streamed)

    @property
    def pinned_by_forward(self) -> int:
        """Bytes of pinned memory that the forward pass uses: all but what a base that loads in the host's memory has there already."""
        loads = self.training is not None and (self.streamed or self.loads_in_host_memory)
        loaded = self.streamed * self.training.streamable + self.training.offloaded if self.training and loads else 0
        return sum(self.pinned_parts.values()) - loaded

    def as_json(self) -> dict[str, Any]:
        """Plain data under the names of plan.json, bytes throughout."""
        fields = {_JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}
        return {**fields, "parts": self.parts, "host_parts": self.pinned_parts}


_JSON_NAMES = {"offload_attention": "keeps", "offload_head": "head_waits", "available": "room", "summary": "said"}


def choose(base: Base, rows: Sequence[TokenRow], settings: Train, device: torch.device, ranks: Ranks) -> Fit:
    """The choice for the device that a run begins on, with the memory that is free there now: of several processes the smallest, so that all
    choose the same."""
    if device.type == "cpu":
        return on_cpu(settings, sharded=ranks.count > 1 and settings.sharding == "full")
    from olpack.model.shape import MetaModel
    from olpack.train.adapter import whole_parameters

    model, whole = MetaModel(base.config, base.label), whole_parameters(base, settings)
    available, pinnable = ranks.smallest(free_gpu_memory(device)), ranks.smallest(pinnable_memory())
    streamable = ranks.smallest(streamable_memory())
    return on_gpu(
        model,
        rows,
        settings,
        available,
        pinnable=pinnable,
        streamable=streamable,
        pace=partial(measure_pace, device),
        stored=stored_bytes(base),
        whole=whole,
        gpus=ranks.count,
        multiplies_fp8=multiplies_fp8(device),
    )


def stored_bytes(base: Base, rest_bytes: int = 2) -> int | None:
    """Bytes in memory of a base that comes quantized, mostly as on the disk; None for another one.

    Args:
        rest_bytes: of a weight of a GGUF that does not stay in blocks: 2 on a GPU, 4 on a CPU.
    """
    if base.gguf is not None:
        from olpack.train.gguf_model import frozen_bytes

        return frozen_bytes(base.gguf, rest_bytes)
    if not quantization_of(base.config):
        return None
    return sum(file.stat().st_size for file in base.path.glob("model*.safetensors"))


def on_cpu(settings: Train, *, sharded: bool = False) -> Fit:
    """The choice on a CPU: the recipe's, else the fastest there."""
    tokens = CPU_TOKENS if settings.micro_batch_tokens == "auto" else settings.micro_batch_tokens
    return Fit(tokens, tokens, settings.gradient_checkpointing is True, sharded)


def free_gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU that a run may use, of those that are free now."""
    import torch

    return round(torch.cuda.mem_get_info(device)[0] * (1 - _SLACK))


def pinnable_memory() -> int:
    """Bytes of host memory that a run may pin where it need not."""
    return round(psutil.virtual_memory().available * _PINNABLE_SHARE)


def streamable_memory() -> int:
    """Bytes of host memory that a run may pin where the GPU has no memory for its frozen layers."""
    return round(psutil.virtual_memory().available * _STREAMABLE_SHARE)


def measure_pace(device: torch.device) -> Pace:
    """Measured in about 0.1 s, the best of a few copies and products."""
    import torch

    piece = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
    copy, matrix = torch.empty_like(piece, device=device), torch.ones(4096, 4096, dtype=torch.float16, device=device)

    def seconds(compute: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(4):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            compute()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1000)
        return best

    return Pace(piece.nbytes / seconds(lambda: copy.copy_(piece, non_blocking=True)), 2 * 4096**3 / seconds(lambda: matrix @ matrix))


def card_memory(gib: float) -> int:
    """Bytes that a run may use of a card of so many GiB: the driver's context takes some."""
    return max(0, round((gib * (1 << 30) - GPU_MARGIN) * (1 - _SLACK)))


def on_gpu(
    model: MetaModel,
    rows: Sequence[TokenRow],
    settings: Train,
    available: int,
    *,
    pinnable: int = 0,
    streamable: int = 0,
    pace: Callable[[], Pace] = lambda: ASSUMED_PACE,
    stored: int | None = None,
    whole: int = 0,
    gpus: int = 1,
    multiplies_fp8: bool = False,
) -> Fit:
    """The fastest choice that fits into `available` bytes of each GPU; settings of the recipe stay as they are.

    Args:
        model: the base without data.
        rows: training rows, of which the longest and the largest micro-batch decide.
        settings: the recipe's `train` section.
        pinnable: bytes of host memory that may be pinned, all GPUs together, to offload attention outputs.
        streamable: bytes of host memory that may be pinned, all GPUs together, to stream frozen layers.
        pace: measures what bounds the speed of streamed layers.
        stored: bytes of a base that comes quantized, as `stored_bytes` counts them.
        whole: weights of modules that are trained as a whole.
        gpus: that share each step's rows.
        multiplies_fp8: whether the GPU has products in fp8.
    """
    sizes = _Sizes(rows, settings, gpus)
    asked = settings.micro_batch_tokens
    budgets = [asked] if asked != "auto" else sizes.budgets()
    ways = [False, True] if settings.gradient_checkpointing == "auto" else [settings.gradient_checkpointing]
    can_shard = gpus > 1 and stored is None and settings.quantization in SHARDABLE
    shardings = {"none": [False], "full": [gpus > 1], "auto": [False, True] if can_shard else [False]}[settings.sharding]
    busy = min(_BUSY, budgets[-1]) if asked == "auto" else 0

    def using(estimate: _Estimate, sharded: bool, checkpointing: bool, may_offload_head: bool, budget: int) -> Fit:
        largest, targets = sizes.largest(budget)
        training = estimate(largest, targets)
        total = training.total(True)
        offload_head = may_offload_head and total is not None and total > available
        worth = checkpointing and sizes.tokens >= _WORTH * largest * gpus
        offload_attention = worth and training.attention_fits(available, pinnable // gpus, offload_head=offload_head)
        total = training.total(checkpointing, offload_attention=offload_attention, offload_head=offload_head)
        in_fp8 = multiplies_fp8 and not sharded and _worth_fp8(model, settings, largest)
        loads_in_host_memory = not sharded and total is not None and training.before_steps > available
        if loads_in_host_memory and not (checkpointing and _loads_in_host_memory(model, settings) and training.weights <= streamable // gpus):
            loads_in_host_memory, total = False, max(total or 0, training.before_steps)
        return Fit(
            budget,
            largest,
            checkpointing,
            sharded,
            offload_attention,
            offload_head,
            in_fp8,
            loads_in_host_memory=loads_in_host_memory,
            training=training,
            bytes=total,
            available=available,
        )

    for sharded in shardings:
        estimate = _estimator(model, settings, stored, whole, gpus if sharded else 1)
        smallest = estimate(*sizes.largest(budgets[0]))
        if smallest.total(True) is None:  # an architecture that cannot be counted: the careful choice
            largest, _ = sizes.largest(tokens := budgets[0])
            return _with_summary(Fit(tokens, largest, ways[-1], shardings[-1], training=smallest, available=available), sizes)
        choices = [(way, False) for way in ways] + ([(True, True)] if ways[-1] and smallest.head else [])
        for checkpointing, may_offload_head in choices:
            last = (checkpointing, may_offload_head) == choices[-1]
            tried = [budget for budget in budgets if budget >= busy or last]  # with few tokens the next choice is faster
            fit_of = partial(using, estimate, sharded, checkpointing, may_offload_head)
            if fit := _largest_that_fits(tried, fit_of):
                return _with_summary(fit, sizes, _without(sizes, estimate, budgets) if checkpointing and len(ways) > 1 else None)
    if ways[-1] and settings.sharding != "full" and _loads_in_host_memory(model, settings):
        estimate = _estimator(model, settings, stored, whole, 1)
        if fit := _streaming(estimate, model, sizes, budgets, available, streamable // gpus):
            return _with_summary(_with_pace(fit, model, pace()), sizes)
    return _with_summary(fit_of(budgets[0]), sizes)


def _loads_in_host_memory(model: MetaModel, settings: Train) -> bool:
    """Whether a base loads in the host's memory as it does on the GPU, and begins to train there as it does elsewhere. LLM.int8 has tensors of its
    own beside the weights, and HQQ would compute its codes on the host."""
    frozen = settings.quantization in SHARDABLE
    if stored := quantization_of(model.published):
        frozen = not stored.get("load_in_8bit")
    return frozen and settings.method in ("lora", "rslora") and settings.initialization == "default"


def _streaming(estimate: _Estimate, model: MetaModel, sizes: _Sizes, budgets: list[int], available: int, streamable: int) -> Fit | None:
    """The largest micro-batch that fits with all layers streamed, and the fewest layers that are for it. The output layer is offloaded: it is copied
    once, a layer twice. None where that does not fit either."""
    layers = model.shape.layers
    available = min(available, round(available / (1 - _SLACK)) - _LOST)

    def using(budget: int, streamed: int) -> Fit:
        largest, targets = sizes.largest(budget)
        training = estimate(largest, targets)
        total = training.total(True, offload_head=True, streamed=streamed)
        return Fit(budget, largest, True, offload_head=training.head > 0, streamed=streamed, training=training, bytes=total, available=available)

    if layers <= SLOTS or not estimate(*sizes.largest(budgets[0])).streamable:
        return None
    whole = _largest_that_fits(budgets, lambda budget: using(budget, layers))
    if whole is None:
        return None
    counts = range(SLOTS + 1, layers + 1)
    fit = using(whole.tokens, counts[bisect_left(counts, True, key=lambda count: using(whole.tokens, count).fits)])
    return fit if sum(fit.pinned_parts.values()) <= streamable else None


def _with_pace(fit: Fit, model: MetaModel, pace: Pace) -> Fit:
    """The choice with the tokens/s that it trains at most: those of the slower one, link or products, if it alone took time."""
    from olpack.model.shape import adapter_shapes

    assert fit.training is not None
    copied = 2 * (fit.streamed - SLOTS) * fit.training.streamable + fit.training.host_inputs  # bytes to the GPU: layers twice, their inputs once
    rate = fit.largest * pace.link / (copied + (fit.training.head if fit.offload_head else 0))
    if pace.products is not None:
        weights = model.parameters.active - model.parameters.embedding - model.parameters.head  # the loss is of target tokens alone, may be of few
        last = sum(rows * columns for name, (rows, columns) in adapter_shapes(model).items() if name.endswith("down_proj"))
        rate = min(rate, pace.products / (6 * weights - 2 * last))  # forward, forward again but for a layer's last product, back
    return replace(fit, pace=pace, expected_tokens_per_s=rate)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device multiplies in fp8."""
    import torch

    from olpack.train.ops.fp8 import CAPABILITY

    return (
        device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability(device) >= CAPABILITY
    )


def _worth_fp8(model: MetaModel, settings: Train, tokens: int) -> bool:
    """Whether products in fp8 are asked for, or faster: large ones, of weights for which there is a kernel (benchmarks/fp8.md, gguf_blocks.md)."""
    if settings.products != "auto":
        return settings.products == "fp8"
    plain = settings.method in ("lora", "rslora") and settings.dropout == 0
    return plain and _has_fp8_kernels(model, settings) and tokens * model.shape.hidden >= _FP8_SIZE


def _has_fp8_kernels(model: MetaModel, settings: Train) -> bool:
    """Whether kernels write most of the frozen weights as fp8 codes: weights in 4 bits, and the blocks of a GGUF."""
    stored = quantization_of(model.published)
    if not stored:
        return settings.quantization in ("nf4", "fp4")
    return stored.get("quant_method") == QUANTIZED_AS and stored["types"][0] not in FLOATS


_Estimate = Callable[[int, int], "TrainingMemory"]
"""(tokens of a micro-batch, target tokens among them) to the memory of a step."""


def _largest_that_fits(budgets: list[int], fit_of: Callable[[int], Fit]) -> Fit | None:
    """The choice for the largest of the ascending budgets that fits; None where the first does not."""
    within = bisect_left(budgets, True, key=lambda budget: not fit_of(budget).fits)
    return fit_of(budgets[within - 1]) if within else None


def _estimator(model: MetaModel, settings: Train, stored: int | None, whole: int, shards: int) -> _Estimate:
    from olpack.train.memory import estimate_training, logits_bytes

    # The layers that `olpack.train.ops.lora` computes; others go through peft's.
    fused = settings.dropout == 0 and settings.method in ("lora", "rslora") and (stored is not None or settings.quantization != "int8")
    counted = estimate_training(
        model,
        rank=settings.rank,
        tokens=_COUNTED,
        precision="bfloat16" if settings.quantization == "none" else settings.quantization,
        weights=stored,
        targets=settings.target_modules,
        method=settings.method,
        whole=whole,
        shards=shards,
        fused=fused,
        chunked=not whole,
    )
    return lambda tokens, targets: counted.scaled(tokens / _COUNTED, logits_bytes(model.shape, targets, not whole))


def _without(sizes: _Sizes, estimate: _Estimate, budgets: list[int]) -> tuple[int, int | None]:
    """(tokens, bytes) of the smallest micro-batch that would have been worth it without checkpointing."""
    budget = next(budget for budget in budgets if budget >= min(_BUSY, budgets[-1]))
    largest, targets = sizes.largest(budget)
    return largest, estimate(largest, targets).total(False)


def _with_summary(fit: Fit, sizes: _Sizes, without: tuple[int, int | None] | None = None) -> Fit:
    choice = f"micro-batch {fit.largest:,} tokens, {'gradient' if fit.checkpointing else 'no gradient'} checkpointing"
    choice += ", attention outputs offloaded" if fit.offload_attention else ""
    choice += ", output layer offloaded" if fit.offload_head else ""
    choice += f", {fit.streamed} frozen layers streamed" if fit.streamed else ""
    choice += ", base loads in host memory" if fit.loads_in_host_memory else ""
    choice += ", base weights sharded over all GPUs" if fit.sharded else ""
    choice += ", products in fp8" if fit.in_fp8 else ""
    if fit.bytes is None or fit.available is None:
        reason = "the activations of this architecture cannot be counted beforehand"
    elif not fit.fits:
        reason = (
            f"{quantity(fit.bytes, 'B')} (estimate), more than the {quantity(fit.available, 'B')} available; "
            f"if memory runs out, lower `data.max_length` (the longest row has {sizes.longest:,} tokens) or take a smaller base"
        )
    else:
        reason = f"{quantity(fit.bytes, 'B')} of {quantity(fit.available, 'B')} available (estimate)"
        if fit.pace and fit.expected_tokens_per_s:
            link = f"{quantity(fit.pace.link, 'B')}/s, {'measured' if fit.pace.products else 'assumed'}"
            reason += f"; all frozen layers would not fit; at most about {fit.expected_tokens_per_s:,.0f} tokens/s (link: {link})"
        if without and without[1] is not None:
            reason += f"; without checkpointing {without[0]:,} tokens would take {quantity(without[1], 'B')}"
    return replace(fit, summary=f"{choice}: {reason}")


class _Sizes:
    """Sizes of the micro-batches of a run.

    Attributes:
        longest: tokens of the longest row.
        tokens: of the whole run.
    """

    def __init__(self, rows: Sequence[TokenRow], settings: Train, gpus: int):
        from olpack.train.processes import partition

        self.longest = max(len(row.ids) for row in rows)
        batches = schedule(len(rows), settings.epochs, settings.batch_size, settings.seed)
        self.tokens = sum(len(rows[index].ids) for batch in batches for index in batch)
        some = batches[:: -(-len(batches) // _STEPS)]
        if all(len(rows[index].ids) < self.longest for batch in some for index in batch):
            some.append([next(index for index, row in enumerate(rows) if len(row.ids) == self.longest)])
        self._shares = [share for batch in some for share in partition([rows[index] for index in batch], gpus) if share]  # of a step, for each GPU
        self._targets = {id(row): row.target_count for share in self._shares for row in share}

    def budgets(self) -> list[int]:
        """Budgets worth a try, ascending, in steps of an eighth; the longest row fits into each."""
        most = max(self.longest, min(_MOST, self.largest(_MOST)[0]))
        steps = (eighths << power for power in range(5, 12) for eighths in range(8, 16))
        return sorted({most, self.longest} | {size for size in steps if self.longest < size < most})

    def largest(self, budget: int) -> tuple[int, int]:
        """The most tokens of a micro-batch, and the most target tokens of one."""
        groups = [group for share in self._shares for group in micro_batches(share, budget)]
        return max(sum(len(row.ids) for row in group) for group in groups), max(sum(self._targets[id(row)] for row in group) for group in groups)
