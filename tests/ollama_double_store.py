"""The double's models: blobs and manifests on disk in the layout of a real store, and what the server does to them.

Layers, config and manifests are written byte for byte as the server writes them, so their digests are the server's, too.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olpack.deploy.names import DEFAULT_HOST, DEFAULT_NAMESPACE, Name, check_name, parse_name
from olpack.errors import OlpackError

IMAGE = "application/vnd.ollama.image."
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    14: "Q4_K_S",
    15: "Q4_K_M",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}
TYPES = {
    "temperature": "float32",
    "top_p": "float32",
    "min_p": "float32",
    "num_ctx": "integer",
    "top_k": "integer",
    "seed": "integer",
    "num_predict": "integer",
}


class Refused(Exception):
    """An answer with an error in it: the status it has where nothing was sent before it, and its text."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status, self.text = status, text


@dataclass
class Facts:
    """What the server knows of a GGUF. Read from the file, or given for a blob of which only the length is known."""

    metadata: dict
    tensors: list[dict] = field(default_factory=list)
    chat_template: str | None = None
    add_bos: bool = False
    bos: str = ""
    eos: str = ""
    rewritten_as: str | None = None  # digest that the server's COPY gives it; None: it comes out as it went in

    @property
    def parameter_size(self) -> str:
        count = self.metadata["general.parameter_count"]
        if count >= 1e9:
            return f"{count / 1e9:.1f}B".replace(".0B", "B" if count % 1_000_000_000 == 0 else ".0B")
        if count >= 1e6:
            return f"{count // 1_000_000}M" if count % 1_000_000 == 0 else f"{count / 1e6:.2f}M"
        return f"{count / 1e3:.0f}K" if count >= 1e3 else str(count)

    @property
    def quantization(self) -> str:
        return FILE_TYPES.get(self.metadata.get("general.file_type", 0), "unknown").replace("F32", "unknown")


@dataclass(frozen=True)
class KnownTemplate:
    """A chat template that the server replaces by a Go template of its own where a GGUF's is within 100 edits of it."""

    name: str
    jinja: str
    go: str
    stop: tuple[str, ...]
    render: Callable[[list[dict]], str]


CHATML = KnownTemplate(
    "chatml",
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
    ("<|im_start|>", "<|im_end|>"),
    lambda turns: "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n",
)


