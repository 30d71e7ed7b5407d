"""The answers of an Ollama server, in types. An answer is validated once, where it arrives; every field that olpack reads is here.

The names are those of Ollama's API (api/types.go). Unknown fields are ignored, and a field of another type than the server's own refuses the
whole answer. Counts and durations are optional: the server leaves out those that are 0.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from olpack.deploy.proxies import without_socks

with without_socks():  # importing it makes a client, which a SOCKS proxy in the environment would stop
    import ollama

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[str, StringConstraints(pattern=r"^v?[0-9]{1,6}(\.[0-9]{1,6}){0,3}([-+][0-9A-Za-z.+-]{1,80})?$")]


class Answer(BaseModel):
    """An answer, or a line of one that comes in lines. A server may report an error inside an answer that begins with 200."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())

    error: str | None = None


class ServerVersion(Answer):
    """`/api/version`."""

    version: Version


class Details(Answer):
    """Of a model that the server lists."""

    parameter_size: str | None = None
    quantization_level: str | None = None


class ListedModel(Answer):
    """A model that is registered. `size` is in bytes."""

    model: Name
    digest: Digest
    size: Count
    details: Details | None = None


class ListedModels(Answer):
    """`/api/tags`."""

    models: tuple[ListedModel, ...]


class LoadedModel(Answer):
    """A model that is loaded. `size` and `size_vram` are in bytes, `context_length` in tokens."""

    model: Name
    digest: str | None = None
    size: Count | None = None
    size_vram: Count | None = None
    context_length: Count | None = None


class LoadedModels(Answer):
    """`/api/ps`."""

    models: tuple[LoadedModel, ...]


class Turn(Answer):
    """A message that precedes every conversation."""

    role: str = ""
    content: str = ""


class ShownModel(Answer):
    """`/api/show`."""

    modelfile: str = ""
    system: str | None = None
    template: str | None = None
    license: str | None = None
    parameters: str = ""
    messages: tuple[Turn, ...] = ()
    capabilities: tuple[str, ...] = ()
    details: dict[str, Any] = {}


class Rendered(Answer):
    """A prompt that was rendered and not run."""

    rendered_template: str


class _Run(Answer):
    """What an answer of a model carries beside its text. Durations are nanoseconds; `done` and the figures come with the last piece.

    Attributes:
        debug: the rendered prompt, where it was asked for.
    """

    done: bool = False
    done_reason: str | None = None
    total_duration: Count | None = None
    load_duration: Count | None = None
    prompt_eval_count: Count | None = None
    prompt_eval_duration: Count | None = None
    eval_count: Count | None = None
    eval_duration: Count | None = None
    debug: Rendered | None = Field(None, alias="_debug_info")


class Generated(_Run):
    """`/api/generate`: an answer, or a piece of one. `context` has the token ids of prompt and answer."""

    response: str = ""
    thinking: str | None = None
    context: tuple[Count, ...] | None = None


class Message(ollama.Message):
    """What a model writes in a conversation: the official client's type. A piece may leave its role out."""

    model_config = ConfigDict(strict=True, frozen=True)

    role: str = "assistant"
    content: str | None = ""


class Chatted(_Run):
    """`/api/chat`: an answer, or a piece of one."""

    message: Message


class Progress(Answer):
    """A line of `/api/create`, `/api/push` and `/api/pull`. `total` and `completed` are bytes of the layer `digest`."""

    status: str = ""
    digest: str | None = None
    total: Count | None = None
    completed: Count = 0


class Nothing(Answer):
    """An answer of which only the status counts."""
