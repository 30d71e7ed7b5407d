"""`olpack import`: configurations of other tools become recipes, and each of their lines is accounted for.

The files in tests/data/import have the fields and values of public configurations: Axolotl's and LLaMA-Factory's examples, Unsloth's notebooks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from oracle import olpack
from snapshots import check, terminal

from olpack import recipe
from olpack.importers import axolotl, name_for
from olpack.recipe.reader import load

CONFIGURATIONS = Path(__file__).parent / "data/import"

# file: (options, settings of its recipe that are none of olpack's defaults, settings of the file that are not carried over)
EXPECTED: dict[str, tuple[list[str], dict[str, object], list[str]]] = {
    "axolotl-qlora.yml": (
        [],
        {
            "base": "meta-llama/Llama-3.2-1B-Instruct",
            "data.train": {"hub": "teknium/GPT4-LLM-Cleaned", "form": "alpaca"},
            "data.eval_share": 0.1,
            "train.rank": 32,
            "train.alpha": 16,
            "train.dropout": 0.05,
            "train.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "train.epochs": 1,
            "train.warmup": 0.1,
            "train.batch_size": 8,
            "train.gradient_checkpointing": True,
        },
        ["datasets[0].type", "loss_watchdog_threshold", "evals_per_epoch", "special_tokens"],
    ),
    "axolotl-lora.yaml": (
        [],
        {
            "base": "Qwen/Qwen3-0.6B",
            "revision": "main",
            "data.train": {"file": "../../data/chats.jsonl", "form": "chat"},
            "data.eval": {"file": "../../data/held_out.jsonl", "form": "chat"},
            "data.max_length": 512,
            "train.quantization": "int8",
            "train.rank": 8,
            "train.alpha": 16,
            "train.schedule": "linear",
            "train.warmup": 0.1,
            "train.learning_rate": 1e-4,
            "train.batch_size": 4,
            "train.weight_decay": 0.01,
            "train.eval_every": 10,
            "train.patience": 3,
            "train.seed": 7,
        },
        ["chat_template", "max_steps", "deepspeed"],
    ),
    "axolotl-dora.yml": (
        [],
        {
            "base": "Qwen/Qwen3-32B",
            "data.train": [
                {"hub": "mlabonne/FineTome-100k", "split": "train[:20%]", "subset": "default", "form": "sharegpt"},
                {"file": "../../data/texts.csv", "form": "text"},
                "../../data/odd.jsonl",
            ],
            "data.max_length": 512,
            "train.method": "dora",
            "train.quantization": "none",
            "train.target_modules": ["q_proj", "v_proj"],
            "train.modules_to_save": ["embed_tokens", "lm_head"],
            "train.epochs": 3,
            "train.learning_rate": 2e-5,
            "train.schedule": "constant",
            "train.warmup": 0,
            "train.batch_size": 2,
        },
        [
            "chat_template",
            "datasets[2].type",
            "lora_alpha",
            "loraplus_lr_ratio",
            "optimizer",
            "train_on_inputs",
            "wandb_project",
            "trust_remote_code",
            "lora_rr",
        ],
    ),
    "llama-factory-qlora.yaml": (
        [],
        {
            "base": "Qwen/Qwen3-4B-Instruct-2507",
            "data.train": [{"file": "../../data/identity.json", "form": "alpaca"}, "../../data/renamed.json"],
            "data.max_length": 512,
            "train.rank": 8,
            "train.alpha": 16,
            "train.epochs": 3,
            "train.learning_rate": 1e-4,
            "train.warmup": 0.1,
            "train.batch_size": 8,
            "train.seed": 42,
            "train.keep": "last",
        },
        ["trust_remote_code", "template", "max_samples", "columns"],
    ),
    "llama-factory-pissa.yaml": (
        [],
        {
            "base": "meta-llama/Llama-3.2-3B-Instruct",
            "data.train": [
                {"hub": "llamafactory/glaive_toolcall_en", "split": "train[:100]", "form": "sharegpt"},
                {"file": "../../data/chats.jsonl", "form": "chat"},
            ],
            "data.eval": {"file": "../../data/held_out.jsonl", "form": "chat"},
            "data.learn": "last",
            "train.initialization": "pissa",
            "train.quantization": "none",
            "train.rank": 8,
            "train.alpha": 16,
            "train.target_modules": ["q_proj", "v_proj"],
            "train.modules_to_save": ["embed_tokens", "lm_head"],
            "train.epochs": 3,
            "train.learning_rate": 5e-5,
            "train.schedule": "constant",
            "train.batch_size": 2,
            "train.seed": 42,
            "train.eval_every": 100,
            "modelfile.system": "Answer briefly.",
        },
        ["template", "warmup_steps", "report_to", "neftune_noise_alpha"],
    ),
    "llama-factory-merge.json": (
        ["--eval", "data/held_out.jsonl"],
        {"base": "Qwen/Qwen3-4B-Instruct-2507", "data.eval": "../../data/held_out.jsonl", "train.adapter": "../../adapter"},
        ["template", "trust_remote_code"],
    ),
    "unsloth_alpaca.py": (
        [],
        {
            "base": "unsloth/Llama-3.1-8B-Instruct",
            "data.train": "../../data/identity.json",
            "data.max_length": 512,
            "train.alpha": 16,
            "train.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "train.schedule": "linear",
            "train.warmup": 0.083333,
            "train.batch_size": 8,
            "train.seed": 3407,
            "train.keep": "last",
        },
        ["map", "SFTTrainer", "max_steps"],
    ),
    "unsloth_chat.py": (
        [],
        {
            "base": "unsloth/Qwen3-4B-Instruct-2507",
            "data.train": {"hub": "mlabonne/FineTome-100k", "split": "train[:2000]"},
            "data.eval": {"hub": "mlabonne/FineTome-100k", "split": "train[2000:2100]"},
            "data.max_length": 1024,
            "train.method": "rslora",
            "train.quantization": "none",
            "train.rank": 32,
            "train.alpha": 64,
            "train.dropout": 0.05,
            "train.learning_rate": 5e-5,
            "train.weight_decay": 0.01,
            "train.gradient_checkpointing": True,
            "train.seed": 3407,
            "train.eval_every": 50,
            "train.keep": "last",
            "quants": ["Q4_K_M", "Q8_0"],
        },
        ["layers_to_transform", "get_chat_template(chat_template)", "**settings", "push_to_hub_gguf(quantization_method)"],
    ),
    "unsloth_text.ipynb": (
        [],
        {
            "base": "unsloth/mistral-7b-v0.3",
            "data.train": {"hub": "roneneldan/TinyStories", "split": "train[:2500]"},
            "train.rank": 128,
            "train.target_modules": ["q_proj", "v_proj"],
            "train.modules_to_save": ["embed_tokens", "lm_head"],
            "train.epochs": 1,
            "train.learning_rate": 5e-5,
            "train.warmup": 0.1,
            "train.seed": 3407,
        },
        ["UnslothTrainer", "embedding_learning_rate"],
    ),
    "mario.Modelfile": (
        ["--train", "data/chats.jsonl"],
        {
            "base": "ollama/llama3.2",
            "data.train": "../../data/chats.jsonl",
            "modelfile.system": '\nYou are "Mario" from Super Mario Bros.\nAnswer as Mario.\n',
            "modelfile.parameters": {"temperature": 1.0, "num_ctx": 4096},
            "modelfile.messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "It's-a me!"}],
        },
        [],
    ),
    "shown.Modelfile": (
        ["--base", "Qwen/Qwen3-0.6B", "--train", "data/chats.jsonl", "--name", "shown"],
        {
            "base": "Qwen/Qwen3-0.6B",
            "data.train": "../../data/chats.jsonl",
            "modelfile.parameters": {"stop": ["<|im_start|>", "<|im_end|>"]},
            "modelfile.license": "Apache License\nVersion 2.0\nMIT",
            "modelfile.template": (
                "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n"
                "<|im_start|>assistant\n"
            ),
        },
        ["FROM", "RENDERER", "PARSER", "PARAMETER mirostat", "PARAMETER repeat_penalty", "PARAMETER top_p"],
    ),
    "tuned.Modelfile": (
        ["--eval", "data/held_out.jsonl"],
        {
            "base": "../../model",
            "data.eval": "../../data/held_out.jsonl",
            "train.adapter": "../../adapter",
            "modelfile.system": "Answer in words.",
            "modelfile.parameters": {"temperature": 0.2},
        },
        [],
    ),
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    shutil.copytree(CONFIGURATIONS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model").mkdir()
    write_adapter(tmp_path / "adapter")
    return tmp_path


def write_adapter(folder: Path, **settings: object) -> None:
    """The files of an adapter, with no tensors: an import looks at its configuration alone."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "Qwen/Qwen3-0.6B",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings, indent=2))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def imported(folder: Path, *words: str) -> tuple[recipe.Recipe, dict]:
    code, printed, said = olpack(folder, "import", *words, "--json")
    assert code == 0, said
    found = json.loads(printed)
    return load(folder / found["recipe"]), found


