"""The double answers as the recorded server did: all recorded exchanges, replayed in order, digests of layers and manifests included."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import httpx
from ollama_double import Answer, OllamaDouble
from ollama_double_store import CHATML, Facts

TRANSCRIPT = [json.loads(line) for line in Path(__file__).with_name("data").joinpath("ollama/transcript.jsonl").read_text().splitlines()]
CODER, NEAR, TRUNCATED = (
    exchange["request"]["path"].removeprefix("/api/blobs/")
    for exchange in TRANSCRIPT
    if exchange["request"]["raw_bytes"] and exchange["response"]["status"] == 201
)

# Times, and what follows from them or from the memory of the recording machine.
_VOLATILE = {"created_at", "modified_at", "expires_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}


def _shown(model: str) -> dict:
    return next(
        one["response"]["body"][0]
        for one in TRANSCRIPT
        if one["request"]["path"] == "/api/show" and (one["request"]["json"] or {}).get("model") == model
    )


def _prime(double: OllamaDouble) -> None:
    """Only the length of the recorded blobs is known: what the server knew of them is told."""
    coder, near = _shown("coder:q4_K_M"), _shown("near")
    rewritten = re.search(r"sha256-([0-9a-f]{64})", near["modelfile"]).group(1)
    double.store.primed = {
        CODER: Facts(coder["model_info"], coder["tensors"], chat_template=CHATML.jinja),
        NEAR: Facts(near["model_info"], near["tensors"], chat_template=near["template"], rewritten_as=f"sha256:{rewritten}"),
        TRUNCATED: Facts({}),
    }
    answers = {}
    for one in TRANSCRIPT:
        *pieces, last = one["response"]["body"] or [{}]
        if "eval_count" in last:
            asked = one["request"]["json"]
            question = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
            said = [part.get("response") or part["message"]["content"] for part in pieces] or [last["response"]]
            said = said if pieces else [said[0][: len(said[0]) // last["eval_count"]]]
            ids = [number for number in last.get("context", []) if isinstance(number, int)]
            answers[question] = Answer(
                said, ends=False, prompt_tokens=[*ids, *range(last["prompt_eval_count"] - len(ids))], logprobs=last.get("logprobs")
            )
    double.answer = lambda prompt: next(
        answer for question, answer in sorted(answers.items(), key=lambda item: -len(item[0])) if question in prompt
    )


def _send(client: httpx.Client, request: dict) -> httpx.Response:
    body = b""
    if request["raw_bytes"] is not None:
        body = b"hello" if request["raw_bytes"] == 5 else bytes(request["raw_bytes"])
    elif request["json"] is not None:
        body = json.dumps(request["json"]).encode()
    return client.request(request["method"], request["path"], content=body)


def _comparable(value: object, key: str = "") -> object:
    """An answer without what no two servers have in common."""
    if key in _VOLATILE:
        return type(value).__name__
    if isinstance(value, dict):
        return {name: _comparable(item, "ps size" if name == "size" and "expires_at" in value else name) for name, item in value.items()}
    if isinstance(value, list):
        if key == "models":  # latest first, to the second
            value = sorted(value, key=lambda model: model["name"])
        return [number for number in value if isinstance(number, int)][:8] if key == "context" else [_comparable(item) for item in value]
    if key == "ps size":
        return "bytes"
    if key == "modelfile":  # the server writes parameters in no order
        lines = value.splitlines()
        return sorted(line for line in lines if line.startswith("PARAMETER")), [line for line in lines if not line.startswith("PARAMETER")]
    return value


def test_answers_as_recorded(ollama_double: OllamaDouble) -> None:
    _prime(ollama_double)
    assert len(TRANSCRIPT) == 46
    for number, exchange in enumerate(TRANSCRIPT):
        request, recorded = exchange["request"], exchange["response"]
        with httpx.Client(base_url=ollama_double.url, trust_env=False) as client:
            answer = _send(client, request)
        body = [json.loads(line) for line in answer.text.splitlines()]
        where = f"{number}: {exchange['note']}"
        assert (answer.status_code, answer.headers.get("content-type")) == (recorded["status"], recorded["content_type"]), where
        assert _comparable(body) == _comparable(recorded["body"]), where


def test_a_blob_that_is_there_is_not_read_again(ollama_double: OllamaDouble) -> None:
    digest = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    with httpx.Client(base_url=ollama_double.url, trust_env=False) as client:
        assert client.post(f"/api/blobs/{digest}", content=b"hello").status_code == 201
        with contextlib.suppress(httpx.TransportError):  # whether the client still hears the answer depends on how fast it sends
            client.post(f"/api/blobs/{digest}", content=bytes(50_000_000))
    assert [request.sent for request in ollama_double.requests] == [5, 0]
