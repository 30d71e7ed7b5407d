"""The stages in their order, and which of their steps are stale.

A step's key is the digest of its inputs: settings it reads, digests of the files it reads, the key of the stage before it, and a version
number that changes when its code comes to mean something else. All keys follow from the recipe and the files, so what a build will do is known
before it does anything. When a step is done, its inputs and the sizes and digests of its outputs are recorded; it is skipped as long as they
are the same.
"""

from __future__ import annotations

from dataclasses import replace

from olpack.stages import compare, deploy, export, modelfiles, train
from olpack.stages.build import Build
from olpack.stages.records import Step
from olpack.stages.stage import Stage

STAGES: tuple[Stage, ...] = (train.STAGE, export.STAGE, modelfiles.STAGE, deploy.STAGE, compare.STAGE)
"""To add a stage, write its module with a `STAGE` and list it here."""

NAMES = tuple(stage.name for stage in STAGES)


def stage_of(name: str) -> Stage:
    """A stage by its name."""
    return next(stage for stage in STAGES if stage.name == name)


def all_steps(build: Build) -> list[Step]:
    """Every step in order, each with the reason why it is stale."""
    steps = [stage.step(build, unit) for stage in STAGES for unit in stage.units(build)]
    if steps[0].stale:  # another run of the same training is another adapter
        steps[1:] = [replace(step, reason=step.reason or "training is done anew") if _depends_on_adapter(build, step) else step for step in steps[1:]]
    return steps


def _depends_on_adapter(build: Build, step: Step) -> bool:
    return step.stage != "modelfiles" and build.paths.home(step.unit) is build.paths
