"""What a server may answer, and what olpack makes of it: one error that names the server, or one figure less in a comparison.

pytest -rP tests/test_server_answers.py    # prints the table: call, answer, sentence
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import served_gguf
from ollama_double_store import CHATML

from olpack.compare.served_models import compare_served, settings_for
from olpack.compare.settings import MeasureSettings
from olpack.deploy import client as client_module
from olpack.deploy.client import OllamaClient, creates_adapters
from olpack.deploy.push import push_to_ollama
from olpack.deploy.register import Package, TagFile, register
from olpack.errors import OlpackError
from olpack.model.chat_template import protect

DIGEST = "a" * 64
FOREIGN = "answered with something that is not Ollama's"


@dataclass
class Reply:
    """Bytes of an answer. `length` is what its head promises; None: the connection's end is its end."""

    body: bytes | Callable[[], Iterator[bytes]]
    status: int = 200
    length: int | None = None


class Raw:
    """A server that answers every request with the same bytes."""

    def __init__(self, reply: Reply):
        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
            handler.send_response(reply.status)
            if reply.length is not None:
                handler.send_header("Content-Length", str(reply.length))
            handler.send_header("Connection", "close")
            handler.end_headers()
            for piece in reply.body() if callable(reply.body) else [reply.body]:
                handler.wfile.write(piece)
                handler.wfile.flush()

        methods = dict.fromkeys(("do_GET", "do_POST", "do_HEAD", "do_DELETE"), answer)
        handler = type("Handler", (BaseHTTPRequestHandler,), {**methods, "log_message": lambda *_: None})
        server = type("Quiet", (ThreadingHTTPServer,), {"daemon_threads": True, "handle_error": lambda *_: None})
        self._server = server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def j(value: object) -> bytes:
    return json.dumps(value).encode()


def deep() -> bytes:
    return b'{"models":' * 100_000


def drip() -> Iterator[bytes]:
    for _ in range(600):
        yield b" "
        time.sleep(0.02)


def drip_lines() -> Iterator[bytes]:
    for _ in range(600):
        yield b'{"response":"a","done":false}\n'
        time.sleep(0.02)


def endless() -> Iterator[bytes]:
    while True:
        yield b"a" * 65536


def endless_lines() -> Iterator[bytes]:
    while True:
        yield b'{"status":"pulling","response":"a","message":{"content":"a"}}\n' * 1000


