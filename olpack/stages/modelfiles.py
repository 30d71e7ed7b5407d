"""The modelfiles stage: one Modelfile for each quant, usable with `ollama create -f`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from olpack import progress
from olpack.errors import OlpackError
from olpack.model.chat_template import advertised
from olpack.stages import records
from olpack.stages.build import Build
from olpack.stages.export import ADAPTER
from olpack.stages.records import Step
from olpack.stages.stage import Checks, Stage
from olpack.workspace import template_source, write_atomically


def inputs(build: Build, unit: str) -> dict[str, Any]:
    """Settings and the template."""
    return package_inputs(build) | {
        "num_ctx": build.package.num_ctx,
        "templates/Modelfile.j2": template_source("Modelfile.j2"),
    }


def package_inputs(build: Build) -> dict[str, Any]:
    """Settings that decide what a tag has beside its weights."""
    return build.settings("modelfile") | {"quants": [quant.name for quant in build.quants]} | ({"package": "adapter"} if build.paths.base else {})


def check(build: Build, checks: Checks) -> None:
    """Refuse a system prompt that the chat template refuses, and a template from which Ollama would read another package."""
    _check_served(build)
    if "modelfiles" in checks.stages:
        rendered(build)


def _check_served(build: Build) -> None:
    """Render what every request begins with: the Modelfile's system prompt and messages before a question."""
    package = build.package
    if package.template:  # the server renders with this one, and not with the base's
        if more := advertised(build.renderer.tokenizer.chat_template) - advertised(package.template):
            progress.warn(
                f"The base's chat template supports {' and '.join(sorted(more))} and modelfile.template does not: Ollama then serves the "
                "base's template, and deploy fails. Leave modelfile.template out of the recipe."
            )
        return
    start = ([{"role": "system", "content": package.system}] if package.system else []) + list(package.messages)
    what = " and ".join(name for name, given in (("modelfile.system", package.system), ("modelfile.messages", package.messages)) if given)
    try:
        prompt = build.renderer.text([*start, {"role": "user", "content": "Hello."}], ask=True)
    except Exception as error:  # a template raises whatever its author wrote
        raise OlpackError(
            f"The base's chat template refuses what each request would begin with{f' ({what})' if what else ''}: {' '.join(str(error).split())}.",
            "Leave it out of the recipe, or take a base whose template accepts it.",
        ) from None
    if any(message["content"].strip() not in prompt for message in start):
        progress.warn(f"The base's chat template does not write all of what each request would begin with ({what}), so the model never sees it.")


def run(build: Build, steps: list[Step]) -> None:
    """Write the Modelfiles."""
    from olpack.deploy.modelfile import unrepresentable

    for problem in unrepresentable(build.package):
        progress.warn(f"{problem} `olpack deploy` sends it unchanged.")
    texts = rendered(build)
    for path, text in texts.items():
        write_atomically(path, text)
    if build.paths.base:
        progress.say("the Modelfiles name an ADAPTER, which `ollama create` refuses from Ollama 0.34.1 on; there, `olpack deploy` registers them")
    records.finish(build.paths, steps[0], list(texts), {"from": str(next(iter(texts)))})


def rendered(build: Build) -> dict[Path, str]:
    """The Modelfile of each quant, by its path.

    Raises:
        OlpackError: the template cannot be rendered, or Ollama would read another package from the result than the recipe describes.
    """
    from olpack.deploy.modelfile import differences, parse, render, unrepresentable

    source, texts = template_source("Modelfile.j2"), {}
    for quant in build.quants:
        path = build.paths.modelfile(quant.tag)
        # A model of the server is named as such: its file has no other name there.
        gguf = build.base.tag if build.paths.served and build.base.tag else os.path.relpath(build.paths.gguf(quant.name), path.parent)
        adapter = os.path.relpath(build.paths.gguf(ADAPTER), path.parent) if build.paths.base else None
        text = render(build.package, gguf, source, adapter)
        if not unrepresentable(build.package) and (lost := differences(parse(text), build.package, adapter)):
            raise OlpackError(f"The rendered Modelfile differs from the recipe: {'; '.join(lost)}", "Fix templates/Modelfile.j2.")
        texts[path] = text
    return texts


STAGE = Stage(
    "modelfiles",
    1,
    inputs,
    units=lambda build: ["modelfiles"],
    checked_for=frozenset({"train", "modelfiles", "deploy", "compare"}),
    check=check,
    run=run,
)
