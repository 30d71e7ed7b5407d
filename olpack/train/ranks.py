"""The processes that train together, one for each GPU: who takes which rows, and how their gradients come together.

Each holds the whole adapter and its optimizer. An optimizer step sums the adapter's gradients over all of them, once, so that every process
makes the same step, and the loss curve is that of a single process up to rounding. Micro-batches may differ in number and size: nothing is
exchanged between them. Where the frozen base is too large for one GPU its layers are spread over all (FSDP2) and gathered one at a time.
"""

from __future__ import annotations

import torch

from olpack.data import TokenRow


class Ranks:
    """One process among those of a run; without an accelerator, the only one.

    Args:
        accelerator: of a process that torchrun or `accelerate launch` started.

    Attributes:
        rank, count: this process among how many.
        sharded: the base's layers are spread, so that every process must run the same number of passes.
    """

    def __init__(self, accelerator=None):
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
        """Where this process trains; None where that is not decided by a launcher."""
        return self._accelerator.device if self._accelerator else None

    def sum(self, *numbers: float) -> list[float]:
        """Each number, summed over all processes, in float64."""
        if self._accelerator is None:
            return list(numbers)
        return self._accelerator.reduce(torch.tensor(numbers, dtype=torch.float64, device=self.device), reduction="sum").tolist()

    def largest(self, number: int) -> int:
        """The largest that any process has."""
        if self._accelerator is None:
            return number
        return int(self._accelerator.reduce(torch.tensor(number, device=self.device), reduction="max"))

    def smallest(self, number: int) -> int:
        """The smallest that any process has."""
        return -self.largest(-number)

    def any(self, flag: bool) -> bool:
        """Whether some process says so."""
        return flag if self._accelerator is None else self.sum(flag)[0] > 0

    def wait(self) -> None:
        """Go on when all have come here."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Add up each parameter's gradient over all processes."""
        if self._accelerator is not None:
            for parameter in parameters:
                parameter.grad = self._accelerator.reduce(parameter.grad, reduction="sum")

    def begin_alike(self, parameters: list[torch.nn.Parameter]) -> None:
        """Give all processes the parameters of the first."""
        if self._accelerator:
            from accelerate.utils import broadcast

            for parameter in parameters:
                broadcast(parameter.data)


ALONE = Ranks()


def deal(rows: list[TokenRow], hands: int) -> list[list[TokenRow]]:
    """Rows for each of the processes, with about as many tokens each: the longest row first, to whom has least.

    Depends on the arguments alone, so that each process knows what the others have.
    """
    dealt: list[list[TokenRow]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        hand = tokens.index(min(tokens))
        dealt[hand].append(row)
        tokens[hand] += len(row.ids)
    return dealt


def shard(model) -> None:
    """Spread the frozen weights of the decoder's layers over all processes.

    A layer is gathered before it computes and let go after it. The adapter, embeddings, output layer and norms outside the layers stay whole
    in each process. Weights in 4 bits must be stored as float32 (`bnb_4bit_quant_storage`).

    Args:
        model: a peft.PeftModel, the same in each process.
    """
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = model.get_base_model().get_decoder()
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in decoder.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            module.quant_state = state  # bitsandbytes looks here once the parameter is a shard
    spread = {parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad}
    whole = {parameter for parameter in model.parameters() if parameter not in spread}
    for layer in layers:
        fully_shard(layer, ignored_params=whole)
    fully_shard(decoder, ignored_params=whole)
