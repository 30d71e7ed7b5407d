"""The report: one HTML file with everything inside, for a browser without a network and for paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from olpack.compare.choices import gains, types_in_short
from olpack.compare.differences import Said, group_answers, split_blocks
from olpack.compare.perplexity import paired_loss
from olpack.compare.plot import plot_divergence, plot_loss, plot_quality
from olpack.compare.results import Answer, BaseResult, Loss, PromptSpeed, Reference, Results, Spread
from olpack.compare.table import MISSING, plain, rate, seconds
from olpack.errors import OlpackError
from olpack.progress import quantity
from olpack.workspace import write_atomically

_ALL_TASKS = 30  # up to so many are listed one by one; of more, those that the files do not all do alike
_UNFOLDED = 12  # answers to so many tasks are open when the page is


def render_report(results: Results, template: str, metrics: Path | None = None, identity: str | None = None) -> str:
    """The page as text.

    Args:
        template: source of a Jinja template such as `report.html.j2`. Values are escaped. What it gets is said at its top.
        metrics: the training's metrics.jsonl; None, or no such file: no loss curve.
        identity: how the served prompts compare with the trained ones, "prompt identical: 42/42"; None where that was not looked at.

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
        "share": share,
        "error": _error,
        "loss": _loss,
        "change": _change,
        "types": types_in_short,
        "blocks": lambda text: split_blocks([("same", text)]),
    }
    loss_plot = plot_loss(_read_metrics(metrics))
    plots = {"quality_plot": plot_quality(results), "divergence_plot": plot_divergence(results), "loss_plot": loss_plot}
    try:
        return environment.from_string(template).render(
            results=results,
            identity=identity,
            chosen=results.recommendation.tag if results.recommendation else None,
            served=not any(quant.file for quant in results.quants),
            glance=_glance(results),
            flags=_flags(results),
            lengths=_lengths(results),
            losses=_losses(results),
            gains=gains(results),
            answers=[_said(results, [quant.answers and quant.answers[at] for quant in results.quants]) for at in range(len(results.prompts))],
            system=_system(results),
            tasks=_tasks(results),
            suites=list(dict.fromkeys((score.suite, score.metric) for quant in results.quants for score in quant.suites)),
            # Our own SVG goes in as it is; all else is escaped.
            **{name: svg and Markup(svg) for name, svg in plots.items()},
        )
    except jinja2.TemplateError as error:
        problem = f"The report's template does not render: {error}."
        raise OlpackError(problem, "Fix templates/report.html.j2, or remove it to use the shipped one.") from None


def check_template(template: str) -> None:
    """Refuse a report's template that does not compile, before anything is measured.

    Raises:
        OlpackError: with the line.
    """
    import jinja2

    try:
        jinja2.Environment(autoescape=True).parse(template)
    except jinja2.TemplateSyntaxError as error:
        problem = f"The report's template has an error in line {error.lineno}: {error.message}."
        raise OlpackError(problem, "Fix templates/report.html.j2, or remove it to use the shipped one.") from None


def write_report(results: Results, path: Path, template: str, metrics: Path | None = None, identity: str | None = None) -> None:
    """Write `report.html`; what was there is replaced whole or not at all. Arguments as for `render_report`."""
    write_atomically(Path(path), render_report(results, template, metrics, identity))


@dataclass(frozen=True)
class Column:
    """One thing to see of every quant in one look.

    Attributes:
        title: what it is.
        hint: which way is good.
        cells: for each quant, the figure, its error and the length of its bar as a share of the longest; None where it was not measured.
    """

    title: str
    hint: str
    cells: list[tuple[str, str, float] | None]


def _glance(results: Results) -> list[Column]:
    """What each quant costs, gives and keeps. A thing that nobody measured has no column."""
    size, speed, loss, top, solved = [], [], [], [], []
    for quant in results.quants:
        rates, far, scores = quant.speed and quant.speed.generation_tokens_per_s, quant.divergence, quant.scores
        size.append((quant.size_bytes, quantity(quant.size_bytes, "B"), ""))
        speed.append(rates and (rates.median, rate(rates), _range(rates)))
        best = quant.loss and quant.loss.reference == quant.tag
        loss.append(quant.loss and (quant.loss.relative, *(("the best", "") if best else _loss(quant.loss))))
        top.append(far and (far.same_top, share(far.same_top), _error(far.same_top_standard_error)))
        solved.append(scores and (scores.mean, share(scores.mean), _error(scores.standard_error)))
    columns = [
        _column("size", "less is better", size),
        _column("generated tokens/s", "more is better", speed),
        _column("perplexity above the best", "less is better", loss),
        _column("same top token", "as unquantized", top),
        _column("tasks solved", "more is better", solved),
    ]
    return [column for column in columns if any(column.cells)]


def _column(title: str, hint: str, figures: Sequence[tuple[float, str, str] | None]) -> Column:
    longest = max((figure[0] for figure in figures if figure), default=0) or 1
    return Column(title, hint, [figure and (figure[1], figure[2], max(0, figure[0]) / longest) for figure in figures])


