"""A double of an Ollama server: real HTTP, real state on disk, canned answers.

    with OllamaDouble(tmp_path) as double:
        client = OllamaClient(double.url)

It behaves as the recordings tests/data/ollama/transcript*.jsonl do (tests/test_deploy_double.py replays them). What a model answers is
canned, `double.answer = lambda prompt: LOOP` for a model that loops; the prompt it answers to is rendered for real, from the chat template of
the GGUF that was uploaded, and its tokens are counted with llama.cpp's tokenizer.

Faults are switched on by setting the attributes of `double.faults`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ollama_double_pull import pulled
from ollama_double_store import TYPES, Refused, Store, short

CANNED = "Here it is:\n\ndef answer():\n    return 42\n"
_PIECES = re.compile(r"\S+\s*|\s+")
_SAME_AT_MOST = 31  # the server shows a token and 30 repetitions of it; at the next one it ends the answer without a word


@dataclass
class Request:
    """What went over the wire. `sent` counts the bytes of the body; `body` holds them where they are JSON."""

    method: str
    path: str
    sent: int = 0
    body: dict | None = None


@dataclass
class Answer:
    """What the model says to a prompt, token by token."""

    pieces: list[str]
    ends: bool = True  # False: it goes on for ever, saying its pieces again and again
    prompt_tokens: list[int] | None = None
    logprobs: list[dict] | None = None


LOOP = Answer(["0"], ends=False)
"""One token for ever: the server breaks it off. Several pieces with `ends=False` make a loop that it does not see."""


@dataclass
class Faults:
    """What shall go wrong, and how often."""

    version: str = "0.33.0-rc2"
    disk_left: int | None = None  # bytes of blobs that still fit
    break_uploads: int = 0  # that many uploads end in the middle, with the connection cut
    break_creates: int = 0  # that many creates end after their first line
    stop_during_upload: bool = False  # the whole server goes away in the middle of the next upload
    errors_500: int = 0  # that many uploads are read and answered with 500
    silent_s: float = 0.0  # pause before every answer
    no_debug_render: bool = False  # as a server that does not know the request: it answers
    not_json: bool = False  # a proxy's page in place of answers
    drop_parameter: str | None = None  # a server that does not keep what it was told
    create_error: str | None = None  # what creates end with after their first line, inside 200
    cut_prompts_to: int | None = None  # tokens that it keeps of a longer prompt, without a word
    push_error: str | None = None  # what a registry answers to the first blob
    no_loopback: bool = False  # the server runs in a container: 127.0.0.1 is another machine's to it
    corrupt_pulls: bool = False  # what it fetches gets other bytes on the way
    break_pushes: int = 0  # that many pushes end before the manifest, with the connection cut


class OllamaDouble:
    """A server on a free port of this machine, with its store under `root`. Stopping and starting it again keeps the store and the port."""

    def __init__(self, root: Path):
        self.store = Store(root / "ollama-models")
        self.faults = Faults()
        self.requests: list[Request] = []
        self.loaded: dict[str, dict] = {}
        self.registry: dict[str, bytes] = {}  # what was pushed: manifests by name, blobs by digest
        self.fetched: list[Request] = []  # what the server asked of the registries that it pulled from; `sent` counts the bytes that it got
        self.answer: Callable[[str], Answer] = lambda prompt: Answer(_PIECES.findall(CANNED))
        self.tokenize: Callable[[str, str], list[int]] = self._tokens
        self._vocabularies: dict[str, object] = {}
        self._port = 0
        self.start()

    def __enter__(self) -> OllamaDouble:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"double": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.loaded.clear()

    def count(self, method: str, prefix: str) -> int:
        """How many requests of that kind came in."""
        return sum(request.method == method and request.path.startswith(prefix) for request in self.requests)

    def _tokens(self, digest: str, text: str) -> list[int]:
        """Token ids as the model's own vocabulary gives them: the engine's tokenizer, which adds what it adds in serving."""
        facts = self.store.facts(digest)
        if "tokenizer.ggml.model" not in facts.metadata or digest in self.store.primed:
            return list(range(len(_PIECES.findall(text))))
        if digest not in self._vocabularies:
            from llama_cpp import Llama

            self._vocabularies[digest] = Llama(str(self.store.blob(digest)), vocab_only=True, verbose=False)
        return self._vocabularies[digest].tokenize(text.encode(), add_bos=facts.add_bos, special=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that went away are part of what is tested; anything else is a fault of the double."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    double: OllamaDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    # -- answering -------------------------------------------------------------------------------------------------------------------------

    def _send(self, status: int, body: object = None, kind: str | None = "application/json; charset=utf-8") -> None:
        content = b"" if body is None else body.encode() if isinstance(body, str) else json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        if kind and (body is not None or status >= 400):
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def _stream(self, lines: Iterator[dict], break_after: int | None = None) -> None:
        """Lines of JSON, each in its own chunk. An error before the first line is a status; after it, a line."""
        try:
            first = next(lines)
        except Refused as refused:
            return self._send(
                refused.status,
                {"error": refused.text},
                "application/json; charset=utf-8" if refused.text in _CHECKED_FIRST else "application/json",
            )
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(first)
        try:
            for number, line in enumerate(lines, 1):
                if number == break_after:
                    return self._cut()
                self._chunk(line)
        except Refused as refused:
            self._chunk({"error": refused.text})
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, line: dict) -> None:
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _cut(self) -> None:
        """The connection ends as when the process dies."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)

    # -- routing ---------------------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        double, path = self.double, self.path
        record = Request(self.command, path)
        double.requests.append(record)
        time.sleep(double.faults.silent_s)
        if double.faults.not_json:
            self.close_connection = True
            return self._send(200, "<html>please log in</html>", "text/html")
        if path.startswith("/api/blobs/"):
            return self._blob(path.removeprefix("/api/blobs/"), record)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        record.sent, record.body = len(raw), json.loads(raw) if raw else None
        try:
            with double.store.lock:
                route = path.removeprefix("/api/")
                if route not in _ROUTES:
                    raise Refused(404, "404 page not found")
                getattr(self, f"_{route}")(record.body or {})
        except Refused as refused:
            self._send(refused.status, {"error": refused.text})

    do_GET = do_POST = do_HEAD = do_DELETE = _serve

    def _version(self, _body: dict) -> None:
        self._send(200, {"version": self.double.faults.version})

    def _tags(self, _body: dict) -> None:
        self._send(200, {"models": self.double.store.listed()})

    def _ps(self, _body: dict) -> None:
        self._send(200, {"models": [{key: value for key, value in row.items() if key != "weights"} for row in self.double.loaded.values()]})

    def _show(self, body: dict) -> None:
        found = self.double.store.find(body["model"])
        if found is None:
            tagged = body["model"] if ":" in body["model"] else body["model"] + ":latest"
            raise Refused(404, f"model '{tagged}' not found")
        self._send(200, self.double.store.show(*found))

    def _copy(self, body: dict) -> None:
        self.double.store.copy(body["source"], body["destination"])
        self._send(200)

    def _delete(self, body: dict) -> None:
        self.double.store.delete(body["model"])
        self._send(200)

    # -- blobs and create ------------------------------------------------------------------------------------------------------------------

    def _blob(self, digest: str, record: Request) -> None:
        store, faults = self.double.store, self.double.faults
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            return self._send(400)
        path = store.blob(digest)
        if self.command == "HEAD":
            return self._send(200 if path.exists() else 404)
        if path.exists():  # the body is not read: who still sends is cut off
            self.close_connection = True
            self._send(200)
            return self._cut()
        size = int(self.headers["Content-Length"])
        part = path.with_name(f"{path.name}.{id(self)}.part")
        hashed = hashlib.sha256()
        full = False
        with part.open("wb") as file:
            while record.sent < size:
                if record.sent >= size // 2 and (faults.break_uploads or faults.stop_during_upload):
                    break
                chunk = self.rfile.read(min(1 << 18, size - record.sent))
                if not chunk:
                    break
                record.sent += len(chunk)
                full = full or (faults.disk_left is not None and record.sent > faults.disk_left)
                if not full:
                    hashed.update(chunk)
                    file.write(chunk)
        found = f"sha256:{hashed.hexdigest()}"
        if record.sent < size:
            part.unlink()
            if faults.stop_during_upload:
                faults.stop_during_upload = False
                threading.Thread(target=self.double.stop).start()
            else:
                faults.break_uploads -= 1
            return self._cut()
        if full or faults.errors_500:
            part.unlink()
            faults.errors_500 -= not full
            return self._send(500, {"error": f"write {path.name}: no space left on device" if full else "something went wrong"})
        if found != digest and digest not in store.primed:
            part.unlink()
            return self._send(400, {"error": f'digest mismatch, expected "{digest}", got "{found}"'})
        if faults.disk_left is not None:
            faults.disk_left -= size
        part.replace(path)
        self._send(201)

    def _create(self, body: dict) -> None:
        faults = self.double.faults
        if faults.drop_parameter and "parameters" in body:
            body = {**body, "parameters": {key: value for key, value in body["parameters"].items() if key != faults.drop_parameter}}
        lines = ({"status": text} for text in self.double.store.create(body))
        if faults.create_error:
            lines = _failing(lines, faults.create_error)
        if body.get("stream") is False:
            *_, last = lines
            return self._send(200, last, "application/json")
        broken = 1 if faults.break_creates else None
        faults.break_creates -= broken is not None
        self._stream(lines, broken)

    def _push(self, body: dict) -> None:
        """As Ollama's source has it (server/routes.go, images.go, upload.go); no push is in the recording."""
        broken = 3 if self.double.faults.break_pushes else None
        self.double.faults.break_pushes -= broken is not None
        lines = self._pushed(body)
        if body.get("stream") is False:
            *_, last = lines
            return self._send(200, last, "application/json")
        self._stream(lines, broken)

    def _pushed(self, body: dict) -> Iterator[dict]:
        double = self.double
        yield {"status": "retrieving manifest"}
        found = double.store.find(body["model"])
        if found is None:
            yield {"status": "couldn't retrieve manifest"}
            raise Refused(500, "open <OLLAMA_MODELS>/manifests/registry.ollama.ai/...: no such file or directory")
        name, manifest = found
        for layer in (*manifest["layers"], manifest["config"]):
            if double.faults.push_error:
                raise Refused(500, double.faults.push_error)
            digest, size = layer["digest"], layer["size"]
            line = {"status": f"pushing {digest[7:19]}", "digest": digest, "total": size}
            if digest not in double.registry:
                yield from (line, {**line, "completed": size // 2})
                double.registry[digest] = double.store.blob(digest).read_bytes()
            yield {**line, "completed": size}
        yield {"status": "pushing manifest"}
        double.registry[short(name)] = double.store.manifest_path(name).read_bytes()
        yield {"status": "success"}

    def _pull(self, body: dict) -> None:
        lines = pulled(self.double, body)
        if body.get("stream") is False:
            *_, last = lines
            return self._send(200, last, "application/json")
        self._stream(lines)

    # -- running ---------------------------------------------------------------------------------------------------------------------------

    def _generate(self, body: dict) -> None:
        manifest = self._model(body)
        if body.get("keep_alive") == 0 and not body.get("prompt"):
            self.double.loaded.pop(body["model"], None)
            return self._send(200, {"model": body["model"], "created_at": _now(), "response": "", "done": True, "done_reason": "unload"})
        question = [{"role": "user", "content": body.get("prompt", "")}]
        prompt = body["prompt"] if body.get("raw") else self.double.store.prompt(manifest, question, system=body.get("system"))
        self._run(body, manifest, prompt, lambda text: {"response": text})

    def _chat(self, body: dict) -> None:
        manifest = self._model(body)
        turns = [{"content": "", **turn} for turn in body["messages"]]  # a field that is not sent is an empty one
        prompt = self.double.store.prompt(manifest, turns, body.get("tools"))
        self._run(body, manifest, prompt, lambda text: {"message": {"role": "assistant", "content": text}})

    def _model(self, body: dict) -> dict:
        found = self.double.store.find(body["model"])
        if found is None:
            raise Refused(404, f"model '{body['model']}' not found")
        for key, value in self._options(body, found[1]).items():
            wanted = TYPES.get(key)
            if wanted and (isinstance(value, bool) or not isinstance(value, (int, float) if wanted == "float32" else int)):
                raise Refused(500, f'option "{key}" must be of type {wanted}')
        return found[1]

    def _options(self, body: dict, manifest: dict) -> dict:
        return {"num_ctx": 4096, "num_predict": -1, **self.double.store.params(manifest["layers"]), **(body.get("options") or {})}

    def _run(self, body: dict, manifest: dict, prompt: str, part: Callable[[str], dict]) -> None:
        double, store = self.double, self.double.store
        head = {"model": body["model"], "created_at": _now()}
        options = self._options(body, manifest)
        digest = store.model_layer(manifest["layers"])["digest"]
        self._load(body, manifest, digest, options["num_ctx"])
        if body.get("_debug_render_only") and not double.faults.no_debug_render:
            empty = {"response": ""} if "response" in part("") else {"message": {"role": "", "content": ""}}
            return self._send(200, {**head, **empty, "done": False, "_debug_info": {"rendered_template": prompt}})
        answer = double.answer(prompt)
        limit = options["num_predict"] if options["num_predict"] > 0 else 10 * options["num_ctx"]
        pieces = answer.pieces if answer.ends else list(itertools.islice(itertools.cycle(answer.pieces), limit + 1))
        cut = len(pieces) > limit
        pieces = pieces[:limit]
        if (shown := _before_a_loop(pieces)) is not None:
            if body.get("stream") is False:
                return self._send(200, {**head, **part("".join(shown)), "done": False})
            return self._stream({**head, **part(piece), "done": False} for piece in shown)
        ids = answer.prompt_tokens if answer.prompt_tokens is not None else double.tokenize(digest, prompt)
        ids = ids[: double.faults.cut_prompts_to]
        made = len(pieces) + (not cut)  # the token that ends the turn counts
        last = {"done": True, "done_reason": "length" if cut else "stop"}
        if "response" in part("") and not body.get("raw"):
            last["context"] = [*ids, *range(len(pieces))]
        last |= {
            "total_duration": 1_000_000 * (len(ids) + 3 * made),
            "load_duration": 700_000,
            "prompt_eval_count": len(ids),
            "prompt_eval_duration": 100_000 * max(len(ids), 1),
            "eval_count": made,
            "eval_duration": 3_000_000 * made,
        }
        if answer.logprobs and body.get("logprobs"):
            last["logprobs"] = answer.logprobs
        if body.get("stream") is False:
            return self._send(200, {**head, **part("".join(pieces)), **last})
        self._stream(iter([*({**head, **part(piece), "done": False} for piece in pieces), {**head, **part(""), **last}]))

    def _load(self, body: dict, manifest: dict, digest: str, context: int) -> None:
        store = self.double.store
        name, _ = store.find(body["model"])
        row = next(row for row in store.listed() if row["name"] == short(name))
        size = sum(store.blob(layer["digest"]).stat().st_size for layer in manifest["layers"] if layer["mediaType"].endswith(("model", "adapter")))
        # The server keeps one process for a file of weights: a tag with the same ones, and another adapter or system prompt, takes its place.
        self.double.loaded = {key: row for key, row in self.double.loaded.items() if key == body["model"] or row["weights"] != digest}
        self.double.loaded[body["model"]] = {
            "weights": digest,
            "name": row["name"],
            "model": row["name"],
            "size": size + 1500 * context,
            "digest": row["digest"],
            "details": {**store.details(manifest), "parent_model": ""},
            "expires_at": _now(),
            "size_vram": 0,
            "context_length": context,
        }


def _before_a_loop(pieces: list[str]) -> list[str] | None:
    """What the server shows of an answer that comes to repeat one token too often (blanks around it do not count); None for any other."""
    last, same = None, 0
    for number, piece in enumerate(pieces):
        last, same = piece.strip(), same + 1 if piece.strip() == last else 1
        if same > _SAME_AT_MOST:
            return pieces[:number]
    return None


def _failing(lines: Iterator[dict], error: str) -> Iterator[dict]:
    yield next(lines)
    raise Refused(500, error)


_ROUTES = ("version", "tags", "ps", "show", "copy", "delete", "create", "push", "pull", "generate", "chat")

# Errors that the server finds before it begins the answer of /api/create, which it then sends with a charset.
_CHECKED_FIRST = ("invalid model name", "file path must be relative")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
