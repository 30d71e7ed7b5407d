"""`olpack deploy` on a server: what is asked of it again after a change, loops, long prompts, and models with adapters on newer servers."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from ollama_double import LOOP, Answer, OllamaDouble
from oracle import CHAT, make_workspace, olpack, write_base

from olpack.commands.doctor import examine
from olpack.deploy.client import OllamaClient
from olpack.recipe import load
from olpack.stages import export
from olpack.stages.build import Build
from olpack.stages.compare import _prompt_identity


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A working folder with a trained and exported `oracle`, and `prophet`, the same as an adapter beside its base."""
    root = tmp_path_factory.mktemp("deploy")
    make_workspace(root, write_base(root / "model"))
    recipe = root / "modelfiles/oracle/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 12", "epochs: 1"))
    turns = [{"role": "user", "content": "What is it? " * 8}, {"role": "assistant", "content": "forty-two"}]
    rows = root / "modelfiles/oracle/eval.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"messages": turns}) + "\n")
    shutil.copytree(root / "modelfiles/oracle", root / "modelfiles/prophet")
    other = root / "modelfiles/prophet/recipe.yaml"
    other.write_text(other.read_text() + "package: adapter\n")
    for name in ("oracle", "prophet"):
        for words in (["train"], ["export"]):
            code, _, said = olpack(root, *words, name)
            assert code == 0, said
    return root


@pytest.fixture
def workspace(exported, tmp_path) -> Path:
    root = tmp_path / "workspace"
    shutil.copytree(exported, root)
    return root


def runs(double: OllamaDouble) -> list[int]:
    """`num_predict` of every request that made the model answer, since the last call."""
    asked = [request.body for request in double.requests if request.path in ("/api/chat", "/api/generate")]
    double.requests.clear()
    return [body["options"]["num_predict"] for body in asked if not body.get("_debug_render_only")]


def test_only_what_a_change_can_affect_is_asked_again(workspace, ollama_double):
    url = ollama_double.url
    code, _, said = olpack(workspace, "deploy", "oracle", server=url)
    assert code == 0 and "prompt identical" in said, said
    first = runs(ollama_double)
    assert [count for count in first if count != 1] == [48] and len(first) > 10  # one tag answers; every conversation's tokens are compared

    system = ["--set", "modelfile.system=Be brief."]
    code, _, said = olpack(workspace, "deploy", "oracle", *system, server=url)
    assert code == 0 and "updated oracle:q8_0" in said and "prompt identical" in said, said
    assert ollama_double.count("POST", "/api/chat") > 10 and ollama_double.count("POST", "/api/blobs/") == 0
    assert runs(ollama_double) == [1, 1]  # tokens of one conversation with the new prompt, and of the longest

    for change in ("modelfile.parameters.temperature=0.5", "modelfile.license=MIT"):
        code, _, said = olpack(workspace, "deploy", "oracle", *system, "--set", change, server=url)
        assert code == 0 and "no part of the prompts changed" in said, said
        assert ollama_double.count("POST", "/api/create") == 2
        assert ollama_double.count("POST", "/api/chat") + ollama_double.count("POST", "/api/generate") == 0
        runs(ollama_double)


def test_another_server_version_is_asked_all_of_it(workspace, ollama_double):
    assert olpack(workspace, "deploy", "oracle", server=ollama_double.url)[0] == 0
    first = runs(ollama_double)
    ollama_double.faults.version = "0.33.1"
    assert olpack(workspace, "deploy", "oracle", "--set", "modelfile.license=MIT", server=ollama_double.url)[0] == 0
    assert runs(ollama_double) == first


@pytest.mark.parametrize(
    ("answer", "warned"),
    [
        (LOOP, "oracle:q4_K_M repeats itself, until the server broke its answer off: it ends with '000"),
        (Answer(["over ", "and "], ends=False), "oracle:q4_K_M repeats itself, for 48 tokens, where it was cut"),
        (Answer([f"{number} " for number in range(500)]), None),
        (Answer(["forty-two"]), None),
    ],
    ids=["one token", "two tokens", "a long answer", "an answer"],
)
def test_a_loop_is_distinguished_from_a_long_answer(workspace, ollama_double, answer, warned):
    ollama_double.answer = lambda prompt: answer
    code, _, said = olpack(workspace, "deploy", "oracle", server=ollama_double.url)
    assert code == 0, said
    assert ("repeats itself" in said) is (warned is not None) and (warned or "") in " ".join(said.split())
    if len(answer.pieces) > 48:
        assert "answers; it was cut after 48 tokens, as asked" in said


