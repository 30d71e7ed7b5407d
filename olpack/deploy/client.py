"""A client of an Ollama server. Every answer is read within bounds on its size and its time, and validated into a type of `answers.py`.

Every failure leaves here as an OlpackError that names the server: no answer, an answer of another shape, one that is cut, one without end.
"""

from __future__ import annotations

import ipaddress
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack
from urllib.parse import unquote, urlsplit
from urllib.request import proxy_bypass

import httpx
from pydantic import ValidationError

from olpack import progress
from olpack.deploy.answers import (
    Answer,
    Chatted,
    Generated,
    ListedModel,
    ListedModels,
    LoadedModel,
    LoadedModels,
    Nothing,
    Progress,
    ServerVersion,
    ShownModel,
)
from olpack.deploy.model_info import ModelInfo, read_model_info
from olpack.deploy.proxies import socks_proxies
from olpack.errors import OlpackError
from olpack.workspace import shown_digest

Kind = TypeVar("Kind", bound=Answer)

OLDEST = (0, 30)
"""The first version that runs every GGUF in llama.cpp's own server, which `render_chat` and the checks of templates rely on."""

_NO_ADAPTERS = (0, 34, 1)
_CHUNK = 1 << 20
_TRIES = 4
_MOST_BYTES = 64 << 20  # of an answer: the largest are those of /api/show, with a template and licences
_MOST_OF_A_TRANSFER = 1 << 30  # a line of progress every 60 ms, for days
_LONG_S = 24 * 3600.0  # what a person watches: an upload, a push, a registration, a conversation
_NO_SPACE = re.compile(r"no space left|not enough space|disk quota", re.IGNORECASE)


def server_url(host: str | None) -> str:
    """The URL to call for a value of OLLAMA_HOST, read as `ollama` reads it.

    Args:
        host: `[http[s]://][user:password@]host[:port][/path]`; None or "" means this machine. The port is 11434, or 80 or 443 where a scheme
            is given. The URL is without user and password, because it is shown and stored. An address that a server listens on but nobody
            can call (0.0.0.0, ::) means this machine too.

    Raises:
        OlpackError: it is no address.
    """
    given = (host or "").strip().strip("\"'")
    scheme, mark, rest = given.partition("://")
    if not mark:
        scheme, rest = "http", given
    _, rest = _split_user_info(rest)
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


def _split_user_info(address: str) -> tuple[str, str]:
    """`user:password` and the rest of an address without its scheme."""
    host = re.split(r"[/?#]", address, maxsplit=1)[0]
    user_info = host.rpartition("@")[0]
    return user_info, address[len(user_info) :].removeprefix("@") if user_info else address


def _credentials(host: str | None) -> tuple[str, str] | None:
    """User and password in a value of OLLAMA_HOST."""
    given = (host or "").strip().strip("\"'")
    user_info, _ = _split_user_info(given.partition("://")[2] or given)
    user, _, password = user_info.partition(":")
    return (unquote(user), unquote(password)) if user_info else None


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
        parameters: their number as the server reports it, "7.6B"; None where it does not.
        quantization: the quant type as the server reports it, "Q4_K_M"; None where it does not.
    """

    model: str
    digest: str
    size: int
    parameters: str | None
    quantization: str | None


class GenerateFields(TypedDict, total=False):
    """Fields of `/api/generate` beside model, prompt and options."""

    raw: bool
    system: str


class ChatFields(TypedDict, total=False):
    """Fields of `/api/chat` beside model, messages and options."""

    tools: Sequence[Mapping[str, Any]]


class _Refused(Exception):
    """The server reported an error: the reason in its words, and the status of its answer."""

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


class _Foreign(Exception):
    """An answer that is not one of Ollama's: its beginning."""


class _Endless(Exception):
    """An answer that exceeds a bound, as a clause: "did not finish its answer within 120 s"."""


