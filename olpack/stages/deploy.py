"""The deploy stage: every quant registered, the prompt proved to be the trained one, and one tag asked for an answer.

What was proved is recorded: prompts are compared again only where something that makes them changed, and only weights or a template that were
not asked yet are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olpack import progress
from olpack.errors import OlpackError
from olpack.model.chat_template import SERVER_VARIABLES, pins_for
from olpack.stages import export, records
from olpack.stages.build import Build
from olpack.stages.export import ADAPTER
from olpack.stages.modelfiles import package_inputs
from olpack.stages.prompts import check_questions, held_out_requests, questions
from olpack.stages.records import Record, Step
from olpack.stages.stage import Checks, Stage
from olpack.workspace import make_user_cache, user_cache, value_digest, write_atomically

if TYPE_CHECKING:
    from olpack.data import TokenRow
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.prompt_identity import Identity
    from olpack.deploy.register import Registered, TagFile

_LONG = 2  # long held-out requests among the conversations that are compared


def units(build: Build) -> list[str]:
    """None where no server is wanted."""
    return ["deploy"] if build.server else []


def inputs(build: Build, unit: str) -> dict[str, Any]:
    """Settings, files and the server."""
    return package_inputs(build) | exported_files(build) | {"server": build.server}


def exported_files(build: Build) -> dict[str, Any]:
    """Identity of each file that the export makes, under one name."""
    return {"files": {unit.removeprefix("export-"): export.STAGE.key(build, unit) for unit in export.units(build)}}


def stale(build: Build, unit: str, inputs: dict[str, Any], record: Record) -> str:
    """Why a finished deploy must run again: it registered other things, or the server has them no more."""
    changed = "" if _registers_all(inputs, record.inputs) else records.changed(inputs, record.inputs)
    return changed or records.damage(build.paths, unit, record) or _unregistered(build, record)


def _registers_all(inputs: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a deploy is part of the one that is done: the same with fewer quants, as `--quant` asks for."""
    files, done = inputs["files"], before.get("files") or {}
    same = all(inputs.get(name) == before.get(name) for name in inputs.keys() | before.keys() if name not in ("quants", "files"))
    return same and all(done.get(name) == key for name, key in files.items()) and set(inputs["quants"]) <= set(before.get("quants") or [])


def _unregistered(build: Build, record: Record) -> str:
    from olpack.deploy.client import OllamaClient

    there = {tag.model: tag.digest for tag in OllamaClient().tags()}
    wanted = {quant.tag.lower() for quant in build.quants}  # a tag of an earlier recipe may be gone
    made_now = [made for made in record.result["registered"] if made["model"].rpartition(":")[2].lower() in wanted]
    lost = [made["model"] for made in made_now if there.get(made["model"]) != made["digest"]]
    return f"the server has no {', '.join(lost)} as it was registered" if lost else ""


def check(build: Build, checks: Checks) -> None:
    """Refuse a server that would not take the tags, and warn of what it will do to long prompts and answers."""
    # Reading every row takes longer than registering a changed system prompt does: it is done where rows are needed anyway.
    for warning in length_warnings(build, build.rows[1] if checks.stages & {"train", "export", "compare"} else []):
        progress.warn(warning)
    if moment := build.renderer.moment:
        progress.warn(
            f"The base's chat template writes the date. All rows are rendered at {moment:%Y-%m-%d %H:%M:%S}, so one date is trained, "
            "and the server writes that of each day."
        )
    if "deploy" in checks.stages:
        check_questions(build)
        _check_server(build)


def _check_server(build: Build) -> None:
    """Refuse now what the server would not do.

    Raises:
        OlpackError: no server answers, it is too old, or it cannot be given a model with an adapter.
    """
    from olpack.deploy.client import OllamaClient

    client = OllamaClient()
    version = client.require()
    if build.paths.served:
        _check_served_file(build)
    _check_way(build, client, version)
    served_files(build, client, checked=True)
    if build.paths.served and build.base.tag:
        _prove_base(build, client, version)


def _prove_base(build: Build, client: OllamaClient, version: str) -> None:
    """Have the server write requests of the data for the model that an adapter is trained on: they must be the prompts of training.

    Raises:
        OlpackError: with the first difference.
    """
    from olpack.deploy.prompt_identity import check_identity

    asked = questions(build)
    proof = value_digest([version, build.base.digest, asked])
    place = user_cache() / "served" / f"{proof[:32]}.ok"
    if place.is_file():
        return
    identity = check_identity(client, build.base.tag, build.renderer.tokenizer, asked, tokens="few")
    identity.require()
    progress.say(f"{build.base.tag}: {identity.summary()}")
    make_user_cache()
    write_atomically(place, "")


