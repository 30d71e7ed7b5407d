"""The forward pass over packed batches computes what peft and transformers compute row by row: losses, gradients, logits."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from gated import gated_mlp
from tiny_models import write_model

from olpack.data import TokenRow
from olpack.model.base import Base
from olpack.recipe import Train
from olpack.train import forward as forward_module
from olpack.train.batches import micro_batches, pack
from olpack.train.forward import Forward
from olpack.train.model import load_with_adapter
from olpack.train.ops import activation_checkpointing as recomputation
from olpack.train.ops import attention, lora, pointwise
from olpack.train.ops.limits import UNCOUNTED
from olpack.train.ops.loss import chunked_cross_entropy
from olpack.train.ops.low_rank import MlpLowRank

CPU = torch.device("cpu")
SENTENCEPIECE = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
WINDOW = {"sliding_window": 8, "use_sliding_window": True}
MODELS = {
    "llama": ("llama", {"tied": False}),
    "qwen2-bias": ("qwen2", {"tied": False}),
    "qwen3": ("qwen3", {}),
    "mistral-window": ("mistral", {**WINDOW, **SENTENCEPIECE}),
    "gemma2-softcap": ("gemma2", {**WINDOW, **SENTENCEPIECE}),
    "gemma3-window": ("gemma3_text", {**WINDOW, **SENTENCEPIECE}),
    "phi3-joined": ("phi3", SENTENCEPIECE),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}),
}


def random_row(length: int) -> TokenRow:
    generator = torch.Generator().manual_seed(length)
    return TokenRow(torch.randint(3, 500, (length,), generator=generator).tolist(), [index > length // 2 for index in range(length)], "", "")


ROWS = [random_row(length) for length in (30, 17, 41)]


def with_adapter(base: Base, settings: Train, device: torch.device = CPU):
    """A model whose B is not zero, so that the adapter matters."""
    model = load_with_adapter(base, settings, device).model
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator).to(device)
    return model


def plain_loss(model, row: TokenRow) -> torch.Tensor:
    """As peft and transformers compute it, with nothing of ours."""
    ids, loss_mask = (torch.tensor(values, device=model.device) for values in (row.ids, row.loss_mask))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1][loss_mask[1:]], ids[1:][loss_mask[1:]], reduction="sum")


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def same_gradients(model, plain, near: float) -> None:
    """Each apart by no more than that share of its norm."""
    ours, theirs = gradients(model), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= near * gradient.norm(), name


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_plain_way(tmp_path, kind, quantization):
    model_type, settings = MODELS[kind]
    base = Base("tiny", write_model(tmp_path / "model", model_type, **settings))
    train = Train(quantization=quantization, rank=4)
    plain = with_adapter(base, train)
    wanted = sum(plain_loss(plain, row) for row in ROWS)
    wanted.backward()
    for checkpointing, offload_attention in ((False, False), (True, False), (True, True)):
        model = with_adapter(base, train)
        forward = Forward(model, CPU, checkpointing=checkpointing, offload_attention=offload_attention)
        assert forward.packs
        loss = forward.loss(pack(ROWS, CPU))
        loss.backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        same_gradients(model, plain, 1e-4)


def test_a_sample_between_others_has_the_logits_that_it_has_alone(tmp_path):
    model = with_adapter(Base("tiny", write_model(tmp_path / "model")), Train(rank=4))
    forward = Forward(model, CPU, checkpointing=False)
    with torch.no_grad():
        alone = forward.logits(pack([ROWS[1]], CPU))[0]
        between = forward.logits(pack(ROWS, CPU))[0, len(ROWS[0].ids) : len(ROWS[0].ids) + len(ROWS[1].ids)]
    assert (alone - between).abs().max() <= 1e-5 * alone.abs().max()


def test_layers_that_are_more_than_lora_stay_as_peft_made_them(tmp_path):
    """Dropout on the adapter's input: the frozen dropout of an evaluation makes the two comparable."""
    base, train = Base("tiny", write_model(tmp_path / "model")), Train(rank=4, dropout=0.1)
    plain, model = with_adapter(base, train).eval(), with_adapter(base, train).eval()
    forward = Forward(model, CPU, checkpointing=False)
    with torch.no_grad():
        assert forward.loss(pack(ROWS, CPU)).item() == pytest.approx(sum(plain_loss(plain, row) for row in ROWS).item(), rel=1e-5)


