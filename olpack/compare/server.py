"""Speed, load time and memory as an Ollama server gives them."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from olpack.compare.energy import joules
from olpack.compare.results import Concurrency, Spread
from olpack.compare.rounds import PromptRun, SpeedRound
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from ollama import GenerateResponse, ProcessResponse

    from olpack.compare.settings import MeasureSettings
    from olpack.deploy.client import OllamaClient

_LOADS = 2  # in each round; the very first is discarded
_UNLOAD_S = 30.0
_CHARACTERS_PER_TOKEN = 2.5  # of random words, to begin with; the discarded first call corrects it
_SHORT = 80  # characters of the prompt before a timed generation
_NANO = 1e-9


class ServedSpeed:
    """Measures models of one server, round by round.

    The durations of prompt and generation are the server's own; the time to the first token is the client's, from sending the request to the
    first piece of the answer. Every prompt is a run of new random words, because prompt tokens found in the server's cache count as
    processed; prompts go in raw, with no template. The first call of each kind is discarded. All models that the server runs are unloaded
    before, and the measured one between loads. A load is timed until one token is out; the file may be in the server's page cache, so only
    warm load times are claimed. Generation stops where the model ends its turn, at most after `generated_tokens`.

    Args:
        client: of the server.
        settings: lengths, tokens and context.
    """

    def __init__(self, client: OllamaClient, settings: MeasureSettings):
        self._client, self._settings = client, settings
        self._words = _Words()

    def round(self, model: str, repeats: int, first: bool) -> Iterator[tuple[int, int] | SpeedRound]:
        """Visit a model: (done, total) any number of times, then the round.

        Args:
            model: as the server names it.
            repeats: timed runs of each figure.
            first: the model was not visited before, so the first of its loads is discarded.

        Raises:
            OlpackError: the server refuses, or does not unload a model.
        """
        settings = self._settings
        done, total = 0, _LOADS + first + (len(settings.prompt_lengths) + 1) * (repeats + 1)
        loads = []
        for _ in range(_LOADS + first):
            self._unload_all()
            loads.append(self._ask(model, 8, 1).last.total_duration * _NANO)
            yield (done := done + 1), total

        # A model trained on less context than asked for is loaded with less.
        context = min(settings.context, self._running(model).context_length or settings.context)
        prompts, per_token = [], _CHARACTERS_PER_TOKEN
        for asked in dict.fromkeys(min(length, context - settings.generated_tokens) for length in settings.prompt_lengths):
            for repeat in range(repeats + 1):
                # The discarded first call counts how many characters a token takes. A prompt over the context would be cut in silence.
                characters = int(asked * per_token)
                answer = self._ask(model, characters, 1)
                per_token = characters / answer.last.prompt_eval_count
                if repeat:
                    seconds = answer.last.prompt_eval_duration * _NANO
                    prompts.append(PromptRun(asked=asked, tokens=answer.last.prompt_eval_count, seconds=seconds, first_token_s=answer.first_s))
                yield (done := done + 1), total

        rates, energies = [], []
        for repeat in range(repeats + 1):
            before = joules()
            answer = self._ask(model, _SHORT, settings.generated_tokens)
            if repeat and answer.last.eval_count and answer.last.eval_duration:
                rates.append(answer.last.eval_count / (answer.last.eval_duration * _NANO))
                if before is not None and (after := joules()) is not None:
                    energies.append((after - before) / answer.last.eval_count)
            yield (done := done + 1), total

        running = self._running(model)
        self._unload_all()
        yield SpeedRound(
            context=context, loads_s=loads[first:], prompts=prompts, generation_tokens_per_s=rates,
            joules_per_token=energies if running.size_vram else [], memory_bytes=running.size, gpu_memory_bytes=running.size_vram,
        )  # fmt: skip

    def concurrency(self, model: str, clients: Sequence[int]) -> Iterator[tuple[int, int] | list[Concurrency]]:
        """So many clients at once, each with a request of its own: (done, total) any number of times, then one entry for each number.

        The server works on as many requests at a time as OLLAMA_NUM_PARALLEL lets it; the others wait, and their waiting counts.
        """
        self._ask(model, _SHORT, 1)
        found = []
        for count in clients:
            prompts = [self._words.text(_SHORT) for _ in range(count)]
            started = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                answers = list(pool.map(lambda prompt: self._answer_or_none(model, prompt), prompts))
            seconds = time.perf_counter() - started
            whole = [answer for answer in answers if answer is not None]
            if not whole:
                raise OlpackError(f"The server answered none of {count} requests at once to {model}.", "Look into its log (OLLAMA_MAX_QUEUE).")
            found.append(Concurrency(
                clients=count, tokens_per_s=sum(answer.last.eval_count or 0 for answer in whole) / seconds,
                first_token_s=Spread.of([answer.first_s for answer in whole]), failed=count - len(whole),
            ))  # fmt: skip
            yield len(found), len(clients)
        self._unload_all()
        yield found

    def _answer_or_none(self, model: str, prompt: str) -> _Answer | None:
        try:
            return self._stream(model, prompt, self._settings.generated_tokens)
        except OlpackError:  # a full queue; how many were refused is part of the result
            return None

    def _ask(self, model: str, characters: int, tokens: int) -> _Answer:
        return self._stream(model, self._words.text(characters), tokens)

    def _stream(self, model: str, prompt: str, tokens: int) -> _Answer:
        options = {"num_ctx": self._settings.context, "num_predict": tokens, "temperature": 0}
        started, first, last = time.perf_counter(), None, None
        for piece in self._client.stream_generate(model, prompt, options, raw=True):
            first, last = first or time.perf_counter() - started, piece
        if last is None or not last.done:
            raise OlpackError(f"The server broke off its answer to {model}.", "Look into its log, then run this again.")
        return _Answer(first, last)

    def _running(self, model: str) -> ProcessResponse.Model:
        """What /api/ps says of a loaded model. Ollama matches names without regard to case."""
        for entry in self._client.ps():
            if entry.model.casefold() == model.casefold():
                return entry
        raise OlpackError(f"The server unloaded {model} while it was measured.", "Is memory short, or does somebody else use the server?")

    def _unload_all(self) -> None:
        for entry in self._client.ps():
            self._client.unload(entry.model)
        deadline = time.monotonic() + _UNLOAD_S
        while loaded := self._client.ps():
            if time.monotonic() > deadline:
                problem = f"The server still holds {loaded[0].model}, {_UNLOAD_S:.0f} s after it was asked to unload it."
                raise OlpackError(problem, "If somebody else is using it, wait; else run `ollama stop`.")
            time.sleep(0.05)


@dataclass(frozen=True)
class _Answer:
    """Seconds until the first piece of it came, and its last piece, which has the server's counts and durations (nanoseconds)."""

    first_s: float
    last: GenerateResponse


class _Words:
    """Random words that no earlier prompt began with."""

    def __init__(self) -> None:
        self._random = random.Random(time.time_ns())  # the server may still hold prompts of an earlier run

    def text(self, characters: int) -> str:
        words: list[str] = []
        size = 0
        while size < characters:
            word = "".join(self._random.choices(string.ascii_lowercase, k=self._random.randint(3, 9)))
            words.append(word)
            size += len(word) + 1
        return " ".join(words)[:characters]