def _lengths(results: Results) -> list[tuple[str, dict[str, PromptSpeed]]]:
    """The prompt lengths that speed was taken at: (in words, the speeds by tag of the quant).

    A server counts the tokens of a prompt anew each time, so lengths within a tenth are the same length.
    """
    found = [(prompt.prompt_tokens, quant.tag, prompt) for quant in results.quants if quant.speed for prompt in quant.speed.prompt]
    groups: list[list[tuple[int, str, PromptSpeed]]] = []
    for one in sorted(found, key=lambda one: one[0]):
        if groups and one[0] <= 1.1 * groups[-1][0][0]:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [(_words(group[0][0], group[-1][0]), {tag: prompt for _, tag, prompt in group}) for group in groups]


def _words(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


def _losses(results: Results) -> dict[str, Loss]:
    """The losses of "base" and "reference", taken as the quants' own: against the best of these, row by row on the same rows."""
    best = next((quant for quant in results.quants if quant.loss and quant.loss.reference == quant.tag), None)
    if best is None or results.rows is None:
        return {}
    held: dict[str, BaseResult | Reference | None] = {"base": results.base, "reference": results.reference}
    losses = {}
    for name, file in held.items():
        if file and file.perplexity and None not in file.perplexity.row_nll:
            relative, error = paired_loss(file.perplexity.row_nll, best.perplexity.row_nll, results.rows.learned_tokens)
            losses[name] = Loss(reference=best.tag, relative=relative, standard_error=error)
    return losses


def _said(results: Results, answers: Sequence[Answer | None]) -> tuple[list[Said], list[str]]:
    """The quants' answers to one prompt, equal ones put together, and the names of those who gave none."""
    names = [quant.quant for quant in results.quants]
    return group_answers(names, answers), [name for name, answer in zip(names, answers, strict=True) if answer is None]


def _system(results: Results) -> str | None:
    """The system prompt, where all prompts have the same one."""
    found = {message["content"] for prompt in results.prompts for message in prompt if message["role"] == "system"}
    everywhere = all(prompt[0]["role"] == "system" for prompt in results.prompts)
    return found.pop() if len(found) == 1 and everywhere else None


@dataclass(frozen=True)
class TaskRow:
    """A task, and what every file made of it.

    Attributes:
        number: from 1.
        question: the last thing that the user says.
        values: from 0 to 1 by name of the quant, the base's under "base"; None where it was not scored.
        differ: the quants did not all do alike.
        answers: of the quants, equal ones put together; empty where all did alike.
    """

    number: int
    check: str
    expected: str | Sequence[str]
    question: str
    values: dict[str, float | None]
    differ: bool
    answers: list[Said]


@dataclass(frozen=True)
class Tasks:
    """The tasks to list, and how many there are of which kind.

    Attributes:
        rows: all of them, or, of many, those that the files did not all do alike.
        solved, failed: how many every quant solved, and none.
        unfolded: the answers are open when the page is.
    """

    rows: list[TaskRow]
    solved: int
    failed: int
    unfolded: bool


def _tasks(results: Results) -> Tasks | None:
    scored = [quant for quant in results.quants if quant.scores]
    if not results.tasks or not scored:
        return None
    rows = []
    for at, task in enumerate(results.tasks):
        own = [quant.scores.values[at] for quant in scored]
        base = {"base": results.base.scores.values[at]} if results.base and results.base.scores else {}
        values = base | {quant.quant: quant.scores.values[at] if quant.scores else None for quant in results.quants}
        differ = len(set(own)) > 1
        said = _said(results, [quant.task_answers and quant.task_answers[at] for quant in results.quants])[0] if differ else []
        rows.append(TaskRow(at + 1, task.check, task.expected, task.messages[-1]["content"], values, differ, said))
    alike = [[quant.scores.values[row.number - 1] for quant in scored] for row in rows]
    return Tasks(
        rows=rows if len(rows) <= _ALL_TASKS else [row for row in rows if row.differ],
        solved=sum(all(value == 1 for value in values) for values in alike),
        failed=sum(all(value == 0 for value in values) for values in alike),
        unfolded=sum(row.differ for row in rows) <= _UNFOLDED,
    )


def _flags(results: Results) -> list[tuple[str, str, bool]]:
    """(names of the quants, text, serious) of every flag; what is said of several quants is said once, what is serious first."""
    names: dict[tuple[str, bool], list[str]] = {}
    for quant in results.quants:
        for flag in quant.flags:
            names.setdefault((flag.text, flag.serious), []).append(quant.quant)
    flags = [("", flag.text, flag.serious) for flag in results.flags]
    flags += [(", ".join(own), text, serious) for (text, serious), own in names.items()]
    return sorted(flags, key=lambda flag: not flag[2])


def share(value: float) -> str:
    """ "83.3%"; whole where it is all or nothing."""
    return f"{value:.0%}" if value in (0, 1) else f"{100 * value:.1f}%"


def _error(value: float | None) -> str:
    """ "± 1.2%": a standard error of a share; nothing where there is none."""
    return "" if value is None else f"± {100 * value:.1f}%"


def _loss(loss: Loss) -> tuple[str, str]:
    return _change(loss.relative, loss.standard_error)


def _change(value: float, error: float | None) -> tuple[str, str]:
    """ "+0.49%" and "± 0.21%"."""
    return f"{100 * value:+.2f}%", "" if error is None else f"± {100 * error:.2f}%"


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
