"""Speed of all models, in rounds of opposite order: embedded, each visit in a process of its own, or through a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from olpack.compare.job import Job, SpeedJob
from olpack.compare.results import Concurrency, Speed
from olpack.compare.rounds import ROUNDS, SpeedRound, put_together, repeats_of, visits
from olpack.compare.server import ServedSpeed
from olpack.compare.units import Steps, Units, run_worker
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from olpack.compare.settings import MeasureSettings, QuantFile
    from olpack.deploy.client import OllamaClient

UNITS = tuple(f"speed-{number}" for number in range(ROUNDS))
CONCURRENCY = "concurrency"


class Visit(Protocol):
    """Measures one round of one model into its units; what went wrong comes back."""

    def __call__(self, index: int, round: int, repeats: int) -> list[OlpackError]: ...


def measure_speeds(known: Sequence[Units], visit: Visit, repeats: int) -> list[list[OlpackError]]:
    """Visit every model in every round, as far as the rounds are not known yet. A model of which a round gave nothing is not visited again.

    Returns:
        what went wrong, for each model.
    """
    problems: list[list[OlpackError]] = [[] for _ in known]
    for number, index in visits(len(known)):
        gave_nothing = problems[index] and not any(unit in known[index].found for unit in UNITS)
        if UNITS[number] not in known[index].found and not gave_nothing:
            problems[index] += visit(index, number, repeats_of(number, repeats))
    return problems


def embedded(files: Sequence[QuantFile], known: Sequence[Units], job: Job, settings: MeasureSettings) -> Visit:
    """Visits with the embedded engine."""

    def visit(index: int, round: int, repeats: int) -> list[OlpackError]:
        file = files[index]
        plan = SpeedJob(round=round, repeats=repeats, prompt_lengths=list(settings.prompt_lengths), generated_tokens=settings.generated_tokens)
        return run_worker(job.model_copy(update={"path": file.path, "adapter": file.adapter, "speed": plan}), file.quant, known[index])

    return visit


def served(server: OllamaClient, models: Sequence[str], known: Sequence[Units], settings: MeasureSettings) -> Visit:
    """Visits through a server."""
    measured = ServedSpeed(server, models, settings)

    def visit(index: int, round: int, repeats: int) -> list[OlpackError]:
        units, model, problems = known[index], models[index], []
        steps = Steps(f"measuring {model}")
        try:
            for step in measured.round(model, repeats, first=round == 0):
                if isinstance(step, SpeedRound):
                    problems += [OlpackError(problem) for problem in step.problems]
                    units.add(UNITS[round], step.model_dump(mode="json"), keep=not problems)  # else the next comparison tries again
                else:
                    steps.show("speed", *step)
            if round == ROUNDS - 1 and settings.clients and CONCURRENCY not in units.found:
                for step in measured.concurrency(model, settings.clients):
                    if isinstance(step, list):
                        units.add(CONCURRENCY, {"clients": [one.model_dump(mode="json") for one in step]})
                    else:
                        steps.show(CONCURRENCY, *step)
        except OlpackError as error:
            problems.append(error)
        finally:
            steps.close()
        return problems

    return visit


def speed_of(units: Units, *, engine: str, threads: int | None, generated_tokens: int) -> Speed | None:
    """The rounds of a model put together, as far as there are any; None where there is none."""
    rounds = [SpeedRound.model_validate(units.found[unit]) for unit in UNITS if unit in units.found]
    if not rounds:
        return None
    speed = put_together(rounds, engine=engine, threads=threads, generated_tokens=generated_tokens)
    clients = units.found.get(CONCURRENCY, {"clients": []})["clients"]
    return speed.model_copy(update={"concurrency": [Concurrency.model_validate(one) for one in clients]})
