"""Speed, load time and memory as an Ollama server reports them."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

from olpack import progress
from olpack.compare.cache import CONCURRENCY, SPEED_UNITS, Units
from olpack.compare.hardware import joules
from olpack.compare.job import UnitProgress
from olpack.compare.results import Concurrency, Spread
from olpack.compare.speed import ROUNDS, PromptRun, SpeedRound, Visit
from olpack.deploy.names import same
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from olpack.compare.settings import MeasureSettings
    from olpack.deploy.answers import Generated, LoadedModel
    from olpack.deploy.client import OllamaClient

Result = TypeVar("Result")
RunCount = tuple[int, int]  # runs that are done, of how many

_LOADS = 2  # in each round; the very first is discarded
_UNLOAD_S = 30.0
_CHARACTERS_PER_TOKEN = 2.5  # of random words, to begin with; the discarded first call corrects it
_MOST_CHARACTERS_PER_TOKEN = 16.0
_SHORT = 80  # characters of the prompt before a timed generation
_PROMPTS = 6  # tried before a model counts as one that only repeats itself: random words lead small models there in 3 of 12 cases
_NANO = 1e-9


class ServerSpeed:
    """Measures models of one server, round by round.

    The durations of prompt and generation are the server's own; the time to the first token is the client's, from sending the request to the
    first piece of the answer. Every prompt is a run of new random words, because prompt tokens found in the server's cache count as
    processed; prompts are raw, with no template. The first call of each kind is discarded. The measured models are unloaded before, and each
    between its loads; other models stay loaded, and a warning names them. A load is timed until the first token is out; the file may be in the
    server's page cache, so only warm load times are reported. Generation stops where the model ends its turn, at most after
    `generated_tokens`. Where the server breaks off an answer that repeats one token, another prompt is drawn.

    Args:
        client: of the server.
        models: those that are measured, as the server names them. No other is unloaded.
        settings: lengths, tokens and context.
    """

    def __init__(self, client: OllamaClient, models: Sequence[str], settings: MeasureSettings):
        self._client, self._models, self._settings = client, models, settings
        self._words = _Words()
        self._warned: set[str] = set()  # other models that a warning has named
        self._others: set[str] = set()  # other models that were loaded in this round
        self._stuck: set[str] = set()  # models that the server did not unload in time

    def round(self, model: str, repeats: int, first: bool) -> Iterator[RunCount | SpeedRound]:
        """Visit a model: (done, total) any number of times, then the round.

        A figure that the server does not report is missing in the round, and the reason is in its `problems`.

        Args:
            model: as the server names it.
            repeats: timed runs of each figure.
            first: the model was not visited before, so the first of its loads is discarded.

        Raises:
            OlpackError: the server does not run the model at all.
        """
        settings, self._others = self._settings, set()
        problems: list[str] = []
        lengths = dict.fromkeys(min(length, settings.context - settings.generated_tokens) for length in settings.prompt_lengths)
        total = _LOADS + first + (len(lengths) + 1) * (repeats + 1)
        counts = ((done, total) for done in range(1, total + 1))
        for one in self._models:
            self._tried(problems, partial(self._unload, one))
        loads = yield from self._loads(model, first, problems, counts)
        running = self._tried(problems, lambda: self._running(model))
        # A model trained on less context than asked for is loaded with less.
        context = min(settings.context, (running and running.context_length) or settings.context)
        prompts: list[PromptRun] = yield from self._prompts(model, lengths, context, repeats, problems, counts)
        rates, energies = yield from self._generations(model, repeats, problems, counts)
        running = self._tried(problems, lambda: self._running(model)) or running
        self._tried(problems, lambda: self._unload(model))
        if problems and not (loads or prompts or rates or running):  # the server is gone: there is no round
            raise OlpackError(problems[0])
        yield SpeedRound(
            context=context,
            loads_s=loads,
            prompts=prompts,
            generation_tokens_per_s=rates,
            joules_per_token=energies if running and running.size_vram else [],
            memory_bytes=running and running.size,
            gpu_memory_bytes=running and running.size_vram,
            problems=list(dict.fromkeys(problems)),
            others=sorted(self._others),
        )

    def _loads(self, model: str, first: bool, problems: list[str], counts: Iterator[RunCount]) -> Generator[RunCount, None, list[float]]:
        """Seconds of each load; empty where one of them cannot be timed, as of a model that stays loaded."""
        loads: list[float] = []
        timed = not problems
        for number in range(_LOADS + first):
            if timed:
                timed = self._tried(problems, lambda: self._unload(model)) is not None
            # A server that does not run the model at all fails here.
            loaded = self._tried(problems, partial(self._ask, model, 8, 1)) if number else self._ask(model, 8, 1)
            load_s = self._tried(problems, loaded.total_s) if loaded else None
            if load_s is None:
                timed = False
            else:
                loads.append(load_s)
            yield next(counts)
        return loads[first:] if timed else []

    def _prompts(
        self, model: str, lengths: Iterable[int], context: int, repeats: int, problems: list[str], counts: Iterator[RunCount]
    ) -> Generator[RunCount, None, list[PromptRun]]:
        """The timed prompts of each length in tokens."""
        prompts: list[PromptRun] = []
        per_token = _CHARACTERS_PER_TOKEN
        for asked in dict.fromkeys(max(1, min(length, context - self._settings.generated_tokens)) for length in lengths):
            for repeat in range(repeats + 1):
                # The discarded first call counts how many characters a token takes. A prompt over the context would be cut in silence.
                characters = int(asked * per_token)
                answer = self._tried(problems, partial(self._ask, model, characters, 1))
                if answer and (prompt := self._tried(problems, answer.prompt)):
                    tokens, seconds = prompt
                    # A server may report any number, and the next prompt must not grow with it.
                    per_token = min(max(characters / tokens, 0.25), _MOST_CHARACTERS_PER_TOKEN)
                    if repeat:
                        prompts.append(PromptRun(asked=asked, tokens=tokens, seconds=seconds, first_token_s=answer.first_s))
                yield next(counts)
        return prompts

    def _generations(
        self, model: str, repeats: int, problems: list[str], counts: Iterator[RunCount]
    ) -> Generator[RunCount, None, tuple[list[float], list[float]]]:
        """(tokens per second, joules per token) of each timed answer; the first answer is discarded."""
        rates: list[float] = []
        energies: list[float] = []
        for repeat in range(repeats + 1):
            before = joules()
            answer = self._tried(problems, lambda: self._ask(model, _SHORT, self._settings.generated_tokens))
            if repeat and answer and (generated := self._tried(problems, answer.generated)):
                tokens, seconds = generated
                rates.append(tokens / seconds)
                if before is not None and (after := joules()) is not None:
                    energies.append((after - before) / tokens)
            yield next(counts)
        return rates, energies

    @staticmethod
    def _tried(problems: list[str], ask: Callable[[], Result]) -> Result | None:
        """What `ask` returns; None where it fails, and then the reason is among the problems."""
        try:
            return ask()
        except OlpackError as error:
            problems.append(str(error))
            return None

    def concurrency(self, model: str, clients: Sequence[int]) -> Iterator[tuple[int, int] | list[Concurrency]]:
        """Concurrent clients, each with a request of its own: (done, total) any number of times, then one entry for each number of clients.

        The server works on OLLAMA_NUM_PARALLEL requests at a time; the others wait, and their waiting counts.
        """
        self._ask(model, _SHORT, 1)
        measured: list[Concurrency] = []
        for count in clients:
            started = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                answers = list(pool.map(lambda _: self._answer_or_none(model), range(count)))
            seconds = time.perf_counter() - started
            whole = [answer for answer in answers if answer is not None]
            if not whole:
                raise OlpackError(
                    f"The server answered none of {count} requests at once to {model}.", "Look into its log, and raise OLLAMA_MAX_QUEUE."
                )
            measured.append(
                Concurrency(
                    clients=count,
                    tokens_per_s=sum(answer.generated()[0] for answer in whole) / seconds,
                    first_token_s=Spread.of([answer.first_s for answer in whole]),
                    failed=count - len(whole),
                )
            )
            yield len(measured), len(clients)
        yield measured
        self._unload(model)

    def _answer_or_none(self, model: str) -> _TimedAnswer | None:
        try:
            return self._ask(model, _SHORT, self._settings.generated_tokens)
        except OlpackError:  # a full queue; how many were refused is part of the result
            return None

    def _ask(self, model: str, characters: int, tokens: int) -> _TimedAnswer:
        """Time the answer to a prompt of random words. Where the server breaks off an answer in a loop, try another prompt."""
        for _ in range(_PROMPTS):
            if answer := self._stream(model, self._words.text(characters), tokens):
                return answer
        raise OlpackError(
            f"The server broke off {_PROMPTS} answers of {model}, as it does where a model repeats one token.",
            "Ask it something with `ollama run`. If it answers well, look into the server's log.",
        )

    def _stream(self, model: str, prompt: str, tokens: int) -> _TimedAnswer | None:
        """A timed answer; None where the server broke it off."""
        options = {**self._settings.load, "num_ctx": self._settings.context, "num_predict": tokens, "temperature": 0}
        started, first, last = time.perf_counter(), 0.0, None
        for piece in self._client.stream_generate(model, prompt, options, raw=True):
            first, last = first or time.perf_counter() - started, piece
        return _TimedAnswer(first, last) if last is not None and last.done else None

    def _running(self, model: str) -> LoadedModel:
        """The entry of /api/ps of a loaded model. Ollama matches names without regard to case."""
        for entry in self._client.ps():
            if self._is(entry, model):
                return entry
        raise OlpackError(
            f"The server unloaded {model} while it was measured.", "Close other programs if memory is short, and stop other use of the server."
        )

    def _unload(self, model: str) -> bool:
        """Have the server unload a model, where it is loaded; True when it is not any more. Other models stay loaded."""
        loaded = self._client.ps()
        self._warn_of_others(loaded)
        if not any(self._is(entry, model) for entry in loaded):
            return True
        if not self._client.unload(model):
            self._others.add(model)  # deleted while it was loaded: it stays until the server's time for it has passed
            return True
        deadline = time.monotonic() + (0 if model in self._stuck else _UNLOAD_S)  # one that did not go away is not waited for again
        while any(self._is(entry, model) for entry in self._client.ps()):
            if time.monotonic() > deadline:
                self._stuck.add(model)
                problem = f"{model} is still loaded {_UNLOAD_S:.0f} s after the server was asked to unload it."
                raise OlpackError(problem, f"Wait until nobody else uses it, or run `ollama stop {model}`.")
            time.sleep(0.05)
        return True

    def _is(self, loaded: LoadedModel, model: str) -> bool:
        """Whether a loaded model is this one, perhaps under another of its names, such as `:latest`."""
        if same(loaded.model, model):
            return True
        return loaded.digest is not None and loaded.digest == self._digests.get(model.casefold())

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {tag.model.casefold(): tag.digest for tag in self._client.tags()}

    def _warn_of_others(self, loaded: Sequence[LoadedModel]) -> None:
        others = {entry.model for entry in loaded if entry.model and not any(self._is(entry, ours) for ours in self._models)}
        self._others |= others
        if new := others - self._warned:
            self._warned |= new
            stay = "stays" if len(new) == 1 else "stay"
            progress.warn(
                f"The server also runs {', '.join(sorted(new))}, which {stay} loaded: less memory is available, and speeds come out lower "
                "where somebody uses it."
            )


def visit_through_server(server: OllamaClient, models: Sequence[str], known: Sequence[Units], settings: MeasureSettings) -> Visit:
    """Visits through a server."""
    server_speed = ServerSpeed(server, models, settings)

    def visit(index: int, round: int, repeats: int) -> list[OlpackError]:
        units, model = known[index], models[index]
        problems: list[OlpackError] = []
        shown = UnitProgress(f"measuring {model}")
        try:
            for step in server_speed.round(model, repeats, first=round == 0):
                if isinstance(step, SpeedRound):
                    problems += [OlpackError(problem) for problem in step.problems]
                    units.add(SPEED_UNITS[round], step.model_dump(mode="json"), store=not problems)  # else the next comparison tries again
                else:
                    shown.show("speed", *step)
            if round == ROUNDS - 1 and settings.clients and units.lacks(CONCURRENCY):
                for entries in server_speed.concurrency(model, settings.clients):
                    if isinstance(entries, list):
                        units.add(CONCURRENCY, {"clients": [entry.model_dump(mode="json") for entry in entries]})
                    else:
                        shown.show(CONCURRENCY, *entries)
        except OlpackError as error:
            problems.append(error)
        finally:
            shown.close()
        return problems

    return visit


@dataclass(frozen=True)
class _TimedAnswer:
    """An answer: seconds until its first piece came, and its last piece, which has the server's counts and durations (nanoseconds)."""

    first_s: float
    last: Generated

    def total_s(self) -> float:
        """Seconds from the request to the end of the answer, loading included.

        Raises:
            OlpackError: the server does not report it, which holds for the other methods too.
        """
        return self._reported(self.last.total_duration, "duration of its answers") * _NANO

    def prompt(self) -> tuple[int, float]:
        """Tokens of the prompt, and the seconds that they took."""
        tokens = self._reported(self.last.prompt_eval_count, "number of prompt tokens")
        return tokens, self._reported(self.last.prompt_eval_duration, "duration of prompts") * _NANO

    def generated(self) -> tuple[int, float]:
        """Generated tokens, and the seconds that they took."""
        tokens = self._reported(self.last.eval_count, "number of generated tokens")
        return tokens, self._reported(self.last.eval_duration, "duration of generation") * _NANO

    @staticmethod
    def _reported(figure: int | None, what: str) -> int:
        if not figure:
            raise OlpackError(f"The server reports no {what}.", "Update Ollama.")
        return figure


class _Words:
    """Random words, so that no prompt begins as an earlier one does."""

    def __init__(self) -> None:
        self._random = random.Random(time.time_ns())  # the server's cache may still contain prompts of an earlier run

    def text(self, characters: int) -> str:
        words: list[str] = []
        size = 0
        while size < characters:
            word = "".join(self._random.choices(string.ascii_lowercase, k=self._random.randint(3, 9)))
            words.append(word)
            size += len(word) + 1
        return " ".join(words)[:characters]
