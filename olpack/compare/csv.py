"""The comparison as CSV, one line a quant, for a spreadsheet. Units are in the names of the columns; what was not measured is empty."""

from __future__ import annotations

import csv
import io

from olpack.compare.results import QuantResult, Results


def to_csv(results: Results) -> str:
    """The figures as text, the first line being the names of the columns."""
    rows = [_row(quant, results) for quant in results.quants]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(quant: QuantResult, results: Results) -> dict[str, object]:
    row: dict[str, object] = {
        "quant": quant.quant,
        "tag": quant.tag,
        "sha256": quant.sha256,
        "recommended": results.recommendation is not None and results.recommendation.tag == quant.tag,
        "size_bytes": quant.size_bytes,
        "bits_per_weight": quant.bits_per_weight,
    }
    if speed := quant.speed:
        row["engine"] = speed.engine
        row["load_cold_s"] = speed.load_cold_s
        spreads = {"load_warm_s": speed.load_warm_s, "generation_tokens_per_s": speed.generation_tokens_per_s}
        spreads |= {f"prompt_tokens_per_s_at_{prompt.prompt_tokens}": prompt.tokens_per_s for prompt in speed.prompt}
        for name, spread in spreads.items():
            if spread is not None:
                row |= {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
        row["peak_memory_bytes"] = speed.peak_memory_bytes
        row["gpu_memory_bytes"] = speed.gpu_memory_bytes
    if quant.perplexity:
        row |= {"perplexity": quant.perplexity.value, "perplexity_standard_error": quant.perplexity.standard_error}
    if quant.loss:
        row |= {"loss_relative": quant.loss.relative, "loss_standard_error": quant.loss.standard_error}
    if quant.divergence:
        row |= {
            "kl_divergence": quant.divergence.mean,
            "kl_divergence_standard_error": quant.divergence.standard_error,
            "kl_divergence_p99": quant.divergence.p99,
            "same_top": quant.divergence.same_top,
        }
    if quant.divergence_without_importance:
        row["kl_divergence_without_importance"] = quant.divergence_without_importance.mean
    row["flags"] = "; ".join(flag.text for flag in quant.flags)
    return row
