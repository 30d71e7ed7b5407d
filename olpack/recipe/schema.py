"""The keys of `recipe.yaml`: one pydantic model, unknown keys refused, every field documented."""

from __future__ import annotations

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
    field_validator,
    model_validator,
)

from olpack.data.rows import Form as _Form
from olpack.deploy.parameters import check_parameters
from olpack.errors import OlpackError
from olpack.quants import check_tensor_types, quant_type
from olpack.recipe.tasks import parse_task


class _Section(BaseModel):
    # Strict: `rank: "16"` and `rank: yes` are mistakes to name, not to guess at.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class DataSource(_Section):
    file: Annotated[str, Field(min_length=1)] | None = None
    """A file, or a folder of them, relative to the recipe: .jsonl, .json, .csv, .tsv or .parquet."""
    hub: Annotated[str, Field(min_length=1)] | None = None
    """A data set on the Hugging Face Hub, such as `HuggingFaceH4/no_robots`, instead of a file."""
    split: str = "train"
    """Split of a Hub data set, or a part of it: `train[:1000]`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    subset: str | None = None
    """Configuration of a Hub data set that has several."""
    form: _Form | None = None
    """Form of the rows, where it is not `data.form`."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often each row of this source is seen in an epoch. 2: twice. 0.5: half of the rows are seen, once, and the others never. 1.5: all once,
    half of them a second time. Which half is decided by the hash of a row's content, so it is the same half in each epoch and each build."""

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


# Only the one that was meant is tried, so that a mistake in a source is not also reported as "not a string".
_PLACE = "a source is a file, {file: …} or {hub: …}"
_File = Annotated[str, Field(min_length=1), Tag("str")]
_OneSource = Annotated[_File | Annotated[DataSource, Tag("source")], Discriminator(_source_tag, "source", _PLACE)]
_Sources = Annotated[
    _File | Annotated[DataSource, Tag("source")] | Annotated[list[_OneSource], Field(min_length=1), Tag("list[source]")],
    Discriminator(_source_tag, "source", f"{_PLACE}, or a list of these"),
]