USER = [{"role": "user", "content": "x"}]
CALLS: dict[str, Callable[[OllamaClient], object]] = {
    "version": lambda client: client.require(),
    "tags": lambda client: client.tags(),
    "ps": lambda client: client.ps(),
    "show": lambda client: client.show("m"),
    "create": lambda client: client.create({"model": "m", "from": "n"}),
    "push": lambda client: list(client.push("me/m")),
    "render_chat": lambda client: client.render_chat("m", USER),
    "render_generate": lambda client: client.render_generate("m", "x"),
    "generate": lambda client: client.generate("m", "x"),
    "chat": lambda client: client.chat("m", USER),
    "stream_generate": lambda client: list(client.stream_generate("m", "x")),
    "stream_chat": lambda client: list(client.stream_chat("m", USER)),
    "unload": lambda client: client.unload("m"),
    "copy": lambda client: client.copy("m", "n"),
    "delete": lambda client: client.delete("m"),
}
TAG = {"model": "m:latest", "digest": DIGEST, "size": 1}
SHAPES = {"null": None, "a list": [], "a number": 7, "a text": "x", "nothing": b"", "a page": b"<html>log in</html>", "bytes": b"\xff\xfe{}"}
TABLE: list[tuple[str, str, Reply, str]] = [
    *[
        (call, name, Reply(shape if isinstance(shape, bytes) else j(shape)), FOREIGN)
        for call in ("version", "tags", "ps", "show", "render_chat", "generate", "chat")
        for name, shape in SHAPES.items()
    ],
    *[
        (call, name, Reply(shape if isinstance(shape, bytes) else j(shape)), FOREIGN)
        for call in ("create", "push", "stream_generate", "stream_chat")
        for name, shape in SHAPES.items()
        if shape != b""
    ],
    ("create", "nothing", Reply(b""), "without reporting success"),
    ("push", "nothing", Reply(b""), "without reporting success"),
    ("version", "5,000 digits", Reply(b'{"version":"0.' + b"9" * 5000 + b'"}'), FOREIGN),
    ("version", "a number of 5,000 digits", Reply(b'{"version":' + b"9" * 5000 + b"}"), FOREIGN),
    ("version", "null", Reply(j({"version": None})), FOREIGN),
    ("version", "escape sequences", Reply(j({"version": "0.33.0\x1b[2J"})), FOREIGN),
    ("version", "lone surrogate", Reply(b'{"version":"0.33.0-\\ud800"}'), FOREIGN),
    ("tags", "models missing", Reply(j({})), FOREIGN),
    ("tags", "models null", Reply(j({"models": None})), FOREIGN),
    ("tags", "models an object", Reply(j({"models": {}})), FOREIGN),
    ("tags", "a scalar row", Reply(j({"models": ["m"]})), FOREIGN),
    ("tags", "a null row", Reply(j({"models": [None]})), FOREIGN),
    ("tags", "a model without a name", Reply(j({"models": [{**TAG, "model": ""}]})), FOREIGN),
    ("tags", "a model's name is a list", Reply(j({"models": [{**TAG, "model": ["m"]}]})), FOREIGN),
    ("tags", "a size of 5,000 digits", Reply(b'{"models":[{"model":"m","digest":"' + DIGEST.encode() + b'","size":' + b"9" * 5000 + b"}]}"), FOREIGN),
    ("tags", "a negative size", Reply(j({"models": [{**TAG, "size": -1}]})), FOREIGN),
    ("tags", "a size as a text", Reply(j({"models": [{**TAG, "size": "1"}]})), FOREIGN),
    ("tags", "a digest that leads elsewhere", Reply(j({"models": [{**TAG, "digest": "../../x"}]})), FOREIGN),
    ("tags", "details a list", Reply(j({"models": [{**TAG, "details": []}]})), FOREIGN),
    ("tags", "nested 100,000 deep", Reply(deep()), FOREIGN),
    ("tags", "cut in the middle", Reply(b'{"models":[', length=100), "broke off"),
    ("tags", "drips", Reply(drip), "did not finish its answer within 0.5 s"),
    ("tags", "without end", Reply(endless), "sent more than 1 MiB"),
    ("tags", "an error as an object", Reply(j({"error": {"message": "x"}}), 500), "refused while listing its models"),
    ("tags", "an error inside 200", Reply(j({"error": "out of luck"})), "refused while listing its models: out of luck"),
    ("tags", "a status alone", Reply(b"", 502), "refused while listing its models: Bad Gateway"),
    ("ps", "context_length a text", Reply(j({"models": [{"model": "m", "context_length": "many"}]})), FOREIGN),
    ("ps", "size_vram a fraction", Reply(j({"models": [{"model": "m", "size_vram": 0.5}]})), FOREIGN),
    ("show", "parameters an object", Reply(j({"parameters": {}})), FOREIGN),
    ("show", "messages of scalars", Reply(j({"messages": [1]})), FOREIGN),
    ("show", "capabilities a text", Reply(j({"capabilities": "tools"})), FOREIGN),
    ("show", "details a number", Reply(j({"details": 3})), FOREIGN),
    ("render_chat", "_debug_info null", Reply(j({"message": {}, "_debug_info": None})), "cannot show the prompts"),
    ("render_chat", "_debug_info missing", Reply(j({"message": {}})), "cannot show the prompts"),
    ("render_chat", "_debug_info a list", Reply(j({"message": {}, "_debug_info": []})), FOREIGN),
    ("render_chat", "_debug_info empty", Reply(j({"message": {}, "_debug_info": {}})), FOREIGN),
    ("render_generate", "rendered_template a number", Reply(j({"_debug_info": {"rendered_template": 5}})), FOREIGN),
    ("render_generate", "_debug_info a text", Reply(j({"_debug_info": "x"})), FOREIGN),
    ("generate", "a count as a text", Reply(j({"response": "", "eval_count": "5"})), FOREIGN),
    ("generate", "a negative duration", Reply(j({"response": "", "eval_duration": -5})), FOREIGN),
    ("generate", "tokens that are none", Reply(j({"response": "", "context": ["x"]})), FOREIGN),
    ("generate", "drips", Reply(drip), "did not finish its answer within 1 s"),
    ("chat", "message null", Reply(j({"message": None})), FOREIGN),
    ("chat", "content a list", Reply(j({"message": {"content": ["x"]}})), FOREIGN),
    ("stream_generate", "cut mid-line", Reply(b'{"response":"a","done":false}\n{"respo'), FOREIGN),
    ("stream_generate", "drips for ever", Reply(drip_lines), "did not finish its answer within 1 s"),
    ("stream_generate", "without end", Reply(endless_lines), "sent more than 1 MiB"),
    ("stream_generate", "a line without end", Reply(endless), "sent more than 1 MiB"),
    ("stream_generate", "an error midway", Reply(b'{"response":"a","done":false}\n{"error":"lost"}\n'), "refused while running m: lost"),
    ("stream_chat", "a scalar line midway", Reply(b'{"message":{"content":"a"}}\n5\n'), FOREIGN),
    ("create", "cut mid-line", Reply(b'{"status":"parsing GGUF"}\n{"stat'), FOREIGN),
    ("create", "status a list", Reply(b'{"status":[]}\n'), FOREIGN),
    ("create", "without end", Reply(endless_lines), "sent more than 1 MiB"),
    ("create", "ends early", Reply(b'{"status":"parsing GGUF"}\n'), "stopped registering m after 'parsing GGUF' without reporting success"),
    ("create", "an error midway", Reply(b'{"status":"a"}\n{"error":"no space left on device"}\n'), "has no space left on its disk"),
    ("push", "completed a text", Reply(b'{"status":"x","digest":"sha256:a","completed":"all"}\n'), FOREIGN),
    ("push", "completed null", Reply(b'{"status":"x","digest":"sha256:a","completed":null}\n'), FOREIGN),
    ("push", "cut mid-line", Reply(b'{"status":"retrieving manifest"}\n{"sta'), FOREIGN),
    ("unload", "a list", Reply(b"[]"), FOREIGN),
    ("copy", "a page", Reply(b"<html>"), FOREIGN),
    ("delete", "an error", Reply(j({"error": "busy"}), 500), "refused while removing m: busy"),
]