class Store:
    """Blobs and manifests under one folder, as under $OLLAMA_MODELS."""

    def __init__(self, root: Path):
        self.root = root
        self.known = [CHATML]
        self.refuses_adapters = False  # as Ollama 0.34.1 and newer; in which words is not recorded
        self.shown = "<OLLAMA_MODELS>"  # the folder in the paths that `show` names, which the recordings leave out
        self.primed: dict[str, Facts] = {}
        self.lock = threading.RLock()
        self._facts: dict[str, Facts] = {}
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    # -- blobs -----------------------------------------------------------------------------------------------------------------------------

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest.replace(":", "-")

    def put(self, content: bytes) -> tuple[str, bool]:
        """Store a layer. Returns its digest, and whether it is new."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        new = not self.blob(digest).exists()
        if new:
            self.blob(digest).write_bytes(content)
        return digest, new

    def facts(self, digest: str) -> Facts:
        if digest in self.primed:
            return self.primed[digest]
        if digest not in self._facts:
            self._facts[digest] = read_gguf(self.blob(digest))
        return self._facts[digest]

    # -- names -----------------------------------------------------------------------------------------------------------------------------

    def manifest_path(self, name: Name) -> Path:
        return self.root / "manifests" / name.host / name.namespace / name.model / name.tag

    def names(self) -> list[Name]:
        return [Name(*path.relative_to(self.root / "manifests").parts) for path in sorted(self.root.glob("manifests/*/*/*/*"))]

    def respelled(self, text: str) -> Name:
        """The name as it will be stored: any part that some model already has, in whatever case, is spelled as there."""
        try:
            check_name(text)
        except OlpackError:
            raise Refused(400, "invalid model name") from None
        wanted = parse_name(text)
        parts = {}
        for part in ("host", "namespace", "model", "tag"):
            value = getattr(wanted, part)
            parts[part] = next((getattr(name, part) for name in self.names() if getattr(name, part).lower() == value.lower()), value)
        return Name(**parts)

    def find(self, text: str) -> tuple[Name, dict] | None:
        try:
            name = self.respelled(text)
        except Refused:
            return None
        path = self.manifest_path(name)
        return (name, json.loads(path.read_text())) if path.is_file() else None

    def _write(self, name: Name, manifest: dict) -> None:
        path = self.manifest_path(name)
        old = json.loads(path.read_text()) if path.is_file() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(manifest))
        if old:
            self._prune(old)

    def _prune(self, manifest: dict) -> None:
        """Remove the blobs that no other manifest uses."""
        used = {layer["digest"] for path in self.root.glob("manifests/*/*/*/*") for layer in all_layers(json.loads(path.read_text()))}
        for layer in all_layers(manifest):
            if layer["digest"] not in used:
                self.blob(layer["digest"]).unlink(missing_ok=True)

    def copy(self, source: str, destination: str) -> None:
        found = self.find(source)
        if found is None:
            raise Refused(404, f"model {source!r} not found")
        path = self.manifest_path(self.respelled(destination))  # what the model of that name alone used stays
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.manifest_path(found[0]).read_bytes())

    def delete(self, text: str) -> None:
        found = self.find(text)
        if found is None:
            raise Refused(404, f"model '{text}' not found")
        path = self.manifest_path(found[0])
        path.unlink()
        for folder in list(path.parents)[:3]:
            if not any(folder.iterdir()):
                folder.rmdir()
        self._prune(found[1])

    # -- create ----------------------------------------------------------------------------------------------------------------------------

    def create(self, body: dict) -> Iterator[str]:
        """Yields the lines of status; raises Refused where the server would."""
        name = self.respelled(body.get("model", ""))
        if body.get("from"):
            base = self.find(body["from"])
            if base is None:
                raise Refused(404, f"model {body['from']!r} not found")
            if body.get("quantize") and body["quantize"] not in ("F32", "F16", "BF16", "Q8_0", "Q4_K_S", "Q4_K_M"):
                raise Refused(500, f"unsupported quantization type {body['quantize']} - supported types are F32, F16, Q4_K_S, Q4_K_M, Q8_0")
            layers = [{**layer, "from": short(base[0])} for layer in base[1]["layers"]]
            said = {layer["digest"]: f"using existing layer {layer['digest']}" for layer in layers}
        elif body.get("files"):
            layers, said = [], {}
            yield from self._from_files(body["files"], layers, said)
        else:
            raise Refused(400, "neither 'from' or 'files' was specified")
        if body.get("adapters"):
            if self.refuses_adapters:
                raise Refused(400, "adapters are not supported")
            [(_, digest)] = body["adapters"].items()
            yield "parsing GGUF"
            if not self.blob(digest).exists() or self.facts(digest).metadata.get("general.type") != "adapter":
                raise Refused(400, "unknown type")
            # It joins the layers that are there, those of a `from` too, and is not rewritten.
            layers.append({"mediaType": IMAGE + "adapter", "digest": digest, "size": self.blob(digest).stat().st_size})
            said[digest] = f"using existing layer {digest}"
        self._set_fields(body, layers, said)
        yield from (said[layer["digest"]] for layer in layers if layer["digest"] in said)
        facts = self.facts(next(layer["digest"] for layer in layers if layer["mediaType"] == IMAGE + "model"))
        family = facts.metadata["general.architecture"]
        config = {
            "model_format": "gguf",
            "model_family": family,
            "model_families": [family],
            "model_type": facts.parameter_size,
            "file_type": facts.quantization,
            **{key: body[key] for key in ("renderer", "parser", "requires") if body.get(key)},
            "architecture": "amd64",
            "os": "linux",
        }
        digest, _ = self.put(encoded(config))
        yield "writing manifest"
        self._write(
            name,
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"mediaType": CONFIG, "digest": digest, "size": len(encoded(config))},
                "layers": layers,
            },
        )
        yield "success"

    def _from_files(self, files: dict[str, str], layers: list[dict], said: dict[str, str]) -> Iterator[str]:
        if any(path.startswith("/") for path in files):
            raise Refused(400, "file path must be relative")
        [(_, digest)] = files.items()
        yield "parsing GGUF"
        if not self.blob(digest).exists():
            raise Refused(500, f"open <OLLAMA_MODELS>/blobs/{digest.replace(':', '-')}: no such file or directory")
        facts = self.facts(digest)
        if not facts.metadata:
            raise Refused(500, "unexpected EOF")
        yield "verifying conversion"
        kept = facts.rewritten_as or digest
        new = not self.blob(kept).exists()
        if new:
            with self.blob(kept).open("wb") as file:
                file.truncate(self.blob(digest).stat().st_size)
            self.primed[kept] = facts
        layers.append({"mediaType": IMAGE + "model", "digest": kept, "size": self.blob(kept).stat().st_size})
        yield f"{'creating new' if new else 'using existing'} layer {kept}"
        if near := next((known for known in self.known if facts.chat_template and edits(known.jinja, facts.chat_template, 100) < 100), None):
            yield f"using autodetected template {near.name}"
            for kind, content in (("template", near.go.encode()), ("params", encoded({"stop": list(near.stop)}))):
                layers.append({"mediaType": IMAGE + kind, "digest": self.put(content)[0], "size": len(content)})

    def _set_fields(self, body: dict, layers: list[dict], said: dict[str, str]) -> None:
        def add(kind: str, content: bytes, replacing: bool = True) -> None:
            if replacing:
                layers[:] = [layer for layer in layers if layer["mediaType"] != IMAGE + kind]
            digest, new = self.put(content)
            said[digest] = f"{'creating new' if new else 'using existing'} layer {digest}"
            layers.append({"mediaType": IMAGE + kind, "digest": digest, "size": len(content)})

        if template := body.get("template"):
            if template.count("{{") != template.count("}}"):
                raise Refused(400, "template error: template: :1: unclosed action")
            add("template", template.encode())
        if body.get("system"):
            add("system", body["system"].encode())
        given = body.get("license") or []
        for text in [given] if isinstance(given, str) else given:
            add("license", text.encode(), replacing=False)  # a licence joins those that are inherited
        given = {**self.params(layers), **(body.get("parameters") or {})}
        if given:
            add("params", encoded_parameters(given))
        if body.get("messages"):
            add("messages", encoded([{"role": turn["role"], "content": turn["content"]} for turn in body["messages"]]))

    # -- reading ---------------------------------------------------------------------------------------------------------------------------

    def texts(self, layers: list[dict], kind: str) -> list[str]:
        return [self.blob(layer["digest"]).read_bytes().decode() for layer in layers if layer["mediaType"] == IMAGE + kind]

    def text(self, layers: list[dict], kind: str) -> str:
        return "\n".join(self.texts(layers, kind))

    def params(self, layers: list[dict]) -> dict:
        return json.loads(self.text(layers, "params") or "{}")

    def messages(self, layers: list[dict]) -> list[dict]:
        return json.loads(self.text(layers, "messages") or "[]")

    def model_layer(self, layers: list[dict]) -> dict:
        return next(layer for layer in layers if layer["mediaType"] == IMAGE + "model")

    def details(self, manifest: dict) -> dict:
        model = self.model_layer(manifest["layers"])
        config = json.loads(self.blob(manifest["config"]["digest"]).read_text())
        return {
            "parent_model": model.get("from", ""),
            "format": config["model_format"],
            "family": config["model_family"],
            "families": config["model_families"],
            "parameter_size": config["model_type"],
            "quantization_level": config["file_type"],
        }

    def go_template(self, layers: list[dict]) -> str | None:
        """The Go template that runs, None where the GGUF's own Jinja does: where there is no other, or where it can more."""
        facts = self.facts(self.model_layer(layers)["digest"])
        given = self.text(layers, "template")
        if facts.chat_template and (not given or abilities(facts.chat_template) > abilities(given)):
            return None
        return given or "{{ .Prompt }}"

    def show(self, name: Name, manifest: dict) -> dict:
        layers = manifest["layers"]
        model = self.model_layer(layers)
        facts = self.facts(model["digest"])
        go = self.go_template(layers)
        system, licence, params, messages = (
            self.text(layers, "system"),
            self.text(layers, "license"),
            self.params(layers),
            self.messages(layers),
        )
        items = [(key, item) for key in sorted(params) for item in (params[key] if isinstance(params[key], list) else [params[key]])]
        lines = [
            '# Modelfile generated by "ollama show"',
            "# To build a new Modelfile based on this, replace FROM with:",
            f"# FROM {short(name)}",
            "",
            f"FROM {self.shown}/blobs/{model['digest'].replace(':', '-')}",
            *(f"ADAPTER {self.shown}/blobs/{one['digest'].replace(':', '-')}" for one in layers if one["mediaType"] == IMAGE + "adapter"),
            f"TEMPLATE {go_quoted(self.text(layers, 'template') or '{{ .Prompt }}')}",
        ]
        lines += [f"SYSTEM {go_quoted(system)}"] if system else []
        lines += [f"PARAMETER {key} {go_quoted(written(item))}" for key, item in items]
        lines += [f"LICENSE {go_quoted(text)}" for text in self.texts(layers, "license")]
        lines += [f"MESSAGE {turn['role']} {go_quoted(turn['content'])}" for turn in messages]
        capabilities = ["completion", *(abilities(facts.chat_template or "") if go is None else ())]
        answer = {
            "license": licence,
            "modelfile": "\n".join(lines) + "\n",
            "parameters": "\n".join(
                sorted(f"{key:<30} {json.dumps(item, ensure_ascii=False) if isinstance(item, str) else written(item)}" for key, item in items)
            ),
            "template": go if go is not None else facts.chat_template,
            "system": system,
            "details": self.details(manifest),
            "messages": messages,
            "model_info": facts.metadata,
            "tensors": facts.tensors,
            "capabilities": sorted(capabilities, key=["tools", "thinking", "completion"].index),
        }
        required = ("modelfile", "details", "model_info", "tensors", "capabilities")
        return {key: value for key, value in answer.items() if value or key in required} | {"modified_at": self.modified(name)}

    def listed(self) -> list[dict]:
        rows = []
        for name in self.names():
            raw = self.manifest_path(name).read_bytes()
            manifest = json.loads(raw)
            metadata = self.facts(self.model_layer(manifest["layers"])["digest"]).metadata
            family = metadata["general.architecture"]
            lengths = {key: metadata[f"{family}.{key}"] for key in ("context_length", "embedding_length") if f"{family}.{key}" in metadata}
            rows.append(
                {
                    "name": short(name),
                    "model": short(name),
                    "modified_at": self.modified(name),
                    "size": sum(layer["size"] for layer in all_layers(manifest)),
                    "digest": hashlib.sha256(raw).hexdigest(),
                    "details": {**self.details(manifest), **lengths},
                    "capabilities": ["completion"],
                }
            )
        return sorted(rows, key=lambda row: row["modified_at"][:19], reverse=True)

    def modified(self, name: Name) -> str:
        moment = datetime.datetime.fromtimestamp(self.manifest_path(name).stat().st_mtime, datetime.UTC)
        return moment.strftime("%Y-%m-%dT%H:%M:%S.%f000Z")

    # -- prompts ---------------------------------------------------------------------------------------------------------------------------

    def prompt(self, manifest: dict, turns: list[dict], tools: list | None = None, system: str | None = None) -> str:
        """What the server makes of a conversation: the model's messages go before it, and before them the model's system prompt or the
        given one.
        """
        layers = manifest["layers"]
        seen = [*self.messages(layers), *turns]
        if turns and turns[0]["role"] != "system" and (system := system or self.text(layers, "system")):
            seen = [{"role": "system", "content": system}, *seen]
        facts = self.facts(self.model_layer(layers)["digest"])
        go = self.go_template(layers)
        if go is not None:
            for known in self.known:
                if known.go == go:
                    return known.render(seen)
            if go == "{{ .Prompt }}":
                return seen[-1]["content"]
            raise Refused(500, "this double renders no Go template but those it knows")
        return render_jinja(facts, seen, tools)


