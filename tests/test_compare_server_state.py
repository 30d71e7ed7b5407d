"""A package compared through a server: what holds without it, what `--quant` leaves out,
what a server that goes away costs, where `:latest` stays."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_double import HubDouble
from ollama_double import LOOP, OllamaDouble
from oracle import make_workspace, olpack, write_base

from olpack.compare.results import read_results
from olpack.deploy.answers import Chatted, Message
from olpack.deploy.client import OllamaClient
from olpack.deploy.register import point_latest
from olpack.errors import OlpackError
from olpack.recipe import load
from olpack.stages import compare
from olpack.stages.build import Build


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, Path]:
    """A working folder whose `oracle` was built with a server, and the folder that holds the server's store."""
    root, store = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("store")
    make_workspace(root, write_base(root / "model"))
    path = root / "modelfiles/oracle/recipe.yaml"
    changed = {"epochs: 12": "epochs: 1, quantization: none", "repeats: 1}": "repeats: 1, answer_tokens: 8, reference: false}"}
    path.write_text(functools.reduce(lambda text, pair: text.replace(*pair), changed.items(), path.read_text()))
    with OllamaDouble(store) as double:
        code, _, said = olpack(root, "build", "oracle", server=double.url)
    assert code == 0, said
    return root, store


@pytest.fixture
def workspace(compared, tmp_path) -> Path:
    root = tmp_path / "workspace"
    shutil.copytree(compared[0], root)
    return root


@pytest.fixture
def server(compared, workspace, tmp_path) -> Iterator[OllamaDouble]:
    """The server again, at another address, with the package deployed."""
    shutil.copytree(compared[1], tmp_path / "store")
    with OllamaDouble(tmp_path / "store") as double:
        code, _, said = olpack(workspace, "deploy", "oracle", server=double.url)
        assert code == 0, said
        yield double


def results_of(workspace: Path):
    return read_results(workspace / "build/oracle/compare/results.json")


def stale(workspace: Path, server: str | None = None) -> str:
    """Why the comparison is stale, "" where it is not."""
    return compare.STAGE.step(Build(load(workspace / "modelfiles/oracle/recipe.yaml"), workspace / "build", server=server)).reason


def test_the_loss_of_the_file_is_that_of_training(workspace):
    """Chat marks in the rows are tokens and not text (ggml-org/llama.cpp#27371): what was trained is what is scored."""
    trained = json.loads((workspace / "build/oracle/stages/train.json").read_text())["result"]["eval_loss_after"]
    found = results_of(workspace)
    scored = next(quant.perplexity for quant in found.quants if quant.quant == "Q8_0")
    assert math.log(scored.value) == pytest.approx(trained, abs=0.01) and scored.same_tokens_rows == found.rows.count


def test_another_address_of_a_server_is_the_same_comparison(workspace, server):
    assert stale(workspace) == stale(workspace, server.url) == stale(workspace, "http://elsewhere:11434") == ""


def test_a_record_of_an_earlier_version_holds(workspace, server):
    path = workspace / "build/oracle/stages/compare.json"
    record = json.loads(path.read_text())
    del record["result"]["served"], record["digest"]
    for address, without, reason in (("http://one:11434", "", ""), (None, "", "speed was measured without the server that answers now")):
        record["inputs"]["server"] = address
        path.write_text(json.dumps(record))
        assert (stale(workspace), stale(workspace, server.url)) == (without, reason)


def test_the_hub_gets_the_table_of_figures_taken_through_a_server(workspace, monkeypatch):
    from olpack.deploy.hub import push_to_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks the older way
    with HubDouble() as hub:
        api = huggingface_hub.HfApi(endpoint=hub.url, token="hf_test")
        monkeypatch.setattr("olpack.deploy.hub.push_to_hub", functools.partial(push_to_hub, api=api))
        code, _, said = olpack(workspace, "push", "oracle", "--hub", "me/oracle")
        assert code == 0, said
        card = hub.files["me/oracle"]["README.md"].decode()
    assert "| Q4_K_M |" in card and "perplexity" in card


def test_a_quant_is_compared_by_itself_through_a_server(workspace, server):
    (workspace / "build/oracle/stages/compare.json").unlink()
    latest = {tag.model: tag.digest for tag in OllamaClient(server.url).tags()}["oracle:latest"]
    small = results_of(workspace).recommendation.quant
    other = "Q8_0" if small == "Q4_K_M" else "Q4_K_M"
    code, _, said = olpack(workspace, "compare", "oracle", "--quant", other, server=server.url)
    assert code == 0, said
    assert [quant.quant for quant in results_of(workspace).quants] == [other] and results_of(workspace).quants[0].speed
    # a choice among one says nothing of the others
    assert f"oracle:latest stays what it was: {small} could not be compared." in said
    assert {tag.model: tag.digest for tag in OllamaClient(server.url).tags()}["oracle:latest"] == latest


def test_a_server_that_stops_midway_costs_speed_and_not_the_table(workspace, server):
    shutil.rmtree(workspace / "build/oracle/compare")
    (workspace / "build/oracle/stages/compare.json").unlink()
    usual, asked = server.answer, []

    def answer(prompt: str):
        asked.append(prompt)
        if len(asked) == 9:  # in the first visit to the second quant
            server.stop()
            raise ConnectionAbortedError
        return usual(prompt)

    server.answer = answer
    code, printed, said = olpack(workspace, "compare", "oracle", server=server.url)
    assert code == 0, said
    found = results_of(workspace)
    assert all(quant.perplexity and quant.answers for quant in found.quants) and "Recommended: " in printed
    assert [quant.speed is not None for quant in found.quants] == [True, False]
    assert "the speed of Q8_0 was not measured" in found.recommendation.reason
    assert "some figures of Q4_K_M, Q8_0 could not be measured" in said
    assert "oracle:latest stays what it was: No Ollama server answers" in said
    assert stale(workspace) == "begun and not finished"


def test_a_tag_that_was_deleted_meanwhile_is_not_pointed_to(workspace, server):
    client = OllamaClient(server.url)
    client.delete("oracle:q8_0")
    with pytest.raises(OlpackError, match="has no oracle:q8_0 any more"):
        point_latest(client, "oracle", "q8_0")


def test_talking_to_a_model_that_the_server_breaks_off_or_that_thinks(workspace, server, monkeypatch):
    server.answer = lambda prompt: LOOP
    code, printed, said = olpack(workspace, "run", "oracle:q8_0", "Hi", server=server.url)
    assert code == 0 and printed.startswith("000") and "broke off the answer, as it does where a model repeats one token" in said
    pieces = [Message(thinking="two and "), Message(thinking="two"), Message(content="4")]
    answer = [Chatted(message=message, done=message.content != "") for message in pieces]
    monkeypatch.setattr(OllamaClient, "stream_chat", lambda *_: iter(answer))
    code, printed, said = olpack(workspace, "run", "oracle:q8_0", "2+2?", server=server.url)
    assert (code, printed, said) == (0, "4\n", "two and two\n")
