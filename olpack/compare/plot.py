"""The report's plots, as SVG that stands inside the page: text stays text, and colours are the page's own, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from olpack.compare.results import QuantResult, Results
from olpack.progress import quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

# matplotlib knows no CSS, so it draws in these stand-ins, which are then replaced.
_INK, _FAINT, _ACCENT, _OTHER = "#010203", "#040506", "#070809", "#0a0b0c"
_CSS = {_INK: "currentColor", _FAINT: "var(--faint)", _ACCENT: "var(--accent)", _OTHER: "var(--other)"}
_SIZE = (4.3, 3.2)  # inches: three fill a desktop page, one a phone, with letters of about the size of the page's small print


def plot_quality(results: Results) -> str | None:
    """Generation speed against quality, the area of a point growing with the file. None where fewer than two quants have both.

    Quality is the loss of perplexity, or, of models that have none, the share of the tasks that they solve. Error bars: lowest and highest
    repeat of the speed; one standard error of the quality.
    """
    timed = [(quant, quant.speed.generation_tokens_per_s) for quant in results.quants if quant.speed and quant.speed.generation_tokens_per_s]
    by_loss = [(quant, speed, 100 * quant.loss.relative, quant.loss.standard_error) for quant, speed in timed if quant.loss]
    by_tasks = [(quant, speed, 100 * quant.scores.mean, quant.scores.standard_error) for quant, speed in timed if quant.scores]
    if len(by_loss) >= 2:
        title, points = "perplexity above the best, %", by_loss
    elif len(by_tasks) >= 2:
        title, points = "tasks solved, %", by_tasks
    else:
        return None
    figure, axes = _figure("quality")
    largest = max(quant.size_bytes for quant, *_ in points)
    for quant, speed, value, error in points:
        color = _color(quant, results)
        spread = [[speed.median - speed.low], [speed.high - speed.median]]
        axes.errorbar(speed.median, value, xerr=spread, yerr=100 * (error or 0), color=color, linewidth=1, capsize=2)
        axes.scatter(speed.median, value, s=260 * quant.size_bytes / largest, color=color, alpha=0.85, linewidths=0, zorder=3)
    axes.margins(x=0.3, y=0.25)  # space for the labels
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.set_xlabel("generated tokens/s  (further right is faster)")
    axes.set_ylabel(title)
    axes.grid(color=_FAINT, linewidth=0.6)
    data = [(speed.median, value) for _, speed, value, _ in points]
    texts = [f"{_short(quant.quant)} · {quantity(quant.size_bytes, 'B')}" for quant, *_ in points]
    bars = []
    for _, speed, value, error in points:
        part = 100 * (error or 0)
        bars += [(speed.low + step / 12 * (speed.high - speed.low), value) for step in range(13)]
        bars += [(speed.median, value + step * part) for step in (-1, -0.5, 0.5, 1)]
    _label(figure, axes, texts, data, [_color(quant, results) == _ACCENT for quant, *_ in points], beside=bars)
    return _svg(figure, "Speed and quality of each quant")


def plot_divergence(results: Results) -> str | None:
    """KL divergence from the unquantized fine-tune by size of the file: mean with one standard error, and 99th percentile.

    None where fewer than two quants have one. The axis is logarithmic, because from Q8_0 to Q2_K is a factor of thousands; a quant whose
    predictions are the same to the last bit is not on it.
    """
    points = [(quant, quant.divergence) for quant in results.quants if quant.divergence and quant.divergence.mean > 0]
    if len(points) < 2:
        return None
    unit, name = (1e9, "GB") if max(quant.size_bytes for quant, _ in points) >= 1e9 else (1e6, "MB")
    figure, axes = _figure("divergence")
    axes.set_yscale("log")
    for quant, far in points:
        size, color = quant.size_bytes / unit, _color(quant, results)
        mean, error, p99 = 1000 * far.mean, 1000 * (far.standard_error or 0), 1000 * far.p99
        axes.plot([size, size], [mean, p99], color=color, linewidth=0.8, linestyle=(0, (2, 2)), zorder=2)
        axes.errorbar(size, mean, yerr=error, color=color, linewidth=1, capsize=2, marker="o", markersize=7)
        axes.plot(size, p99, color=color, marker="_", markersize=11, markeredgewidth=1.6)
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel(f"size of the file, {name}  (further left is smaller)")
    axes.set_ylabel("KL divergence, millinats per token")
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    data = [(quant.size_bytes / unit, 1000 * far.mean) for quant, far in points]
    strokes = [(size, mean + step / 12 * (1000 * far.p99 - mean)) for (_, far), (size, mean) in zip(points, data, strict=True) for step in range(13)]
    _label(
        figure, axes, [_short(quant.quant) for quant, _ in points], data, [_color(quant, results) == _ACCENT for quant, _ in points], beside=strokes
    )
    return _svg(figure, "KL divergence of each quant by its size")


def plot_loss(metrics: Sequence[dict]) -> str | None:
    """Training loss by step, and the loss on held-out rows where it was taken. None where there is nothing to draw.

    Args:
        metrics: lines of metrics.jsonl, {"step": 1, "loss": 2.3, …} and {"step": 0, "eval_loss": 2.5}.
    """
    trained = [(line["step"], line["loss"]) for line in metrics if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if line.get("eval_loss") is not None]
    if len(trained) < 2 and len(held_out) < 2:
        return None
    figure, axes = _figure("loss")
    if trained:
        axes.plot(*zip(*trained, strict=True), color=_OTHER, linewidth=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=_ACCENT, linewidth=1.5, marker="o", markersize=4, label="held-out rows")
        for step, loss in (held_out[0], held_out[-1])[: len(held_out)]:
            axes.annotate(f"{loss:.2f}", (step, loss), xytext=(0, 7), textcoords="offset points", ha="center", color=_INK)
    axes.margins(y=0.15)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, "Loss during training")


def _color(quant: QuantResult, results: Results) -> str:
    return _ACCENT if results.recommendation and quant.tag == results.recommendation.tag else _OTHER


def _short(name: str) -> str:
    """A model's name without its namespace, cut to a length that fits into a plot."""
    name = name.rpartition("/")[2]
    return name if len(name) <= 20 else f"{name[:11]}…{name[-8:]}"


