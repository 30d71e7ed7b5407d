"""The verbs. Parses, calls, prints; imports a stage only when it runs, so that `olpack --help` loads neither torch nor a server's client."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from olpack import __version__, progress
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from olpack.stages.build import Build

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From a base model and a few hundred examples to quantized assistants that Ollama serves, measured.",
)

Name = Annotated[str, typer.Argument(help="A package: a folder in modelfiles/.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe, as in train.epochs=3.")]
Quant = Annotated[list[str] | None, typer.Option("--quant", metavar="TYPE", help="Only this quant (may be repeated), whatever the recipe lists.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Build below this folder instead of build/.")]
_MODELS = "A package, a model as `olpack estimate` takes it, or files of one model."
Params = Annotated[str | None, typer.Option("--params", metavar="SIZE", help="No model, but a typical one of this size: 8B, 350M.")]
Context = Annotated[int | None, typer.Option("--context", metavar="TOKENS", min=1, help="Length of the context; a package's num_ctx, else 4096.")]
KvType = Annotated[str, typer.Option("--kv", metavar="TYPE", help="Type of the KV cache in llama.cpp: f16, q8_0 or q4_0.")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, and progress as JSON lines on stderr.")]


def main() -> None:
    """Entry point: one sentence for what is wrong, exit code 1; a traceback only with --debug."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("OLPACK_DEBUG"))
    if not debug:
        warnings.filterwarnings("ignore")
    try:
        app(prog_name="olpack")
    except Exception as error:
        if debug:
            raise
        print(f"olpack: {_told(error)}", file=sys.stderr)
        sys.exit(1)


def _told(error: Exception) -> str:
    if isinstance(error, OlpackError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full{f' ({error.filename})' if error.filename else ''}. Free some space, or choose another disk with --out."
    return f"{type(error).__name__}: {error}. This is not a failure that olpack knows; `olpack --debug …` shows where it comes from."


def _version(asked: bool) -> None:
    if asked:
        print(f"olpack {__version__}")
        raise typer.Exit


def _print_lines(lines: list[str], as_json: bool) -> None:
    if as_json:
        _print_json(lines)
    else:
        print("\n".join(lines))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the warnings of libraries.")] = False,
) -> None:
    progress.use("auto")


def _build_of(name: str, settings: list[str] | None, quant: list[str] | None, out: Path | None, json_lines: bool, deploy: bool = True) -> Build:
    from olpack import recipe
    from olpack.stages.build import Build
    from olpack.workspace import recipe_path

    if json_lines:
        progress.use("json")
    overrides = list(settings or []) + ([f"quants={json.dumps(quant)}"] if quant else [])
    asked = recipe.load(recipe_path(name), overrides)
    return Build(asked, out, server=_server() if deploy else None)


def _server() -> str | None:
    """URL of the Ollama server, if one answers there."""
    from olpack.deploy.client import OllamaClient

    client = OllamaClient()
    return client.url if client.version() else None


@app.command()
def init(
    name: Name,
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="A Hub id, a folder, or builtin/tiny-coder.")] = None,
    train: Annotated[str | None, typer.Option("--train", metavar="ROWS", help="A file or folder of rows, or a data set on the Hub.")] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")] = None,
) -> None:
    """Begin a package: write modelfiles/NAME/recipe.yaml, commented."""
    from olpack.commands.init import new_recipe, write_recipe

    path = new_recipe(name)
    if None in (base, train) and not sys.stdin.isatty():
        raise OlpackError("A recipe needs a base and training rows.", f"olpack init {name} --base Qwen/Qwen3-0.6B --train chats.jsonl")
    base = base or typer.prompt("Base model (a Hub id, a folder)", default="builtin/tiny-coder", err=True)
    train = train or typer.prompt("Training rows (a file, a folder, a Hub id)", err=True)
    write_recipe(path, base, train, system)
    print(path)
    progress.say(f"next: olpack data check {name}, olpack plan {name}, olpack build {name}")


