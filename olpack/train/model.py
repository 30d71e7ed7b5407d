"""The frozen base with an adapter."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass
from functools import partial
from logging import ERROR, getLogger

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from olpack.errors import OlpackError, first_line
from olpack.model.base import Base
from olpack.model.frozen_weights import FrozenQuantization
from olpack.model.quantized import quantization_of
from olpack.recipe import Train
from olpack.train.adapter import Start, adapter_config, begin
from olpack.train.device import compute_dtype
from olpack.train.ops.layer_stream import LayerStream, move, tensors_of


@dataclass
class AdaptedModel:
    """A frozen base with a fresh adapter.

    Attributes:
        model: in training mode; the trained parameters are float32.
        start: the adapter's first values.
        quantization: how the base weights are quantized; None where they are not, or where the base comes quantized.
    """

    model: PeftModel
    start: Start
    quantization: FrozenQuantization | None


def load_with_adapter(
    base: Base, settings: Train, device: torch.device, *, sharded: bool = False, streamed: int = 0, in_host_memory: bool = False
) -> AdaptedModel:
    """Load the base, frozen, and put a fresh adapter on it (the model still answers as the base does).

    Args:
        base: the model.
        settings: the recipe's `train` section.
        device: where it goes.
        sharded: its layers will be sharded over several GPUs, for which 4-bit weights are stored as float32. FSDP2 of older versions of torch takes
            no integers, and 16-bit numbers are copied on a GPU in a way that makes all NaNs the same one: codes that look like one are lost.
        streamed: so many of its layers are in pinned memory except while they compute (`olpack.train.ops.layer_stream`), and so are input embeddings
            that are no output layer.
        in_host_memory: it loads there and goes to the GPU without such embeddings, which are never on the GPU then; with streamed layers always.

    Raises:
        OlpackError: the base does not load, or does not fit into the GPU's memory.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes.autograd._functions").setLevel(ERROR)  # int8 warns at each layer that it casts its input
    adapter, in_host_memory = adapter_config(base, settings), in_host_memory or streamed > 0
    try:
        model = _load(base, settings, device, sharded=sharded, in_host_memory=in_host_memory)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise OlpackError(f"{base.label} does not fit into the GPU's memory.", "Take a smaller base, or set `train.quantization: nf4`.") from None
        raise OlpackError(f"{base.label} does not load: {first_line(error)}", "`olpack plan` checks the base.") from error
    model.config.use_cache = False
    model.requires_grad_(False)
    quantization = _quantization(model, base, settings, device)
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # the embedding is saved once, and the export knows that it is shared
        adapted = get_peft_model(model, adapter)
    assert isinstance(adapted, PeftModel)  # a mixed model only where it is asked for
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if in_host_memory:
        stream_layers(model, device, streamed)
    start = begin(adapted, base, settings, compute_dtype(device))
    adapted.peft_config["default"].base_model_name_or_path = base.label
    adapted.train()
    return AdaptedModel(adapted, start, quantization)


def stream_layers(model: PreTrainedModel, device: torch.device, count: int) -> None:
    """Move a model to the GPU, but for so many of its layers, evenly among the others, and for the input embeddings."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if device.type == "cuda":
        _map_memory_in_small_pieces()
    layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    streamed = [layer for index, layer in enumerate(layers) if (index + 1) * count // len(layers) > index * count // len(layers)]
    if streamed:
        LayerStream(streamed, device)
    placed = [tensor for layer in streamed for tensor in tensors_of(layer)]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embeddings) is torch.nn.Embedding and head is not None and head.weight is not embeddings.weight:
        placed.append(embeddings.weight)
    move(model, device, but=placed)


def _map_memory_in_small_pieces() -> None:
    """Have torch's allocator map memory piece by piece, unless the user has set it up: an output layer of 1 GB that comes and goes leaves holes in
    memory of which nothing is to spare."""
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ:
        return
    with warnings.catch_warnings(), contextlib.suppress(AttributeError, RuntimeError):  # no public function sets it while a process runs
        warnings.simplefilter("ignore")
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def _load(base: Base, settings: Train, device: torch.device, *, sharded: bool, in_host_memory: bool) -> PreTrainedModel:
    """The base, quantized as `train.quantization` or its own config.json has it."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from olpack.model.four_bits import check_kernel
    from olpack.train.frozen import FrozenConfig, StreamedFourBits, use_packed
    from olpack.train.gguf_model import load_frozen

    dtype, kind, place = compute_dtype(device), settings.quantization, torch.device("cpu") if in_host_memory else device
    if base.gguf is not None:
        return load_frozen(base.gguf, place, dtype)
    check_kernel()
    quantization: BitsAndBytesConfig | FrozenConfig | None = None
    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    if base.leftover_quantization:
        del config.quantization_config
    if not use_packed(config, base, dtype) and not quantization_of(base.config):
        if kind in ("nf4", "fp4"):
            four_bits = partial(StreamedFourBits, device) if in_host_memory else partial(BitsAndBytesConfig, load_in_4bit=True)
            quantization = four_bits(
                bnb_4bit_quant_type=kind,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=settings.double_quantization,
                bnb_4bit_quant_storage=torch.float32 if sharded else torch.uint8,
            )
        elif kind == "int8":
            quantization = BitsAndBytesConfig(load_in_8bit=True)
        elif kind in ("hqq4", "hqq8"):
            quantization = FrozenConfig(bits=int(kind.removeprefix("hqq")), dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        base.path,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": place},
    )
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # it would repack the weight for good at the first evaluation, and train on nothing
        if isinstance(layer, Linear8bitLt):  # as its first pass would; peft moves the weight before that, and the scales would be lost
            layer.init_8bit_state()
    return model


def _quantization(model: PreTrainedModel, base: Base, settings: Train, device: torch.device) -> FrozenQuantization | None:
    if settings.quantization == "none" or quantization_of(base.config):
        return None
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from olpack.train.frozen import HqqLinear

    text = {id(module) for module in model.get_decoder().modules()}
    modules = [name for name, module in model.named_modules() if id(module) in text and isinstance(module, (Linear4bit, Linear8bitLt, HqqLinear))]
    dtype = str(compute_dtype(device)).removeprefix("torch.")
    return FrozenQuantization(settings.quantization, settings.double_quantization, dtype, settings.initialization, modules)