def _label(
    figure: Figure,
    axes: Axes,
    texts: Sequence[str],
    points: Sequence[tuple[float, float]],
    bold: Sequence[bool],
    beside: Sequence[tuple[float, float]],
) -> None:
    """Write the name of every point near it, where it covers least of the points, the other names, and the marks at `beside`."""
    figure.draw_without_rendering()  # fixes the axes, so that distances on the paper are known

    def box(point: tuple[float, float], width: float, height: float) -> tuple[float, float, float, float]:
        """Left, bottom, right, top in points (1/72 inch) of a box centred on a point of the data."""
        x, y = axes.transData.transform(point) * 72 / figure.dpi
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    taken = [box(point, 12, 12) for point in points] + [box(point, 4, 4) for point in beside]
    extent = axes.get_window_extent()
    left, bottom, right, top = (side * 72 / figure.dpi for side in (extent.x0, extent.y0, extent.x1, extent.y1))
    for text, point, heavy in zip(texts, points, bold, strict=True):
        width = (5.9 if heavy else 5.4) * len(text)
        centred = box(point, width, 11)
        aside = width / 2 + 8
        inward = max(0, left - centred[0]) - max(0, centred[2] - right)  # what is above or below need not be centred

        def moved(shift: tuple[float, float], at: tuple[float, float, float, float] = centred) -> tuple[float, float, float, float]:
            return at[0] + shift[0], at[1] + shift[1], at[2] + shift[0], at[3] + shift[1]

        def covered(shift: tuple[float, float]) -> float:
            own = moved(shift)
            outside = max(0, left - own[0]) + max(0, own[2] - right) + max(0, bottom + 2 - own[1]) + max(0, own[3] - top)
            across = [(min(own[2], other[2]) - max(own[0], other[0]), min(own[3], other[3]) - max(own[1], other[1])) for other in taken]
            return 20 * outside + sum(wide * high for wide, high in across if wide > 0 and high > 0)

        sides = [(side * aside, height) for height in (0, 8, -8, 13, -13) for side in (1, -1)]
        shift = min([(inward, 13), (inward, -13), *sides, *((inward, height) for height in (26, -26, 39, -39))], key=covered)
        taken.append(moved(shift))
        label = axes.annotate(
            text, point, xytext=shift, textcoords="offset points", ha="center", va="center", color=_INK, fontweight="bold" if heavy else "normal"
        )
        label.set_parse_math(False)  # a name may contain dollar signs
        label.set_in_layout(False)  # else the axes would shrink to make space


def _figure(salt: str) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[RcKeyType, str | float] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Figure, title: str) -> str:
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and its document type
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    svg = re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" ', svg, count=1)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page sets the type
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return svg
