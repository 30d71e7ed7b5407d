"""The double answers as the recorded server did: all exchanges of both recordings, replayed in order, digests of layers and manifests included."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from ollama_double import Answer, OllamaDouble
from ollama_double_store import CHATML, Facts, encoded


def _recorded(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(__file__).with_name("data").joinpath("ollama", name).read_text(encoding="utf-8").split("\n") if line]


TRANSCRIPT, SECOND = _recorded("transcript.jsonl"), _recorded("transcript_second.jsonl")
CODER, NEAR, TRUNCATED = (
    exchange["request"]["path"].removeprefix("/api/blobs/")
    for exchange in TRANSCRIPT
    if exchange["request"]["raw_bytes"] and exchange["response"]["status"] == 201
)

# Times, and what follows from them or from the memory of the recording machine.
_VOLATILE = {"created_at", "modified_at", "expires_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}


def _shown(model: str, transcript: list[dict] = TRANSCRIPT) -> dict:
    return next(
        one["response"]["body"][0]
        for one in transcript
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
    double.answer = lambda prompt: next(answer for question, answer in sorted(answers.items(), key=lambda item: -len(item[0])) if question in prompt)


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
        if "digest" in value and value.get("name") == _WITH_ADAPTER:
            value = value | {"digest": "…"}
        return {name: _comparable(item, "ps size" if name == "size" and "expires_at" in value else name) for name, item in value.items()}
    if isinstance(value, list):
        if key == "models":  # latest first, to the second; those that came before the recording are nobody's here
            value = sorted((model for model in value if not model["name"].startswith(_OF_OTHERS)), key=lambda model: model["name"])
        return [number for number in value if isinstance(number, int)][:8] if key == "context" else [_comparable(item) for item in value]
    if key == "ps size":
        return "bytes"
    if key == "modelfile":  # the server writes parameters in no order
        lines = value.splitlines()
        return sorted(line for line in lines if line.startswith("PARAMETER")), [line for line in lines if not line.startswith("PARAMETER")]
    return value


def _prime_second(double: OllamaDouble) -> None:
    """The base, the adapter and the system prompt are on the server before its recording begins."""
    shown = _shown("rec-base", SECOND)
    tuned = next(one["request"]["json"] for one in SECOND if (one["request"]["json"] or {}).get("adapters"))
    base, [adapter] = SECOND[0]["request"]["json"]["files"]["base.gguf"], tuned["adapters"].values()
    double.store.primed = {base: Facts(shown["model_info"], shown["tensors"], shown["template"]), adapter: Facts({"general.type": "adapter"})}
    tags = next(one["response"]["body"][0]["models"] for one in SECOND if one["request"]["path"] == "/api/tags")
    listed = {model["name"]: model["size"] for model in tags}
    texts = len(tuned["system"].encode()) + len(encoded(tuned["parameters"]))
    sizes = {base: listed["rec-base:latest"] - _CONFIG_BYTES, adapter: listed["rec-tuned:latest"] - listed["rec-base:latest"] - texts}
    for digest, size in sizes.items():
        with double.store.blob(digest).open("wb") as file:
            file.truncate(size)
    double.store.put(tuned["system"].encode())
    looping, plain = (SECOND[number]["response"]["body"] for number in (11, 12))
    said = plain[0]["response"].rstrip("0")
    before = sum(1 if "…" not in line else int(line["…"].split()[0]) for line in looping) - _SAME_TOKENS

    def answer(prompt: str) -> Answer:
        if "kiwj" in prompt:
            first = [line["response"] for line in looping[:4]]
            return Answer([*first, *_pieces(said.removeprefix("".join(first)), before - 4), *"0" * 64]) if prompt.startswith("kiwj") else chatted
        return _as_answer(SECOND[5 if tuned["system"] in prompt else 6]["response"]["body"][0])

    first, last = SECOND[13]["response"]["body"][:4], SECOND[13]["response"]["body"][-1]
    chatted = Answer([line["message"]["content"] for line in first] + ["0", "1"] * 97 + ["0"] * 3, prompt_tokens=[*range(last["prompt_eval_count"])])
    double.answer = answer


_OF_OTHERS = ("smol:", "coding-assistant:")
_WITH_ADAPTER = "rec-tuned:latest"  # what the server writes otherwise into this manifest is not in its recorded answers
_CONFIG_BYTES = 151  # of rec-base's config, which the size in the list counts
_SAME_TOKENS = 31


def _pieces(text: str, count: int) -> list[str]:
    return [*text[: count - 1], text[count - 1 :]]


def _as_answer(recorded: dict) -> Answer:
    """A plain answer whose pieces are not recorded, only their number."""
    cut = recorded["done_reason"] == "length"
    pieces = _pieces(recorded["message"]["content"], recorded["eval_count"] - (not cut))
    return Answer(pieces + ["…"] * cut, prompt_tokens=[*range(recorded["prompt_eval_count"])])


def _without_the_same(body: list[dict], recorded: list[dict]) -> list[dict]:
    """An answer with as many lines folded to one as the recording has folded there."""
    folded = next((number for number, line in enumerate(recorded) if "…" in line), None)
    if folded is None:
        return body
    count = int(recorded[folded]["…"].split()[0])
    return [*body[:folded], {"…": f"{min(count, len(body) - len(recorded) + 1)} more lines of the same form"}, *body[folded + count :]]


@pytest.mark.parametrize(("transcript", "prime", "count"), [(TRANSCRIPT, _prime, 46), (SECOND, _prime_second, 19)], ids=["first", "second"])
def test_answers_as_recorded(ollama_double: OllamaDouble, transcript: list[dict], prime: Callable[[OllamaDouble], None], count: int) -> None:
    prime(ollama_double)
    assert len(transcript) == count
    for number, exchange in enumerate(transcript):
        request, recorded = exchange["request"], exchange["response"]
        with httpx.Client(base_url=ollama_double.url, trust_env=False) as client:
            answer = _send(client, request)
        body = _without_the_same([json.loads(line) for line in answer.text.splitlines()], recorded["body"])
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
