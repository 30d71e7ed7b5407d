"""Does what is stale, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from olpack import progress
from olpack.errors import OlpackError
from olpack.export.client import one_worker
from olpack.stages.build import Build
from olpack.stages.order import STAGES, all_steps, stage_of
from olpack.stages.plan import check, write_plan
from olpack.stages.records import Step, remember_compared
from olpack.stages.stage import Stage
from olpack.workspace import locked, remove


@one_worker(with_gpu=False)  # the checks start it, and export and comparison use it again
def run(build: Build, only: str | None = None) -> list[Step]:
    """Do what is stale, in order, and return the steps that were done.

    Args:
        only: one stage; those before it must be done already.

    Raises:
        OlpackError: a check failed (before any work), a stage failed, or a stage that `only` needs is stale.
    """
    steps = all_steps(build)
    for step in steps:
        progress.detail(f"{step.unit}: {step.reason or 'up to date'}")
    stale = [step for step in steps if step.stale]
    stages = STAGES
    if only is not None:
        stages = (stage_of(only),)
        _refuse_stale_before(build, stages[0], stale)
        stale = [step for step in stale if step.stage == only]
    if stale:
        check(build, stale, now=True)
    with locked(build.paths.root):
        remove(build.paths.temporary)  # of a comparison that was killed
        for step in steps:
            if not step.stale:
                remember_compared(build.paths, step.unit)
        done: list[Step] = []
        if stale:
            write_plan(build)
        for stage in stages:
            # Looked at again, because what came before has changed its inputs.
            if steps := [step for step in all_steps(build) if step.stale and step.stage == stage.name]:
                with _timed(stage.name):
                    stage.run(build, steps)
                done += steps
        return done


def _refuse_stale_before(build: Build, stage: Stage, stale: list[Step]) -> None:
    if stage.name == "deploy" and not build.server:
        from olpack.deploy.client import OllamaClient

        OllamaClient().require()
    for step in stale:
        if step.stage in stage.needs:
            raise OlpackError(
                f"`olpack {stage.name} {build.recipe.name}` needs {step.unit}, which is stale: {step.reason}.",
                f"Run `olpack {step.stage} {build.recipe.name}`, or `olpack build {build.recipe.name}` for all of it.",
            )


@contextmanager
def _timed(stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    progress.say(f"{stage} done in {progress.duration(time.monotonic() - started)}", stage=stage, seconds=round(time.monotonic() - started, 3))
