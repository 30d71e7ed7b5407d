"""Suites of lm-evaluation-harness on a GGUF, against transformers on the same weights. The data lie in tests/data/suites."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
import torch
from test_compare_measure import SETTINGS, quant_file

from olpack.compare.measure import measure
from olpack.llamacpp.engine import Engine

SUITES = Path(__file__).parent / "data" / "suites"


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """The harness without a network, its caches in a folder of the test."""
    for name, value in {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(SUITES)
    pytest.importorskip("lm_eval")
    from olpack.compare import harness

    return harness


def logprobs(model, context: list[int], continuation: list[int]) -> torch.Tensor:
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([context + continuation])).logits[0].double(), -1)
    return scores[range(len(context) - 1, len(context) + len(continuation) - 1), continuation]


def test_what_the_harness_reads_is_what_transformers_says(harness, tmp_path):
    tokenizer = tiny_gguf.tokenizer()
    model = tiny_gguf.model(tokenizer.get_vocab_size())
    path = tiny_gguf.write(tmp_path / "F32.gguf", model, tokenizer)
    questions = [json.loads(line) for line in (SUITES / "sums.jsonl").read_text().splitlines()]

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    right, rolled, length = 0, 0.0, 0
    for question in questions:
        context = ids(question["question"])
        sums = [logprobs(model, context, ids(question["question"] + choice)[len(context) :]).sum().item() for choice in question["choices"]]
        right += sums.index(max(sums)) == question["answer"]
        text = question["question"] + question["choices"][question["answer"]]
        rolled -= logprobs(model, [tokenizer.token_to_id("<|im_end|>")], ids(text)).sum().item()
        length += len(text.encode())

    seen: list[tuple[int, int]] = []
    with Engine(path, 256, 1) as engine:
        (chosen,) = harness.run_suite(engine, "local_sums", SUITES, None, lambda done, total: seen.append((done, total)))
        (read,) = harness.run_suite(engine, "local_sums_read", SUITES, None, lambda *_: None)
        (said,) = harness.run_suite(engine, "local_sums_said", SUITES, 3, lambda *_: None)
    assert (chosen.suite, chosen.metric, chosen.value) == ("local_sums", "acc", right / len(questions))
    assert 0 < chosen.standard_error < 0.2 and seen[-1] == (30, 30)
    assert read.value == pytest.approx(rolled / length / torch.tensor(2.0).log().item(), rel=1e-3)
    assert said.value == 0 and said.limit == 3


def test_suites_are_measured_in_the_worker_and_kept(harness, tmp_path):
    import dataclasses

    tokenizer = tiny_gguf.tokenizer()
    tiny_gguf.write(tmp_path / "F32.gguf", tiny_gguf.model(tokenizer.get_vocab_size()), tokenizer)
    settings = dataclasses.replace(SETTINGS, prompt_lengths=(16,), repeats=1, suites=("local_sums",), suite_folder=str(SUITES), suite_limit=4)
    first = measure([quant_file(tmp_path, "F32")], [], [], settings, None, "tiny", tmp_path / "cache")
    (score,) = first.quants[0].suites
    assert (score.suite, score.limit) == ("local_sums", 4) and not first.quants[0].flags
    kept = (tmp_path / "cache" / "f32.suite-local_sums.json").stat().st_mtime_ns
    again = measure([quant_file(tmp_path, "F32")], [], [], settings, None, "tiny", tmp_path / "cache")
    assert again.quants == first.quants and (tmp_path / "cache" / "f32.suite-local_sums.json").stat().st_mtime_ns == kept


def test_an_unknown_suite_is_refused_with_those_that_are_near(harness):
    from olpack.errors import OlpackError

    with pytest.raises(OlpackError, match="no suite 'sums'.*local_sums"):
        harness.check_suites(["sums"], SUITES)
    harness.check_suites(["local_sums", "gsm8k"], SUITES)


def test_without_the_harness_the_command_that_installs_it_is_said():
    code = (
        "import sys; sys.modules['lm_eval'] = None\nfrom olpack.errors import OlpackError\ntry: import olpack.compare.harness\n"
        "except OlpackError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert said == f"Suites need lm-evaluation-harness, which is not installed. Install it: {sys.executable} -m pip install 'lm-eval>=0.4.13'.\n"
