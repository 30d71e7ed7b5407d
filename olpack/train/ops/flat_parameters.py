"""What is trained, joined: an adapter has hundreds of matrices, and an optimizer that takes them one by one keeps a GPU waiting."""

from __future__ import annotations

import torch

SMALL, LARGE = 2**12, 2**26  # elements: below, bitsandbytes keeps moments in float32; above, there is nothing to gain
_MOST = 2**30  # elements joined into one: bitsandbytes counts them in 32 bits


class Joined:
    """The trained parameters of a model, those between `SMALL` and `LARGE` as views of a joined one, and so are their gradients: a backward pass
    adds to them where they lie.

    Args:
        model: its trained parameters are float32 and on one device. They stay what they are, but their memory moves.

    Attributes:
        parameters: for an optimizer: the joined ones, and the others as they are.
    """

    def __init__(self, model: torch.nn.Module):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._alone = [parameter for parameter in trained if not SMALL <= parameter.numel() <= LARGE]
        self._joined = [_join(group) for group in _groups([parameter for parameter in trained if SMALL <= parameter.numel() <= LARGE])]
        self.parameters = [*self._alone, *(joined for joined, _ in self._joined)]

    def begin(self) -> None:
        """Before the backward passes of a step: all gradients are zero, whatever came before."""
        for parameter in self._alone:
            parameter.grad = None
        for joined, gradient in self._joined:
            joined.grad = gradient.zero_()

    def fill(self) -> None:
        """After them: a parameter that got no gradient has one of zeros."""
        for parameter in self._alone:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _groups(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    groups: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.numel() > room:
            groups.append([])
            room = _MOST
        groups[-1].append(parameter)
        room -= parameter.numel()
    return groups


def _join(parameters: list[torch.nn.Parameter]) -> tuple[torch.nn.Parameter, torch.Tensor]:
    """(the joined parameter, its gradient to be)"""
    joined = torch.nn.Parameter(torch.cat([parameter.data.flatten() for parameter in parameters]))
    gradient = torch.zeros_like(joined)
    start = 0
    for parameter in parameters:
        place = slice(start, start + parameter.numel())
        parameter.data = joined.data[place].view_as(parameter)
        parameter.grad = gradient.data[place].view_as(parameter)
        start = place.stop
    return joined, gradient
