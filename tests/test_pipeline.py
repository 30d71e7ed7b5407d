"""The whole way on a small model: what a build makes, what it does not do twice, and what it refuses before any work."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import CHAT, RECIPE, files, make_workspace, olpack, write_base, write_rows

from olpack import recipe
from olpack.deploy.client import OllamaClient
from olpack.errors import OlpackError
from olpack.stages import calibration, compare, export, modelfiles
from olpack.stages.build import Build
from olpack.stages.order import all_steps, stage_of
from olpack.workspace import value_digest


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def built(tmp_path_factory, base) -> Path:
    """A working folder in which `olpack build oracle` has run once."""
    root = make_workspace(tmp_path_factory.mktemp("workspace"), base)
    code, printed, said = olpack(root, "build", "oracle")
    assert code == 0, said
    (root / "printed").write_text(printed)
    return root


@pytest.fixture
def workspace(built, tmp_path) -> Path:
    """A copy of the built folder to change."""
    root = tmp_path / "workspace"
    shutil.copytree(built, root)  # with modification times
    return root


def test_a_build_makes_exactly_this(built):
    made = {name for name in files(built / "build/oracle") if "measured" not in name and name != ".lock"}
    assert made == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/metrics.jsonl",
        "adapter/settings.json",
        "gguf/oracle-Q4_K_M.gguf",
        "gguf/oracle-Q8_0.gguf",
        "modelfiles/q4_K_M.Modelfile",
        "modelfiles/q8_0.Modelfile",
        "compare/results.json",
        "compare/results.csv",
        "compare/results.md",
        "compare/report.html",
        "plan.json",
        "stages/train.json",
        "stages/export-Q4_K_M.json",
        "stages/export-Q8_0.json",
        "stages/modelfiles.json",
        "stages/compare.json",
    }
    printed = (built / "printed").read_text()
    assert "Q4_K_M" in printed and "Q8_0" in printed and "perplexity" in printed
    assert "olpack run oracle:" in printed and "ollama.com/download" in printed
    assert "base Q8_0" in printed and "unquantized" in printed


def test_the_gguf_says_what_it_is_made_from(built):
    from gguf import GGUFReader

    fields = GGUFReader(built / "build/oracle/gguf/oracle-Q8_0.gguf").fields
    assert fields["general.name"].contents() == "oracle"
    assert fields["general.architecture"].contents() == "qwen3"
    assert {"olpack.version", "olpack.base", "olpack.base_digest", "olpack.training"} <= set(fields)
    assert fields["tokenizer.chat_template"].contents().endswith(CHAT)
    assert fields["olpack.version"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[fields["tokenizer.ggml.eot_token_id"].contents()] == "<|im_end|>"


def test_the_modelfile_says_what_the_recipe_does(built):
    from olpack.deploy import parse

    read = parse((built / "build/oracle/modelfiles/q4_K_M.Modelfile").read_text())
    assert (built / "build/oracle/modelfiles" / read.source).resolve() == built / "build/oracle/gguf/oracle-Q4_K_M.gguf"
    assert read.package.system == "Answer in words."
    assert read.package.parameters == {"temperature": 0.0, "num_ctx": 128}


def test_a_second_build_does_nothing_and_says_so(workspace):
    before = files(workspace)
    code, printed, said = olpack(workspace, "build", "oracle")
    assert code == 0
    assert "up to date" in said
    assert "Q4_K_M" in printed
    assert files(workspace) == before


def test_a_second_build_loads_no_torch(workspace):
    script = "import sys; from olpack.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    child = subprocess.run([sys.executable, "-c", script, "build", "oracle", "--no-deploy"], cwd=workspace, capture_output=True, text=True)
    assert child.returncode == 0
    assert child.stderr.endswith("False\n")


def test_a_changed_system_prompt_trains_and_exports_nothing(workspace):
    before = files(workspace / "build/oracle")
    code, printed, _ = olpack(workspace, "build", "oracle", "--set", "modelfile.system=New.", "--json")
    assert code == 0
    assert json.loads(printed)["done"] == ["modelfiles", "compare"]
    changed = {name.split("/")[0] for name, time in files(workspace / "build/oracle").items() if before.get(name) != time}
    assert not changed & {"adapter", "gguf"}
    assert "New." in (workspace / "build/oracle/modelfiles/q8_0.Modelfile").read_text()


@pytest.mark.parametrize(("keep", "trains"), [("best", True), ("last", False)])
def test_other_held_out_rows_train_where_they_choose_the_adapter(workspace, keep, trains):
    build = recipe.load(workspace / "modelfiles/oracle/recipe.yaml", [f"train.keep={keep}"])
    before = [stage_of(stage).all_inputs(Build(build)) for stage in ("train", "compare")]
    write_rows(workspace / "modelfiles/oracle/eval.jsonl", 5, first=200)
    after = [stage_of(stage).all_inputs(Build(build)) for stage in ("train", "compare")]
    assert (before[0] != after[0]) is trains
    assert before[1] != after[1]


def test_what_only_the_machine_decides_trains_nothing(workspace):
    code, _, said = olpack(workspace, "build", "oracle", "--set", "train.micro_batch_tokens=64", "--set", "data.max_length=100")
    assert code == 0 and "up to date" in said


def test_the_plan_says_what_a_gpu_and_the_host_hold(workspace: Path) -> None:
    asked = ("plan", "oracle", "--vram", "24", "--set", "train.gradient_checkpointing=true")
    fit = json.loads(olpack(workspace, *asked, "--json")[1])["estimate"]["fit"]
    assert sum(fit["parts"].values()) == fit["bytes"] < fit["room"]
    assert fit["host_parts"]["inputs of the layers"] > 0
    code, printed, _ = olpack(workspace, *asked)
    assert code == 0 and "GPU memory" in printed and "base as nf4" in printed
    assert "pinned memory for each GPU: inputs of the layers" in " ".join(printed.split())


def test_a_lost_adapter_is_trained_again_and_all_after_it(workspace):
    (workspace / "build/oracle/adapter/adapter_model.safetensors").unlink()
    _, printed, _ = olpack(workspace, "plan", "oracle", "--json")
    reasons = {step["step"]: step["stale"] for step in json.loads(printed)["steps"]}
    assert "is gone" in reasons["train"]
    assert reasons["export-Q8_0"] == reasons["compare"] == "training is done anew"
    assert reasons["modelfiles"] is None


def test_another_adapter_is_exported_even_if_its_training_was_another_command(workspace):
    record = json.loads((workspace / "build/oracle/stages/train.json").read_text())
    record["result"]["adapter_digest"] = "another"
    del record["digest"]
    (workspace / "build/oracle/stages/train.json").write_text(json.dumps(record))
    _, printed, _ = olpack(workspace, "plan", "oracle", "--json")
    reasons = {step["step"]: step["stale"] for step in json.loads(printed)["steps"]}
    assert reasons == {
        "train": None,
        "export-Q4_K_M": "adapter changed",
        "export-Q8_0": "adapter changed",
        "modelfiles": None,
        "compare": "files changed",
    }


def test_a_comparison_that_failed_is_not_done(workspace, monkeypatch):
    results = json.loads((workspace / "build/oracle/compare/results.json").read_text())
    results["quants"][0]["flags"] = [{"code": "failed", "text": "it crashed", "serious": True}]
    from olpack.compare.results import Results

    monkeypatch.setattr("olpack.compare.measure.measure", lambda *_, **__: Results.model_validate(results))
    (workspace / "build/oracle/stages/compare.json").unlink()
    code, _, said = olpack(workspace, "compare", "oracle")
    assert code == 0 and "could not be measured" in said
    monkeypatch.undo()
    code, _, said = olpack(workspace, "compare", "oracle")
    assert code == 0 and "up to date" not in said and "could not be measured" not in said


def test_tasks_are_scored_and_nothing_else_is_measured_again(workspace):
    before = files(workspace / "build/oracle/compare/measured")
    asked = 'compare.tasks=[{prompt: "What is 3 + 1?", exact: forty-two}, {prompt: "What is 4 + 1?", json: true}]'
    code, printed, said = olpack(workspace, "compare", "oracle", "--set", asked)
    assert code == 0 and "50" in printed and "measuring the base (Q8_0): tasks" in said and "measuring the unquantized model: tasks" in said
    assert "unquantized model: perplexity" not in said
    results = json.loads((workspace / "build/oracle/compare/results.json").read_text())
    assert results["quants"][1]["scores"]["values"] == [1, 0] and results["base"]["scores"]["values"] == [0, 0]
    assert not (workspace / "build/oracle/compare/temporary").exists()
    after = files(workspace / "build/oracle/compare/measured")
    assert all(after[name] == before[name] for name in before)
    code, _, said = olpack(workspace, "compare", "oracle", "--set", "compare.tasks=[{prompt: a, contain: b}]")
    assert code == 1 and "did you mean 'contains'" in said
    code, _, said = olpack(workspace, "compare", "oracle", "--set", "compare.tasks=absent.jsonl")
    assert code == 1 and "absent.jsonl, which `compare.tasks` names" in said
    code, _, said = olpack(workspace, "compare", "oracle", "--set", "compare.other_text=absent.txt")
    assert code == 1 and "absent.txt, which `compare.other_text` names, cannot be read" in said


def test_a_disk_too_small_for_the_reference_is_warned_of_and_stops_nothing(workspace, monkeypatch):
    from olpack.errors import OlpackError

    monkeypatch.setattr("olpack.stages.plan.free_bytes", lambda path: 30_000_000)
    assert "more space than is free, for the unquantized fine-tune" not in olpack(workspace, "plan", "oracle")[2]
    monkeypatch.setattr("olpack.stages.plan.free_bytes", lambda path: 4_700_000)
    assert "more space than is free, for the unquantized fine-tune" in olpack(workspace, "plan", "oracle")[2]

    def full(*_, **__):
        raise OlpackError("The files need 16.0 GB.", "Make room.")

    monkeypatch.setattr("olpack.export.export", full)
    (workspace / "build/oracle/compare/measured/q8_0.divergence.json").unlink()
    (workspace / "build/oracle/stages/compare.json").unlink()
    code, printed, said = olpack(workspace, "compare", "oracle")
    assert code == 0 and "16.0 GB" in said and "compare.reference=false" in said and "Recommended" in printed
    monkeypatch.undo()
    code, printed, said = olpack(workspace, "compare", "oracle", "--json")
    assert code == 0 and json.loads(printed)["done"] == ["compare"] and "16.0 GB" not in said


def test_compare_with_a_server_that_lacks_the_package(workspace, ollama_double):
    code, _, said = olpack(workspace, "compare", "oracle", server=ollama_double.url)
    assert code == 1 and "olpack deploy oracle" in said


def test_a_new_quant_makes_only_what_is_missing(workspace):
    before = files(workspace / "build/oracle")
    code, printed, _ = olpack(workspace, "build", "oracle", "--set", "quants=[Q4_K_M, Q8_0, Q4_0]", "--set", "compare.reference=false", "--json")
    assert code == 0
    assert json.loads(printed)["done"] == ["export-Q4_0", "modelfiles", "compare"]
    after = files(workspace / "build/oracle")
    assert all(after[name] == before[name] for name in before if name.startswith(("adapter", "gguf")))


def test_a_file_that_was_lost_is_made_again(workspace):
    path = workspace / "build/oracle/gguf/oracle-Q8_0.gguf"
    whole = path.read_bytes()
    for damaged, reason in ((None, "is gone"), (whole[:4096], "was changed"), (whole.replace(b"GGUF", b"FUGG"), "was changed")):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        assert reason in export.STAGE.step(build_of(workspace), "export-Q8_0").reason
    code, printed, _ = olpack(workspace, "export", "oracle", "--json")
    assert code == 0
    assert json.loads(printed)["done"] == ["export-Q8_0"]
    assert path.read_bytes() == whole


def test_a_copy_with_new_times_reads_each_file_once(workspace, monkeypatch):
    read, plain = [], hashlib.file_digest

    def digest(file, kind):
        read.append(file.name)
        return plain(file, kind)

    for path in (workspace / "build/oracle").rglob("*"):
        path.touch()
    monkeypatch.setattr("olpack.workspace.hashlib.file_digest", digest)
    code, printed, _ = olpack(workspace, "build", "oracle", "--json")
    assert code == 0 and json.loads(printed)["done"] == []
    made = [name for name in read if name.endswith((".gguf", ".safetensors"))]
    assert len(made) == len(set(made)) == 3


def done(workspace: Path, *settings: str) -> list[str]:
    """What `olpack export` with these settings does."""
    code, printed, said = olpack(workspace, "export", "oracle", "--json", *(word for setting in settings for word in ("--set", setting)))
    assert code == 0, said
    return json.loads(printed)["done"]


def build_of(workspace: Path, *settings: str) -> Build:
    return Build(recipe.load(workspace / "modelfiles/oracle/recipe.yaml", list(settings)), out=workspace / "build")


def test_importance_concerns_only_what_gains_by_it(workspace):
    from gguf import GGUFReader

    root, before = workspace / "build/oracle", files(workspace / "build/oracle")
    assert not any(name.startswith("export.") for step in all_steps(build_of(workspace)) for name in step.inputs)
    assert done(workspace, "export.importance=train") == ["export-Q4_K_M"]
    after = files(root)
    assert after["gguf/oracle-Q8_0.gguf"] == before["gguf/oracle-Q8_0.gguf"]
    assert set(after) - set(before) == {"importance.gguf", "stages/importance.json"}
    fields = GGUFReader(root / "gguf/oracle-Q4_K_M.gguf").fields
    assert fields["quantize.imatrix.dataset"].contents() == "train.jsonl"
    record = json.loads((root / "stages/importance.json").read_text())["result"]
    assert record["rows"] == 12 and record["tokens"] > 12

    # The comparison writes the quant once more without the matrix, to say what that gave.
    code, printed, said = olpack(workspace, "compare", "oracle", "--set", "export.importance=train")
    assert code == 0 and "with the importance matrix" in printed, said
    with_it, other = json.loads((root / "compare/results.json").read_text())["quants"]
    assert with_it["divergence_without_importance"]["mean"] > 0 and other["divergence_without_importance"] is None
    assert not (root / "compare/temporary").exists() and "What the importance matrix gave" in (root / "compare/report.html").read_text()

    # It serves other quants too, and a lost one is collected again only when something needs it.
    more = build_of(workspace, "export.importance=train", "quants=[Q4_K_M, Q8_0, Q4_0]")
    assert [step.unit for step in all_steps(more) if step.stale and step.stage == "export"] == ["export-Q4_0"]
    assert calibration.awaiting_importance(more, all_steps(more)) == []
    (root / "importance.gguf").unlink()
    assert [step.unit for step in all_steps(more) if step.stale and step.stage == "export"] == ["export-Q4_0"]
    assert len(calibration.awaiting_importance(more, all_steps(more))) == 2


def test_rounding_concerns_quantized_types_only(workspace):
    def stale(*settings: str) -> list[str]:
        return [step.unit for step in all_steps(build_of(workspace, *settings)) if step.stale and step.stage == "export"]

    assert stale("export.rounding=ggml") == []
    assert stale("export.rounding=search") == ["export-Q4_K_M", "export-Q8_0"]
    inputs = {step.unit: step.inputs for step in all_steps(build_of(workspace, "export.rounding=search", "quants=[Q4_K_M, F16]"))}
    assert inputs["export-Q4_K_M"]["export.rounding"] == "search" and "export.rounding" not in inputs["export-F16"]
    keys = [calibration.SENSITIVITY.step(build_of(workspace, *more)).key for more in ([], ["export.rounding=ggml"], ["export.rounding=search"])]
    assert keys[0] == keys[1] != keys[2]
    code, printed, _ = olpack(workspace, "plan", "oracle", "--set", "export.rounding=search")
    assert code == 0 and "search: scales of blocks" in printed

    # The comparison writes the quant once more by ggml's rounding, and a comparison that is asked not to has another outcome.
    settings = ["export.rounding=search", "quants=[Q4_K_M]"]
    assert done(workspace, *settings) == ["export-Q4_K_M"]
    code, printed, said = olpack(workspace, "compare", "oracle", *(word for setting in settings for word in ("--set", setting)))
    assert code == 0 and "Q4_K_M, search against ggml's rounding: KL mean" in printed, said
    root = workspace / "build/oracle"
    (quant,) = json.loads((root / "compare/results.json").read_text())["quants"]
    assert quant["by_ggml"]["divergence"]["mean"] > 0 != quant["by_ggml"]["divergence_change"]["value"]
    assert not (root / "compare/temporary").exists()
    ggmls = export.STAGE.all_inputs(build_of(workspace, "quants=[Q4_K_M]"), "export-Q4_K_M")
    assert compare.by_ggml_keys(build_of(workspace, *settings)) == {"Q4_K_M": value_digest(ggmls)}
    by_rows = ["export.rounding=learned", "quants=[Q4_K_M, Q4_0, IQ3_M]"]
    builds = [build_of(workspace, *by_rows, *more) for more in ([], ["export.scale_steps=7"], ["export.scale_steps=0"])]
    assert all(compare.by_ggml_keys(build)["Q4_K_M"] == value_digest(ggmls) for build in builds)
    for quant, different in (("Q4_0", 3), ("Q4_K_M", 1), ("IQ3_M", 1)):  # of the others no block scales are trained
        assert len({export.STAGE.step(build, f"export-{quant}").key for build in builds}) == different
    for how, reason in (("rows", ""), ("tasks", "compare.ggml_rounding changed"), ("none", "compare.ggml_rounding changed")):
        step = next(step for step in all_steps(build_of(workspace, *settings, f"compare.ggml_rounding={how}")) if step.stage == "compare")
        assert step.reason == reason
    assert compare.by_ggml_keys(build_of(workspace, *settings, "compare.ggml_rounding=none")) == {}


def test_without_a_quant_to_collect_on_there_is_a_file_for_a_while(workspace):
    code, printed, _ = olpack(workspace, "plan", "oracle", "--json", "--set", "export.importance=train", "--set", "quants=[Q2_K]")
    estimate = json.loads(printed)["estimate"]
    q8 = (workspace / "build/oracle/gguf/oracle-Q8_0.gguf").stat().st_size
    assert code == 0 and set(estimate["disk_bytes"]) == {"Q2_K"} and abs(estimate["importance_bytes"] - q8) < 8192
    assert done(workspace, "export.importance=train", "quants=[Q2_K]") == ["export-Q2_K"]
    assert not (workspace / "build/oracle/importance-source.gguf").exists()


def test_a_matrix_of_ones_own_and_types_for_single_tensors(workspace):
    import numpy as np
    from gguf import GGUFReader

    from olpack.export.importance import ImportanceMatrix, write_importance
    from olpack.llamacpp.activations import InputSquares

    tensors = GGUFReader(workspace / "build/oracle/gguf/oracle-Q8_0.gguf").tensors
    squares = {tensor.name: InputSquares(np.ones((1, tensor.shape[0]), np.float32), np.array([3])) for tensor in tensors if "blk" in tensor.name}
    write_importance(ImportanceMatrix(squares, ["mine.txt"], 1, 512), workspace / "modelfiles/oracle/own.gguf")
    own = ("export.importance=own.gguf", "export.tensor_types={attn_v: q6_k, attn: q5_K}")
    assert done(workspace, *own) == ["export-Q4_K_M", "export-Q8_0"]
    for quant in ("Q4_K_M", "Q8_0"):
        written = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(workspace / f"build/oracle/gguf/oracle-{quant}.gguf").tensors}
        assert (written["blk.0.attn_v.weight"], written["blk.0.attn_q.weight"]) == ("Q6_K", "Q5_K")
    assert not any(step.stale for step in all_steps(build_of(workspace, *own)) if step.stage == "export")
    other_order = build_of(workspace, own[0], "export.tensor_types={attn: q5_K, attn_v: q6_k}")
    assert [step.reason for step in all_steps(other_order) if step.stage == "export"] == ["export.tensor_types changed"] * 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("export.importance=absent.gguf", "absent.gguf, which `export.importance` names"),
        ("export.importance=train.jsonl", "is no importance matrix in llama.cpp's GGUF form"),
        ("quants=[IQ2_XS]", "Set `export.importance: train` in the recipe"),
        ("export.tensor_types={attn_v: q6k}", "Did you mean q6_K?"),
        ("export.tensor_types={atn_v: q6_K}", "has no tensor named like 'atn_v'"),
    ],
)
def test_a_wrong_importance_or_type_is_refused_before_any_work(workspace, setting, said):
    before = files(workspace)
    code, _, told = olpack(workspace, "build", "oracle", "--set", setting)
    assert code == 1 and said in told
    assert files(workspace) == before


def test_a_matrix_that_cannot_be_collected_leaves_no_file_behind(workspace):
    (workspace / "build/oracle/importance.gguf").mkdir()
    code, _, said = olpack(workspace, "export", "oracle", "--set", "export.importance=train", "--set", "quants=[Q2_K]")
    assert code == 1 and "importance.gguf' is a folder" in said
    assert "importance-source.gguf" not in files(workspace / "build/oracle")


def test_plan_changes_nothing_and_names_origins(workspace):
    before = files(workspace)
    code, printed, _ = olpack(workspace, "plan", "oracle", "--set", "train.epochs=3", "--json")
    plan = json.loads(printed)
    assert code == 0
    assert files(workspace) == before
    assert plan["settings"]["train.epochs"] == {"value": 3, "from": "--set"}
    assert plan["settings"]["train.rank"]["from"] == "recipe.yaml:3"
    assert {step["step"]: step["stale"] for step in plan["steps"]}["train"] == "train.epochs changed"
    assert plan["estimate"]["steps"] == 9
    # two bytes a weight, and what 4 rows and 6 texts of other things leave of logits over a vocabulary of 512
    assert 0 < plan["estimate"]["temporary_bytes"] - 2 * plan["estimate"]["parameters"] < 4 * 512 * (128 * 4 + 512 * 6)
    made = {quant: (workspace / f"build/oracle/gguf/oracle-{quant}.gguf").stat().st_size for quant in ("Q4_K_M", "Q8_0")}
    assert all(abs(plan["estimate"]["disk_bytes"][quant] - size) < 8192 for quant, size in made.items())
    assert olpack(workspace, "plan", "oracle")[0] == 0


def test_a_stage_by_itself_needs_those_before_it(workspace):
    code, _, said = olpack(workspace, "export", "oracle", "--set", "train.epochs=3")
    assert code == 1
    assert "olpack train oracle" in said


def test_run_answers_from_the_build_folder(workspace):
    code, printed, _ = olpack(workspace, "run", "oracle:q8_0", "What is 3 + 1?")
    assert code == 0
    assert printed == "forty-two\n"
    code, _, said = olpack(workspace, "run", "oracle:q6_K", "What is 3 + 1?")
    assert code == 1 and "not built" in said and "oracle:q8_0" in said


def test_a_quant_is_recommended_by_what_was_measured(workspace):
    code, printed, said = olpack(workspace, "recommend", "oracle", "--json")
    assert code == 0, said
    advice, measured = json.loads(printed), json.loads((workspace / "build/oracle/compare/results.json").read_text())
    found = {row["quant"]: row for row in advice["quants"]}
    assert advice["setting"]["context"] == 128 and set(found) == {quant["quant"] for quant in measured["quants"]}
    for quant in measured["quants"]:
        row = found[quant["quant"]]
        assert row["loss_measured"] and row["loss"] == quant["loss"]["relative"]
        assert row["generation_tokens_per_s"] == quant["speed"]["generation_tokens_per_s"]["median"]
        assert row["weights_bytes"] < quant["size_bytes"]
    assert "tokens/s measured here" in advice["fastest"]["reason"]


def test_list_tells_what_is_built(workspace):
    code, printed, _ = olpack(workspace, "list", "--json")
    rows = {row["name"]: row for row in json.loads(printed)}
    assert code == 0
    assert set(rows["oracle"]["quants"]) == {"Q4_K_M", "Q8_0"}
    assert rows["oracle"]["trained"] and not rows["oracle"]["shipped"]
    assert rows["coding-assistant"]["shipped"]


def test_a_server_gets_every_quant_and_latest(workspace, ollama_double):
    code, printed, said = olpack(workspace, "build", "oracle", server=ollama_double.url)
    assert code == 0, said
    assert "prompt identical" in said
    assert "ollama run oracle:" in printed
    code, printed, _ = olpack(workspace, "list", "--json", server=ollama_double.url)
    registered = {tag.lower() for row in json.loads(printed) for tag in row["registered"]}
    assert registered == {"oracle:q4_k_m", "oracle:q8_0", "oracle:latest"}
    code, printed, said = olpack(workspace, "build", "oracle", server=ollama_double.url)
    assert code == 0 and "up to date" in said

    # What the server lost is registered again.
    OllamaClient(ollama_double.url).delete("oracle:q8_0")
    code, printed, _ = olpack(workspace, "build", "oracle", "--json", server=ollama_double.url)
    assert code == 0
    assert json.loads(printed)["done"] == ["deploy"]


def test_figures_taken_through_a_server_hold_while_it_is_down(workspace, ollama_double):
    code, _, said = olpack(workspace, "build", "oracle", server=ollama_double.url)
    assert code == 0, said
    results = (workspace / "build/oracle/compare/results.json").read_bytes()
    assert "Ollama" in json.loads(results)["quants"][0]["speed"]["engine"]
    code, printed, said = olpack(workspace, "build", "oracle", "--json")  # the server is down now
    assert code == 0 and json.loads(printed)["done"] == [], said
    assert (workspace / "build/oracle/compare/results.json").read_bytes() == results
    # A record of an earlier version has the server's address among the inputs, and holds as well.
    path = workspace / "build/oracle/stages/compare.json"
    record = json.loads(path.read_text())
    del record["result"]["served"], record["digest"]
    path.write_text(json.dumps(record | {"inputs": record["inputs"] | {"server": "http://somewhere:11434"}}))
    assert json.loads(olpack(workspace, "build", "oracle", "--json")[1])["done"] == []
    # One quant of a package that is deployed whole can be compared by itself.
    code, printed, said = olpack(workspace, "compare", "oracle", "--quant", "Q8_0", "--json", server=ollama_double.url)
    assert code == 0 and json.loads(printed)["done"] == ["compare"], said


def test_a_comparison_that_was_begun_is_called_so(workspace):
    path = workspace / "build/oracle/stages/compare.json"
    path.write_text(json.dumps({"inputs": {}, "outputs": {}, "result": {"recommended": "q8_0"}}))
    assert compare.STAGE.step(build_of(workspace)).reason == "begun and not finished"


def test_a_context_without_room_is_refused_before_any_work(workspace):
    code, _, said = olpack(workspace, "plan", "oracle", "--set", "modelfile.parameters.num_ctx=32", "--set", "compare.generated_tokens=32")
    assert code == 1 and "num_ctx 32 leaves no space for a prompt beside the 32 tokens" in " ".join(said.split())


def test_what_needs_no_weights_fetches_none(workspace, monkeypatch):
    from olpack.commands.recommend import advise
    from olpack.deploy import bases

    asked, resolve = [], bases.resolve_base
    monkeypatch.setattr(bases, "resolve_base", lambda label, **options: asked.append(options["weights"]) or resolve(label, **options))
    monkeypatch.chdir(workspace)
    advise(["oracle"], None, 8.0, 16.0, None, "f16", None, None, None)
    assert asked == [False]


def test_what_is_done_with_a_finished_build(workspace, ollama_double, monkeypatch):
    code, printed, _ = olpack(workspace, "show", "oracle", "--json")
    assert code == 0 and set(json.loads(printed)["files"]) == {"Q4_K_M", "Q8_0"}
    assert "eval loss" in olpack(workspace, "show", "oracle")[1]
    code, printed, said = olpack(workspace, "bundle", "oracle")
    assert code == 0 and Path(workspace, printed.strip()).stat().st_size > 1e6, said
    code, printed, said = olpack(workspace, "deploy", "oracle", "--store", "models")
    assert code == 0 and len(printed.splitlines()) == 3, said
    assert (workspace / "models/manifests").is_dir()
    code, _, said = olpack(workspace, "deploy", "oracle")
    assert code == 1 and "ollama.com/download" in said
    assert olpack(workspace, "deploy", "oracle", server=ollama_double.url)[0] == 0
    code, printed, _ = olpack(workspace, "deploy", "oracle", "--check", server=ollama_double.url)
    assert code == 0 and printed.count("prompt identical") == 2
    code, _, said = olpack(workspace, "deploy", "oracle", "--check", "--set", "modelfile.system=Be brief.", server=ollama_double.url)
    assert code == 1 and "system is 'Answer in words.' and not 'Be brief.'" in said
    code, printed, said = olpack(workspace, "remove", "oracle", "--yes", server=ollama_double.url)
    assert code == 0 and set(printed.split()) == {"oracle:q4_K_M", "oracle:q8_0"}, said
    assert olpack(workspace, "remove", "oracle", "--yes", server=ollama_double.url)[0] == 0
    assert olpack(workspace, "push", "oracle")[0] == 2


def test_two_builds_at_once(workspace):
    from olpack.workspace import locked

    with locked(workspace / "build/oracle"):
        code, _, said = olpack(workspace, "build", "oracle")
    assert code == 1 and "Another olpack is working" in said


def bad(name: str, text: str | bytes, said: str):
    return pytest.param(name, text, said, id=said)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        bad("recipe.yaml", RECIPE + "quant: Q8_0\n", "unknown key 'quant'"),
        bad("recipe.yaml", RECIPE.replace("epochs: 12", "epochs: two"), "train.epochs"),
        bad("recipe.yaml", RECIPE.replace("Q8_0]", "Q9_0]"), "Q9_0"),
        bad("recipe.yaml", RECIPE.replace("train.jsonl", "absent.jsonl"), "absent.jsonl"),
        bad("recipe.yaml", RECIPE.replace("{base}", "modelfiles"), "no config.json"),
        bad("recipe.yaml", RECIPE.replace("{base}", "./absent"), "There is no folder ./absent"),
        bad("recipe.yaml", RECIPE.replace("{base}", "builtin/huge"), "builtin/tiny-coder"),
        bad("recipe.yaml", RECIPE.replace("num_ctx: 128", "num_ctx: 128, temprature: 1"), "temperature"),
        bad("train.jsonl", '{"messages": [}\n', "train.jsonl, line 1: not JSON"),
        bad("train.jsonl", "", "is empty"),
        bad("eval.jsonl", b"\xff\n", "not UTF-8"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_touched(workspace, base, name, text, said):
    path = workspace / "modelfiles/oracle" / name
    if isinstance(text, str):
        text = text.replace("{base}", str(base)).replace("{{", "{").replace("}}", "}").encode()
    path.write_bytes(text)
    before = files(workspace)
    code, printed, told = olpack(workspace, "build", "oracle")
    assert code == 1
    assert said in told
    assert "Traceback" not in told and printed == ""
    assert files(workspace) == before


def test_a_row_of_the_training_data_in_eval_is_refused(workspace):
    write_rows(workspace / "modelfiles/oracle/eval.jsonl", 4, first=3)
    code, _, said = olpack(workspace, "build", "oracle")
    assert code == 1 and "eval.jsonl:1 is also in the training data (train.jsonl:4)" in said


def test_no_space_is_told_before_any_work(workspace, monkeypatch):
    before = files(workspace)
    monkeypatch.setattr("olpack.stages.plan.free_bytes", lambda path: 1000)
    code, _, said = olpack(workspace, "build", "oracle", "--set", "train.epochs=1")
    assert code == 1 and "are free" in said
    assert files(workspace) == before


def test_a_name_that_ollama_would_refuse(workspace):
    shutil.copytree(workspace / "modelfiles/oracle", workspace / "modelfiles/my oracle")
    code, _, said = olpack(workspace, "build", "my oracle")
    assert code == 1 and "legal name" in said


def test_bad_input_leaves_no_build_folder(tmp_path, base):
    root = make_workspace(tmp_path, base)
    (root / "modelfiles/oracle/train.jsonl").write_text("{")
    before = files(root)
    assert olpack(root, "build", "oracle")[0] == 1
    assert files(root) == before and not (root / "build").exists()


def test_an_unknown_package_and_wrong_words(tmp_path):
    code, _, said = olpack(tmp_path, "build", "nobody")
    assert code == 1 and "coding-assistant" in said
    assert olpack(tmp_path, "build", "coding-assistant", "--only", "bake")[0] == 2
    assert olpack(tmp_path, "bild")[0] == 2


def test_help_loads_nothing_heavy():
    script = (
        "import sys; sys.argv = ['olpack', '--help']; from olpack.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'httpx', 'pydantic', 'llama_cpp', 'numpy'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.stdout.endswith("[]\n"), child.stdout


def test_the_users_own_package_and_template_win(workspace):
    shutil.copytree(workspace / "modelfiles/oracle", workspace / "modelfiles/coding-assistant")
    (workspace / "templates").mkdir()
    (workspace / "templates/Modelfile.j2").write_text(
        "FROM {{ gguf }}\nSYSTEM {{ system | quoted }}\n{% for name, value in parameters %}PARAMETER {{ name }} {{ value }}\n{% endfor %}# mine\n"
    )
    with contextlib.chdir(workspace):
        from olpack.workspace import recipe_path

        assert recipe_path("coding-assistant") == Path("modelfiles/coding-assistant/recipe.yaml")
        build = Build(recipe.load(recipe_path("oracle")))
        assert modelfiles.STAGE.step(build).reason == "templates/Modelfile.j2 changed"
    assert olpack(workspace, "build", "oracle", "--only", "modelfiles")[0] == 0
    assert (workspace / "build/oracle/modelfiles/q8_0.Modelfile").read_text().endswith("# mine\n")


def test_a_template_that_drops_the_system_prompt_is_refused(workspace):
    (workspace / "templates").mkdir()
    (workspace / "templates/Modelfile.j2").write_text("FROM {{ gguf }}\n")
    code, _, said = olpack(workspace, "build", "oracle", "--only", "modelfiles")
    assert code == 1 and "system" in said and "templates/Modelfile.j2" in said


def test_errors_have_a_place_for_the_remedy():
    error = OlpackError("It broke.", "Mend it.")
    assert (error.problem, error.remedy, str(error)) == ("It broke.", "Mend it.", "It broke. Mend it.")
