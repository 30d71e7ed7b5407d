"""One short answer from a tag that was just registered: does it speak, and does it stop?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from olpack.deploy.client import OllamaClient
from olpack.errors import OlpackError


@dataclass(frozen=True)
class Smoke:
    """What a tag answered.

    Attributes:
        model: the whole name.
        answer: its text.
        done_reason: "stop" where the model ended its turn, "length" where it was cut at `num_predict` tokens.
        tokens: generated.
        seconds: wall time as the server took it, loading included.
    """

    model: str
    answer: str
    done_reason: str
    tokens: int
    seconds: float

    @property
    def stopped(self) -> bool:
        """Whether the model ended its turn by itself."""
        return self.done_reason == "stop"


def smoke(client: OllamaClient, model: str, messages: Sequence[Mapping], num_predict: int = 256) -> Smoke:
    """Ask for one answer, greedily.

    Args:
        client: of a server that has the model.
        model: with its tag.
        messages: a conversation from the data, the last turn from the user, whose answer is known to be shorter than `num_predict`.
        num_predict: tokens after which the answer is cut. That an answer was cut is told by `stopped`, for the caller to judge: a long
            answer and a stop token that never comes look the same from here.

    Raises:
        OlpackError: the model does not run, or says nothing.
    """
    answer = client.chat(model, messages, options={"temperature": 0, "seed": 1, "num_predict": num_predict})
    text = answer.message.content or ""
    tokens = answer.eval_count or 0
    if not (text or answer.message.thinking or answer.message.tool_calls):
        raise OlpackError(
            f"{model} answers with nothing ({tokens} tokens, {answer.done_reason or 'no reason given'}).",
            "Try another quant of it; if all are silent, look at the training's eval loss and at the prompt.",
        )
    return Smoke(model, text, answer.done_reason or "", tokens, (answer.total_duration or 0) / 1e9)
