"""What a server or a model does wrong costs one figure, not the comparison: loops, deleted and foreign models, reasoning that does not end."""

from __future__ import annotations

import dataclasses
import json

import pytest
from ollama_double import LOOP, Answer
from oracle import olpack

from olpack.compare.recommend import recommend, set_losses
from olpack.compare.result_flags import ExpectedScripts, answer_of, flag_answers, flag_same_types
from olpack.compare.results import Perplexity, PromptSpeed, QuantResult, Speed, Spread, read_results
from olpack.compare.scores import load_function, score_answers
from olpack.compare.served_models import compare_served, settings_for
from olpack.compare.settings import MeasureSettings
from olpack.deploy.answers import Chatted
from olpack.deploy.client import OllamaClient
from olpack.errors import OlpackError
from olpack.recipe.tasks import load_tasks, parse_task

SETTINGS = MeasureSettings(prompt_lengths=(48,), generated_tokens=40, repeats=2, context=512, threads=1, answer_tokens=48)
PROMPTS = [[{"role": "user", "content": "Write add."}]]


def test_another_prompt_is_drawn_where_a_model_repeats_itself(client, ollama_double):
    usual, asked = ollama_double.answer, []

    def answer(prompt: str):
        asked.append(prompt)
        return LOOP if len(asked) % 3 == 0 else usual(prompt)

    ollama_double.answer = answer
    (quant,) = compare_served(client, ["mine:q8_0"], [], SETTINGS).quants
    assert quant.flags == [] and len(quant.speed.generation_tokens_per_s.values) == 2 and len(quant.speed.prompt[0].tokens_per_s.values) == 2


def test_a_model_that_only_repeats_itself_loses_one_figure(client, ollama_double):
    ollama_double.answer = lambda prompt: LOOP
    (quant,) = compare_served(client, ["mine:q8_0"], PROMPTS, SETTINGS).quants
    assert quant.speed.generation_tokens_per_s is None and len(quant.speed.prompt[0].tokens_per_s.values) == 2
    (answer,) = quant.answers
    assert answer.flags == ["looping"] and answer.finish == "length"
    assert {flag.code for flag in quant.flags} == {"failed", "looping"}
    assert "repeats one token" in next(flag.text for flag in quant.flags if flag.code == "failed")


def test_a_model_deleted_while_it_is_loaded_counts_as_unloaded(client, ollama_double):
    client.generate("mine:q8_0", "hi")
    assert client.unload("theirs:latest")
    client.delete("mine:q8_0")
    assert not client.unload("mine:q8_0")
    with pytest.raises(OlpackError, match="refused"):
        client.generate("mine:q8_0", "hi")


def test_a_measured_model_that_is_deleted_midway_costs_its_own_figures(client, ollama_double):
    """The server answers 404 to unloading it, and keeps it loaded: nobody waits for that, and the other model's figures are whole."""
    usual, asked = ollama_double.answer, []

    def answer(prompt: str):
        asked.append(prompt)
        if len(asked) == 13:  # in the first visit to the second model
            ollama_double.store.delete("theirs:latest")
        return usual(prompt)

    ollama_double.answer = answer
    mine, theirs = compare_served(client, ["mine:q8_0", "theirs:latest"], [], SETTINGS).quants
    assert [flag.code for flag in mine.flags] == ["shared"] and len(mine.speed.generation_tokens_per_s.values) == 2
    assert "failed" in [flag.code for flag in theirs.flags] and not any("still holds" in flag.text for flag in theirs.flags)


def test_models_of_others_stay_loaded(client, ollama_double, capsys):
    client.generate("theirs:latest", "hi")
    compare_served(client, ["mine:q8_0"], [], SETTINGS)
    assert list(ollama_double.loaded) == ["theirs:latest"]
    assert capsys.readouterr().err.count("The server also runs theirs:latest, which stays loaded") == 1


def test_the_results_name_models_of_others(client, ollama_double):
    client.generate("theirs:latest", "hi")
    (quant,) = compare_served(client, ["mine:q8_0"], [], SETTINGS).quants
    assert quant.speed.others == ["theirs:latest"]
    assert [(flag.code, flag.serious, flag.text) for flag in quant.flags] == [
        ("shared", False, "while its speed was measured, the server also had theirs:latest loaded")
    ]
    assert compare_served(client, ["mine:q8_0", "theirs:latest"], [], SETTINGS).quants[0].flags == []


def test_a_model_with_a_short_context_is_measured_with_fewer_tokens(client):
    client.create({"model": "brief:latest", "from": "mine:q8_0", "parameters": {"num_ctx": 64}})
    settings = settings_for(client, ["mine:q8_0", "brief:latest"], MeasureSettings())
    assert (settings.context, settings.generated_tokens) == (64, 32)


