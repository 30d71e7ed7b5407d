"""The served prompt against the trained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import served_gguf
from ollama_double import OllamaDouble
from ollama_double_store import CHATML, KnownTemplate
from transformers import PreTrainedTokenizerFast

from olpack.deploy import Package
from olpack.deploy.client import OllamaClient
from olpack.deploy.prompt_identity import HARD, check_identity
from olpack.deploy.register import TagFile, register
from olpack.errors import OlpackError
from olpack.model.chat_template import UNDEFINED, pins_for, protect

MODEL = "coder:q4_K_M"
PARAMETERS = {"num_ctx": 4096}
PACKAGE = Package(parameters=PARAMETERS)
TOOLS = "{%- if tools %}{{ '<tools>' + (tools | tojson) + '</tools>\\n' }}{%- endif %}" + served_gguf.CHAT
DATED = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ 'Today: ' + date_string + '\\n' }}" + served_gguf.CHAT
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + served_gguf.CHAT


@pytest.fixture
def client(ollama_double: OllamaDouble) -> OllamaClient:
    return OllamaClient(ollama_double.url)


def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=served_gguf.tokenizer(), eos_token="<|im_end|>", bos_token="<s>")
    made.chat_template = template
    return made


def _serve(client: OllamaClient, tmp_path: Path, template: str, package: Package = PACKAGE, add_bos: bool = False) -> None:
    digest = served_gguf.write(tmp_path / "coder.gguf", template, add_bos=add_bos)
    register(client, "coder", [TagFile("q4_K_M", tmp_path / "coder.gguf", digest)], package)


@pytest.mark.parametrize("template", [served_gguf.CHAT, CHATML.jinja, TOOLS, DATED], ids=["thinking", "chatml", "tools", "dated"])
def test_a_protected_template_is_served_as_trained(client: OllamaClient, tmp_path: Path, template: str) -> None:
    _serve(client, tmp_path, protect(template, pins_for(template)))
    rows = [[{"role": "user", "content": "From the data."}, {"role": "assistant", "content": "An answer."}]]
    identity = check_identity(client, MODEL, _tokenizer(template), rows)
    assert identity.identical and not identity.refused
    # each conversation by /api/chat and by its tokens; those of one user's turn by /api/generate, too
    alone = 9 + 1
    assert identity.compared == 2 * (len(HARD) + 1) + alone + (2 if template == TOOLS else 0)
    assert identity.summary() == f"prompt identical: {identity.compared}/{identity.compared}"
    identity.require()


@pytest.mark.parametrize(
    "package",
    [
        Package(system="أنت مساعد برمجة.", parameters=PARAMETERS),
        Package(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), parameters=PARAMETERS),
        Package(system="S", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), parameters=PARAMETERS),
    ],
    ids=["system", "messages", "both"],
)
def test_what_the_model_brings_along_is_expected(client: OllamaClient, tmp_path: Path, package: Package) -> None:
    _serve(client, tmp_path, protect(served_gguf.CHAT, pins_for(served_gguf.CHAT)), package)
    check_identity(client, MODEL, _tokenizer(served_gguf.CHAT)).require()


def test_thinking_that_the_server_switches_on(client: OllamaClient, tmp_path: Path) -> None:
    _serve(client, tmp_path, protect(served_gguf.CHAT, {}))
    identity = check_identity(client, MODEL, _tokenizer(served_gguf.CHAT))
    assert not identity.identical
    assert {difference.cause for difference in identity.differences} == {
        "thinking is switched on in one and off in the other; set enable_thinking at the top of the base's chat_template.jinja"
    }
    with pytest.raises(OlpackError, match="coder:q4_K_M is not served with the prompt that was trained") as caught:
        identity.require()
    assert "one question, by /api/chat: thinking is switched on" in caught.value.problem
    assert "    +<think>\\n" in caught.value.problem


def test_a_date_that_the_server_sets(client: OllamaClient, tmp_path: Path) -> None:
    _serve(client, tmp_path, protect(DATED, {"enable_thinking": UNDEFINED}))
    identity = check_identity(client, MODEL, _tokenizer(DATED))
    causes = {difference.cause for difference in identity.differences}
    assert causes == {"the date differs; set date_string at the top of the base's chat_template.jinja"}


def test_a_template_that_the_server_replaced(ollama_double: OllamaDouble, client: OllamaClient, tmp_path: Path) -> None:
    trained = CHATML.jinja.replace("{% for", "{% if messages[0].role != 'system' %}<|im_start|>system\nDefault.<|im_end|>\n{% endif %}{% for", 1)
    with pytest.raises(OlpackError, match="replaced the chat template"):
        _serve(client, tmp_path, trained)
    identity = check_identity(client, MODEL, _tokenizer(trained))
    assert "the server runs a Go template" in identity.differences[0].cause
    with pytest.raises(OlpackError, match="Default"):
        identity.require()


@pytest.mark.parametrize("written", [False, True])
def test_a_begin_of_sequence_token_is_there_once(client: OllamaClient, tmp_path: Path, written: bool) -> None:
    template = "{{ bos_token }}" * written + CHATML.jinja
    _serve(client, tmp_path, protect(template, {}), add_bos=written)
    check_identity(client, MODEL, _tokenizer(template)).require()


def test_a_begin_of_sequence_token_that_is_there_twice(client: OllamaClient, tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ bos_token }}" + CHATML.jinja
    _serve(client, tmp_path, protect(template, {}), add_bos=True)
    trained = "{{ bos_token }}" + CHATML.jinja
    identity = check_identity(client, MODEL, _tokenizer(trained))
    assert not identity.differences or identity.differences[0].via in ("chat", "tokens")
    untrained = check_identity(client, MODEL, _tokenizer(CHATML.jinja))
    assert untrained.differences[0].cause == "the begin-of-sequence text is there twice"


def test_one_more_token_than_characters_tell(client: OllamaClient, tmp_path: Path) -> None:
    # The template writes none, the GGUF says that one is to be added: only the tokens show it.
    _serve(client, tmp_path, protect(CHATML.jinja, {}), add_bos=True)
    identity = check_identity(client, MODEL, _tokenizer(CHATML.jinja))
    assert {(difference.via, difference.cause) for difference in identity.differences} == {("tokens", "the begin-of-sequence token is there twice")}


def test_conversations_that_the_template_refuses(client: OllamaClient, tmp_path: Path) -> None:
    _serve(client, tmp_path, protect(NO_SYSTEM, pins_for(NO_SYSTEM)))
    identity = check_identity(client, MODEL, _tokenizer(NO_SYSTEM))
    assert identity.identical
    assert set(identity.refused) == {label for label, turns in HARD.items() if turns[0]["role"] == "system"}
    assert "4 of the hard conversations refused by the template itself" in identity.summary()
    with pytest.raises(OlpackError, match="refuses row 1 of the data: no system role here"):
        check_identity(client, MODEL, _tokenizer(NO_SYSTEM), [HARD["system and question"]])


def test_tools_fail_only_where_the_data_has_them(client: OllamaClient, tmp_path: Path) -> None:
    served, trained = TOOLS, TOOLS.replace("<tools>", "<functions>")
    _serve(client, tmp_path, protect(served, pins_for(served)))
    identity = check_identity(client, MODEL, _tokenizer(trained))
    assert identity.identical and len(identity.untrained) == 1
    assert "tools, which the data does not use, are written otherwise" in identity.summary()
    used = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]
    assert not check_identity(client, MODEL, _tokenizer(trained), [used]).identical


def test_an_unknown_model_and_a_server_that_cannot_show(ollama_double: OllamaDouble, client: OllamaClient, tmp_path: Path) -> None:
    with pytest.raises(OlpackError, match="has no coder:q4_K_M"):
        check_identity(client, MODEL, _tokenizer(CHATML.jinja))
    _serve(client, tmp_path, protect(CHATML.jinja, {}))
    ollama_double.faults.no_debug_render = True
    with pytest.raises(OlpackError, match="cannot show the prompts"):
        check_identity(client, MODEL, _tokenizer(CHATML.jinja))


def test_any_tag_against_a_tokenizer(client: OllamaClient, tmp_path: Path) -> None:
    _serve(client, tmp_path, protect(served_gguf.CHAT, pins_for(served_gguf.CHAT)))
    client.copy(MODEL, "someone/else")
    for name in (MODEL, "Coder:q4_k_m", "someone/else"):
        check_identity(client, name, _tokenizer(served_gguf.CHAT)).require()
    with pytest.raises(OlpackError, match="someone/else is not served with the prompt that was trained"):
        check_identity(client, "someone/else", _tokenizer(CHATML.jinja + "!")).require()


def test_nothing_to_compare_with(client: OllamaClient, tmp_path: Path) -> None:
    _serve(client, tmp_path, protect(CHATML.jinja, {}))
    bare = _tokenizer("")
    bare.chat_template = None
    with pytest.raises(OlpackError, match="has no chat template"):
        check_identity(client, MODEL, bare)
    with pytest.raises(OlpackError, match="refuses every conversation: nothing of coder:q4_K_M was compared. Its message: never"):
        check_identity(client, MODEL, _tokenizer("{{ raise_exception('never') }}"))


# -- differences that decide, and those that do not ----------------------------------------------------------------------------------------

GO_TEMPLATE = (
    '{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user'
    '{{ .Content }}<|im_end|>\n<|im_start|>assistant\n{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
)
ROW = [{"role": "user", "content": "From the data."}]


def _go_rendered(turns: list[dict], after_user: str) -> str:
    """As Go's text/template would execute the template above, with what it writes after "user"."""
    text = f"<|im_start|>system\n{turns[0]['content']}<|im_end|>\n" if turns[0]["role"] == "system" and turns[0]["content"] else ""
    for turn in turns:
        if turn["role"] == "user":
            text += f"<|im_start|>user{after_user}{turn['content']}<|im_end|>\n<|im_start|>assistant\n"
        elif turn["role"] == "assistant":
            text += f"{turn['content']}<|im_end|>\n"
    return text


