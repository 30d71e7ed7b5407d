"""`/api/pull` of the double, as Ollama's source has it (server/images.go and download.go of 0.33); no pull is in the recording.

The registry is asked over HTTP: for the manifest, then for each blob that the store lacks with HEAD, with GET for its place, and with GET and Range
for its parts.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import httpx
from ollama_double_store import Refused, all_layers

if TYPE_CHECKING:
    from ollama_double import OllamaDouble

PART = 100_000_000  # bytes of a part at least; the whole is asked for in 16 of them at most


def pulled(double: OllamaDouble, body: dict) -> Iterator[dict]:
    """Yields the lines of status; raises Refused where the server would."""
    store = double.store
    name = store.respelled(body["model"])
    space = f"http{'' if body.get('insecure') else 's'}://{name.host}/v2/{name.namespace}/{name.model}"
    yield {"status": "pulling manifest"}
    try:
        found = _ask(double, "GET", f"{space}/manifests/{name.tag}", {"Accept": "application/vnd.docker.distribution.manifest.v2+json"})
    except Refused as refused:
        raise Refused(500, f"pull model manifest: {refused.text}") from None
    manifest = json.loads(found.content)
    new = []
    for layer in (*manifest["layers"], manifest["config"]):
        digest = layer["digest"]
        line = {"status": f"pulling {digest[7:19]}", "digest": digest}
        if (there := store.blob(digest)).exists():
            yield {**line, "total": there.stat().st_size, "completed": there.stat().st_size}
            continue
        place = f"{space}/blobs/{digest}"
        size = int(_ask(double, "HEAD", place).headers.get("Content-Length") or 0)
        direct = _ask(double, "GET", place, read=False)
        if "Location" not in direct.headers:  # in an answer of 200 as well
            raise Refused(500, "http: no Location header in response")
        content = bytearray()
        while len(content) < size:
            last = min(len(content) + max(PART, size // 16), size) - 1
            content += _ask(double, "GET", urljoin(place, direct.headers["Location"]), {"Range": f"bytes={len(content)}-{last}"}).content
            yield {**line, "total": size, "completed": len(content)}
        if double.faults.disk_left is not None and size > double.faults.disk_left:
            raise Refused(500, f"write {there.name}-partial: no space left on device")
        if double.faults.corrupt_pulls:
            content[random.randrange(size)] ^= 1
        there.write_bytes(content)
        new.append(digest)
    yield {"status": "verifying sha256 digest"}
    for digest in new:
        got = f"sha256:{hashlib.sha256(store.blob(digest).read_bytes()).hexdigest()}"
        if got != digest:
            store.blob(digest).unlink()
            raise Refused(500, f"digest mismatch, file must be downloaded again: want {digest}, got {got}")
    yield {"status": "writing manifest"}
    path = store.manifest_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(found.content)
    assert all(store.blob(layer["digest"]).exists() for layer in all_layers(manifest))
    yield {"status": "success"}


def _ask(double: OllamaDouble, method: str, url: str, headers: dict | None = None, read: bool = True) -> httpx.Response:
    """One request as Go's client sends it. A 307 to another host is an answer, and the body is not read, where only the place is asked for."""
    from ollama_double import Request

    try:
        if double.faults.no_loopback:
            raise httpx.ConnectError("connect: connection refused")
        with httpx.Client(trust_env=False).stream(method, url, headers=headers) as answer:
            content = answer.read() if read else b""
    except httpx.TransportError as error:
        place = httpx.URL(url)
        raise Refused(500, f'{method.capitalize()} "{url}": dial tcp {place.host}:{place.port}: {error}') from None
    double.fetched.append(Request(method, httpx.URL(url).path, len(content)))
    if answer.status_code == 404:
        raise Refused(500, "file does not exist")
    if answer.status_code not in (200, 206, 307):
        raise Refused(500, f"{answer.status_code}: {content.decode()}")
    return answer
