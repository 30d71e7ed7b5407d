"""What an interrupted training leaves behind, and the next run goes on from."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from olpack import progress
from olpack.workspace import write_atomically


@dataclass
class State:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        learned, processed, real: tokens so far: with a loss, through the model, and of these not padding.
        seconds: wall time of the run's earlier parts.
        budget: tokens of a micro-batch; smaller than set once memory ran out.
        whole: weights, optimizer and step count belong together; False within a step.
    """

    step: int = 0
    learned: int = 0
    processed: int = 0
    real: int = 0
    seconds: float = 0.0
    budget: int = 0
    whole: bool = True
    metrics: list[dict] = field(default_factory=list)


class Checkpoint:
    """A folder with one checkpoint, replaced whole at each save."""

    def __init__(self, folder: Path, key: str):
        self.file = folder / "checkpoint.pt"
        self.metrics = folder / "metrics.jsonl"
        self.folder, self.key = folder, key

    def load(self, model, optimizer: torch.optim.Optimizer) -> State | None:
        """Put model, optimizer and random numbers back to where the last checkpoint of this key left them; None without one."""
        try:
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            progress.warn(f"{self.file} cannot be read ({error}): training starts from the beginning")
            return None
        if saved["key"] != self.key:
            progress.say("the checkpoint found was made with other settings or data: training starts from the beginning")
            return None
        set_peft_model_state_dict(model, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        return State(**saved["state"])

    def save(self, model, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Write the checkpoint; the one before it stays until this one is whole."""
        buffer = io.BytesIO()
        torch.save({
            "key": self.key,
            "adapter": get_peft_model_state_dict(model, save_embedding_layers=False),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "state": vars(state),
        }, buffer)  # fmt: skip
        write_atomically(self.file, buffer.getvalue())

    def begin_metrics(self, state: State) -> None:
        """Start `metrics.jsonl` with what the state holds; lines of steps after the checkpoint are gone with their steps."""
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in state.metrics))

    def log(self, state: State, **record: float) -> None:
        """Append one record to `metrics.jsonl` and to the state."""
        record = {"step": state.step, **record}
        state.metrics.append(record)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def remove(self) -> None:
        """The run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
