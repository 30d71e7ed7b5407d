"""What goes through the model at once: the fastest choice of micro-batch and gradient checkpointing that fits into a GPU's memory.

Without checkpointing nothing is computed twice, so that is chosen where it holds enough tokens to keep the GPU busy; with it, the largest
micro-batch that fits: in a long run with attention's results kept, and where little would fit otherwise with the output layer in host memory.
What fits is estimated from the model's shape and from the training rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from olpack.machine import GPU_MARGIN
from olpack.model.packed import quantization_of
from olpack.progress import quantity
from olpack.train.batches import micro_batches, schedule

if TYPE_CHECKING:
    import torch

    from olpack.data import TokenRow
    from olpack.model.base import Base
    from olpack.model.shape import MetaModel
    from olpack.recipe import Train
    from olpack.train.memory import Training
    from olpack.train.ranks import Ranks

CPU_TOKENS = 512  # a CPU is fastest where activations stay in its cache
_MOST = 16_384  # tokens beyond which a GPU gets no faster (benchmarks/multi_gpu.md)
_BUSY = 4_096  # tokens below which it does, by more than it costs to compute activations again (benchmarks/train_8b.md)
_COUNTED = 1_024  # tokens for which activations are counted; they grow with their number
SHARDABLE = ("nf4", "fp4", "none")  # `train.quantization` of frozen layers that can be spread over GPUs
_SLACK = 0.05  # of a GPU's memory that is lost between allocations
_WORTH = 50  # micro-batches, from which on it pays to lock memory for attention's results: 3 s beside the loading, and 4 % of each step gained
_HOST_SHARE = 0.25  # of the host's free memory: it is locked, and nothing else can have it meanwhile
_STEPS = 400  # at most so many steps are looked at for the largest micro-batch


@dataclass(frozen=True)
class Fit:
    """How a run uses memory.

    Attributes:
        tokens: of a micro-batch at most; what the loop calls its budget.
        largest: of the micro-batch that takes most, among the rows that there are.
        checkpointing: whether activations are computed again in the backward pass.
        sharded: whether the frozen layers are spread over all GPUs.
        keeps: whether attention's results wait in host memory too, so that they are not computed again.
        head_waits: whether the output layer is in host memory but for the loss.
        training: the estimate, by what memory is for; None on a CPU.
        bytes: of GPU memory at the peak, estimated; None where that cannot be said.
        room: bytes to be had; None on a CPU.
        said: the choice and its reason, in one line; "" where there was nothing to choose.
    """

    tokens: int
    largest: int
    checkpointing: bool
    sharded: bool = False
    keeps: bool = False
    head_waits: bool = False
    training: Training | None = None
    bytes: int | None = None
    room: int | None = None
    said: str = ""

    @property
    def parts(self) -> dict[str, int]:
        """What `bytes` are for, also where they are not all."""
        return self.training.parts(self.checkpointing, keeps=self.keeps, head_waits=self.head_waits) if self.training else {}

    @property
    def host_parts(self) -> dict[str, int]:
        """Bytes of host memory that are locked for what is not on the GPU all the time, by what they are for."""
        if self.bytes is None or not self.checkpointing:
            return {}
        return self.training.host_parts(keeps=self.keeps, head_waits=self.head_waits)

    def as_json(self) -> dict[str, Any]:
        """Plain data, bytes throughout."""
        return {**asdict(self), "parts": self.parts, "host_parts": self.host_parts}


def choose(base: Base, rows: Sequence[TokenRow], settings: Train, device: torch.device, ranks: Ranks) -> Fit:
    """For the device that a run is about to begin on, with what is free there now: of several processes, where that is least, so that all choose
    the same."""
    if device.type == "cpu":
        return on_cpu(settings, sharded=ranks.count > 1 and settings.sharding == "full")
    from olpack.model.shape import MetaModel
    from olpack.train.adapter import whole_parameters

    model, whole = MetaModel(base.config, base.label), whole_parameters(base, settings)
    room, host = ranks.smallest(free_room(device)), ranks.smallest(host_room())
    return on_gpu(model, rows, settings, room, host=host, stored=stored_bytes(base), whole=whole, gpus=ranks.count)


def stored_bytes(base: Base) -> int | None:
    """Bytes of a base that comes quantized, which is held as it is stored; None for another one."""
    if not quantization_of(base.config):
        return None
    return sum(file.stat().st_size for file in base.path.glob("model*.safetensors"))


def on_cpu(settings: Train, *, sharded: bool = False) -> Fit:
    """What a CPU does: as the recipe says, else what is fastest there."""
    tokens = CPU_TOKENS if settings.micro_batch_tokens == "auto" else settings.micro_batch_tokens
    return Fit(tokens, tokens, settings.gradient_checkpointing is True, sharded)


def free_room(device: torch.device) -> int:
    """Bytes of a GPU that a run may have, of those that are free now."""
    import torch

    return round(torch.cuda.mem_get_info(device)[0] * (1 - _SLACK))


def host_room() -> int:
    """Bytes of host memory that a run may lock if it need not."""
    return round(psutil.virtual_memory().available * _HOST_SHARE)


def card_room(gib: float) -> int:
    """Bytes that a run may have of a card of so many GiB: the driver's context takes some."""
    return max(0, round((gib * (1 << 30) - GPU_MARGIN) * (1 - _SLACK)))