def render_jinja(facts: Facts, turns: list[dict], tools: list | None) -> str:
    """As llama.cpp's own engine renders, with the variables that it sets."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **{k: v for k, v in options.items() if k != "ensure_ascii"}
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    now = datetime.datetime.now()
    environment.globals |= {"raise_exception": refuse, "strftime_now": now.strftime}
    variables = {
        "enable_thinking": True,
        "thinking": True,
        "date_string": now.strftime("%d %b %Y"),
        "datetime": now.strftime("%b %d %Y"),
        "bos_token": facts.bos,
        "eos_token": facts.eos,
        **({"tools": tools} if tools else {}),
    }
    try:
        text = environment.from_string(facts.chat_template).render(messages=turns, add_generation_prompt=True, **variables)
    except jinja2.TemplateError as error:
        raise Refused(500, f"template: {error}") from None
    return text.removeprefix(facts.bos) if facts.add_bos else text


def abilities(template: str) -> set[str]:
    return {name for name, sign in (("tools", r"tools|tool_call"), ("thinking", r"<think>")) if re.search(sign, template)}


def edits(a: str, b: str, limit: int) -> int:
    """Levenshtein distance, or `limit` where it is at least that."""
    if abs(len(a) - len(b)) >= limit:
        return limit
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (char != other))
        if min(row) >= limit:
            return limit
    return min(row[-1], limit)


def read_gguf(path: Path) -> Facts:
    """The facts of a real GGUF file; none where it is not whole."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except Exception:  # whatever the reader trips over in a broken file
        return Facts({})
    raw = {name: one for name, one in reader.fields.items() if not name.startswith("GGUF.")}
    metadata = {name: None if one.types[0] == gguf.GGUFValueType.ARRAY else one.contents() for name, one in sorted(raw.items())}
    template = metadata.pop("tokenizer.chat_template", None)
    metadata["general.parameter_count"] = int(sum(tensor.n_elements for tensor in reader.tensors))
    tensors = [{"name": one.name, "type": one.tensor_type.name, "shape": [int(size) for size in one.shape]} for one in reader.tensors]

    def token(key: str) -> str:
        number = metadata.get(f"tokenizer.ggml.{key}_token_id", 11)  # llama.cpp's own choice for byte-level vocabularies
        return raw["tokenizer.ggml.tokens"].contents(int(number)) if number is not None and "tokenizer.ggml.tokens" in raw else ""

    return Facts(dict(sorted(metadata.items())), tensors, template, bool(metadata.get("tokenizer.ggml.add_bos_token")), token("bos"), token("eos"))


