"""The client against the double: what goes over the wire, and what is said when the server fails."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ollama_double as ollama_double_module
import pytest
import served_gguf
from ollama_double import Answer, OllamaDouble

from olpack.deploy.client import OllamaClient, blob_digest, server_url
from olpack.deploy.model_info import read_parameters
from olpack.errors import OlpackError


@pytest.fixture
def client(ollama_double: OllamaDouble) -> OllamaClient:
    return OllamaClient(ollama_double.url, retry_wait_s=0.01)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    served_gguf.write(tmp_path / "coder-Q4_K_M.gguf", served_gguf.CHAT)
    return tmp_path / "coder-Q4_K_M.gguf"


def _create(client: OllamaClient, gguf: Path, model: str = "coder:q4_K_M", **fields: object) -> None:
    digest = blob_digest(gguf)
    client.upload(gguf, digest)
    client.create({"model": model, "files": {gguf.name: digest}, **fields})


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (None, "http://127.0.0.1:11434"),
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        ("[::]:8080", "http://[::1]:8080"),
        ("::", "http://[::1]:11434"),
        ("0.0.0.0:8080/ollama/", "http://127.0.0.1:8080/ollama"),
        (":11434/", "http://127.0.0.1:11434"),
        ("https://0.0.0.0/v1", "https://127.0.0.1:443/v1"),
        (" '127.0.0.1:1234' ", "http://127.0.0.1:1234"),
        (":56789", "http://127.0.0.1:56789"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("[::]:8080", "http://[::1]:8080"),
        ("::1", "http://[::1]:11434"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://example.com", "https://example.com:443"),
        ("https://example.com:8443/ollama/", "https://example.com:8443/ollama"),
        ("example.com/path", "http://example.com:11434/path"),
        ("http://user:secret@example.com:8080/a@b", "http://example.com:8080/a@b"),
        ("user:sec:ret@example.com", "http://example.com:11434"),
        ("https://user:secret@[::1]:5", "https://[::1]:5"),
        (' "localhost" ', "http://localhost:11434"),
    ],
)
def test_the_address_is_read_as_ollama_reads_it(host: str | None, url: str) -> None:
    assert server_url(host) == url


@pytest.mark.parametrize("host", ["localhost:port", "ftp://example.com", "http://[::1"])
def test_what_is_no_address(host: str) -> None:
    with pytest.raises(OlpackError, match="OLLAMA_HOST"):
        server_url(host)


def test_the_address_comes_from_the_environment(ollama_double: OllamaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", ollama_double.url.removeprefix("http://"))
    assert OllamaClient().version() == "0.33.0-rc2"


def test_user_and_password_go_to_the_server_alone(ollama_double: OllamaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    usual = ollama_double_module._Handler._version
    monkeypatch.setattr(
        ollama_double_module._Handler, "_version", lambda handler, body: (seen.append(handler.headers["Authorization"]), usual(handler, body))[1]
    )
    client = OllamaClient(ollama_double.url.replace("://", "://user:sec%40ret@"))
    assert client.require() == "0.33.0-rc2" and client.url == ollama_double.url
    assert seen == ["Basic " + base64.b64encode(b"user:sec@ret").decode()]


def test_a_path_before_the_api(ollama_double: OllamaDouble) -> None:
    assert OllamaClient(ollama_double.url + "/behind/a/proxy").version() is None
    assert ollama_double.requests[-1].path == "/behind/a/proxy/api/version"


def test_a_proxy_is_not_asked_for_this_machine(ollama_double: OllamaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert OllamaClient(ollama_double.url).version() == "0.33.0-rc2"


def test_a_proxy_is_asked_for_what_is_elsewhere(ollama_double: OllamaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", ollama_double.url)
    OllamaClient("http://ollama.invalid:11434").version()
    assert ollama_double.requests[-1].path == "http://ollama.invalid:11434/api/version"


@pytest.mark.parametrize("proxy", ["socks5h://127.0.0.1:9", "SOCKS5://127.0.0.1:9", "socks4://u:p@127.0.0.1:9"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTP_PROXY", "https_proxy"])
def test_a_socks_proxy_does_not_stop_what_is_here(ollama_double: OllamaDouble, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str) -> None:
    """ollama/ollama-python#424: importing the package makes a client that reads the environment."""
    monkeypatch.setenv(name, proxy)
    for host in (ollama_double.url, ollama_double.url.replace("127.0.0.1", "localhost"), ollama_double.url.replace("127.0.0.1", "0.0.0.0")):
        assert OllamaClient(host).require() == "0.33.0-rc2"


