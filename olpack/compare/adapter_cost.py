"""What an adapter costs when a model runs, and the merged file that could be served in its place: the figures from the turns, and in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel

from olpack.compare.cache import ADAPTER_SPEED, Units
from olpack.compare.perplexity import paired_loss
from olpack.compare.results import (
    AdapterRates,
    AdapterResult,
    AdapterSpeed,
    Divergence,
    Loss,
    MergedResult,
    Perplexity,
    QuantResult,
    Scores,
    Speed,
    Spread,
)
from olpack.progress import quantity

_ERRORS = 2  # standard errors below which a difference of speed counts as chance


class AdapterRuns(BaseModel):
    """Tokens per second in turns: lists of equal length by what ran, "with_adapter", "without" and, where it was there, "merged"."""

    prompt_tokens: int
    prompt: dict[str, list[float]] = {}
    generation: dict[str, list[float]] = {}


def adapter_result(size: int, units: Units, engine: str, served: Sequence[Speed | None]) -> AdapterResult:
    """What an adapter of `size` bytes costs.

    Args:
        units: of the file with its adapter; the turns are among them where they were measured.
        engine: that of the turns.
        served: the speed through a server with the adapter, and without it; empty where the server has no model without it.
    """
    speeds = []
    if runs := units.get(ADAPTER_SPEED, AdapterRuns):
        speeds.append(
            AdapterSpeed(
                engine=engine, prompt_tokens=runs.prompt_tokens, prompt=_rates_in_turns(runs.prompt), generation=_rates_in_turns(runs.generation)
            )
        )
    match served:
        case [Speed() as own, Speed() as alone]:
            own_prompt, alone_prompt = (speed.prompt[-1].tokens_per_s if speed.prompt else None for speed in (own, alone))
            speeds.append(
                AdapterSpeed(
                    engine=own.engine,
                    prompt_tokens=own.prompt[-1].prompt_tokens if own.prompt else None,
                    prompt=_rates(own_prompt, alone_prompt, in_turns=False),
                    generation=_rates(own.generation_tokens_per_s, alone.generation_tokens_per_s, in_turns=False),
                )
            )
    return AdapterResult(size_bytes=size, speeds=speeds)


def _rates_in_turns(kind: Mapping[str, Sequence[float]]) -> AdapterRates | None:
    own, alone, merged = (Spread.of(kind[name]) if name in kind else None for name in ("with_adapter", "without", "merged"))
    return _rates(own, alone, merged)


def _rates(with_adapter: Spread | None, without: Spread | None, merged: Spread | None = None, in_turns: bool = True) -> AdapterRates | None:
    if with_adapter is None or without is None:
        return None
    gain, error = (_gain if in_turns else _unpaired_gain)(with_adapter, without)
    return AdapterRates(with_adapter=with_adapter, without=without, merged=merged, cost=-gain, standard_error=error)


def _gain(speed: Spread, other: Spread) -> tuple[float, float | None]:
    """How much higher a speed is than another that was measured in turns with it, 0.06 is 6 %, and the standard error; None with one turn."""
    logs = [math.log(own / beside) for own, beside in zip(speed.values, other.values, strict=True)]
    ratio = math.exp(statistics.fmean(logs))
    return ratio - 1, ratio * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None


def _unpaired_gain(speed: Spread, other: Spread) -> tuple[float, float | None]:
    """As `_gain`, of speeds of two models that a server ran one after the other: no run of one is the neighbour of a run of the other, and a run may
    have failed. The error is that of the difference of two independent means; None with one run of either."""
    own, beside = ([math.log(value) for value in one.values] for one in (speed, other))
    ratio = math.exp(statistics.fmean(own) - statistics.fmean(beside))
    if min(len(own), len(beside)) < 2:
        return ratio - 1, None
    return ratio - 1, ratio * math.sqrt(sum(statistics.variance(logs) / len(logs) for logs in (own, beside)))


def merged_result(quant: QuantResult, units: Units, target_tokens: Sequence[int]) -> MergedResult | None:
    """What was measured of the merged file; None where it could not be written.

    Args:
        quant: of the file with its adapter.
        units: of the merged file.
        target_tokens: of each row.
    """
    if "size" not in units.known:
        return None
    perplexity, loss = units.get("perplexity", Perplexity), None
    own, other = (score.finite_nll if score else None for score in (perplexity, quant.perplexity))
    if own is not None and other is not None:
        growth, error = paired_loss(own, other, target_tokens)
        loss = Loss(reference=quant.tag, relative=growth, standard_error=error)
    return MergedResult(
        quant=quant.quant,
        size_bytes=units.known["size"]["bytes"],
        perplexity=perplexity,
        divergence=units.get("divergence", Divergence),
        task_answers=units.answers("tasks"),
        scores=units.get("scores", Scores),
        loss=loss,
    )


def better_package(quant: QuantResult, tolerance: float) -> Literal["adapter", "merged"] | None:
    """Which package serves a fine-tune better, by the rule of `Recommendation.package`; None where not both were measured."""
    if not (adapter := quant.adapter) or not (merged := adapter.merged) or not merged.loss:
        return None
    growth = merged.loss.relative
    if growth > tolerance:
        return "adapter"
    if growth < -tolerance / (1 + tolerance):  # the adapter's perplexity is as much above the merged file's
        return "merged"
    rates = _generation_beside_merged(adapter)
    if rates is None or rates.merged is None:
        return None
    gain, error = _gain(rates.merged, rates.with_adapter)
    return "merged" if error is not None and gain > _ERRORS * error else "adapter"


def _generation_beside_merged(adapter: AdapterResult) -> AdapterRates | None:
    return next((speed.generation for speed in adapter.speeds if speed.generation and speed.generation.merged), None)


def adapter_reasons(quant: QuantResult, package: str | None) -> list[str]:
    """The sentences on an adapter in a recommendation: what it adds and costs, and how the merged file compares. `package` is the better one."""
    if not (adapter := quant.adapter):
        return []
    added = f"The adapter adds {quantity(adapter.size_bytes, 'B')} to the base's file"
    speed = next((speed for speed in reversed(adapter.speeds) if speed.generation), None)  # a server's, where there is one
    cost = f" and costs {_share(speed.generation)} of the generation speed ({speed.engine})" if speed and speed.generation else ""
    sentences = [f"{added}{cost}."]
    if (merged := adapter.merged) and merged.loss:
        figures = [f"a perplexity {_signed(merged.loss.relative, merged.loss.standard_error)}"]
        if merged.divergence and quant.divergence:
            figures.append(f"{1000 * merged.divergence.mean:.3g} mnat of KL divergence in place of {1000 * quant.divergence.mean:.3g}")
        if (rates := _generation_beside_merged(adapter)) and rates.merged:
            figures.append(f"a generation speed {_signed(*_gain(rates.merged, rates.with_adapter))}")
        verdict = f": the better package here is `{package}`" if package else ""
        sentences.append(f"Merged into one {quant.quant} of {quantity(merged.size_bytes, 'B')}, it has {' and '.join(figures)}{verdict}.")
    return sentences


def adapter_notes(quant: QuantResult) -> list[str]:
    """What an adapter costs on each engine, and the speed of the merged file, a line for each engine."""
    notes = []
    for speed in quant.adapter.speeds if quant.adapter else []:
        costs = [f"{_share(speed.generation)} of the generation speed"] if speed.generation else []
        costs += [f"{_share(speed.prompt)} of the speed of prompts of {speed.prompt_tokens} tokens"] if speed.prompt else []
        if costs:
            notes.append(f"{quant.quant}: the adapter costs {' and '.join(costs)}: {speed.engine}")
    return notes


def _share(rates: AdapterRates) -> str:
    """ "6.1 ± 0.8%", and where that may be chance, this too."""
    error = rates.standard_error
    share = f"{100 * rates.cost:.1f}{'' if error is None else f' ± {100 * error:.1f}'}%"
    return share if error is None or abs(rates.cost) > _ERRORS * error else f"{share} (no more than chance)"


def _signed(relative: float, error: float | None) -> str:
    """ "12.30 ± 2.10% higher"."""
    error_text = "" if error is None else f" ± {100 * error:.2f}"
    return f"{abs(100 * relative):.2f}{error_text}% {'higher' if relative >= 0 else 'lower'}"
