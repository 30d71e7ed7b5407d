"""The outcome of a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainResult:
    """Figures of a finished training, which go into the record of the stage. Losses are mean negative log-probabilities per target token, in nats.

    Attributes:
        steps: optimizer steps.
        kept_step: the step whose adapter is written.
        learned_tokens: target tokens that went through the model, every epoch counted.
        packed: whether a micro-batch packs several rows end to end; False: one row each. There is no padding either way.
        eval_loss_before, eval_loss_after: on the held-out rows, with the base alone and with the adapter that is written.
        trainable_parameters: weights of the adapter.
        device: "cpu", or the GPU's name.
        gpus: number of GPUs; 0 on a CPU.
        estimated_gpu_bytes: the planner's estimate for each GPU; None on a CPU, and where the architecture cannot be counted.
        peak_gpu_bytes: the most bytes allocated at once, on the GPU with the highest peak; None on a CPU.
        tokens_per_s: speed of the steps, evaluations and the first steps left out; None where there were no others.
        seconds: wall time, earlier parts of a resumed run included.
    """

    steps: int
    kept_step: int
    learned_tokens: int
    packed: bool
    eval_loss_before: float
    eval_loss_after: float
    trainable_parameters: int
    device: str
    gpus: int
    estimated_gpu_bytes: int | None
    peak_gpu_bytes: int | None
    tokens_per_s: float | None
    seconds: float
