"""Logits as probabilities, and how far one model's are from another's."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities of logits, over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl_divergence(reference: np.ndarray, quant: np.ndarray) -> float:
    """KL(reference ‖ quant) = Σ p·(ln p - ln q) in nats, from the natural-log probabilities of both, shape [vocabulary]."""
    return float(np.dot(np.exp(reference), reference - quant))