def test_the_package_is_imported_under_a_socks_proxy(ollama_double: OllamaDouble) -> None:
    environment = os.environ | {"ALL_PROXY": "socks5h://127.0.0.1:9", "OLLAMA_HOST": ollama_double.url}
    script = "import os; from olpack.deploy.client import OllamaClient; print(OllamaClient().require(), os.environ['ALL_PROXY'])"
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert child.stdout.split() == ["0.33.0-rc2", "socks5h://127.0.0.1:9"], child.stderr


def test_a_socks_proxy_for_a_server_elsewhere_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    with pytest.raises(OlpackError, match=r"ollama.invalid:11434 would be called through a SOCKS proxy \(ALL_PROXY=socks5h") as caught:
        OllamaClient("ollama.invalid")
    assert "pip install socksio" in caught.value.remedy and "NO_PROXY" in caught.value.remedy
    monkeypatch.setenv("NO_PROXY", "ollama.invalid")
    assert OllamaClient("ollama.invalid").version() is None


def test_no_server(ollama_double: OllamaDouble, client: OllamaClient) -> None:
    ollama_double.stop()
    assert client.version() is None
    for call in (client.require, client.tags, lambda: client.show("x"), lambda: client.chat("x", [{"role": "user", "content": "y"}])):
        with pytest.raises(OlpackError, match=r"No Ollama server answers at http://127.0.0.1:\d+. Start it with 'ollama serve', install it"):
            call()
    ollama_double.start()


@pytest.mark.parametrize(
    ("version", "good"), [("0.30.0", True), ("0.33.0-rc2", True), ("1.0", True), ("0.0.0", True), ("0.29.9", False), ("0.6.2", False)]
)
def test_versions(ollama_double: OllamaDouble, client: OllamaClient, version: str, good: bool) -> None:
    ollama_double.faults.version = version
    if good:
        assert client.require() == version
    else:
        with pytest.raises(OlpackError, match=f"is version {version}; olpack needs 0.30"):
            client.require()


def test_something_else_answers(ollama_double: OllamaDouble, client: OllamaClient) -> None:
    ollama_double.faults.not_json = True
    assert client.version() is None
    with pytest.raises(OlpackError, match="answered with something that is not Ollama's while listing"):
        client.tags()
    with pytest.raises(OlpackError, match="log in"):
        client.create({"model": "x", "from": "y"})


def test_a_silent_server(ollama_double: OllamaDouble) -> None:
    ollama_double.faults.silent_s = 1.0
    with pytest.raises(OlpackError, match=r"sent nothing for 0.1 s while showing coder"):
        OllamaClient(ollama_double.url, answer_within_s=0.1).show("coder")


# -- blobs ---------------------------------------------------------------------------------------------------------------------------------


def test_an_upload_goes_over_once(ollama_double: OllamaDouble, client: OllamaClient, gguf: Path) -> None:
    digest = blob_digest(gguf)
    assert digest == f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"
    for _ in range(2):
        client.upload(gguf, digest)
    assert ollama_double.store.blob(digest).read_bytes() == gguf.read_bytes()
    assert [(request.method, request.sent) for request in ollama_double.requests] == [("HEAD", 0), ("POST", gguf.stat().st_size), ("HEAD", 0)]
    assert client.bytes_sent == gguf.stat().st_size


