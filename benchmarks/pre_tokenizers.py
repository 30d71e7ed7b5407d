"""Does `olpack plan` find the pre-tokenizer of llama.cpp that splits text as a published tokenizer does, or refuse with the first text that differs?

    python benchmarks/pre_tokenizers.py qwen3=FOLDER gemma3_text=FOLDER … [--gguf MODEL.gguf]

Each FOLDER holds tokenizer.json and tokenizer_config.json as their publisher wrote them; before the = stands the architecture. It becomes a
model of two layers with random weights and this tokenizer, and the base of a package whose rows are code, digits, Arabic, Chinese, Hindi, emoji
and indented lines. --gguf: a model in this form, loaded by transformers and saved as a folder, and again with a tokenizer.json that
takes digits one by one before anything else, loaded once as its own pipeline and once as the class GPT2Tokenizer.
Prints a Markdown table and writes it to benchmarks/pre_tokenizers.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from page import command_line, environment, measured_here, publish

# A published tokenizer without a chat template is that of a base model; its rows are written in Gemma's turns, whose tokens it has.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
RECIPE = "base: {base}\ndata: {{train: rows.jsonl}}\ntrain: {{quantization: none}}\nquants: [Q8_0]\ncompare: {{reference: false}}\n"
ASKED = (
    "Write is_prime(n).",
    "اكتب دالة تعكس قائمة من 12345 عنصرًا، مَعَ التَّشْكِيل.",
    "写一个函数，把 2026 年 11 月 29 日变成 ISO 格式。",
    "एक फ़ंक्शन लिखिए जो सूची को उलट दे।",
    "Why does 👩‍💻 count as 3 characters, and 🇩🇪 as 2? 🙂🎉",
    "Add 1234567 and 0.5e-10, then  42  more.",
    "WE'LL see: I'm, you've, DON'T, it's — “quoted”, «naïve café».",
    "Привет, напиши функцию. こんにちは、関数を書いて。 안녕하세요.",
    "Explain é against è, ﬁ, å and \u00a0 no-break spaces.",
    "Fix:\r\n\tif x:\r\n\t\treturn   1\r\n\r\n\r\n",
)
ANSWERED = (
    "def f(n: int) -> bool:\n    if n < 2:\n        return False\n\n    return all(n % i for i in range(2, int(n**0.5) + 1))\n",
    "rows = [\n    1,\n    22,\n\t333,\n]  # and 4444\n\n\nprint(rows[::-1], sep='\\n')  \n",
    "for i in range(10):\n        total += {n} * 10 ** {n}\n    # camelCaseName, snake_case_name, HTTPServer2, x86_64, v1.2.3-rc4",
    'SELECT * FROM t WHERE id = {n}{n}{n};\n\n  -- two  spaces   three\n\t\t<div class="a">&nbsp;</div>',
    "الدالة: `def عكس(قائمة): return قائمة[::-1]` ثم 2026/11/29 و ١٢٣٤٥.",
    "可以：x² + y³ ≠ {n}½，範囲は１２３～４５６。 https://example.org/a?b={n}&c=%20#top",
)


def packages(work: Path, folders: list[str], gguf: Path | None) -> Iterator[tuple[str, str, Path]]:
    """(tokenizer, architecture, the base's folder) of each."""
    for named in folders:
        architecture, _, folder = named.partition("=")
        base = work / "bases" / Path(folder).name
        write_model(base, architecture, Path(folder))
        yield Path(folder).name, architecture, base
    if gguf:
        base = work / "bases" / "from-gguf"
        unpack(gguf, base)
        yield f"{gguf.name}, as transformers saves it", "llama", base
        digits = write_digits(base, work / "bases" / "digits")
        yield "the same, and Digits in front", "llama", digits
        named = shutil.copytree(digits, work / "bases" / "digits-gpt2")
        path = named / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8")
        yield "the same as GPT2Tokenizer, which ignores that", "llama", named


def write_model(base: Path, architecture: str, tokenizer: Path) -> None:
    """Two layers with random weights, and the tokenizer's own files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": -(-len(loaded) // 64) * 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": loaded.bos_token_id,
            "eos_token_id": loaded.eos_token_id,
            "pad_token_id": loaded.pad_token_id,
        },
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(base)
    for file in tokenizer.glob("*token*.json"):
        shutil.copy(file, base)
    if not loaded.chat_template:
        (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def unpack(gguf: Path, base: Path) -> None:
    """The model of a GGUF in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    named = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoModelForCausalLM.from_pretrained(**named, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)).save_pretrained(base)
    AutoTokenizer.from_pretrained(**named).save_pretrained(base)


def write_digits(base: Path, folder: Path) -> Path:
    """A copy whose tokenizer.json takes digits one by one before it splits."""
    shutil.copytree(base, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def write_rows(path: Path) -> None:
    lines = []
    for number in range(len(ASKED) * len(ANSWERED)):
        asked, answer = ASKED[number % len(ASKED)], ANSWERED[number // len(ASKED)].replace("{n}", str(number))
        lines.append(json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def planned(work: Path, name: str, base: Path) -> list[str]:
    """What `olpack plan` makes of a package on this base, as cells."""
    from transformers import AutoTokenizer

    package = work / "modelfiles" / name
    package.mkdir(parents=True)
    (package / "recipe.yaml").write_text(RECIPE.format(base=json.dumps(str(base))), encoding="utf-8")
    write_rows(package / "rows.jsonl")
    started = time.perf_counter()
    AutoTokenizer.from_pretrained(base)
    loading = time.perf_counter() - started
    started = time.perf_counter()
    command = [sys.executable, "-m", "olpack", "plan", name, "--json"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, env=environment() | {"OLLAMA_HOST": "127.0.0.1:9", "NO_COLOR": "1"})
    seconds = time.perf_counter() - started
    lines = [json.loads(line)["text"] if line.startswith("{") else line for line in done.stderr.splitlines() if "llama.cpp" in line]
    said = " ".join(lines).replace(f"{work}/", "")
    if done.returncode:
        return ["refused", "", "", f"{loading:.1f}", f"{seconds:.1f}", said]
    found = json.loads(done.stdout)["estimate"]
    counts = [str(found["texts_read"]), str(found["texts_differing"])]
    return [found["pre_tokenizer"] or "SentencePiece", *counts, f"{loading:.1f}", f"{seconds:.1f}", said]


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("folders", nargs="*", metavar="ARCHITECTURE=FOLDER")
    parser.add_argument("--gguf", type=Path)
    arguments = parser.parse_args()
    lines = [
        "# The pre-tokenizer that llama.cpp splits text with",
        "",
        f"{measured_here(__file__)} with the tokenizers' folders.",
        "",
        "`olpack plan` on a package of 60 rows with the tokenizer files as they were published. The chosen pre-tokenizer is right where llama.cpp "
        "makes the training tokenizer's tokens of every text: of all rows, and of the made-up conversations that the chat template accepts. The "
        "time of the plan is that of the whole command, with the import of torch and transformers in two processes. "
        "A difference in a made-up conversation is a warning; one in a row ends the plan.",
        "",
        "| tokenizer | architecture | chosen | texts | differ | tokenizer loads, s | plan, s | said |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (label, architecture, base) in enumerate(packages(Path(scratch), arguments.folders, arguments.gguf)):
            cells = [label, architecture, *planned(Path(scratch), f"package-{number}", base)]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