@pytest.mark.parametrize(("call", "name", "reply", "expected"), TABLE, ids=[f"{call}: {name}" for call, name, _, _ in TABLE])
def test_an_answer_ends_in_one_error_that_names_the_server(
    call: str, name: str, reply: Reply, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_MOST_BYTES", 1 << 20)
    with Raw(reply) as url, pytest.raises(OlpackError) as caught:
        limit = 0.5 if reply.body in (drip, drip_lines) else 30.0  # a busy machine answers late
        CALLS[call](OllamaClient(url, answer_within_s=limit, whole_within_s=limit))
    error = caught.value
    print(f"{call} | {name} | {error.problem.replace(url, 'URL')[:200]}")
    assert expected in error.problem and url in error.problem and len(error.problem) < 700
    assert error.remedy or "refused" in error.problem  # a refusal of the server's own gives its reason


def test_a_head_that_drips_ends_too() -> None:
    """Each byte comes within the read timeout."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(OlpackError, match=r"did not finish its answer within 0.5 s while listing its models"):
        OllamaClient(f"http://127.0.0.1:{listener.getsockname()[1]}", whole_within_s=0.5).tags()
    listener.close()


@pytest.mark.parametrize("reply", [Reply(j({"version": "9" * 5000})), Reply(j([])), Reply(drip), Reply(b"", 500)])
def test_what_is_no_version_is_no_server(reply: Reply) -> None:
    with Raw(reply) as url:
        assert OllamaClient(url, whole_within_s=0.5).version() is None


def test_parameters_of_the_server_that_are_no_literals_stay_texts() -> None:
    with Raw(Reply(j({"parameters": 'stop "\\x"\nnum_ctx 1e999\nseed nan\n' + 'a "' + "(" * 5000}))) as url:
        shown = OllamaClient(url).show("m")
    assert shown and shown.parameters["stop"] == ['"\\x"'] and isinstance(shown.parameters["num_ctx"], float)


def test_versions_compare_by_their_numbers() -> None:
    assert creates_adapters("0.33.0-rc2") and not creates_adapters("0.34.1")


# One failure costs one figure

SETTINGS = MeasureSettings(prompt_lengths=(48,), generated_tokens=40, repeats=1, context=512, threads=1, answer_tokens=48)


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[dict], object]], None]:
    """Changes the double's answers of one path."""

    def damage(path: str, change: Callable[[dict], object]) -> None:
        for name in ("_send", "_chunk"):
            whole = getattr(__import__("ollama_double")._Handler, name)

            def send(handler, *arguments, whole=whole, at=(1 if name == "_send" else 0)):
                if handler.path == path and len(arguments) > at and isinstance(arguments[at], dict):
                    arguments = (*arguments[:at], change(dict(arguments[at])), *arguments[at + 1 :])
                whole(handler, *arguments)

            monkeypatch.setattr(f"ollama_double._Handler.{name}", send)

    return damage


def without(*names: str) -> Callable[[dict], dict]:
    return lambda body: {name: value for name, value in body.items() if name not in names}


@pytest.mark.parametrize(
    ("path", "change", "missing"),
    [
        ("/api/generate", without("total_duration"), {"load"}),
        ("/api/generate", without("eval_count"), {"generation"}),
        ("/api/generate", without("eval_duration"), {"generation"}),
        ("/api/generate", without("prompt_eval_count"), {"prompt"}),
        ("/api/generate", without("prompt_eval_duration"), {"prompt"}),
        ("/api/ps", lambda body: {"models": None}, {"load", "memory"}),
        ("/api/ps", lambda body: {"models": [without("size", "size_vram")(row) for row in body["models"]]}, {"memory"}),
        ("/api/ps", lambda body: [], {"load", "memory"}),
        ("/api/chat", lambda body: {**body, "message": None}, {"answers"}),
    ],
)
def test_a_damaged_answer_costs_one_figure(client, damage, path, change, missing) -> None:
    damage(path, change)
    quants = compare_served(client, ["mine:q8_0", "theirs:latest"], [USER], SETTINGS).quants
    for quant in quants:
        speed = quant.speed
        there = {
            "load": bool(speed.load_warm_s),
            "generation": bool(speed.generation_tokens_per_s),
            "prompt": bool(speed.prompt),
            "memory": speed.peak_memory_bytes is not None,
            "answers": bool(quant.answers),
        }
        assert {name for name, present in there.items() if not present} == missing
        assert len(quants) == 2


def test_a_model_that_never_unloads_is_waited_for_once(client, damage, monkeypatch) -> None:
    monkeypatch.setattr("olpack.compare.server_speed._UNLOAD_S", 0.2)
    damage("/api/ps", lambda body: {"models": [{"model": "mine:q8_0", "size": 5, "context_length": 512}]})
    (quant,) = compare_served(client, ["mine:q8_0"], [USER], SETTINGS).quants
    assert quant.speed.generation_tokens_per_s and quant.speed.prompt and not quant.speed.load_warm_s and quant.answers
    assert any("still loaded" in flag.text and "ollama stop mine:q8_0" in flag.text for flag in quant.flags)


def test_a_count_that_lies_does_not_make_prompts_grow(client, ollama_double, damage) -> None:
    damage("/api/generate", lambda body: {**body, "prompt_eval_count": 1} if body.get("done") else body)
    compare_served(client, ["mine:q8_0"], [], SETTINGS)
    assert max(request.sent for request in ollama_double.requests if request.path == "/api/generate") < 48 * 16 + 500


def test_a_model_that_cannot_be_shown_is_measured_with_the_usual_context(client, damage, capsys) -> None:
    damage("/api/show", lambda body: {"parameters": 5})
    assert settings_for(client, ["mine:q8_0"], MeasureSettings()).context == 4096
    assert FOREIGN in capsys.readouterr().err


# Callers


def test_a_tag_that_is_registered_and_not_listed_is_one_error(ollama_double, damage, tmp_path) -> None:
    served_gguf.write(path := tmp_path / "m.gguf", protect(CHATML.jinja, {}))
    damage("/api/tags", lambda body: {"models": []})
    with pytest.raises(OlpackError, match=rf"{re.escape(ollama_double.url)} has coder:q8_0 and does not list it"):
        register(OllamaClient(ollama_double.url), "coder", [TagFile("q8_0", path)], Package(parameters={"num_ctx": 512}))


def test_a_push_that_is_damaged_is_one_error(client, damage) -> None:
    client.copy("mine:q8_0", "me/mine:q8_0")
    damage("/api/push", lambda body: {**body, "completed": "all"})
    with pytest.raises(OlpackError, match=FOREIGN):
        push_to_ollama(client, ["me/mine:q8_0"])


def test_a_key_that_is_none_is_one_error_without_the_key(monkeypatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "sec\nret-of-mine")
    with pytest.raises(OlpackError, match="OLLAMA_API_KEY contains characters") as caught:
        OllamaClient("ollama.invalid")
    assert "ret-of-mine" not in str(caught.value)
