"""Published losses of quants, for models without measurements of their own: llama.cpp's table for Llama 3 8B."""

from __future__ import annotations

SOURCE = "Llama 3 8B on wikitext-2, from the table of llama.cpp's perplexity tool; smaller models lose more, larger ones less"

# Perplexity in 16 bits, and by how much each quant raises it: tools/perplexity/README.md of llama.cpp, rows without an importance matrix.
_PERPLEXITY = 6.231636
_RISE = {
    "F32": 0.0,
    "BF16": 0.0,
    "F16": 0.001524,
    "Q8_0": 0.002650,
    "Q6_K": 0.021748,
    "Q5_K_M": 0.056974,
    "Q5_K_S": 0.104964,
    "Q5_1": 0.106223,
    "Q5_0": 0.131591,
    "Q4_K_M": 0.175482,
    "Q4_K_S": 0.268895,
    "Q4_1": 0.451103,
    "Q4_0": 0.468514,
    "Q3_K_L": 0.556242,
    "Q3_K_M": 0.656864,
    "Q3_K_S": 1.632152,
    "Q2_K": 3.519934,
}

# GB for a billion parameters, as tutorials have it; times MARGIN for all that is not weights.
_RULE = {"Q4_K_M": 0.5, "Q5_K_M": 0.625, "Q8_0": 1.0, "F16": 2.0}
_RULE_MARGIN = 1.2

CHOICE = ("Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")  # by default


def published_loss(quant: str) -> float | None:
    """By which share a quant raised the perplexity, 0.028 for Q4_K_M; None for those that the table has only with an importance matrix."""
    rise = _RISE.get(quant)
    return None if rise is None else rise / _PERPLEXITY


def rule_of_thumb(quant: str, parameters: int) -> int | None:
    """Bytes by the tutorials' rule: GB per billion parameters × 1.2, for any context. None for quants that the rule has no figure for."""
    per_billion = _RULE.get(quant)
    return None if per_billion is None else round(per_billion * parameters * _RULE_MARGIN)