def test_a_broken_upload_is_tried_again(ollama_double: OllamaDouble, client: OllamaClient, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    large = tmp_path / "large.gguf"
    large.write_bytes(bytes(5_000_000))
    ollama_double.faults.break_uploads = 2
    client.upload(large, blob_digest(large))
    assert ollama_double.count("POST", "/api/blobs/") == 3
    assert ollama_double.store.blob(blob_digest(large)).is_file()
    assert capsys.readouterr().err.count("The upload of large.gguf broke off") == 2
    assert not list((tmp_path / "ollama-models/blobs").glob("*.part"))


def test_an_upload_that_breaks_every_time(ollama_double: OllamaDouble, client: OllamaClient, gguf: Path) -> None:
    ollama_double.faults.errors_500 = 99
    with pytest.raises(OlpackError, match=r"refused while uploading coder-Q4_K_M.gguf: something went wrong") as caught:
        client.upload(gguf, blob_digest(gguf))
    assert "what has been uploaded stays" in caught.value.remedy
    assert ollama_double.count("POST", "/api/blobs/") == 4


def test_a_server_that_goes_away_and_comes_back(ollama_double: OllamaDouble, client: OllamaClient, tmp_path: Path) -> None:
    large = tmp_path / "large.gguf"
    large.write_bytes(bytes(5_000_000))
    ollama_double.faults.stop_during_upload = True
    with pytest.raises(OlpackError, match=r"No Ollama server answers|broke off while uploading"):
        client.upload(large, blob_digest(large))
    ollama_double.start()
    client.upload(large, blob_digest(large))
    assert ollama_double.store.blob(blob_digest(large)).is_file()


def test_a_full_disk_is_not_tried_again(ollama_double: OllamaDouble, client: OllamaClient, gguf: Path) -> None:
    ollama_double.faults.disk_left = 1000
    with pytest.raises(OlpackError, match="has no space left on its disk") as caught:
        client.upload(gguf, blob_digest(gguf))
    assert "OLLAMA_MODELS" in caught.value.remedy
    assert ollama_double.count("POST", "/api/blobs/") == 1


def test_a_file_that_changed_since(ollama_double: OllamaDouble, client: OllamaClient, gguf: Path) -> None:
    digest = blob_digest(gguf)
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"x")
    with pytest.raises(OlpackError, match="is not the file it was"):
        client.upload(gguf, digest)
    assert ollama_double.count("POST", "/api/blobs/") == 1


# -- create, show, copy, delete ------------------------------------------------------------------------------------------------------------


def test_create_and_show(client: OllamaClient, gguf: Path) -> None:
    system = 'You write Python.\n\n"""Docs."""\nأنت\u00a0مساعد 👩\u200d💻'
    parameters = {"temperature": 0.2, "num_ctx": 2048, "stop": ["<|im_end|>", 'a "b"\n\\'], "use_mmap": True, "top_p": 1}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    _create(client, gguf, system=system, parameters=parameters, license="Apache-2.0", messages=messages)
    shown = client.show("CODER:Q4_k_m")
    assert (shown.system, shown.parameters, shown.license, list(shown.messages)) == (system, parameters, "Apache-2.0", messages)
    assert (shown.blob, shown.template) == (blob_digest(gguf), served_gguf.CHAT)
    assert shown.details["quantization_level"] == "Q4_K_M"
    assert client.show("coder") is None
    client.copy("coder:q4_K_M", "coder")
    assert client.show("coder").system == system
    assert sorted(model.model for model in client.tags()) == ["coder:latest", "coder:q4_K_M"]
    client.delete("coder:q4_K_M")
    assert [model.model for model in client.tags()] == ["coder:latest"]
    with pytest.raises(OlpackError, match="model 'coder:q4_K_M' not found"):
        client.delete("coder:q4_K_M")


def test_parameters_are_read_from_the_servers_columns() -> None:
    text = (
        'num_ctx                        2048\nseed                           1e+06\nstop                           "<|im_end|>"\n'
        'stop                           "a \\"b\\"\\n\\\\ \\u200d \\x00"\ntemperature                    0.2\n'
        "use_mmap                       false"
    )
    assert read_parameters(text) == {
        "num_ctx": 2048,
        "seed": 1_000_000,
        "stop": ["<|im_end|>", 'a "b"\n\\ \u200d \x00'],
        "temperature": 0.2,
        "use_mmap": False,
    }


def test_an_error_inside_200_is_an_error(client: OllamaClient) -> None:
    with pytest.raises(OlpackError, match=r"registering x: open .*no such file"):
        client.create({"model": "x", "files": {"a.gguf": "sha256:" + "1" * 64}})


