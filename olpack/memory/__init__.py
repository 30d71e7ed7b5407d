"""What a model needs of a machine's memory, before anything is downloaded, trained or loaded.

    advise(params="8B", vram=8)                      # which quant of a typical 8B fits a GPU of 8 GiB, and why
    estimate_model("Qwen/Qwen3-8B", context=8192)    # what it takes for inference and training, precision by precision

Nothing here repeats llama.cpp's rules. A model without a file becomes a GGUF with a real header and a hole in place of the weights;
llama.cpp chooses the types of its tensors, loads it without allocating, lays out the KV cache, reserves the compute graph, and says what it
would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olpack.errors import OlpackError

if TYPE_CHECKING:
    from olpack.machine import Machine
    from olpack.memory.estimate import Estimate
    from olpack.memory.footprint import Setting
    from olpack.memory.recommend import Advice
    from olpack.memory.subject import Subject

__all__ = ["advise", "estimate_model"]

_CONTEXT = 4096  # where nobody has named one; what olpack gives a package too


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
        vram, ram: in place of what the machine has, in GB as memory is sold (2^30 bytes). What is left out is this machine's.
        context: tokens; by default the package's num_ctx, or 4096.
        kv_type: of the KV cache in llama.cpp: f16, q8_0 or q4_0.
        max_loss: growth of perplexity that is accepted; by default the package's, or 0.03.
        quants: quant types to look at; by default the package's, or a usual choice.
        out: the folder that holds the builds.

    Raises:
        OlpackError: not one thing is asked about, there is no such thing, or llama.cpp does not know it.
    """
    from olpack.memory.published import CHOICE
    from olpack.memory.recommend import recommend_build, recommend_files, recommend_model
    from olpack.memory.subject import find, typical
    from olpack.workspace import packages

    if bool(models) == bool(params):
        raise OlpackError("Say what is to run: a package, GGUFs, or a size.", "For example: `olpack recommend --params 8B --vram 8`.")
    machine = _machine(vram, ram)
    files = [Path(model) for model in models if model.lower().endswith(".gguf")]
    if files and (len(files) < len(models) or quants):
        raise OlpackError("A GGUF is what it is: other models and quant types do not go with it.", "Name GGUFs only, and no --quant.")
    if files:
        for file in files:
            find(str(file))
        return recommend_files(files, machine, _setting(context, kv_type), max_loss)
    if len(models) > 1:
        raise OlpackError("More than one model is named.", "Name one package, or several GGUFs.")
    if models and "/" not in models[0] and (models[0] in packages() or not Path(models[0]).exists()):
        from olpack import recipe
        from olpack.stages.build import Build
        from olpack.workspace import recipe_path

        overrides = [f"quants=[{', '.join(quants)}]"] if quants else []
        build = Build(recipe.load(recipe_path(models[0]), overrides), out, weights=False)
        return recommend_build(build, machine, _setting(context or build.package.parameters["num_ctx"], kv_type), max_loss)
    subject = typical(params) if params else find(models[0])
    return recommend_model(subject, _quants(quants, CHOICE), machine, _setting(context, kv_type), max_loss)


def estimate_model(
    model: str | None = None,
    params: str | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    rank: int = 16,
    tokens: int = 2048,
    quants: Sequence[str] | None = None,
) -> Estimate:
    """What a model takes for inference and training.

    Args:
        model: a folder, a config.json, a GGUF, or a Hub id, of which only config.json is fetched.
        params: in place of `model`: a number of parameters, "8B".
        context, kv_type, quants: as in `advise`.
        rank: of the adapter.
        tokens: that go through the model at once in training.

    Raises:
        OlpackError: not one thing is asked about, there is no such thing, or it makes no model.
    """
    from olpack.memory.estimate import estimate
    from olpack.memory.published import CHOICE
    from olpack.memory.subject import find, typical

    if bool(model) == bool(params):
        raise OlpackError("Say what to estimate: a model, or a size.", "For example: `olpack estimate --params 8B`.")
    subject: Subject = typical(params) if params else find(model)
    return estimate(subject, _quants(quants, CHOICE), _setting(context, kv_type), rank=rank, tokens=tokens)


def _setting(context: int | None, kv_type: str) -> Setting:
    from olpack.memory.footprint import KV_TYPES, Setting

    if kv_type.lower() not in KV_TYPES:
        raise OlpackError(f"'{kv_type}' is no type of the KV cache.", f"It is one of {', '.join(KV_TYPES)}.")
    return Setting(context or _CONTEXT, kv_type.lower())


def _quants(asked: Sequence[str] | None, choice: Sequence[str]) -> list[str]:
    from olpack.quants import quant_type

    return list(dict.fromkeys(quant_type(name).name for name in asked or choice))


def _machine(vram: float | None, ram: float | None) -> Machine:
    from olpack.machine import GIB, Machine, this_machine

    if vram is None and ram is None:
        return this_machine()
    found = this_machine() if vram is None or ram is None else Machine(0)
    gpus = found.gpus if vram is None else (round(vram * GIB),) if vram else ()
    return Machine(found.ram if ram is None else round(ram * GIB), gpus, told=True)