def encoded(value: object) -> bytes:
    """As Go's JSON encoder writes: keys of maps sorted by the caller's habit, HTML characters escaped, a line end after it."""
    if isinstance(value, dict) and "schemaVersion" not in value and "model_format" not in value:
        value = dict(sorted(value.items()))
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode() + b"\n"


def encoded_parameters(given: dict) -> bytes:
    """All numbers are float64 to the server, written by Go: no point where there is no fraction, an exponent below 1e-6 and from 1e21 on."""
    numbers: list[str] = []

    def marked(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        number = repr(float(value))
        if value and not 1e-6 <= abs(value) < 1e21:
            mantissa, _, exponent = number.partition("e")
            numbers.append(f"{mantissa.removesuffix('.0')}e{exponent[0]}{exponent[1:].lstrip('0')}")
        else:
            plain = format(Decimal(number), "f")
            numbers.append(plain.rstrip("0").removesuffix(".") if "." in plain else plain)
        return f"number {len(numbers) - 1}"

    text = encoded({key: marked(value) for key, value in given.items()}).decode()
    for place, number in enumerate(numbers):
        text = text.replace(f'"number {place}"', number)
    return text.encode()


def all_layers(manifest: dict) -> list[dict]:
    return [manifest["config"], *manifest["layers"]]


def short(name: Name) -> str:
    before = f"{name.host}/" if name.host != DEFAULT_HOST else ""
    return f"{before}{name.namespace}/{name.model}:{name.tag}" if before or name.namespace != DEFAULT_NAMESPACE else f"{name.model}:{name.tag}"


def go_quoted(text: str) -> str:
    if "\n" in text or text != text.strip(" "):
        return f'"""{text}"""' if '"' in text else f'"{text}"'
    return text


def written(item: object) -> str:
    return str(item).lower() if isinstance(item, bool) else f"{item:g}" if isinstance(item, float) else str(item)
