"""What a stage consists of: a version, its inputs, its checks before any work, and its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from olpack.stages import records
from olpack.stages.build import Build
from olpack.stages.records import Record, Step
from olpack.workspace import value_digest

if TYPE_CHECKING:
    from olpack.export import ExportPlan


def changed_or_damaged(build: Build, unit: str, inputs: dict[str, Any], record: Record) -> str:
    """Why a step that was finished once is stale, "" where it is not."""
    return records.changed(inputs, record.inputs) or records.damage(build.paths, unit, record)


@dataclass(frozen=True)
class Artefact:
    """Something that a build makes and keeps as long as its inputs and its files are the same.

    Attributes:
        name: of the artefact. Its units are called so too, with a quant after a hyphen where there are several.
        version: raised when the same inputs would no longer give the same outputs.
        inputs: everything else that decides the outcome of a unit, by the name that a user knows it by.
        stale: why a unit that was finished once must be made again, "" where it need not.
    """

    name: str
    version: int
    inputs: Callable[[Build, str], dict[str, Any]]
    stale: Callable[[Build, str, dict[str, Any], Record], str] = changed_or_damaged

    def all_inputs(self, build: Build, unit: str = "") -> dict[str, Any]:
        """The inputs of a unit, version included."""
        return {f"olpack's {self.name}": self.version, **self.inputs(build, unit or self.name)}

    def key(self, build: Build, unit: str = "") -> str:
        """Digest of the inputs of a unit."""
        return value_digest(self.all_inputs(build, unit))

    def step(self, build: Build, unit: str = "") -> Step:
        """A unit with the reason why it is stale."""
        unit = unit or self.name
        inputs, record = self.all_inputs(build, unit), records.read(build.paths, unit)
        if record is None:
            path = build.paths.home(unit).stage(unit)
            return Step(self.name, unit, inputs, f"{path} is damaged" if path.is_file() else "not made yet")
        reason = self.stale(build, unit, inputs, record) if record.inputs else "begun and not finished"
        return Step(self.name, unit, inputs, reason, record.result)


@dataclass
class Checks:
    """What is checked before any work.

    Attributes:
        steps: those that will run.
        now: they run as soon as all is checked, and are not only planned.
        exported: what the export would write, once its check ran.
    """

    steps: list[Step]
    now: bool = False
    exported: ExportPlan | None = None

    @property
    def stages(self) -> set[str]:
        """Names of the stages of the steps."""
        return {step.stage for step in self.steps}


@dataclass(frozen=True)
class Stage(Artefact):
    """An artefact with a place in the order of a build.

    Attributes:
        units: names of its steps.
        checked_for: names of the stages before which `check` runs: a stage that takes hours is preceded by the checks of those after it.
        check: raises OlpackError for whatever would fail; writes nothing.
        run: does the stale steps.
        needs: names of the stages that must be done before it runs by itself.
    """

    units: Callable[[Build], list[str]] = field(kw_only=True)
    checked_for: frozenset[str] = field(kw_only=True)
    check: Callable[[Build, Checks], None] = field(kw_only=True)
    run: Callable[[Build, list[Step]], None] = field(kw_only=True)
    needs: tuple[str, ...] = field(default=(), kw_only=True)
