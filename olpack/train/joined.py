"""What is trained, joined: an adapter has hundreds of matrices, and an optimizer that takes them one by one keeps a GPU waiting."""

from __future__ import annotations

import torch

SMALL, LARGE = 2**12, 2**26  # elements: below, bitsandbytes keeps moments in float32; above, there is nothing to gain
_MOST = 2**30  # elements joined into one: bitsandbytes counts them in 32 bits


class Joined:
    """The trained parameters of a model, those between `SMALL` and `LARGE` as views of a joined one, to which their gradients go as soon as
    they are known: `parameter.grad` of such a one is None after a backward pass.

    Args:
        model: its trained parameters are float32 and on one device. They stay what they are, but their memory moves.

    Attributes:
        parameters: for an optimizer: the joined ones, and the others as they are.
    """

    def __init__(self, model: torch.nn.Module):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._views = [parameter for parameter in trained if SMALL <= parameter.numel() <= LARGE]
        self.parameters = [parameter for parameter in trained if not SMALL <= parameter.numel() <= LARGE]
        for group in _groups(self._views):
            self.parameters.append(_join(group))

    def fill(self) -> None:
        """After the backward passes of a step: a parameter that got no gradient has one of zeros."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clear(self) -> None:
        """Drop all gradients, also of a backward pass that came to no end."""
        for parameter in (*self.parameters, *self._views):
            parameter.grad = None


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


def _join(parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    joined = torch.nn.Parameter(torch.cat([parameter.data.flatten() for parameter in parameters]))
    start = 0
    for parameter in parameters:
        place = slice(start, start + parameter.numel())
        parameter.data = joined.data[place].view_as(parameter)
        parameter.register_post_accumulate_grad_hook(lambda parameter, place=place: _move_gradient(parameter, joined, place))
        start = place.stop
    return joined


def _move_gradient(parameter: torch.nn.Parameter, joined: torch.nn.Parameter, place: slice) -> None:
    if joined.grad is None:
        joined.grad = torch.zeros_like(joined)
    joined.grad[place].add_(parameter.grad.flatten())
    parameter.grad = None
