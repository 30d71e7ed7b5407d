"""The trained parameters in a few large ones: an adapter has hundreds of matrices, and an optimizer that takes them one by one keeps a GPU idle."""

from __future__ import annotations

import torch

SMALL, LARGE = 2**12, 2**26  # elements: below, bitsandbytes keeps moments in float32; above, there is nothing to gain
_MOST = 2**30  # elements of a flat parameter: bitsandbytes counts them in 32 bits


class FlatParameters:
    """The trained parameters of a model, those between `SMALL` and `LARGE` as views of a flat one, and so are their gradients: a backward pass
    adds to them in place.

    Args:
        model: its trained parameters are float32 and on one device. They stay the model's parameters, but their memory moves.

    Attributes:
        parameters: for an optimizer: the flat ones, and the others as they are.
        in_place: whether all gradients have their place in memory for good; those of parameters above `LARGE` do not.
    """

    def __init__(self, model: torch.nn.Module):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._alone = [parameter for parameter in trained if not SMALL <= parameter.numel() <= LARGE]
        self._flat = [_flatten(group) for group in _groups([parameter for parameter in trained if SMALL <= parameter.numel() <= LARGE])]
        self.parameters = [*self._alone, *(flat for flat, _ in self._flat)]
        placed = [(parameter, torch.zeros_like(parameter)) for parameter in self._alone if parameter.numel() < SMALL]
        self._placed = [*placed, *((flat, gradient) for flat, gradient in self._flat)]
        self.in_place = len(placed) == len(self._alone)

    def begin(self) -> None:
        """Before the backward passes of a step: set all gradients to zero, whatever came before."""
        for parameter in self._alone:
            parameter.grad = None
        for parameter, gradient in self._placed:
            parameter.grad = gradient.zero_()

    def fill(self) -> None:
        """After them: give a parameter without a gradient one of zeros."""
        for parameter in self._alone:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _groups(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    groups: list[list[torch.nn.Parameter]] = []
    left = 0  # elements that the last group still takes
    for parameter in parameters:
        if parameter.numel() > left:
            groups.append([])
            left = _MOST
        groups[-1].append(parameter)
        left -= parameter.numel()
    return groups


def _flatten(parameters: list[torch.nn.Parameter]) -> tuple[torch.nn.Parameter, torch.Tensor]:
    """(the flat parameter, memory for its gradient); the parameters and their gradients become views of them."""
    flat = torch.nn.Parameter(torch.cat([parameter.data.flatten() for parameter in parameters]))
    gradient = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        place = slice(start, start + parameter.numel())
        parameter.data = flat.data[place].view_as(parameter)
        parameter.grad = gradient.data[place].view_as(parameter)
        start = place.stop
    return flat, gradient