class Scaled(torch.nn.Module):
    """A gated MLP by its names, with another formula."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(3 * self.gate_proj(x)) * self.up_proj(x))


def test_a_model_that_computes_otherwise_is_trained_as_it_is(tmp_path, capsys):
    base = Base("tiny", write_model(tmp_path / "model"))
    plain, model = with_adapter(base, Train(rank=4)), with_adapter(base, Train(rank=4))
    for each in (plain, model):
        for layer in each.get_base_model().model.layers:
            layer.mlp = Scaled(layer.mlp)
    forward = Forward(model, CPU, checkpointing=False)
    assert "without" in capsys.readouterr().err
    assert forward.packs
    assert forward.loss(pack(ROWS, CPU)).item() == pytest.approx(sum(plain_loss(plain, row) for row in ROWS).item(), rel=1e-5)


@pytest.mark.parametrize("other", [False, True])
def test_rounding_that_grows_over_many_layers_is_no_other_formula(tmp_path, monkeypatch, capsys, other):
    for module in ("forward", "model"):
        monkeypatch.setattr(f"olpack.train.{module}.compute_dtype", lambda _: torch.bfloat16)
    base = Base("tiny", write_model(tmp_path / "model", num_hidden_layers=48, initializer_range=0.08))
    model = with_adapter(base, Train(rank=4, quantization="none"))
    layers = model.get_base_model().model.layers
    if other:
        layers[7].mlp = Scaled(layers[7].mlp)
    ids = torch.tensor([ROWS[0].ids])
    with torch.no_grad():
        plain = model.eval()(input_ids=ids, use_cache=False).logits[0]
        found = Forward(model, CPU, checkpointing=False).logits(pack(ROWS[:1], CPU))[0]
    assert ("without" in capsys.readouterr().err) == other
    if not other:
        assert (found - plain).norm() > 0.05 * plain.norm()  # though each layer does the same


def test_another_formula_is_seen_beside_a_token_of_enormous_numbers(tmp_path, monkeypatch, capsys):
    """As the first token of a trained model has them: they must not hide what happens to the others."""
    for module in ("forward", "model"):
        monkeypatch.setattr(f"olpack.train.{module}.compute_dtype", lambda _: torch.bfloat16)
    model = with_adapter(Base("tiny", write_model(tmp_path / "model", tied=False)), Train(rank=4, quantization="none"))
    inner = model.get_base_model().model
    inner.embed_tokens.weight.data[forward_module._samples(model.get_base_model(), CPU)[0].ids[0, 0]] *= 1e5
    for layer in inner.layers:
        layer.mlp = Scaled(layer.mlp)
    Forward(model, CPU, checkpointing=False)
    assert "without" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm"]},
        {"method": "dora"},
    ],
    ids=["adapter-on-head", "head-and-embedding", "norm", "dora"],
)
def test_whatever_is_trained_gets_its_gradients(tmp_path, settings):
    base = Base("tiny", write_model(tmp_path / "model", tied=False))
    train = Train(quantization="none", rank=4, **settings)
    plain = with_adapter(base, train)
    sum(plain_loss(plain, row) for row in ROWS).backward()
    for checkpointing in (False, True):
        model = with_adapter(base, train)
        Forward(model, CPU, checkpointing=checkpointing).loss(pack(ROWS, CPU)).backward()
        same_gradients(model, plain, 3e-5)


@pytest.mark.parametrize("kind, skips", [("llama", True), ("gemma2", False)])  # in Gemma 2 a norm follows the MLP's last product
def test_a_layer_is_computed_again_without_its_last_product_where_gradients_stay_the_same(tmp_path, monkeypatch, kind, skips):
    settings = SENTENCEPIECE if kind == "gemma2" else {}
    model = with_adapter(Base("tiny", write_model(tmp_path / "model", kind, **settings)), Train(rank=4))
    forward = Forward(model, CPU, checkpointing=True)
    products = []
    up = lora._Products.up
    monkeypatch.setattr(lora._Products, "up", lambda self, x, h, index: products.append(index) or up(self, x, h, index))
    loss = forward.loss(pack(ROWS, CPU))
    made = len(products)
    loss.backward()
    assert made - (len(products) - made) == (len(model.get_base_model().model.layers) if skips else 0)


def test_a_backward_pass_that_fails_leaves_nothing_skipped(tmp_path, monkeypatch):
    model = with_adapter(Base("tiny", write_model(tmp_path / "model")), Train(rank=4))
    forward = Forward(model, CPU, checkpointing=True)
    wanted, loss = forward.loss(pack(ROWS, CPU)).item(), forward.loss(pack(ROWS, CPU))
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(lora._Products, "up", raising(torch.OutOfMemoryError))
        loss.backward()
    forward.forget()
    assert forward.loss(pack(ROWS, CPU)).item() == wanted


def raising(error: type[Exception]):
    def function(*_):
        raise error

    return function


def test_the_input_of_a_layer_is_freed_when_its_gradients_are_known(tmp_path, monkeypatch):
    alive, seen = weakref.WeakSet(), []

    class Watched(recomputation._SavedLayer):
        def __init__(self, hidden, *rest):
            super().__init__(hidden, *rest)
            alive.add(hidden)

    def restore(self, layer, restore=recomputation.Recompute.restore):
        seen.append(len(alive))
        return restore(self, layer)

    model = with_adapter(Base("tiny", write_model(tmp_path / "model", num_hidden_layers=4)), Train(rank=4))
    forward = Forward(model, CPU, checkpointing=True)
    monkeypatch.setattr(recomputation, "_SavedLayer", Watched)
    monkeypatch.setattr(recomputation.Recompute, "restore", restore)
    loss = forward.loss(pack(ROWS, CPU))  # which holds on to the graph
    loss.backward()
    assert seen == [4, 3, 2, 1]


def test_dropout_is_the_same_when_it_is_computed_again(tmp_path):
    base, found = Base("tiny", write_model(tmp_path / "model")), []
    for checkpointing in (False, True):
        model = with_adapter(base, Train(rank=4, dropout=0.3))
        forward = Forward(model, CPU, checkpointing=checkpointing)
        torch.manual_seed(5)
        forward.loss(pack(ROWS, CPU)).backward()
        found.append((gradients(model), torch.rand(1)))
    (one, after_one), (two, after_two) = found
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7) for name in one)
    assert after_one == after_two


def test_a_model_whose_attention_mixes_the_samples_trains_row_by_row(tmp_path, monkeypatch, capsys):
    def careless(module, query, key, value, attention_mask, scaling=None, **_):
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2), None

    monkeypatch.setattr(attention, "packed_attention", careless)
    attention.register.__wrapped__()
    try:
        model = with_adapter(Base("tiny", write_model(tmp_path / "model")), Train(rank=4))
        forward = Forward(model, CPU, checkpointing=False)
    finally:
        monkeypatch.undo()
        attention.register.__wrapped__()
    assert not forward.packs
    assert [len(group) for group in micro_batches(ROWS, forward.budget(512))] == [1, 1, 1]
    assert "one by one" in capsys.readouterr().err
    plain = with_adapter(Base("tiny", tmp_path / "model"), Train(rank=4))
    assert forward.loss(pack([ROWS[0]], CPU)).item() == pytest.approx(plain_loss(plain, ROWS[0]).item(), rel=1e-5)


def test_a_convolution_that_runs_through_row_ends_makes_rows_train_one_by_one(tmp_path, capsys):
    """huggingface/transformers#46588: attention of LFM2 ends at a row's end, and its short convolution goes on into the next row."""
    kinds = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
    base = Base("lfm2", write_model(tmp_path / "model", "lfm2", **kinds))
    forward = Forward(with_adapter(base, Train(rank=4, quantization="none")), CPU, checkpointing=True)
    assert not forward.packs and "one by one" in capsys.readouterr().err
    groups = micro_batches(ROWS, forward.budget(512))
    assert [len(group) for group in groups] == [1, 1, 1]
    plain = with_adapter(base, Train(rank=4, quantization="none"))
    for group in groups:
        forward.loss(pack(group, CPU)).backward()
        plain_loss(plain, group[0]).backward()
    same_gradients(forward.model, plain, 1e-3)