@pytest.mark.parametrize("after_user", ["\n", ""], ids=["as trained", "a line break too few"])
def test_a_go_template_is_compared_with_the_trained_one(ollama_double: OllamaDouble, client: OllamaClient, tmp_path: Path, after_user: str) -> None:
    go = GO_TEMPLATE.replace(">user{{", f">user{after_user}{{{{")
    known = KnownTemplate("recipe", "x" * 4000, go, (), lambda turns: _go_rendered(turns, after_user))
    ollama_double.store.known.append(known)
    _serve(client, tmp_path, protect(CHATML.jinja, {}), Package(template=go, parameters=PARAMETERS))
    identity = check_identity(client, MODEL, _tokenizer(CHATML.jinja), [ROW])
    if after_user:
        identity.require()
        assert {one.conversation for one in identity.made_up} == {"empty system"}
        assert "1/" not in identity.summary() and "empty system, by /api/chat" in identity.warnings()[0]
        return
    with pytest.raises(OlpackError, match="is not served with the prompt that was trained") as caught:
        identity.require()
    assert "row 1 of the data, by /api/chat: the server runs a Go template" in caught.value.problem
    assert "-<|im_start|>user\\n" in caught.value.problem and "+<|im_start|>userFrom the data.<|im_end|>\\n" in caught.value.problem
    assert "modelfile.template" in caught.value.remedy


