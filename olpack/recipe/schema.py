"""The keys of `recipe.yaml`: one pydantic model, which refuses unknown keys.

A field's docstring is its text in docs/reference/recipe.md and in the JSON schema; a section's docstring stands above its table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from olpack.data.rows import Form as _Form
from olpack.deploy.parameters import PARAMETERS, check_parameters
from olpack.errors import OlpackError
from olpack.quants import QUANT_TYPES, TENSOR_TYPES, Rounding, check_tensor_types, quant_type
from olpack.recipe.tasks import KEYS, parse_task

_MOST = (1 << 31) - 1  # of tokens, rows and steps, which torch and llama.cpp count in 32 bits


class _Section(BaseModel):
    # Strict: `rank: "16"` and `rank: yes` are errors, not values to convert.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class DataSource(_Section):
    """One source of rows. `train` and `eval` of `data` take a path, a source, or a list of paths and sources."""

    file: Annotated[str, Field(min_length=1)] | None = None
    """A file or a folder of files, relative to the recipe: .jsonl, .json, .csv, .tsv or .parquet."""
    hub: Annotated[str, Field(min_length=1)] | None = None
    """A data set on the Hugging Face Hub, such as `HuggingFaceH4/no_robots`, in place of a file."""
    split: str = "train"
    """Split of a Hub data set, or a part of it: `train[:1000]`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    subset: str | None = None
    """Configuration of a Hub data set that has several configurations."""
    form: _Form | None = None
    """Form of the rows of this source. null: `data.form`."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often an epoch trains on each row of this source. 2: twice. 0.5: once on half of the rows, never on the others. 1.5: once on all rows,
    and a second time on half of them. The hash of a row's content decides which half, so each epoch and each build take the same half."""

    @model_validator(mode="after")
    def _one_place(self) -> DataSource:
        if (self.file is None) == (self.hub is None):
            raise ValueError("a source is either a `file` or a `hub` data set.")
        if self.file is not None and (only := sorted(self.model_fields_set & {"split", "revision", "subset"})):
            raise ValueError(f"{only[0]} goes with a `hub` data set; a file has none.")
        return self


def _source_tag(value: Any) -> str | None:
    tags = {str: "str", list: "list[source]", dict: "source", DataSource: "source"}
    return next((tag for kind, tag in tags.items() if isinstance(value, kind)), None)


# Only the kind that the recipe gives is validated, so that a mistake in a source is not also reported as "not a string".
_PLACE = "a source is a file, {file: …} or {hub: …}"
_File = Annotated[str, Field(min_length=1), Tag("str")]
_OneSource = Annotated[_File | Annotated[DataSource, Tag("source")], Discriminator(_source_tag, "source", _PLACE)]
_Sources = Annotated[
    _File | Annotated[DataSource, Tag("source")] | Annotated[list[_OneSource], Field(min_length=1), Tag("list[source]")],
    Discriminator(_source_tag, "source", f"{_PLACE}, or a list of these"),
]