def on_gpu(
    model: MetaModel,
    rows: Sequence[TokenRow],
    settings: Train,
    room: int,
    *,
    host: int = 0,
    stored: int | None = None,
    whole: int = 0,
    gpus: int = 1,
) -> Fit:
    """The fastest choice that fits into `room` bytes of each GPU; what the recipe sets is left as it is.

    Args:
        model: the base without data.
        host: bytes of host memory that may be locked, all GPUs together, for attention's results to be kept.
        rows: training rows, of which the longest and the largest micro-batch decide.
        stored: bytes of a base that comes quantized, as `stored_bytes` counts them.
        whole: weights of modules that are trained as a whole.
        gpus: that share each step's rows.
    """
    sizes = _Sizes(rows, settings, gpus)
    asked = settings.micro_batch_tokens
    budgets = [asked] if asked != "auto" else sizes.budgets()
    ways = [False, True] if settings.gradient_checkpointing == "auto" else [settings.gradient_checkpointing]
    can_spread = gpus > 1 and stored is None and settings.quantization in SHARDABLE
    spread = {"none": [False], "full": [gpus > 1], "auto": [False, True] if can_spread else [False]}[settings.sharding]
    busy = min(_BUSY, budgets[-1]) if asked == "auto" else 0

    def using(estimate, sharded: bool, checkpointing: bool, may_wait: bool, budget: int) -> Fit:
        largest, targets = sizes.largest(budget)
        training = estimate(largest, targets)
        head_waits = may_wait and training.total(True) > room
        worth = checkpointing and sizes.tokens >= _WORTH * largest * gpus
        keeps = worth and training.keeps_within(room, host // gpus, head_waits=head_waits)
        total = training.total(checkpointing, keeps=keeps, head_waits=head_waits)
        return Fit(budget, largest, checkpointing, sharded, keeps, head_waits, training, total, room)

    for sharded in spread:
        estimate = _estimator(model, settings, stored, whole, gpus if sharded else 1)
        smallest = estimate(*sizes.largest(budgets[0]))
        if smallest.total(True) is None:  # an architecture that cannot be counted: the careful choice
            largest, _ = sizes.largest(tokens := budgets[0])
            return _told(Fit(tokens, largest, ways[-1], spread[-1], training=smallest, room=room), sizes)
        choices = [(way, False) for way in ways] + ([(True, True)] if ways[-1] and smallest.head else [])
        for checkpointing, may_wait in choices:
            last = (checkpointing, may_wait) == choices[-1]
            tried = [budget for budget in budgets if budget >= busy or last]  # with few tokens the next choice is faster
            fit_of = partial(using, estimate, sharded, checkpointing, may_wait)
            if found := _largest_that_fits(tried, fit_of):
                return _told(found, sizes, _without(sizes, estimate, budgets) if checkpointing and len(ways) > 1 else None)
    return _told(fit_of(budgets[0]), sizes)


def _largest_that_fits(budgets: list[int], fit_of: Callable[[int], Fit]) -> Fit | None:
    """Of the last of the ascending budgets whose bytes are within the room; None where those of the first are not."""
    within = bisect_left(budgets, True, key=lambda budget: (fit := fit_of(budget)).bytes > fit.room)
    return fit_of(budgets[within - 1]) if within else None


def _estimator(model: MetaModel, settings: Train, stored: int | None, whole: int, shards: int):
    from olpack.train.memory import estimate_training, logits_bytes

    # What `olpack.train.ops.lora` takes; the rest goes through peft's layers.
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
        pieces=not whole,
    )
    return lambda tokens, targets: counted.scaled(tokens / _COUNTED, logits_bytes(model.shape, targets, not whole))


