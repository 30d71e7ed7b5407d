"""Unsloth: a script or a notebook. It is parsed and never executed; what counts are literal arguments of known calls."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.importers.draft import Draft, Given, Rule, by, copied, lost, needless, switch
from olpack.importers.trainer import ACCUMULATION, EPOCHS, MICRO_BATCH, SCHEDULE, TRAINER_RULES, batch, default_batch, default_epochs
from olpack.quants import quant_type

_MOST_BYTES = 4 << 20
_MOST_NODES = 200_000
_MOST_CHARACTERS = 2_000  # of a value that a name stands for
_DEFAULTS = {  # of learning rate, weight decay, warmup, seed, and the two factors of the rows of a step
    "SFTConfig": (5e-5, 0.01, 0.1, 3407, (4, 2)),  # as Unsloth changes TRL's
    "TrainingArguments": (5e-5, 0.0, 0.0, 42, (8, 1)),
}
_FACTORS = (MICRO_BATCH, ACCUMULATION)
_MODELS = ("FastLanguageModel", "FastModel", "FastVisionModel", "FastLlamaModel", "FastQwen2Model", "FastMistralModel", "FastGemmaModel")
_CONFIGS = ("SFTConfig", "TrainingArguments", "UnslothTrainingArguments")
_TRAINERS = ("SFTTrainer", "UnslothTrainer", "Trainer")
_OTHER_TRAINERS = ("DPOTrainer", "ORPOTrainer", "KTOTrainer", "GRPOTrainer", "PPOTrainer", "RewardTrainer", "CPOTrainer")
_OPERATORS = {ast.Mult: operator.mul, ast.Add: operator.add, ast.Sub: operator.sub, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}
_EMBEDDINGS = ("embed_tokens", "lm_head")
_CODE = "It is the result of code, which olpack does not execute."
_TEMPLATE = (
    "olpack trains and serves the base's own chat template. The nearest way: copy the base into a folder, put the template there as "
    "chat_template.jinja, and name that folder as `base`."
)
_ALL_TOKENS = (
    "Without train_on_responses_only the loss is over all tokens. Target tokens of olpack are the assistant's turns, and all of a plain text."
)


class _Code:
    """What a value is that is no literal."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Call:
    """A call by the last part of its name, the object that it is called on, and its line."""

    name: str
    owner: str
    line: int
    node: ast.Call


