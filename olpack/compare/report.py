"""The report: one HTML file with everything inside, for a browser without a network and for paper; and the other files of a comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from olpack.compare.answer_diff import AnswerGroup, group_answers, split_blocks
from olpack.compare.changes import importance_gains
from olpack.compare.perplexity import paired_loss, ratio
from olpack.compare.plot import plot_divergence, plot_loss, plot_quality
from olpack.compare.results import Answer, BaseResult, Divergence, GainKept, Loss, PromptSpeed, QuantResult, Reference, Results, Spread, write_results
from olpack.compare.table import MISSING, escaped, markdown_table, plain, rate, seconds, to_csv, types_in_short
from olpack.progress import quantity
from olpack.templating import compiled, render
from olpack.workspace import write_atomically

_POLICY = """<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">"""
"""The browser runs no script of the page and loads nothing for it; styles stand in the page."""
_ALL_TASKS = 30  # up to so many are listed one by one; of more, those on which the scores differ
_UNFOLDED = 12  # answers to at most so many tasks are unfolded when the page opens


def render_report(results: Results, template: str, metrics: Path | None = None, identity: str | None = None) -> str:
    """The page as text.

    Args:
        template: source of a Jinja template such as `report.html.j2`. Values are escaped. Its head lists its variables.
        metrics: the training's metrics.jsonl; None, or no such file: no loss curve.
        identity: how the served prompts compare with the trained ones, "prompt identical: 42/42"; None where that was not checked.

    Raises:
        OlpackError: the template does not render.
    """
    from markupsafe import Markup

    loss_plot = plot_loss(_read_metrics(metrics))
    plots = {"quality_plot": plot_quality(results), "divergence_plot": plot_divergence(results), "loss_plot": loss_plot}
    page = render(
        template,
        "report.html.j2",
        "The report's template",
        filters=_filters(),
        autoescape=True,
        results=results,
        identity=identity,
        chosen=results.recommendation.tag if results.recommendation else None,
        served=not any(quant.file for quant in results.quants),
        glance=_glance(results),
        flags=_flags(results),
        lengths=_lengths(results),
        losses=_losses(results),
        gains=_gains(results),
        answers=[_grouped(results, [quant.answers[at] if quant.answers else None for quant in results.quants]) for at in range(len(results.prompts))],
        system=_system(results),
        tasks=_tasks(results),
        suites=list(dict.fromkeys((score.suite, score.metric) for quant in results.quants for score in quant.suites)),
        # Our own SVG goes in as it is; all else is escaped.
        **{name: svg and Markup(svg) for name, svg in plots.items()},
    )
    # The first <head> is the template's own, because those of values are escaped. It is put in here, so that a user's template has it too.
    return re.sub(r"<head\b[^>]*>", lambda head: f"{head[0]}\n{_POLICY}", page, count=1, flags=re.IGNORECASE)