def test_long_requests_are_compared_and_a_cut_prompt_fails(workspace, ollama_double):
    ollama_double.faults.cut_prompts_to = 128 // 2 + 2
    _, _, said = olpack(workspace, "plan", "oracle", server=ollama_double.url)
    assert "eval.jsonl:5 of" in said and "longer than half of num_ctx 128" in said, said
    code, _, said = olpack(workspace, "deploy", "oracle", server=ollama_double.url)
    assert code == 1 and "cut to 66 of " in said and "row 4 of the data" in said and "num_ctx" in said, said
    ollama_double.faults.cut_prompts_to = None
    code, _, said = olpack(workspace, "deploy", "oracle", server=ollama_double.url)
    assert code == 0 and "prompt identical" in said, said
    _, _, said = olpack(workspace, "plan", "oracle", "--set", "modelfile.parameters.num_ctx=32", server=ollama_double.url)
    assert "eval.jsonl:5 of" in said and "the server cuts such prompts" in said, said


def test_an_answer_without_an_end_is_warned_of(workspace):
    unlimited = "sets no num_predict: an answer that comes to repeat itself goes on for 1,280 tokens"
    for value, warned in ((None, True), ("-1", True), ("-2", True), ("512", False)):
        words = ["--set", f"modelfile.parameters.num_predict={value}"] if value else []
        code, _, said = olpack(workspace, "plan", "oracle", *words)
        assert code == 0 and (unlimited in " ".join(said.split())) is warned, said


def test_a_difference_in_a_made_up_conversation_is_recorded_and_ends_nothing(workspace, ollama_double):
    counted = ollama_double.tokenize
    ollama_double.tokenize = lambda digest, text: counted(digest, text) + [0] * 2 * ("مساعد" in text)
    code, _, said = olpack(workspace, "deploy", "oracle", server=ollama_double.url)
    assert code == 0 and "conversations that are made up" in said and "Arabic, by its tokens" in said, said
    result = json.loads((workspace / "build/oracle/stages/deploy.json").read_text())["result"]
    assert "1 difference in made-up conversations" in result["identity"] and "Arabic" in result["identity_warnings"][0]
    assert "Arabic" in _prompt_identity(Build(load(workspace / "modelfiles/oracle/recipe.yaml"), out=workspace / "build"))
    ollama_double.tokenize = lambda digest, text: counted(digest, text) + [0] * 2 * ("What is 100" in text)
    code, _, said = olpack(workspace, "deploy", "oracle", "--set", "modelfile.parameters.num_ctx=120", server=ollama_double.url)
    assert code == 0, said  # the same vocabulary was compared with that row before
    code, _, said = olpack(workspace, "deploy", "oracle", "--check", "--set", "modelfile.parameters.num_ctx=120", server=ollama_double.url)
    assert code == 1 and "row 1 of the data, by its tokens: the same text becomes other tokens" in said, said


def test_only_exports_whose_files_change_have_another_key(workspace):
    recipe, settings = workspace / "modelfiles/oracle/recipe.yaml", workspace / "model/tokenizer_config.json"
    recipe.write_text(f"base: {workspace / 'model'}\n" + recipe.read_text().partition("\n")[2])
    keys = {}
    for template in (CHAT, "{{ bos_token }}" + CHAT, "{{ eos_token }}" + CHAT):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
        build = Build(load(recipe), out=workspace / "build")
        keys[template] = export.STAGE.all_inputs(build, "export-Q8_0").get("pinned in the chat template")
        assert build.base.absent_tokens == (keys[template] or [])
    assert list(keys.values()) == [None, ["bos_token"], None]
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<|im_start|>", "chat_template": "{{ bos_token }}" + CHAT}))
    assert Build(load(recipe), out=workspace / "build").base.absent_tokens == []


# -- servers that create no models with adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.34.1", "0.34.2-rc0", "1.0.0"])
def test_an_adapter_is_refused_before_training_where_it_cannot_be_registered(workspace, ollama_double, monkeypatch, tmp_path, version):
    ollama_double.faults.version, ollama_double.faults.no_loopback = version, True
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))
    for words in (["plan"], ["build", "--set", "train.epochs=2"]):
        code, _, said = olpack(workspace, words[0], "prophet", *words[1:], server=ollama_double.url)
        said = " ".join(said.split())
        assert code == 1 and f"Ollama {version} creates no models with adapters" in said, said
        assert "`package: merged`" in said and "--store DIR" in said and "training: " not in said
    assert olpack(workspace, "plan", "oracle", server=ollama_double.url)[0] == 0
    ollama_double.faults.version = "0.34.0"
    assert olpack(workspace, "plan", "prophet", server=ollama_double.url)[0] == 0


