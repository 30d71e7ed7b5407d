"""A thin client of an Ollama server: typed calls through the `ollama` package, and over httpx what that package cannot do.

It cannot ask for a blob before sending it (the server resets a connection that sends what it has), show an upload's progress, tell a stream
that just ends from one that succeeded, read a model's system prompt and messages back, or have a prompt rendered without running it.
Every failure leaves here as an OlpackError.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import httpx

from olpack import progress
from olpack.deploy.model_info import ModelInfo, read_model_info
from olpack.deploy.proxies import socks_proxies, without_socks
from olpack.errors import OlpackError

with without_socks():  # importing it makes a client, which a SOCKS proxy in the environment would stop
    import ollama

OLDEST = (0, 30)
"""The first version that runs every GGUF in llama.cpp's own server, which `render_chat` and the checks of templates rely on."""

_NO_ADAPTERS = (0, 34, 1)
_CHUNK = 1 << 20
_TRIES = 4
_NO_SPACE = re.compile(r"no space left|not enough space|disk quota", re.IGNORECASE)


def server_url(host: str | None) -> str:
    """The URL to call for a value of OLLAMA_HOST, read as `ollama` reads it.

    Args:
        host: `[http[s]://]host[:port][/path]`; None or "" means this machine. The port is 11434, or 80 or 443 where a scheme is given.
            An address that a server listens on but nobody can call (0.0.0.0, ::) means this machine too.

    Raises:
        OlpackError: it is no address.
    """
    given = (host or "").strip().strip("\"'")
    scheme, mark, rest = given.partition("://")
    if not mark:
        scheme, rest = "http", given
    if rest.count(":") > 1 and "[" not in rest:
        rest = f"[{rest}]"  # a bare IPv6 address has no port
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        name, port = parts.hostname or "127.0.0.1", parts.port
    except ValueError as error:
        raise OlpackError(f"OLLAMA_HOST is {given!r}, which is no address: {error}.", "Write it as host:port, such as 127.0.0.1:11434.") from None
    if scheme not in ("http", "https"):
        raise OlpackError(f"OLLAMA_HOST is {given!r}, and olpack does not speak {scheme}://.", "Use http:// or https://.")
    port = port or ({"http": 80, "https": 443}[scheme] if mark else 11434)
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(name, f"[{name}]" if ":" in name else name)
    return f"{scheme}://{name}:{port}{parts.path.rstrip('/')}"


