"""GGUFs with a model card to the Hugging Face Hub, so that `ollama run hf.co/USER/REPO:Q4_K_M` works.

    push_to_hub("me/coding-assistant", files, modelfiles, package, hub_card(template_source("hub_card.md.j2"), ...))

The Hub hands Ollama a GGUF by the quant at the end of its name, and with it the files `system`, `params` (JSON) and `template` (a Go
template) of the repository: https://huggingface.co/docs/hub/ollama. Without `template` it derives one from the GGUF's chat template,
which may differ from it; the Modelfiles that go along are free of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress
from olpack.deploy.bundle import beside
from olpack.deploy.modelfile import Package
from olpack.deploy.register import TagFile, check_unsplit
from olpack.errors import OlpackError
from olpack.templating import render

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_FOR_OLLAMA = ("template", "system", "params")


def hub_card(
    template_source: str,
    *,
    repo: str,
    name: str,
    base: str,
    files: Sequence[TagFile],
    package: Package,
    license: str | None = None,
    recommended: str | None = None,
    table: str,
) -> str:
    """The README.md of the repository.

    Args:
        template_source: Jinja, of `templates/hub_card.md.j2` or the user's own.
        repo: `user/name`.
        name: of the package.
        base: the base model as the recipe names it. Only a Hub id is linked.
        files: the GGUFs that go there.
        package: what the tags carry.
        license: id such as "apache-2.0"; None: the card names none.
        recommended: tag of the quant to take first.
        table: Markdown with measured figures; "" where nothing was measured.

    Raises:
        OlpackError: the template does not compile, or names something that is not there.
    """
    from huggingface_hub import ModelCardData

    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith(("builtin/", "."))
    matter = ModelCardData(
        base_model=base if on_hub else None,
        license=license.lower() if license else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=["gguf", "ollama", "olpack"],
    )
    quants = [
        {"name": _quant(file), "tag": file.tag, "file": file.path.name, "size": progress.quantity(file.path.stat().st_size, "B")} for file in files
    ]
    first = next((quant for quant in quants if recommended and quant["tag"].lower() == recommended.lower()), quants[0])
    return render(
        template_source,
        "hub_card.md.j2",
        "The model card's template",
        matter=matter.to_yaml(),
        repo=repo,
        name=name,
        base=base,
        base_on_hub=bool(on_hub),
        quants=quants,
        first=first,
        recommended=recommended,
        package=package,
        table=table,
    )


def push_to_hub(
    repo: str,
    files: Sequence[TagFile],
    modelfiles: Sequence[Path],
    package: Package,
    card: str,
    private: bool | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload a package. All files become visible together, in one commit; what is there already is not sent again.

    Args:
        repo: `user/name`; a name alone is taken below the user that is logged in. It is made where it is missing.
        files: the GGUFs.
        modelfiles: one for each; their FROM is made to name the GGUF beside them.
        package: its system prompt, parameters and Go template become the files that Ollama is given.
        card: README.md.
        private: of a repository that is made; None: as the account has it.
        api: of huggingface_hub; None: the Hub, with the token that `hf auth login` or HF_TOKEN left.

    Returns:
        URL of the repository.

    Raises:
        OlpackError: nobody is logged in, a file's name does not end in its quant or is that of one part of a split GGUF (before anything is
            sent), or the Hub refused.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    check_unsplit(files)
    api = api or HfApi()
    if not (api.token or get_token()):
        raise OlpackError("Nobody is logged in to the Hugging Face Hub.", "Run 'hf auth login' with a token that may write, or set HF_TOKEN.")
    for file in files:
        if not re.search(rf"(^|[-_.]){re.escape(_quant(file))}\.gguf$", file.path.name, re.IGNORECASE):
            raise OlpackError(
                f"The Hub finds a quant by the end of its file's name, and {file.path.name} does not end in -{_quant(file)}.gguf.",
                "Rename it, or export it again with olpack.",
            )
    if package.messages:
        progress.warn("The Hub's files for Ollama have no place for messages: models pulled from hf.co lack those of this package.")
    texts = {"README.md": card} | _for_ollama(package)
    texts |= {path.name: beside(path, {file.path.name for file in files}) for path in modelfiles}
    weights = [CommitOperationAdd(file.path.name, file.path) for file in files]
    with _failures(repo):
        made = api.create_repo(repo, private=private, exist_ok=True)
        repo = made.repo_id
        with progress.task(f"uploading to {repo}", sum(file.path.stat().st_size for file in files), "B") as task:
            for file, addition in zip(files, weights, strict=True):
                task.advance(0, note=file.path.name)
                api.preupload_lfs_files(repo, [addition])
                task.advance(file.path.stat().st_size)
        # A prompt or a parameter that the package no longer has must not stay in the repository.
        stale = [name for name in _FOR_OLLAMA if name not in texts and name in api.list_repo_files(repo)]
        api.create_commit(
            repo,
            [
                *weights,
                *(CommitOperationAdd(name, text.encode()) for name, text in texts.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"{', '.join(_quant(file) for file in files)}, from olpack",
        )
    progress.say(f"pushed to {made.url}: ollama run hf.co/{repo}:{_quant(files[0])}")
    return str(made.url)


def _for_ollama(package: Package) -> dict[str, str]:
    """The files that the Hub hands on to Ollama; what the package lacks is left out."""
    parameters = {name: list(value) if isinstance(value, tuple) else value for name, value in package.parameters.items()}
    texts = {
        "template": package.template,
        "system": package.system,
        "params": json.dumps(parameters, indent=2, ensure_ascii=False) + "\n" if parameters else None,
    }
    return {name: text for name, text in texts.items() if text}


def _quant(file: TagFile) -> str:
    """The quant as the Hub spells it: tags are the same in another case."""
    return file.tag.upper()


@contextmanager
def _failures(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = " ".join((error.server_message or str(error)).split())
        remedy = {
            401: "Log in again with 'hf auth login'.",
            403: "The token must be one that may write there: make one at https://huggingface.co/settings/tokens, then 'hf auth login'.",
            404: "Check the name: USER/REPO, where USER is you or an organization that you belong to.",
        }.get(status, "Run this again: what has been uploaded is not sent twice.")
        raise OlpackError(f"The Hugging Face Hub refused the push to {repo} ({status}): {reason}", remedy) from None
    except (HTTPError, OSError) as error:
        raise OlpackError(
            f"The push to {repo} broke off: {' '.join(str(error).split())[:200]}.",
            "Run this again: what has been uploaded is not sent twice.",
        ) from None
    except (ValueError, RuntimeError) as error:  # huggingface_hub raises these for a wrong name, bad metadata, a part that failed
        reason = " ".join(str(error.__cause__ or error).split())
        raise OlpackError(f"The push to {repo} failed: {reason[:300]}", "Fix that, then run this again.") from None
