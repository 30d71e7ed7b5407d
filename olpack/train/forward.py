"""A model with an adapter, made ready to learn from flat rows: `Forward(model, …).loss(flat)`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from olpack import progress
from olpack.data import TokenRow
from olpack.train.batches import FlatRow, flatten
from olpack.train.device import compute_dtype
from olpack.train.ops import attention, lora, pointwise
from olpack.train.ops.checkpointing import Recompute
from olpack.train.ops.equivalence import Pass, Trial
from olpack.train.ops.loss import head_loss
from olpack.train.ops.pinned import HostMemory

_SAME = 1e-2  # of the norm of a gradient, computed twice the same way


class Forward:
    """Runs a model over flat rows.

    Args:
        model: a peft model in training mode, its frozen parts in the compute dtype.
        device: where it is.
        checkpointing: compute activations again in the backward pass.
        host: with it, where the layers' inputs wait. The input embeddings are in host memory then, too, where they are no part of the head.
        keep: with checkpointing, keep attention's results as well.
        head_waits: with `host`, keep the output layer in host memory, too, but for the moment of each loss; where nothing else needs it.

    Attributes:
        packs: whether samples can be put end to end. False for a model whose attention is its own: then a flat row must hold one sample.
    """

    def __init__(
        self, model, device: torch.device, *, checkpointing: bool, host: HostMemory | None = None, keep: bool = False, head_waits: bool = False
    ):
        self.model, self.device, self.dtype = model, device, compute_dtype(device)
        self.base = model.get_base_model()
        text = self.base.config.get_text_config()
        self.head, self.softcap = self.base.get_output_embeddings(), getattr(text, "final_logit_softcapping", None)
        self._recompute = None
        trained = model.training
        model.eval()  # what follows is tried, and dropout would make each trial another one
        samples = _samples(self.base, device)
        with self._mixed():
            trial = Trial(self.base, self.dtype, _passes(samples, self.logits))
        pointwise.use_kernels(device, self.dtype, text.to_dict(), model.peft_config["default"].r)
        pointwise.fuse_rotary(self.base)
        with self._mixed():
            self._fuse(samples, trial)
            self.packs = self._use_packed_attention(samples, trial)
            self._head_alone = self._head_is_all(samples, trial)
        model.train(trained)
        if checkpointing:
            self._checkpoint(samples[0], host, keep, shares_keys=bool(getattr(text, "num_kv_shared_layers", 0)))
        if host is not None:
            if head_waits and not self._head_alone:
                progress.warn("The output layer does more than a product, so it stays on the GPU, and takes more memory than the plan says")
            self._embed_on_host(host, with_head=head_waits and self._head_alone)

    def _fuse(self, samples: list[FlatRow], trial: Trial) -> None:
        """Put the fused functions in, and take them out again where the model then computes something else."""
        changed = [*pointwise.fuse_norms(self.base), *lora.fuse(self.model, self.dtype)]
        if trial.agrees(_passes(samples, self.logits)):
            return
        for module in changed:
            del module.forward
        progress.warn(f"{type(self.base).__name__} computes otherwise than olpack's fused functions do, so it is trained without them")

    def _head_is_all(self, samples: list[FlatRow], trial: Trial) -> bool:
        """Whether the model's logits are those of its frozen head, which is tried: some models scale them."""
        if type(self.head) is not torch.nn.Linear or self.head.weight.requires_grad:
            return False
        return trial.agrees(_passes(samples, self._head_logits))

    def _checkpoint(self, sample: FlatRow, host: HostMemory | None, keep: bool, *, shares_keys: bool) -> None:
        self.base.enable_input_require_grads()
        if shares_keys:  # a layer's gradients also come by way of other layers, which only torch's own way knows
            self.base._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
            return
        drops = not self.packs or any(isinstance(module, torch.nn.Dropout) and module.p for module in self.model.modules())
        self._recompute = Recompute(self.device, keep=keep, random=drops)
        self.base._set_gradient_checkpointing(True, self._recompute)
        # A layer mostly ends with the MLP's last product and an addition. Where it does not (a norm follows), the gradients are others.
        wanted = self._gradients(sample)
        self._recompute.skips = True
        apart = (self._gradients(sample) - wanted).abs()
        self._recompute.skips = bool((apart <= _SAME * wanted + 1e-6 * wanted.max()).all())
        self._recompute.host = host  # which is being made meanwhile

    def _gradients(self, sample: FlatRow) -> torch.Tensor:
        """The norm of each. Not once they are joined (`olpack.train.ops.flat_parameters`)."""
        self.loss(sample).backward()
        found = torch.stack([parameter.grad.norm() for parameter in self.model.parameters() if parameter.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return found

    def forget(self) -> None:
        """After a pass that came to no end: give free what waited for its backward pass."""
        if self._recompute is not None:
            self._recompute.forget()

    def budget(self, tokens: int) -> int:
        """Tokens of a micro-batch: as many as given, or one row where samples cannot be put end to end."""
        return tokens if self.packs else 1

    def loss(self, flat: FlatRow) -> torch.Tensor:
        """Negative log-probability summed over the target tokens, float32, in nats."""
        with self._mixed():
            if self._head_alone:
                hidden = self._hidden(flat)[0, flat.before]
                weight = self.head.weight.to(self.device, non_blocking=True)  # it may wait in host memory
                return head_loss(hidden, weight, self.head.bias, flat.targets, self.softcap)
            logits = self.logits(flat, flat.before)
        return F.cross_entropy(logits[0].float(), flat.targets, reduction="sum")

    def _mixed(self):
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", self.dtype)

    def _arguments(self, flat: FlatRow) -> dict:
        bounds = {"cu_seq_lens_q": flat.starts, "cu_seq_lens_k": flat.starts, "max_length_q": flat.longest, "max_length_k": flat.longest}
        packed = self.base.config._attn_implementation == attention.NAME
        return {"input_ids": flat.ids, "position_ids": flat.positions, "use_cache": False, **(bounds if packed else {})}

    def _hidden(self, flat: FlatRow) -> torch.Tensor:
        return self.base.get_decoder()(**self._arguments(flat)).last_hidden_state

    def logits(self, flat: FlatRow, keep: torch.Tensor | int = 0) -> torch.Tensor:
        """[1, tokens, vocabulary], at the places `keep`; 0: at all."""
        return self.base(**self._arguments(flat), logits_to_keep=keep).logits

    def _head_logits(self, flat: FlatRow) -> torch.Tensor:
        logits = F.linear(self._hidden(flat).to(self.head.weight.dtype), self.head.weight, self.head.bias)
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def _embed_on_host(self, host: HostMemory, *, with_head: bool) -> None:
        """Keep the input embeddings in host memory; a step looks up a few of their rows only. Not where they are the head's, too, unless that
        waits there as well."""
        embeddings, device = self.base.get_input_embeddings(), self.device
        plain = type(embeddings) is torch.nn.Embedding and not embeddings.weight.requires_grad
        shared = self.head is not None and self.head.weight is embeddings.weight
        if with_head and (plain or not shared):
            _to_host(self.head.weight, host)
        elif shared:
            return
        if plain:
            _to_host(embeddings.weight, host)
            embeddings.forward = lambda ids: F.embedding(ids.cpu(), embeddings.weight).to(device, non_blocking=True)

    def _use_packed_attention(self, samples: list[FlatRow], trial: Trial) -> bool:
        """Put the attention over flat rows in, and see that two samples in one row come out as each alone does."""
        attention.register()
        before = self.base.config._attn_implementation
        rows = [TokenRow(sample.ids[0].tolist(), [True] * sample.ids.shape[1], "", "") for sample in samples]
        try:
            self.base.set_attn_implementation(attention.NAME)
            if trial.agrees(_passes([flatten(rows, self.device)], self.logits)):
                return True
            reason = "what it computes for a row depends on the rows beside it"
        except (ValueError, NotImplementedError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
        self.base.set_attn_implementation(before)
        progress.warn(f"{type(self.base).__name__} cannot learn several rows at once ({reason}), so it learns them one by one")
        return False


def _to_host(weight: torch.nn.Parameter, host: HostMemory) -> None:
    if weight.device.type != "cpu":  # a matrix may be both embedding and head
        weight.data = host.take(weight.data).copy_(weight.data)


def _passes(samples: list[FlatRow], logits: Callable[[FlatRow], torch.Tensor]) -> list[Pass]:
    return [lambda sample=sample: logits(sample)[0] for sample in samples]


def _samples(base, device: torch.device) -> list[FlatRow]:
    """Two short rows of any tokens."""
    words = base.get_input_embeddings().num_embeddings
    rows = [TokenRow([(7 * index + length) % words for index in range(length)], [True] * length, "", "") for length in (9, 5)]
    return [flatten([row], device) for row in rows]