def _is_here(url: str) -> bool:
    name = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def creates_adapters(version: str) -> bool:
    """Whether a server of that version registers models with an adapter. From 0.34.1 on it only serves those that are there."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return numbers < _NO_ADAPTERS


@dataclass(frozen=True)
class Tag:
    """One model that the server lists.

    Attributes:
        model: its whole name, "coding-assistant:q4_K_M".
        digest: of its manifest, 64 hexadecimal digits.
        size: of all its blobs, in bytes.
    """

    model: str
    digest: str
    size: int


class GenerateFields(TypedDict, total=False):
    """Arguments of `ollama.Client.generate` beside model, prompt and options."""

    raw: bool
    system: str


class ChatFields(TypedDict, total=False):
    """Arguments of `ollama.Client.chat` beside model, messages and options."""

    tools: Sequence[Mapping[str, Any]]


class OllamaClient:
    """One server.

    Args:
        host: as OLLAMA_HOST, which is read where this is None.
        answer_within_s: longest silence of the server, in seconds, while it loads a model or rewrites a GGUF.
        retry_wait_s: pause before the second try of a broken upload, in seconds; doubled before each further one.

    Attributes:
        url: of the server.
        bytes_sent: bytes of blobs and of create requests that this client has sent.
    """

    def __init__(self, host: str | None = None, *, answer_within_s: float = 900.0, retry_wait_s: float = 1.0):
        self.url = server_url(host if host is not None else os.environ.get("OLLAMA_HOST"))
        self.bytes_sent = 0
        self._retry_wait_s = retry_wait_s
        here = _is_here(self.url)
        timeout = httpx.Timeout(answer_within_s, connect=1.0 if here else 10.0)
        # A proxy is for what is elsewhere; `ollama` goes to its own machine directly, too.
        proxied = not here and not proxy_bypass(urlsplit(self.url).hostname or "")
        certificates = httpx.create_ssl_context()  # with SSL_CERT_FILE, which is for this machine as well
        key = os.environ.get("OLLAMA_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._typed = ollama.Client(self.url, timeout=timeout, trust_env=proxied, verify=certificates, follow_redirects=True)
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout, trust_env=proxied, verify=certificates, follow_redirects=True
            )
        except ImportError:
            named = ", ".join(f"{name}={value}" for name, value in socks_proxies().items())
            raise OlpackError(
                f"{self.url} would be called through a SOCKS proxy ({named}), which needs the package socksio.",
                f"Run `{sys.executable} -m pip install socksio`, or name the server's host in NO_PROXY.",
            ) from None

    @property
    def here(self) -> bool:
        """Whether the server runs on this machine."""
        return _is_here(self.url)

    # -- the server ------------------------------------------------------------------------------------------------------------------------

    def version(self) -> str | None:
        """The server's version, "0.33.0"; None where no Ollama server answers."""
        try:
            answer = self._http.get("/api/version", timeout=httpx.Timeout(5.0, connect=self._http.timeout.connect))
            return str(answer.json()["version"]) if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    def require(self) -> str:
        """The server's version.

        Raises:
            OlpackError: no server answers, or it is older than 0.30.
        """
        version = self.version()
        if version is None:
            with self._failures("asking for its version"):
                self._http.get("/api/version")  # its error gives the reason, where that is known
            raise self._absent()
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
        # A server built from a checkout calls itself 0.0.0.
        if numbers < OLDEST and not version.startswith("0.0.0"):
            raise OlpackError(
                f"The Ollama server at {self.url} is version {version}; olpack needs 0.30 or newer.",
                "Install the current one from https://ollama.com/download and restart it.",
            )
        return version

    def tags(self) -> list[Tag]:
        """Every model that is registered."""
        with self._failures("listing its models"):
            return [Tag(listed.model, listed.digest or "", listed.size or 0) for listed in self._typed.list().models if listed.model]

    def ps(self) -> list[ollama.ProcessResponse.Model]:
        """Every model that is loaded, with `size` and `size_vram` in bytes and `context_length` in tokens."""
        with self._failures("listing what is loaded"):
            return list(self._typed.ps().models)

    def show(self, model: str) -> ModelInfo | None:
        """What a model was registered with; None where the server has no such model."""
        with self._failures(f"showing {model}"):
            answer = self._http.post("/api/show", json={"model": model})
            if answer.status_code == 404:
                return None
            return read_model_info(self._json(answer))

    # -- running a model -------------------------------------------------------------------------------------------------------------------

    def generate(
        self, model: str, prompt: str, options: Mapping[str, object] | None = None, **fields: Unpack[GenerateFields]
    ) -> ollama.GenerateResponse:
        """One answer to one prompt.

        Returns:
            the answer; its durations are nanoseconds.
        """
        with self._failures(f"running {model}"):
            return self._typed.generate(model, prompt, options=options, stream=False, **fields)

    def stream_generate(
        self, model: str, prompt: str, options: Mapping[str, object] | None = None, **fields: Unpack[GenerateFields]
    ) -> Iterator[ollama.GenerateResponse]:
        """The answer to one prompt, piece by piece; the last piece has `done` and the durations."""
        with self._failures(f"running {model}"):
            yield from self._typed.generate(model, prompt, options=options, stream=True, **fields)

    def chat(
        self, model: str, messages: Sequence[Mapping], options: Mapping[str, object] | None = None, **fields: Unpack[ChatFields]
    ) -> ollama.ChatResponse:
        """One answer to a conversation; its durations are nanoseconds."""
        with self._failures(f"running {model}"):
            return self._typed.chat(model, messages, options=options, stream=False, **fields)

    def stream_chat(self, model: str, messages: Sequence[Mapping], options: Mapping[str, object] | None = None) -> Iterator[ollama.ChatResponse]:
        """The answer to a conversation, piece by piece; the last piece has `done` and the durations."""
        with self._failures(f"running {model}"):
            yield from self._typed.chat(model, messages, options=options, stream=True)

    def unload(self, model: str) -> bool:
        """Free the memory that a model takes. False where it was removed while it was loaded: the server refuses then, and keeps it for a while."""
        with self._failures(f"unloading {model}"):
            try:
                self._typed.generate(model, keep_alive=0)
            except ollama.ResponseError as error:
                if error.status_code != 404:
                    raise
                return False
        return True

    def render_chat(self, model: str, messages: Sequence[Mapping], **fields: Unpack[ChatFields]) -> str:
        """The exact prompt that the server makes of a conversation, its own system prompt and messages included. The server loads the model
        for it.
        """
        return self._rendered("/api/chat", {"model": model, "messages": list(messages), **fields})

    def render_generate(self, model: str, prompt: str, **fields: Unpack[GenerateFields]) -> str:
        """The exact prompt that the server makes of a plain one."""
        return self._rendered("/api/generate", {"model": model, "prompt": prompt, **fields})

    def _rendered(self, path: str, body: dict[str, Any]) -> str:
        with self._failures(f"rendering a prompt for {body['model']}"):
            # A server that does not know the request would answer: one token is enough to find out.
            answer = self._json(self._http.post(path, json={**body, "stream": False, "_debug_render_only": True, "options": {"num_predict": 1}}))
        try:
            return answer["_debug_info"]["rendered_template"]
        except KeyError:
            raise OlpackError(
                f"The Ollama server at {self.url} cannot show the prompts that it makes.",
                "Install the current one from https://ollama.com/download.",
            ) from None

    # -- changing what is registered -------------------------------------------------------------------------------------------------------

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name, at no cost on disk."""
        with self._failures(f"copying {source} to {destination}"):
            self._typed.copy(source, destination)

    def delete(self, model: str) -> None:
        """Remove a name, and its weights where no other name uses them."""
        with self._failures(f"removing {model}"):
            self._typed.delete(model)

    def _has_blob(self, digest: str) -> bool:
        answer = self._http.head(f"/api/blobs/{digest}")
        if answer.status_code not in (200, 404):
            raise ollama.ResponseError(answer.reason_phrase, answer.status_code)
        return answer.status_code == 200

    def upload(self, path: Path, digest: str) -> None:
        """Send a file where the server lacks it. A broken upload is tried again, and what got there meanwhile is not sent twice.

        Args:
            path: the file.
            digest: `sha256:<64 hex>` of it, as `blob_digest` gives it.

        Raises:
            OlpackError: the upload broke off every time, the server's disk is full, or the file is not what the digest says.
        """
        for attempt in range(_TRIES):
            try:
                if not self._has_blob(digest):
                    self._send(path, digest)
                return
            except (httpx.TransportError, ollama.ResponseError) as error:
                status = getattr(error, "status_code", 0)
                if status == 400 and "digest mismatch" in str(error):
                    raise OlpackError(f"{path} is not the file it was when it was made.", "Make it again with 'olpack export'.") from None
                final = attempt == _TRIES - 1 or _NO_SPACE.search(str(error)) or 400 <= status < 500
                if final:
                    raise self._explained(error, f"uploading {path.name}") from None
                wait = self._retry_wait_s * 2**attempt
                progress.warn(f"The upload of {path.name} broke off ({_short(error)}). Trying again in {progress.duration(wait)}.")
                time.sleep(wait)

    def _send(self, path: Path, digest: str) -> None:
        size = path.stat().st_size
        with path.open("rb") as file, progress.task(f"uploading {path.name}", size, "B") as task:

            def chunks() -> Iterator[bytes]:
                while chunk := file.read(_CHUNK):
                    yield chunk
                    self.bytes_sent += len(chunk)
                    task.advance(len(chunk))

            # With its length the body goes as it is, without it in chunked encoding, which some proxies refuse.
            answer = self._http.post(f"/api/blobs/{digest}", content=chunks(), headers={"Content-Length": str(size)})
        if answer.status_code >= 400:
            raise ollama.ResponseError(answer.text, answer.status_code)

    def create(self, body: Mapping[str, object]) -> list[str]:
        """Register a model.

        Args:
            body: of `/api/create`: `model`, and `from` or `files`, and so on.

        Returns:
            the server's status messages, in order, "success" last.

        Raises:
            OlpackError: the server refused (also in the middle of an answer that began with 200), or stopped without reporting success.
        """
        content = json.dumps(body, ensure_ascii=False).encode()
        steps: list[str] = []
        name = body["model"]
        with self._failures(f"registering {name}"), progress.task(f"registering {name}", unit="steps") as task:
            self.bytes_sent += len(content)
            with self._http.stream("POST", "/api/create", content=content, headers={"Content-Type": "application/json"}) as answer:
                for line in self._lines(answer):
                    if "error" in line:
                        raise ollama.ResponseError(str(line["error"]), answer.status_code)
                    steps.append(str(line.get("status", "")))
                    task.advance(note=steps[-1][:60])
                if answer.status_code >= 400:
                    raise ollama.ResponseError(answer.reason_phrase, answer.status_code)
        if steps[-1:] != ["success"]:
            last = f" after {steps[-1]!r}" if steps else ""
            raise OlpackError(
                f"The Ollama server at {self.url} stopped registering {name}{last} without reporting success.",
                "Look into its log, then run this again.",
            )
        return steps

    def push(self, model: str, insecure: bool = False) -> Iterator[dict]:
        """Have the server send a model to the registry that its name says.

        Args:
            model: `[host/]namespace/model:tag`.
            insecure: speak plain HTTP to the registry.

        Yields:
            lines of progress: `status`, and for a layer under way `digest`, `total` and `completed` (absent for 0) in bytes.

        Raises:
            OlpackError: the server or the registry refused (also in the middle), or the server stopped without reporting success.
        """
        last = ""
        with self._failures(f"pushing {model}"):
            with self._http.stream("POST", "/api/push", json={"model": model, "insecure": insecure}) as answer:
                for line in self._lines(answer):
                    if "error" in line:
                        raise ollama.ResponseError(str(line["error"]), answer.status_code)
                    last = str(line.get("status", ""))
                    yield line
                if answer.status_code >= 400:
                    raise ollama.ResponseError(answer.reason_phrase, answer.status_code)
        if last != "success":
            raise OlpackError(
                f"The Ollama server at {self.url} stopped pushing {model} without reporting success.",
                "Run this again: what has been sent stays there.",
            )

    @staticmethod
    def _lines(answer: httpx.Response) -> Iterator[dict]:
        for line in answer.iter_lines():
            if line.strip():
                try:
                    read = json.loads(line)
                except ValueError:
                    read = None
                yield read if isinstance(read, dict) else {"error": line[:200]}

    def _json(self, answer: httpx.Response) -> dict:
        if answer.status_code >= 400:
            raise ollama.ResponseError(answer.text, answer.status_code)
        return answer.json()

    # -- what can go wrong -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.StreamError, ollama.ResponseError, ConnectionError, ValueError, AttributeError) as error:
            # The last is what the package raises for an error whose JSON is no object.
            raise self._explained(error, doing) from error

    def _absent(self) -> OlpackError:
        here = "Start it with 'ollama serve', install it from https://ollama.com/download, or set OLLAMA_HOST to where it runs."
        there = "OLLAMA_HOST names that place: start the server there, or set another."
        return OlpackError(f"No Ollama server answers at {self.url}.", here if _is_here(self.url) else there)

    def _explained(self, error: Exception, doing: str) -> OlpackError:
        server = f"The Ollama server at {self.url}"
        again = "Run this again: what has been uploaded stays. The server's log says more (journalctl -u ollama, or ~/.ollama/logs/server.log)."
        if "CERTIFICATE_VERIFY_FAILED" in f"{error} {error.__context__}":
            return OlpackError(
                f"The certificate of {self.url} is not trusted here.",
                "Set SSL_CERT_FILE to a file with the certificate of who issued it, or call the server by http:// where that is safe.",
            )
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError)):  # the last is the ollama package's word for the first
            return self._absent()
        if isinstance(error, httpx.TimeoutException):
            return OlpackError(f"{server} sent nothing for {self._http.timeout.read:g} s while {doing}.", "It may be overloaded. " + again)
        if isinstance(error, httpx.HTTPError):
            return OlpackError(f"{server} broke off while {doing}: {_short(error)}.", "It may have been stopped, or its disk may be full. " + again)
        if not isinstance(error, ollama.ResponseError):
            return OlpackError(
                f"{server} answered with something that is not Ollama's while {doing}.", "Is OLLAMA_HOST right, or does a proxy answer?"
            )
        reason = _short(error.error)
        if _NO_SPACE.search(reason):
            return OlpackError(
                f"{server} has no space left on its disk ({doing}).",
                "Free some ('ollama list', 'ollama rm NAME'), or start it with OLLAMA_MODELS on a larger disk. "
                "One spare copy of a GGUF is needed while it registers.",
            )
        remedy = {
            401: "It asks for credentials: set OLLAMA_API_KEY, or ask whoever runs it.",
            403: "It, or a proxy before it, does not allow this.",
            404: "'ollama list' shows what it has; 'olpack deploy NAME' registers a package.",
            413: "A proxy before it does not let files of this size through.",
        }.get(error.status_code, again if error.status_code >= 500 else "")
        return OlpackError(f"{server} refused while {doing}: {reason}.", remedy)


def _short(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + "…").rstrip(".")


def blob_digest(path: Path) -> str:
    """`sha256:<64 hex>` of a file, as the API names it. The file is read once, with progress."""
    digest = hashlib.sha256()
    with path.open("rb") as file, progress.task(f"reading {path.name}", path.stat().st_size, "B") as task:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            task.advance(len(chunk))
    return f"sha256:{digest.hexdigest()}"
