"""Tags that a server on this machine pulls from olpack, where it creates none with an adapter and its model store cannot be written.

    reaches(client)                                     # whether the server finds a registry on this machine's loopback
    pull_tag(client, "support", file, package)          # one tag, as `ollama_store.place` would write it

The registry is open while a tag is pulled, on 127.0.0.1 alone, under a name that nobody can guess, and has that tag and nothing else. The server
asks for the blobs that it lacks: the weights of a model that it has do not travel. The pulled name is copied to that of the tag and removed.

What a server asks for, and how it reads the answers, is that of Ollama's server/images.go, server/download.go and types/model/name.go (0.33):
plain HTTP with `insecure`; a manifest is stored byte for byte; a blob is asked for with HEAD, with GET for its `Location`, which must be there in an
answer of 200 as well, and then with GET and `Range`, in parts of 100 MB and more at once; its SHA-256 is computed afterwards.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from olpack import progress
from olpack.deploy.client import OllamaClient, Tag, show_transfer
from olpack.deploy.modelfile import Package
from olpack.deploy.names import same
from olpack.deploy.ollama_store import ComposedTag, compose_tag, read_back, store_with
from olpack.deploy.register import Done, Registered, TagFile, check_request
from olpack.errors import OlpackError

_CHUNK = 1 << 20
_PROBE_S = 15.0
_SILENT_S = 60.0  # of a client between two bytes
_NAME = re.compile(r"127\.0\.0\.1:(\d+)/olpack-[0-9a-f]{32}/", re.IGNORECASE)


class LoopbackRegistry:
    """A registry with one tag, or with none, on a free port of 127.0.0.1 from `with` to its end.

    Args:
        tag: what it has; None: nothing, and every request is answered with 404.
        kept: digests of blobs that it does not offer, since the server has them.

    Attributes:
        model: the name to pull.
        asked: whether its manifest was asked for.
        taken: digests of the blobs that were asked for.
        missed: digests that were asked for and that it does not have.
    """

    def __init__(self, tag: ComposedTag | None, kept: frozenset[str] = frozenset()):
        self.asked = False
        self.taken: set[str] = set()
        self.missed: set[str] = set()
        blobs: dict[str, bytes | Path] = {**tag.files, **tag.texts} if tag else {}
        self._blobs = {digest: content for digest, content in blobs.items() if digest not in kept}
        self._manifest = tag.manifest if tag else None
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.registry = self
        self._space = f"olpack-{secrets.token_hex(16)}"
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.model = f"{self.host}/{self._space}/tag:new"

    def __enter__(self) -> LoopbackRegistry:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def find(self, path: str) -> tuple[str, bytes | Path] | None:
        """Media type and content of what a path names; None where it is nothing of this registry.

        Names are matched without regard to case: a server spells a part as any model that it has does.
        """
        before = f"/v2/{self._space}/tag/"
        kind, _, name = path.lower().removeprefix(before).partition("/")
        if not path.lower().startswith(before):
            return None
        if (kind, name) == ("manifests", "new"):
            self.asked = True
            return None if self._manifest is None else ("application/vnd.docker.distribution.manifest.v2+json", self._manifest)
        if kind != "blobs":
            return None
        (self.taken if name in self._blobs else self.missed).add(name)
        return ("application/octet-stream", self._blobs[name]) if name in self._blobs else None

    @property
    def bytes_taken(self) -> int:
        """Bytes of the manifest and of the blobs that were asked for, each counted once."""
        return len(self._manifest or b"") + sum(_size(self._blobs[digest]) for digest in self.taken)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64  # a large file is asked for in 16 parts at once
    registry: LoopbackRegistry

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing is printed of a connection that breaks before its request is read."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "olpack", ""
    timeout = _SILENT_S

    def log_message(self, *_args: object) -> None:
        """Nothing is logged: what matters is in the answers that the server gives."""

    def do_GET(self) -> None:
        with suppress(OSError):  # the server goes away where it only wants to know the place
            self._answer()

    do_HEAD = do_GET

    def _answer(self) -> None:
        found = self.server.registry.find(self.path)
        if found is None:
            return self._head(404, 0)
        kind, content = found
        size = _size(content)
        first, last = 0, size - 1
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            if first > last:
                return self._head(416, 0, {"Content-Range": f"bytes */{size}"})
        place = {"Location": f"http://{self.server.registry.host}{self.path}"}
        part = {"Content-Range": f"bytes {first}-{last}/{size}"} if asked else {}
        self._head(206 if asked else 200, last - first + 1, {"Content-Type": kind, "Accept-Ranges": "bytes", **place, **part})
        if self.command == "GET":
            self._send(content, first, last + 1)

    def _head(self, status: int, size: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.send_header("Connection", "close")  # so no connection outlives the registry
        self.end_headers()

    def _send(self, content: bytes | Path, first: int, end: int) -> None:
        if isinstance(content, bytes):
            self.wfile.write(content[first:end])
            return
        with content.open("rb") as file:
            file.seek(first)
            while first < end and (chunk := file.read(min(_CHUNK, end - first))):
                self.wfile.write(chunk)
                first += len(chunk)


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def reaches(client: OllamaClient) -> bool:
    """Whether a server finds a registry that is opened here. It is asked to pull a name that there is not, and nothing changes on it."""
    if sys.platform == "win32":  # a server there cannot keep a name with a port in it: its names are folders
        return False
    with LoopbackRegistry(None) as registry, suppress(OlpackError):
        for _ in client.pull(registry.model, insecure=True, within_s=_PROBE_S):
            pass
    return registry.asked


def pull_tag(client: OllamaClient, name: str, file: TagFile, package: Package) -> Registered:
    """Have a server that runs here pull one tag.

    The tag is there whole or as it was before. What a pull that broke off had fetched stays in the server's store, under no name, until the server
    tidies up at a start.

    Args:
        client: of the server.
        name: of the package, without a tag.
        file, package: as for `ollama_store.write_store`.

    Raises:
        OlpackError: the name or a parameter is wrong, the server does not find the registry, its pull failed, or it does not have the tag afterwards
            as it was made.
    """
    started = time.monotonic()
    check_request(name, [file], package)
    tag = compose_tag(store_with(client, file.origin) if file.origin else None, file, package)
    model, sent = f"{name}:{file.tag}", 0
    done: Done = "unchanged"
    there = client.tags()
    before = next((listed.digest for listed in there if same(listed.model, model)), None)
    _remove_left_over(client, there)
    if before != tag.digest:
        sent = _pull(client, model, tag, frozenset({tag.weights} if file.origin else ()), before is not None)
        done = "updated" if before else "created"
    listed = read_back(client, model, tag.digest, file, package, f"It was pulled from a registry on {_HERE}.")
    record = Registered(listed.model, listed.digest, tag.weights, tag.weights, sent, round(time.monotonic() - started, 3), done)
    figures = f" ({progress.quantity(sent, 'B')} pulled, {progress.duration(record.seconds)})" if sent else ""
    progress.say(f"{done} {record.model}{figures}")
    return record


_HERE = "this machine's 127.0.0.1"


def _pull(client: OllamaClient, model: str, tag: ComposedTag, kept: frozenset[str], replaces: bool) -> int:
    """Have the server pull a tag under the registry's name, and give it its own. Returns the bytes that it took."""
    with LoopbackRegistry(tag, kept) as registry:
        old = registry.model.replace(":new", ":old")
        try:
            _follow(client, registry, tag, model)
            if replaces:  # so that what it alone used goes with that name: a copy onto a name leaves the blobs of the model that had it
                client.copy(model, old)
            client.copy(registry.model, model)
        finally:
            with suppress(OlpackError):  # the next deploy removes them
                for name in {listed.model for listed in client.tags() if same(listed.model, registry.model) or same(listed.model, old)}:
                    client.delete(name)
    return registry.bytes_taken