class Data(_Section):
    train: _Sources
    """What to learn from: a file or folder relative to the recipe; or {file: …} or {hub: user/name}, with split, revision, subset, form and
    weight; or a list of these. `docs/data.md` shows the forms of rows."""
    eval: _Sources | None = None
    """Held-out rows. Without it, `eval_share` of the training rows is set apart by the hash of each row."""
    eval_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of rows set apart when there is no `eval`."""
    form: Literal["auto", _Form] = "auto"
    """Form of the rows. `auto`: told for each file by the keys of its first rows."""
    learn: Literal["all", "last"] = "all"
    """Learn every turn of the assistant, or only the last one of each row."""
    max_length: Annotated[int, Field(ge=16)] = 2048
    """Longest row in tokens. A longer one is an error: cutting an answer would teach the model to stop in the middle."""

    @field_validator("eval")
    @classmethod
    def _eval_has_no_weight(cls, value: Any) -> Any:
        if any(isinstance(source, DataSource) and source.weight != 1 for source in (value if isinstance(value, list) else [value])):
            raise ValueError("weight goes with data.train; held-out rows are scored once each.")
        return value

    def sources(self, which: Literal["train", "eval"]) -> list[DataSource]:
        """The sources of one side, each with its form; empty where the recipe names none."""
        asked = getattr(self, which)
        listed = asked if isinstance(asked, list) else [asked] if asked is not None else []
        named = [DataSource(file=source) if isinstance(source, str) else source for source in listed]
        return [source if source.form or self.form == "auto" else source.model_copy(update={"form": self.form}) for source in named]


_SOFT_PROMPTS = ("prompt-tuning", "prompt", "prefix-tuning", "prefix", "p-tuning", "ptuning", "soft-prompt")


def _no_soft_prompt(value: Any) -> Any:
    """Methods that people ask for and that nothing here can ship, with the reason."""
    asked = str(value).lower().replace("_", "-")
    if asked in _SOFT_PROMPTS:
        raise ValueError(f"{value} learns vectors that stand before the prompt, and a GGUF has no place for them; lora and dora go into its weights")
    if asked in ("ia3", "(ia)3"):
        raise ValueError("ia3 only rescales what layers put out, and is not offered; vera is as small and learns more")
    return value


class Train(_Section):
    method: Annotated[Literal["lora", "rslora", "dora", "vera"], BeforeValidator(_no_soft_prompt)] = "lora"
    """What is trained: `lora`, `rslora` (scaled by alpha / √rank), `dora` (norms besides), or `vera` (vectors between shared random matrices)."""
    initialization: Literal["default", "pissa", "loftq"] = "default"
    """Where lora and rslora begin: with no change, on the weight's principal components (`pissa`), or on what quantization lost (`loftq`)."""
    quantization: Literal["nf4", "fp4", "int8", "hqq4", "hqq8", "none"] = "nf4"
    """How the frozen base is held: 4-bit NormalFloat (QLoRA) or float, 8-bit integers (LLM.int8), HQQ in 4 or 8 bits, or unquantized.
    A base that comes quantized (GPTQ, AWQ, …) is held as it is."""
    double_quantization: bool = True
    """Quantize the scales of nf4 and fp4, too: 0.4 bits a weight less."""
    merge_base: Literal["original", "dequantized"] = "original"
    """What the adapter is added to: the original weights, or what training saw in their place once they were quantized."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the low-rank update. For vera, whose matrices are shared and not learned, 256 is usual."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank. Nothing to vera."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear` (every linear layer of the text model but the output head), a list of names, or a regular
    expression for full names, all of which it must match, as in peft."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained as a whole besides and replaced in the export, such as embed_tokens, lm_head or norm."""
    epochs: Annotated[float, Field(gt=0)] = 2
    """Passes over the training rows."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes from its peak to zero (or stays)."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises to its peak."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimizer step."""
    micro_batch_tokens: Annotated[int, Field(ge=16)] | Literal["auto"] = "auto"
    """Tokens that go through the model at once. `auto`: 512 on a CPU, on a GPU as many as its memory holds."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. `auto`: on a GPU that holds those of too few tokens."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW on the adapter."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the adapter's initialisation, the order of rows and dropout."""
    eval_every: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Steps from one evaluation on the held-out rows to the next. `auto`: ten of them, fewer where they would take over a tenth of the time."""
    keep: Literal["best", "last"] = "best"
    """The adapter that is written: that of the evaluation with the lowest loss, or that of the last step."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations in a row without a lower loss. None: never before the end."""
    gpus: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """GPUs to train on. The rows of a step, and so the loss curve, are the same for any number."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """With several GPUs: each holds the whole base (`none`), or a share of it (`full`, FSDP2). `auto`: a share where the whole does not fit."""
    launch: str | None = None
    """A launcher in place of `gpus`: `torchrun --nproc-per-node 2`, `accelerate launch --num-processes 2`, with any of its own settings."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics go besides `metrics.jsonl`: TensorBoard's files in `build/NAME/tensorboard`, Weights & Biases."""

    @model_validator(mode="after")
    def _fit_together(self) -> Train:
        if self.initialization != "default" and self.method in ("dora", "vera"):
            raise ValueError(f"initialization: {self.initialization} goes with method lora or rslora, not with {self.method}.")
        if self.quantization == "none" and (self.initialization == "loftq" or self.merge_base == "dequantized"):
            asked = "initialization: loftq" if self.initialization == "loftq" else "merge_base: dequantized"
            raise ValueError(f"{asked} is about what quantization loses, and quantization: none loses nothing.")
        return self


class Message(_Section):
    role: Literal["system", "user", "assistant"]
    content: str


class Modelfile(_Section):
    system: str | None = None
    """System prompt. None: the chat template's own, if it has one."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Ollama parameters: temperature, num_ctx, stop, … `num_ctx` is 4096, or what the model has, where it is not given."""
    license: str | None = None
    """Licence text or name, shown by `ollama show --license`."""
    messages: list[Message] = Field(default_factory=list)
    """Turns that every conversation starts with."""
    template: str | None = None
    """A Go template, only for servers that need one. The trained chat template is in the GGUF."""

    @field_validator("parameters")
    @classmethod
    def _known_parameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        if problems := check_parameters(value):
            raise ValueError("; ".join(problems))
        return value


class Export(_Section):
    importance: Literal["none", "train"] | str = "none"
    """Importance matrix, with which small quants lose less: `train` collects one on the training rows, a name is a file in llama.cpp's form."""
    tensor_types: dict[str, str] = Field(default_factory=dict)
    """Types of single tensors in quantized files: a part of their names (a regular expression, the first that fits counts) to q6_K, q8_0, …"""

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


# Only one of the two is tried, so that a mistake in a task is not also reported as "not a string".
_Tasks = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[Annotated[dict[str, Any], AfterValidator(_known_task)]], Tag("list[task]")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "list[task]"),
]