def _check_served_file(build: Build) -> None:
    """Refuse what would take the name of the base from it, or could not be served.

    Raises:
        OlpackError: the package is called like the model that it is trained on, or the GGUF consists of several files.
    """
    from olpack.deploy.names import parse_name, same

    base, gguf = build.base, build.base.gguf
    if base.tag and same(f"{build.recipe.name}:x", f"{base.tag.removesuffix(':' + parse_name(base.tag).tag)}:x"):
        raise OlpackError(
            f"The package is called {build.recipe.name}, as the model that it is trained on: its tags would take the place of {base.tag}.",
            "Give its folder in modelfiles/ another name.",
        )
    if gguf is not None and len(gguf.paths) > 1:
        raise OlpackError(
            f"'{gguf.paths[0]}' is one of {len(gguf.paths)} files, and a tag is registered from one.",
            "Join them with llama-gguf-split --merge, or set `package: merged`.",
        )


@dataclass(frozen=True)
class _Way:
    """How tags with an adapter get onto the server.

    Attributes:
        kind: the server creates them; olpack writes them into its model store; the server pulls them from a registry that olpack opens for it.
        store: the model store that is written to.
        reason: why the store is not, as a clause; and how it could be.
    """

    kind: Literal["create", "store", "pull"]
    store: Path | None = None
    reason: str = ""
    remedy: str = ""

    def described(self, build: Build) -> str:
        """For a plan."""
        if self.kind == "create":
            return f"created by the server{f' from {build.base.tag}' if build.paths.served else ''}"
        if self.kind == "store":
            return f"written into the server's model store, {self.store}"
        weights = "" if build.base.tag else ", with the base's weights where it lacks them"
        return f"pulled by the server from a registry that olpack opens on 127.0.0.1 for that moment{weights}: {self.reason}"


def way_of_tags(build: Build) -> str | None:
    """How the tags get onto the server, in words; None for a package without an adapter or a server."""
    from olpack.deploy.client import OllamaClient

    if not (build.paths.base and build.server):
        return None
    client = OllamaClient()
    return _way(build, client, client.require()).described(build)


def _way(build: Build, client: OllamaClient, version: str) -> _Way:
    """How they get there, as far as this machine's files tell.

    A GGUF that is no model of the server is never created from: a server that registers it may put a template of its own in place of the file's.
    """
    from olpack.deploy.client import creates_adapters
    from olpack.deploy.ollama_store import store_of

    own_file = bool(build.paths.served) and not build.base.tag
    if not build.paths.base or (creates_adapters(version) and not own_file):
        return _Way("create")
    try:
        return _Way("store", store_of(client))
    except OlpackError as error:
        return _Way("pull", reason=error.problem.rstrip("."), remedy=error.remedy)


def _check_way(build: Build, client: OllamaClient, version: str) -> None:
    """Refuse a package with an adapter that cannot get onto the server, and report what is unusual about how it does.

    Raises:
        OlpackError: the server creates no such models, its store cannot be written, and it does not find a registry on this machine; or the prompts
            of a GGUF that is no model of the server would be others than in training.
    """
    from olpack.deploy.client import creates_adapters
    from olpack.deploy.loopback_registry import reaches

    found = _way(build, client, version)
    if found.kind == "create":
        return
    own_file, creates = bool(build.paths.served) and not build.base.tag, creates_adapters(version)
    register_it = f"Register the file once with `ollama create` (FROM {build.paths.served}), and name that model as base: ollama/NAME."
    if found.kind == "pull" and not reaches(client):
        unreachable = "and the server does not find a registry on this machine's 127.0.0.1"
        if own_file and creates:
            raise OlpackError(
                f"A tag on '{build.paths.served}' is written into the server's model store, which keeps its prompts as trained, but "
                f"{found.reason}, {unreachable}.",
                register_it,
            )
        raise OlpackError(
            f"{_no_adapters(version)}. They can be written into its model store, but {found.reason}, {unreachable}.",
            f"Set `package: merged` in the recipe, or build with --no-deploy and run `olpack deploy {build.recipe.name} --store DIR` where the "
            f"server keeps its models. {found.remedy}",
        )
    if own_file and (read := sorted(set(pins_for(build.renderer.tokenizer.chat_template)) & set(SERVER_VARIABLES))):
        raise OlpackError(
            f"The chat template of '{build.paths.served}' reads {', '.join(read)}, which a server sets and training does not.", register_it
        )
    if not creates:
        how = f"writes the tags into its model store, {found.store}" if found.kind == "store" else f"has the tags {found.described(build)}"
        progress.warn(f"{_no_adapters(version)}: deploy {how}. Its files' ADAPTER line is refused by `ollama create`.")


def _no_adapters(version: str) -> str:
    return f"Ollama {version} creates no models with adapters (since 0.34.1), and serves those that are there"


def length_warnings(build: Build, held_out: list[TokenRow]) -> Iterator[str]:
    """What a server will do to long prompts and endless answers of this package, one sentence each."""
    from olpack.deploy.parameters import answer_warnings, prompt_warnings

    yield from answer_warnings(build.package.parameters)
    yield from prompt_warnings({row.source: _before_the_answer(row) for row in held_out}, build.package.num_ctx)


def _before_the_answer(row: TokenRow) -> int:
    """Tokens of a row before its last answer."""
    return max((index for index, is_target in enumerate(row.loss_mask) if is_target and not (index and row.loss_mask[index - 1])), default=0)