def _follow(client: OllamaClient, registry: LoopbackRegistry, tag: ComposedTag, model: str) -> None:
    named = json.loads(tag.manifest)
    size = sum(layer["size"] for layer in (*named["layers"], named["config"]))
    try:
        show_transfer(client.pull(registry.model, insecure=True), f"the server pulls {model}", size)
    except OlpackError as error:
        raise _explained(error, client, registry, tag) from error


def _explained(error: OlpackError, client: OllamaClient, registry: LoopbackRegistry, tag: ComposedTag) -> OlpackError:
    if not registry.asked:
        return OlpackError(
            f"The Ollama server at {client.url} does not find a registry on {_HERE}; it may run in a container: {error.problem}",
            "Set `package: merged` in the recipe, or run `olpack deploy NAME --store DIR` with the folder where the server keeps its models.",
        )
    if tag.weights in registry.missed:
        return OlpackError(f"The Ollama server at {client.url} no longer has the weights of the tag's base.", "Pull the base, and deploy again.")
    return error


def _remove_left_over(client: OllamaClient, there: list[Tag]) -> None:
    """Remove names of registries that a deploy which was killed has left. One whose port is open may belong to a deploy that runs."""
    for tag in there:
        if found := _NAME.match(tag.model):
            with socket.socket() as probe, suppress(OlpackError):
                probe.settimeout(1.0)
                if probe.connect_ex(("127.0.0.1", int(found[1]) % (1 << 16))):
                    client.delete(tag.model)