def test_an_incomplete_round_is_tried_again(client, ollama_double, tmp_path):
    ollama_double.answer, usual = (lambda prompt: LOOP), ollama_double.answer
    compare_served(client, ["mine:q8_0"], [], SETTINGS, cache=tmp_path / "cache")
    ollama_double.answer = usual
    (quant,) = compare_served(client, ["mine:q8_0"], [], SETTINGS, cache=tmp_path / "cache").quants
    assert quant.speed.generation_tokens_per_s is not None and quant.flags == []


def test_kept_figures_hold_under_another_address_of_the_server(client, ollama_double, tmp_path):
    compare_served(client, ["mine:q8_0"], PROMPTS, SETTINGS, cache=tmp_path / "cache")
    ollama_double.requests.clear()
    compare_served(OllamaClient(ollama_double.url.replace("127.0.0.1", "localhost")), ["mine:q8_0"], PROMPTS, SETTINGS, cache=tmp_path / "cache")
    assert ollama_double.count("POST", "/api/generate") == ollama_double.count("POST", "/api/chat") == 0


def test_a_context_without_room_for_a_prompt_is_refused():
    with pytest.raises(OlpackError, match=r"num_ctx 64 leaves no space for a prompt beside the 64 tokens") as error:
        dataclasses.replace(SETTINGS, context=64, generated_tokens=64)
    assert "Set num_ctx to 80 or more" in error.value.remedy


# Reasoning


@pytest.mark.parametrize(
    ("text", "prompt", "finish", "expected"),
    [
        ("<think>\n2 and 2\n</think>\n\n4", "", "stop", ("4", "\n2 and 2\n", [])),
        ("2 and 2\n</think>\n\n4", "…assistant\n<think>\n", "stop", ("4", "2 and 2\n", [])),
        ("2 and 2 and", "…assistant\n<think>\n", "length", ("", "2 and 2 and", ["reasoning"])),
        ("<think>so", "", "length", ("", "so", ["reasoning"])),
        ("[THINK]a[/THINK]b", "", "stop", ("b", "a", [])),
        ("4", "", "stop", ("4", "", [])),
        ("  4", "", "stop", ("  4", "", [])),
        ("", "", "stop", ("", "", ["empty"])),
        ("<think>never mind</think>", "", "stop", ("", "never mind", ["empty"])),
    ],
)
def test_reasoning_is_set_apart(text, prompt, finish, expected):
    answer = answer_of(text, finish, 3, prompt=prompt)
    assert (answer.text, answer.reasoning, answer.flags) == expected


def test_a_task_is_scored_on_what_follows_the_reasoning():
    tasks = [parse_task({"prompt": "2+2?", "exact": "4"}), parse_task({"prompt": "3+3?", "exact": "6"}), parse_task({"prompt": "5?", "exact": "5"})]
    scores = score_answers(tasks, ["4", None, "6"], "mine")
    assert (scores.values, scores.count, scores.mean) == ([1.0, None, 0.0], 2, 0.5)
    assert score_answers(tasks, [None] * 3, "mine") is None


def test_unfinished_reasoning_is_flagged_and_not_scored(client, ollama_double, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "2+2?", "contains": "4"}) + "\n")
    ollama_double.answer = lambda prompt: Answer(["<think>", *(["", "4", "is", "what", "two", "and", "two", "might", "well", "be"]) * 8])
    (quant,) = compare_served(client, ["mine:q8_0"], [], dataclasses.replace(SETTINGS, answer_tokens=8), load_tasks(tmp_path / "t.jsonl")).quants
    assert quant.scores is None
    assert any(flag.code == "reasoning" and "1 of 1 tasks are not scored" in flag.text for flag in quant.flags)


def test_a_task_with_tools_is_scored_on_the_calls_that_the_server_sets_apart(client, monkeypatch, tmp_path):
    tools = [{"type": "function", "function": {"name": "dim", "parameters": {"type": "object", "properties": {}}}}]
    call = {"name": "dim", "arguments": {"room": "hall"}}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": "Dim it.", "tool_call": call, **more}) + "\n" for more in ({"tools": tools}, {})))
    asked = []

    def chat(self, model, messages, options=None, **fields):
        asked.append(fields)
        message = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]} if fields else {"role": "assistant", "content": "Done."}
        return Chatted.model_validate_json(json.dumps({"message": message, "done": True, "done_reason": "stop", "eval_count": 3}))

    monkeypatch.setattr(OllamaClient, "chat", chat)
    results = compare_served(client, ["mine:q8_0"], [], SETTINGS, load_tasks(tmp_path / "t.jsonl"))
    assert asked == [{"tools": tools}, {}] and [task.tools for task in results.tasks] == [tools, None]
    assert results.quants[0].scores.values == [1.0, 0.0]


def test_a_server_may_set_the_reasoning_apart_itself():
    assert answer_of("", "length", 8, reasoning="hm").flags == ["reasoning"]
    assert answer_of("4", "stop", 8, reasoning="hm").text == "4"


# What a recommendation rests on


