"""The deploy stage: every quant registered, the prompt proved to be the trained one, and one tag asked for an answer.

What was proved is recorded: prompts are compared again only where something that makes them changed, and only weights or a template that were
not asked yet are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from olpack import progress
from olpack.errors import OlpackError
from olpack.stages.build import Build, Step
from olpack.workspace import value_digest

if TYPE_CHECKING:
    from olpack.data import TokenRow
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.identity import Identity
    from olpack.deploy.register import Registered, TagFile

_LONG = 2  # long held-out requests among the conversations that are compared


def check_server(build: Build) -> None:
    """Refuse now what the server would not do.

    Raises:
        OlpackError: no server answers, it is too old, or it cannot be given a model with an adapter.
    """
    from olpack.deploy.client import OllamaClient

    client = OllamaClient()
    if store := _adapter_store(build, client, client.require()):
        progress.warn(
            f"{_no_adapters(client)}: deploy writes the tags into its model store, {store}. Its files' ADAPTER line is refused by `ollama create`."
        )


def _no_adapters(client: OllamaClient) -> str:
    return f"Ollama {client.version()} creates no models with adapters (since 0.34.1), and serves those that are there"


def _adapter_store(build: Build, client: OllamaClient, version: str):
    """Where tags with an adapter are written to, for a server that creates none; None where it creates them, or the package has none."""
    from olpack.deploy.client import creates_adapters
    from olpack.deploy.store import store_of

    if not build.paths.base or creates_adapters(version):
        return None
    try:
        return store_of(client)
    except OlpackError as error:
        raise OlpackError(
            f"{_no_adapters(client)}. They can be written into its model store, but {error.problem.rstrip('.')}.",
            f"Set `package: merged` in the recipe, or build with --no-deploy and run `olpack deploy {build.recipe.name} --store DIR` where the "
            f"server keeps its models. {error.remedy}",
        ) from None


def length_warnings(build: Build, held_out: list[TokenRow]) -> Iterator[str]:
    """What a server will do to long prompts and endless answers of this package, one sentence each."""
    from olpack.deploy.parameters import answer_warnings, prompt_warnings

    yield from answer_warnings(build.package.parameters)
    yield from prompt_warnings({row.source: _before_the_answer(row) for row in held_out}, build.package.num_ctx)


def _before_the_answer(row: TokenRow) -> int:
    """Tokens of a row before its last answer."""
    return max((index for index, is_target in enumerate(row.loss_mask) if is_target and not (index and row.loss_mask[index - 1])), default=0)


def conversations(build: Build) -> list[list[dict]]:
    """What prompts are compared on beside the made-up ones: what every quant answers, and the longest held-out requests that the server takes."""
    from olpack.stages.work import held_out_requests, questions

    asked, context = questions(build), build.package.num_ctx
    package = build.package
    system = [{"role": "system", "content": package.system}] if package.system else []

    def count(request: list[dict]) -> int:
        return len(build.renderer.prompt([*(system if request[0]["role"] != "system" else []), *package.messages, *request]))

    # By characters first: a token has one or more, but for a few languages, so shorter requests than these cannot be among the longest.
    by_size = sorted(held_out_requests(build), key=lambda request: -sum(len(turn["content"] or "") for turn in request))[: 16 * _LONG]
    long = [request for request in by_size if request not in asked and context // 2 < count(request) < context]
    return asked + sorted(long, key=count)[-_LONG:]


def deploy(build: Build, steps: list[Step]) -> None:
    """Register every quant with the server, prove that the prompt is the trained one, and have one tag answer."""
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.register import register
    from olpack.deploy.store import place
    from olpack.stages.work import registered, registrable

    client, (step,) = OllamaClient(), steps
    version = client.require()
    store = _adapter_store(build, client, version)
    known = {record.model: record for record in registered(build)}
    earlier = build.result("deploy").get("proved", {})
    proved = earlier if earlier.get("server") == [client.url, version] else {"server": [client.url, version]}
    files = registrable(build)
    for file in files:
        if store:
            record = place(client, store, build.recipe.name, file, build.package)
        else:
            (record,) = register(client, build.recipe.name, [file], build.package, before=list(known.values()))
        known[record.model] = record
        # Written down after each tag: what is on the server must be known, to be removed or left alone, should the next one fail.
        build.remember(step, {"registered": [asdict(one) for one in known.values()], "proved": proved})
    proved = _prove(build, client, files, proved, partial(_remember, build, step, known))
    said = {"identity": proved["summary"], "identity_warnings": proved["warnings"]}
    build.finish(step, [], {"registered": [asdict(record) for record in known.values()], "proved": proved, **said})


def _remember(build: Build, step: Step, known: dict[str, Registered], proved: dict) -> None:
    build.remember(step, {"registered": [asdict(record) for record in known.values()], "proved": proved})


def _prove(build: Build, client: OllamaClient, files: list[TagFile], proved: dict, remember: Callable[[dict], None]) -> dict:
    """Compare prompts and ask one tag, as far as neither is done for what is registered; what is proved by then.

    All quants of an export have one chat template and one vocabulary, and registering has read each tag's template back: the prompts of the
    smallest are those of all. Tokens are a matter of the vocabulary: where that was compared before, a new text in every prompt takes one
    comparison of tokens, and the longest request another.
    """
    from olpack.deploy.smoke import smoke

    asked, package = conversations(build), build.package
    smallest = min(files, key=lambda file: file.path.stat().st_size)
    weights = {file.tag: _weights(build, file) for file in files}
    compared, answered = proved.get("compared", []), proved.get("answered", [])
    prompts = value_digest([weights[smallest.tag], package.system, list(package.messages), package.num_ctx, asked])
    if proved.get("prompts") == prompts:
        progress.say(f"{proved['summary']}, as before: no part of the prompts changed")
    else:
        identity = check_prompts(build, client, smallest.tag, asked, all_tokens=weights[smallest.tag] not in compared)
        progress.say(identity.summary())
        proved = proved | {
            "prompts": prompts,
            "summary": identity.summary(),
            "warnings": identity.warnings(),
            "compared": sorted({*compared, weights[smallest.tag]}),
        }
        remember(proved)
    if fresh := [file for file in files if weights[file.tag] not in answered]:
        smoked = smoke(client, f"{build.recipe.name}:{fresh[0].tag}", asked[0])
        if smoked.loops:
            progress.warn(smoked.warning())
        elif not smoked.stopped:
            progress.say(f"{smoked.model} answers; it was cut after {smoked.tokens} tokens, as asked")
        proved = proved | {"answered": sorted({*answered, *weights.values()})}
    return proved


def check_prompts(build: Build, client: OllamaClient, tag: str, asked: list[list[dict]], all_tokens: bool = True) -> Identity:
    """Compare the prompts of one tag with the trained ones. What differs in a made-up conversation alone is warned of.

    Raises:
        OlpackError: a prompt of the user's own data differs.
    """
    from olpack.deploy.identity import check_identity

    identity = check_identity(client, f"{build.recipe.name}:{tag}", build.renderer.tokenizer, asked, tokens="all" if all_tokens else "few")
    identity.require()
    for warning in identity.warnings():
        progress.warn(warning)
    return identity


def _weights(build: Build, file: TagFile) -> str:
    """Identity of what makes a tag's answers: its weights, their adapter, and the template in place of theirs."""
    adapter = build.result("export-adapter")["sha256"] if file.adapter else None
    return value_digest([file.sha256, adapter, build.package.template])
