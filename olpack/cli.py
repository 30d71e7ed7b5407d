"""The commands: each parses its arguments, calls a stage and prints the result.

A command imports its stage when it runs, so `olpack --help` loads neither torch nor a server's client. The first sentence of a command's
docstring is its line in `olpack --help`, and must fit there.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import platformdirs
import typer
from typer.core import TyperCommand

from olpack import __version__, progress
from olpack.errors import OlpackError
from olpack.printable import echo, json_text, redact_libraries, redacted, visible
from olpack.quants import Rounding
from olpack.workspace import check_home

if TYPE_CHECKING:
    from olpack.compare.results import Results
    from olpack.stages.build import Build
    from olpack.stages.records import Step

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a model with QLoRA, quantize it to GGUF and serve it with Ollama, with measurements that show which quant to use.",
)


def _use_json(asked: bool) -> bool:
    if asked:
        progress.use("json")
    return asked


_ANYWHERE = ("--quiet", "-q", "--verbose", "-v", "--debug")
# What a path that a user gave can have wrong with it, whoever opens it.
_OF_THE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO)


def _matching_packages(incomplete: str) -> list[str]:
    """For the completion of a shell."""
    from olpack.workspace import packages

    return [name for name in packages() if name.startswith(incomplete)]


def _matching_quants(incomplete: str) -> list[str]:
    from olpack.quants import QUANT_TYPES

    return [name for name in QUANT_TYPES if name.startswith(incomplete)]


def _matching_stages(incomplete: str) -> list[str]:
    from olpack.stages.order import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A package: a folder in modelfiles/.", show_default=False, autocompletion=_matching_packages),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a recipe key: train.epochs=3. Repeatable.")]
Quant = Annotated[
    list[str] | None, typer.Option("--quant", metavar="TYPE", help="Only this quant type. Repeatable.", autocompletion=_matching_quants)
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the builds, in place of build/.")]
_MODELS = "A package, a model's folder, config.json or Hub id, or GGUFs of one model."
Params = Annotated[str | None, typer.Option("--params", metavar="SIZE", help="A typical model of this size in place of MODEL: 8B, 350M.")]
Context = Annotated[int | None, typer.Option("--context", metavar="TOKENS", min=1, help="Context length. Default: the package's num_ctx, or 4096.")]
KvType = Annotated[str, typer.Option("--kv", metavar="TYPE", help="Type of llama.cpp's KV cache: f16, q8_0 or q4_0.")]
Json = Annotated[bool, typer.Option("--json", callback=_use_json, help="Print the result as JSON, and progress as JSON lines on stderr.")]


def main() -> None:
    """Entry point. An error prints one sentence and exits with code 1; --debug prints the traceback.

    SIGTERM and SIGHUP end a command as Ctrl-C does: with the checkpoint written, and with exit codes 143 and 129 in place of 130.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("OLPACK_DEBUG"))
    if not debug:
        warnings.filterwarnings("ignore")
    redact_libraries()
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that is not UTF-8 shows \u0645 for what it has no letter for; stderr does that by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _signals_end_as_interrupts():
            check_home()
            # By default torch makes a folder with a known name in the shared temporary folder, which anybody may have made before it.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", platformdirs.user_cache_dir("olpack-torchinductor"))
            app(_in_front(sys.argv[1:]), prog_name="olpack")
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if debug:
            echo(redacted(traceback.format_exc()), end="", err=True)
        else:
            echo(f"olpack: {redacted(_message(error))}", err=True)
        sys.exit(1)


def _in_front(words: list[str]) -> list[str]:
    """The command line with the options of `olpack` itself before the command: `olpack build NAME --quiet` is `olpack --quiet build NAME`."""
    end = words.index("--") if "--" in words else len(words)
    return sorted(words[:end], key=lambda word: word not in _ANYWHERE) + words[end:]