def test_a_difference_in_a_made_up_conversation_is_a_warning(client: OllamaClient, tmp_path: Path) -> None:
    served = CHATML.jinja.replace("message['content']", "message['content'] | trim")
    _serve(client, tmp_path, protect(served, {}))
    identity = check_identity(client, MODEL, _tokenizer(CHATML.jinja), [ROW])
    identity.require()
    assert not identity.identical and "differences in made-up conversations" in identity.summary()
    [warning] = identity.warnings()
    assert "whitespace at both ends, by /api/chat: whitespace was trimmed" in warning and "made up and not of the data" in warning
    with pytest.raises(OlpackError, match="row 1 of the data"):
        check_identity(client, MODEL, _tokenizer(CHATML.jinja), [[{"role": "user", "content": " indented"}]]).require()
    with pytest.raises(OlpackError, match="whitespace at both ends"):  # without any data the made-up ones decide
        check_identity(client, MODEL, _tokenizer(CHATML.jinja)).require()


@pytest.mark.parametrize("pinned", [True, False])
def test_a_tokenizer_without_a_begin_of_sequence_token(client: OllamaClient, tmp_path: Path, pinned: bool) -> None:
    """The engine takes token 11 where the vocabulary names none; training rendered nothing."""
    template = "{{ bos_token }}" + CHATML.jinja
    pins = pins_for(template, ["bos_token"] if pinned else [])
    assert pins == ({"bos_token": '""'} if pinned else {}) and pins_for(CHATML.jinja, ["bos_token", "eos_token"]) == {}
    digest = served_gguf.write(tmp_path / "coder.gguf", protect(template, pins), bos=False)
    register(client, "coder", [TagFile("q4_K_M", tmp_path / "coder.gguf", digest)], PACKAGE)
    trained = PreTrainedTokenizerFast(tokenizer_object=served_gguf.tokenizer(), eos_token="<|im_end|>")
    trained.chat_template = template
    identity = check_identity(client, MODEL, trained, [ROW])
    assert identity.identical is pinned
    assert pinned or identity.differences[0].served.startswith("(<|im_start|>")  # its token 11