class _Script:
    """A parsed script: its calls in order, and the names that stand for one literal."""

    def __init__(self, tree: ast.Module):
        self.calls = sorted(_calls(tree), key=lambda call: (call.line, call.node.col_offset))
        bound = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        self._constants: dict[str, Any] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name) and bound[node.targets[0].id] == 1:
                value = self.value(node.value)
                if not isinstance(value, _Code) and len(repr(value)) <= _MOST_CHARACTERS:
                    self._constants[node.targets[0].id] = value
        self.assigned = [
            (node.targets[0].id, node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        ]

    def value(self, node: ast.expr) -> Any:
        """The literal that an expression is, also by a name or by arithmetic of numbers; `_Code` for anything else."""
        if isinstance(node, ast.Name) and node.id in self._constants:
            return self._constants[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = self.value(node.left), self.value(node.right)
            if all(isinstance(side, int | float) and abs(side) < 1e12 for side in (left, right)):
                try:
                    return _OPERATORS[type(node.op)](left, right)
                except ArithmeticError:
                    pass
        if isinstance(node, ast.List | ast.Tuple):
            values = [self.value(item) for item in node.elts]
            if all(value is None or isinstance(value, str | int | float) for value in values):
                return values
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return _Code(ast.unparse(node))

    def arguments(self, call: _Call) -> dict[str, tuple[int, Any]]:
        """The line and the value of each keyword argument, those of `**{…}` among them."""
        found = {}
        for keyword in call.node.keywords:
            if keyword.arg is not None:
                found[keyword.arg] = keyword.value.lineno, self.value(keyword.value)
            else:
                value = self.value(keyword.value)
                pairs = value.items() if isinstance(value, dict) else [(f"**{ast.unparse(keyword.value)[:60]}", _Code(ast.unparse(keyword.value)))]
                found |= {str(key): (keyword.value.lineno, inner) for key, inner in pairs}
        return found


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what stands in it, without the bodies of `if False`."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _calls(tree: ast.Module) -> Iterator[_Call]:
    for node in _run(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield _Call(node.func.id, "", node.lineno, node)
            elif isinstance(node.func, ast.Attribute):
                owner = node.func.value
                yield _Call(node.func.attr, owner.id if isinstance(owner, ast.Name) else "", node.lineno, node)


def read(draft: Draft) -> None:
    """Read a script or a notebook.

    Raises:
        OlpackError: it is no Python, names no call of Unsloth, or trains on preferences or rewards.
    """
    places: list[str] = []
    script = _Script(_parsed(draft, places))

    def given(prefix: str, key: str, line: int, value: Any) -> Given:
        return Given(
            draft.place(places[line - 1] if places else line),
            f"{prefix}({key})" if key else prefix,
            str(value) if isinstance(value, _Code) else value,
        )

    found = {call.name for call in script.calls}
    loads = [call for call in script.calls if call.name == "from_pretrained" and call.owner in _MODELS]
    if other := sorted(found.intersection(_OTHER_TRAINERS)):
        raise OlpackError(
            f"{draft.file} trains with {other[0]}, and olpack fine-tunes on rows with their answers (SFTTrainer).",
            "Train with Unsloth, then import the folder of the adapter.",
        )
    if not loads:
        raise OlpackError(f"{draft.file} calls no {_MODELS[0]}.from_pretrained.", "Name a script or a notebook of Unsloth.")

    settings: list[Given] = []
    code: list[Given] = []
    chosen = [loads[0], *(call for call in script.calls if call.name == "get_peft_model" and call.owner in _MODELS)]
    chosen += [call for call in script.calls if call.name in _CONFIGS + _TRAINERS]
    for call in chosen:
        arguments = script.arguments(call)
        if call is loads[0] and call.node.args:
            arguments = {"model_name": (call.line, script.value(call.node.args[0])), **arguments}
        for key, (line, value) in arguments.items():
            one = given(key, "", line, value)
            if key in _IGNORED:
                continue
            if isinstance(value, _Code):
                if key not in ("train_dataset", "eval_dataset"):
                    code.append(one)
            else:
                settings.append(one)
    factors = by(batch(_FACTORS, next((values[-1] for name, values in _DEFAULTS.items() if name in found), None)), "train.batch_size")
    draft.read(settings, RULES | dict.fromkeys(_FACTORS, factors))
    for one in code:
        if one.key in ("fp16", "bf16", "dtype"):
            draft.need_not(one, TRAINER_RULES["bf16"].note)
        elif one.key == "data_collator":
            draft.need_not(one, "Rows are packed without padding, and attention does not cross rows.")
        else:
            draft.lose(one, _CODE)
    _rows(draft, script, given)
    _loss(draft, script, given)
    _quants(draft, script, given)
    for call in script.calls:
        if call.name == "get_chat_template":
            name = script.arguments(call).get("chat_template", (call.line, None))[1]
            draft.lose(given("get_chat_template", "chat_template", call.line, name), _TEMPLATE)
            break
    _defaults(draft, script)


def _parsed(draft: Draft, places: list[str]) -> ast.Module:
    """The syntax tree; of a notebook, of its code cells one after the other, whose lines `places` then names."""
    path = draft.file
    bounded_json.check_regular(path)
    if path.suffix == ".ipynb":
        notebook = bounded_json.read_object(path, "Save the notebook again.", most=_MOST_BYTES * 4)
        lines = []
        cells = notebook.get("cells")
        for number, cell in enumerate(cells if isinstance(cells, list) else [], 1):
            if isinstance(cell, dict) and cell.get("cell_type") == "code":
                source = cell.get("source")
                text = "".join(str(part) for part in source) if isinstance(source, list) else str(source or "")
                if text.lstrip().startswith("%%"):
                    continue
                instead = None
                for at, line in enumerate(text.splitlines(), 1):
                    # A line for the shell or for IPython is no Python, nor are those that continue it; `pass` keeps the block whole.
                    if instead is None and line.lstrip().startswith(("!", "%")):
                        instead = f"{line[: len(line) - len(line.lstrip())]}pass"
                    lines.append(line if instead is None else instead)
                    if not line.endswith("\\"):
                        instead = None
                    places.append(f"cell {number}, line {at}")
        text = "\n".join(lines)
    else:
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise OlpackError(f"{path} has {path.stat().st_size:,} bytes, and at most {_MOST_BYTES:,} are read.", "Name the script alone.")
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise OlpackError(f"{path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    try:
        tree = ast.parse(text)
        if sum(1 for _ in ast.walk(tree)) > _MOST_NODES:
            raise OlpackError(f"{path} is too long: more than {_MOST_NODES:,} expressions.", "Name the training script alone.")
    except SyntaxError as error:
        place = f", {places[error.lineno - 1]}" if places and error.lineno and error.lineno <= len(places) else f", line {error.lineno}"
        raise OlpackError(f"{path}{place}: {error.msg}.", "It must be Python 3.") from None
    except (ValueError, RecursionError, MemoryError):
        raise OlpackError(
            f"{path} cannot be parsed: it is nested too deep, or contains the character of the number 0.", "It must be Python 3."
        ) from None
    return tree


def _rows(draft: Draft, script: _Script, given) -> None:
    """`load_dataset` becomes a source: the one that the trainer's `train_dataset` is made from."""
    loads = [call for call in script.calls if call.name == "load_dataset"]
    named = {}
    for call in script.calls:
        if call.name in _TRAINERS:
            for key, (_line, value) in script.arguments(call).items():
                if key in ("train_dataset", "eval_dataset") and isinstance(value, _Code):
                    named[key] = _origin(script, str(value), loads)
            break
    if "train_dataset" not in named and len(loads) == 1:
        named["train_dataset"] = loads
    taken = []
    for key, to in (("train_dataset", "data.train"), ("eval_dataset", "data.eval")):
        calls = named.get(key, [])
        if len(calls) == 1:
            _load(draft, script, given, calls[0], to)
            taken.append(calls[0])
    for call in loads:
        if call not in taken and draft.settings.get("data.train"):
            continue
        if call not in taken:
            path = script.value(call.node.args[0]) if call.node.args else None
            draft.lose(
                given("load_dataset", "", call.line, path), "Code makes the training rows of several data sets, and olpack does not execute it."
            )
    for call in script.calls:
        if call.name in ("map", "from_list", "from_dict", "from_pandas", "standardize_sharegpt", "standardize_data_formats", "to_sharegpt"):
            what = ast.unparse(call.node)
            if call.name.startswith("standardize"):
                draft.need_not(given(call.name, "", call.line, None), "olpack reads ShareGPT rows as they are.")
            elif isinstance(call.node.func, ast.Attribute):  # and not Python's own `map`
                draft.lose(
                    given(call.name, "", call.line, what[:80]),
                    "It makes other rows, and olpack does not execute it. olpack reads the rows by their keys.",
                )


def _origin(script: _Script, name: str, loads: list[_Call]) -> list[_Call]:
    """The calls of `load_dataset` that a variable is made from, followed through assignments."""
    names, found = {name.partition("[")[0].partition(".")[0]}, []
    for _ in range(10):
        values = [value for target, value in script.assigned if target in names]
        inside = {id(node) for value in values for node in ast.walk(value)}
        found = [call for call in loads if id(call.node) in inside]
        used = {node.id for value in values for node in ast.walk(value) if isinstance(node, ast.Name)} & {
            target for target, _value in script.assigned
        }
        if used <= names:
            break
        names |= used
    return found


def _load(draft: Draft, script: _Script, given, call: _Call, to: str) -> None:
    positions = [script.value(node) for node in call.node.args]
    arguments = {key: value for key, (_line, value) in script.arguments(call).items()}
    path = positions[0] if positions else arguments.get("path")
    one = given("load_dataset", "", call.line, path)
    files = arguments.get("data_files")
    if isinstance(files, dict):
        files = files.get("train") if to == "data.train" else files.get("test") or files.get("validation")
    if any(isinstance(value, _Code) for value in (path, files)):
        draft.lose(one, _CODE)
        return
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    hub = {}
    for key, name in (("split", "split"), ("name", "subset"), ("revision", "revision")):
        if isinstance(arguments.get(key), str):
            hub[name] = arguments[key]
    if len(positions) > 1 and isinstance(positions[1], str):
        hub["subset"] = positions[1]
    source = draft.source(one, files if files is not None else path, **hub)
    if source is None:
        return
    if "file" in source and hub.get("split", "train") != "train":
        draft.lose(given("load_dataset", "split", call.line, hub["split"]), "A file is read as a whole.")
    draft.carry(one, {to: source["file"] if source.keys() == {"file"} else source})


def _loss(draft: Draft, script: _Script, given) -> None:
    """Which tokens enter the loss."""
    only = next((call for call in script.calls if call.name == "train_on_responses_only"), None)
    if only:
        draft.need_not(given("train_on_responses_only", "", only.line, None), "Target tokens are the assistant's turns.")
    elif not (draft.value("assistant_only_loss") is True or draft.value("completion_only_loss") is True):
        trainer = next((call for call in script.calls if call.name in _TRAINERS), None)
        if trainer:
            draft.lose(given(trainer.name, "", trainer.line, None), _ALL_TOKENS)


def _quants(draft: Draft, script: _Script, given) -> None:
    """`save_pretrained_gguf(…, quantization_method = …)` becomes `quants`, outside of `if False`."""
    names: list[str] = []
    first = None
    for call in script.calls:
        if call.name not in ("save_pretrained_gguf", "push_to_hub_gguf"):
            continue
        line, value = script.arguments(call).get("quantization_method", (call.line, None))
        asked = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        for name in asked:
            try:
                names.append(quant_type(str(name)).name)
                first = first or given(call.name, "quantization_method", line, value)
            except OlpackError:
                draft.lose(given(call.name, "quantization_method", line, name), "olpack has no quant type of this name.")
    if names and first:
        draft.carry(first, {"quants": list(dict.fromkeys(names))}, "All that the script names.")


def _defaults(draft: Draft, script: _Script) -> None:
    """What the script leaves to Unsloth, which gives SFTConfig other defaults than TRL, or to transformers."""
    names = {call.name for call in script.calls}
    if any(call.name == "get_peft_model" for call in script.calls):
        draft.default({"train.alpha": 16}, "lora_alpha", 16)
    if not draft.given.keys() & {"load_in_4bit", "load_in_8bit", "load_in_16bit"}:
        draft.default({"train.quantization": "nf4"}, "load_in_4bit", True)
    if not names.intersection(_DEFAULTS):
        return
    learning_rate, weight_decay, warmup, seed, rows = next(values for name, values in _DEFAULTS.items() if name in names)
    draft.default({"train.learning_rate": learning_rate}, "learning_rate", learning_rate)
    default_batch(draft, _FACTORS, rows)
    default_epochs(draft, EPOCHS, 3)
    if SCHEDULE not in draft.given:
        draft.default({"train.schedule": "linear"}, SCHEDULE, "linear")
    if not draft.given.keys() & {"warmup_ratio", "warmup_steps"}:
        draft.default({"train.warmup": warmup}, "warmup_ratio", warmup)
    draft.default({"train.weight_decay": weight_decay}, "weight_decay", weight_decay)
    draft.default({"train.seed": seed}, "seed", seed)
    draft.default({"train.keep": "last"}, "load_best_model_at_end", False)


def _four_bits(draft: Draft, given: Given) -> None:
    if given.value is True:
        draft.carry(given, {"train.quantization": "nf4"})
    elif draft.value("load_in_8bit") is True or draft.value("load_in_16bit") is True:
        draft.need_not(given, "It is off.")
    else:
        draft.carry(given, {"train.quantization": "none"}, "The base stays in 16 bits.")


def _targets(draft: Draft, given: Given) -> None:
    if not isinstance(given.value, list):
        draft.carry(given, {"train.target_modules": given.value})
        return
    whole = [name for name in given.value if name in _EMBEDDINGS]
    to: dict[str, Any] = {"train.target_modules": [name for name in given.value if name not in _EMBEDDINGS]}
    if whole:
        to["train.modules_to_save"] = whole
    draft.carry(given, to, "Unsloth trains embedding and output layer as a whole." if whole else "")


def _loftq(draft: Draft, given: Given) -> None:
    draft.carry(given, {"train.initialization": "loftq"}, "With olpack's quantization of the base.")


def _bias(draft: Draft, given: Given) -> None:
    if given.value == "none":
        draft.need_not(given, "olpack trains no biases.")
    else:
        draft.lose(given, "olpack trains no biases.")


def _length(draft: Draft, given: Given) -> None:
    draft.carry(given, {"data.max_length": given.value}, "A longer row is an error with its line; the trainer cuts it.")


def _full(draft: Draft, given: Given) -> None:
    if given.value is True:
        draft.lose(given, "It trains all weights. olpack trains an adapter.")
    else:
        draft.need_not(given, "olpack trains an adapter.")


def _packing(draft: Draft, given: Given) -> None:
    draft.need_not(given, "Rows are packed without padding, and attention does not cross rows.")


def _text_field(draft: Draft, given: Given) -> None:
    draft.need_not(given, "olpack reads the rows by their keys, and writes them with the base's chat template.")


_IGNORED = ("model", "tokenizer", "processing_class", "args")  # which pass on what other calls make
_LAYERS = "The nearest setting is train.target_modules, a list of names or a regular expression for full names."

RULES: dict[str, Rule] = {
    "model_name": by(lambda draft, given: draft.base(given, given.value), "base"),
    "revision": copied("revision"),
    "max_seq_length": by(_length, "data.max_length", "A longer row is an error with its line; the trainer cuts it."),
    "max_length": by(_length, "data.max_length", "A longer row is an error with its line; the trainer cuts it."),
    "load_in_4bit": by(_four_bits, "train.quantization", "False: none."),
    "load_in_8bit": switch("train.quantization", "int8"),
    "load_in_16bit": switch("train.quantization", "none", "none."),
    "full_finetuning": by(_full, "", "olpack trains an adapter."),
    "dtype": TRAINER_RULES["bf16"],
    "token": needless("huggingface_hub's own login, or HF_TOKEN, is used."),
    "device_map": needless("The nearest settings are train.gpus and train.sharding."),
    "trust_remote_code": lost("olpack runs no code that a model contains."),
    "fast_inference": needless("It is for generation while training."),
    "gpu_memory_utilization": needless("olpack chooses micro-batches that fit the memory."),
    "r": copied("train.rank"),
    "lora_alpha": copied("train.alpha"),
    "lora_dropout": copied("train.dropout"),
    "target_modules": by(_targets, "train.target_modules", "embed_tokens and lm_head become train.modules_to_save."),
    "modules_to_save": copied("train.modules_to_save"),
    "bias": by(_bias, "", "olpack trains no biases."),
    "use_gradient_checkpointing": TRAINER_RULES["gradient_checkpointing"],
    "random_state": copied("train.seed", "The seed of the adapter's first values; `seed` of the trainer replaces it."),
    "use_rslora": switch("train.method", "rslora"),
    "use_dora": switch("train.method", "dora"),
    "loftq_config": by(_loftq, "train.initialization"),
    "init_lora_weights": lost("The nearest setting is train.initialization."),
    "layers_to_transform": lost(_LAYERS),
    "finetune_vision_layers": lost("olpack trains the text model alone."),
    "finetune_language_layers": needless("olpack trains the text model."),
    "finetune_attention_modules": needless(_LAYERS),
    "finetune_mlp_modules": needless(_LAYERS),
    "max_lora_rank": needless("It is for generation while training."),
    **dict.fromkeys(_FACTORS, by(batch(_FACTORS, None), "train.batch_size", f"{MICRO_BATCH} × {ACCUMULATION}.")),
    "embedding_learning_rate": lost("olpack has one learning rate."),
    "packing": by(_packing, "", "Rows are packed without padding, and attention does not cross rows."),
    "padding_free": by(_packing, "", "Rows are packed without padding, and attention does not cross rows."),
    "dataset_text_field": by(_text_field, "", "olpack reads the rows by their keys, and writes them with the base's chat template."),
    "assistant_only_loss": needless("Target tokens are the assistant's turns."),
    "completion_only_loss": needless("Target tokens are the assistant's turns."),
    "formatting_func": lost(_CODE),
    **TRAINER_RULES,
}
"""Names of keyword arguments in an Unsloth script."""

TABLE_OF_CALLS = (
    ("load_dataset", "data.train", "The one that train_dataset is made from: path or data_files, split, name, revision."),
    ("train_on_responses_only", "", "Target tokens are the assistant's turns. Without it the loss of Unsloth is over all tokens."),
    ("get_chat_template", "", _TEMPLATE),
    ("dataset.map, Dataset.from_…", "", "olpack does not execute code, and reads the rows by their keys."),
    ("save_pretrained_gguf, push_to_hub_gguf", "quants", "quantization_method."),
    ("DPOTrainer, GRPOTrainer, …", "", "Refused: olpack fine-tunes on rows with their answers."),
)
"""What becomes of calls, for the documentation: (call, recipe key, note)."""


def is_script(path: Path) -> bool:
    """Whether a file is a script or a notebook, by its name."""
    return path.suffix.lower() in (".py", ".ipynb")