@contextmanager
def _signals_end_as_interrupts() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP do what SIGINT does at that moment, and the exit code is 128 and the number of the signal."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        handler = signal.getsignal(signal.SIGINT)  # training defers it until its step is whole
        if not callable(handler):  # a shell's background jobs ignore SIGINT
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in filter(None, (signal.SIGTERM, getattr(signal, "SIGHUP", None))):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        if received:
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _message(error: BaseException) -> str:
    if isinstance(error, OlpackError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full{f' ({error.filename})' if error.filename else ''}. Free some space, or choose another disk with --out."
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):  # of tempfile
        return "No temporary folder can be written to. Set TMPDIR to a folder that can, and that has some free space."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return f"{error.filename}: {error.strerror}. Give this user access to it, or name another folder (--out, TMPDIR, HF_HOME, XDG_CACHE_HOME)."
    if isinstance(error, OSError) and error.errno in _OF_THE_PATH and error.filename:
        return f"{_shown(error.filename)}: {error.strerror}. Name a file or a folder that can be used."
    return f"Unexpected error: {type(error).__name__}: {error}. `olpack --debug …` prints the traceback."


def _shown(path: object) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _version(asked: bool) -> None:
    if asked:
        print(f"olpack {__version__}")
        raise typer.Exit


def _print_json(value: object) -> None:
    print(json_text(value, indent=1))


def _print(as_json: bool, value: object, as_text: Callable[[], None]) -> None:
    """Print a result: the value as JSON, or its text."""
    if as_json:
        _print_json(value)
    else:
        as_text()


def _print_lines(as_json: bool, lines: list[str]) -> None:
    _print(as_json, lines, lambda: echo("\n".join(lines)))


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors, and no progress.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print why each stage runs or is up to date, and every request to a server.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks and the warnings of libraries.")] = False,
) -> None:
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other.", param_hint="--quiet, --verbose")
    progress.use("auto")
    progress.show("quiet" if quiet else "verbose" if verbose else "normal")
    if verbose:
        _show_requests()


