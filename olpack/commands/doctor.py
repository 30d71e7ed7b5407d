"""`olpack doctor`: what of this machine is ready, what is not, and the command that fixes it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from olpack import __version__, printable
from olpack.errors import OlpackError
from olpack.installed import install_command
from olpack.progress import quantity
from olpack.workspace import free_bytes

if TYPE_CHECKING:
    from olpack.deploy.client import OllamaClient

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "llama-cpp-python", "gguf", "ollama", "jinja2", "typer")


@dataclass(frozen=True)
class Finding:
    """One part of the machine.

    Attributes:
        part: what was looked at.
        state: "ready"; "missing": olpack works without it; "broken": it does not.
        detail: what was found.
        remedy: the command that fixes it, "" where nothing is wrong.
    """

    part: str
    state: Literal["ready", "missing", "broken"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything that a build needs. Downloads nothing, changes nothing."""
    tried = [_tried("4-bit training", _nf4), _tried("llama.cpp", _llama_cpp)]
    return [_python(), *map(_package, _PACKAGES), _gpu(), *tried, _k_quants(), _converter(), _server(), _answers(), _disk()]


def _python() -> Finding:
    return Finding("olpack", "ready", f"{__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}")


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ready", version(name))
    except PackageNotFoundError:
        from olpack.llamacpp.library import INSTALL

        return Finding(name, "broken", "not installed", INSTALL if name == "llama-cpp-python" else install_command(name))


def _gpu() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("GPU", "broken", f"torch does not import: {error}", "Install torch again.")
    if not torch.cuda.is_available():
        return Finding(
            "GPU", "missing", "none that torch can use: training runs on the CPU", "For an NVIDIA card, install its driver and a CUDA build of torch."
        )
    found = torch.cuda.get_device_properties(0)
    return Finding("GPU", "ready", f"{found.name}, {quantity(found.total_memory, 'B')}, compute capability {found.major}.{found.minor}")


def _tried(part: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(part, "ready", attempt())
    except OlpackError as error:
        return Finding(part, "broken", error.problem, error.remedy)
    except (ImportError, RuntimeError, OSError) as error:
        return Finding(part, "broken", f"{type(error).__name__}: {error}", "`olpack --debug doctor` shows where it comes from.")


def _nf4() -> str:
    import bitsandbytes.functional as quantizer
    import torch

    from olpack.model.four_bits import check_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    replaced = ", by olpack's own formula for rows of broken blocks, which bitsandbytes gets wrong here" if check_kernel() and device == "cpu" else ""
    weight = torch.randn(50, 48, device=device)
    packed, state = quantizer.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = (quantizer.dequantize_4bit(packed, state) - weight).abs().mean().item()
    if not error < 0.2:
        raise OlpackError(f"bitsandbytes loses {error:.2f} per weight in NF4 on {device}; 0.08 is usual.", "Install bitsandbytes again.")
    return f"NF4 round trip on {device}, mean error {error:.3f}{replaced}"


def _llama_cpp() -> str:
    from olpack.llamacpp.probe import check_library

    check_library()
    return "the embedded build runs quantized models"


def _converter() -> Finding:
    from olpack.llamacpp.source import VARIABLE, cached_source, converter_source

    if os.environ.get(VARIABLE):
        return _tried("converter", lambda: str(converter_source()))
    if (found := cached_source()) is None:
        return Finding(
            "converter",
            "missing",
            "llama.cpp's converter is not in the cache: the first export fetches it",
            "Without a network, point OLPACK_LLAMA_CPP at a llama.cpp checkout.",
        )
    return Finding("converter", "ready", str(found))


def _k_quants() -> Finding:
    from olpack.llamacpp.library import k_quants_are_compiled

    try:
        if k_quants_are_compiled():
            return Finding("K-quants", "ready", f"compiled for this processor, with the bits of llama.cpp's{_on_the_gpu()}")
    except OlpackError as error:
        return Finding("K-quants", "broken", error.problem, error.remedy)
    return Finding(
        "K-quants",
        "missing",
        "llama.cpp's own functions make them, several times slower",
        "Install a C++ compiler (`apt install g++`), or name one in CXX.",
    )


def _on_the_gpu() -> str:
    from olpack.llamacpp import gpu_encoder

    try:
        import torch
    except ImportError:
        return ""
    if not torch.cuda.is_available():
        return ""
    encoder = gpu_encoder.start()
    return f"; exports of large models quantize on {encoder.name}, with the same bits" if encoder else "; the GPU does not make them"


def _server() -> Finding:
    from olpack.deploy.client import OllamaClient, creates_adapters

    try:
        client = OllamaClient()
    except OlpackError as error:
        return Finding("Ollama", "broken", error.problem, error.remedy)
    found = client.version()
    if found is None:
        return Finding(
            "Ollama",
            "missing",
            f"no server answers at {client.url}: olpack works, nothing is served",
            "Install it from https://ollama.com/download and start it with `ollama serve`, or set OLLAMA_HOST.",
        )
    if not creates_adapters(found):
        without = f"it creates no models with adapters (`package: adapter`), {_instead(client)}"
        return _tried("Ollama", lambda: f"{client.require()} at {client.url}; {without}")
    return _tried("Ollama", lambda: f"{client.require()} at {client.url}")


def _instead(client: OllamaClient) -> str:
    from olpack.deploy.loopback_registry import reaches
    from olpack.deploy.ollama_store import store_of

    try:
        return f"which are written into its store {store_of(client)}"
    except OlpackError as error:
        if reaches(client):
            return f"which it pulls from a registry that olpack opens on 127.0.0.1 for that moment: {error.problem}"
        return f"and {error.problem}: use `package: merged`"


def _answers() -> Finding:
    from olpack.compare.sandbox import described, protections

    stopped, open_to_them = described(protections())
    if not open_to_them:
        return Finding("answers", "ready", f"Python of models runs in a sandbox: {stopped}")
    return Finding(
        "answers",
        "missing",
        f"Python of models runs with these limits: {stopped}. But {open_to_them}",
        "Compare packages with tasks that run answers in a virtual machine, or on Linux 5.13 or later.",
    )


def _disk() -> Finding:
    return Finding("disk", "ready", f"{quantity(free_bytes(Path('build')), 'B')} free for build/")


def print_findings(findings: list[Finding]) -> None:
    """The findings as a table; remedies below it."""
    from rich.table import Table
    from rich.text import Text

    console = printable.console()
    table = Table(box=None, pad_edge=False, show_header=False)
    marks = {"ready": Text("✓", "green"), "missing": Text("–", "yellow"), "broken": Text("✗", "red")}
    for finding in findings:
        remedy = [(f"\n{finding.remedy}", "dim")] if finding.remedy else []
        table.add_row(marks[finding.state], finding.part, Text.assemble(finding.detail, *remedy))
    console.print(table, highlight=False)