def different(found: recipe.Recipe) -> dict[str, object]:
    """The settings that are none of olpack's defaults; sources as the recipe writes them."""
    plain = recipe.Recipe.model_validate({"base": "b", "data": {"train": "t"}}).settings()
    settings = found.model_dump(exclude_unset=True)
    flat = {key: value for key, value in found.settings().items() if not key.startswith("data.") and value != plain[key]}
    return flat | {f"data.{key}": value for key, value in settings["data"].items() if f"data.{key}" not in plain or value != plain[f"data.{key}"]}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_configuration_becomes_a_recipe_and_every_line_of_it_is_listed(here, name):
    options, settings, lost = EXPECTED[name]
    found, listed = imported(here, name, *options)
    made = different(found)
    if not any(key.startswith("modelfile.parameters") for key in settings):
        assert made.pop("modelfile.parameters") == {"num_predict": 1024, "repeat_penalty": 1.05}
    assert made == settings
    assert sorted(one["key"] for one in listed["settings"] if one["outcome"] == "lost") == sorted(lost)
    assert all(one["note"] for one in listed["settings"] if one["outcome"] != "carried")
    text = (here / listed["recipe"]).read_text()
    assert all(f" {key}: " in text.partition("# Not carried over:")[2] for key in lost)


@pytest.mark.parametrize("name", ["axolotl-lora.yaml", "axolotl-dora.yml", "llama-factory-pissa.yaml"])
def test_no_key_of_a_file_is_passed_over(here, name):
    """Each top-level key with a value is in the list, with its line."""
    import yaml

    _, listed = imported(here, name)
    places = {one["place"] for one in listed["settings"]}
    lines = (here / name).read_text().splitlines()
    for key, value in yaml.safe_load((here / name).read_text()).items():
        line = next(number for number, text in enumerate(lines, 1) if text.startswith(f"{key}:"))
        assert value is None or any(f"{name}:{number}" in places for number in (line, line + 1)), key


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_terminal_shows(here, name):
    options = EXPECTED[name][0]
    shown = terminal(here, "import", name, *options, columns=140)
    written = next(here.glob("modelfiles/*/recipe.yaml"))
    check(f"import-{name.replace('.', '-')}", f"{shown}\n\n$ cat {written.relative_to(here)}\n{written.read_text()}")


