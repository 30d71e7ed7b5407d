"""The processes that train together, one for each GPU: the partition of the rows among them, and the sum of their gradients.

Each has the whole adapter and its optimizer. An optimizer step sums the adapter's gradients over all of them, once, so that every process
makes the same step, and the loss curve is that of a single process up to rounding. Micro-batches may differ in number and size: nothing is
exchanged between them. Where the frozen base is too large for one GPU its layers are sharded over all (FSDP2) and gathered one at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from olpack.data import TokenRow

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


class Ranks:
    """One process among those of a run; without an accelerator, the only one.

    Args:
        accelerator: of a process that torchrun or `accelerate launch` started.

    Attributes:
        rank, count: this process among how many.
        sharded: the base's layers are sharded, so that every process must run the same number of passes.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
        self.rank = self._accelerator.process_index if self._accelerator else 0
        self.count = self._accelerator.num_processes if self._accelerator else 1
        self.sharded = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """The device of this process; None where no launcher assigns it."""
        return self._accelerator.device if self._accelerator else None

    def sum(self, *numbers: float) -> list[float]:
        """Each number, summed over all processes, in float64."""
        if self._accelerator is None:
            return list(numbers)
        return self._accelerator.reduce(torch.tensor(numbers, dtype=torch.float64, device=self.device), reduction="sum").tolist()

    def largest(self, number: int) -> int:
        """The largest number of any process."""
        if self._accelerator is None:
            return number
        return int(self._accelerator.reduce(torch.tensor(number, device=self.device), reduction="max"))

    def smallest(self, number: int) -> int:
        """The smallest number of any process."""
        return -self.largest(-number)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        return flag if self._accelerator is None else self.sum(flag)[0] > 0

    def wait(self) -> None:
        """Return when all processes have called this."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Add up each parameter's gradient over all processes."""
        if self._accelerator is not None:
            for parameter in parameters:
                parameter.grad = self._accelerator.reduce(parameter.grad, reduction="sum")

    def broadcast(self, parameters: list[torch.nn.Parameter]) -> None:
        """Copy the parameters of the first process to all others."""
        if self._accelerator:
            from accelerate.utils import broadcast

            for parameter in parameters:
                broadcast(parameter.data)


ALONE = Ranks()


def partition(rows: list[TokenRow], count: int) -> list[list[TokenRow]]:
    """Rows for each of so many processes, with about as many tokens each: the longest row first, each to the process with the fewest tokens.

    Depends on the arguments alone, so that each process knows the rows of the others.
    """
    shares: list[list[TokenRow]] = [[] for _ in range(count)]
    tokens = [0] * count
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        least = tokens.index(min(tokens))
        shares[least].append(row)
        tokens[least] += len(row.ids)
    return shares


def shard(model: PeftModel) -> None:
    """Shard the frozen weights of the decoder's layers over all processes.

    A layer is gathered before it computes and freed after it. The adapter, embeddings, output layer and norms outside the layers stay whole
    in each process. Weights in 4 bits must be stored as float32 (`bnb_4bit_quant_storage`).

    Args:
        model: a peft.PeftModel, the same in each process.
    """
    from torch.distributed.fsdp import fully_shard
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)  # `olpack.train.model` loads no other
    decoder = base.get_decoder()
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in decoder.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            module.quant_state = state  # bitsandbytes looks here once the parameter is a shard
    sharded = {parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad}
    whole = {parameter for parameter in model.parameters() if parameter not in sharded}
    for layer in layers:
        fully_shard(layer, ignored_params=whole)
    fully_shard(decoder, ignored_params=whole)