def conversations(build: Build) -> list[list[dict]]:
    """The conversations, beside the made-up ones, whose prompts are compared: those that every quant answers, and the longest held-out requests
    that fit the server's context."""
    asked, context = questions(build), build.package.num_ctx
    package = build.package
    system = [{"role": "system", "content": package.system}] if package.system else []

    def count(request: list[dict]) -> int:
        return len(build.renderer.prompt([*(system if request[0]["role"] != "system" else []), *package.messages, *request]))

    # By characters first: a token has one or more, but for a few languages, so shorter requests than these cannot be among the longest.
    by_size = sorted(held_out_requests(build), key=lambda request: -sum(len(turn["content"] or "") for turn in request))[: 16 * _LONG]
    long = [request for request in by_size if request not in asked and context // 2 < count(request) < context]
    return asked + sorted(long, key=count)[-_LONG:]


def run(build: Build, steps: list[Step]) -> None:
    """Register every quant with the server, prove that the prompt is the trained one, and have one tag answer."""
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.loopback_registry import pull_tag
    from olpack.deploy.ollama_store import place
    from olpack.deploy.register import register

    client, (step,) = OllamaClient(), steps
    version = client.require()
    way = _way(build, client, version)
    known = {record.model: record for record in registered(build)}
    earlier = records.result(build.paths, "deploy").get("proved", {})
    proved = earlier if earlier.get("server") == [client.url, version] else {"server": [client.url, version]}
    files = served_files(build, client)
    for file in files:
        if way.kind == "pull":
            record = pull_tag(client, build.recipe.name, file, build.package)
        elif way.store:
            record = place(client, way.store, build.recipe.name, file, build.package)
        else:
            (record,) = register(client, build.recipe.name, [file], build.package, before=list(known.values()))
        known[record.model] = record
        # Written down after each tag: what is on the server must be known, to be removed or left alone, should the next one fail.
        records.remember(build.paths, step, {"registered": [asdict(one) for one in known.values()], "proved": proved})
    proved = _prove(build, client, files, proved, partial(_remember, build, step, known))
    summary = {"identity": proved["summary"], "identity_warnings": proved["warnings"]}
    records.finish(build.paths, step, [], {"registered": [asdict(record) for record in known.values()], "proved": proved, **summary})


def _remember(build: Build, step: Step, known: dict[str, Registered], proved: dict) -> None:
    records.remember(build.paths, step, {"registered": [asdict(record) for record in known.values()], "proved": proved})


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
    from olpack.deploy.prompt_identity import check_identity

    identity = check_identity(client, f"{build.recipe.name}:{tag}", build.renderer.tokenizer, asked, tokens="all" if all_tokens else "few")
    identity.require()
    for warning in identity.warnings():
        progress.warn(warning)
    return identity


def _weights(build: Build, file: TagFile) -> str:
    """Identity of what makes a tag's answers: its weights, their adapter, and the template in place of theirs."""
    adapter = records.result(build.paths, f"export-{ADAPTER}")["sha256"] if file.adapter else None
    return value_digest([file.sha256, adapter, build.package.template])


def quant_files(build: Build) -> list[TagFile]:
    """The exported GGUFs as they are registered."""
    from olpack.deploy.register import TagFile

    adapter = build.paths.gguf(ADAPTER) if build.paths.base else None
    made = {quant: export.quant_facts(build, quant.name) for quant in build.quants}
    return [TagFile(quant.tag, build.paths.gguf(quant.name), facts["sha256"], adapter) for quant, facts in made.items()]


def served_files(build: Build, client: OllamaClient, checked: bool = False) -> list[TagFile]:
    """The files of `quant_files` as a server has them: an adapter on a model of the server is registered from that model.

    Args:
        checked: nothing is made yet: only the model is looked at.

    Raises:
        OlpackError: the server has the model no more, or another one under its name.
    """
    from olpack.deploy.register import Origin

    name = build.base.tag
    if not (build.paths.served and name):
        return [] if checked else quant_files(build)
    info = client.show(name)
    if info is None:
        raise OlpackError(f"The Ollama server at {client.url} has no {name} any more.", f"Run `ollama pull {name}`.")
    own = export.quant_facts(build, build.quants[0].name)["sha256"]
    if info.blob != f"sha256:{own}":
        raise OlpackError(f"{name} is another model on the server at {client.url} than the one that is trained on.", "Build again, or pull it there.")
    return [] if checked else [replace(file, origin=Origin(name, info)) for file in quant_files(build)]


def registered(build: Build) -> list[Registered]:
    """The tags that the last deploy put on the server."""
    from olpack.deploy.register import Registered

    return [Registered(**record) for record in records.result(build.paths, "deploy").get("registered", [])]


STAGE = Stage(
    "deploy",
    1,
    inputs,
    stale,
    units=units,
    checked_for=frozenset({"train", "deploy"}),
    check=check,
    run=run,
    needs=("train", "export"),
)