# -- adapters ------------------------------------------------------------------------------------------------------------------------------


def test_an_adapter_names_its_base(here):
    found, listed = imported(here, "adapter", "--eval", "data/held_out.jsonl")
    assert listed["tool"] == "peft"
    assert (found.base, found.train.adapter, found.data.eval) == ("Qwen/Qwen3-0.6B", "../../adapter", "../../data/held_out.jsonl")
    assert {one["place"] for one in listed["settings"] if one["key"] == "base_model_name_or_path"} == {"adapter_config.json:3"}


def test_an_adapter_without_a_base_or_with_one_elsewhere(here):
    write_adapter(here / "nameless", base_model_name_or_path=None)
    code, _, said = olpack(here, "import", "nameless", "--eval", "data/held_out.jsonl")
    assert code == 1 and "names no base model that can be carried over. Name it with --base" in said
    write_adapter(here / "elsewhere", base_model_name_or_path="/content/models/of/nobody")
    code, _, said = olpack(here, "import", "elsewhere", "--eval", "data/held_out.jsonl")
    assert code == 1 and "adapter_config.json:3: There is no such folder here" in said
    found, _ = imported(here, "elsewhere", "--base", "model", "--eval", "data/held_out.jsonl", "--train", "data/chats.jsonl", "--system", "Be brief.")
    assert (found.base, found.data.train, found.modelfile.system) == ("../../model", "../../data/chats.jsonl", "Be brief.")


