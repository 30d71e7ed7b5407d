"""Names and parameters: what the server would refuse, or take and fail on later."""

from __future__ import annotations

import pytest

from olpack.deploy import PARAMETERS, check_name, check_parameters, context_warnings, same
from olpack.errors import OlpackError


@pytest.mark.parametrize(
    "name",
    [
        "coder",
        "coder:q4_K_M",
        "me/coder",
        "example.com/me/coder:v1.2",
        "host:8080/ns/model:tag",
        "_x",
        "0a",
        "a" * 80,
        "h" * 350 + "/n/m",
        "Coder.v2-x_y",
    ],
)
def test_legal_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("name", "rule", "suggestion"),
    [
        ("bad name", "its model has ' '", "bad-name"),
        ("", "its model is empty", "my-assistant"),
        ("coder:", "its tag is empty", "coder"),
        ("-coder", "begins with '-'", "coder"),
        (".coder", "begins with '.'", "coder"),
        ("coder:.x", "its tag begins with '.'", "coder:x"),
        ("a.b/coder", "its namespace has '.'", "a-b/coder"),
        ("a/b/c/coder", "its host has '/'", "b/c/coder"),
        ("a//coder", "its namespace is empty", "a/coder"),
        ("مساعد", "begins with 'م'", "my-assistant"),
        ("kodierhilfe-für-alle", "has 'ü'", "kodierhilfe-fur-alle"),
        ("a" * 81, "81 characters, 80 are allowed", "a" * 80),
        ("coder:q4 K", "its tag has ' '", "coder:q4-K"),
    ],
)
def test_illegal_names(name: str, rule: str, suggestion: str) -> None:
    with pytest.raises(OlpackError) as caught:
        check_name(name)
    assert rule in caught.value.problem
    assert repr(suggestion) in caught.value.remedy
    check_name(suggestion)


def test_a_package_has_no_tag() -> None:
    check_name("me/coder", tagged=False)
    with pytest.raises(OlpackError, match="'coder'"):
        check_name("coder:q4_0", tagged=False)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("coder:q4_K_M", "Coder:Q4_k_m", True),
        ("coder", "coder:latest", True),
        ("coder", "registry.ollama.ai/library/coder:LATEST", True),
        ("coder:q4_0", "coder:q8_0", False),
        ("me/coder", "coder", False),
        ("localhost:5000/me/coder", "localhost:5000/me/coder:latest", True),
    ],
)
def test_same(a: str, b: str, equal: bool) -> None:
    assert same(a, b) is equal


def test_every_parameter_of_the_server_is_known() -> None:
    facts = {
        "int": "num_ctx num_batch num_gpu num_thread main_gpu draft_num_predict num_keep seed num_predict top_k repeat_last_n",
        "float": "temperature top_p min_p typical_p repeat_penalty presence_penalty frequency_penalty",
        "bool": "use_mmap",
        "texts": "stop",
    }
    assert {name: known.kind for name, known in PARAMETERS.items()} == {name: kind for kind, names in facts.items() for name in names.split()}


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0, "num_ctx": 4096},
        {"temperature": 0.2, "stop": ["<|im_end|>"]},
        {"seed": -1, "num_predict": -1},
        {"use_mmap": False, "stop": []},
    ],
)
def test_good_parameters(parameters: dict) -> None:
    assert check_parameters(parameters) == []


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"temprature": 0.2}, "Did you mean 'temperature'"),
        ({"mirostat": 1}, "has no parameter 'mirostat'"),
        ({"num_ctx": 2048.0}, "'num_ctx' must be a whole number"),
        ({"num_ctx": "2048"}, "must be a whole number, and is '2048'"),
        ({"num_ctx": True}, "must be a whole number"),
        ({"num_ctx": 0}, "between 16 and"),
        ({"temperature": "hot"}, "must be a number"),
        ({"temperature": float("nan")}, "must be a number"),
        ({"temperature": -0.1}, "between 0 and 5"),
        ({"top_p": 1.5}, "between 0 and 1"),
        ({"use_mmap": 1}, "must be true or false"),
        ({"stop": "<|im_end|>"}, "must be a list of texts, as in ['<|im_end|>']"),
        ({"stop": ["x", ""]}, "has an empty text"),
    ],
)
def test_bad_parameters(parameters: dict, said: str) -> None:
    [problem] = check_parameters(parameters)
    assert said in problem


def test_a_context_longer_than_what_was_trained_is_warned_of() -> None:
    assert context_warnings(2048, trained=2048, longest=4096) == []
    assert [text.split(":")[0] for text in context_warnings(8192, trained=2048, longest=4096)] == [
        "num_ctx 8192 is more than the 4096 tokens that the base model was made for",
        "num_ctx 8192 is more than the 2048 tokens of the longest trained row",
    ]
