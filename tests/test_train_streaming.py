"""Streamed layers: the same losses, gradients and adapter as with all layers on the GPU, and what the plan chooses.

Without a GPU the copies are made either at once or as late as the events allow: a slot that is overwritten too early, or used too early, changes the
losses. With one, it makes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from test_train_forward import MODELS, ROWS, gradients
from test_train_offloading import Runtime
from tiny_models import converter, write_model
from torch.overrides import TorchFunctionMode
from train_child import make_rows

from olpack.data import TokenRow
from olpack.export import Target
from olpack.model.base import Base
from olpack.model.gguf_base import open_gguf
from olpack.model.shape import MetaModel
from olpack.recipe import Train
from olpack.train import loop, planner
from olpack.train.batches import pack
from olpack.train.device import pick_device
from olpack.train.forward import Forward
from olpack.train.model import load_with_adapter
from olpack.train.ops import layer_stream
from olpack.train.ops.layer_stream import LayerStream

DEVICE = pick_device()
LAYERS = 6
torch.set_num_threads(1)


@dataclass
class Stream:
    """A stream of copies, made when they are asked for, or when the computation waits for them.

    Attributes:
        copies: those that are still to be made.
        count: of all copies.
    """

    late: bool
    copies: list[partial] = field(default_factory=list)
    count: int = 0

    def wait_stream(self, _) -> None:
        pass

    def record_event(self) -> int:
        return self.count

    def wait_event(self, event: int) -> None:
        """The computation waits for so many copies of this stream."""
        for copy in self.copies[: len(self.copies) - (self.count - event)]:
            copy()
        self.copies = self.copies[len(self.copies) - (self.count - event) :]


class Copying(TorchFunctionMode):
    """Copies go to the stream."""

    def __init__(self, stream: Stream):
        super().__init__()
        self.stream = stream

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is not torch.Tensor.copy_:
            return function(*arguments, **(named or {}))
        self.stream.count += 1
        self.stream.copies.append(partial(function, *arguments))
        if not self.stream.late:
            self.stream.wait_event(self.stream.count)
        return None


@pytest.fixture(params=["gpu"] if DEVICE.type == "cuda" else ["at once", "late"])
def stream(request, monkeypatch) -> Iterator[Stream | None]:
    """The stream of copies; None where a GPU has its own."""
    if request.param == "gpu":
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield None
        torch.use_deterministic_algorithms(False)
        return
    stream = Stream(request.param == "late")
    runtime = Runtime()
    for name, value in {
        "Stream": lambda _: stream,
        "current_stream": lambda _: stream,
        "stream": Copying,
        "device": contextlib.nullcontext,
        "synchronize": lambda _: None,
        "cudart": lambda: runtime,
        "check_error": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield stream


def make_base(folder, kind: str = "llama") -> Base:
    model_type, settings = MODELS[kind]
    return Base(
        kind,
        write_model(
            folder / "model",
            model_type,
            **{**settings, "num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2},
        ),
    )


def train_two_steps(base: Base, settings: Train, streamed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of an evaluation, a pass that comes to no end, two steps, and an evaluation; the gradients of the last step."""
    model = load_with_adapter(base, settings, DEVICE, streamed=streamed).model
    forward = Forward(model, DEVICE, checkpointing=True)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = [loop.evaluate(forward, ROWS, 512, "eval loss"), forward.loss(pack(ROWS[:1], DEVICE)).item()]
    forward.forget()
    for _ in range(2):
        optimizer.zero_grad()
        for row in ROWS:
            loss = forward.loss(pack([row], DEVICE))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return [*losses, loop.evaluate(forward, ROWS, 512, "eval loss")], gradients(model)


def same(base: Base, settings: Train, streamed: int) -> None:
    (losses, found), (expected, plain) = (train_two_steps(base, settings, count) for count in (streamed, 0))
    assert losses == expected
    assert found.keys() == plain.keys()
    assert all(torch.equal(gradient, plain[name]) for name, gradient in found.items())