def _filters() -> dict[str, Callable]:
    """The filters of the report's template."""
    return {
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


def check_template(template: str) -> None:
    """Refuse a report's template that does not compile, before anything is measured.

    Raises:
        OlpackError: with the line.
    """
    compiled(template, "report.html.j2", "The report's template", filters=_filters(), autoescape=True)


def write_report(results: Results, path: Path, template: str, metrics: Path | None = None, identity: str | None = None) -> None:
    """Write `report.html`; what was there is replaced whole or not at all. Arguments as for `render_report`."""
    write_atomically(Path(path), render_report(results, template, metrics, identity))


def write_outputs(results: Results, folder: Path, template: str, metrics: Path | None = None, identity: str | None = None) -> list[Path]:
    """Write `results.json`, `results.csv`, `results.md` and `report.html` into a folder; each is replaced whole or not at all.

    Args:
        template, metrics, identity: as for `write_report`.

    Returns:
        the files, `results.json` first.
    """
    paths = [folder / name for name in ("results.json", "results.csv", "results.md", "report.html")]
    write_results(results, paths[0])
    write_atomically(paths[1], to_csv(results))
    write_atomically(paths[2], f"# {escaped(results.name)}\n\n{markdown_table(results)}\n")
    write_report(results, paths[3], template, metrics=metrics, identity=identity)
    return paths


@dataclass(frozen=True)
class Column:
    """One figure of every quant, to compare at a glance.

    Attributes:
        title: what it is.
        hint: which way is good.
        cells: for each quant, the figure, its error and the length of its bar as a share of the longest; None where it was not measured.
    """

    title: str
    hint: str
    cells: list[tuple[str, str, float] | None]


_Figure = tuple[float, str, str]  # the value, and the value and its error as text


def _glance(results: Results) -> list[Column]:
    """Size, speed and quality of each quant. A figure that no quant has gets no column."""
    size: list[_Figure | None] = []
    speed: list[_Figure | None] = []
    loss: list[_Figure | None] = []
    top: list[_Figure | None] = []
    solved: list[_Figure | None] = []
    rounded: list[_Figure | None] = []
    kept: list[_Figure | None] = []
    task_kept: list[_Figure | None] = []
    elsewhere: list[_Figure | None] = []
    for quant in results.quants:
        size.append((quant.size_bytes, quantity(quant.size_bytes, "B"), ""))
        rates = quant.speed.generation_tokens_per_s if quant.speed else None
        speed.append((rates.median, rate(rates), _range(rates)) if rates else None)
        texts = ("the best", "") if quant.loss and quant.loss.reference == quant.tag else _loss(quant.loss) if quant.loss else ("", "")
        loss.append((quant.loss.relative, *texts) if quant.loss else None)
        far, scores = quant.divergence, quant.scores
        top.append((far.same_top, share(far.same_top), _error(far.same_top_standard_error)) if far else None)
        solved.append((scores.mean, share(scores.mean), _error(scores.standard_error)) if scores else None)
        rounded.append(_against_ggml(quant))
        kept.append(_kept(quant.gain_kept))
        task_kept.append(_kept(quant.task_gain_kept))
        elsewhere.append(_millinats(quant.other_text))
    columns = [
        _column("size", "less is better", size),
        _column("generated tokens/s", "more is better", speed),
        _column("perplexity above the best", "less is better", loss),
        _column("same top token", "as unquantized", top),
        _column("KL divergence (by ggml's rounding: 100%)", "less is better", rounded),
        _column("tasks solved", "more is better", solved),
        _column("gain of the fine-tune kept", "from base to unquantized", kept),
        _column("its gain in tasks kept", "from base to unquantized", task_kept),
        _column("KL on other text, millinats", "less is better", elsewhere),
    ]
    return [column for column in columns if any(column.cells)]


def _against_ggml(quant: QuantResult) -> _Figure | None:
    own, other = quant.divergence, quant.by_ggml and quant.by_ggml.divergence
    if own is None or not other or other.rows != own.rows or other.mean <= 0:
        return None
    value, error = ratio(own.row_kl, other.row_kl)
    return value, share(value), _error(error or None)


def _millinats(far: Divergence | None) -> _Figure | None:
    if far is None:
        return None
    return far.mean, plain(1000 * far.mean), "" if far.standard_error is None else f"± {plain(1000 * far.standard_error)}"


def _kept(gain: GainKept | None) -> _Figure | None:
    return None if gain is None or gain.value is None else (gain.value, share(gain.value), _error(gain.standard_error))


def _column(title: str, hint: str, figures: Sequence[_Figure | None]) -> Column:
    longest = max((figure[0] for figure in figures if figure), default=0) or 1
    return Column(title, hint, [(figure[1], figure[2], max(0, figure[0]) / longest) if figure else None for figure in figures])


def _lengths(results: Results) -> list[tuple[str, dict[str, PromptSpeed]]]:
    """The prompt lengths at which speed was measured: (as text, the speeds by tag of the quant).

    A server counts the tokens of a prompt anew each time, so lengths within a tenth are the same length.
    """
    prompts = [(prompt.prompt_tokens, quant.tag, prompt) for quant in results.quants if quant.speed for prompt in quant.speed.prompt]
    groups: list[list[tuple[int, str, PromptSpeed]]] = []
    for one in sorted(prompts, key=lambda one: one[0]):
        if groups and one[0] <= 1.1 * groups[-1][0][0]:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [(_words(group[0][0], group[-1][0]), {tag: prompt for _, tag, prompt in group}) for group in groups]


def _words(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


def _losses(results: Results) -> dict[str, Loss]:
    """The losses of "base" and "reference", computed as the quants' own: against the best of these, row by row on the same rows."""
    best = next((quant for quant in results.quants if quant.loss and quant.loss.reference == quant.tag), None)
    best_nll = best.perplexity.finite_nll if best and best.perplexity else None
    if best is None or best_nll is None or results.rows is None:
        return {}
    models: dict[str, BaseResult | Reference | None] = {"base": results.base, "reference": results.reference}
    losses = {}
    for name, model in models.items():
        if model and model.perplexity and (nll := model.perplexity.finite_nll) is not None:
            relative, error = paired_loss(nll, best_nll, results.rows.learned_tokens)
            losses[name] = Loss(reference=best.tag, relative=relative, standard_error=error)
    return losses


def _gains(results: Results) -> list[dict[str, object]]:
    """The gains of importance matrices under the names that the template has for them; a user's own template has these too."""
    return [
        {
            "quant": gain.quant,
            "tag": gain.tag,
            "weighed": gain.with_importance,
            "unweighed": gain.without_importance,
            "change": gain.change,
            "standard_error": gain.standard_error,
        }
        for gain in importance_gains(results)
    ]


def _grouped(results: Results, answers: Sequence[Answer | None]) -> tuple[list[AnswerGroup], list[str]]:
    """The quants' answers to one prompt, equal ones grouped, and the names of the quants that gave none."""
    names = [quant.quant for quant in results.quants]
    return group_answers(names, answers), [name for name, answer in zip(names, answers, strict=True) if answer is None]


def _system(results: Results) -> str | None:
    """The system prompt, where all prompts have the same one."""
    texts = {message["content"] for prompt in results.prompts for message in prompt if message["role"] == "system"}
    everywhere = all(prompt[0]["role"] == "system" for prompt in results.prompts)
    return texts.pop() if len(texts) == 1 and everywhere else None


@dataclass(frozen=True)
class TaskRow:
    """A task, with the score and the answer of every file.

    Attributes:
        number: from 1.
        question: the user's last message.
        values: scores from 0 to 1 by name of the quant, the base's under "base"; None where it was not scored.
        differ: the quants do not all have the same score.
        answers: of the quants, equal ones grouped; empty where all have the same score.
    """

    number: int
    check: str
    expected: str | Sequence[str]
    question: str
    values: dict[str, float | None]
    differ: bool
    answers: list[AnswerGroup]


@dataclass(frozen=True)
class Tasks:
    """The tasks that are listed, and how many there are of which kind.

    Attributes:
        rows: all tasks, or, of many, those on which the scores differ.
        solved, failed: how many every quant solved, and none.
        unfolded: the answers are visible when the page opens.
    """

    rows: list[TaskRow]
    solved: int
    failed: int
    unfolded: bool


def _tasks(results: Results) -> Tasks | None:
    scores = {quant.quant: quant.scores.values for quant in results.quants if quant.scores}
    if not results.tasks or not scores:
        return None
    base_scores = results.base.scores if results.base else None
    rows = []
    for at, task in enumerate(results.tasks):
        values = {"base": base_scores.values[at]} if base_scores else {}
        values |= {quant.quant: scores[quant.quant][at] if quant.quant in scores else None for quant in results.quants}
        differ = len({own[at] for own in scores.values()}) > 1
        answers = [quant.task_answers[at] if quant.task_answers else None for quant in results.quants]
        groups = _grouped(results, answers)[0] if differ else []
        rows.append(TaskRow(at + 1, task.check, task.expected, task.messages[-1]["content"], values, differ, groups))
    by_task = [[own[at] for own in scores.values()] for at in range(len(rows))]
    return Tasks(
        rows=rows if len(rows) <= _ALL_TASKS else [row for row in rows if row.differ],
        solved=sum(all(value == 1 for value in values) for values in by_task),
        failed=sum(all(value == 0 for value in values) for values in by_task),
        unfolded=sum(row.differ for row in rows) <= _UNFOLDED,
    )


def _flags(results: Results) -> list[tuple[str, str, bool]]:
    """(names of the quants, text, serious) of every flag; a flag that several quants have comes once, serious flags come first."""
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
    """ "± 1.2%": a standard error of a share; empty where there is none."""
    return "" if value is None else f"± {100 * value:.1f}%"


def _loss(loss: Loss) -> tuple[str, str]:
    return _change(loss.relative, loss.standard_error)


def _change(value: float, error: float | None) -> tuple[str, str]:
    """ "+0.49%" and "± 0.21%"."""
    return f"{100 * value:+.2f}%", "" if error is None else f"± {100 * error:.2f}%"


def _range(spread: Spread | None) -> str:
    """ "118–124": lowest and highest of the repeats; empty where both have the same text."""
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
