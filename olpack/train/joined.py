"""What is trained, joined: an adapter has hundreds of small matrices, and an optimizer that takes them one by one keeps a GPU waiting."""

from __future__ import annotations

import torch

LARGE = 2**26  # elements of a parameter that is not worth joining, and whose gradient is not worth copying


class Joined:
    """The trained parameters of a model, the small ones as views of a single one.

    Args:
        model: its trained parameters are float32 and on one device. They stay what they are, but their memory moves.

    Attributes:
        parameters: for an optimizer: the single one, and the large ones as they are.
    """

    def __init__(self, model: torch.nn.Module):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._small = [parameter for parameter in trained if parameter.numel() <= LARGE]
        self._large = [parameter for parameter in trained if parameter.numel() > LARGE]
        self._one = torch.nn.Parameter(torch.cat([parameter.data.flatten() for parameter in self._small])) if self._small else None
        for parameter, part in zip(self._small, self._split(), strict=True):
            parameter.data = part.view_as(parameter)
        self.parameters = [*([] if self._one is None else [self._one]), *self._large]

    def _split(self) -> tuple[torch.Tensor, ...]:
        return () if self._one is None else self._one.data.split([parameter.numel() for parameter in self._small])

    def gather(self) -> None:
        """Give `parameters` the gradients that a backward pass left; a parameter that got none has a gradient of zeros."""
        if self._one is not None:
            self._one.grad = torch.cat([_gradient(parameter).flatten() for parameter in self._small])
        for parameter in self._small:
            parameter.grad = None
        for parameter in self._large:
            parameter.grad = _gradient(parameter)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