def _without(sizes: _Sizes, estimate, budgets: list[int]) -> tuple[int, int]:
    """(tokens, bytes) of the smallest micro-batch that would have been worth it without checkpointing."""
    budget = next(budget for budget in budgets if budget >= min(_BUSY, budgets[-1]))
    largest, targets = sizes.largest(budget)
    return largest, estimate(largest, targets).total(False)


def _told(fit: Fit, sizes: _Sizes, without: tuple[int, int] | None = None) -> Fit:
    how = f"{'with' if fit.checkpointing else 'without'} gradient checkpointing"
    how += ", attention's results kept" if fit.keeps else ""
    how += ", the output layer in host memory but for the loss" if fit.head_waits else ""
    how += ", the base spread over all GPUs" if fit.sharded else ""
    said = f"micro-batches of at most {fit.largest:,} tokens {how}"
    if fit.bytes is None:
        said += ": what this architecture keeps for the backward pass cannot be counted beforehand"
    elif fit.bytes > fit.room:
        said += (
            f": {quantity(fit.bytes, 'B')} estimated, more than the {quantity(fit.room, 'B')} to be had; "
            f"if memory runs out, lower `data.max_length` (the longest row has {sizes.longest:,} tokens) or take a smaller base"
        )
    else:
        said += f": {quantity(fit.bytes, 'B')} estimated of the {quantity(fit.room, 'B')} to be had"
        if without:
            said += f"; without it {without[0]:,} tokens would take {quantity(without[1], 'B')}"
    return Fit(**{**vars(fit), "said": said})


class _Sizes:
    """How large micro-batches come out for the rows of a run.

    Attributes:
        longest: tokens of the longest row.
        tokens: of the whole run.
    """

    def __init__(self, rows: Sequence[TokenRow], settings: Train, gpus: int):
        from olpack.train.ranks import deal

        self.longest = max(len(row.ids) for row in rows)
        batches = schedule(len(rows), settings.epochs, settings.batch_size, settings.seed)
        self.tokens = sum(len(rows[index].ids) for batch in batches for index in batch)
        some = batches[:: -(-len(batches) // _STEPS)]
        if all(len(rows[index].ids) < self.longest for batch in some for index in batch):
            some.append([next(index for index, row in enumerate(rows) if len(row.ids) == self.longest)])
        self._hands = [hand for batch in some for hand in deal([rows[index] for index in batch], gpus) if hand]
        self._targets = {id(row): row.target_count for hand in self._hands for row in hand}

    def budgets(self) -> list[int]:
        """Budgets worth a try, ascending, in steps of an eighth; each holds the longest row."""
        most = max(self.longest, min(_MOST, self.largest(_MOST)[0]))
        steps = (eighths << power for power in range(5, 12) for eighths in range(8, 16))
        return sorted({most, self.longest} | {size for size in steps if self.longest < size < most})

    def largest(self, budget: int) -> tuple[int, int]:
        """The most tokens of a micro-batch, and the most target tokens of one."""
        groups = [group for hand in self._hands for group in micro_batches(hand, budget)]
        return max(sum(len(row.ids) for row in group) for group in groups), max(sum(self._targets[id(row)] for row in group) for group in groups)
