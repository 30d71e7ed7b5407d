"""One package: its recipe, base, chats, rows and paths. It knows no stage."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olpack.data.dates import is_dated
from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.quants import QuantType, quant_type, type_of_file
from olpack.recipe import Recipe
from olpack.stages import records
from olpack.workspace import BuildPaths, file_digest, value_digest

if TYPE_CHECKING:
    from olpack.data import Chat, Renderer, Source, TokenRow
    from olpack.deploy import Package
    from olpack.model.shape import MetaModel
    from olpack.recipe.schema import DataSource
    from olpack.recipe.tasks import Task


class Build:
    """One package: recipe, base, rows, paths.

    Args:
        recipe: what is asked for.
        out: the folder that holds `NAME/`; by default `build`.
        server: URL of the Ollama server to deploy to, None where there is none or it is not wanted.
        weights: fetch those of the base; without them only its data can be looked at.

    Attributes:
        pre_tokenizer: llama.cpp's name of the pre-tokenizer that splits the rows as training does; None before the export's check.
    """

    def __init__(self, recipe: Recipe, out: Path | None = None, server: str | None = None, weights: bool = True):
        self.recipe = recipe
        self.out = out or Path("build")
        self.server = server
        self.weights = weights
        self.pre_tokenizer: str | None = None

    @cached_property
    def paths(self) -> BuildPaths:
        """The files of this build."""
        root = self.out / self.recipe.name
        if self.recipe.package == "merged":
            return BuildPaths(self.recipe.name, root)
        base = f"{Path(self.recipe.base).name}-{self.base.digest[:12]}"
        served = self.base.gguf.paths[0] if self.base.gguf else None
        return BuildPaths(self.recipe.name, root, BuildPaths(base, self.out / "bases" / base), served)

    @property
    def on_file(self) -> bool:
        """Whether the package is an adapter on a GGUF, which is served as it is: there are no quants to make."""
        return self.recipe.package == "adapter" and self.base.gguf is not None

    @cached_property
    def quants(self) -> list[QuantType]:
        """The quants of the package; of an adapter on a GGUF, the type of that file alone.

        Raises:
            OlpackError: the recipe asks for quants of a file that is served as it is.
        """
        asked = [quant_type(name) for name in self.recipe.quants]
        if not self.on_file or self.base.gguf is None:
            return asked
        own = type_of_file(self.base.gguf.metadata.get("general.file_type"), next(iter(self.base.gguf.types)))
        if self.recipe.origin("quants") != "default" and asked != [own]:
            raise OlpackError(
                f"`quants` goes with `package: merged`: an adapter is served on {self.base.label} as it is, which is {own.name}.",
                "Leave `quants` out of the recipe, or set `package: merged`.",
            )
        return [own]

    @property
    def model_name(self) -> str:
        """What the quants are called in their headers."""
        return self.paths.base.name if self.paths.base else self.recipe.name

    @cached_property
    def base(self) -> Base:
        """The base model, fetched from the Hub where that is needed."""
        from olpack.deploy.bases import resolve_base

        asked = self.recipe
        return resolve_base(asked.base, relative_to=asked.folder, revision=asked.revision, weights=self.weights, served=asked.package == "adapter")

    @cached_property
    def finished_adapter(self) -> Path | None:
        """Folder of the adapter that is trained already; None where one is to be trained."""
        return None if self.recipe.train.adapter is None else self.recipe.folder / Path(self.recipe.train.adapter).expanduser()

    @cached_property
    def finished_adapter_digest(self) -> str:
        """Identity of the files of an adapter that is trained already.

        Raises:
            OlpackError: one of them is not there.
        """
        from olpack.export.adapter import adapter_files

        assert self.finished_adapter is not None  # asked for only where there is one
        files = adapter_files(self.finished_adapter, dequantized=self.recipe.train.merge_base == "dequantized")
        return value_digest({file.name: file_digest(file) for file in files})

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
        """Made once: a data set on the Hub is pinned to one commit for the key and for everything that reads it."""
        sides: tuple[Literal["train", "eval"], ...] = ("train", "eval")
        return {side: [self._source(asked) for asked in self.recipe.data.sources(side)] for side in sides}

    def _source(self, asked: DataSource) -> Source:
        from olpack.data import HubSet, Source

        place = HubSet(asked.hub, asked.split, asked.revision, asked.subset) if asked.hub else self.recipe.folder / (asked.file or "")
        return Source(place, asked.form, asked.weight, asked.file or "")

    @cached_property
    def renderer(self) -> Renderer:
        """Chats to token rows, with the base's tokenizer and chat template."""
        from olpack.data import Renderer

        tokenizer = self.base.tokenizer()
        return Renderer(tokenizer, self.base.end_ids(), self.recipe.data.learn, self._moment if is_dated(tokenizer.chat_template) else None)

    @property
    def _moment(self) -> datetime:
        """When the rows of this build are rendered: always when its first training began, so that a later day changes no row."""
        recorded = records.result(self.paths, "train").get("rendered_at")
        return datetime.fromisoformat(recorded) if recorded else datetime.now().replace(microsecond=0)

    @cached_property
    def chats(self) -> tuple[list[Chat], list[Chat]]:
        """(train, eval) chats in the order of their files, each file parsed once."""
        from olpack.data import load_chats, load_split

        if self.sources("eval"):
            return load_chats(*self.sources("train")), self.held_out_chats
        return load_split(self.sources("train"), eval_share=self.recipe.data.eval_share)

    @cached_property
    def held_out_chats(self) -> list[Chat]:
        """The eval chats alone: where they have a file of their own, the training chats stay unread."""
        from olpack.data import load_chats

        return load_chats(*self.sources("eval")) if self.sources("eval") else self.chats[1]

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

    def settings(self, section: str) -> dict[str, Any]:
        """The settings of one section of the recipe, by their dotted names."""
        return {key: value for key, value in self.recipe.settings().items() if key.startswith(f"{section}.")}

    def data_inputs(self, side: str) -> dict[str, Any]:
        """What decides the rows of "train" or "eval": its sources, or the training sources and the share that is held out; and the loss mask."""
        shared = {} if self.recipe.data.eval else {"data.eval_share": self.recipe.data.eval_share}
        which = "train" if shared else side
        learn = {} if self.recipe.data.learn == "all" else {"data.learn": self.recipe.data.learn}
        return {f"data.{which}": self._data_digests[which]} | shared | learn

    @cached_property
    def _data_digests(self) -> dict[str, str]:
        digests = {}
        for which in ("train", "eval"):
            if sources := self.sources(which):
                plain = len(sources) == 1 and sources[0].form is None and sources[0].weight == 1
                digests[which] = sources[0].digest() if plain else value_digest([[one.digest(), one.form, one.weight] for one in sources])
        return digests