def _show_requests() -> None:
    class Requests(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            progress.detail(record.getMessage())

    log = logging.getLogger("httpx")
    log.setLevel(logging.INFO)
    log.handlers = [Requests()]
    log.propagate = False


def _build_of(name: str, settings: list[str] | None, quant: list[str] | None, out: Path | None, deploy: bool = True) -> Build:
    from olpack import recipe
    from olpack.stages.build import Build
    from olpack.workspace import recipe_path

    overrides = list(settings or []) + ([f"quants={json.dumps(quant)}"] if quant else [])
    return Build(recipe.load(recipe_path(name), overrides), out, server=_server() if deploy else None)


def _server() -> str | None:
    """URL of the Ollama server; None if no server answers."""
    from olpack.deploy.client import OllamaClient

    client = OllamaClient()
    return client.url if client.version() else None


class _ExampleWithoutName(TyperCommand):
    """Typer has no option whose value may be left out: `--example` alone stands for an empty name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = [*args, "-"]
        alone = [at + 1 for at, word in enumerate(args) if word == "--example" and given[at + 1].startswith("-")]
        for at in reversed(alone):
            args.insert(at, "")
        return super().parse_args(ctx, args)


@app.command(cls=_ExampleWithoutName)
def init(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The package: a folder in modelfiles/. Default: the example's name.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Base model: a Hub id, a folder, a GGUF, ollama/NAME, or builtin/tiny-coder.")
    ] = None,
    train: Annotated[str | None, typer.Option("--train", metavar="ROWS", help="Training rows: a file, a folder, or a data set of the Hub.")] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")] = None,
    example: Annotated[
        str | None, typer.Option("--example", metavar="[EXAMPLE]", help="Copy this example, with its data. Without a value: list the examples.")
    ] = None,
    lang: Annotated[str, typer.Option("--lang", metavar="LANGUAGE", help="Language of the comments: en or ar.")] = "en",
) -> None:
    """Write a recipe with comments, or copy an example."""
    from olpack.commands.init import TEMPLATES, new_recipe, write_recipe

    if lang not in TEMPLATES:
        raise typer.BadParameter(f"'{visible(lang)}' is not a language of recipes. The languages are {', '.join(TEMPLATES)}.", param_hint="--lang")
    if example is not None:
        if train is not None or system is not None or lang != "en":
            raise typer.BadParameter("An example has its own rows, system prompt and English comments; edit its recipe.", param_hint="--example")
        _init_example(example, name, base)
        return
    if name is None:
        raise typer.BadParameter("A package needs a name: olpack init NAME. `olpack init --example` lists examples.", param_hint="NAME")
    path = new_recipe(name)
    if None in (base, train) and not sys.stdin.isatty():
        raise OlpackError("A recipe needs a base and training rows.", f"olpack init {name} --base Qwen/Qwen3-0.6B --train chats.jsonl")
    base = base or typer.prompt("Base model (a Hub id, a folder, a GGUF, ollama/NAME)", default="builtin/tiny-coder", err=True)
    train = train or typer.prompt("Training rows (a file, a folder, a Hub id)", err=True)
    write_recipe(path, base, train, system, lang)
    echo(str(path))
    progress.say(f"next: olpack data check {name}, olpack plan {name}, olpack build {name}")


def _init_example(example: str, name: str | None, base: str | None) -> None:
    from olpack.commands.examples import examples, find, first_question, print_examples, write_example

    if not example:
        print_examples(examples())
        progress.say("next: olpack init --example NAME")
        return
    found = find(example)
    path = write_example(found, name or found.name, base)
    package = path.parent.name
    echo(str(path))
    progress.say(f"next: olpack data check {package}")
    progress.say(f"      olpack build {package}")
    progress.say(f"      olpack run {package} {shlex.quote(first_question(path))}")


@app.command("import")
def import_from(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A YAML of Axolotl or LLaMA-Factory, a script or notebook of Unsloth, a Modelfile, or the folder of an adapter.",
            show_default=False,
        ),
    ],
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the package. Default: the source's name.")] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Base model in place of the source's.")] = None,
    train: Annotated[str | None, typer.Option("--train", metavar="ROWS", help="Training rows in place of the source's.")] = None,
    held_out: Annotated[str | None, typer.Option("--eval", metavar="ROWS", help="Held-out rows in place of the source's.")] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt in place of the source's.")] = None,
    then_build: Annotated[bool, typer.Option("--build", help="Build the package as well.")] = False,
    as_json: Json = False,
) -> None:
    """Write a recipe from another tool's configuration.

    The command lists what became of each setting, and why some are not carried over. An adapter that is trained already is copied by the build,
    exported, deployed and compared. No file is executed, and no existing recipe is replaced.
    """
    from olpack.commands.import_recipe import import_recipe, print_imported

    imported = import_recipe(source, name, base, train, held_out, system)
    if not (then_build and as_json):
        _print(as_json, imported.as_json(), partial(print_imported, imported))
    if then_build:
        _run(_build_of(imported.name, None, None, None), None, as_json, changes=lambda: {"import": imported.as_json()})
    else:
        progress.say(f"next: olpack data check {imported.name}, olpack plan {imported.name}, olpack build {imported.name}")


@app.command()
def build(
    name: Name,
    settings: Set = None,
    quant: Quant = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="STAGE",
            help="Run this stage only: train, export, modelfiles, deploy or compare.",
            autocompletion=_matching_stages,
        ),
    ] = None,
    no_deploy: Annotated[bool, typer.Option("--no-deploy", help="Do not use the Ollama server.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Run the stale stages, from training to comparison.

    The stages are train, export, modelfiles, deploy and compare. The same command resumes an interrupted build.
    """
    from olpack.stages.order import NAMES

    if only is not None and only not in NAMES:
        raise typer.BadParameter(f"'{visible(only)}' is not a stage. The stages are {', '.join(NAMES)}.", param_hint="--only")
    _run(_build_of(name, settings, quant, out, deploy=not no_deploy), only, as_json, deploy=not no_deploy)


def _run(build: Build, only: str | None, as_json: bool, deploy: bool = True, changes: Callable[[], dict[str, Any]] = dict) -> None:
    from olpack.stages.run import run

    done = run(build, only)
    if not done:
        progress.say(f"{build.recipe.name} is up to date: nothing to do in {only or 'any stage'}")
    if as_json:
        _print_json(_result(build, done) | changes())
    elif only in (None, "compare"):
        _print_summary(build, deploy)
    else:
        echo(str(build.paths.root / {"train": "adapter", "export": "gguf", "modelfiles": "modelfiles", "deploy": ""}[only]))


def _print_summary(build: Build, deploy: bool) -> None:
    """Print the table of the comparison, the path of the report, and the command that starts a chat."""
    from olpack.compare.results import read_results
    from olpack.compare.table import print_table
    from olpack.stages.compare import recommended

    print_table(read_results(build.paths.results))
    echo(f"\nreport   {build.paths.report}")
    tag = f"{build.recipe.name}:{recommended(build)}"
    if build.server:
        print(f"run      ollama run {tag}")
        return
    prompts = build.recipe.compare.prompts
    echo(f"run      olpack run {tag} {shlex.quote(prompts[0]) if prompts else ''}".rstrip())
    if deploy:
        print(f"serve    no Ollama server answers: install it from https://ollama.com/download, start it, run `olpack deploy {build.recipe.name}`,")
        print(f"         then `ollama run {tag}`")


def _result(build: Build, done: list[Step]) -> dict[str, Any]:
    from olpack.stages.compare import recommended
    from olpack.stages.order import all_steps

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
    vram: Annotated[float | None, typer.Option("--vram", metavar="GB", min=1, help="Plan for a GPU with this memory.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Print the settings, checks, sizes, time and stale stages.

    Each setting has its origin: a line of the recipe, --set, or the default. The command changes nothing.
    """
    from olpack.commands.plan import print_plan
    from olpack.stages.plan import describe, estimate

    package = _build_of(name, settings, quant, out)
    plan = describe(package, estimate(package, vram))
    _print(as_json, plan, partial(print_plan, plan))


@app.command()
def train(
    name: Name,
    settings: Set = None,
    launch: Annotated[
        str | None, typer.Option("--launch", metavar="COMMAND", help="Launcher of the training processes: 'torchrun --nproc-per-node 2'.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Fine-tune the base with QLoRA. The adapter is written to build/NAME/adapter."""
    more = [f"train.launch={json.dumps(launch)}"] if launch else []
    _run(_build_of(name, [*(settings or []), *more], None, out, deploy=False), "train", as_json)


@app.command()
def export(name: Name, settings: Set = None, quant: Quant = None, out: Out = None, as_json: Json = False) -> None:
    """Merge the adapter and write every GGUF in one pass."""
    _run(_build_of(name, settings, quant, out, deploy=False), "export", as_json)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A model's folder, a GGUF in F16, BF16 or F32, or a Hub id.", show_default=False)],
    quant: Annotated[list[str], typer.Option("--quant", metavar="TYPE", help="Quant type to write. Repeatable.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="LoRA adapter to merge into the model.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the files. Default: the working folder.", show_default=False)] = Path(),
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Write NAME-QUANT.gguf. Default: the source's name.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="SIZE", help="Split each GGUF into parts of at most SIZE: 4GB. Ollama needs whole files.")
    ] = None,
    importance: Annotated[Path | None, typer.Option("--importance", metavar="FILE", help="Importance matrix in llama.cpp's GGUF format.")] = None,
    rounding: Annotated[
        Rounding,
        typer.Option(
            "--rounding",
            help="Blocks of weights: 'ggml' as llama-quantize makes them, 'search' for the smallest error of the weights, "
            "'learned' for that of each matrix's output on --rows.",
        ),
    ] = "ggml",
    rows: Annotated[Path | None, typer.Option("--rows", metavar="FILE", help="Chats or texts, for --rounding learned.")] = None,
    scale_steps: Annotated[
        int | None,
        typer.Option(
            "--scale-steps", min=0, max=10_000, help="With --rounding learned: steps of training of the block scales of Q2_K, Q3_K and Q4_0 (50)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize a model in one pass, without a recipe."""
    from olpack.commands.quantize import as_plain_data, print_files
    from olpack.commands.quantize import quantize as run

    files = run(
        source, quant, adapter=adapter, out=out, name=name, split=split, importance=importance, rounding=rounding, rows=rows, scale_steps=scale_steps
    )
    _print(as_json, as_plain_data(files), partial(print_files, files))


@app.command()
def deploy(
    name: Name,
    settings: Set = None,
    quant: Quant = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Register nothing. Compare the registered tags with the recipe, and the served prompts with the trained ones."),
    ] = False,
    store: Annotated[Path | None, typer.Option("--store", metavar="DIR", help="Write into this model store of a server that is not running.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Register the quants with Ollama and check its prompts.

    The prompts that the server makes must be identical to those of the training rows.
    """
    from olpack.commands import publish

    package = _build_of(name, settings, quant, out, deploy=store is None)
    if store is not None:
        _print_lines(as_json, publish.store(package, store))
    elif check:
        _print_lines(as_json, publish.check(package))
    else:
        _run(package, "deploy", as_json)


@app.command()
def compare(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="A package, or tags of any models on the server.", show_default=False, autocompletion=_matching_packages),
    ],
    settings: Set = None,
    quant: Quant = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="Earlier results.json: print what is better or worse now.", exists=True, dir_okay=False),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Prompt for the models on the server. Repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts for the models on the server: a text file, or JSONL of tasks or chats.")
    ] = None,
    run_answers: Annotated[
        bool, typer.Option("--run-answers", help="Let tasks of --prompts run code: the Python of answers in a sandbox, functions without one.")
    ] = False,
    clients: Annotated[
        list[int] | None, typer.Option("--clients", metavar="N", min=1, help="Measure N simultaneous clients through a server too. Repeatable.")
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", metavar="TASK", help="Run this task of lm-evaluation-harness too. Repeatable.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure size, speed, memory and quality of the quants.

    Of a package, the comparison recommends a quant with the reason. It also measures any models on the server.
    """
    from olpack.commands.compare_models import compare_models, is_package

    earlier = _earlier_results(against)
    if is_package(names):
        if run_answers:
            raise typer.BadParameter("a package allows it with compare.run_answers in its recipe.", param_hint="--run-answers")
        if prompt or prompts:
            raise typer.BadParameter(
                "a package takes its prompts from compare.prompts and compare.tasks of its recipe.", param_hint="--prompt, --prompts"
            )
        more = [f"compare.suites={json.dumps(suite)}"] if suite else []
        more += [f"compare.clients={json.dumps(clients)}"] if clients else []
        package = _build_of(names[0], [*(settings or []), *more], quant, out)
        folder = package.paths.compare
        _run(package, "compare", as_json, changes=partial(_changes, earlier, folder))
    else:
        if settings or quant or suite:
            raise typer.BadParameter(
                f"these options need a package, and {visible(' '.join(names))} is not one.", param_hint="--set, --quant, --suite"
            )
        folder = out or Path("build/side-by-side")
        results = compare_models(names, prompt or [], prompts, clients or [], folder, run_answers)
        _print(as_json, results.model_dump(mode="json") | _changes(earlier, folder), partial(_print_side_by_side, results, folder))
    if earlier is not None and not as_json:
        from olpack.compare.changes import changes
        from olpack.compare.results import read_results
        from olpack.compare.table import print_changes

        print()
        print_changes(changes(earlier, read_results(folder / "results.json")), earlier)


def _print_side_by_side(results: Results, folder: Path) -> None:
    from olpack.compare.table import print_table

    print_table(results)
    echo(f"\nreport   {folder / 'report.html'}")


def _changes(earlier: Results | None, folder: Path) -> dict[str, Any]:
    """What is better or worse than in an earlier comparison, for JSON; empty without one."""
    if earlier is None:
        return {}
    from dataclasses import asdict

    from olpack.compare.changes import changes
    from olpack.compare.results import read_results

    return {"against": earlier.created, "changes": [asdict(change) for change in changes(earlier, read_results(folder / "results.json"))]}


def _earlier_results(path: Path | None) -> Results | None:
    """The earlier comparison. It is read first, because the comparison may replace its file."""
    if path is None:
        return None
    from olpack.compare.results import read_results

    return read_results(path)


@app.command()
def recommend(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help=_MODELS, show_default=False)] = None,
    params: Params = None,
    vram: Annotated[float | None, typer.Option("--vram", metavar="GB", min=0, help="GPU memory, in place of this machine's. 0: no GPU.")] = None,
    ram: Annotated[float | None, typer.Option("--ram", metavar="GB", min=0, help="RAM, in place of this machine's.")] = None,
    context: Context = None,
    kv: KvType = "f16",
    max_loss: Annotated[
        float | None, typer.Option("--max-loss", metavar="SHARE", min=0, help="Accepted increase of perplexity: 0.01 is 1 %.")
    ] = None,
    quant: Quant = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Recommend the quant that fits this machine, or another.

    A table shows what each quant takes, where it runs and what it loses. Below it stand the best and the fastest quant, with the reasons.
    """
    from olpack.commands.recommend import advise
    from olpack.memory.table import print_advice

    advice = advise(models or [], params, vram, ram, context, kv, max_loss, quant, out)
    _print(as_json, advice.as_json(), partial(print_advice, advice))


@app.command()
def estimate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model's folder, its config.json, a GGUF, or a Hub id.", show_default=False)
    ] = None,
    params: Params = None,
    context: Context = None,
    kv: KvType = "f16",
    rank: Annotated[int, typer.Option("--rank", metavar="N", min=1, help="Rank of the adapter.")] = 16,
    batch: Annotated[int, typer.Option("--batch", metavar="TOKENS", min=1, help="Tokens of a micro-batch in training.")] = 2048,
    quant: Quant = None,
    as_json: Json = False,
) -> None:
    """Estimate a model's memory for inference and training.

    The estimate covers FP32 to 4 bits, each quant, LoRA and QLoRA. It fetches no weights.
    """
    from olpack.commands.recommend import estimate_model
    from olpack.memory.table import print_estimate

    memory = estimate_model(model, params, context, kv, rank, batch, quant)
    _print(as_json, memory.as_json(), partial(print_estimate, memory))


@app.command()
def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:TAG]", help="A package. Default tag: the recommended quant.", show_default=False, autocompletion=_matching_packages
        ),
    ],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="One prompt. Without it, a conversation.", show_default=False)] = None,
    out: Out = None,
) -> None:
    """Chat with a package through Ollama or llama.cpp.

    The Ollama server answers if it has the tag, and the embedded llama.cpp otherwise.
    """
    from olpack.commands.chat import talk

    talk(model, prompt, out)


@app.command()
def show(name: Name, out: Out = None, as_json: Json = False) -> None:
    """Show a build: training, files, tags, stale stages."""
    from olpack.commands import publish
    from olpack.commands.show import print_facts

    facts = publish.facts(_build_of(name, None, None, out))
    _print(as_json, facts, partial(print_facts, facts))


@app.command()
def bundle(
    name: Name,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Path of the archive. Default: NAME.zip in the build folder.")] = None,
    out: Out = None,
) -> None:
    """Write an archive for `ollama create` on another machine.

    The archive contains the GGUFs, Modelfiles, digests and the report.
    """
    from olpack.commands import publish

    echo(str(publish.bundle(_build_of(name, None, None, out, deploy=False), to)))


@app.command()
def push(
    name: Name,
    namespace: Annotated[str | None, typer.Option("--ollama", metavar="[HOST/]NAMESPACE", help="Push to this registry through the server.")] = None,
    hub: Annotated[
        str | None, typer.Option("--hub", metavar="USER/REPO", help="Push to this repository of the Hugging Face Hub, with a model card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the Hub repository as a private one.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow a registry without TLS.")] = False,
    out: Out = None,
) -> None:
    """Publish a package to an Ollama registry or the Hub."""
    from olpack.commands import publish

    if (namespace is None) == (hub is None):
        raise typer.BadParameter("push needs one target: --ollama NAMESPACE or --hub USER/REPO.")
    package = _build_of(name, None, None, out, deploy=hub is None)
    _print_lines(False, [publish.push_to_hub(package, hub, private or None)] if hub else publish.push_to_ollama(package, namespace, insecure))


@app.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    out: Out = None,
) -> None:
    """Remove a package's tags from the Ollama server. Local files stay."""
    from olpack.commands import publish

    package = _build_of(name, None, None, out)
    if not (models := publish.removable(package)):
        progress.say(f"the server has no tag that olpack made for {name}")
    elif yes or typer.confirm(visible(f"Remove {', '.join(models)} from the server?"), err=True):
        _print_lines(False, publish.remove(package))


data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check training data, and print rows as the model reads them.")
app.add_typer(data_app, name="data")
DataName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A package, or a data file with --base.", show_default=False, autocompletion=_matching_packages),
]
DataBase = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Base model whose tokenizer reads the data file.")]


def _data_of(name: str, base: str | None, settings: list[str] | None) -> Build:
    """A package, or a package of only a data file and a base. It needs no weights of the base."""
    from olpack import recipe
    from olpack.stages.build import Build
    from olpack.workspace import recipe_path

    if base is None and Path(name).suffix and Path(name).exists():
        raise typer.BadParameter(f"the data file {visible(name)} needs a base, whose tokenizer reads it.", param_hint="--base")
    if base is not None and not Path(name).exists():
        raise typer.BadParameter(f"it goes with a data file, and there is no file {visible(name)}. A package has its own base.", param_hint="--base")
    return Build(recipe.of_data(Path(name), base, settings) if base else recipe.load(recipe_path(name), settings), weights=False)


@data_app.command("check")
def data_check(name: DataName, base: DataBase = None, settings: Set = None, as_json: Json = False) -> None:
    """List every problem of the data with its line.

    The report also counts rows, tokens and target tokens. The exit code is 1 if a build refuses the data.
    """
    from olpack.data.check import check_data
    from olpack.data.show import print_report

    data = _data_of(name, base, settings)
    report = check_data(data.sources("train"), data.sources("eval"), data.renderer, max_length=data.longest_row, eval_share=_share(data, base))
    _print(as_json, report.as_json(), partial(print_report, report))
    if report.fails:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    name: DataName,
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="Number of the row, from 1.", show_default=False)],
    held_out: Annotated[bool, typer.Option("--eval", help="Take the row from the held-out rows.")] = False,
    base: DataBase = None,
    settings: Set = None,
) -> None:
    """Print a row as the model reads it, with marked target tokens."""
    from olpack.data.load import nth_row
    from olpack.data.show import print_row

    data = _data_of(name, base, settings)
    row = nth_row(number, data.sources("train"), data.sources("eval"), data.renderer, held_out=held_out, eval_share=_share(data, base))
    print_row(row, data.renderer, f"{'eval' if held_out else 'train'} row {number}, {row.source}")


def _share(data: Build, base: str | None) -> float:
    """Share of held-out rows: none of a data file without a recipe."""
    return 0 if base else data.recipe.data.eval_share


@app.command("list")
def list_packages(out: Out = None, as_json: Json = False) -> None:
    """List packages, their built quants and their tags."""
    from olpack.commands.show import package_rows, print_packages

    rows = package_rows(out or Path("build"))
    _print(as_json, rows, partial(print_packages, rows))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipe.yaml, for editors."""
    from olpack import recipe

    _print_json(recipe.json_schema())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine and report the fix of each problem."""
    from olpack.commands.doctor import examine, print_findings

    findings = examine()
    _print(as_json, [vars(finding) for finding in findings], partial(print_findings, findings))
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
