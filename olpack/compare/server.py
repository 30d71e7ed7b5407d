"""Speed, load time and memory as an Ollama server gives them."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from olpack import progress
from olpack.compare.energy import joules
from olpack.compare.results import Concurrency, Spread
from olpack.compare.rounds import PromptRun, SpeedRound
from olpack.deploy.names import same
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from ollama import GenerateResponse, ProcessResponse

    from olpack.compare.settings import MeasureSettings
    from olpack.deploy.client import OllamaClient

Result = TypeVar("Result")

_LOADS = 2  # in each round; the very first is discarded
_UNLOAD_S = 30.0
_CHARACTERS_PER_TOKEN = 2.5  # of random words, to begin with; the discarded first call corrects it
_SHORT = 80  # characters of the prompt before a timed generation
_PROMPTS = 6  # tried before a model counts as one that only repeats itself: random words lead small models there in 3 of 12 cases
_NANO = 1e-9


class ServedSpeed:
    """Measures models of one server, round by round.

    The durations of prompt and generation are the server's own; the time to the first token is the client's, from sending the request to the
    first piece of the answer. Every prompt is a run of new random words, because prompt tokens found in the server's cache count as
    processed; prompts go in raw, with no template. The first call of each kind is discarded. The measured models are unloaded before, and each
    between its loads; models of others stay loaded, and a warning names them. A load is timed until one token is out; the file may be in the
    server's page cache, so only warm load times are claimed. Generation stops where the model ends its turn, at most after `generated_tokens`.
    Where the server breaks off an answer that repeats one token, another prompt is drawn.

    Args:
        client: of the server.
        models: those that are measured, as the server names them. No other is unloaded.
        settings: lengths, tokens and context.
    """

    def __init__(self, client: OllamaClient, models: Sequence[str], settings: MeasureSettings):
        self._client, self._models, self._settings = client, models, settings
        self._words = _Words()
        self._foreign: set[str] = set()  # models of others that a warning has named
        self._others: set[str] = set()  # those that were loaded in this round

    def round(self, model: str, repeats: int, first: bool) -> Iterator[tuple[int, int] | SpeedRound]:
        """Visit a model: (done, total) any number of times, then the round.

        A figure that the server fails to give is missing in the round, which says why in its `problems`.

        Args:
            model: as the server names it.
            repeats: timed runs of each figure.
            first: the model was not visited before, so the first of its loads is discarded.

        Raises:
            OlpackError: the server does not run the model at all.
        """
        settings, self._others = self._settings, set()
        lengths, problems = dict.fromkeys(min(length, settings.context - settings.generated_tokens) for length in settings.prompt_lengths), []
        done, total = 0, _LOADS + first + (len(lengths) + 1) * (repeats + 1)
        for one in self._models:
            self._tried(problems, lambda one=one: self._unload(one))
        loads, counts_loads = [], not problems  # of a model that stays loaded, no load can be timed
        for _ in range(_LOADS + first):
            if counts_loads:
                counts_loads = self._tried(problems, lambda: self._unload(model)) is not None
            loads.append(self._ask(model, 8, 1).last.total_duration * _NANO)
            yield (done := done + 1), total

        running = self._tried(problems, lambda: self._running(model))
        # A model trained on less context than asked for is loaded with less.
        context = min(settings.context, (running and running.context_length) or settings.context)
        prompts, per_token = [], _CHARACTERS_PER_TOKEN
        for asked in dict.fromkeys(max(1, min(length, context - settings.generated_tokens)) for length in lengths):
            for repeat in range(repeats + 1):
                # The discarded first call counts how many characters a token takes. A prompt over the context would be cut in silence.
                characters = int(asked * per_token)
                answer = self._tried(problems, lambda characters=characters: self._ask(model, characters, 1))
                if answer and answer.last.prompt_eval_count:
                    per_token = characters / answer.last.prompt_eval_count
                    if repeat and answer.last.prompt_eval_duration:
                        seconds = answer.last.prompt_eval_duration * _NANO
                        prompts.append(PromptRun(asked=asked, tokens=answer.last.prompt_eval_count, seconds=seconds, first_token_s=answer.first_s))
                yield (done := done + 1), total

        rates, energies = [], []
        for repeat in range(repeats + 1):
            before = joules()
            answer = self._tried(problems, lambda: self._ask(model, _SHORT, settings.generated_tokens))
            if repeat and answer and answer.last.eval_count and answer.last.eval_duration:
                rates.append(answer.last.eval_count / (answer.last.eval_duration * _NANO))
                if before is not None and (after := joules()) is not None:
                    energies.append((after - before) / answer.last.eval_count)
            yield (done := done + 1), total

        running = self._tried(problems, lambda: self._running(model)) or running
        self._tried(problems, lambda: self._unload(model))
        yield SpeedRound(
            context=context,
            loads_s=loads[first:] if counts_loads else [],
            prompts=prompts,
            generation_tokens_per_s=rates,
            joules_per_token=energies if running and running.size_vram else [],
            memory_bytes=running and running.size,
            gpu_memory_bytes=running and running.size_vram,
            problems=list(dict.fromkeys(problems)),
            others=sorted(self._others),
        )

    @staticmethod
    def _tried(problems: list[str], ask: Callable[[], Result]) -> Result | None:
        """What `ask` returns; None where it fails, and then why is among the problems."""
        try:
            return ask()
        except OlpackError as error:
            problems.append(str(error))
            return None

    def concurrency(self, model: str, clients: Sequence[int]) -> Iterator[tuple[int, int] | list[Concurrency]]:
        """So many clients at once, each with a request of its own: (done, total) any number of times, then one entry for each number.

        The server works on as many requests at a time as OLLAMA_NUM_PARALLEL lets it; the others wait, and their waiting counts.
        """
        self._ask(model, _SHORT, 1)
        found = []
        for count in clients:
            started = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                answers = list(pool.map(lambda _: self._answer_or_none(model), range(count)))
            seconds = time.perf_counter() - started
            whole = [answer for answer in answers if answer is not None]
            if not whole:
                raise OlpackError(f"The server answered none of {count} requests at once to {model}.", "Look into its log (OLLAMA_MAX_QUEUE).")
            found.append(
                Concurrency(
                    clients=count,
                    tokens_per_s=sum(answer.last.eval_count or 0 for answer in whole) / seconds,
                    first_token_s=Spread.of([answer.first_s for answer in whole]),
                    failed=count - len(whole),
                )
            )
            yield len(found), len(clients)
        self._unload(model)
        yield found

    def _answer_or_none(self, model: str) -> _Answer | None:
        try:
            return self._ask(model, _SHORT, self._settings.generated_tokens)
        except OlpackError:  # a full queue; how many were refused is part of the result
            return None

    def _ask(self, model: str, characters: int, tokens: int) -> _Answer:
        """Time the answer to a prompt of random words; to another one where the model gets into a loop, which the server breaks off."""
        for _ in range(_PROMPTS):
            if answer := self._stream(model, self._words.text(characters), tokens):
                return answer
        raise OlpackError(
            f"The server broke off {_PROMPTS} answers of {model}, as it does where a model repeats one token.",
            "Ask it something with `ollama run`: if it answers well, look into the server's log.",
        )

    def _stream(self, model: str, prompt: str, tokens: int) -> _Answer | None:
        """A timed answer; None where the server broke it off."""
        options = {"num_ctx": self._settings.context, "num_predict": tokens, "temperature": 0}
        started, first, last = time.perf_counter(), None, None
        for piece in self._client.stream_generate(model, prompt, options, raw=True):
            first, last = first or time.perf_counter() - started, piece
        return _Answer(first, last) if last is not None and last.done else None

    def _running(self, model: str) -> ProcessResponse.Model:
        """What /api/ps says of a loaded model. Ollama matches names without regard to case."""
        for entry in self._client.ps():
            if self._is(entry, model):
                return entry
        raise OlpackError(f"The server unloaded {model} while it was measured.", "Is memory short, or does somebody else use the server?")

    def _unload(self, model: str) -> bool:
        """Have the server unload a model, where it is loaded; True when it is not any more. Models of others stay."""
        loaded = self._client.ps()
        self._warn_of_others(loaded)
        if not any(self._is(entry, model) for entry in loaded):
            return True
        if not self._client.unload(model):
            self._others.add(model)  # deleted while it was loaded: it stays until the server's time for it has passed
            return True
        deadline = time.monotonic() + _UNLOAD_S
        while any(self._is(entry, model) for entry in self._client.ps()):
            if time.monotonic() > deadline:
                problem = f"The server still holds {model}, {_UNLOAD_S:.0f} s after it was asked to unload it."
                raise OlpackError(problem, "If somebody else is using it, wait; else run `ollama stop`.")
            time.sleep(0.05)
        return True

    def _is(self, loaded: ProcessResponse.Model, model: str) -> bool:
        """Whether what is loaded is this model, perhaps under another of its names, such as `:latest`."""
        return same(loaded.model, model) or (loaded.digest is not None and loaded.digest == self._digests.get(model.casefold()))

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {tag.model.casefold(): tag.digest for tag in self._client.tags()}

    def _warn_of_others(self, loaded: Sequence[ProcessResponse.Model]) -> None:
        found = {entry.model for entry in loaded if not any(self._is(entry, ours) for ours in self._models)}
        self._others |= found
        if others := found - self._foreign:
            self._foreign |= others
            stay = "stays" if len(others) == 1 else "stay"
            progress.warn(
                f"The server also runs {', '.join(sorted(others))}, which {stay} loaded: memory is short by that, and speeds come out lower "
                "where somebody uses it."
            )


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