def test_an_adapter_is_written_into_the_servers_store(workspace, ollama_double, monkeypatch):
    ollama_double.faults.version, ollama_double.store.refuses_adapters = "0.34.2", True
    monkeypatch.setenv("OLLAMA_MODELS", str(ollama_double.store.root))
    assert olpack(workspace, "deploy", "oracle", server=ollama_double.url)[0] == 0  # the store holds what the server lists
    ollama_double.requests.clear()
    _, _, said = olpack(workspace, "plan", "prophet", server=ollama_double.url)
    assert "deploy writes the tags into its model store" in " ".join(said.split()), said
    code, _, said = olpack(workspace, "deploy", "prophet", server=ollama_double.url)
    assert code == 0 and "prompt identical" in said, said
    assert ollama_double.count("POST", "/api/create") == ollama_double.count("POST", "/api/blobs/") == 0
    client = OllamaClient(ollama_double.url)
    assert client.show("prophet:q8_0").adapter and not client.show("oracle:q8_0").adapter
    code, _, said = olpack(workspace, "deploy", "prophet", "--set", "modelfile.system=Be brief.", server=ollama_double.url)
    assert code == 0 and client.show("prophet:q8_0").system == "Be brief.", said
    assert olpack(workspace, "deploy", "prophet", "--check", "--set", "modelfile.system=Be brief.", server=ollama_double.url)[0] == 0


def test_an_adapter_is_pulled_where_there_is_no_store(workspace, ollama_double, monkeypatch, tmp_path):
    ollama_double.faults.version, ollama_double.store.refuses_adapters = "0.34.2", True
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))
    code, _, said = olpack(workspace, "deploy", "prophet", server=ollama_double.url)
    assert code == 0 and "prompt identical" in said and "pulled, " in said, said
    assert ollama_double.count("POST", "/api/create") == ollama_double.count("POST", "/api/blobs/") == 0
    tags = {tag.model for tag in OllamaClient(ollama_double.url).tags()}
    assert {"prophet:q4_K_M", "prophet:q8_0"} <= tags and not [tag for tag in tags if "127.0.0.1" in tag]


@pytest.mark.parametrize(("store", "found_as"), [("another", "use `package: merged`"), ("none", "which it pulls"), ("of the server", "its store")])
def test_the_doctor_says_so(ollama_double, monkeypatch, tmp_path, store, found_as):
    ollama_double.faults.version, ollama_double.faults.no_loopback = "0.34.2", store == "another"
    monkeypatch.setenv("OLLAMA_HOST", ollama_double.url)
    monkeypatch.setenv("OLLAMA_MODELS", str(ollama_double.store.root if store == "of the server" else tmp_path / "none"))
    [found] = [finding for finding in examine() if finding.part == "Ollama"]
    assert found.state == "ready" and "0.34.2" in found.detail and "creates no models with adapters" in found.detail
    assert found_as in found.detail and ("package: merged" in found.detail) is (store == "another")


def test_the_list_names_the_quants_of_an_adapter_package(workspace):
    assert olpack(workspace, "build", "prophet", "--only", "modelfiles", "--no-deploy")[0] == 0
    code, printed, said = olpack(workspace, "list", "--json")
    assert code == 0, said
    quants = {row["name"]: list(row["quants"]) for row in json.loads(printed)}
    assert quants["prophet"] == ["adapter", "Q4_K_M", "Q8_0"] and quants["oracle"] == ["Q4_K_M", "Q8_0"]


# -- templates with the date ---------------------------------------------------------------------------------------------------------------


def test_a_date_in_the_template(workspace, ollama_double, monkeypatch):
    path = workspace / "model"
    settings = json.loads((path / "tokenizer_config.json").read_text())
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y %H:%M:%S') + '\\n' }}" + CHAT
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": dated}))
    recipe = workspace / "modelfiles/oracle/recipe.yaml"
    recipe.write_text(f"base: {path}\n" + recipe.read_text().partition("\n")[2])
    for words in (["train"], ["export"]):
        code, _, said = olpack(workspace, *words, "oracle")
        assert code == 0, said
        if words == ["train"]:
            assert "so one date is trained" in " ".join(said.split()), said
    trained = json.loads((workspace / "build/oracle/stages/train.json").read_text())["result"]["rendered_at"]

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + timedelta(days=1)

    monkeypatch.setattr("olpack.stages.build.datetime", Tomorrow)
    monkeypatch.setattr("ollama_double_store.datetime.datetime", Tomorrow)
    code, _, said = olpack(workspace, "deploy", "oracle", server=ollama_double.url)
    assert code == 0 and "prompt identical" in said and "differences" not in said, said
    assert olpack(workspace, "deploy", "oracle", "--check", server=ollama_double.url)[0] == 0
    _, printed, _ = olpack(workspace, "plan", "oracle", "--json", server=ollama_double.url)
    assert {step["step"] for step in json.loads(printed)["steps"] if step["stale"]} <= {"modelfiles", "compare"}
    [first, *_] = Build(load(recipe), out=workspace / "build").rows[0]
    assert f"{datetime.fromisoformat(trained):%d %b %Y %H:%M:%S}" in first.text
