"""The embedded engine against transformers in float32, on the same random weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tiny_gguf
import torch

from olpack.errors import OlpackError
from olpack.llamacpp.chat_template import render_chat
from olpack.llamacpp.cores import _container_limit
from olpack.llamacpp.engine import Engine, Sampling, _chunks, _until_stop
from olpack.llamacpp.side_by_side import side_by_side

TEXT = "<|im_start|>user\nWrite a naïve café 日本語 🙂<|im_end|>\n<|im_start|>assistant\ndef add(a, b):\n    return a + b\n"
CHAT = [{"role": "user", "content": "Write a naïve café 日本語 🙂"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_gguf.tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_gguf.model(tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory, model, tokenizer):
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer)


@pytest.fixture
def engine(gguf_path):
    with Engine(gguf_path, context=900, threads=2) as opened:
        yield opened


def logprobs_of(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return np.array([scores[at - 1, ids[at]].item() for at in range(1, len(ids))])


def test_tokens_are_those_of_the_tokenizer(engine, tokenizer):
    assert engine.tokenize(TEXT) == tokenizer.encode(TEXT).ids
    assert engine.tokenize("") == []
    assert b"".join(engine.token_bytes(token) for token in tokenizer.encode("naïve 日本語 🙂").ids).decode() == "naïve 日本語 🙂"


def test_logprobs_agree_with_transformers_in_float32(engine, model, tokenizer):
    ids = (tokenizer.encode(TEXT).ids * 20)[:800]  # more than one batch
    wanted = [at % 3 != 1 for at in range(len(ids))]
    expected = logprobs_of(model, ids)[[at - 1 for at in range(1, len(ids)) if wanted[at]]]
    found = engine.logprobs(ids, wanted)
    assert found.dtype == np.float64 and found.shape == expected.shape
    # llama.cpp keeps keys and values in 16 bits
    assert np.abs(found - expected).max() < 2e-3
    assert abs(found.mean() - expected.mean()) < 1e-4


@pytest.mark.parametrize("outputs", [1, 7])
def test_logprobs_do_not_depend_on_how_many_logits_a_call_returns(gguf_path, engine, tokenizer, outputs):
    ids = tokenizer.encode(TEXT).ids
    wanted = [at > 10 for at in range(len(ids))]
    with Engine(gguf_path, context=900, threads=2, max_outputs=outputs) as few:
        assert np.abs(few.logprobs(ids, wanted) - engine.logprobs(ids, wanted)).max() < 2e-3


def test_nothing_wanted_gives_nothing(engine):
    assert engine.logprobs([5, 6, 7], [True, False, False]).shape == (0,)


def test_greedy_generation_takes_the_likeliest_token(engine, model):
    ids = engine.tokenize(engine.chat_prompt(CHAT))
    generation = engine.generate(CHAT, max_tokens=12, sampling=Sampling(temperature=0))
    text = "".join(generation)
    expected = list(ids)
    with torch.no_grad():
        for _ in range(generation.tokens):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert text == b"".join(engine.token_bytes(token) for token in expected[len(ids) :]).decode(errors="replace")
    assert generation.finish == "length" and generation.tokens == 12


def test_a_template_of_the_server_writes_the_prompt(engine):
    """A package on a model of the server is trained with the prompts that are served, whatever the file's own template writes."""
    with Engine(engine.path, 256, template="{% for m in messages %}[{{ m.content }}]{% endfor %}") as other:
        assert other.chat_prompt(CHAT) == "".join(f"[{turn['content']}]" for turn in CHAT) != engine.chat_prompt(CHAT)


def test_a_seed_repeats_an_answer(engine):
    def answer(seed: int) -> str:
        return "".join(engine.generate(CHAT, 20, Sampling(temperature=1.5, top_k=0, top_p=1, repeat_penalty=1.1, seed=seed)))

    assert answer(7) == answer(7) != answer(8)


def test_generation_ends_at_the_end_of_turn_token(tokenizer, tmp_path):
    made = tiny_gguf.parrot(tokenizer.get_vocab_size(), tokenizer.token_to_id("<|im_end|>"))
    with Engine(tiny_gguf.write(tmp_path / "silent.gguf", made, tokenizer), context=64, threads=1) as silent:
        generation = silent.generate(CHAT, sampling=Sampling(temperature=0))
        assert ("".join(generation), generation.finish, generation.tokens) == ("", "stop", 0)


def test_generation_ends_when_the_context_is_full(tokenizer, tmp_path):
    made = tiny_gguf.parrot(tokenizer.get_vocab_size(), tokenizer.encode("x").ids[0])
    with Engine(tiny_gguf.write(tmp_path / "endless.gguf", made, tokenizer), context=256, threads=1) as endless:
        generation = endless.generate([5] * 200, -1)
        assert ("".join(generation), generation.finish, generation.tokens) == ("x" * 56, "length", 56)


