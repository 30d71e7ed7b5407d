"""The requests that registering an adapter on a model of the server takes, with their bytes, in each of the three ways.

    python benchmarks/adapter_requests.py

`builtin/tiny-coder` in Q4_K_M is a model of the test suite's double of a server, `coder:latest`, and an adapter on it is registered: created by the
server, written into its model store, and pulled by it from the registry on 127.0.0.1. Prints Markdown tables and writes them to
benchmarks/adapter_requests.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ollama_double import OllamaDouble, Request
from page import command_line, publish
from tiny_models import write_adapter

from olpack import progress
from olpack.deploy import Package
from olpack.deploy.client import OllamaClient, blob_digest
from olpack.deploy.loopback_registry import pull_tag
from olpack.deploy.ollama_store import place
from olpack.deploy.register import Origin, Registered, TagFile, register
from olpack.export import Target, export
from olpack.export.lora import export_adapter
from olpack.model.base import BUILTIN, Base
from olpack.model.chat_template import pins_for, protect

PACKAGE = Package(system="You write Python.", parameters={"temperature": 0.2, "num_ctx": 2048})


def registered(work: Path, way: str, weights: Path, adapter: Path) -> list[str]:
    """One way on a server of its own: lines of the page."""
    with OllamaDouble(work / way) as double:
        client = OllamaClient(double.url)
        client.upload(weights, digest := blob_digest(weights))
        client.create({"model": "coder:latest", "files": {weights.name: digest}})
        double.store.refuses_adapters, double.store.shown = way != "created", str(double.store.root)
        info = client.show("coder:latest")
        assert info is not None and info.path is not None
        file = TagFile("q4_K_M", Path(info.path), digest.removeprefix("sha256:"), adapter, Origin("coder:latest", info))
        ways: dict[str, Callable[[], Registered]] = {
            "created": lambda: register(client, "support", [file], PACKAGE)[0],
            "written": lambda: place(client, double.store.root, "support", file, PACKAGE),
            "pulled": lambda: pull_tag(client, "support", file, PACKAGE),
        }
        blobs = {path.name for path in (double.store.root / "blobs").iterdir()}
        double.requests.clear()
        made = ways[way]()
        asked = list(double.requests)
        new = [path for path in (double.store.root / "blobs").iterdir() if path.name not in blobs]
        names = {blob_digest(adapter): "<adapter>", digest: "<weights>", made.digest: "<manifest>"}

        def table(title: str, requests: list[Request]) -> list[str]:
            lines = ["", f"| {title} | bytes |", "| --- | ---: |"]
            return lines + [f"| `{request.method} {short(request.path, names)}` | {request.sent:,} |" for request in requests]

        size = sum(path.stat().st_size for path in new)
        kept = f"New in its store: {len(new)} blobs of {size:,} bytes, of which the adapter is {adapter.stat().st_size:,}, and the manifest."
        return [
            *table("olpack asks the server", asked),
            *(table("the server asks olpack, on 127.0.0.1", double.fetched) if double.fetched else []),
            "",
            kept,
        ]


def short(path: str, names: dict[str, str]) -> str:
    """A path without what is random in it: digests, and the registry's name."""
    place, _, last = path.rpartition("/")
    space = "/v2/<name>/" + place.rpartition("/")[2] if place.startswith("/v2/") else place
    return f"{space}/{names.get(last, '<text>' if last.startswith('sha256:') else last)}"


def main() -> None:
    arguments = command_line(__file__, __doc__).parse_args()
    progress.use("lines")
    with tempfile.TemporaryDirectory() as folder:
        work, base = Path(folder), BUILTIN / "tiny-coder"
        template = Base("builtin/tiny-coder", base).tokenizer().chat_template
        export(base, [Target("Q4_K_M", weights := work / "coder.gguf")], chat_template=protect(template, pins_for(template)))
        export_adapter(base, write_adapter(work / "adapter", base, seed=0, r=16), adapter := work / "adapter.gguf")
        pages = {way: registered(work, way, weights, adapter) for way in ("created", "written", "pulled")}
        size = f"{weights.stat().st_size:,}"
    titles = {
        "created": "Created by the server (0.30 to 0.34.0)",
        "written": "Written into its model store (0.34.1 and later, where it can be written)",
        "pulled": "Pulled by the server from olpack (0.34.1 and later, where its store cannot be written)",
    }
    publish(
        [
            "# An adapter on a model of the server: the requests",
            "",
            f"{date.today()}. `builtin/tiny-coder` in Q4_K_M, {size} bytes, is a model of the test suite's double of a server; an adapter on it is "
            "registered.",
            "Bytes are those of bodies that are sent, and those that the server gets from olpack. The server asks three times for a blob: for its "
            "size, for its place, of which answer it does not read the body, and for its content.",
            "The double pulls as the source of Ollama 0.33 does; no real server has been recorded pulling a tag.",
            *(line for way, lines in pages.items() for line in ("", f"## {titles[way]}", *lines)),
            "",
            "`python benchmarks/adapter_requests.py`",
        ],
        arguments.output,
    )


if __name__ == "__main__":
    main()