def test_groups_are_filled_by_best_fit():
    rows = [random_row(length) for length in (40, 60, 30, 70, 100, 20, 130)]
    groups = micro_batches(rows, 100)
    assert [sorted(len(row.ids) for row in group) for group in groups] == [[130], [100], [30, 70], [40, 60], [20]]
    assert sum(map(len, groups)) == len(rows)


def test_the_first_token_of_a_sample_is_never_a_target():
    rows = [TokenRow([5, 6, 7], [True, True, False], "", ""), TokenRow([8, 9], [True, True], "", "")]
    batch = pack(rows, CPU)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.starts.tolist() == [0, 3, 5]
    assert (batch.before.tolist(), batch.targets.tolist()) == ([0, 3], [6, 9])


def attention_of(query, key, value, window, softcap):
    """Plain scores of one sample [heads, tokens, size], with a mask."""
    repeat = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(repeat, 0).transpose(1, 2) * query.shape[-1] ** -0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    back = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    scores = scores.masked_fill((back < 0) | (back >= (window or query.shape[1])), float("-inf"))
    return scores.softmax(-1) @ value.repeat_interleave(repeat, 0)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 3.0), (4, 3.0), (100, None)])
def test_attention_over_packed_batches(window, softcap):
    torch.manual_seed(0)
    lengths, heads, key_heads, size = (7, 1, 12), 4, 2, 16
    query, key, value = (torch.randn(1, count, sum(lengths), size) for count in (heads, key_heads, key_heads))
    starts = torch.tensor([0, 7, 8, 20, 20], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": starts, "max_length_q": 12}
    mixed, _ = attention.packed_attention(None, query, key, value, None, sliding_window=window, softcap=softcap, **bounds)
    parts = [attention_of(*(states[0, :, start:end] for states in (query, key, value)), window, softcap) for start, end in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(mixed[0].transpose(0, 1), torch.cat(parts, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_chunked_cross_entropy(monkeypatch, softcap):
    torch.manual_seed(0)
    monkeypatch.setattr("olpack.train.ops.limits.CHUNK_LOGITS", 3 * 50)
    head, hidden, targets = torch.nn.Linear(8, 50), torch.randn(10, 8), torch.randint(0, 50, (10,))
    targets[[2, 9]] = UNCOUNTED
    head.requires_grad_(False)
    first, second = (hidden.clone().requires_grad_() for _ in range(2))
    logits = head(first)
    wanted = F.cross_entropy(torch.tanh(logits / softcap) * softcap if softcap else logits, targets, reduction="sum", ignore_index=UNCOUNTED)
    found = chunked_cross_entropy(second, head.weight, head.bias, targets, softcap)
    (3 * wanted).backward()
    (3 * found).backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_output_layer_gives_the_same_loss(tmp_path, monkeypatch, tied):
    model = with_adapter(Base("tiny", write_model(tmp_path / "model", tied=tied)), Train(rank=4))
    forward = Forward(model, CPU, checkpointing=True)
    wanted, moved = forward.loss(pack(ROWS, CPU)).item(), []
    monkeypatch.setattr(forward_module, "_offload", lambda weight, _: moved.append(weight))
    forward._offload_embeddings(None, with_head=True)
    base = model.get_base_model()
    assert {id(weight) for weight in moved} == {id(base.lm_head.weight), id(base.model.embed_tokens.weight)}
    assert forward.loss(pack(ROWS, CPU)).item() == wanted


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_and_its_gradient(offset):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16), torch.randn(2, 5, 16)
    wanted = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (offset + weight)
    (gradient,) = torch.autograd.grad(wanted, x, dy)
    found = pointwise._RmsNorm.apply(x, weight, 1e-6, offset)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, x, dy)[0], gradient)


@pytest.mark.parametrize("function", [F.silu, lambda x: F.gelu(x, approximate="tanh")])
def test_the_gates_and_their_gradients(function):
    torch.manual_seed(0)
    gated, upped, dmiddle = torch.randn(3, 6, 8).unbind(0)
    adapters = MlpLowRank(torch.randn(6, 4), torch.randn(8, 2), torch.randn(8, 2), torch.randn(2, 8))
    wanted, gradients = gated_mlp(function, gated, upped, dmiddle, adapters, dlow := torch.randn(6, 2))
    gate, (of_gate, of_up) = pointwise.gate_of(function), adapters.halves
    assert not gate.adds(adapters)  # on a CPU the large products do
    gated, upped, dmiddle = gated + of_gate @ adapters.gate_b.T, upped + of_up @ adapters.up_b.T, dmiddle + dlow @ adapters.down_a
    torch.testing.assert_close(gate.product(gated, upped, adapters), wanted)
    found = gate.gradients(dmiddle, gated, upped, adapters, dlow)
    torch.testing.assert_close((gated, upped, *found), gradients)


def test_another_activation_is_left_alone():
    assert pointwise.gate_of(torch.tanh) is None
    assert pointwise.gate_of(F.gelu) is None  # the exact one: near, and not the same
