"""What is trained, joined: an adapter has hundreds of small matrices, and an optimizer that takes them one by one keeps a GPU waiting."""

from __future__ import annotations

import torch

LARGE = 2**26  # elements of a parameter that is not worth joining


class Joined:
    """The trained parameters of a model, the small ones as views of a single one, to which their gradients go as soon as they are known.

    Args:
        model: its trained parameters are float32 and on one device. They stay what they are, but their memory moves.

    Attributes:
        parameters: for an optimizer: the single one, and the large ones as they are.
    """

    def __init__(self, model: torch.nn.Module):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        small = [parameter for parameter in trained if parameter.numel() <= LARGE]
        self.parameters = [parameter for parameter in trained if parameter.numel() > LARGE]
        if not small:
            return
        one = torch.nn.Parameter(torch.cat([parameter.data.flatten() for parameter in small]))
        self.parameters.insert(0, one)
        start = 0
        for parameter in small:
            place = slice(start, start + parameter.numel())
            parameter.data = one.data[place].view_as(parameter)
            parameter.register_post_accumulate_grad_hook(lambda parameter, place=place: _move_gradient(parameter, one, place))
            start = place.stop

    def fill(self) -> None:
        """After the backward passes of a step: a parameter that got no gradient has one of zeros."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def _move_gradient(parameter: torch.nn.Parameter, one: torch.nn.Parameter, place: slice) -> None:
    if one.grad is None:
        one.grad = torch.zeros_like(one)
    one.grad[place].add_(parameter.grad.flatten())
    parameter.grad = None
