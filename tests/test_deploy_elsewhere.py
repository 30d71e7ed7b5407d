"""Servers elsewhere: behind a path, a proxy or TLS, slow, restarted in the middle, out of disk, too old."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import served_gguf
from ollama_double import OllamaDouble
from transformers import PreTrainedTokenizerFast

from olpack.deploy import Package
from olpack.deploy.client import OllamaClient
from olpack.deploy.prompt_identity import check_identity
from olpack.deploy.register import TagFile, point_latest, register
from olpack.errors import OlpackError
from olpack.model.chat_template import protect

PACKAGE = Package(system="Be brief.", parameters={"num_ctx": 2048})
CERTIFICATE = Path(__file__).with_name("data") / "tls/localhost.pem"


class _Relay(BaseHTTPRequestHandler):
    """Hands requests for `prefix` on, whether they name it as a path or, as a proxy is asked, with scheme and host."""

    protocol_version = "HTTP/1.1"
    behind, prefix = "", ""

    def log_message(self, *_args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.path.startswith(self.prefix):
            status, kind, content = 404, "text/html", b"<html>not here</html>"
        else:
            with httpx.Client(trust_env=False) as client:
                answer = client.request(self.command, self.behind + self.path.removeprefix(self.prefix), content=body)
            status, kind, content = answer.status_code, answer.headers.get("content-type", ""), answer.content
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_HEAD = do_DELETE = _serve


class Relay:
    """A server that stands before the double."""

    def __init__(self, behind: str, prefix: str = "", tls: bool = False):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Relay,), {"behind": behind, "prefix": prefix}))
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]

    def __enter__(self) -> Relay:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def file(tmp_path: Path) -> TagFile:
    path = tmp_path / "coder-Q4_0.gguf"
    return TagFile("q4_0", path, served_gguf.write(path, protect(served_gguf.CHAT, {}), 2))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No settings of this machine's own."""
    for name in ("OLLAMA_HOST", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield monkeypatch


def _deployed(file: TagFile) -> None:
    client = OllamaClient(retry_wait_s=0.01)
    assert client.require() == "0.33.0-rc2"
    for done in ("created", "unchanged"):
        assert [record.done for record in register(client, "coder", [file], PACKAGE)] == [done]
        point_latest(client, "coder", "q4_0")
    [piece, *_] = client.stream_chat("coder", [{"role": "user", "content": "Hi."}])
    assert piece.message.content
    client.delete("coder")


def test_behind_a_path(ollama_double: OllamaDouble, file: TagFile, bare: pytest.MonkeyPatch) -> None:
    with Relay(ollama_double.url, "/team/ollama") as relay:
        bare.setenv("OLLAMA_HOST", f"127.0.0.1:{relay.port}/team/ollama/")
        _deployed(file)
        bare.setenv("OLLAMA_HOST", f"127.0.0.1:{relay.port}")
        with pytest.raises(OlpackError, match="No Ollama server answers"):
            OllamaClient().require()


def test_behind_a_proxy(ollama_double: OllamaDouble, file: TagFile, bare: pytest.MonkeyPatch) -> None:
    with Relay(ollama_double.url, "http://ollama.invalid:11434") as relay:
        bare.setenv("OLLAMA_HOST", "ollama.invalid")
        bare.setenv("http_proxy", f"http://127.0.0.1:{relay.port}")
        _deployed(file)


def test_over_tls(ollama_double: OllamaDouble, file: TagFile, bare: pytest.MonkeyPatch) -> None:
    with Relay(ollama_double.url, tls=True) as relay:
        bare.setenv("OLLAMA_HOST", f"https://localhost:{relay.port}")
        with pytest.raises(OlpackError, match=r"certificate .* is not trusted") as caught:
            OllamaClient().require()
        assert "SSL_CERT_FILE" in caught.value.remedy
        with pytest.raises(OlpackError, match=r"certificate .* is not trusted"):
            OllamaClient().tags()
        bare.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        _deployed(file)


def test_tls_spoken_to_a_server_without(ollama_double: OllamaDouble, bare: pytest.MonkeyPatch) -> None:
    bare.setenv("OLLAMA_HOST", ollama_double.url.replace("http:", "https:"))
    with pytest.raises(OlpackError, match="No Ollama server answers at https://"):
        OllamaClient().require()


def test_a_slow_server(ollama_double: OllamaDouble, file: TagFile) -> None:
    ollama_double.faults.silent_s = 0.05
    client = OllamaClient(ollama_double.url, answer_within_s=5)
    assert register(client, "coder", [file], PACKAGE)[0].done == "created"
    ollama_double.faults.silent_s = 0.5
    with pytest.raises(OlpackError, match=r"sent nothing for 0.1 s while showing coder:q4_0") as caught:
        register(OllamaClient(ollama_double.url, answer_within_s=0.1), "coder", [file], PACKAGE)
    assert "overloaded" in caught.value.remedy


def test_a_server_that_is_restarted_while_it_is_sent_to(ollama_double: OllamaDouble, tmp_path: Path) -> None:
    """One call: the upload breaks off, the server comes back, the upload is tried again."""
    path = tmp_path / "coder-Q4_0.gguf"
    file = TagFile("q4_0", path, served_gguf.write(path, protect(served_gguf.CHAT, {}) + "{# long #}" * 500_000, 2))

    def start_again() -> None:
        while ollama_double.faults.stop_during_upload:
            time.sleep(0.005)
        while True:
            try:
                return ollama_double.start()
            except OSError:  # the old one still has the port
                time.sleep(0.005)

    ollama_double.faults.stop_during_upload = True
    waiting = threading.Thread(target=start_again)
    waiting.start()
    [record] = register(OllamaClient(ollama_double.url, retry_wait_s=0.2), "coder", [file], PACKAGE)
    waiting.join()
    assert record.done == "created"
    assert ollama_double.count("POST", "/api/blobs/") == 2


def test_a_server_that_is_down_for_a_while(ollama_double: OllamaDouble, file: TagFile) -> None:
    register(OllamaClient(ollama_double.url), "coder", [file], PACKAGE)
    ollama_double.stop()
    with pytest.raises(OlpackError, match="No Ollama server answers"):
        register(OllamaClient(ollama_double.url), "coder", [file], PACKAGE)
    ollama_double.start()
    assert register(OllamaClient(ollama_double.url), "coder", [file], PACKAGE)[0].done == "unchanged"


def test_a_disk_that_is_full_when_the_server_rewrites(ollama_double: OllamaDouble, file: TagFile) -> None:
    """The upload fitted, the copy that registering makes does not; the answer's status is 200."""
    client = OllamaClient(ollama_double.url)
    ollama_double.faults.create_error = "write /models/blobs/sha256-123: no space left on device"
    with pytest.raises(OlpackError, match="has no space left on its disk .registering coder:q4_0.") as caught:
        register(client, "coder", [file], PACKAGE)
    assert "One spare copy" in caught.value.remedy
    ollama_double.faults.create_error = None
    uploads = ollama_double.count("POST", "/api/blobs/")
    assert register(client, "coder", [file], PACKAGE)[0].done == "created"
    assert ollama_double.count("POST", "/api/blobs/") == uploads  # what was sent has stayed


def test_an_older_server(ollama_double: OllamaDouble, file: TagFile) -> None:
    ollama_double.faults.version = "0.29.1"
    with pytest.raises(OlpackError, match=r"is version 0.29.1; olpack needs 0.30 or newer. Install the current one"):
        OllamaClient(ollama_double.url).require()


def test_a_server_that_cannot_show_its_prompts(ollama_double: OllamaDouble, file: TagFile) -> None:
    client = OllamaClient(ollama_double.url)
    register(client, "coder", [file], PACKAGE)
    ollama_double.faults.no_debug_render = True
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=served_gguf.tokenizer(), eos_token="<|im_end|>")
    tokenizer.chat_template = served_gguf.CHAT
    with pytest.raises(OlpackError, match="cannot show the prompts that it makes. Install the current one"):
        check_identity(client, "coder:q4_0", tokenizer)