def test_an_early_error_is_one_too(client: OllamaClient) -> None:
    with pytest.raises(OlpackError, match="neither 'from' or 'files' was specified"):
        client.create({"model": "x"})


def test_a_broken_gguf(client: OllamaClient, gguf: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:5000])
    with pytest.raises(OlpackError, match="unexpected EOF"):
        _create(client, gguf)


def test_a_server_that_dies_while_registering(ollama_double: OllamaDouble, client: OllamaClient, gguf: Path) -> None:
    ollama_double.faults.break_creates = 1
    with pytest.raises(OlpackError, match="broke off while registering coder:q4_K_M"):
        _create(client, gguf)
    assert client.show("coder:q4_K_M") is None
    _create(client, gguf)
    assert client.show("coder:q4_K_M") is not None


# -- running -------------------------------------------------------------------------------------------------------------------------------


def test_answers(ollama_double: OllamaDouble, client: OllamaClient, gguf: Path) -> None:
    _create(client, gguf, parameters={"num_ctx": 2048})
    ollama_double.answer = lambda prompt: Answer(["def ", "f(): ", "pass"])
    question = [{"role": "user", "content": "Write f."}]
    answer = client.chat("coder:q4_K_M", question)
    assert (answer.message.content, answer.done_reason, answer.eval_count) == ("def f(): pass", "stop", 4)
    assert answer.prompt_eval_count == len(
        served_gguf.tokenizer().encode("<|im_start|>user\nWrite f.<|im_end|>\n<|im_start|>assistant\n<think>\n").ids
    )
    pieces = list(client.stream_chat("coder:q4_K_M", question, {"num_predict": 2}))
    assert ["".join(piece.message.content for piece in pieces), pieces[-1].done_reason] == ["def f(): ", "length"]
    assert client.generate("coder:q4_K_M", "Write f.", {"num_predict": 1}).response == "def "
    assert [(model.model, model.context_length) for model in client.ps()] == [("coder:q4_K_M", 2048)]
    client.unload("coder:q4_K_M")
    assert not client.ps()
    with pytest.raises(OlpackError, match="model 'nope' not found"):
        client.chat("nope", question)
    with pytest.raises(OlpackError, match="model 'nope' not found"):
        list(client.stream_chat("nope", question))


def test_a_wrong_type_fails_only_when_it_runs(client: OllamaClient, gguf: Path) -> None:
    _create(client, gguf, parameters={"temperature": "hot"})
    with pytest.raises(OlpackError, match='option "temperature" must be of type float32'):
        client.generate("coder:q4_K_M", "x")


def test_rendered_prompts(ollama_double: OllamaDouble, client: OllamaClient, gguf: Path) -> None:
    _create(client, gguf, system="S", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    before = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    after = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert client.render_chat("coder:q4_K_M", [{"role": "user", "content": "U"}]) == before + after
    assert client.render_generate("coder:q4_K_M", "U") == before + after
    assert client.render_generate("coder:q4_K_M", "U", system="T") == before.replace("\nS<", "\nT<") + after
    assert ollama_double.requests[-1].body == {
        "model": "coder:q4_K_M",
        "prompt": "U",
        "system": "T",
        "stream": False,
        "_debug_render_only": True,
        "options": {"num_predict": 1},
    }
    ollama_double.faults.no_debug_render = True
    with pytest.raises(OlpackError, match="cannot show the prompts"):
        client.render_chat("coder:q4_K_M", [{"role": "user", "content": "U"}])


def test_the_requests_are_utf_8_json(ollama_double: OllamaDouble, client: OllamaClient, gguf: Path) -> None:
    _create(client, gguf, system="أنت")
    request = ollama_double.requests[-1]
    assert request.sent == len(json.dumps(request.body, ensure_ascii=False).encode())


def test_an_error_that_is_json_and_no_object(ollama_double: OllamaDouble, client: OllamaClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollama_double._Handler._tags", lambda handler, _body: handler._send(404, "404", "text/plain"))
    with pytest.raises(OlpackError, match="refused while listing its models: 404"):
        client.tags()
