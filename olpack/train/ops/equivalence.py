"""A check that a model computes the same in another way, layer by layer.

Comparing its logits alone would not tell: in 16 bits every layer adds a little rounding, the next ones carry it on, and on a deep model the
same formula in another order ends several percent away. So the output of each layer in the plain way is recorded, and in the other way it takes
the place of that layer's output: each difference is then that of one layer. Tokens are compared one by one, because the first of a row often has
numbers a thousand times those of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.05}  # of what a layer adds to its input, and of the logits

Pass = Callable[[], torch.Tensor]
"""One forward pass of the model; returns its logits, [tokens, vocabulary]."""

AfterLayer = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(index of the layer, its input, its output) to the output that takes its place."""


class _Call(NamedTuple):
    """One call of a layer: its index, what it added to its input, and its output, [..., tokens, size]."""

    layer: int
    added: torch.Tensor
    output: torch.Tensor


class EquivalenceCheck:
    """Records what a model computes in the plain way, to compare other ways with.

    Args:
        model: a transformers model.
        dtype: that it computes in.
        passes: one for each sample.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, passes: Sequence[Pass]):
        from transformers.modeling_layers import GradientCheckpointingLayer

        self._dtype = dtype
        self._layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
        self._calls: list[list[_Call]] = []  # of each pass
        self._logits: list[torch.Tensor] = []
        for run in passes:
            self._calls.append([])
            with self._after_each_layer(self._record):
                self._logits.append(run())

    def _record(self, layer: int, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        self._calls[-1].append(_Call(layer, output - hidden, output))
        return output

    def agrees(self, passes: Sequence[Pass], tolerance: float | None = None) -> bool:
        """Whether every layer and the output layer compute the same for every token, up to rounding.

        Args:
            passes: one for each sample again, or a single one over all samples end to end.
            tolerance: share of what a layer adds to its input, by which it may differ; None: that of the dtype's rounding.

        Raises:
            ValueError, RuntimeError: of a single one, that the samples' layers cannot be put end to end.
        """
        calls, logits = self._calls, self._logits
        if len(passes) < len(calls):
            calls, logits = [[_end_to_end(alike) for alike in zip(*calls, strict=True)]], [torch.cat(logits)]
        share = _TOLERANCE[self._dtype] if tolerance is None else tolerance
        return all(self._agrees(*one, share) for one in zip(passes, calls, logits, strict=True))

    def _agrees(self, run: Pass, calls: list[_Call], logits: torch.Tensor, share: float) -> bool:
        results: list[bool] = []

        def compare(layer: int, _: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            call = calls[len(results)] if len(results) < len(calls) else None
            if call is None or call.layer != layer or call.output.shape != output.shape:
                results.append(False)
                return output
            results.append(self._alike(output, call.output, call.added, share))
            return call.output

        with self._after_each_layer(compare):
            last = run()
        return len(results) == len(calls) and all(results) and last.shape == logits.shape and self._alike(last, logits, logits, share)

    def _alike(self, output: torch.Tensor, expected: torch.Tensor, added: torch.Tensor, share: float) -> bool:
        apart, added, whole = (value.float().norm(dim=-1) for value in (output.float() - expected.float(), added, expected))
        return bool((apart <= share * added + torch.finfo(self._dtype).eps * whole).all())

    @contextmanager
    def _after_each_layer(self, function: AfterLayer) -> Iterator[None]:
        """Call the function after each layer; the tensor that it returns takes the place of the layer's output."""

        def hook_of(index: int) -> Callable[..., Any]:
            def hook(_: torch.nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> Any:
                hidden = arguments[0] if arguments else named["hidden_states"]
                if isinstance(output, torch.Tensor):
                    return function(index, hidden, output)
                return (function(index, hidden, output[0]), *output[1:])

            return hook

        hooks = [layer.register_forward_hook(hook_of(index), with_kwargs=True) for index, layer in enumerate(self._layers)]
        try:
            with torch.no_grad():
                yield
        finally:
            for registered in hooks:
                registered.remove()


def _end_to_end(calls: Sequence[_Call]) -> _Call:
    return _Call(calls[0].layer, torch.cat([call.added for call in calls], dim=-2), torch.cat([call.output for call in calls], dim=-2))
