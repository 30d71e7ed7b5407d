"""What is done with a finished build: shown, checked again, written into a model store, bundled, pushed, removed from the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olpack import progress
from olpack.errors import OlpackError
from olpack.stages import compare, modelfiles, records
from olpack.stages.build import Build
from olpack.stages.compare import recommended
from olpack.stages.deploy import quant_files, registered
from olpack.stages.order import all_steps


def _exported(build: Build) -> list:
    """The GGUFs of the recipe's quants.

    Raises:
        OlpackError: one of them does not exist, or differs from the recipe.
    """
    for step in all_steps(build):
        if step.stage in ("train", "export") and step.stale:
            raise OlpackError(f"{build.recipe.name} is not built: {step.unit} is stale ({step.reason}).", f"Run `olpack build {build.recipe.name}`.")
    return quant_files(build)


def _modelfiles(build: Build) -> list[Path]:
    if (step := modelfiles.STAGE.step(build)).stale:
        raise OlpackError(
            f"The Modelfiles of {build.recipe.name} are stale: {step.reason}.", f"Run `olpack build {build.recipe.name} --only modelfiles`."
        )
    return [build.paths.modelfile(quant.tag) for quant in build.quants]


def _latest(build: Build) -> str:
    tag = recommended(build)
    return tag if tag in [quant.tag for quant in build.quants] else build.quants[0].tag


def check(build: Build) -> list[str]:
    """Compare what the server has of each tag with the recipe, and the prompts that it makes with the trained ones. Returns one line a tag.

    Raises:
        OlpackError: a tag is not registered, a tag differs from the recipe, or a prompt differs.
    """
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.register import drift
    from olpack.stages.deploy import check_prompts, conversations, served_files

    client, lines = OllamaClient(), []
    client.require()
    for file in served_files(build, client):
        model = f"{build.recipe.name}:{file.tag}"
        shown = client.show(model)
        if shown is None:
            raise OlpackError(f"The Ollama server at {client.url} has no {model}.", f"Run `olpack deploy {build.recipe.name}`.")
        if differences := drift(shown, file, build.package):
            raise OlpackError(f"{model} differs from the recipe: {'; '.join(differences)}.", f"Run `olpack deploy {build.recipe.name}`.")
        lines.append(f"{model}  {check_prompts(build, client, file.tag, conversations(build)).summary()}")
    return lines


def store(build: Build, folder: Path) -> list[str]:
    """Write every quant straight into an Ollama model store, for a server that is not running. Returns one line a tag."""
    from olpack.deploy.ollama_store import write_store

    made = write_store(folder, build.recipe.name, _exported(build), build.package, latest=_latest(build))
    return [f"{record.model}  {record.done}, weights {record.how}" for record in made]


def bundle(build: Build, out: Path | None) -> Path:
    """One archive of GGUFs, Modelfiles, digests and report; by default `NAME.zip` in the build folder."""
    from olpack.deploy.bundle import bundle

    reports = [path for path in (build.paths.report, build.paths.results) if path.is_file()]
    return bundle(build.recipe.name, _exported(build), _modelfiles(build), reports, out or build.paths.root / f"{build.recipe.name}.zip")


def push_to_ollama(build: Build, namespace: str | None, insecure: bool) -> list[str]:
    """Push every registered tag through the server; returns the names it has there."""
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.push import push_to_ollama

    client = OllamaClient()
    client.require()
    return push_to_ollama(client, [record.model for record in _registered(build)], namespace, insecure)


def push_to_hub(build: Build, repo: str, private: bool | None) -> str:
    """Upload the GGUFs with a model card to the Hugging Face Hub; returns the repository's URL."""
    from olpack.compare.results import read_results
    from olpack.compare.table import markdown_table
    from olpack.deploy.hub import hub_card, push_to_hub
    from olpack.workspace import template_source

    if build.paths.base:
        raise OlpackError(
            "The Hub hands Ollama one GGUF, without an adapter beside it.",
            f"Push the merged form: `olpack build {build.recipe.name} --set package=merged`, with `package: merged` in the recipe.",
        )
    files = _exported(build)
    table = "" if compare.STAGE.step(build).stale else markdown_table(read_results(build.paths.results))
    card = hub_card(
        template_source("hub_card.md.j2"),
        repo=repo,
        name=build.recipe.name,
        base=build.recipe.base,
        files=files,
        package=build.package,
        license=build.base.license,
        recommended=_latest(build),
        table=table,
    )
    return push_to_hub(repo, files, _modelfiles(build), build.package, card, private)


def removable(build: Build) -> list[str]:
    """The tags on the server that olpack made for this package."""
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.remove import owned

    client = OllamaClient()
    client.require()
    return owned(client, build.recipe.name, registered(build), adapted=build.recipe.package == "adapter")


def remove(build: Build) -> list[str]:
    """Remove from the server what olpack registered there; files on this machine stay."""
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.remove import remove

    removed = remove(OllamaClient(), build.recipe.name, registered(build), adapted=build.recipe.package == "adapter")
    progress.say(f"the files in {build.paths.root} stay")
    return removed


def _registered(build: Build) -> list:
    records = registered(build)
    if not records:
        raise OlpackError(f"{build.recipe.name} is not registered.", f"Run `olpack deploy {build.recipe.name}`.")
    return records


def facts(build: Build) -> dict[str, Any]:
    """What is known of a build, for `olpack show`."""
    steps = {step.unit: step for step in all_steps(build)}
    deployed = records.result(build.paths, "deploy")
    return {
        "name": build.recipe.name,
        "recipe": str(build.recipe.folder / "recipe.yaml"),
        "base": build.recipe.base,
        "training": {
            key: steps["train"].result[key]
            for key in ("eval_loss_before", "eval_loss_after", "steps", "device", "copied_from")
            if key in steps["train"].result
        },
        "files": {step.inputs["quant"]: step.result for step in steps.values() if step.stage == "export"},
        "recommended": steps["compare"].result.get("recommended"),
        "registered": {record["model"]: record["digest"] for record in deployed.get("registered", [])},
        "capabilities": _capabilities(build),
        "prompt": deployed.get("identity"),
        "stale": {unit: step.reason for unit, step in steps.items() if step.stale},
    }


def _capabilities(build: Build) -> list[str] | None:
    """What the server says that the first registered tag can do: "completion", "tools", "thinking"; None where no server has it. All tags of a
    package have one chat template, which decides this."""
    from olpack.deploy.client import OllamaClient

    if not (build.server and (made := registered(build))):
        return None
    shown = OllamaClient().show(made[0].model)
    return list(shown.capabilities) if shown else None