class Compare(_Section):
    eval_rows: Annotated[int, Field(ge=1)] = 100
    """At most this many held-out rows are scored."""
    prompts: list[str] = Field(default_factory=list)
    """Prompts answered by every quant, side by side in the report. None given: the first three held-out requests."""
    tasks: _Tasks = Field(default_factory=list)
    """Prompts with a check each (exact, contains, regex, json, python, python_asserts, function), on which every quant is scored:
    a list, or a JSONL file relative to the recipe. `olpack/recipe/tasks.py` says what each check takes."""
    suites: list[str] = Field(default_factory=list)
    """Tasks of lm-evaluation-harness (mmlu, gsm8k, …) to run on every quant: by its names, or by those of YAML files in the recipe's
    folder `suites`. Needs `pip install 'olpack[harness]'`."""
    suite_limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many questions of each suite's task. None: all of them."""
    prompt_tokens: list[Annotated[int, Field(ge=16)]] = Field(default=[128, 512], min_length=1)
    """Lengths of the prompts on which speed is measured."""
    generated_tokens: Annotated[int, Field(ge=8)] = 64
    """Tokens generated in each timed run."""
    repeats: Annotated[int, Field(ge=1)] = 4
    """Timed runs per figure, in two rounds; the table shows their median, the report their spread."""
    answer_tokens: Annotated[int, Field(ge=1)] = 256
    """An answer to a prompt or a task is cut there."""
    clients: list[Annotated[int, Field(ge=1, le=256)]] = Field(default_factory=list)
    """Numbers of clients that ask at once, such as [1, 2, 4, 8]. Only through a server, and only where it is asked for: it takes long."""
    max_loss: Annotated[float, Field(gt=0)] = 0.01
    """The recommended quant is the smallest whose perplexity is at most this share above the best."""
    reference: bool = True
    """Hold every quant against the unquantized fine-tune (KL divergence, equal top tokens) and measure the untuned base at one quant.
    Takes 2 bytes a parameter of disk, and at most 1.1 GB more, while it runs."""


_BUDGETS = {"budget": ("bpw", "{budget: 4.6 bpw}"), "size": ("b", "{size: 5 GB}")}  # key: (what its value ends with, an example)


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


class Recipe(_Section):
    base: str
    """`builtin/tiny-coder`, a folder with a Hugging Face model, or a Hub id such as `Qwen/Qwen3-0.6B`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    data: Data
    train: Train = Field(default_factory=Train)
    quants: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0"])
    """Quant types of llama.cpp to make, or budgets: {budget: 4.6 bpw} (bits per weight) or {size: 5 GB} (of the whole file), for which each
    tensor gets the type that loses least on the training rows."""
    export: Export = Field(default_factory=Export)
    package: Literal["merged", "adapter"] = "merged"
    """`merged`: each quant holds the fine-tuned weights. `adapter`: quants of the base, which packages share, and a small LoRA file."""
    modelfile: Modelfile = Field(default_factory=Modelfile)
    compare: Compare = Field(default_factory=Compare)

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
        if self.revision and self.base.startswith("builtin/"):
            raise ValueError("revision goes with a Hub id; a builtin base has none.")
        return self

    @model_validator(mode="after")
    def _shared_quants_are_plain(self) -> Recipe:
        if self.package == "adapter" and self.export != Export():
            raise ValueError(
                "export goes with package: merged; the quants of a base are shared by packages, and none of them decides for the others."
            )
        if self.package == "adapter" and (budgets := [name for name in self.quants if quant_type(name).budget]):
            raise ValueError(f"{budgets[0]} goes with package: merged; its types are chosen by what this package's training rows lose.")
        return self

    @model_validator(mode="after")
    def _adapter_file_is_plain(self) -> Recipe:
        asked = self.train
        wrong = [f"method: {asked.method}"] if asked.method in ("dora", "vera") else []
        wrong += ["modules_to_save"] if asked.modules_to_save else []
        wrong += ["merge_base: dequantized"] if asked.merge_base == "dequantized" else []
        if self.package == "adapter" and wrong:
            raise ValueError(f"train.{wrong[0]} goes with package: merged; a LoRA file for a shared base only adds products of two matrices.")
        return self

    @property
    def name(self) -> str:
        """The package's name: that of its folder."""
        return self._name

    @property
    def folder(self) -> Path:
        """Where the recipe and its data lie."""
        return self._folder

    def origin(self, key: str) -> str:
        """Where a setting came from: "recipe.yaml:5", "--set" or "default"."""
        return self._origins.get(key, "default")

    def settings(self) -> dict[str, Any]:
        """Every setting as dotted key and value, in the schema's order."""
        return dict(_flatten(self.model_dump(), ""))


def _flatten(value: dict[str, Any], prefix: str):
    for key, inner in value.items():
        if isinstance(inner, dict) and key not in ("parameters", "tensor_types"):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
