"""`olpack recommend` and `olpack estimate`: which quant fits a machine, and what a model takes, by its name.

advise(params="8B", vram=8)                      # which quant of a typical 8B fits a GPU of 8 GiB, and why
estimate_model("Qwen/Qwen3-8B", context=8192)    # what it takes for inference and training, precision by precision
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from olpack import recipe
from olpack.compare.results import read_results
from olpack.errors import OlpackError
from olpack.machine import GIB, Machine, this_machine
from olpack.memory.estimate import MemoryEstimate, estimate
from olpack.memory.footprint import KV_TYPES, plan, read
from olpack.memory.job import Setting
from olpack.memory.model_source import Subject, find, typical
from olpack.memory.published import CHOICE
from olpack.memory.recommend import Advice, recommend, recommend_files, recommend_model
from olpack.quants import quant_type
from olpack.stages.build import Build
from olpack.workspace import packages, recipe_path

_CONTEXT = 4096  # tokens, by default; a package's default, too


def advise(
    models: Sequence[str] = (),
    params: str | None = None,
    vram: float | None = None,
    ram: float | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    max_loss: float | None = None,
    quants: Sequence[str] | None = None,
    out: Path | None = None,
) -> Advice:
    """Which quant to take on this machine, or on the one described.

    Args:
        models: one package, folder or Hub id, or any number of GGUFs of one model.
        params: in place of `models`: a number of parameters, "8B".
        vram, ram: in place of this machine's memory, in GiB; what is left out is this machine's.
        context: tokens; by default the package's num_ctx, or 4096.
        kv_type: of the KV cache in llama.cpp: f16, q8_0 or q4_0.
        max_loss: growth of perplexity that is accepted; by default the package's, or 0.03.
        quants: quant types to look at; by default the package's, or a usual choice.
        out: the folder of the builds.

    Raises:
        OlpackError: both or neither of models and size, no such model, or one that llama.cpp does not know.
    """
    if bool(models) == bool(params):
        raise OlpackError("Either models (a package, GGUFs) or a size must be named.", "For example: `olpack recommend --params 8B --vram 8`.")
    machine = _machine(vram, ram)
    files = [Path(model) for model in models if model.lower().endswith(".gguf")]
    if files and (len(files) < len(models) or quants):
        raise OlpackError("GGUFs cannot be combined with other models or with quant types.", "Name GGUFs only, and no --quant.")
    if files:
        for file in files:
            find(str(file))
        return recommend_files(files, machine, _setting(context, kv_type), max_loss)
    if len(models) > 1:
        raise OlpackError("More than one model is named.", "Name one package, or several GGUFs.")
    if models and "/" not in models[0] and (models[0] in packages() or not Path(models[0]).exists()):
        overrides = [f"quants=[{', '.join(quants)}]"] if quants else []
        build = Build(recipe.load(recipe_path(models[0]), overrides), out, weights=False)
        num_ctx = build.package.num_ctx
        assert isinstance(num_ctx, int)  # a package's parameters are checked, and num_ctx is always among them
        return _advise_build(build, machine, _setting(context or num_ctx, kv_type), max_loss)
    subject = typical(params) if params else find(models[0])
    return recommend_model(subject, _quants(quants, CHOICE), machine, _setting(context, kv_type), max_loss)


def _advise_build(build: Build, machine: Machine, setting: Setting, max_loss: float | None) -> Advice:
    """Advice on a package: on its GGUFs where they are built, with the figures of its comparison where there is one."""
    results = read_results(build.paths.results) if build.paths.results.is_file() else None
    paths = [build.paths.gguf(quant.name) for quant in build.quants]
    subject = Subject(build.recipe.base, build.base.config)
    if all(path.is_file() for path in paths):
        footprints = [read(path, setting)[0] for path in paths]
    else:
        footprints = plan(subject, [quant.name for quant in build.quants], setting)[0]
    accepted = build.recipe.compare.max_loss if max_loss is None else max_loss
    return recommend(build.recipe.name, subject.model.parameters.text, footprints, machine, setting, accepted, results)


def estimate_model(
    model: str | None = None,
    params: str | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    rank: int = 16,
    tokens: int = 2048,
    quants: Sequence[str] | None = None,
) -> MemoryEstimate:
    """What a model takes for inference and training.

    Args:
        model: a folder, a config.json, a GGUF, or a Hub id, of which only config.json is fetched.
        params: in place of `model`: a number of parameters, "8B".
        context, kv_type, quants: as in `advise`.
        rank: of the adapter.
        tokens: that go through the model at once in training.

    Raises:
        OlpackError: both or neither of model and size, no such model, or a configuration that makes no model.
    """
    if model and not params:
        subject = find(model)
    elif params and not model:
        subject = typical(params)
    else:
        raise OlpackError("One model or one size must be named.", "For example: `olpack estimate --params 8B`.")
    return estimate(subject, _quants(quants, CHOICE), _setting(context, kv_type), rank=rank, tokens=tokens)


def _setting(context: int | None, kv_type: str) -> Setting:
    if kv_type.lower() not in KV_TYPES:
        raise OlpackError(f"The KV cache cannot have the type '{kv_type}'.", f"Use one of {', '.join(KV_TYPES)}.")
    return Setting(context or _CONTEXT, kv_type.lower())


def _quants(names: Sequence[str] | None, choice: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(quant_type(name).name for name in names or choice))


def _machine(vram: float | None, ram: float | None) -> Machine:
    if vram is None and ram is None:
        return this_machine()
    found = this_machine() if vram is None or ram is None else Machine(0)
    gpus = found.gpus if vram is None else (round(vram * GIB),) if vram else ()
    return Machine(found.ram if ram is None else round(ram * GIB), gpus, given=True)
