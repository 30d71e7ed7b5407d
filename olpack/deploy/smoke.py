"""One short answer from a tag that was just registered: does it speak, and does it repeat itself?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from olpack.data.repetition import repeats_itself
from olpack.deploy.client import OllamaClient
from olpack.errors import OlpackError

_SHOWN = 40  # characters of a loop's end


@dataclass(frozen=True)
class Smoke:
    """What a tag answered.

    Attributes:
        model: the whole name.
        answer: its text, or its reasoning where it got no further.
        done_reason: "stop" where the model ended its turn, "length" where it was cut at `num_predict` tokens, "" where the server broke off.
        tokens: generated; 0 where the server broke off, which counts none then.
        seconds: wall time as the server took it, loading included.
        loops: it says the same thing over and over; a server breaks off an answer that repeats one token 30 times.
    """

    model: str
    answer: str
    done_reason: str
    tokens: int
    seconds: float
    loops: bool

    @property
    def stopped(self) -> bool:
        """Whether the model ended its turn by itself."""
        return self.done_reason == "stop"

    def warning(self) -> str:
        """What to tell the user of a loop."""
        ended = f"for {self.tokens} tokens, where it was cut" if self.tokens else "until the server broke its answer off"
        return (
            f"{self.model} repeats itself, {ended}: it ends with {self.answer[-_SHOWN:]!r}. repeat_penalty and num_predict in "
            "modelfile.parameters limit that; more rows, or fewer epochs, can cure it."
        )


def smoke(client: OllamaClient, model: str, messages: Sequence[Mapping], num_predict: int = 48) -> Smoke:
    """Ask for the beginning of one answer, greedily.

    Args:
        client: of a server that has the model.
        model: with its tag.
        messages: a conversation from the data, the last turn from the user.
        num_predict: tokens after which the answer is cut. An answer that is cut and does not repeat itself may just be a long one.

    Raises:
        OlpackError: the model does not run, or says nothing.
    """
    answer = client.chat(model, messages, options={"temperature": 0, "seed": 1, "num_predict": num_predict})
    text = answer.message.content or answer.message.thinking or ""
    tokens, reason = answer.eval_count or 0, answer.done_reason or ""
    if answer.done and not (text or answer.message.tool_calls):
        raise OlpackError(
            f"{model} answers with nothing ({tokens} tokens, {reason or 'no reason given'}).",
            "Try another quant of it; if all are silent, look at the training's eval loss and at the prompt.",
        )
    loops = not answer.done or (reason != "stop" and bool(text.strip()) and repeats_itself(text))
    return Smoke(model, text, reason, tokens, (answer.total_duration or 0) / 1e9, loops)