def test_an_option_replaces_what_the_source_says(here):
    found, listed = imported(here, "axolotl-lora.yaml", "--base", "builtin/tiny-coder", "--train", "data/identity.json", "--eval", "data/chats.jsonl")
    assert (found.base, found.revision) == ("builtin/tiny-coder", None)
    assert (found.data.train, found.data.eval) == ("../../data/identity.json", "../../data/chats.jsonl")
    replaced = {one["key"]: one["note"] for one in listed["settings"] if one["note"].startswith("--")}
    assert replaced == {
        "base_model": "--base replaces it.",
        "revision_of_model": "--base replaces it.",
        "datasets": "--train replaces it.",
        "test_datasets": "--eval replaces it.",
    }


def test_an_adapter_with_a_revision_a_template_and_a_pickle(here):
    write_adapter(here / "dora", revision="v2", use_dora=True)
    for name in ("chat_template.jinja", "training_args.bin"):
        (here / "dora" / name).write_text("x")
    found, listed = imported(here, "dora", "--eval", "data/held_out.jsonl")
    assert found.revision == "v2"
    assert {"use_dora", "chat template", "training_args.bin"} <= {one["key"] for one in listed["settings"] if one["outcome"] == "needless"}


# -- what is refused, and what is never done -------------------------------------------------------------------------------------------------


def test_no_recipe_is_replaced(here):
    imported(here, "axolotl-qlora.yml", "--name", "mine")
    before = (here / "modelfiles/mine/recipe.yaml").read_text()
    code, _, said = olpack(here, "import", "axolotl-lora.yaml", "--name", "mine")
    assert code == 1 and "is there already" in said
    assert (here / "modelfiles/mine/recipe.yaml").read_text() == before


def test_tokens_go_nowhere(here):
    for name in ("unsloth_alpaca.py", "unsloth_chat.py", "llama-factory-pissa.yaml"):
        _, printed, said = olpack(here, "import", name, "--json")
        assert "somebody" not in printed + said + "".join(path.read_text() for path in here.glob("modelfiles/*/recipe.yaml"))


def test_a_script_is_not_executed(here):
    (here / "evil.py").write_text(
        "import os\nopen('ran', 'w')\nfrom unsloth import FastLanguageModel\n"
        "r = __import__('os').getpid()\n"
        "m, t = FastLanguageModel.from_pretrained(model_name=str(open('ran', 'w')), max_seq_length=[open('ran', 'w')][0])\n"
        "m = FastLanguageModel.get_peft_model(m, r=r, lora_alpha=10 ** 10 ** 10, lora_dropout='a' * 10 ** 9, use_rslora={**{}})\n"
    )
    found, listed = imported(here, "evil.py", "--base", "Qwen/Qwen3-0.6B", "--train", "data/chats.jsonl")
    assert not (here / "ran").exists()
    assert {"model_name", "max_seq_length", "r", "lora_alpha", "lora_dropout"} <= {
        one["key"] for one in listed["settings"] if one["outcome"] == "lost"
    }
    assert found.train.rank == 16


