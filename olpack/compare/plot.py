"""The report's plots, as SVG that stands inside the page: text stays text, and colours are the page's own, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from olpack.compare.results import Results
from olpack.progress import quantity

# matplotlib knows no CSS, so it draws in these stand-ins, which are then replaced.
_INK, _FAINT, _ACCENT, _OTHER = "#010203", "#040506", "#070809", "#0a0b0c"
_CSS = {_INK: "currentColor", _FAINT: "var(--faint)", _ACCENT: "var(--accent)", _OTHER: "var(--other)"}
_SIZE = (5.0, 3.5)  # inches: as wide as half a desktop page, and shrunk little on a phone


def plot_quality(results: Results) -> str | None:
    """Generation speed against loss of perplexity, the area of a point growing with the file. None where fewer than two quants have both.

    Error bars: lowest and highest repeat of the speed; one standard error of the paired loss.
    """
    points = [quant for quant in results.quants if quant.loss is not None and quant.speed and quant.speed.generation_tokens_per_s]
    if len(points) < 2:
        return None
    figure, axes = _figure("quality")
    chosen = results.recommendation.tag if results.recommendation else None
    largest = max(quant.size_bytes for quant in points)
    for quant in points:
        speed, loss = quant.speed.generation_tokens_per_s, 100 * quant.loss.relative
        color = _ACCENT if quant.tag == chosen else _OTHER
        spread = [[speed.median - speed.low], [speed.high - speed.median]]
        axes.errorbar(speed.median, loss, xerr=spread, yerr=100 * (quant.loss.standard_error or 0), color=color, linewidth=1, capsize=2)
        axes.scatter(speed.median, loss, s=260 * quant.size_bytes / largest, color=color, alpha=0.85, linewidths=0, zorder=3)
    axes.margins(x=0.3, y=0.25)  # room for the labels
    axes.set_xlabel("generation, tokens/s  (further right is faster)")
    axes.set_ylabel("perplexity above the best, %")
    axes.grid(color=_FAINT, linewidth=0.6)
    _label(axes, points, chosen)
    return _svg(figure, "Speed and quality of each quant")


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


def _label(axes, points: Sequence, chosen: str | None) -> None:
    """Name every point, above or below it: where fewer points and labels are near."""
    axes.figure.canvas.draw()  # settles the axes, so that distances on the paper are known
    data = [(quant.speed.generation_tokens_per_s.median, 100 * quant.loss.relative) for quant in points]
    taken = [tuple(axes.transData.transform(point) * 72 / axes.figure.dpi) for point in data]  # in points, 1/72 inch
    for quant, point, (x, y) in zip(points, data, list(taken), strict=True):

        def crowd(shift: int, x: float = x, y: float = y) -> float:
            near = [(abs(x - other_x), abs(y + shift - other_y)) for other_x, other_y in taken]
            return sum(max(0, 100 - across) * max(0, 14 - along) for across, along in near)

        shift = min((14, -14, 27, -27, 40, -40), key=crowd)
        taken.append((x, y + shift))
        label = axes.annotate(f"{quant.quant} · {quantity(quant.size_bytes, 'B')}", point, xytext=(0, shift), textcoords="offset points",
                              ha="center", va="center", color=_INK, fontweight="bold" if quant.tag == chosen else "normal")  # fmt: skip
        label.set_in_layout(False)  # else the axes would shrink to make room


def _figure(salt: str):
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 9.5,
        "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure, title: str) -> str:
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