class OllamaClient:
    """One server.

    Args:
        host: as OLLAMA_HOST, which is read where this is None.
        answer_within_s: longest silence of the server, in seconds, while it loads a model or rewrites a GGUF.
        whole_within_s: longest time for the whole of an answer that needs no model, in seconds.
        retry_wait_s: pause before the second try of a broken upload, in seconds; doubled before each further one.

    Attributes:
        url: of the server.
        bytes_sent: bytes of blobs and of create requests that this client has sent.
    """

    def __init__(self, host: str | None = None, *, answer_within_s: float = 900.0, whole_within_s: float = 120.0, retry_wait_s: float = 1.0):
        host = host if host is not None else os.environ.get("OLLAMA_HOST")
        self.url = server_url(host)
        self.bytes_sent = 0
        self._retry_wait_s = retry_wait_s
        self._whole_s, self._run_s = whole_within_s, 2 * answer_within_s  # of an answer that needs no model, and of one that does
        here = _is_here(self.url)
        timeout = httpx.Timeout(answer_within_s, connect=1.0 if here else 10.0)
        # A proxy is for what is elsewhere; `ollama` goes to its own machine directly, too.
        proxied = not here and not proxy_bypass(urlsplit(self.url).hostname or "")
        certificates = httpx.create_ssl_context()  # with SSL_CERT_FILE, which is for this machine as well
        key = os.environ.get("OLLAMA_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise OlpackError("OLLAMA_API_KEY contains characters that no key has.", "Set it to the key alone.")
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            self._http = httpx.Client(
                base_url=self.url,
                auth=_credentials(host),
                headers=headers,
                timeout=timeout,
                trust_env=proxied,
                verify=certificates,
                follow_redirects=True,
            )
        except (ValueError, httpx.InvalidURL):
            raise OlpackError(
                "A proxy of the environment is no address that olpack can call.", "Correct HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, or unset them."
            ) from None
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
            return self._version()
        except OlpackError:
            return None

    def _version(self) -> str:
        within_s = 5.0 + (self._http.timeout.connect or 0.0)
        with self._failures("asking for its version"):
            try:
                return self._answer("GET", "/api/version", ServerVersion, None, min(within_s, self._whole_s)).version
            except _Refused as refused:
                if refused.status == 404:  # something else answers there
                    raise self._absent() from None
                raise

    def require(self) -> str:
        """The server's version.

        Raises:
            OlpackError: no server answers, or it is older than 0.30.
        """
        version = self._version()
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
        return [_tag(listed) for listed in self._ask("GET", "/api/tags", ListedModels, "listing its models").models]

    def ps(self) -> tuple[LoadedModel, ...]:
        """Every model that is loaded."""
        return self._ask("GET", "/api/ps", LoadedModels, "listing what is loaded").models

    def show(self, model: str) -> ModelInfo | None:
        """What a model was registered with; None where the server has no such model."""
        with self._failures(f"showing {model}"):
            try:
                return read_model_info(self._answer("POST", "/api/show", ShownModel, {"model": model}, self._whole_s))
            except _Refused as refused:
                if refused.status == 404:
                    return None
                raise

    # -- running a model -------------------------------------------------------------------------------------------------------------------

    def generate(self, model: str, prompt: str, options: Mapping[str, object] | None = None, **fields: Unpack[GenerateFields]) -> Generated:
        """One answer to one prompt."""
        body = _run_body(model, options, {"prompt": prompt, **fields}, stream=False)
        return self._ask("POST", "/api/generate", Generated, f"running {model}", body, self._run_s)

    def stream_generate(
        self, model: str, prompt: str, options: Mapping[str, object] | None = None, **fields: Unpack[GenerateFields]
    ) -> Iterator[Generated]:
        """The answer to one prompt, piece by piece; the last piece has `done` and the durations."""
        body = _run_body(model, options, {"prompt": prompt, **fields}, stream=True)
        with self._failures(f"running {model}"):
            yield from self._lines("/api/generate", Generated, body, self._run_s)

    def chat(self, model: str, messages: Sequence[Mapping], options: Mapping[str, object] | None = None, **fields: Unpack[ChatFields]) -> Chatted:
        """One answer to a conversation."""
        body = _run_body(model, options, {"messages": list(messages), **fields}, stream=False)
        return self._ask("POST", "/api/chat", Chatted, f"running {model}", body, self._run_s)

    def stream_chat(self, model: str, messages: Sequence[Mapping], options: Mapping[str, object] | None = None) -> Iterator[Chatted]:
        """The answer to a conversation, piece by piece; the last piece has `done` and the durations."""
        body = _run_body(model, options, {"messages": list(messages)}, stream=True)
        with self._failures(f"running {model}"):
            yield from self._lines("/api/chat", Chatted, body, _LONG_S)

    def unload(self, model: str) -> bool:
        """Free the memory that a model takes. False where it was removed while it was loaded: the server refuses then, and keeps it for a while."""
        with self._failures(f"unloading {model}"):
            try:
                self._answer("POST", "/api/generate", Nothing, {"model": model, "keep_alive": 0, "stream": False}, self._run_s)
            except _Refused as refused:
                if refused.status != 404:
                    raise
                return False
        return True

    def render_chat(self, model: str, messages: Sequence[Mapping], **fields: Unpack[ChatFields]) -> str:
        """The exact prompt that the server makes of a conversation, its own system prompt and messages included. The server loads the model
        for it.
        """
        return self._rendered("/api/chat", Chatted, {"model": model, "messages": list(messages), **fields})

    def render_generate(self, model: str, prompt: str, **fields: Unpack[GenerateFields]) -> str:
        """The exact prompt that the server makes of a plain one."""
        return self._rendered("/api/generate", Generated, {"model": model, "prompt": prompt, **fields})

    def _rendered(self, path: str, kind: type[Chatted] | type[Generated], fields: dict[str, Any]) -> str:
        # A server that does not know the request would answer: one token is enough to find out.
        body = {**fields, "stream": False, "_debug_render_only": True, "options": {"num_predict": 1}}
        answer: Chatted | Generated = self._ask("POST", path, kind, f"rendering a prompt for {fields['model']}", body, self._run_s)
        if answer.debug is None:
            raise OlpackError(
                f"The Ollama server at {self.url} cannot show the prompts that it makes.",
                "Install the current one from https://ollama.com/download.",
            )
        return answer.debug.rendered_template

    # -- changing what is registered -------------------------------------------------------------------------------------------------------

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name, at no cost on disk."""
        self._ask("POST", "/api/copy", Nothing, f"copying {source} to {destination}", {"source": source, "destination": destination})

    def delete(self, model: str) -> None:
        """Remove a name, and its weights where no other name uses them."""
        self._ask("DELETE", "/api/delete", Nothing, f"removing {model}", {"model": model})

    def _has_blob(self, digest: str) -> bool:
        try:
            self._answer("HEAD", f"/api/blobs/{digest}", Nothing, None, self._whole_s)
        except _Refused as refused:
            if refused.status == 404:
                return False
            raise
        return True

    def upload(self, path: Path, digest: str) -> None:
        """Send a file where the server lacks it. A broken upload is tried again, and what got there meanwhile is not sent twice.

        Args:
            path: the file.
            digest: `sha256:<64 hex>` of it, as `blob_digest` gives it.

        Raises:
            OlpackError: the upload broke off every time, the server's disk is full, or the file does not match the digest.
        """
        for attempt in range(_TRIES):
            try:
                if not self._has_blob(digest):
                    self._send(path, digest)
                return
            except (httpx.TransportError, _Refused, _Foreign, _Endless) as error:
                status = error.status if isinstance(error, _Refused) else 0
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
            request = self._http.build_request("POST", f"/api/blobs/{digest}", content=chunks(), headers={"Content-Length": str(size)})
            self._whole(request, Nothing, _LONG_S)

    def create(self, body: Mapping[str, object]) -> list[str]:
        """Register a model.

        Args:
            body: of `/api/create`: `model`, and `from` or `files`, and so on.

        Returns:
            the server's status messages, in order, "success" last.

        Raises:
            OlpackError: the server refused (also in the middle of an answer that began with 200), or stopped without reporting success.
        """
        steps: list[str] = []
        name = body["model"]
        with self._failures(f"registering {name}"), progress.task(f"registering {name}", unit="steps") as task:
            self.bytes_sent += len(_encoded(body))
            for line in self._lines("/api/create", Progress, body, _LONG_S):
                steps.append(line.status)
                task.advance(note=steps[-1][:60])
        if steps[-1:] != ["success"]:
            last = f" after {steps[-1][:200]!r}" if steps else ""
            raise OlpackError(
                f"The Ollama server at {self.url} stopped registering {name}{last} without reporting success.",
                "Look into its log, then run this again.",
            )
        return steps

    def push(self, model: str, insecure: bool = False) -> Iterator[Progress]:
        """Have the server send a model to the registry that its name gives.

        Args:
            model: `[host/]namespace/model:tag`.
            insecure: speak plain HTTP to the registry.

        Yields:
            lines of progress.

        Raises:
            OlpackError: the server or the registry refused (also in the middle), or the server stopped without reporting success.
        """
        remedy = "Run this again: what has been sent stays there."
        return self._transfer("push", f"pushing {model}", {"model": model, "insecure": insecure}, _LONG_S, remedy)

    def pull(self, model: str, insecure: bool = False, within_s: float = _LONG_S) -> Iterator[Progress]:
        """Have the server fetch a model from the registry that its name gives. Blobs that it has are not fetched.

        Args:
            model: `[host/]namespace/model:tag`.
            insecure: speak plain HTTP to the registry.
            within_s: longest time for the whole of it, in seconds.

        Yields:
            lines of progress.

        Raises:
            OlpackError: the server or the registry refused (also in the middle), or the server stopped without reporting success.
        """
        remedy = "Look into its log, then run this again."
        return self._transfer("pull", f"pulling {model}", {"model": model, "insecure": insecure}, within_s, remedy)

    def _transfer(self, way: str, doing: str, body: Mapping[str, object], within_s: float, remedy: str) -> Iterator[Progress]:
        last = ""
        with self._failures(doing):
            for line in self._lines(f"/api/{way}", Progress, body, within_s, _MOST_OF_A_TRANSFER):
                last = line.status
                yield line
        if last != "success":
            raise OlpackError(f"The Ollama server at {self.url} stopped {doing} without reporting success.", remedy)

    # -- requests and answers --------------------------------------------------------------------------------------------------------------

    def _ask(
        self, method: str, path: str, kind: type[Kind], doing: str, body: Mapping[str, object] | None = None, within_s: float | None = None
    ) -> Kind:
        with self._failures(doing):
            return self._answer(method, path, kind, body, within_s or self._whole_s)

    def _answer(self, method: str, path: str, kind: type[Kind], body: Mapping[str, object] | None, within_s: float) -> Kind:
        return self._whole(self._request(method, path, body, within_s), kind, within_s)

    def _request(self, method: str, path: str, body: Mapping[str, object] | None, within_s: float) -> httpx.Request:
        usual = self._http.timeout
        timeout = httpx.Timeout(min(usual.read or within_s, within_s), connect=usual.connect)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        return self._http.build_request(method, path, content=None if body is None else _encoded(body), headers=headers, timeout=timeout)

    def _whole(self, request: httpx.Request, kind: type[Kind], within_s: float) -> Kind:
        """An answer that is one JSON object, or nothing."""
        deadline = time.monotonic() + within_s
        with self._sent(request, deadline, within_s) as answer:
            content = _joined(self._pieces(answer, deadline, within_s, _MOST_BYTES))
            if answer.status_code >= 400:
                raise _Refused(_reason(content) or answer.reason_phrase or f"status {answer.status_code}", answer.status_code)
            return _validated(content or (b"{}" if kind is Nothing else b""), kind, answer.status_code)

    def _lines(self, path: str, kind: type[Kind], body: Mapping[str, object], within_s: float, most_bytes: int | None = None) -> Iterator[Kind]:
        """An answer that comes in lines, one JSON object in each."""
        deadline = time.monotonic() + within_s
        with self._sent(self._request("POST", path, body, within_s), deadline, within_s) as answer:
            pieces = self._pieces(answer, deadline, within_s, most_bytes or _MOST_BYTES)
            if answer.status_code >= 400:
                raise _Refused(_reason(_joined(pieces)) or answer.reason_phrase or f"status {answer.status_code}", answer.status_code)
            rest = bytearray()  # the line that has not ended
            for piece in pieces:
                first, *lines = piece.split(b"\n")
                rest += first
                for line in lines:
                    if whole := bytes(rest).strip():
                        yield _validated(whole, kind, answer.status_code)
                    rest = bytearray(line)
                if len(rest) > _MOST_BYTES:
                    raise _Endless(f"sent a line of more than {_MOST_BYTES >> 20} MiB")
            if last := bytes(rest).strip():
                yield _validated(last, kind, answer.status_code)

    @contextmanager
    def _sent(self, request: httpx.Request, deadline: float, within_s: float) -> Iterator[httpx.Response]:
        """The answer as soon as its head is there. Each wait of httpx has a limit, but a head that comes byte by byte has many: so another
        thread waits for it, and this one only until the deadline.
        """
        box: queue.SimpleQueue[httpx.Response | Exception] = queue.SimpleQueue()

        def send() -> None:
            try:
                box.put(self._http.send(request, stream=True))
            except Exception as error:
                box.put(error)

        threading.Thread(target=send, daemon=True).start()
        try:
            answer = box.get(timeout=max(0.0, deadline - time.monotonic()) + 1.0)  # httpx' own limit comes first, where one passes
        except queue.Empty:
            raise _unfinished(within_s) from None
        if isinstance(answer, Exception):
            raise answer
        try:
            yield answer
        finally:
            answer.close()

    @staticmethod
    def _pieces(answer: httpx.Response, deadline: float, within_s: float, most_bytes: int) -> Iterator[bytes]:
        size = 0
        for piece in answer.iter_bytes():
            size += len(piece)
            if size > most_bytes:
                raise _Endless(f"sent more than {most_bytes >> 20} MiB")
            if time.monotonic() > deadline:
                raise _unfinished(within_s)
            yield piece

    # -- what can go wrong -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, _Refused, _Foreign, _Endless) as error:
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
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return self._absent()
        if isinstance(error, httpx.TimeoutException):
            silent = error.request.extensions["timeout"]["read"]
            return OlpackError(f"{server} sent nothing for {silent:g} s while {doing}.", "It may be overloaded. " + again)
        if isinstance(error, _Endless):
            return OlpackError(f"{server} {error} while {doing}.", "Restart it, or see with `curl` what answers there; a proxy may be in between.")
        if isinstance(error, _Foreign):
            shown = f": {error}" if str(error) else ""
            return OlpackError(
                f"{server} answered with something that is not Ollama's while {doing}{shown}.",
                "Is OLLAMA_HOST right, or does a proxy answer? Else install the current Ollama from https://ollama.com/download.",
            )
        if not isinstance(error, _Refused):
            return OlpackError(f"{server} broke off while {doing}: {_short(error)}.", "It may have been stopped, or its disk may be full. " + again)
        reason = _short(error)
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
        }.get(error.status, again if error.status >= 500 else "")
        return OlpackError(f"{server} refused while {doing}: {reason}.", remedy)


def _tag(listed: ListedModel) -> Tag:
    details = listed.details
    parameters, quantization = (details.parameter_size, details.quantization_level) if details else (None, None)
    return Tag(listed.model, listed.digest, listed.size, parameters, quantization)


def _encoded(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


def _run_body(model: str, options: Mapping[str, object] | None, fields: Mapping[str, object], stream: bool) -> dict[str, object]:
    return {"model": model, **fields, "stream": stream, **({"options": dict(options)} if options is not None else {})}


def _validated(content: bytes, kind: type[Kind], status: int) -> Kind:
    """An answer in its type.

    Raises:
        _Refused: it reports an error.
        _Foreign: it has another shape.
    """
    try:
        answer = kind.model_validate_json(content)
    except (ValidationError, ValueError, RecursionError) as error:
        if reason := _reported(content):  # an error in place of the answer
            raise _Refused(reason, status) from None
        where = ""
        if isinstance(error, ValidationError) and (place := ".".join(map(str, error.errors()[0]["loc"]))):
            where = f"{place[:80]}: {error.errors()[0]['msg']}, in "
        raise _Foreign(f"{where}{_short(content[:200].decode(errors='replace'))!r}" if content else "the answer is empty") from None
    if answer.error:
        raise _Refused(answer.error, status)
    return answer


def _reported(content: bytes) -> str | None:
    """The error that an answer reports, if it is such a one."""
    try:
        return Nothing.model_validate_json(content).error
    except (ValueError, RecursionError):
        return None


def _reason(content: bytes) -> str:
    """The reason in an answer that refuses: its error, or its text."""
    return _reported(content) or content[:1000].decode(errors="replace").strip()


def _joined(pieces: Iterator[bytes]) -> bytes:
    content = bytearray()  # a list of pieces of one byte each would take 40 times their size
    for piece in pieces:
        content += piece
    return bytes(content)


def _unfinished(within_s: float) -> _Endless:
    return _Endless(f"did not finish its answer within {within_s:g} s")


def _short(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + "…").rstrip(".")


def show_transfer(lines: Iterator[Progress], doing: str, size: int) -> None:
    """Show the lines of a push or a pull, of `size` bytes in all, as a task's progress. Raises what the lines raise."""
    done: dict[str, int] = {}
    with progress.task(doing, size, "B") as task:
        for line in lines:
            if line.digest:
                task.advance(line.completed - done.get(line.digest, 0))
                done[line.digest] = line.completed
            else:
                task.advance(0, note=line.status)


def blob_digest(path: Path) -> str:
    """`sha256:<64 hex>` of a file, as the API names it. The file is read once, with progress."""
    return f"sha256:{shown_digest(path, f'reading {path.name}')}"
