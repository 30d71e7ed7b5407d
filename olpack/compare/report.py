"""The report: one HTML file with everything inside, for a browser without a network and for paper."""

from __future__ import annotations

import json
from pathlib import Path

from olpack.compare.plot import plot_loss, plot_quality
from olpack.compare.recommend import percent
from olpack.compare.results import Results, Spread
from olpack.compare.table import MISSING, plain, rate, seconds
from olpack.errors import OlpackError
from olpack.progress import quantity
from olpack.workspace import write_atomically


def render_report(results: Results, template: str, metrics: Path | None = None) -> str:
    """The page as text.

    Args:
        template: source of a Jinja template such as `report.html.j2`. Values are escaped. It gets `results`, `quality_plot` and `loss_plot`
            (SVG, or None), and the filters `size`, `rate`, `range`, `seconds`, `plain` and `percent`.
        metrics: the training's metrics.jsonl; None, or no such file: no loss curve.

    Raises:
        OlpackError: the template does not render.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "size": lambda count: MISSING if count is None else quantity(count, "B"),
        "rate": rate,
        "range": _range,
        "seconds": seconds,
        "plain": lambda value: MISSING if value is None else plain(value),
        "percent": percent,
    }
    plots = {"quality_plot": plot_quality(results), "loss_plot": plot_loss(_read_metrics(metrics))}
    try:
        # Our own SVG goes in as it is; all else is escaped.
        return environment.from_string(template).render(results=results, **{name: svg and Markup(svg) for name, svg in plots.items()})
    except jinja2.TemplateError as error:
        problem = f"The report's template does not render: {error}."
        raise OlpackError(problem, "Mend templates/report.html.j2, or remove it to use the shipped one.") from None


def write_report(results: Results, path: Path, template: str, metrics: Path | None = None) -> None:
    """Write `report.html`; what was there is replaced whole or not at all. Arguments as for `render_report`."""
    write_atomically(Path(path), render_report(results, template, metrics))


def _range(spread: Spread | None) -> str:
    """ "118–124": lowest and highest of the repeats; nothing where they read the same."""
    if spread is None:
        return ""
    low, high = plain(spread.low), plain(spread.high)
    return "" if low == high else f"{low}–{high}"


def _read_metrics(path: Path | None) -> list[dict]:
    if path is None or not Path(path).is_file():
        return []
    lines = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # the last line of a training that was killed
    return [line for line in lines if isinstance(line, dict) and "step" in line]