class Data(_Section):
    """Training and held-out rows. docs/data.md describes their sources and forms."""

    train: _Sources | None = None
    """Training rows: a file or a folder relative to the recipe; {file: …} or {hub: user/name}, with split, revision, subset, form and weight;
    or a list of these. Required, except with `train.adapter`."""
    eval: _Sources | None = None
    """Held-out rows. null: `eval_share` of the training rows, chosen by the hash of each row. Required with `train.adapter`."""
    eval_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the training rows that is held out if there is no `eval`."""
    form: Literal["auto", _Form] = "auto"
    """Form of the rows. `auto`: the keys of the first rows of each file decide."""
    learn: Literal["all", "last"] = "all"
    """Target tokens: every turn of the assistant (`all`), or the last one of each row (`last`)."""
    max_length: Annotated[int, Field(ge=16, le=_MOST)] = 2048
    """Most tokens of a row. A longer row is an error, because a cut answer trains the model to stop in the middle."""

    @field_validator("eval")
    @classmethod
    def _eval_has_no_weight(cls, value: Any) -> Any:
        if any(isinstance(source, DataSource) and source.weight != 1 for source in (value if isinstance(value, list) else [value])):
            raise ValueError("weight goes with data.train; held-out rows are scored once each.")
        return value

    def sources(self, which: Literal["train", "eval"]) -> list[DataSource]:
        """The sources of one side, each with its form; empty if the recipe has none."""
        side = self.train if which == "train" else self.eval
        listed = side if isinstance(side, list) else [side] if side is not None else []
        named = [DataSource(file=source) if isinstance(source, str) else source for source in listed]
        return [source if source.form or self.form == "auto" else source.model_copy(update={"form": self.form}) for source in named]


_SOFT_PROMPTS = ("prompt-tuning", "prompt", "prefix-tuning", "prefix", "p-tuning", "ptuning", "soft-prompt")


def _no_soft_prompt(value: Any) -> Any:
    """Refuse methods of peft whose result a GGUF cannot contain, with the reason."""
    method = str(value).lower().replace("_", "-")
    if method in _SOFT_PROMPTS:
        raise ValueError(f"{value} trains vectors before the prompt, and a GGUF has no place for them; lora and dora are merged into its weights")
    if method in ("ia3", "(ia)3"):
        raise ValueError("olpack does not train ia3, which only rescales activations; vera is as small and can express more")
    return value


class Train(_Section):
    """Fine-tuning. docs/training.md describes methods, quantized bases and merges."""

    method: Annotated[Literal["lora", "rslora", "dora", "vera"], BeforeValidator(_no_soft_prompt)] = "lora"
    """What is trained: `lora`, `rslora` (scaled by alpha / √rank), `dora` (and a norm per row), `vera` (vectors between shared random matrices)."""
    initialization: Literal["default", "pissa", "loftq"] = "default"
    """Initial value of lora and rslora: no change, the weight's principal components (`pissa`), or the quantization error (`loftq`)."""
    quantization: Literal["nf4", "fp4", "int8", "hqq4", "hqq8", "none"] = "nf4"
    """Quantization of the frozen base weights: 4-bit NormalFloat (QLoRA) or float, 8-bit integers (LLM.int8), HQQ in 4 or 8 bits, or none.
    A base that comes quantized (GPTQ, AWQ, …) keeps its own quantization."""
    double_quantization: bool = True
    """Quantize the scales of nf4 and fp4 as well: 0.4 bits per weight less."""
    merge_base: Literal["original", "dequantized"] = "original"
    """Weights that the adapter is merged into: the original ones, or those that training used after quantization."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the low-rank update. 256 is usual for vera, whose matrices are shared and not trained."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32
    """The update is scaled by alpha / rank. vera ignores it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear` (every linear layer of the text model except the output head), a list of names, or a regular
    expression that must match the full name, as in peft."""
    modules_to_save: list[str] = Field(default=[])
    """Modules that are trained in full and replaced in the export, such as embed_tokens, lm_head or norm."""
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 2
    """Passes over the training rows."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to zero; `constant` stays at the peak."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises to its peak."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Rows per optimizer step."""
    micro_batch_tokens: Annotated[int, Field(ge=16, le=_MOST)] | Literal["auto"] = "auto"
    """Most tokens of a micro-batch. `auto`: 512 on a CPU, as many as fit on a GPU."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. `auto`: if the GPU fits too few tokens without."""
    products: Literal["bf16", "fp8", "auto"] = "bf16"
    """Products with frozen base weights: in 16 bits, or in fp8 (e4m3, one scale for each row) on a GPU of Ada, Hopper or a later generation.
    `auto`: in fp8 where that is faster."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Decoupled weight decay of AdamW on the adapter."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e12)] = 1.0
    """Gradients with a larger norm are scaled down to this one."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Seed of the adapter's initial value, the order of rows and dropout."""
    eval_every: Annotated[int, Field(ge=1, le=_MOST)] | Literal["auto"] = "auto"
    """Steps between two evaluations on the held-out rows. `auto`: ten evaluations, or fewer if they take more than a tenth of the time."""
    keep: Literal["best", "last"] = "best"
    """Adapter that is written: that of the evaluation with the lowest loss (`best`), or that of the last step (`last`)."""
    patience: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    """Stop after this many evaluations in a row without a lower loss. null: train to the end."""
    gpus: Annotated[int, Field(ge=1, le=65_536)] | Literal["all"] = 1
    """Number of GPUs. The rows of a step, and therefore the loss curve, are the same for any number."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """Base on several GPUs: whole on each (`none`), or spread over them (`full`, FSDP2). `auto`: spread if the whole base does not fit."""
    launch: str | None = None
    """Launcher in place of `gpus`, with its own options: `torchrun --nproc-per-node 2`, `accelerate launch --num-processes 2`."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[])
    """Trackers that get the metrics besides `metrics.jsonl`: TensorBoard (in `build/NAME/tensorboard`), Weights & Biases."""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """Folder of a finished adapter in peft's format, relative to the recipe. The build copies it and trains nothing, so of the other keys of
    `train` only `merge_base` may be set."""

    @model_validator(mode="after")
    def _fit_together(self) -> Train:
        if self.initialization != "default" and self.method in ("dora", "vera"):
            raise ValueError(f"initialization: {self.initialization} goes with method lora or rslora, not with {self.method}.")
        if self.quantization == "none" and (self.initialization == "loftq" or self.merge_base == "dequantized"):
            setting = "initialization: loftq" if self.initialization == "loftq" else "merge_base: dequantized"
            raise ValueError(f"{setting} corrects the error of quantization, and quantization: none has no error.")
        if self.adapter and (idle := [key for key in type(self).model_fields if key in self.model_fields_set - {"adapter", "merge_base"}]):
            raise ValueError(f"adapter names a finished adapter, so nothing is trained: leave out {', '.join(idle)}.")
        return self


class Message(_Section):
    """One turn of `modelfile.messages`."""

    role: Literal["system", "user", "assistant"]
    """Speaker of the turn."""
    content: str
    """Text of the turn."""


_JSON_TYPES: dict[str, dict[str, Any]] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "texts": {"type": "array", "items": {"type": "string"}},
}
_PARAMETERS_SCHEMA = {
    "type": "object",
    "properties": {
        name: _JSON_TYPES[known.kind] | {key: bound for key, bound in (("minimum", known.low), ("maximum", known.high)) if bound is not None}
        for name, known in PARAMETERS.items()
    },
    "additionalProperties": False,
}


class Modelfile(_Section):
    """What the Modelfile of every quant contains."""

    system: str | None = None
    """System prompt. null: the chat template's own, if it has one."""
    parameters: Annotated[dict[str, Any], WithJsonSchema(_PARAMETERS_SCHEMA)] = Field(default={})
    """Ollama parameters: temperature, num_ctx, stop, … Default of `num_ctx`: 4096, or the model's context length if that is shorter."""
    license: str | None = None
    """Licence text or name; `ollama show --license` prints it."""
    messages: list[Message] = Field(default=[])
    """Turns at the start of every conversation."""
    template: str | None = None
    """Go template, for servers that need one. null: the trained chat template, which the GGUF contains."""

    @field_validator("parameters")
    @classmethod
    def _known_parameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        if problems := check_parameters(value):
            raise ValueError("; ".join(problems))
        return value


class Export(_Section):
    """What decides the bytes of the quants."""

    importance: Literal["none", "train"] | str = "none"
    """Importance matrix, which makes small quants lose less: `train` collects one on the training rows; a path is a file in llama.cpp's format."""
    tensor_types: dict[str, Annotated[str, WithJsonSchema({"anyOf": [{"enum": list(TENSOR_TYPES)}, {"type": "string"}]})]] = Field(default={})
    """Types of single tensors in quantized files. A key is a regular expression for a part of the tensor's name, and the first match counts;
    a value is a type of ggml: q6_K, q8_0, …"""

    rounding: Rounding = "ggml"
    """How blocks of weights are made: `ggml` as llama-quantize does, bit for bit; `search` minimizes their squared error, weighted by the
    importance matrix if there is one; `learned` minimizes the change of each matrix's output on training rows. Files have the same form, size and
    speed, and lose less."""
    scale_steps: int = Field(default=50, ge=0, le=10_000)
    """With `rounding: learned`, for quants most of whose weights are in Q2_K, Q3_K or Q4_0: steps in which the scales of their blocks are trained to
    keep what the unquantized fine-tune predicts on training rows. 0: they are not trained."""

    @field_validator("tensor_types")
    @classmethod
    def _known_types(cls, value: dict[str, str]) -> dict[str, str]:
        try:
            return check_tensor_types(value)
        except OlpackError as error:
            raise ValueError(str(error)) from None


def _known_task(item: dict[str, Any]) -> dict[str, Any]:
    parse_task(item)
    return item


_TASK_SCHEMA = {"type": "object", "properties": {key: {} for key in KEYS}, "additionalProperties": False}
_Task = Annotated[dict[str, Any], AfterValidator(_known_task), WithJsonSchema(_TASK_SCHEMA)]

# Only one of the two is validated, so that a mistake in a task is not also reported as "not a string".
_Tasks = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[_Task], Tag("list[task]")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "list[task]"),
]


class Compare(_Section):
    """What the comparison of the quants measures."""

    eval_rows: Annotated[int, Field(ge=1, le=_MOST)] = 100
    """Most held-out rows that are scored."""
    prompts: list[str] = Field(default=[])
    """Prompts that every quant answers; the report shows the answers side by side. []: the first three held-out requests."""
    tasks: _Tasks = Field(default=[])
    """Prompts with a check of the answer, on which every quant is scored: a list, or a JSONL file relative to the recipe."""
    run_answers: bool = False
    """Consent to run code for `tasks`: the Python of answers (`python_asserts`), in a sandbox, and your own files (`function`), without one.
    docs/security.md lists what the sandbox stops and what it does not."""
    suites: list[str] = Field(default=[])
    """Tasks of lm-evaluation-harness (mmlu, gsm8k, …) that every quant runs: its names, or names of YAML files in the recipe's folder
    `suites`. They need `pip install 'lm-eval>=0.4.13'`."""
    suite_limit: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    """Most questions of each suite's task. null: all of them."""
    prompt_tokens: list[Annotated[int, Field(ge=16, le=_MOST)]] = Field(default=[128, 512], min_length=1)
    """Lengths, in tokens, of the prompts that measure speed."""
    generated_tokens: Annotated[int, Field(ge=8, le=1_000_000)] = 64
    """Tokens that each timed run generates."""
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Timed runs per figure, in two rounds. The table shows their median, the report their spread."""
    answer_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Most tokens of an answer to a prompt or a task."""
    clients: list[Annotated[int, Field(ge=1, le=256)]] = Field(default=[])
    """Numbers of simultaneous clients to measure through a server, such as [1, 2, 4, 8]. []: none, because the measurement takes long."""
    max_loss: Annotated[float, Field(gt=0, le=1000)] = 0.01
    """The recommended quant is the smallest whose perplexity is at most this share above the best."""
    reference: bool = True
    """Compare every quant with the unquantized fine-tune (KL divergence, same top tokens), and measure the untuned base at one quant.
    The comparison uses 2 bytes per parameter and at most 1.4 GB more of the disk while it runs."""
    other_text: Literal["builtin", "none"] | str = "builtin"
    """Text outside the domain of your rows, on which every quant is compared with the unquantized fine-tune too: it shows what an importance matrix
    or a rounding from your rows costs elsewhere. A path is a text file relative to the recipe, with an empty line between two texts; `builtin` is
    six short ones in English. It goes with `reference: true`."""
    ggml_rounding: Literal["none", "rows", "tasks"] = "rows"
    """Where `export.rounding` is not `ggml`: measure each quant by ggml's rounding too, on the held-out rows, or on these and the `tasks`. `none`
    saves a quantization and a scoring of each quant. It goes with `reference: true`."""
    merged: bool = False
    """With `package: adapter`: measure the fine-tune as `package: merged` would serve it too, in the same quants: quality, speed, bytes. Each merged
    file is written for the comparison and removed after it; while their speeds are measured, both files are in memory."""


_BUDGETS = {"budget": ("bpw", "{budget: 4.6 bpw}"), "size": ("b", "{size: 5 GB}")}  # key: (end of its value, an example)


def _budget(item: dict[str, Any]) -> str:
    """The name of a quant that is given as a budget."""
    examples = " or ".join(example for _, example in _BUDGETS.values())
    if len(item) != 1 or (key := next(iter(item))) not in _BUDGETS:
        raise ValueError(f"a quant is a name such as Q4_K_M, {examples}.")
    unit, example = _BUDGETS[key]
    value = item[key]
    try:
        quant = quant_type(value)
    except OlpackError:
        quant = None
    if quant is None or quant.budget is None or not quant.tag.endswith(unit):
        raise ValueError(f"'{value}' is no {key}: write it like {example}.")
    return quant.name


_Quant = Annotated[
    str,
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(QUANT_TYPES)},
                {"type": "string"},
                *({"type": "object", "properties": {key: {"type": "string"}}, "required": [key], "additionalProperties": False} for key in _BUDGETS),
            ]
        }
    ),
]


class Recipe(_Section):
    """The top level of a recipe."""

    base: str
    """`builtin/tiny-coder`, a folder with a Hugging Face model, or a Hub id such as `Qwen/Qwen3-0.6B`; or a GGUF: its path, `owner/repo:file.gguf` on
    the Hub, `ollama/NAME` of the Ollama server, or `builtin/smollm2-135m`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    data: Data
    """Training and held-out rows."""
    train: Train = Field(default_factory=Train)
    """Settings of the fine-tuning."""
    quants: Annotated[list[_Quant], Field(min_length=1)] = Field(default=["Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0"])
    """Quant types of llama.cpp, or budgets: {budget: 4.6 bpw} (bits per weight) or {size: 5 GB} (of the whole file). In a budget, each tensor
    gets the type that loses least on the training rows."""
    export: Export = Field(default_factory=Export)
    """Importance matrix and types of single tensors."""
    package: Literal["merged", "adapter"] = "merged"
    """`merged`: each quant contains the fine-tuned weights. `adapter`: packages share the quants of the base, and each adds a small LoRA file."""
    modelfile: Modelfile = Field(default_factory=Modelfile)
    """System prompt, parameters and licence of the served model."""
    compare: Compare = Field(default_factory=Compare)
    """Settings of the comparison."""

    _name: str = PrivateAttr("")
    _folder: Path = PrivateAttr(Path())
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("quants", mode="before")
    @classmethod
    def _budgets_by_name(cls, value: Any) -> Any:
        return [_budget(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value

    @field_validator("quants")
    @classmethod
    def _known_quants(cls, value: list[str]) -> list[str]:
        try:
            names = [quant_type(quant).name for quant in value]
        except OlpackError as error:
            raise ValueError(str(error)) from None
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))} is listed twice.")
        return names

    @model_validator(mode="after")
    def _revision_of_hub_id(self) -> Recipe:
        if self.revision and self.base.startswith(("builtin/", "ollama/")):
            raise ValueError(f"revision goes with a Hub id; {self.base} has none.")
        return self

    @model_validator(mode="after")
    def _rows_for_what_is_done(self) -> Recipe:
        if self.train.adapter is None:
            if self.data.train is None:
                raise ValueError("data.train is missing: it names the training rows.")
            return self
        if self.data.eval is None:
            raise ValueError(
                "data.eval is missing: train.adapter names a finished adapter, and the quants are compared on rows that it was not trained on."
            )
        reads = ["export.importance: train"] if self.export.importance == "train" else [name for name in self.quants if quant_type(name).budget]
        reads += ["export.rounding: learned"] if self.export.rounding == "learned" else []
        if reads and self.data.train is None:
            raise ValueError(f"{reads[0]} reads training rows: name some as data.train.")
        return self

    @model_validator(mode="after")
    def _shared_quants_are_plain(self) -> Recipe:
        if self.package == "adapter" and self.export != Export():
            raise ValueError(
                "export goes with package: merged; the quants of a base are shared by packages, and none of them decides for the others."
            )
        if self.package == "merged" and self.compare.merged:
            raise ValueError("compare.merged goes with package: adapter; the quants of this package are merged already.")
        if self.package == "adapter" and (budgets := [name for name in self.quants if quant_type(name).budget]):
            raise ValueError(f"{budgets[0]} goes with package: merged; its types are chosen by what this package's training rows lose.")
        return self

    @model_validator(mode="after")
    def _adapter_file_is_plain(self) -> Recipe:
        wrong = [f"method: {self.train.method}"] if self.train.method in ("dora", "vera") else []
        wrong += ["modules_to_save"] if self.train.modules_to_save else []
        wrong += ["merge_base: dequantized"] if self.train.merge_base == "dequantized" else []
        if self.package == "adapter" and wrong:
            raise ValueError(f"train.{wrong[0]} goes with package: merged; a LoRA file for a shared base only adds products of two matrices.")
        return self

    @property
    def name(self) -> str:
        """The package's name: that of its folder."""
        return self._name

    @property
    def folder(self) -> Path:
        """Folder of the recipe and its data."""
        return self._folder

    def origin(self, key: str) -> str:
        """Origin of a setting: "recipe.yaml:5", "--set" or "default"."""
        return self._origins.get(key, "default")

    def settings(self) -> dict[str, Any]:
        """Every setting as dotted key and value, in the schema's order."""
        return dict(_flatten(self.model_dump(), ""))


def json_schema() -> dict[str, Any]:
    """The JSON schema of `recipe.yaml`, for editors and other programs. It has no `$id`, so any copy of it can be named by its path."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **Recipe.model_json_schema()}


def _flatten(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and key not in ("parameters", "tensor_types"):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
