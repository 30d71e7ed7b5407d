"""The forward pass of a model with an adapter over packed batches: `Forward(model, …).loss(batch)`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, VeraConfig
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from olpack import progress
from olpack.data import TokenRow
from olpack.errors import first_line
from olpack.train.batches import PackedBatch, pack
from olpack.train.device import compute_dtype
from olpack.train.ops import attention, lora, pointwise
from olpack.train.ops.activation_checkpointing import Recompute
from olpack.train.ops.equivalence import EquivalenceCheck, Pass
from olpack.train.ops.loss import chunked_cross_entropy
from olpack.train.ops.pinned_memory import PinnedMemory
from olpack.train.pass_graphs import PassGraphs

FP8_TOLERANCE = 0.2  # of what a layer adds to its input; rounding to e4m3 alone gives about 0.05
_SAME = 1e-2  # of the norm of a gradient, computed twice the same way


class Forward:
    """The forward pass of a model over packed batches.

    Args:
        model: a peft model in training mode, its frozen parts in the compute dtype.
        device: where it is.
        checkpointing: compute activations again in the backward pass.
        pinned: with checkpointing, memory for the layers' inputs, and for the input embeddings where they are no part of the output layer.
        offload_attention: with checkpointing, save the attention outputs as well, in `pinned` where there is some.
        offload_head: with `pinned`, offload the output layer, too, except for each loss; where nothing else needs it.
        in_fp8: compute the products with frozen weights in fp8, where every layer then agrees within `FP8_TOLERANCE`.

    Attributes:
        in_fp8: whether they are computed so.
        packs: whether samples can be put end to end. False for a model whose attention is its own: then a batch must be one sample.
    """

    def __init__(
        self,
        model: PeftModel,
        device: torch.device,
        *,
        checkpointing: bool,
        pinned: PinnedMemory | None = None,
        offload_attention: bool = False,
        offload_head: bool = False,
        in_fp8: bool = False,
    ):
        self.model, self.device, self.dtype = model, device, compute_dtype(device)
        self.base = _base_of(model)
        text = self.base.config.get_text_config()
        self.head, self.softcap = self.base.get_output_embeddings(), getattr(text, "final_logit_softcapping", None)
        self._recompute: Recompute | None = None
        self._graphs: PassGraphs | None = None
        embeddings = self.base.get_input_embeddings()
        if type(embeddings) is torch.nn.Embedding and embeddings.weight.device.type != device.type:  # a base whose layers are streamed
            _look_up_in_host_memory(embeddings, device)
        training = model.training
        model.eval()  # what follows is compared, and dropout would make each pass another one
        samples = _samples(self.base, device)
        with self._autocast():
            check = EquivalenceCheck(self.base, self.dtype, _passes(samples, self.logits))
        adapter = model.peft_config["default"]
        assert isinstance(adapter, LoraConfig | VeraConfig)  # `olpack.train.adapter` makes no other
        pointwise.use_kernels(device, self.dtype, text.to_dict(), adapter.r)
        pointwise.fuse_rotary(self.base)
        with self._autocast():
            fused = self._fuse(samples, check)
            self.packs = self._use_packed_attention(samples, check)
            self._head_alone = self._head_is_all(samples, check)
            self.in_fp8 = in_fp8 and fused and self._use_fp8(samples, check)
        model.train(training)
        self._drops = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
        plain = fused and lora.all_fused(model) and not self._drops
        self._alike = plain and self.packs and self._head_alone and not checkpointing and pinned is None
        if checkpointing:
            self._checkpoint(samples[0], pinned, offload_attention, shares_keys=bool(getattr(text, "num_kv_shared_layers", 0)))
        if pinned is not None:
            if offload_head and not self._head_alone:
                progress.warn("The output layer computes more than a product, so it stays on the GPU, and takes more memory than planned")
            self._offload_embeddings(pinned, with_head=offload_head and self._head_alone)

    def _fuse(self, samples: list[PackedBatch], check: EquivalenceCheck) -> bool:
        """Put the fused functions in, and take them out again where the model then computes something else. Returns whether they are in."""
        changed = [*pointwise.fuse_norms(self.base), *lora.fuse(self.model, self.dtype)]
        if check.agrees(_passes(samples, self.logits)):
            return True
        for module in changed:
            del module.forward
        progress.warn(f"{type(self.base).__name__} does not compute what olpack's fused functions compute, so it is trained without them")
        return False

    def _use_fp8(self, samples: list[PackedBatch], check: EquivalenceCheck) -> bool:
        """Put the products in fp8 in, and take them out again where a layer then computes something else. Returns whether they are in."""
        try:
            lora.fuse(self.model, self.dtype, in_fp8=True)
            if check.agrees(_passes(samples, self.logits), FP8_TOLERANCE):
                return True
            reason = f"in fp8 they change what {type(self.base).__name__} computes by more than {FP8_TOLERANCE:.0%}"
        except Exception as error:  # a GPU, a torch or a Triton without them: whatever it is, 16 bits work
            reason = first_line(error)
        lora.fuse(self.model, self.dtype)
        progress.warn(f"Products with frozen weights stay in 16 bits: {reason}")
        return False

    def _head_is_all(self, samples: list[PackedBatch], check: EquivalenceCheck) -> bool:
        """Whether the model's logits are those of its frozen head, which is checked: some models scale them."""
        if type(self.head) is not torch.nn.Linear or self.head.weight.requires_grad:
            return False
        return check.agrees(_passes(samples, self._head_logits))

    def _checkpoint(self, sample: PackedBatch, pinned: PinnedMemory | None, offload_attention: bool, *, shares_keys: bool) -> None:
        self.base.enable_input_require_grads()
        if shares_keys:  # gradients of a layer also come by way of other layers, which only torch's own checkpointing handles
            self.base._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
            return
        random = not self.packs or self._drops
        recompute = self._recompute = Recompute(self.device, offload_attention=offload_attention, random=random)
        self.base._set_gradient_checkpointing(True, recompute)
        # A layer mostly ends with the MLP's last product and an addition. Where it does not (a norm follows), the gradients differ.
        expected = self._gradients(sample)
        recompute.skips = True
        apart = (self._gradients(sample) - expected).abs()
        recompute.skips = bool((apart <= _SAME * expected + 1e-6 * expected.max()).all())
        recompute.pinned = pinned  # which a thread locks meanwhile

    def _gradients(self, sample: PackedBatch) -> torch.Tensor:
        """The norm of each gradient. Only before the parameters become flat ones (`olpack.train.ops.flat_parameters`)."""
        self.loss(sample).backward()
        norms = torch.stack([parameter.grad.norm() for parameter in self.model.parameters() if parameter.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return norms

    def forget(self) -> bool:
        """Free what a pass saved that ended without its backward pass, and the memory of CUDA graphs. Returns whether there were graphs."""
        if self._recompute is not None:
            self._recompute.forget()
        return self._graphs is not None and self._graphs.free()

    def use_graphs(self) -> None:
        """Compute small micro-batches by CUDA graphs, where every pass launches the same kernels. The gradients' places in memory must stay."""
        if self.device.type == "cuda" and self._alike:
            layers = self.base.config.get_text_config().num_hidden_layers
            self._graphs = PassGraphs(self.loss, self.device, lora.frozen_weights(self.model) // layers)

    def backward(self, rows: list[TokenRow], weight: float = 1.0) -> torch.Tensor:
        """Add the gradients of the loss of a micro-batch, summed over its target tokens and multiplied by `weight`. Returns that loss."""
        if self._graphs is not None and weight == 1 and (total := self._graphs.backward(rows)) is not None:
            return total
        loss = self.loss(pack(rows, self.device)) * weight
        loss.backward()
        return loss.detach()

    def budget(self, tokens: int) -> int:
        """Tokens of a micro-batch: as many as given, or one row where samples cannot be put end to end."""
        return tokens if self.packs else 1

    def loss(self, batch: PackedBatch) -> torch.Tensor:
        """Negative log-probability summed over the target tokens, float32, in nats."""
        with self._autocast():
            if self._head_alone:
                hidden = self._hidden(batch)[0, batch.before]
                weight = self.head.weight.to(self.device, non_blocking=True)  # it may be offloaded
                return chunked_cross_entropy(hidden, weight, self.head.bias, batch.targets, self.softcap)
            logits = self.logits(batch, batch.before)
        return F.cross_entropy(logits[0].float(), batch.targets, reduction="sum")

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", self.dtype)

    def _arguments(self, batch: PackedBatch) -> dict[str, Any]:
        bounds = {"cu_seq_lens_q": batch.starts, "cu_seq_lens_k": batch.starts, "max_length_q": batch.longest, "max_length_k": batch.longest}
        packed = self.base.config._attn_implementation == attention.NAME
        return {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False, **(bounds if packed else {})}

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        return self.base.get_decoder()(**self._arguments(batch)).last_hidden_state

    def logits(self, batch: PackedBatch, places: torch.Tensor | int = 0) -> torch.Tensor:
        """[1, tokens, vocabulary], at these places; 0: at all."""
        return self.base(**self._arguments(batch), logits_to_keep=places).logits

    def _head_logits(self, batch: PackedBatch) -> torch.Tensor:
        logits = F.linear(self._hidden(batch).to(self.head.weight.dtype), self.head.weight, self.head.bias)
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def _offload_embeddings(self, pinned: PinnedMemory, *, with_head: bool) -> None:
        """Move the input embeddings to pinned memory; a step looks up a few of their rows only. Not where they are the output layer, too, unless
        that is offloaded as well."""
        embeddings, device = self.base.get_input_embeddings(), self.device
        plain = embeddings if type(embeddings) is torch.nn.Embedding and not embeddings.weight.requires_grad else None
        shared = self.head is not None and self.head.weight is embeddings.weight
        if with_head and (plain is not None or not shared):
            _offload(self.head.weight, pinned)
        elif shared:
            return
        if plain is not None:
            _offload(plain.weight, pinned)
            _look_up_in_host_memory(plain, device)

    def _use_packed_attention(self, samples: list[PackedBatch], check: EquivalenceCheck) -> bool:
        """Put the attention over packed batches in, and check that two samples in one batch give what each gives alone."""
        attention.register()
        before = self.base.config._attn_implementation
        rows = [TokenRow(sample.ids[0].tolist(), [True] * sample.ids.shape[1], "", "") for sample in samples]
        try:
            self.base.set_attn_implementation(attention.NAME)
            if check.agrees(_passes([pack(rows, self.device)], self.logits)):
                return True
            reason = "its output for a row depends on the rows beside it"
        except (ValueError, NotImplementedError, TypeError, RuntimeError) as error:
            reason = first_line(error)
        self.base.set_attn_implementation(before)
        progress.warn(f"{type(self.base).__name__} cannot train on packed rows ({reason}), so rows are trained one by one")
        return False


def _base_of(model: PeftModel) -> PreTrainedModel:
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)  # `olpack.train.model` loads no other
    return base


def _offload(weight: torch.Tensor, pinned: PinnedMemory) -> None:
    if weight.device.type != "cpu":  # a matrix may be both embedding and output layer
        weight.data = pinned.allocate(weight.data).copy_(weight.data)


def _look_up_in_host_memory(embeddings: torch.nn.Embedding, device: torch.device) -> None:
    """Let embeddings in the host's memory give the GPU the rows that it asks for."""
    weight = embeddings.weight

    def look_up(input: torch.Tensor) -> torch.Tensor:
        return F.embedding(input.cpu(), weight).to(device, non_blocking=True)

    embeddings.forward = look_up  # type: ignore[method-assign] # of one module


def _passes(samples: list[PackedBatch], logits: Callable[[PackedBatch], torch.Tensor]) -> list[Pass]:
    def pass_of(sample: PackedBatch) -> Pass:
        return lambda: logits(sample)[0]

    return [pass_of(sample) for sample in samples]


def _samples(base: PreTrainedModel, device: torch.device) -> list[PackedBatch]:
    """Two short rows of any tokens, each as a batch."""
    vocabulary = base.get_input_embeddings().get_parameter("weight").shape[0]
    rows = [TokenRow([(7 * index + length) % vocabulary for index in range(length)], [True] * length, "", "") for length in (9, 5)]
    return [pack([row], device) for row in rows]