def test_stop_texts_end_an_answer_wherever_pieces_are_cut():
    class Ended:
        finish = "length"

    for pieces in (["def f():\n", "ret", "urn 1\n``", "`\nmore"], ["def f():\nreturn 1\n```"], list("def f():\nreturn 1\n```x")):
        ended = Ended()
        assert "".join(_until_stop(iter(pieces), ("END", "```"), ended)) == "def f():\nreturn 1\n"
        assert ended.finish == "stop"
    ended = Ended()
    assert "".join(_until_stop(iter(["a `", "` b"]), ("```",), ended)) == "a `` b" and ended.finish == "length"


def test_chunks_hold_at_most_so_many_tokens_and_outputs():
    outputs = [at % 2 == 0 for at in range(100)]
    chunks = list(_chunks(outputs, 30, 5))
    assert [stop for _, stop in chunks[:-1]] == [start for start, _ in chunks[1:]] and (chunks[0][0], chunks[-1][1]) == (0, 100)
    assert all(stop - start <= 30 and sum(outputs[start:stop]) <= 5 for start, stop in chunks)


def test_a_prompt_that_fills_the_context_is_refused(engine):
    with pytest.raises(OlpackError, match="900"):
        engine.generate([5] * 900, 10)
    with pytest.raises(OlpackError, match="901 tokens do not fit"):
        engine.logprobs([5] * 901, [True] * 901)


def test_a_file_that_is_no_model_gives_llama_cpps_reason(tmp_path, gguf_path):
    with pytest.raises(OlpackError, match="no GGUF at"):
        Engine(tmp_path / "none.gguf", context=64)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_path.read_bytes()[:50_000])
    with pytest.raises(OlpackError, match=r"incomplete|file bounds"):
        Engine(broken, context=64)


def test_ollamas_parameters_become_sampling():
    parameters = {"temperature": 0.2, "num_ctx": 4096, "stop": ["<|im_end|>"], "seed": 3}
    assert Sampling.of(parameters) == Sampling(temperature=0.2, stop=("<|im_end|>",), seed=3)


TEMPLATES = {
    "blocks and blanks": "  {%- for m in messages %}\n  {% if m.role == 'user' %}\n<u>{{ m.content }}</u>\n  {% endif %}\n{% endfor %}\nE",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "special tokens": "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}{% if add_generation_prompt %}>{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_render_as_in_transformers(tokenizer, template):
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    messages = [{"role": "user", "content": "a <b> & 'c' é"}, {"role": "assistant", "content": "d"}]
    expected = wrapped.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert render_chat(template, messages, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}) == expected


def test_a_template_reads_tools_as_in_transformers(tokenizer):
    from example_bases import TEMPLATE
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tools = [{"type": "function", "function": {"name": "dim", "description": "Dämmen", "parameters": {"type": "object", "properties": {}}}}]
    messages = [{"role": "user", "content": "Dim it."}]
    for given in (tools, None):
        expected = wrapped.apply_chat_template(messages, tools=given, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True)
        assert render_chat(TEMPLATE, messages, {}, given) == expected
        assert ('"name": "dim"' in expected) is bool(given)


def test_a_template_that_refuses_says_so():
    with pytest.raises(OlpackError, match="no system turn, please"):
        render_chat("{{ raise_exception('no system turn, please') }}", [], {})
    with pytest.raises(OlpackError, match="refuses"):
        render_chat("{{ messages[0].content.__class__.__mro__ }}", [{"content": "x"}], {})


@pytest.mark.parametrize(("content", "limit"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), (None, None)])
def test_a_containers_cpu_limit_is_respected(tmp_path, content, limit):
    file = tmp_path / "cpu.max"
    if content:
        file.write_text(content)
    assert _container_limit(file) == limit


def test_works_side_by_side_give_what_they_give_one_after_the_other(gguf_path, tokenizer):
    prompts = [tokenizer.encode(TEXT * (1 + number % 3)).ids[: 20 + 7 * number] for number in range(12)]

    def answer(ids, engine):
        return list(engine.generate(ids, 20, Sampling(temperature=0))), engine.logprobs(ids, [True] * len(ids)).tolist()

    works = [partial(answer, ids) for ids in prompts]
    with Engine(gguf_path, context=900, threads=1) as engine:
        alone = [work(engine) for work in works]
    with Engine(gguf_path, context=900, threads=2) as engine:
        assert list(side_by_side(engine, works, 4, 2)) == alone
        assert list(side_by_side(engine, works[:2], 4, 2)) == alone[:2]
        with pytest.raises(OlpackError, match="The prompt has 901 tokens"):
            list(side_by_side(engine, [*works, partial(answer, [3] * 901)], 4, 2))
        assert works[0](engine) == alone[0]  # the engine is as it was
