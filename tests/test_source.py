"""What the source never does: run text as code, unpickle, trust a model's code, start a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "olpack"
# file: calls that it may make, and why
ALLOWED = {
    "compare/answer_runner.py": {"exec", "compile", "marshal.loads"},  # the sandbox; its job comes from olpack
    "train/worker.py": {"pickle.loads"},  # olpack's own job, in a folder that only its user can open
}
CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "code.interact"}
PICKLES = ("pickle.load", "pickle.Unpickler", "marshal.load", "joblib.load", "dill.load", "cloudpickle.load", "shelve.open")
REVISED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}


def forbidden(source: str, allowed: set[str] = frozenset()) -> Iterator[str]:
    """Each call of `source` that is not allowed, with its line."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bad = name in CODE or name.startswith(PICKLES) or name in ("yaml.unsafe_load", "yaml.full_load")
        bad |= name == "yaml.load" and "bounded_yaml.Loader" not in ast.unparse(node)
        bad |= name in REVISED and keywords.get(REVISED[name][0]) != str(REVISED[name][1])
        bad |= keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False"
        bad |= name.endswith((".load_state_dict_from_url", "hub.load"))
        if bad and name not in allowed:
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_what_others_wrote(path: Path) -> None:
    assert not list(forbidden(path.read_text(encoding="utf-8"), ALLOWED.get(str(path.relative_to(ROOT)), set())))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_loaders_of_models_trust_no_code(path: Path) -> None:
    """transformers' loaders ask on the terminal whether to run a folder's code where `trust_remote_code` is not given."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("trust_remote_code") == "False", f"line {node.lineno}: {name}"


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "exec(text)", "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(file)", "pickle.loads(raw)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)", "subprocess.run(line, shell=True)", "np.load(path, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)", "os.system(line)", "torch.hub.load(repo)",
    ],
)  # fmt: skip
def test_the_search_finds_them(source: str) -> None:
    assert list(forbidden(source))
    assert not list(forbidden("re.compile(text); model.eval(); torch.load(path, weights_only=True); load(path, trust_remote_code=False)"))