@app.command()
def build(
    name: Name,
    settings: Set = None,
    quant: Quant = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="One of train, export, modelfiles, deploy, compare.")] = None,
    no_deploy: Annotated[bool, typer.Option("--no-deploy", help="Leave the Ollama server alone.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Do every stage that is stale: train, export, modelfiles, deploy, compare."""
    from olpack.stages.steps import NAMES

    if only is not None and only not in NAMES:
        raise typer.BadParameter(f"{only} is no stage; they are {', '.join(NAMES)}.", param_hint="--only")
    _run(_build_of(name, settings, quant, out, as_json, deploy=not no_deploy), only, as_json, deploy=not no_deploy)


def _run(build: Build, only: str | None, as_json: bool, deploy: bool = True, changes: Callable[[], dict[str, Any]] = dict) -> None:
    from olpack.stages.run import run

    done = run(build, only)
    if not done:
        progress.say(f"{build.recipe.name} is up to date: nothing to do in {only or 'any stage'}")
    if as_json:
        _print_json(_outcome(build, done) | changes())
    elif only in (None, "compare"):
        _closing(build, deploy)
    else:
        print(build.paths.root / {"train": "adapter", "export": "gguf", "modelfiles": "modelfiles", "deploy": ""}[only])


def _closing(build: Build, deploy: bool) -> None:
    """The table, where the report lies, and the line to paste."""
    from olpack.compare import print_table, read_results
    from olpack.stages.compare import recommended

    print_table(read_results(build.paths.results))
    print(f"\nreport   {build.paths.report}")
    tag = f"{build.recipe.name}:{recommended(build)}"
    if build.server:
        print(f"run      ollama run {tag}")
        return
    prompts = build.recipe.compare.prompts
    print(f"run      olpack run {tag} {shlex.quote(prompts[0]) if prompts else ''}".rstrip())
    if deploy:
        print(f"serve    no Ollama server answers: install it from https://ollama.com/download, start it, run `olpack deploy {build.recipe.name}`,")
        print(f"         then `ollama run {tag}`")


def _outcome(build: Build, done: list) -> dict[str, Any]:
    from olpack.stages.compare import recommended
    from olpack.stages.steps import all_steps

    steps = all_steps(build)
    return {
        "name": build.recipe.name,
        "done": [step.unit for step in done],
        "steps": {step.unit: {"stale": step.reason or None, **step.result} for step in steps},
        "results": str(build.paths.results) if build.paths.results.is_file() else None,
        "report": str(build.paths.report) if build.paths.report.is_file() else None,
        "recommended": f"{build.recipe.name}:{recommended(build)}",
    }


@app.command()
def plan(
    name: Name,
    settings: Set = None,
    quant: Quant = None,
    vram: Annotated[float | None, typer.Option("--vram", metavar="GB", min=1, help="Plan for a GPU of this memory.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Print every setting with its origin, the checks, sizes and time, and which stages are stale. Changes nothing."""
    from olpack.commands.plan import print_plan
    from olpack.stages.plan import describe, estimate

    asked = _build_of(name, settings, quant, out, as_json)
    found = describe(asked, estimate(asked, vram))
    if as_json:
        _print_json(found)
    else:
        print_plan(found)


@app.command()
def train(
    name: Name,
    settings: Set = None,
    launch: Annotated[
        str | None, typer.Option("--launch", metavar="COMMAND", help="Train in the processes that this starts: 'torchrun --nproc-per-node 2'.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Fine-tune the base with QLoRA; the adapter lands in build/NAME/adapter."""
    more = [f"train.launch={json.dumps(launch)}"] if launch else []
    _run(_build_of(name, [*(settings or []), *more], None, out, as_json, deploy=False), "train", as_json)


@app.command()
def export(name: Name, settings: Set = None, quant: Quant = None, out: Out = None, as_json: Json = False) -> None:
    """Merge the adapter and write the GGUFs, in one pass over the base."""
    asked = _build_of(name, settings, quant, out, as_json, deploy=False)
    _run(asked, "export", as_json)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A model's folder, a GGUF in F16, BF16 or F32, or a Hub id.", show_default=False)],
    quant: Annotated[list[str], typer.Option("--quant", metavar="TYPE", help="A quant type to write (may be repeated).")],
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="A LoRA adapter to merge on the way.")] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the files go; by default the working folder.", show_default=False)
    ] = Path(),
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Files are NAME-QUANT.gguf; by default the source's name.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="SIZE", help="Write parts of at most SIZE, such as 4GB; deploy takes one file.")
    ] = None,
    importance: Annotated[Path | None, typer.Option("--importance", metavar="FILE", help="An importance matrix in llama.cpp's GGUF form.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize a model in one pass, with no recipe."""
    from olpack.commands.quantize import print_files, rows
    from olpack.commands.quantize import quantize as run

    if as_json:
        progress.use("json")
    files = run(source, quant, adapter=adapter, out=out, name=name, split=split, importance=importance)
    if as_json:
        _print_json(rows(files))
    else:
        print_files(files)


@app.command()
def deploy(
    name: Name,
    settings: Set = None,
    quant: Quant = None,
    check: Annotated[bool, typer.Option("--check", help="Register nothing; compare the served prompts with the trained ones again.")] = False,
    store: Annotated[Path | None, typer.Option("--store", metavar="DIR", help="Write into this model store; the server need not run.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Register the quants with the Ollama server, and prove that the prompt it serves is the trained one."""
    from olpack.commands import publish

    asked = _build_of(name, settings, quant, out, as_json, deploy=store is None)
    if store is not None:
        _print_lines(publish.store(asked, store), as_json)
    elif check:
        _print_lines(publish.check(asked), as_json)
    else:
        _run(asked, "deploy", as_json)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="NAME | TAG…", help="A package, or models that the server has.", show_default=False)],
    settings: Set = None,
    quant: Quant = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="An earlier results.json: what got better or worse since.", exists=True, dir_okay=False),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Ask the server's models this (may be repeated).")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Ask them these: a text file, or JSONL of tasks or chats.")
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option("--clients", metavar="N", min=1, help="Also with N clients at once, through a server (may be repeated).")
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", metavar="TASK", help="Run this task of lm-evaluation-harness too (may be repeated).")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure the quants of a package: size, speed, memory, quality; which one to take, and why. Or any models of the server."""
    from olpack.commands.compare_models import compare_models, is_package

    earlier = _earlier_results(against)
    if is_package(names):
        if prompt or prompts:
            raise typer.BadParameter("a package's prompts stand in its recipe, as compare.prompts and compare.tasks.", param_hint="--prompt")
        more = [f"compare.suites={json.dumps(suite)}"] if suite else []
        more += [f"compare.clients={json.dumps(clients)}"] if clients else []
        asked = _build_of(names[0], [*(settings or []), *more], quant, out, as_json)
        folder = asked.paths.compare
        _run(asked, "compare", as_json, changes=partial(_changes, earlier, folder))
    else:
        if settings or quant or suite:
            raise typer.BadParameter(f"only a package has these, and {' '.join(names)} is none.", param_hint="--set, --quant, --suite")
        if as_json:
            progress.use("json")
        folder = out or Path("build/side-by-side")
        results = compare_models(names, prompt or [], prompts, clients or [], folder)
        if as_json:
            _print_json(results.model_dump(mode="json") | _changes(earlier, folder))
        else:
            from olpack.compare import print_table

            print_table(results)
            print(f"\nreport   {folder / 'report.html'}")
    if earlier is not None and not as_json:
        from olpack.compare import read_results
        from olpack.compare.changes import changes
        from olpack.compare.table import print_changes

        print()
        print_changes(changes(earlier, read_results(folder / "results.json")), earlier)


def _changes(earlier: Any, folder: Path) -> dict[str, Any]:
    """What got better or worse since an earlier comparison, for JSON; empty where none is named."""
    if earlier is None:
        return {}
    from dataclasses import asdict

    from olpack.compare import read_results
    from olpack.compare.changes import changes

    return {"against": earlier.created, "changes": [asdict(change) for change in changes(earlier, read_results(folder / "results.json"))]}


def _earlier_results(path: Path | None) -> Any:
    """Read before anything is measured: it may be the file that the comparison writes."""
    if path is None:
        return None
    from olpack.compare import read_results

    return read_results(path)


@app.command()
def recommend(
    models: Annotated[list[str] | None, typer.Argument(metavar="[NAME | GGUF…]", help=_MODELS, show_default=False)] = None,
    params: Params = None,
    vram: Annotated[float | None, typer.Option("--vram", metavar="GB", min=0, help="GPU memory in place of this machine's; 0 for none.")] = None,
    ram: Annotated[float | None, typer.Option("--ram", metavar="GB", min=0, help="RAM in place of this machine's.")] = None,
    context: Context = None,
    kv: KvType = "f16",
    max_loss: Annotated[float | None, typer.Option("--max-loss", metavar="SHARE", min=0, help="Growth of perplexity to accept: 0.01 is 1 %.")] = None,
    quant: Quant = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Say which quant fits this machine, or the one described: what runs where, the best, the fastest, and why."""
    from olpack.commands.recommend import advise

    if as_json:
        progress.use("json")
    advice = advise(models or [], params, vram, ram, context, kv, max_loss, quant, out)
    if as_json:
        _print_json(advice.as_json())
    else:
        from olpack.memory.table import print_advice

        print_advice(advice)


@app.command()
def estimate(
    model: Annotated[str | None, typer.Argument(help="A model's folder, its config.json, a GGUF, or a Hub id.", show_default=False)] = None,
    params: Params = None,
    context: Context = None,
    kv: KvType = "f16",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapter.")] = 16,
    batch: Annotated[int, typer.Option("--batch", metavar="TOKENS", min=1, help="Tokens that go through the model at once in training.")] = 2048,
    quant: Quant = None,
    as_json: Json = False,
) -> None:
    """Say what a model takes for inference and training: FP32 to 4 bits, each quant, LoRA and QLoRA. Fetches no weights."""
    from olpack.commands.recommend import estimate_model

    if as_json:
        progress.use("json")
    found = estimate_model(model, params, context, kv, rank, batch, quant)
    if as_json:
        _print_json(found.as_json())
    else:
        from olpack.memory.table import print_estimate

        print_estimate(found)


@app.command()
def run(
    model: Annotated[str, typer.Argument(metavar="NAME[:TAG]", help="What to talk to; without a tag, the recommended quant.", show_default=False)],
    prompt: Annotated[str | None, typer.Argument(help="One question. Without it: a conversation.", show_default=False)] = None,
    out: Out = None,
) -> None:
    """Talk to a package: through the Ollama server if it has it, else with the embedded llama.cpp."""
    from olpack.commands.chat import talk

    talk(model, prompt, out)


@app.command()
def show(name: Name, out: Out = None, as_json: Json = False) -> None:
    """Show what is known of a build: training, files, recommendation, registered tags, what is stale."""
    from olpack.commands import publish
    from olpack.commands.show import print_facts

    found = publish.facts(_build_of(name, None, None, out, as_json))
    if as_json:
        _print_json(found)
    else:
        print_facts(found)


@app.command()
def bundle(
    name: Name,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="The archive; by default NAME.zip in the build folder.")] = None,
    out: Out = None,
) -> None:
    """Make one archive of GGUFs, Modelfiles, digests and report, for `ollama create` elsewhere."""
    from olpack.commands import publish

    print(publish.bundle(_build_of(name, None, None, out, False, deploy=False), to))


@app.command()
def push(
    name: Name,
    namespace: Annotated[str | None, typer.Option("--ollama", metavar="[HOST/]NAMESPACE", help="To a registry, through the server.")] = None,
    hub: Annotated[str | None, typer.Option("--hub", metavar="USER/REPO", help="To the Hugging Face Hub, with a model card.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new Hub repository private.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let the server use a registry without TLS.")] = False,
    out: Out = None,
) -> None:
    """Publish a package: through the Ollama server, or to the Hugging Face Hub."""
    from olpack.commands import publish

    if (namespace is None) == (hub is None):
        raise typer.BadParameter("say where to: either --ollama NAMESPACE or --hub USER/REPO.")
    asked = _build_of(name, None, None, out, False, deploy=hub is None)
    _print_lines([publish.push_to_hub(asked, hub, private or None)] if hub else publish.push_to_ollama(asked, namespace, insecure), False)


@app.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    out: Out = None,
) -> None:
    """Remove from the server the tags that olpack made for a package. Files here stay."""
    from olpack.commands import publish

    asked = _build_of(name, None, None, out, False)
    if not (models := publish.removable(asked)):
        progress.say(f"the server has no tag that olpack made for {name}")
    elif yes or typer.confirm(f"Remove {', '.join(models)} from the server?", err=True):
        _print_lines(publish.remove(asked), False)


data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at data: what is wrong with it, and how the model sees it.")
app.add_typer(data_app, name="data")
DataName = Annotated[str, typer.Argument(metavar="NAME | FILE", help="A package; or a data file, with --base.", show_default=False)]
DataBase = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Read a data file with the tokenizer of this base.")]


def _data_of(name: str, base: str | None, settings: list[str] | None, as_json: bool = False) -> Build:
    """A package, or one that is made up of a data file and a base. The base's weights are not needed."""
    from olpack import recipe
    from olpack.stages.build import Build
    from olpack.workspace import recipe_path

    if as_json:
        progress.use("json")
    if base is None and Path(name).suffix and Path(name).exists():
        raise typer.BadParameter(f"{name} is a data file, so say which base is to read it.", param_hint="--base")
    if base is not None and not Path(name).exists():
        raise typer.BadParameter(f"It goes with a data file, and there is no file {name}. A package names its own base.", param_hint="--base")
    return Build(recipe.of_data(Path(name), base, settings) if base else recipe.load(recipe_path(name), settings), weights=False)


@data_app.command("check")
def data_check(name: DataName, base: DataBase = None, settings: Set = None, as_json: Json = False) -> None:
    """List every problem with its line, and show the rows in figures. Exit code 1 where a build would refuse them."""
    from olpack.data.check import check_data
    from olpack.data.show import print_report

    asked = _data_of(name, base, settings, as_json)
    report = check_data(asked.sources("train"), asked.sources("eval"), asked.renderer, max_length=asked.longest_row, eval_share=_share(asked, base))
    if as_json:
        _print_json(report.as_json())
    else:
        print_report(report)
    if report.fails:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    name: DataName,
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="Which row, from 1.", show_default=False)],
    held_out: Annotated[bool, typer.Option("--eval", help="Of the held-out rows.")] = False,
    base: DataBase = None,
    settings: Set = None,
) -> None:
    """Print a row as the model sees it, with its target tokens marked."""
    from olpack.data.load import nth_row
    from olpack.data.show import print_row

    asked = _data_of(name, base, settings)
    row = nth_row(number, asked.sources("train"), asked.sources("eval"), asked.renderer, held_out=held_out, eval_share=_share(asked, base))
    print_row(row, asked.renderer, f"{'eval' if held_out else 'train'} row {number}, {row.source}")


def _share(asked: Build, base: str | None) -> float:
    """Of a data file with no recipe, nothing is held out."""
    return 0 if base else asked.recipe.data.eval_share


@app.command("list")
def list_packages(out: Out = None, as_json: Json = False) -> None:
    """List packages, what of each is built, and what the server has."""
    from olpack.commands.show import package_rows, print_packages

    rows = package_rows(out or Path("build"))
    if as_json:
        _print_json(rows)
    else:
        print_packages(rows)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what of this machine is ready, what is not, and the command that mends it."""
    from olpack.commands.doctor import examine, print_findings

    findings = examine()
    if as_json:
        _print_json([vars(finding) for finding in findings])
    else:
        print_findings(findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
