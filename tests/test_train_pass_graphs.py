"""Small micro-batches: padding changes neither loss nor gradients, and a CUDA graph computes what the plain way does. A double stands in for CUDA."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from test_train_forward import CPU, MODELS, ROWS, gradients, random_row, with_adapter
from tiny_models import write_model

from olpack.data import TokenRow
from olpack.model.base import Base
from olpack.recipe import Train
from olpack.train import loop, pass_graphs
from olpack.train.batches import Form, PackedBatch, pack, pad
from olpack.train.checkpoint import State
from olpack.train.forward import Forward
from olpack.train.ops import flat_parameters
from olpack.train.ops.flat_parameters import FlatParameters
from olpack.train.pass_graphs import PassGraphs

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gemma2-softcap", "qwen3-moe"])
def test_padding_changes_neither_loss_nor_gradients(tmp_path, kind):
    model_type, settings = MODELS[kind]
    model = with_adapter(Base("tiny", write_model(tmp_path / "model", model_type, **settings)), Train(quantization="none", rank=4))
    forward, batch = Forward(model, CPU, checkpointing=False), pack(ROWS, CPU)
    wanted = forward.loss(batch)
    wanted.backward()
    plain = gradients(model)
    just = Form(batch.ids.shape[1], len(ROWS) + 1, len(batch.targets))
    for form in (Form.of(ROWS), just, Form(128, 8, 96)):
        model.zero_grad(set_to_none=True)
        padded = pad(batch, form)
        assert (padded.ids.shape[1], len(padded.starts), len(padded.targets)) == (form.tokens, form.samples + 1, form.targets)
        loss = forward.loss(padded)
        loss.backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        for name, gradient in gradients(model).items():
            assert (gradient - plain[name]).norm() <= 1e-5 * plain[name].norm(), name


def test_few_forms_take_all_batches():
    rng, forms = random.Random(0), set()
    for _ in range(2000):
        lengths = [rng.randint(2, 300) for _ in range(rng.randint(1, 8))]
        rows = [TokenRow([1] * length, [index >= length // 3 for index in range(length)], "", "") for length in lengths]
        form = Form.of(rows)
        assert sum(lengths) <= form.tokens < 1.125 * sum(lengths) + 8
        assert sum(row.target_count for row in rows) <= form.targets <= form.tokens and len(rows) < form.samples
        forms.add(form)
    assert len(forms) < 150


def test_gradients_keep_their_places(monkeypatch):
    model = torch.nn.ModuleDict({"small": torch.nn.Linear(8, 8), "flat": torch.nn.Linear(64, 64, bias=False)})
    trained = FlatParameters(model)
    assert trained.in_place
    optimizer, places = torch.optim.AdamW(trained.parameters), set()
    for _ in range(3):
        trained.begin()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained.parameters)
        (model["small"](torch.ones(1, 8)).sum() + model["flat"](torch.ones(1, 64)).sum()).backward()
        trained.fill()
        assert all(parameter.grad.any() for parameter in trained.parameters)
        places.add(tuple(parameter.grad.data_ptr() for parameter in [*trained.parameters, *model.parameters()]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert len(places) == 1

    monkeypatch.setattr(flat_parameters, "LARGE", 64 * 64 - 1)
    assert not FlatParameters(torch.nn.Linear(64, 64)).in_place


class Machine:
    """A graph of this one computes again what was computed while it was recorded, from and into the same memory."""

    def __init__(self, forward: Forward, monkeypatch: pytest.MonkeyPatch):
        self.forward, self.done, self.fails = forward, [], False
        self.reserved, self.free = 3 << 30, 1 << 40  # bytes
        self._recorded: SimpleNamespace | None = None
        for name, value in {
            "CUDAGraph": self._graph,
            "graph": self._recording,
            "memory_reserved": lambda _: self.reserved,
            "empty_cache": lambda: setattr(self, "reserved", 2 << 30),
            "mem_get_info": lambda _: (self.free, 1 << 40),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def loss(self, batch: PackedBatch) -> torch.Tensor:
        total = self.forward.loss(batch)
        if self._recorded is None:
            self.done.append("plain")
        else:
            self.done.append("recorded")
            self._recorded.batch, self._recorded.total = batch, total.detach()
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
        return total

    def _graph(self) -> SimpleNamespace:
        graph = SimpleNamespace(pool=lambda: (0, 1))

        def replay() -> None:
            self.done.append("replayed")
            total = self.forward.loss(graph.batch)
            total.backward()
            graph.total.copy_(total.detach())

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def _recording(self, graph: SimpleNamespace, pool: object, capture_error_mode: str) -> Iterator[None]:
        before = {name: gradient.clone() for name, gradient in gradients(self.forward.model).items()}
        self._recorded = graph
        try:
            yield
        finally:
            self._recorded = None
            for name, gradient in gradients(self.forward.model).items():
                gradient.copy_(before[name])  # what is recorded is not computed


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    model = with_adapter(Base("tiny", write_model(tmp_path / "model", tied=False)), Train(quantization="none", rank=4))
    return Machine(Forward(model, CPU, checkpointing=False), monkeypatch)


BATCHES = [ROWS, [random_row(35), random_row(16), random_row(36)], [random_row(200)], [random_row(34), random_row(17), random_row(37)], ROWS]


def steps(machine: Machine, *, resumed: int | None = None, broken: bool = False) -> list[torch.Tensor]:
    """The loss and the gradients of each batch."""
    machine.done.clear()
    trained, found = FlatParameters(machine.forward.model), []
    graphs = PassGraphs(machine.loss, CPU, 1)
    for number, rows in enumerate(BATCHES):
        if number == resumed:
            graphs = PassGraphs(machine.loss, CPU, 1)
        if broken:
            graphs.free()
        trained.begin()
        found.append(graphs.backward(rows))
        found += [parameter.grad.clone() for parameter in trained.parameters]
    return found


def test_a_form_is_recorded_when_it_comes_again(machine):
    found = steps(machine)
    assert machine.done == ["plain", "recorded", "replayed", "plain", "replayed", "replayed"]
    for rows, loss in zip(BATCHES, found[:: len(found) // len(BATCHES)], strict=True):
        assert loss.item() == pytest.approx(machine.forward.loss(pack(rows, CPU)).item(), rel=1e-6)


@pytest.mark.parametrize("how", ["resumed", "no memory", "cannot be recorded", "freed", "too many forms"])
def test_losses_do_not_depend_on_which_batches_graphs_compute(machine, monkeypatch, how):
    expected = steps(machine)
    machine.reserved, machine.free = 3 << 30, 1 << 30 if how == "no memory" else machine.free
    machine.fails = how == "cannot be recorded"
    if how == "too many forms":
        monkeypatch.setattr(pass_graphs, "_MOST", 0)
    found = steps(machine, resumed=3 if how == "resumed" else None, broken=how == "freed")
    done = {
        "resumed": ["plain", "recorded", "replayed", "plain", "plain", "recorded", "replayed"],
        "cannot be recorded": ["plain", "recorded", *["plain"] * 4],
    }
    assert machine.done == done.get(how, ["plain"] * 5)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_graph_gains_nothing_where_tokens_are_many(machine):
    graphs = PassGraphs(machine.loss, CPU, pass_graphs._WORK // 40)
    assert graphs.backward(ROWS) is None and machine.done == []


def test_out_of_memory_takes_the_graphs_first(machine, monkeypatch, capsys):
    forward, state = machine.forward, State(budget=100)
    trained = FlatParameters(forward.model)

    def step() -> list[float]:
        loss = loop._backward(forward, trained, ROWS, state)
        return [loss, *(parameter.grad.norm().item() for parameter in trained.parameters)]

    forward._graphs = PassGraphs(machine.loss, CPU, 1)
    expected = [step() for _ in range(3)][-1]
    real, calls = Forward.loss, []

    def loss(self, batch):
        calls.append(batch.ids.shape[1])
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(Forward, "loss", loss)
    machine.done.clear()
    assert step() == expected and state.budget == 100
    assert machine.done == ["replayed", "plain"] and "ran out" not in capsys.readouterr().err
