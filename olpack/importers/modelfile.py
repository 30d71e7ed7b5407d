"""A Modelfile of Ollama."""

from __future__ import annotations

from pathlib import Path

from olpack.deploy.modelfile import commands, parameter
from olpack.deploy.parameters import PARAMETERS, check_parameters
from olpack.errors import OlpackError
from olpack.export.adapter import adapter_files
from olpack.importers.draft import Draft, Given
from olpack.model.base import OF_SERVER
from olpack.model.gguf_files import is_gguf
from olpack.workspace import named_from

TABLE = (
    ("FROM", "base", "A folder with safetensors, a GGUF, or a model of the server, as `ollama/NAME`."),
    ("ADAPTER", "train.adapter", "A folder in peft's format, not a GGUF."),
    ("PARAMETER", "modelfile.parameters", "All that Ollama 0.33 has."),
    ("SYSTEM", "modelfile.system", ""),
    ("MESSAGE", "modelfile.messages", ""),
    ("LICENSE", "modelfile.license", "Several become one text."),
    ("TEMPLATE", "modelfile.template", "Deploy compares the prompts that it writes with the trained ones."),
    ("RENDERER, PARSER, REQUIRES, DRAFT", "", "The served model has the base's chat template, which Ollama renders and parses by itself."),
)
"""What becomes of each command, for the documentation: (command, recipe key, note)."""
_MOST_COMMANDS = 500
_TEXTS = {"system": "modelfile.system", "template": "modelfile.template"}


def read(draft: Draft, text: str) -> None:
    """Read a Modelfile.

    Raises:
        OlpackError: `ollama create` would refuse its grammar.
    """
    for number, (line, command, word, value) in enumerate(commands(text)):
        if number == _MOST_COMMANDS:
            raise OlpackError(f"{draft.file} has more than {_MOST_COMMANDS:,} commands.", "Name a Modelfile.")
        given = Given(draft.place(line), " ".join(filter(None, (command.upper(), word))), value)
        if command == "from":
            _base(draft, given)
        elif command == "adapter":
            _adapter(draft, given)
        elif command in _TEXTS:
            note = "Deploy compares the prompts that it writes with the trained ones, and fails if they differ." if command == "template" else ""
            draft.carry(given, {_TEXTS[command]: value}, note)
        elif command == "license":
            before = draft.settings.get("modelfile.license")
            draft.carry(given, {"modelfile.license": value if before is None else f"{before}\n{value}"})
        elif command == "message":
            draft.add(given, "modelfile.messages", {"role": word, "content": value})
        elif command == "parameter":
            _parameter(draft, given, word)
        else:
            draft.lose(given, TABLE[-1][2])


def _base(draft: Draft, given: Given) -> None:
    name = str(given.value)
    place = draft.near(name)
    if place and place.is_dir():
        draft.carry(given, {"base": named_from(draft.folder, str(place))})
    elif place and place.is_file() and is_gguf(place):
        draft.carry(given, {"base": named_from(draft.folder, str(place))}, _ON_FILE)
    elif (place and place.is_file()) or name.startswith(("/", ".", "~")) or name.endswith((".gguf", ".bin")):
        draft.lose(given, f"There is no GGUF {name} in the working folder or beside {draft.file.name}.")
    else:
        draft.carry(given, {"base": f"{OF_SERVER}{name}"}, _ON_FILE)


_ON_FILE = "`package: adapter` serves this very file with the adapter beside it."


def _adapter(draft: Draft, given: Given) -> None:
    place = draft.near(str(given.value))
    if place and (place / "adapter_config.json").is_file():
        adapter_files(place)
        draft.carry(given, {"train.adapter": named_from(draft.folder, str(place))}, "The adapter is trained: a build copies it.")
    else:
        draft.lose(given, "olpack takes the folder that peft saved, with adapter_config.json and adapter_model.safetensors.")


def _parameter(draft: Draft, given: Given, name: str) -> None:
    try:
        value = parameter(name, str(given.value))
    except OlpackError as error:
        draft.lose(given, error.problem if name in PARAMETERS else "Ollama 0.33 has no such parameter.")
        return
    key = f"modelfile.parameters.{name}"
    if problems := check_parameters({name: value}):
        draft.lose(given, problems[0])
    elif isinstance(value, list):
        draft.add(given, key, value[0])
    else:
        draft.carry(given, {key: value})


def is_modelfile(path: Path, text: str) -> bool:
    """Whether a file looks like a Modelfile: by its name, or because its first line that is no comment begins with FROM."""
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    return "modelfile" in path.name.lower() or first.lower().startswith("from ")
