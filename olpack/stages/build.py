"""The order of the stages, what each was made from, what is stale, and what is left to do.

A stage's key is the digest of its inputs: settings it reads, digests of the files it reads, the key of the stage before it, and a version
number that changes when its code comes to mean something else. All keys follow from the recipe and the files, so what a build will do is known
before it does anything. When a stage is done, its inputs and the sizes and digests of its outputs are recorded; it is skipped as long as they hold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olpack import progress
from olpack.data.dates import is_dated
from olpack.errors import OlpackError
from olpack.model.base import Base, resolve
from olpack.quants import gains_by_importance, overridable, quant_type
from olpack.recipe import Recipe
from olpack.recipe.tasks import function_files, task_files
from olpack.workspace import BuildPaths, file_digest, locked, template_source, value_digest, write_atomically

if TYPE_CHECKING:
    from olpack.data import Chat, Renderer, Source, TokenRow
    from olpack.deploy import Package
    from olpack.model.shape import MetaModel
    from olpack.recipe.tasks import Task

STAGES = ("train", "export", "modelfiles", "deploy", "compare")
ADAPTER = "adapter"  # beside the names of quants: what the export makes of an adapter that is not merged

# Decide memory, speed and what is reported of a run, not what the model learns.
_OF_THE_MACHINE = ("train.micro_batch_tokens", "train.gradient_checkpointing", "train.gpus", "train.sharding", "train.launch", "train.trackers")
_OF_THE_MERGE = ("train.merge_base",)  # the adapter is the same
_OF_THE_SPEED = ("num_ctx", "num_batch", "num_gpu", "num_thread", "use_mmap")
# Raised when the same inputs would no longer give the same outputs.
_VERSIONS = {"train": 2, "importance": 1, "sensitivity": 1, "export": 2, "modelfiles": 1, "deploy": 1, "compare": 1}

# Of the training rows, at most so many tokens are read for an importance matrix. 2,048 served as well as 72,895 did (benchmarks/importance.md);
# sixteen times as many leave that for each expert where a token is sent to one in sixteen of them (8 of 128).
IMPORTANCE_TOKENS = 32_768

# Of the answers in the training rows, so many tokens are predicted anew for each matrix of the model to measure its sensitivity. Matrices
# differ by a factor of ten and more, their figures on so many tokens by some percent.
SENSITIVITY_TOKENS = 1_024


@dataclass(frozen=True)
class Step:
    """One piece of a stage that is done or not: the whole stage, or one quant of the export.

    Attributes:
        stage: one of STAGES.
        unit: its name among all steps, "train" or "export-Q4_K_M".
        inputs: all that decides its outcome, by name.
        reason: why it is stale, "" where it is done.
        result: what the run that made it left to know.
    """

    stage: str
    unit: str
    inputs: dict[str, Any]
    reason: str
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return value_digest(self.inputs)

    @property
    def stale(self) -> bool:
        return bool(self.reason)


class Build:
    """One package on its way: recipe, base, paths, steps.

    Args:
        recipe: what is asked for.
        out: the folder that holds `NAME/`; by default `build`.
        server: URL of the Ollama server to deploy to, None where there is none or it is not wanted.
        weights: fetch those of the base; without them only its data can be looked at.
    """

    def __init__(self, recipe: Recipe, out: Path | None = None, server: str | None = None, weights: bool = True):
        self.recipe = recipe
        self.out = out or Path("build")
        self.server = server
        self.weights = weights
        self.quants = [quant_type(name) for name in recipe.quants]

    @cached_property
    def paths(self) -> BuildPaths:
        """Where this build's files lie."""
        root = self.out / self.recipe.name
        if self.recipe.package == "merged":
            return BuildPaths(self.recipe.name, root)
        base = f"{Path(self.recipe.base).name}-{self.base.digest[:12]}"
        return BuildPaths(self.recipe.name, root, BuildPaths(base, self.out / "bases" / base))

    @property
    def model_name(self) -> str:
        """What the quants are called in their headers."""
        return self.paths.base.name if self.paths.base else self.recipe.name

    @cached_property
    def base(self) -> Base:
        """The base model, fetched from the Hub where that is needed."""
        return resolve(self.recipe.base, relative_to=self.recipe.folder, revision=self.recipe.revision, weights=self.weights)

    @cached_property
    def meta_model(self) -> MetaModel:
        """The base without data, for counting."""
        from olpack.model.shape import MetaModel

        return MetaModel(self.base.config, self.base.label)

    def sources(self, which: str) -> list[Source]:
        """Where the rows of `data.train` or `data.eval` come from; empty where the recipe names nothing."""
        return self._sources[which]

    @cached_property
    def _sources(self) -> dict[str, list[Source]]:
        """Made once: a data set on the Hub is pinned to one commit for the key and for all that reads it."""
        from olpack.data import HubSet, Source

        found: dict[str, list[Source]] = {"train": [], "eval": []}
        for which, named in found.items():
            for asked in self.recipe.data.sources(which):
                place = HubSet(asked.hub, asked.split, asked.revision, asked.subset) if asked.hub else self.recipe.folder / asked.file
                named.append(Source(place, asked.form, asked.weight, asked.file or ""))
        return found

    @cached_property
    def renderer(self) -> Renderer:
        """Chats to token rows, with the base's tokenizer and chat template."""
        from olpack.data import Renderer

        tokenizer = self.base.tokenizer()
        return Renderer(tokenizer, self.base.end_ids(), self.recipe.data.learn, self._moment if is_dated(tokenizer.chat_template) else None)

    @property
    def _moment(self) -> datetime:
        """When the rows of this build are rendered: always when its first training began, so that a later day changes no row."""
        recorded = self.result("train").get("rendered_at")
        return datetime.fromisoformat(recorded) if recorded else datetime.now().replace(microsecond=0)

    @cached_property
    def chats(self) -> tuple[list[Chat], list[Chat]]:
        """(train, eval) chats, as the files hold them."""
        from olpack.data import load_sides

        return load_sides(self.sources("train"), self.sources("eval"), eval_share=self.recipe.data.eval_share)

    @cached_property
    def rows(self) -> tuple[list[TokenRow], list[TokenRow]]:
        """(train, eval) rows, as the model sees them."""
        from olpack.data import render_rows

        return render_rows(*self.chats, self.renderer, max_length=self.longest_row)

    @property
    def longest_row(self) -> int:
        """Most tokens that a row may have."""
        return min(self.recipe.data.max_length, self.base.context_length)

    @cached_property
    def tasks(self) -> list[Task]:
        """What every quant is scored on, from the recipe or the file that it names.

        Raises:
            OlpackError: tasks that are wrong, each with its place.
        """
        from olpack.recipe.tasks import load_tasks, parse_task

        asked, folder, system = self.recipe.compare.tasks, self.recipe.folder, self.recipe.modelfile.system
        if isinstance(asked, str):
            return load_tasks(folder / asked, system)
        try:
            return [parse_task(item, f"task {number}", folder, system) for number, item in enumerate(asked, 1)]
        except ValueError as error:
            raise OlpackError(f"{folder / 'recipe.yaml'}: compare.tasks: {error}.") from None

    @property
    def suite_folder(self) -> Path | None:
        """The user's own suites for lm-evaluation-harness: `suites/` beside the recipe, None where there is none."""
        folder = self.recipe.folder / "suites"
        return folder if folder.is_dir() else None

    @cached_property
    def package(self) -> Package:
        """What every tag is registered with, beside its weights; `num_ctx` is always set."""
        from olpack.deploy.modelfile import Package

        asked, parameters = self.recipe.modelfile, dict(self.recipe.modelfile.parameters)
        if "num_ctx" not in parameters:
            parameters["num_ctx"] = min(4096, self.base.context_length)
        return Package(
            system=asked.system,
            template=asked.template,
            parameters=parameters,
            license=asked.license,
            messages=tuple(message.model_dump() for message in asked.messages),
        )

    # -- what each step is made from ----------------------------------------------------------------------------------------------------

    def inputs(self, stage: str, quant: str = "") -> dict[str, Any]:
        """All that decides the outcome of a step, by the name that a user knows it by."""
        made = {f"olpack's {stage}": _VERSIONS[stage]}
        if stage == "train":
            settings = {key: value for key, value in self._settings("train").items() if key not in _OF_THE_MACHINE + _OF_THE_MERGE}
            # Held-out rows can choose which step's adapter is kept, and when to stop.
            chosen = self.recipe.train.keep == "best" or self.recipe.train.patience
            return made | {"base": self.base.digest} | self._data("train") | (self._data("eval") if chosen else {}) | settings
        if stage in ("importance", "sensitivity", "export"):
            from olpack.llamacpp.source import VERSION

            made["llama.cpp"] = VERSION
            trained = {"training": value_digest(self.inputs("train")), "adapter": self.result("train").get("adapter_digest")}
            if (merge_base := self.recipe.train.merge_base) != "original":
                trained["train.merge_base"] = merge_base
            if stage == "importance":
                return made | trained | {"tokens": IMPORTANCE_TOKENS}
            if stage == "sensitivity":
                return made | trained | {"tokens": SENSITIVITY_TOKENS, "importance": self._importance_key}
            made |= {"quant": quant, "name": self.paths.home(f"export-{quant}").name}
            if quant != ADAPTER and (absent := self.base.absent_tokens):
                made["pinned in the chat template"] = absent
            if self.paths.base and quant != ADAPTER:
                return made | {"base": self.base.digest}
            return made | trained | self._choices(quant)
        served = self._settings("modelfile") | {"quants": self.recipe.quants} | ({"package": "adapter"} if self.paths.base else {})
        if stage == "modelfiles":
            return made | served | {"num_ctx": self.package.num_ctx, "templates/Modelfile.j2": template_source("Modelfile.j2")}
        files = {"files": {name: value_digest(self.inputs("export", name)) for name in self._exported}}
        if stage == "deploy":
            return made | served | files | {"server": self.server}
        asked = {name: self.package.parameters.get(name) for name in _OF_THE_SPEED} | {"modelfile.system": self.recipe.modelfile.system}
        if self.tasks:
            asked["compare.tasks"] = value_digest([[task.messages, task.check, [str(part) for part in task.expected]] for task in self.tasks])
            asked |= {str(path): file_digest(path) for path in function_files(self.tasks)}
        if self.recipe.compare.suites and self.suite_folder:
            asked |= {str(path): file_digest(path) for path in task_files(self.suite_folder)}
        return made | files | self._data("eval") | self._settings("compare") | asked | {"templates/report.html.j2": template_source("report.html.j2")}

    def _choices(self, quant: str) -> dict[str, Any]:
        """What the recipe's `export` decides for one quant: nothing, where its file would be the same."""
        asked, made = self.recipe.export, {}
        if asked.tensor_types and overridable(quant_type(quant)):
            made["export.tensor_types"] = [list(pair) for pair in asked.tensor_types.items()]  # their order counts
        if self.weighs(quant):
            made["export.importance"] = self._importance_key
        if quant in self._budgets:
            made["sensitivity"] = value_digest(self.inputs("sensitivity"))
        return made

    @property
    def _importance_key(self) -> str | None:
        """Identity of the importance matrix, None where there is none."""
        asked = self.recipe.export.importance
        if asked == "none":
            return None
        return value_digest(self.inputs("importance")) if asked == "train" else self._importance_digest

    def weighs(self, quant: str) -> bool:
        """Whether an importance matrix decides anything in the file of a quant."""
        return self.recipe.export.importance != "none" and gains_by_importance(quant_type(quant), self.recipe.export.tensor_types)

    @property
    def importance_file(self) -> Path | None:
        """The importance matrix that the recipe asks for, which may still have to be collected.

        Raises:
            OlpackError: the recipe names a file that is not there.
        """
        asked = self.recipe.export.importance
        if asked in ("none", "train"):
            return self.paths.importance if asked == "train" else None
        path = self.recipe.folder / asked
        if not path.is_file():
            raise OlpackError(f"There is no {path}, which `export.importance` names.", "Say `train`, `none`, or a file relative to the recipe.")
        return path

    @cached_property
    def _importance_digest(self) -> str:
        return file_digest(self.importance_file)

    def uncollected(self, steps: list[Step]) -> list[Step]:
        """Of these steps, the quants that wait for an importance matrix to be collected."""
        if self.recipe.export.importance != "train" or not (self.step("train").stale or self.step("importance").stale):
            return []
        return [step for step in steps if step.stage == "export" and self.weighs(step.inputs["quant"])]

    def unmeasured(self, steps: list[Step]) -> list[Step]:
        """Of these steps, the budgets that wait for the sensitivity to be measured."""
        if not (self.step("train").stale or self.step("sensitivity").stale):
            return []
        return [step for step in steps if step.stage == "export" and step.inputs["quant"] in self._budgets]

    @property
    def _budgets(self) -> set[str]:
        return {quant.name for quant in self.quants if quant.budget}

    @property
    def unweighed(self) -> list[str]:
        """The recipe's quants to which an importance matrix is nothing: one can be collected on them."""
        return [quant.name for quant in self.quants if not self.weighs(quant.name)]

    @property
    def _exported(self) -> list[str]:
        """What the export makes: the recipe's quants, and the adapter where it is not merged into them."""
        return [quant.name for quant in self.quants] + ([ADAPTER] if self.paths.base else [])

    def _data(self, side: str) -> dict[str, Any]:
        """What decides the rows of one side: its sources, or the training sources and the share that is set apart; and which tokens are targets."""
        shared = {} if self.recipe.data.eval else {"data.eval_share": self.recipe.data.eval_share}
        which = "train" if shared else side
        learn = {} if self.recipe.data.learn == "all" else {"data.learn": self.recipe.data.learn}
        return {f"data.{which}": self._data_digests[which]} | shared | learn

    @cached_property
    def _data_digests(self) -> dict[str, str]:
        digests = {}
        for which in ("train", "eval"):
            if found := self.sources(which):
                plain = len(found) == 1 and found[0].form is None and found[0].weight == 1
                digests[which] = found[0].digest() if plain else value_digest([[one.digest(), one.form, one.weight] for one in found])
        return digests

    def _settings(self, section: str) -> dict[str, Any]:
        return {key: value for key, value in self.recipe.settings().items() if key.startswith(f"{section}.")}

    # -- what is done -------------------------------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Every step in order, each with the reason why it is stale."""
        units = [("export", name) for name in self._exported] + [("modelfiles", ""), ("deploy", ""), ("compare", "")]
        train = self.step("train")
        after = [self.step(stage, quant) for stage, quant in units if stage != "deploy" or self.server]
        if train.stale:  # another run of the same training is another adapter
            after = [replace(step, reason=step.reason or "training is done anew") if self._holds_training(step) else step for step in after]
        return [train, *after]

    def _holds_training(self, step: Step) -> bool:
        return step.stage != "modelfiles" and self.paths.home(step.unit) is self.paths

    def step(self, stage: str, quant: str = "") -> Step:
        unit = f"{stage}-{quant}" if quant else stage
        inputs = self.inputs(stage, quant)
        record = self._record(unit)
        if record is None:
            return Step(stage, unit, inputs, "not made yet")
        before = record["inputs"]
        if not before:  # `remember` wrote it
            return Step(stage, unit, inputs, "begun and not finished", record["result"])
        served = record["result"].get("served", bool(before.get("server")))
        if stage == "compare":  # earlier versions had the server's address here: figures taken through a server hold while it is down
            before = {name: value for name, value in before.items() if name != "server"}
        if stage == "deploy" and self._registers_all(inputs, before):
            inputs = before
        changed = [name for name in inputs | before if inputs.get(name) != before.get(name)]
        reason = f"{', '.join(changed)} changed" if changed else self._damage(record, self.paths.home(unit).root)
        if stage == "compare" and not reason and self.server and not served:
            reason = "speed was measured without the server that answers now"
        if stage == "deploy" and not reason:
            reason = self._unregistered(record["result"]["registered"])
        return Step(stage, unit, inputs, reason, record["result"])

    @staticmethod
    def _registers_all(inputs: dict[str, Any], before: dict[str, Any]) -> bool:
        """Whether a deploy that was asked for is a part of the one that is done: the same but for fewer quants, as `--quant` asks for."""
        files, done = inputs["files"], before.get("files") or {}
        same = all(inputs.get(name) == before.get(name) for name in inputs.keys() | before.keys() if name not in ("quants", "files"))
        return same and all(done.get(name) == key for name, key in files.items()) and set(inputs["quants"]) <= set(before.get("quants") or [])

    def result(self, unit: str) -> dict[str, Any]:
        """What the last run of a step left to know, whether it still holds or not; empty before the first."""
        return (self._record(unit) or {}).get("result", {})

    def _record(self, unit: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.paths.home(unit).stage(unit).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _damage(self, record: dict[str, Any], root: Path) -> str:
        for name, (size, modified, digest) in record["outputs"].items():
            path = root / name
            if not path.is_file():
                return f"{path} is gone"
            found = path.stat()
            if found.st_size != size or (found.st_mtime_ns != modified and file_digest(path) != digest):
                return f"{path} was changed"
        return ""

    def _unregistered(self, registered: list[dict[str, Any]]) -> str:
        from olpack.deploy.client import OllamaClient

        there = {tag.model: tag.digest for tag in OllamaClient().tags()}
        wanted = {quant.tag.lower() for quant in self.quants}  # a tag of an earlier recipe may be gone
        made_now = [made for made in registered if made["model"].rpartition(":")[2].lower() in wanted]
        lost = [made["model"] for made in made_now if there.get(made["model"]) != made["digest"]]
        return f"the server has no {', '.join(lost)} as it was registered" if lost else ""

    def finish(self, step: Step, outputs: list[Path], result: dict[str, Any], digests: dict[Path, str] | None = None) -> None:
        """Record that a step is done: its inputs, its result, and how to tell that its outputs are still whole."""
        described, root = {}, self.paths.home(step.unit).root
        for path in outputs:
            found = path.stat()
            digest = (digests or {}).get(path) or file_digest(path)
            described[str(path.relative_to(root))] = [found.st_size, found.st_mtime_ns, digest]
        self._write_record(step.unit, {"inputs": step.inputs, "outputs": described, "result": result})

    def remember(self, step: Step, result: dict[str, Any]) -> None:
        """Keep what an unfinished step has done so far. It stays stale."""
        self._write_record(step.unit, {"inputs": {}, "outputs": {}, "result": result})

    def _write_record(self, unit: str, record: dict[str, Any]) -> None:
        write_atomically(self.paths.home(unit).stage(unit), json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    # -- doing it -----------------------------------------------------------------------------------------------------------------------

    def run(self, only: str | None = None) -> list[Step]:
        """Do what is stale, in order, and return the steps that were done.

        Args:
            only: one stage; those before it must be done already.

        Raises:
            OlpackError: a check failed (before any work), a stage failed, or a stage that `only` needs is stale.
        """
        from olpack.stages import work

        stale = [step for step in self.steps() if step.stale]
        if only is not None:
            self._refuse_stale_before(only, stale)
            stale = [step for step in stale if step.stage == only]
        if stale:
            from olpack.stages.plan import check

            check(self, stale)
        with locked(self.paths.root):
            done: list[Step] = []
            if stale:
                from olpack.stages.plan import write_plan

                write_plan(self)
            for stage in STAGES if only is None else [only]:
                # Looked at again, because what came before has changed its inputs.
                if todo := [step for step in self.steps() if step.stale and step.stage == stage]:
                    with self._timed(stage):
                        getattr(work, stage)(self, todo)
                    done += todo
            return done

    def _refuse_stale_before(self, only: str, stale: list[Step]) -> None:
        if only == "deploy" and not self.server:
            from olpack.deploy.client import OllamaClient

            OllamaClient().require()
        needed = {"export": ["train"], "deploy": ["train", "export"], "compare": ["train", "export", "deploy"]}
        for step in stale:
            if step.stage in needed.get(only, []):
                raise OlpackError(
                    f"`olpack {only} {self.recipe.name}` needs {step.unit}, which is stale: {step.reason}.",
                    f"Run `olpack {step.stage} {self.recipe.name}`, or `olpack build {self.recipe.name}` for all of it.",
                )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        progress.say(f"{stage} done in {progress.duration(time.monotonic() - started)}", stage=stage, seconds=round(time.monotonic() - started, 3))
