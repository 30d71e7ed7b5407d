"""Standard suites (MMLU, GSM8K, HumanEval, TruthfulQA, …) on a GGUF, through lm-evaluation-harness and the embedded engine.

The harness needs log-probabilities of given continuations, which Ollama's server does not return, so it runs on the file that is published,
with its own prompts and no chat template, as on any base model: the figures are comparable to published ones.

Suites are the harness's tasks, groups and tags by name, and the YAML files of the user's folder. Their data come from the Hugging Face Hub,
or from the source that the YAML names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from olpack.compare.results import SuiteScore
from olpack.errors import OlpackError
from olpack.installed import install_command
from olpack.llamacpp.engine import Engine, Sampling

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError:
    raise OlpackError("Suites need lm-evaluation-harness, which is not installed.", f"Install it: {install_command('lm-eval>=0.4.13')}.") from None

_ANSWER_TOKENS = 256  # of a generated answer where the suite sets no limit: the harness's own default
_RESAMPLES = 1000  # for metrics whose standard error is bootstrapped


def check_suites(names: Sequence[str], folder: Path | None) -> None:
    """Refuse names that the harness does not know. This takes some seconds: the harness reads the heads of thousands of YAML files.

    Raises:
        OlpackError: there is no such suite.
    """
    for name in names:
        known = _tasks(name, folder).all_tasks
        if name not in known:
            near = [other for other in known if name.lower() in other.lower()][:5]
            hint = f"Those with that in their name: {', '.join(near)}." if near else "`lm-eval ls tasks` lists all."
            raise OlpackError(f"lm-evaluation-harness has no suite '{name}'{f', nor has {folder}' if folder else ''}.", hint)


def run_suite(engine: Engine, name: str, folder: Path | None, limit: int | None, show: Callable[[int, int], None]) -> list[SuiteScore]:
    """Every metric of one suite.

    Args:
        engine: the loaded model. Texts longer than its context lose their beginning.
        name: a task, group or tag of the harness.
        folder: further tasks in YAML.
        limit: at most this many questions of each task.
        show: called with (done, total) requests.

    Raises:
        OlpackError: the harness fails, as without a network for its data.
    """
    # The harness asks before it runs a model's code (HumanEval); the same variable answers for its metric.
    unsafe = os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
    try:
        evaluated = simple_evaluate(
            model=EngineModel(engine, show),
            tasks=[name],
            task_manager=_tasks(name, folder),
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
            confirm_run_unsafe_code=unsafe,
        )
    except OlpackError:
        raise
    except Exception as error:
        raise OlpackError(f"The suite '{name}' failed: {type(error).__name__}: {error}.", "Try it with `lm-eval` itself to see where.") from None
    scores = []
    results = evaluated["results"]
    for task in [name] if name in results else results:  # a tag has no figures of its own
        figures = results[task]
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            standard_error = figures.get(f"{metric}_stderr,{filtered}")
            scores.append(
                SuiteScore(
                    suite=task,
                    metric=metric if filtered == "none" else f"{metric}, {filtered}",
                    value=value,
                    standard_error=standard_error if isinstance(standard_error, int | float) else None,
                    limit=limit,
                )
            )
    return scores


@cache
def _tasks(name: str, folder: Path | None) -> TaskManager:
    """The harness's index of tasks: the folder's own where the task is one of them, else all, which takes ten seconds."""
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if name in own.all_subtasks:
            return own
    return _all_tasks(folder)


@cache
def _all_tasks(folder: Path | None) -> TaskManager:
    return TaskManager(include_path=folder)


class EngineModel(TemplateLM):
    """The embedded engine as the harness sees a model. Requests run one after the other."""

    def __init__(self, engine: Engine, show: Callable[[int, int], None]):
        super().__init__()
        self._engine, self._show = engine, show

    @property
    def eot_token_id(self) -> int:
        return self._engine.end_token

    @property
    def prefix_token_id(self) -> int:
        return self._engine.begin_token if self._engine.begin_token is not None else self._engine.end_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; where the model wants a beginning-of-sequence token, with it, unless `add_special_tokens` is False."""
        ids, begin = self._engine.tokenize(string), self._engine.begin_token
        return ids if begin is None or add_special_tokens is False or ids[:1] == [begin] else [begin, *ids]

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scored = []
        previous, logits = None, np.empty(0)
        for done, (_, context, continuation) in enumerate(requests, 1):
            ids = (context + continuation)[-self._engine.context :]
            count = min(len(continuation), len(ids) - 1)
            # The choices of a question, which come one after the other, often differ in their last token alone.
            if previous != (ids[:-1], count):
                wanted = [False] * (len(ids) - count) + [True] * count
                logits = np.array([scores for _, scores in self._engine.scored(ids, wanted)])
                previous = (ids[:-1], count)
            tokens = np.array(ids[-count:])
            top = logits.max(-1)
            normalizer = top + np.log(np.exp(logits - top[:, None]).sum(-1))
            total = float((logits[np.arange(count), tokens] - normalizer).sum())
            scored.append((total, bool((logits.argmax(-1) == tokens).all())))
            if not disable_tqdm:
                self._show(done, len(requests))
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for done, request in enumerate(requests, 1):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self._engine.context - 1, 1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self._show(done, len(requests))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for done, request in enumerate(requests, 1):
            prompt, asked = request.args
            until = asked.get("until") or []
            stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
            count = min(asked.get("max_gen_toks", _ANSWER_TOKENS), self._engine.context // 2)
            temperature = asked.get("temperature", 0) if asked.get("do_sample") else 0
            ids = self.tok_encode(prompt)[count - self._engine.context :]
            answers.append("".join(self._engine.generate(ids, count, Sampling(temperature=temperature, seed=0, stop=stop))))
            self._show(done, len(requests))
        return answers
