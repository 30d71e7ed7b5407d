"""The base model: its folder, its label, and the facts in its configuration files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from olpack import bounded_json
from olpack.errors import OlpackError, first_line
from olpack.model import gguf_files, tokenizer_trial
from olpack.model.checkpoint import TensorHeader, check_tokenizer_files, read_tensor_headers, refuse_adapter
from olpack.model.gguf_base import GgufBase
from olpack.model.libraries import fewer_packages
from olpack.model.quantized import dequantized_headers, quantization_method
from olpack.model.settings import read_config_file, read_object
from olpack.workspace import PACKAGE, files_fingerprint, folder_fingerprint, value_digest

BUILTIN = PACKAGE / "assets"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]
_OTHER_FORMS = ["consolidated*", "original/*", "onnx/*"]  # of the same weights


@dataclass(frozen=True)
class Base:
    """A base model on this machine.

    Attributes:
        label: as the recipe names it: "builtin/tiny-coder", a folder, a Hub id.
        path: its folder; of a GGUF that of its tokenizer.
        gguf: the file that has its weights, where it is a GGUF.
        tag: the model of the Ollama server that the file belongs to, "llama3.2:3b"; "" where it is none of a server's.
        template: digest of a chat template that is not the GGUF's own; "" where it is.
    """

    label: str
    path: Path
    gguf: GgufBase | None = None
    tag: str = ""
    template: str = ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json, without a quantization that its weights do not have (see `leftover_quantization`).

        Raises:
            OlpackError: it is no JSON object, or the model needs Python code that its folder contains.
        """
        if self.gguf is not None:
            from olpack.model.gguf_architectures import config_of

            return config_of(self.gguf)
        config = read_config_file(self.path / "config.json")
        _refuse_custom_code(config, self.label)
        if self.leftover_quantization:
            config.pop("quantization_config")
        return config

    @cached_property
    def leftover_quantization(self) -> bool:
        """Whether config.json names bitsandbytes and no tensor is packed so, as after `merge_and_unload` of a QLoRA model."""
        if self.gguf is not None:
            return False
        settings = read_config_file(self.path / "config.json").get("quantization_config")
        if not isinstance(settings, dict) or settings.get("quant_method") != "bitsandbytes" or not any(self.path.glob("*.safetensors")):
            return False
        return not any(name.endswith((".absmax", ".SCB")) for name in read_tensor_headers(self.path))

    @property
    def source(self) -> Path:
        """What an export reads: its folder, or the GGUF (the first part)."""
        return self.path if self.gguf is None else self.gguf.paths[0]

    def tensor_headers(self) -> dict[str, TensorHeader]:
        """Its tensors by transformers' names, in the shapes that they have once they are dequantized.

        Raises:
            OlpackError: no safetensors, a truncated file, or a form that cannot be read.
        """
        if self.gguf is not None:
            from olpack.model.gguf_architectures import tensor_headers

            return tensor_headers(self.gguf)
        return dequantized_headers(self.path, self.config, read_tensor_headers(self.path))

    @cached_property
    def digest(self) -> str:
        """Identity of the model's content; see `workspace.folder_fingerprint`."""
        if self.gguf is not None:
            found = files_fingerprint(self.gguf.paths)
            return value_digest([found, self.template]) if self.template else found
        return folder_fingerprint(self.path)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens that the model was made for; 4096 where neither its configuration nor transformers' default gives one."""
        names = ("max_position_embeddings", "n_positions", "max_sequence_length")
        text = self.config.get("text_config") or self.config
        return int(next((text[key] for key in names if text.get(key)), None) or self._default(names) or 4096)

    def _default(self, names: Iterable[str]) -> int | None:
        """The first of these settings in transformers' configuration of the model, which fills in what config.json leaves out."""
        from transformers import AutoConfig

        plain = {key: value for key, value in self.config.items() if key not in ("quantization_config", "auto_map")}
        try:
            full = AutoConfig.for_model(**plain).get_text_config(decoder=True)
        except Exception:  # no model for transformers; `MetaModel` reports it
            return None
        return next((value for name in names if (value := getattr(full, name, None))), None)

    @property
    def quantization(self) -> str | None:
        """How its weights come quantized: "gptq", or of a GGUF the type of most of its bytes, "Q4_K"; None where they do not."""
        if self.gguf is not None:
            return next(iter(self.gguf.types))
        return quantization_method(self.config)

    @cached_property
    def license(self) -> str | None:
        """Licence named in the model card's front matter, such as "apache-2.0", or in a GGUF's header."""
        if self.gguf is not None:
            named = self.gguf.metadata.get("general.license")
            return named if isinstance(named, str) and named else None
        import yaml

        from olpack import bounded_yaml

        card = self.path / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        if not text.startswith("---\n") or "\n---" not in text[4:]:
            return None
        front = text[4 : text.index("\n---", 4)]
        try:
            bounded_yaml.check(front, str(card))
            matter = yaml.load(front, bounded_yaml.Loader)
        except (OlpackError, yaml.YAMLError):  # a card that cannot be read names no licence
            return None
        value = matter.get("license") if isinstance(matter, dict) else None
        return value if isinstance(value, str) else None

    def end_ids(self) -> list[int]:
        """Token ids with which generation ends, as generation_config.json lists them."""
        path = self.path / "generation_config.json"
        ids = read_object(path).get("eos_token_id") if path.is_file() else None
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    @cached_property
    def absent_tokens(self) -> list[str]:
        """Of the begin- and the end-of-sequence token, those that the chat template prints and the tokenizer has not: "bos_token", "eos_token"."""
        from olpack.model.chat_template import printed_tokens

        found = [read_object(path) for name in ("tokenizer_config.json", "special_tokens_map.json") if (path := self.path / name).is_file()]
        own = self.path / "chat_template.jinja"
        template = own.read_text(encoding="utf-8") if own.is_file() else json.dumps([one.get("chat_template") for one in found])
        if not (open_ones := [name for name in printed_tokens(template) if not any(one.get(name) for one in found)]):
            return []
        tokenizer = self.tokenizer()  # its class can have a default
        return [name for name in open_ones if getattr(tokenizer, name) is None and name in printed_tokens(str(tokenizer.chat_template))]

    def tokenizer(self):
        """The base's tokenizer, from its folder and without any network.

        Raises:
            OlpackError: no tokenizer in the folder loads, or the class that it names does not fit its vocabulary.
        """
        try:
            tokenizer = load_tokenizer(self.path)
        except OlpackError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            raise OlpackError(
                f"The tokenizer in {self.path} does not load: {(str(error).splitlines() or [type(error).__name__])[0]}",
                "The folder needs tokenizer.json and tokenizer_config.json.",
            ) from None
        self._refuse_lost_spaces(tokenizer)
        return tokenizer

    def _refuse_lost_spaces(self, tokenizer) -> None:
        """Some classes split text in their own way, whatever is in tokenizer.json: LlamaTokenizerFast loses the spaces of a byte-level vocabulary.

        Both token sequences are read by tokenizer.json, so a tokenizer that leaves out spaces on purpose is no fault.
        """
        from tokenizers import Tokenizer

        file = self.path / "tokenizer.json"
        if not file.is_file():
            return
        text, own = "a b\n  c", Tokenizer.from_file(str(file))
        written = own.decode(own.encode(text, add_special_tokens=False).ids).strip()
        try:
            read = own.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip()
        except Exception as error:  # tokenizers raises nothing narrower
            read = str(error)
        if read != written:
            raise OlpackError(
                f"transformers makes {read!r} of {text!r} with its class {type(tokenizer).__name__}, and {file} by itself makes "
                f"{written!r}: the class does not fit the vocabulary.",
                "Set `tokenizer_class` to PreTrainedTokenizerFast in tokenizer_config.json.",
            )


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer as transformers loads it, from the folder alone and without code of its own. Raises what transformers raises.

    One that may take any time or memory is tried in a worker first (see `tokenizer_trial`).
    """
    trial = tokenizer_trial.start(folder)
    tokenizer = load_untried(folder)
    tokenizer_trial.belongs(trial, tokenizer)
    return tokenizer


def load_untried(folder: Path) -> Any:
    """As `load_tokenizer`, without a trial.

    Where tokenizer_config.json names the general class, that is taken at once: AutoTokenizer would find the same one, and imports torch to look.
    """
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_object(settings).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        with fewer_packages():
            from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with fewer_packages():
        from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def resolve(label: str, *, relative_to: Path, revision: str | None = None, weights: bool = True) -> Base:
    """Find the base that a recipe names: shipped with olpack, a folder, a GGUF, or a model or a GGUF on the Hugging Face Hub.

    A model of an Ollama server, `ollama/NAME`, is found by `olpack.deploy.tag_bases`.

    Args:
        label: the recipe's `base`.
        relative_to: the recipe's folder; a relative path is looked up there, then in the working folder.
        revision: of a Hub id. What is not in the Hub's local cache yet is fetched.
        weights: without them, the tokenizer and the configuration are all that is fetched and looked for.

    Raises:
        OlpackError: no such builtin, no such folder, a folder that is no model, a Hub model that cannot be fetched.
    """
    if label.startswith("builtin/"):
        name = label.removeprefix("builtin/")
        if name in gguf_files.WHEELS:
            return of_gguf(label, gguf_files.fetched_model(name))
        path = BUILTIN / name
        if not (path / "config.json").is_file():
            known = ", ".join(f"builtin/{folder.name}" for folder in sorted(BUILTIN.iterdir()) if folder.is_dir())
            fetched = ", ".join(f"builtin/{name}" for name in gguf_files.WHEELS)
            raise OlpackError(f"There is no {label}.", f"Shipped with olpack: {known}. Fetched once from the package index: {fetched}.")
        return Base(label, path)
    for path in (relative_to / label, Path(label).expanduser()):
        if path.is_dir():
            return Base(label, _checked(path, weights))
        bounded_json.check_regular(path)
        if path.is_file():
            if gguf_files.is_gguf(path):
                return of_gguf(label, path)
            raise OlpackError(f"{label} is a file and no GGUF.", "Name a GGUF, or the folder with config.json and the safetensors.")
    if match := HUB_FILE.fullmatch(label):
        return of_gguf(label, _file_of_hub(match[1], match[2], revision))
    if label.endswith(".gguf"):
        raise OlpackError(f"There is no file {label}.", "Check its path; a GGUF of the Hub is named as owner/repo:file.gguf.")
    if label.startswith((".", "/", "~")) or label.count("/") != 1:
        raise OlpackError(
            f"There is no folder {label}.",
            "`base` is builtin/tiny-coder, a model's folder, a GGUF, ollama/NAME, or a Hub id such as Qwen/Qwen3-0.6B.",
        )
    return _from_hub(label, revision, weights)


OF_SERVER = "ollama/"
"""What a recipe's `base` begins with where it is a model of the Ollama server."""

HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):([^:]+\.gguf)")
"""A GGUF in a repository of the Hub, as a recipe names it: owner/repo:file.gguf. A split one is named by any of its parts."""


def of_gguf(label: str, path: Path, *, tag: str = "", template: str | None = None) -> Base:
    """The base of a GGUF.

    Args:
        label: as the recipe names it.
        path: the file; of a split one the first part.
        tag: as in `Base`.
        template: a chat template in place of the file's own.

    Raises:
        OlpackError: as `gguf_files.open_model` and `gguf_files.tokenizer_folder`.
    """
    gguf = gguf_files.open_model(path)
    folder = gguf_files.tokenizer_folder(gguf, template)
    return Base(label, folder, gguf, tag, value_digest(template) if template is not None else "")


def _file_of_hub(repo: str, name: str, revision: str | None) -> Path:
    """A GGUF of the Hub, all parts of it, in the Hub's local cache: the path of the first."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _hub_failures(repo, revision):
        try:
            paths = [Path(hf_hub_download(repo, part, revision=revision)) for part in gguf_files.all_parts(name)]
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            raise OlpackError(f"{repo} has no file {name}.", "Name one of its GGUF files, as owner/repo:file.gguf.") from None
    return paths[0]


def _checked(path: Path, weights: bool = True) -> Path:
    if not (path / "config.json").is_file():
        refuse_adapter(path)
        if ggufs := sorted(path.glob("*.gguf")):
            raise OlpackError(f"{path} has no config.json, and a GGUF: {ggufs[0].name}.", "Name the file itself as base.")
        raise OlpackError(f"{path} is no model folder: it has no config.json.", "It needs config.json, a tokenizer and safetensors weights.")
    if weights and not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        kind = "only pickled weights, which can run code when loaded" if pickled else "no weights"
        raise OlpackError(f"{path} has {kind}.", "olpack reads safetensors: save the model with save_pretrained(..., safe_serialization=True).")
    read_config_file(path / "config.json")  # before transformers reads it, for the tokenizer too
    check_tokenizer_files(path)
    return path


def _from_hub(repo: str, revision: str | None, weights: bool) -> Base:
    from huggingface_hub import snapshot_download

    with _hub_failures(repo, revision):
        found = snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_OTHER_FORMS + ([] if weights else ["*.safetensors"])
        )
    return Base(repo, _checked(Path(found), weights))


def config_of(label: str) -> dict[str, Any]:
    """The config.json of a builtin base, a folder, the file itself, or a Hub id, of which nothing else is fetched.

    Raises:
        OlpackError: there is no such model, it cannot be reached, or its config.json is no JSON object.
    """
    path = BUILTIN / label.removeprefix("builtin/") if label.startswith("builtin/") else Path(label).expanduser()
    bounded_json.check_regular(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise OlpackError(f"{path} is no model folder: it has no config.json.", "Name a folder with config.json, or a GGUF.")
    if path.is_dir() or path.is_file():
        return read_config_file(path / "config.json" if path.is_dir() else path)
    if label.startswith((".", "/", "~", "builtin/")) or label.count("/") != 1:
        raise OlpackError(f"There is no {label}.", "Name a model's folder, its config.json, a GGUF, or a Hub id such as Qwen/Qwen3-0.6B.")
    from huggingface_hub import hf_hub_download

    with _hub_failures(label, None):
        return read_config_file(Path(hf_hub_download(label, "config.json")))


def _refuse_custom_code(config: dict[str, Any], label: str) -> None:
    """Refuse a model whose class is in its own folder (`auto_map`): olpack never runs code that comes with a model."""
    if not config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise OlpackError(
            f"{label} needs Python code of its own (auto_map in config.json): transformers has no model of the type {kind!r}.",
            "olpack runs no code that comes with a model: take a base that transformers supports.",
        )


@contextmanager
def _hub_failures(repo: str, revision: str | None) -> Iterator[None]:
    """Raise an OlpackError for whatever fails on the Hub."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise OlpackError(
            f"{repo} is gated: its owner must grant access.", "Accept its licence on its page there, then run `hf auth login`, or set HF_TOKEN."
        ) from None
    except HFValidationError:
        raise OlpackError(f"There is no folder {repo}, and it is not a valid Hub id.", "Check its spelling: Qwen/Qwen3-0.6B is one.") from None
    except RevisionNotFoundError:
        raise OlpackError(f"{repo} has no revision {revision}.", "Name one of its branches, tags or commits as `revision`.") from None
    except RepositoryNotFoundError:
        raise OlpackError(f"There is no model {repo} on the Hugging Face Hub, or no folder of that name here.", "Check its spelling.") from None
    except LocalEntryNotFoundError:
        raise OlpackError(
            f"{repo} is not in the local cache and the Hugging Face Hub cannot be reached.",
            "Connect once, or name a folder; builtin/tiny-coder needs no network.",
        ) from None
    except EntryNotFoundError:
        raise OlpackError(
            f"{repo} has no config.json, so it is no model that transformers knows.", "Name the repository of the original model."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise OlpackError(f"{repo} could not be fetched: {first_line(error)}", "Run the same command again to go on.") from None