@pytest.mark.parametrize(
    ("kind", "quantization", "streamed"),
    [("llama", "nf4", 6), ("qwen3", "fp4", 4), ("qwen2-bias", "none", 6), ("qwen3-moe", "nf4", 5)],
)
def test_losses_and_gradients_are_the_same_to_the_bit(tmp_path, stream, kind, quantization, streamed):
    same(make_base(tmp_path, kind), Train(rank=4, quantization=quantization), streamed)
    assert stream is None or stream.count > 20


def test_a_gguf_streams_its_blocks(tmp_path, stream):
    (file,) = converter().export(make_base(tmp_path).path, [Target("Q4_K_M", tmp_path / "base.gguf")])
    same(Base("gguf", tmp_path, gguf=open_gguf(file.path)), Train(rank=4), 6)


def test_two_layers_are_on_their_way_and_the_backward_pass_begins_with_those_that_are_there(stream):
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).requires_grad_(False) for _ in range(LAYERS)]
    weights = [layer[0].weight.clone() for layer in layers]
    streaming = LayerStream(layers, DEVICE)
    assert streaming.nbytes == LAYERS * 8 * 8 * 4
    there: list[list[int]] = []

    def use(index: int) -> None:
        layers[index](torch.ones(1, 8, device=DEVICE))
        assert torch.equal(layers[index][0].weight.cpu(), weights[index])
        there.append(sorted(slot.position for slot in streaming._slots if slot.position is not None))

    for _ in range(2):
        before = stream and stream.count
        with torch.no_grad():
            for index in range(LAYERS):
                use(index)
        for index in reversed(range(LAYERS)):
            use(index)
        forward, backward = there[:LAYERS], there[LAYERS:]
        assert forward == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [3, 4, 5], [3, 4, 5]]
        assert backward == [[3, 4, 5], [2, 3, 4], [1, 2, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
        assert stream is None or stream.count - before == 2 * (LAYERS - 3) + (3 if before == 0 else 0)
        there.clear()


def test_a_system_that_locks_no_memory_streams_from_other_memory(tmp_path, stream, monkeypatch, capsys):
    monkeypatch.setattr(layer_stream, "locked", lambda *_: None)
    same(make_base(tmp_path), Train(rank=4), 6)
    assert capsys.readouterr().err.count("locks no memory") == 1


def test_a_whole_run_writes_the_same_adapter(tmp_path, stream, monkeypatch):
    base, rows, results = make_base(tmp_path), make_rows(12), []
    for name, changed in {"plain": {}, "streamed": {"streamed": LAYERS}, "loaded": {"loads_in_host_memory": True}}.items():
        monkeypatch.setattr(loop, "choose", lambda *_, changed=changed: planner.Fit(64, 64, True, **changed))
        out = tmp_path / name
        settings = Train(rank=4, epochs=2, batch_size=4, learning_rate=1e-2)
        loop.run(base, rows, make_rows(4, seed=9), settings, out=out / "adapter", checkpoint=out / "checkpoint", key="")
        results.append((out / "adapter/adapter_model.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


# -- what the plan chooses --------------------------------------------------------------------------------------------------------------------

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LONG = [TokenRow([1] * 900, [True] * 900, "", "") for _ in range(64)]
HOST = 64 << 30


@pytest.fixture(scope="module")
def model() -> MetaModel:
    return MetaModel(SHAPE, "8B")


def fit(model: MetaModel, available: float, rows=LONG, streamable: int = HOST, **settings) -> planner.Fit:
    return planner.on_gpu(model, rows, Train(batch_size=16, **settings), round(available), streamable=streamable)


def test_layers_are_streamed_where_they_do_not_fit(model):
    whole, some, all_ = (fit(model, available) for available in (12e9, 4.6e9, 2.3e9))
    assert not whole.streamed and whole.pace is None and "streamed" not in whole.summary
    assert 3 < some.streamed < 32 == all_.streamed
    assert all(one.fits and one.checkpointing and one.offload_head for one in (some, all_))
    assert all_.largest < some.largest  # as many tokens as fit
    assert f", {some.streamed} frozen layers streamed: " in some.summary
    fewer = some.training.total(True, offload_head=True, streamed=some.streamed - 1)
    assert some.bytes <= some.available < fewer  # no more layers than it needs
    assert some.pinned_parts["streamed layers"] == some.streamed * some.training.streamable
    assert some.pinned_by_forward == some.pinned_parts["inputs of the layers"] + some.pinned_parts["output layer"]
    assert some.as_json()["streamed"] == some.streamed


def test_streamed_layers_leave_at_least_what_the_allocator_loses(model):
    lost = 16 * (20 << 20)
    small, large = (fit(model, limit * (1 - planner._SLACK)) for limit in (2.4e9, 8e9))
    assert small.streamed and small.bytes <= small.available == round(2.4e9) - lost
    assert large.available == round(8e9 * (1 - planner._SLACK)) < round(8e9) - lost  # a share of it is more
    assert not fit(model, 0.95 * (small.bytes + lost) - 10e6, micro_batch_tokens=small.tokens).fits


def test_a_base_loads_in_host_memory_where_it_does_not_fit_before_its_embeddings_are_offloaded(model):
    tight, wide, without = (fit(model, available, streamable=host) for available, host in ((5.7e9, HOST), (12e9, HOST), (5.7e9, 1 << 30)))
    assert tight.fits and tight.loads_in_host_memory and not tight.streamed and tight.offload_head
    assert "base loads in host memory" in tight.summary and tight.as_json()["loads_in_host_memory"]
    memory = tight.training
    assert tight.bytes <= tight.available < memory.before_steps
    assert tight.bytes >= memory.before_steps - memory.offloaded  # the same checks without the embeddings
    assert tight.pinned_by_forward == sum(tight.pinned_parts.values()) - memory.offloaded
    assert not wide.loads_in_host_memory and wide.available > wide.training.before_steps
    assert not without.fits and not without.loads_in_host_memory and without.bytes >= without.training.before_steps


def test_a_base_that_only_the_gpu_loads_needs_memory_for_its_embeddings(model):
    found = fit(model, 5.7e9, initialization="pissa")
    assert not found.fits and "more than the" in found.summary


def test_the_estimate_covers_the_checks_before_the_first_step(model):
    """They compute with the output layer on the GPU, and with a matrix in 16 bits, and their gradients are as many as those of a step."""
    few = fit(model, 2.3e9, micro_batch_tokens=300)
    memory = few.training
    base = few.parts["base"]
    assert memory.logits < memory.dequantized and few.streamed
    assert few.bytes >= base + memory.adapter + memory.gradients + memory.workspace + memory.head + memory.dequantized


def test_the_speed_follows_from_the_link_or_from_the_products(model):
    slow, fast = (
        planner.on_gpu(model, LONG, Train(batch_size=16), round(2.3e9), streamable=HOST, pace=lambda link=link: planner.Pace(link, 8e14))
        for link in (1e9, 1e12)
    )
    copied = 2 * (32 - 3) * slow.training.streamable + slow.training.host_inputs + slow.training.head
    assert slow.expected_tokens_per_s == pytest.approx(slow.largest * 1e9 / copied)
    assert fast.expected_tokens_per_s == pytest.approx(8e14 / (6 * 6.98e9 - 2 * 32 * 4096 * 14336), rel=0.01)
    assert "1.0 GB/s, measured" in slow.summary
    assert "12.0 GB/s, assumed" in fit(model, 2.3e9).summary


@pytest.mark.parametrize(
    "changed",
    [
        {"streamable": 2 << 30},  # too little host memory
        {"gradient_checkpointing": False},
        {"method": "dora"},
        {"initialization": "pissa"},
        {"quantization": "hqq4"},
        {"sharding": "full"},
    ],
)
def test_where_nothing_can_be_streamed_the_plan_says_that_it_does_not_fit(model, changed):
    found = fit(model, 2.3e9, **changed)
    assert not found.streamed and not found.fits and "more than the" in found.summary


def test_layers_that_share_keys_are_not_streamed():
    """torch's own checkpoint runs them, which has gradients come by way of other layers."""
    shape = {"model_type": "gemma3n_text", "num_kv_shared_layers": 4, "num_hidden_layers": 10, "hidden_size": 2048, "head_dim": 128}
    assert not fit(MetaModel(shape, "shape"), 1e9).streamed
