"""Measuring real GGUF files in real worker processes, and through a double of the server."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import psutil
import pytest
import tiny_gguf
import torch
from ollama_double import OllamaDouble
from transformers import Qwen3Config, Qwen3ForCausalLM

from olpack.compare.cache import Cache, Units
from olpack.compare.job import Asked, Job, RowJob, events, run_worker, started
from olpack.compare.measure import measure
from olpack.compare.results import Results
from olpack.compare.settings import ComparedFile, MeasureSettings
from olpack.compare.speed import repeats_of, visits
from olpack.data.rows import TokenRow
from olpack.deploy.client import OllamaClient, blob_digest
from olpack.errors import OlpackError
from olpack.workspace import file_digest

SETTINGS = MeasureSettings(prompt_lengths=(48,), generated_tokens=8, repeats=2, context=512, threads=1, answer_tokens=48)
PROMPTS = [[{"role": "user", "content": "Write add."}], [{"role": "user", "content": "naïve 日本語"}]]
TEXTS = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\ndef add(a, b):<|im_end|>\n",
    "<|im_start|>assistant\nnaïve café 🙂<|im_end|>\n",
    "print(item)",
]


def row(tokenizer, text: str, number: int) -> TokenRow:
    ids = tokenizer.encode(text).ids
    return TokenRow(ids, [at >= len(ids) // 3 for at in range(len(ids))], text, f"eval.jsonl:{number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """F32 and Q8_0 of one model; CRASH, on which llama.cpp stops at an assertion; ENDLESS, which says one thing for ever."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = tiny_gguf.tokenizer()
    model = tiny_gguf.model(tokenizer.get_vocab_size())
    tiny_gguf.write(folder / "F32.gguf", model, tokenizer)
    tiny_gguf.write(folder / "Q8_0.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q8_0)
    # Four heads cannot share three pairs of keys and values: no check at loading finds it.
    uneven = Qwen3Config(**{**model.config.to_dict(), "num_key_value_heads": 3})
    tiny_gguf.write(folder / "CRASH.gguf", Qwen3ForCausalLM(uneven).float(), tokenizer)
    tiny_gguf.write(folder / "ENDLESS.gguf", tiny_gguf.parrot(tokenizer.get_vocab_size(), tokenizer.encode("x").ids[0]), tokenizer)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[TokenRow]:
    tokenizer = tiny_gguf.tokenizer()
    return [row(tokenizer, text, number) for number, text in enumerate(TEXTS, 1)]


def quant_file(folder: Path, name: str) -> ComparedFile:
    path = folder / f"{name}.gguf"
    return ComparedFile(name, name.lower(), path, path.stat().st_size, 8.5, file_digest(path))


def test_everything_is_measured_without_a_server(folder, rows):
    results = measure([quant_file(folder, "F32"), quant_file(folder, "Q8_0")], rows, PROMPTS, SETTINGS, None, "tiny")
    full, small = results.quants
    for quant in results.quants:
        speed = quant.speed
        assert speed.prompt[0].prompt_tokens == 48 and len(speed.prompt[0].tokens_per_s.values) == 2
        assert speed.generation_tokens_per_s.low > 0 and len(speed.load_warm_s.values) == 3
        assert 0 < speed.peak_memory_bytes < 500_000_000
        assert quant.perplexity.same_tokens_rows == 3 and len(quant.answers) == 2
    assert full.sha256 != small.sha256 and len(full.sha256) == 64
    assert "embedded" in full.speed.engine and results.recommendation.tag in ("f32", "q8_0")
    assert Results.model_validate_json(results.model_dump_json()) == results

    tokenizer = tiny_gguf.tokenizer()
    model, total = tiny_gguf.model(tokenizer.get_vocab_size()), 0.0
    with torch.no_grad():
        for one in rows:
            scores = torch.log_softmax(model(torch.tensor([one.ids])).logits[0].double(), -1)
            total -= sum(scores[at - 1, one.ids[at]].item() for at in range(1, len(one.ids)) if one.loss_mask[at])
    expected = math.exp(total / sum(one.target_count for one in rows))
    assert full.perplexity.value == pytest.approx(expected, rel=1e-3)


def test_a_worker_killed_by_a_signal_does_not_stop_the_others(folder, rows, tmp_path):
    files = [quant_file(folder, "CRASH"), quant_file(folder, "F32")]
    results = measure(files, rows, PROMPTS, SETTINGS, None, "tiny", tmp_path)
    crashed, sound = results.quants
    assert crashed.speed is None and crashed.perplexity is None
    (flag,) = crashed.flags
    assert flag.serious and "measured CRASH.gguf crashed (SIGABRT)" in flag.text and "GGML_NATIVE=OFF" in flag.text and "GGML_ASSERT" in flag.text
    assert sound.perplexity is not None and not any(flag.serious for flag in sound.flags)
    assert results.recommendation.quant == "F32"
    assert {path.name for path in tmp_path.iterdir()} == {"f32.speed-0.json", "f32.speed-1.json", "f32.perplexity.json", "f32.answers.json"}


def test_when_nothing_can_be_measured_the_first_error_is_raised(folder, tmp_path, rows):
    broken = tmp_path / "BROKEN.gguf"
    broken.write_bytes((folder / "F32.gguf").read_bytes()[:50_000])
    with pytest.raises(OlpackError, match=r"BROKEN\.gguf"):
        measure([quant_file(tmp_path, "BROKEN")], rows, [], SETTINGS, None, "tiny")


def test_what_was_measured_survives_a_later_crash(folder, rows):
    # the answer would take so long that the signal comes in the midst of it
    job = Job(
        path=folder / "ENDLESS.gguf",
        engine="e",
        context=60_000,
        threads=1,
        untimed_threads=1,
        answer_tokens=50_000,
        answers=[Asked(messages=PROMPTS[0])],
        perplexity=True,
        rows=[{"ids": one.ids, "loss_mask": one.loss_mask, "text": one.text} for one in rows],
    )
    seen = []
    stream = events(job)
    with pytest.raises(OlpackError, match=r"measured ENDLESS.gguf crashed \(SIGSEGV\)"):
        for event in stream:
            seen.append(event)
            if event["event"] == "result" and event["unit"] == "perplexity":
                os.kill(*_workers(), signal.SIGSEGV)
    assert any(event["event"] == "result" for event in seen)


def _workers() -> set[int]:
    return {child.pid for child in psutil.Process().children() if "olpack.compare.worker" in child.cmdline()}


def test_an_unchanged_quant_is_not_measured_again(folder, rows, tmp_path):
    original = quant_file(folder, "F32")
    copy = tmp_path / "F32.gguf"
    copy.write_bytes(original.path.read_bytes())
    file = dataclasses.replace(original, path=copy, sha256="a" * 64)
    cache = tmp_path / "cache"
    first = measure([file], rows, PROMPTS, SETTINGS, None, "tiny", cache)
    copy.unlink()  # were it measured again, it would fail
    again = measure([file], rows, PROMPTS, SETTINGS, None, "tiny", cache)
    assert again.quants == first.quants

    other = dataclasses.replace(file, sha256="b" * 64)
    with pytest.raises(OlpackError, match="no GGUF"):
        measure([other], rows, PROMPTS, SETTINGS, None, "tiny", cache)


def test_other_prompts_leave_speed_and_perplexity_alone(folder, rows, tmp_path):
    file = quant_file(folder, "F32")
    measure([file], rows, PROMPTS, SETTINGS, None, "tiny", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    measure([file], rows, PROMPTS[:1], SETTINGS, None, "tiny", tmp_path)
    changed = {path.name for path in tmp_path.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"f32.answers.json"}


def test_a_damaged_cache_is_measured_anew(folder, rows, tmp_path):
    file = quant_file(folder, "F32")
    measure([file], rows, [], SETTINGS, None, "tiny", tmp_path)
    (tmp_path / "f32.perplexity.json").write_text('{"key": ')
    assert measure([file], rows, [], SETTINGS, None, "tiny", tmp_path).quants[0].perplexity is not None
    assert json.loads((tmp_path / "f32.perplexity.json").read_text())["data"]


def test_what_is_wrong_with_a_model_is_flagged(folder, rows):
    strange = dataclasses.replace(rows[0], ids=[*rows[0].ids[:-1], 7])
    (result,) = measure([quant_file(folder, "ENDLESS")], [strange, *rows[1:]], PROMPTS, SETTINGS, None, "tiny").quants
    assert {flag.code: flag.serious for flag in result.flags} == {"tokenizer": True, "looping": False}
    assert "1 of 3 rows" in result.flags[0].text and result.answers[0].text == "x" * 48 and result.answers[0].finish == "length"


def test_rows_and_prompts_may_be_absent(folder):
    results = measure([quant_file(folder, "F32")], [], [], SETTINGS, None, "tiny")
    assert results.rows is None and results.recommendation is None and results.quants[0].answers is None and not results.quants[0].flags


def _imported(modules: str, among: tuple[str, ...]) -> list[str]:
    code = f"import sys, {modules}; print(*[name for name in {among} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_measuring_does_not_load_llama_cpp_or_torch_here():
    assert _imported("olpack.compare.measure, olpack.compare.report", ("llama_cpp", "torch", "matplotlib", "httpx")) == []


def test_a_process_that_measures_imports_neither_recipes_nor_reports():
    assert _imported("olpack.compare.worker", ("olpack.recipe", "olpack.compare.report", "rich", "torch", "matplotlib", "httpx", "llama_cpp")) == [
        "llama_cpp"
    ]


def test_processes_that_were_started_take_the_next_jobs(folder, rows):
    one = rows[0]
    job = Job(path=folder / "F32.gguf", engine="e", context=64, threads=1, untimed_threads=1, answer_tokens=1, perplexity=True)
    job.rows = [RowJob(ids=one.ids, loss_mask=one.loss_mask, text=one.text)]
    units = Units(Cache(None), "f32", {})
    with started(2):
        there = _workers()
        assert 1 <= len(there) <= 2  # no more than processors
        assert run_worker(job, "F32", units) == [] and units.known["perplexity"]["same_tokens_rows"] == 1
        assert len(_workers()) == len(there) - 1 and _workers() <= there
    assert not _workers()
    assert run_worker(job, "F32", Units(Cache(None), "f32", {})) == []
    with started(1):
        (killed,) = _workers()
        psutil.Process(killed).kill()
        psutil.wait_procs([psutil.Process(killed)])
        assert run_worker(job, "F32", Units(Cache(None), "f32", {})) == []  # in another one


def test_speed_is_taken_through_the_server(folder, rows, ollama_double: OllamaDouble, capsys):
    client = OllamaClient(ollama_double.url)
    file = quant_file(folder, "Q8_0")
    digest = blob_digest(file.path)
    client.upload(file.path, digest)
    client.create({"model": "tiny:q8_0", "files": {"model.gguf": digest}, "parameters": {"num_ctx": 512}})
    client.upload(other := folder / "F32.gguf", other_digest := blob_digest(other))
    client.create({"model": "other:latest", "files": {"model.gguf": other_digest}, "parameters": {"num_ctx": 512}})
    client.generate("other:latest", "hi")
    ollama_double.requests.clear()

    (quant,) = measure([file], rows, PROMPTS, SETTINGS, client, "tiny").quants
    speed = quant.speed
    # the double takes 0.1 ms for a prompt token and 3 ms for a generated one
    assert speed.prompt[0].tokens_per_s.values == pytest.approx([10_000] * 2)
    assert speed.generation_tokens_per_s.values == pytest.approx([1000 / 3] * 2)
    assert abs(speed.prompt[0].prompt_tokens - 48) <= 8
    assert speed.engine == "Ollama 0.33.0-rc2" and speed.context == 512 and speed.threads is None and speed.load_cold_s is None
    assert speed.peak_memory_bytes == file.size + 1500 * 512 and speed.gpu_memory_bytes == 0
    assert quant.perplexity is not None and len(quant.answers) == 2

    bodies = [request.body for request in ollama_double.requests if request.path == "/api/generate"]
    prompts = [body["prompt"] for body in bodies if body.get("prompt")]
    assert len({prompt[:3] for prompt in prompts}) >= len(prompts) - 1 and all(body["raw"] for body in bodies if body.get("prompt"))
    assert all(body["options"]["num_ctx"] == 512 for body in bodies if body.get("prompt"))
    assert all(first > 0 for first in speed.prompt[0].first_token_s.values)
    # one between loads, one at the end of each round; somebody else's model stays, and a warning names it
    assert [body["model"] for body in bodies if body.get("keep_alive") == 0] == ["tiny:q8_0"] * 5
    assert list(ollama_double.loaded) == ["other:latest"]
    assert capsys.readouterr().err.count("The server also runs other:latest") == 1


def test_a_model_that_the_server_lacks_is_flagged(folder, rows, ollama_double: OllamaDouble):
    (quant,) = measure([quant_file(folder, "F32")], rows, [], SETTINGS, OllamaClient(ollama_double.url), "absent").quants
    assert quant.speed is None and quant.perplexity is not None
    assert [flag.code for flag in quant.flags] == ["failed"] and "absent:f32" in quant.flags[0].text


def test_several_clients_at_once(folder, rows, ollama_double: OllamaDouble):
    client = OllamaClient(ollama_double.url)
    file = quant_file(folder, "Q8_0")
    client.upload(file.path, digest := blob_digest(file.path))
    client.create({"model": "tiny:q8_0", "files": {"model.gguf": digest}, "parameters": {"num_ctx": 512}})
    (quant,) = measure([file], [], [], dataclasses.replace(SETTINGS, clients=(1, 3)), client, "tiny").quants
    assert [(load.clients, load.failed, len(load.first_token_s.values)) for load in quant.speed.concurrency] == [(1, 0, 1), (3, 0, 3)]
    assert all(load.tokens_per_s > 0 for load in quant.speed.concurrency)


def test_every_model_is_visited_and_then_again_in_the_opposite_order():
    assert visits(3) == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]
    assert [[repeats_of(number, repeats) for number in range(2)] for repeats in (1, 2, 3, 4)] == [[1, 1], [1, 1], [2, 1], [2, 2]]


def test_a_comparison_goes_on_in_the_midst_of_the_rounds(folder, rows, tmp_path):
    files = [quant_file(folder, "F32"), quant_file(folder, "Q8_0")]
    measure(files, [], PROMPTS, SETTINGS, None, "tiny", tmp_path)
    kept = (tmp_path / "f32.speed-0.json").read_bytes()
    (tmp_path / "f32.speed-1.json").unlink()
    again = measure(files, [], PROMPTS, SETTINGS, None, "tiny", tmp_path)
    assert (tmp_path / "f32.speed-0.json").read_bytes() == kept and (tmp_path / "f32.speed-1.json").is_file()
    assert len(again.quants[0].speed.generation_tokens_per_s.values) == 2