DEEP = 20_000
REFUSED = {
    "dpo.yml": ("base_model: a/b\nrl: dpo\n", "trains with dpo, and olpack fine-tunes on rows with their answers"),
    "rows.yml": ("base_model: a/b\ndatasets: [{path: none.jsonl, type: alpaca}]\nadapter: lora\n", "There is no none.jsonl in the working folder"),
    "none.yml": ("base_model: a/b\nadapter: lora\n", "names no training rows that can be carried over. Name them with --train"),
    "kind.yml": ("model: a/b\n", "names neither base_model, as Axolotl does, nor model_name_or_path"),
    "list.yaml": ("- base_model\n", "names neither base_model"),
    "broken.yml": ("base_model: [a\n", "It must be valid YAML"),
    "twice.yml": ("base_model: a/b\nbase_model: c/d\n", "line 2: 'base_model' is given twice"),
    "laughs.yml": (
        "base_model: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"k{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 10)}]\n" for n in range(8)),
        "this is too large",
    ),
    "deep.yml": (f"base_model: {'[' * 200}{']' * 200}\n", "nested too deep"),
    "deep.json": ('{"model_name_or_path": ' + "[" * DEEP + "]" * DEEP + "}", "nested too deep"),
    "stage.yaml": ("model_name_or_path: a/b\nstage: dpo\n", "trains with stage: dpo"),
    "info.yaml": ("model_name_or_path: a/b\ndataset: identity\ndataset_dir: nowhere\n", "There is no dataset_info.json in nowhere"),
    "unknown.yaml": ("model_name_or_path: a/b\ndataset: nobody\n", "has no data set 'nobody'"),
    "gone.json": ('{"model_name_or_path": "a/b", "adapter_name_or_path": "no/adapter"}', "there is no folder no/adapter"),
    "grpo.py": ("from unsloth import FastLanguageModel\nGRPOTrainer()\n", "trains with GRPOTrainer"),
    "other.py": ("print(1)\n", "calls no FastLanguageModel.from_pretrained"),
    "broken.py": ("x = 1\ndef f(:\n", "line 2: invalid syntax"),
    "nested.py": ("x = " + "(" * DEEP + ")" * DEEP, "must be Python 3"),
    "unary.py": ("x = " + "-" * 100_000 + "1", "must be Python 3"),
    "chain.py": ("x = a" + ".a" * 100_000, "must be Python 3"),
    "attributes.py": ("from unsloth import FastLanguageModel\nFastLanguageModel.from_pretrained(x" + ".x" * 2_000 + ")", "nested too deep"),
    "null.py": ("x = '\0'", "must be Python 3"),
    "empty.ipynb": ("{}", "calls no FastLanguageModel.from_pretrained"),
    "list.ipynb": ("[]", "contains no JSON object"),
    "odd.Modelfile": ("FROM x\nWEIGHTS y\n", "line 2: 'weights' is no command"),
    "messages.Modelfile": ("FROM x\n" + "MESSAGE user Hi\n" * 2_000, "has more than 500 commands"),
    "long.Modelfile": ("FROM x\nSYSTEM " + '"' * 3 + "\n" * 200_000, "at most 131,072 are read"),
    "many.yaml": (f"model_name_or_path: a/b\ndataset: {'a,' * 2_000}\n", "no list of up to 1,000 names"),
    "notes.txt": ("To do: import.\n", "is of no known kind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused_and_nothing_is_written(here, name):
    text, reason = REFUSED[name]
    (here / name).write_text(text)
    code, printed, said = olpack(here, "import", name)
    assert code == 1 and reason in said, said
    assert "Unexpected" not in said and not printed and not (here / "modelfiles").exists()


def test_files_that_are_none(here):
    import os

    (here / "binary.yml").write_bytes(b"\xff\xfe\x00")
    (here / "binary.py").write_bytes(b"\xff\xfe\x00")
    (here / "Modelfile").write_bytes(b"FROM \xff")
    os.mkfifo(here / "pipe.yml")
    (here / "empty").mkdir()
    for name, reason in {
        "binary.yml": "is not UTF-8",
        "binary.py": "is not UTF-8",
        "Modelfile": "is not UTF-8",
        "pipe.yml": "is a pipe",
        "empty": "is no adapter: it has no adapter_config.json",
        "missing.yml": "There is no missing.yml",
        "x" * 300: "Name a file or a folder that can be used",
    }.items():
        code, _, said = olpack(here, "import", name, "--name", "mine")
        assert code == 1 and reason in said and "Unexpected" not in said, said
    assert not (here / "modelfiles").exists()


def test_values_that_no_recipe_takes_are_listed(here):
    """Each is a value of another type or size than the key has; none of them ends the import."""
    strange = [
        "[1, {a: b}]",
        "2001-01-01",
        ".inf",
        "!!binary aGk=",
        "99999999999999999999999",
        '"\\ud800"',
        '"\\0"',
        "-1",
        "true",
        '"x\\n# y"',
        "{1: 2}",
    ]
    text = "base_model: a/b\ndatasets: [{path: data/chats.jsonl, type: chat_template}]\n"
    given = "base_model", "datasets", "test_datasets", "adapter"
    keys = [key for key in axolotl.RULES if key not in given] + ["test_datasets", "adapter"]
    for number, value in enumerate(strange):
        lines = [f"{json.dumps(key)}: {value}" for key in [*keys, "a key # with: marks"]]
        (here / "odd.yml").write_text(text + "\n".join(lines) + "\n")
        found, _ = imported(here, "odd.yml", "--name", f"odd{number}")
        assert found.base == "a/b"
        code, printed, said = olpack(here, "import", "odd.yml", "--name", f"again{number}")
        assert code == 0 and "Not carried over" in printed, said


def test_a_script_that_repeats_itself_stays_small(here):
    """Names stand for lists of lists, calls and trainers come by the thousand: the time and the list grow with the file alone."""
    doubled = "".join(f"a{n} = [{', '.join([f'a{n - 1}' if n else '1'] * 10)}]\n" for n in range(30))
    calls = "d = load_dataset('a/b')\n" * 3_000 + "SFTTrainer(train_dataset=d, args=a29)\n" * 3_000
    (here / "big.py").write_text(f"{doubled}{calls}m, t = FastLanguageModel.from_pretrained('a/b', device_map=a29)\n")
    _, listed = imported(here, "big.py", "--train", "data/chats.jsonl")
    assert {"load_dataset", "device_map"} <= {one["key"] for one in listed["settings"] if one["outcome"] == "lost"}


def test_plain_texts_of_llama_factory(here):
    info = {"c4": {"file_name": "texts.csv", "columns": {"prompt": "text"}}, "other": {"file_name": "identity.json"}}
    (here / "data/dataset_info.json").write_text(json.dumps(info))
    (here / "pt.yaml").write_text("model_name_or_path: a/b\nstage: pt\ndataset: c4, other\nlora_rank: 5000\n")
    found, listed = imported(here, "pt.yaml")
    assert found.data.train == [recipe.schema.DataSource(file="../../data/texts.csv", form="text"), "../../data/identity.json"]
    assert found.data.form == "text"
    # A rank that no recipe takes is listed, and is not taken for one that the file leaves out.
    assert [one["key"] for one in listed["settings"] if one["outcome"] == "lost"] == ["lora_rank", "columns"]
    assert found.origin("train.rank") == found.origin("train.alpha") == "default"


def test_names():
    assert name_for(Path("configs/My Model_v2.yml")) == "my-model_v2"
    assert name_for(Path("/work/Assistant/Modelfile")) == "assistant"
    assert name_for(Path("...")) == name_for(Path("...").resolve())
    assert name_for(Path("نموذج.yml")) == "imported"
