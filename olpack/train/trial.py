"""Whether a model computes the same in another way, layer by layer.

Comparing its logits alone would not tell: in 16 bits every layer adds a little rounding, the next ones carry it on, and on a deep model the
same formula in another order ends several percent away. So what each layer gives in the plain way is written down, and in the other way each
layer begins with that: what differs then is the work of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.05}  # of what a layer adds to its input, and of the logits


class Trial:
    """What a model computes in the plain way.

    Args:
        model: a transformers model.
        dtype: that it computes in.
        logits: [tokens, vocabulary] of some samples, computed in one pass of the model or in several.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, logits: Callable[[], torch.Tensor]):
        from transformers.modeling_layers import GradientCheckpointingLayer

        self._dtype = dtype
        self._layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
        outputs: list[list[torch.Tensor]] = [[] for _ in self._layers]
        added: list[list[torch.Tensor]] = [[] for _ in self._layers]

        def note(index: int, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            outputs[index].append(output)
            added[index].append(output - hidden)
            return output

        with self._at_each_layer(note):
            self._logits = logits().float()
        self._layers = [layer for layer, parts in zip(self._layers, outputs, strict=True) if parts]
        self._outputs = [torch.cat(parts, dim=-2) for parts in outputs if parts]
        self._added = [torch.cat(parts, dim=-2).float().norm() for parts in added if parts]

    def agrees(self, logits: Callable[[], torch.Tensor]) -> bool:
        """Whether every layer and the head compute the same, up to rounding, for the same samples one after another."""
        apart = [torch.zeros((), device=self._logits.device) for _ in self._layers]
        at = [0] * len(self._layers)

        def compare(index: int, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            wanted = self._outputs[index].narrow(-2, at[index], output.shape[-2])
            at[index] += output.shape[-2]
            apart[index] += (output.float() - wanted.float()).square().sum()
            return wanted

        with self._at_each_layer(compare):
            found = logits().float()
        tolerance, rounding = _TOLERANCE[self._dtype], torch.finfo(self._dtype).eps
        layers = all(
            bool(square.sqrt() <= tolerance * added + rounding * outputs.float().norm())
            for square, added, outputs in zip(apart, self._added, self._outputs, strict=True)
        )
        return layers and found.shape == self._logits.shape and bool((found - self._logits).norm() <= tolerance * self._logits.norm())

    @contextmanager
    def _at_each_layer(self, function: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Call function(index, input, output) after each layer; what it returns takes the output's place."""

        def hook(index, _, arguments, named, output):
            hidden = arguments[0] if arguments else named["hidden_states"]
            if isinstance(output, torch.Tensor):
                return function(index, hidden, output)
            return (function(index, hidden, output[0]), *output[1:])

        hooks = [layer.register_forward_hook(lambda *given, index=index: hook(index, *given), with_kwargs=True)
                 for index, layer in enumerate(self._layers)]  # fmt: skip
        try:
            with torch.no_grad():
                yield
        finally:
            for registered in hooks:
                registered.remove()