def quant(name: str, size: int, nll: float | None) -> QuantResult:
    score = None if nll is None else Perplexity(value=2.0, standard_error=0.1, row_nll=[nll, nll], same_tokens_rows=2)
    return QuantResult(quant=name, tag=name.lower(), file=f"{name}.gguf", sha256="0", size_bytes=size, perplexity=score)


def test_the_reason_names_what_was_not_measured():
    from olpack.compare.results import MachineInfo, Results

    quants = [quant("Q4_0", 1, None), quant("Q4_K_M", 2, 10.0), quant("Q8_0", 3, 10.0)]
    set_losses(quants, [10, 10])
    machine = MachineInfo(cpu="", cores=1, memory_bytes=1, system="", busy=0, versions={})
    advice = recommend(advice_on := Results(name="x", created="", machine=machine, settings={}, quants=quants))
    assert advice.quant == "Q4_K_M"
    assert "Not compared, because the perplexity is missing: Q4_0." in advice.reason
    assert "rests on size and perplexity: the speed of Q4_0, Q4_K_M, Q8_0 was not measured" in advice.reason
    runs = Spread.of([1.0])
    for one in quants:
        one.speed = Speed(engine="", context=1, prompt=[PromptSpeed(prompt_tokens=1, tokens_per_s=runs)], generation_tokens_per_s=runs)
    quants[1].speed.generation_tokens_per_s = None
    assert "the speed of Q4_K_M was not measured, or not all of it" in recommend(advice_on).reason


def test_a_file_without_its_speed_can_be_recommended(tmp_path, ollama_double):
    from olpack.compare.cache import Cache, Units
    from olpack.compare.measure import add_figures

    units, result = Units(Cache(None), "q", {}), QuantResult(quant="Q4_0", tag="q4_0", file="f", sha256="0", size_bytes=1)
    units.known["perplexity"] = quant("Q4_0", 1, 1.0).perplexity.model_dump()
    add_figures(result, units, None, [OlpackError("no answer")])
    assert [flag.serious for flag in result.flags] == [False]
    del units.known["perplexity"]
    add_figures(result, units, None, [OlpackError("no answer")])
    assert result.flags[0].serious


def test_two_quants_of_the_same_types_are_named():
    quants = [quant("Q4_0", 1, 1.0), quant("Q4_K_M", 2, 1.0), quant("Q8_0", 3, 1.0)]
    flag_same_types(quants, {"Q4_0": {"attn_q": {"q8_0": 2}}, "Q4_K_M": {"attn_q": {"q8_0": 2}}, "Q8_0": {}})
    assert [[flag.text for flag in one.flags] for one in quants] == [[], ["its tensors have the same types as those of Q4_0"], []]
    flag_answers(quants[0], [], ExpectedScripts(()))


# Files of the user


def test_lines_end_at_line_breaks_alone(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two\x0cthree\u0085four", "exact": "x"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (task,) = load_tasks(path)
    assert task.messages[-1]["content"] == "one\u2028two\x0cthree\u0085four"
    from olpack.commands.compare_models import _read

    (tmp_path / "prompts.txt").write_text("one\u2028two\nthree\x0cfour\r\n", encoding="utf-8")
    assert [turns[-1]["content"] for turns in _read(tmp_path / "prompts.txt")[0]] == ["one\u2028two", "three\x0cfour"]


def test_a_check_module_may_define_dataclasses_and_runs_once(tmp_path):
    log = tmp_path / "ran.txt"
    code = f"""from __future__ import annotations
from dataclasses import dataclass
open({str(log)!r}, "a").write("x")

@dataclass
class Found:
    value: float

def check(answer):
    return Found(1.0 if "4" in answer else 0.0).value
"""
    (tmp_path / "checks.py").write_text(code)
    task = parse_task({"prompt": "2+2?", "function": "checks.py:check"}, "task 1", tmp_path)
    assert score_answers([task] * 3, ["4", "5", "4"], "mine").values == [1.0, 0.0, 1.0]
    assert log.read_text() == "x"
    (tmp_path / "checks.py").write_text(code.replace("1.0 if", "0.5 if"))
    assert load_function(task)("4") == 0.5  # a changed file is read again


def test_changes_are_in_the_json_too(client, ollama_double, tmp_path):
    words = ["compare", "mine:q8_0", "--prompt", "Write h.", "--out", "side"]
    assert olpack(tmp_path, *words, server=ollama_double.url)[0] == 0
    earlier = tmp_path / "old.json"
    earlier.write_bytes((tmp_path / "side/results.json").read_bytes())
    code, printed, said = olpack(tmp_path, *words, "--against", "old.json", "--json", server=ollama_double.url)
    assert code == 0, said
    found = json.loads(printed)
    assert found["against"] == read_results(earlier).created and {change["verdict"] for change in found["changes"]} <= {"better", "worse", "same"}
    assert found["changes"] and found["quants"]
