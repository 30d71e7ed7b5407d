"""What registering costs: bytes sent and seconds, for a first deploy and for each kind of change after it; then `olpack deploy` as a whole.

    python benchmarks/deploy.py                                   # against the test suite's double of a server
    OLLAMA_HOST=http://127.0.0.1:11434 python benchmarks/deploy.py --real

Four quants of builtin/tiny-coder, then an assistant that is an adapter beside its base, then a second one on the same base. What it
registers on a real server is removed again. The whole stage, with the comparison of prompts and the trial answer, is run on a package of four quants
that is trained for one step; its requests are counted where the server is the double. Prints a Markdown table and writes it to benchmarks/deploy.md.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ollama_double import OllamaDouble
from oracle import make_workspace
from oracle import olpack as command
from page import command_line, publish
from tiny_models import write_adapter

from olpack import progress
from olpack.deploy import Package, pins_for, protect
from olpack.deploy.client import OllamaClient
from olpack.deploy.register import Registered, TagFile, register
from olpack.export import Target, export
from olpack.export.lora import export_adapter
from olpack.model.base import BUILTIN, Base
from olpack.quants import quant_type

QUANTS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0", "Q6_K")
PACKAGE = Package(system="You write Python.", parameters={"temperature": 0.2, "top_k": 40, "num_ctx": 2048})


def write_files(work: Path) -> tuple[list[TagFile], list[Path]]:
    """Quants of the builtin base, and two adapters for it."""
    base = Base("builtin/tiny-coder", BUILTIN / "tiny-coder")
    template = base.tokenizer().chat_template
    targets = [Target(quant, work / f"coder-{quant}.gguf") for quant in QUANTS]
    made = export(base.path, targets, chat_template=protect(template, pins_for(template, {})))
    files = [TagFile(quant_type(file.quant).tag, file.path, file.sha256) for file in made]
    adapters = [work / "one.gguf", work / "two.gguf"]
    for seed, path in enumerate(adapters):
        export_adapter(base.path, write_adapter(work / path.stem, base.path, seed=seed, r=16), path)
    return files, adapters


def stage_rows(root: Path, url: str, double: OllamaDouble | None) -> list[str]:
    """`olpack deploy` after each kind of change: requests, most tokens that answers may have, bytes sent, seconds."""
    make_workspace(root, BUILTIN / "tiny-coder")
    recipe = root / "modelfiles/oracle/recipe.yaml"
    text = recipe.read_text().replace("epochs: 12, batch_size: 4", "epochs: 1, batch_size: 64").replace("num_ctx: 128", "num_ctx: 1024, top_k: 40")
    recipe.write_text(re.sub("(?m)^quants: .*", "quants: [Q4_0, Q4_K_M, Q5_K_M, Q8_0]", text))

    def run(*words: str) -> None:
        code, _, said = command(root, *words, "oracle", server=url)
        if code:
            raise SystemExit(said)

    run("train")
    run("export")
    rows = []
    for label, before, after in (
        ("first deploy of four quants", "", ""),
        ("a changed system prompt, four tags", "system: Answer in words.", "system: Answer in one word."),
        ("a removed parameter, four tags", ", top_k: 40", ""),
        ("another temperature, four tags", "temperature: 0.0", "temperature: 0.3"),
    ):
        recipe.write_text(recipe.read_text().replace(before, after))
        if double:
            double.requests.clear()
        started = time.monotonic()
        run("deploy")
        seconds = time.monotonic() - started
        asked = [one.body for one in double.requests if one.path in ("/api/chat", "/api/generate")] if double else []
        tokens = sum(body["options"]["num_predict"] for body in asked if not body.get("_debug_render_only"))
        sent = progress.quantity(sum(one.sent for one in double.requests), "B") if double else "–"
        rows.append(f"| {label} | {len(double.requests) if double else '–'} | {tokens if double else '–'} | {sent} | {seconds:.1f} s |")
    command(root, "remove", "oracle", "--yes", server=url)
    return rows


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--real", action="store_true", help="use the server that OLLAMA_HOST names")
    arguments = parser.parse_args()
    progress.use("lines")
    with ExitStack() as open_things:
        work = Path(open_things.enter_context(tempfile.TemporaryDirectory()))
        double = None if arguments.real else open_things.enter_context(OllamaDouble(work))
        client = OllamaClient(double.url if double else None)
        client.require()
        files, (one, two) = write_files(work)
        rows: list[tuple[str, int, float]] = []
        registered: list[str] = []

        def step(label: str, name: str, sent: Sequence[TagFile], package: Package) -> None:
            made: list[Registered] = register(client, name, sent, package)
            rows.append((label, sum(record.bytes_sent for record in made), sum(record.seconds for record in made)))
            registered.extend(record.model for record in made)

        try:
            total = progress.quantity(sum(file.path.stat().st_size for file in files[:4]), "B")
            step(f"first deploy of four quants ({total})", "olpack-coder", files[:4], PACKAGE)
            step("the same again", "olpack-coder", files[:4], PACKAGE)
            changed = dataclasses.replace(PACKAGE, system="You write short Python.")
            step("a changed system prompt, four tags", "olpack-coder", files[:4], changed)
            fewer = dataclasses.replace(changed, parameters={"temperature": 0.2, "num_ctx": 2048})
            step("a removed parameter, four tags", "olpack-coder", files[:4], fewer)
            step(f"a new quant ({progress.quantity(files[4].path.stat().st_size, 'B')})", "olpack-coder", files, fewer)
            size = progress.quantity(one.stat().st_size, "B")
            step(f"an assistant that is an adapter ({size}), its base is there", "olpack-one", [dataclasses.replace(files[1], adapter=one)], PACKAGE)
            step("a second adapter on the same base", "olpack-two", [dataclasses.replace(files[1], adapter=two)], PACKAGE)
        finally:
            for model in dict.fromkeys(registered):
                client.delete(model)
        stage = stage_rows(work / "stage", client.url, double)
        server = f"Ollama {client.version()}" if arguments.real else "the test suite's double of Ollama 0.33"
    publish(
        [
            f"{date.today()}, {platform.machine()}, against {server} on the same machine.",
            "",
            "| what | sent | time |",
            "| --- | ---: | ---: |",
            *(f"| {label} | {progress.quantity(sent, 'B')} | {seconds:.2f} s |" for label, sent, seconds in rows),
            "",
            "The whole stage, `olpack deploy`, in a process that has loaded its libraries (`tokens`: most that the answers asked for may have):",
            "",
            "| what | requests | tokens | sent | time |",
            "| --- | ---: | ---: | ---: | ---: |",
            *stage,
        ],
        arguments.output,
    )


if __name__ == "__main__":
    main()
