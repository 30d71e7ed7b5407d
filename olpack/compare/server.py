"""Speed, load time and memory as an Ollama server gives them."""

from __future__ import annotations

import random
import statistics
import string
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from olpack.compare.results import PromptSpeed, Speed, Spread
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from ollama import GenerateResponse, ProcessResponse

    from olpack.compare.measure import MeasureSettings
    from olpack.deploy.client import OllamaClient

_WARM_LOADS = 3
_UNLOAD_S = 30.0
_CHARACTERS_PER_TOKEN = 2.5  # of random words, to begin with; the discarded first call corrects it
_NANO = 1e-9


def measure_speed(client: OllamaClient, model: str, engine: str, settings: MeasureSettings) -> Iterator[tuple[int, int] | Speed]:
    """Measure one model of the server: (done, total) any number of times, then the result.

    The durations are the server's own. Every prompt is a run of new random words, because prompt tokens found in the server's cache count
    as processed; prompts go in raw, with no template. The first call of each kind is discarded. All models that the server runs are
    unloaded before, and this one between loads. A load is timed until one token is out; the file may be in the server's page cache, so
    only warm load times are claimed. Generation stops where the model ends its turn, at most after `generated_tokens`.

    Raises:
        OlpackError: the server refuses, or does not unload a model.
    """
    words = _Words()
    done, total = 0, _WARM_LOADS + 1 + (len(settings.prompt_lengths) + 1) * (settings.repeats + 1)

    def ask(characters: int, tokens: int) -> GenerateResponse:
        options = {"num_ctx": settings.context, "num_predict": tokens, "temperature": 0}
        return client.generate(model, words.text(characters), options, raw=True)

    loads = []
    for _ in range(_WARM_LOADS + 1):
        _unload_all(client)
        loads.append(ask(8, 1).total_duration * _NANO)
        yield (done := done + 1), total

    # A model trained on less context than asked for is loaded with less.
    context = min(settings.context, _running(client, model).context_length or settings.context)
    prompt, per_token = [], _CHARACTERS_PER_TOKEN
    for length in dict.fromkeys(min(length, context - settings.generated_tokens) for length in settings.prompt_lengths):
        lengths, rates = [], []
        for _ in range(settings.repeats + 1):
            # The discarded first call counts how many characters a token takes. A prompt over the context would be cut in silence.
            characters = int(length * per_token)
            answer = ask(characters, 1)
            per_token = characters / answer.prompt_eval_count
            lengths.append(answer.prompt_eval_count)
            rates.append(answer.prompt_eval_count / (answer.prompt_eval_duration * _NANO))
            yield (done := done + 1), total
        prompt.append(PromptSpeed(prompt_tokens=round(statistics.median(lengths[1:])), tokens_per_s=Spread.of(rates[1:])))

    rates = []
    for _ in range(settings.repeats + 1):
        answer = ask(80, settings.generated_tokens)
        if answer.eval_count and answer.eval_duration:
            rates.append(answer.eval_count / (answer.eval_duration * _NANO))
        yield (done := done + 1), total

    running = _running(client, model)
    _unload_all(client)
    yield Speed(
        engine=engine,
        context=context,
        threads=None,
        load_warm_s=Spread.of(loads[1:]),
        prompt=prompt,
        generation_tokens_per_s=Spread.of(rates[1:]) if len(rates) > 1 else None,
        generated_tokens=settings.generated_tokens,
        peak_memory_bytes=running.size,
        gpu_memory_bytes=running.size_vram,
    )


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


def _running(client: OllamaClient, model: str) -> ProcessResponse.Model:
    """What /api/ps says of a loaded model. Ollama matches names without regard to case."""
    for entry in client.ps():
        if entry.model.casefold() == model.casefold():
            return entry
    raise OlpackError(f"The server unloaded {model} while it was measured.", "Is memory short, or does somebody else use the server?")


def _unload_all(client: OllamaClient) -> None:
    for entry in client.ps():
        client.unload(entry.model)
    deadline = time.monotonic() + _UNLOAD_S
    while loaded := client.ps():
        if time.monotonic() > deadline:
            problem = f"The server still holds {loaded[0].model}, {_UNLOAD_S:.0f} s after it was asked to unload it."
            raise OlpackError(problem, "If somebody else is using it, wait; else run `ollama stop`.")
        time.sleep(0.05)
