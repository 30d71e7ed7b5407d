"""The checkpoint of an interrupted training, from which the next run resumes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from olpack import progress
from olpack.errors import OlpackError
from olpack.workspace import value_digest, write_atomically

EVERY_S = 60.0  # the most work that a killed run loses, as long as a save takes little of it
_SHARE = 0.02  # of the time, at most, goes into saving
_FORM = 2  # version of the file's format: a file of another version is not used
_FIELDS = {"form", "key", "optimizer", "numbers", "state"}  # of a checkpoint's record, beside its digest


@dataclass
class State:
    """The progress of a run. The checkpoint has these names.

    Attributes:
        step: optimizer steps done.
        learned: target tokens so far.
        seconds: wall time of the run's earlier parts.
        timed, timed_s: tokens and seconds of steps, evaluations and the first steps of each part left out.
        budget: tokens of a micro-batch; smaller than set once memory ran out.
        whole: weights, optimizer and step count belong together; False within a step.
        evaluated: the step of the last evaluation; -1 before the first.
        best_loss, best_step: lowest loss of an evaluation after step 0, in nats, and where that was.
        waited: evaluations since then.
        run: identity of the run, by which a tracker knows it again.
        metrics: records of metrics.jsonl so far.
        best: weights of the adapter of `best_step`, by name; None before there is one, and with `train.keep: last`.
    """

    step: int = 0
    learned: int = 0
    seconds: float = 0.0
    timed: int = 0
    timed_s: float = 0.0
    budget: int = 0
    whole: bool = True
    evaluated: int = -1
    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    metrics: list[dict] = field(default_factory=list)
    best: dict[str, torch.Tensor] | None = None


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights on the CPU, by peft's names."""
    return {name: _copied(tensor) for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


class Checkpoint:
    """A folder with one checkpoint: one safetensors file, replaced whole at each save.

    Its tensors are `adapter.NAME`, `best.NAME` and `optimizer.NUMBER.NAME`; the rest is JSON in its metadata.

    Args:
        folder: of the checkpoint; made at the first save.
        key: identity of everything that decides the result.
        writes: False in a process that only reads it, because another writes.
    """

    def __init__(self, folder: Path, key: str, *, writes: bool = True):
        self.file = folder / "checkpoint.safetensors"
        self.folder, self.key, self.writes = folder, key, writes
        self.step: int | None = None  # of the file
        self._begun = time.monotonic()
        self._took = 0.0
        self._warned = False

    def load(self, model: PeftModel, optimizer: torch.optim.Optimizer) -> State | None:
        """Put model and optimizer back to where the last checkpoint of this key left them; None without one."""
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as file:
                saved = {name: json.loads(text) for name, text in file.metadata().items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — no mapping
            state = State(**saved["state"]) if saved.get("form") == _FORM else None
            digest = saved.pop("digest", None)  # earlier versions wrote none
            if state and (saved.keys() != _FIELDS or (digest is not None and digest != _digest(tensors, saved))):
                raise ValueError("its content is not what was written")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            progress.warn(f"{self.file} cannot be read ({error}): training starts from the beginning")
            return None
        if state is None:
            progress.say("the checkpoint is of another version of olpack: training starts from the beginning")
            return None
        if saved["key"] != self.key:
            progress.say("the checkpoint is of other settings or data: training starts from the beginning")
            return None
        set_peft_model_state_dict(model, _below(tensors, "adapter."))
        state.best = _below(tensors, "best.") or None
        if saved["optimizer"] == type(optimizer).__name__:
            _restore(optimizer, _below(tensors, "optimizer."), saved["numbers"])
        else:
            progress.warn(f"the checkpoint's optimizer is {saved['optimizer']}, and this run's {type(optimizer).__name__}: its moments start anew")
        self.step = state.step
        return state

    @property
    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._begun > max(EVERY_S, self._took / _SHARE)

    def save(self, model: PeftModel, optimizer: torch.optim.Optimizer, state: State) -> bool:
        """Write the checkpoint; the one before it stays until this one is whole.

        A full disk ends no training: a warning reports it once, and the next interval tries again.

        Returns:
            whether the file is that of this state.
        """
        if not self.writes:
            return True
        self._begun = time.monotonic()
        tensors = {f"adapter.{name}": tensor for name, tensor in adapter_weights(model).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (state.best or {}).items()}
        numbers = {}
        for index, parameter in enumerate(_parameters(optimizer)):
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{name}"] = _copied(value)
                else:
                    numbers[f"{index}.{name}"] = value
        fields = {name: value for name, value in vars(state).items() if name != "best"}
        record = {"form": _FORM, "key": self.key, "optimizer": type(optimizer).__name__, "numbers": numbers, "state": fields}
        record["digest"] = _digest(tensors, record)
        try:
            write_atomically(self.file, save(tensors, {name: json.dumps(value) for name, value in record.items()}))
        except OlpackError as error:
            last = f"that of step {self.step} stays" if self.step is not None else "there is none yet"
            if not self._warned:
                progress.warn(
                    f"{error.problem} So there is no checkpoint of step {state.step} ({last}). Free some space: training goes on "
                    "and tries again at each interval."
                )
            self._warned = True
            return False
        finally:
            self._took = time.monotonic() - self._begun
        self.step, self._warned = state.step, False
        return True

    def remove(self) -> None:
        """Delete the folder, when the run is done."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)


def _digest(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> str:
    """SHA-256 of all that a checkpoint contains."""
    digest = hashlib.sha256(value_digest(record).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> None:
    state: dict[int, dict] = {}
    for name, value in {**tensors, **numbers}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
