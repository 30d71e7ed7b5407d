"""The frozen base with an adapter on it."""

from __future__ import annotations

import warnings
from logging import ERROR, getLogger

import torch

from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.model.frozen_weights import Held
from olpack.model.packed import quantization_of
from olpack.recipe import Train
from olpack.train.device import compute_dtype


def load_with_adapter(base: Base, settings: Train, device: torch.device, *, sharded: bool = False):
    """Load the base, frozen, and put a fresh adapter on it (the model still answers as the base does).

    Args:
        sharded: its layers will be spread over several GPUs, for which 4-bit weights are stored as float32. FSDP2 of older versions of torch takes
            no integers, and 16-bit numbers are copied on a GPU in a way that makes all NaNs the same one: codes that look like one are lost.

    Returns:
        a peft.PeftModel in training mode; what is trained is float32. Its `olpack_start` is what the adapter began with, its `olpack_held` how
        the base is held (`olpack.model.frozen_weights.Held`), None where it is not quantized here.
    """
    from peft import get_peft_model
    from transformers.utils import logging

    from olpack.train.adapter import adapter_config, begin

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes.autograd._functions").setLevel(ERROR)  # int8 says at each layer that it casts its input
    adapter = adapter_config(base, settings)
    try:
        model = _load(base, settings, device, sharded=sharded)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise OlpackError(f"{base.label} does not fit into the GPU's memory.", "Take a smaller base, or set `train.quantization: nf4`.") from None
        raise OlpackError(f"{base.label} does not load: {str(error).strip().splitlines()[0]}", "`olpack plan` checks the base.") from error
    model.config.use_cache = False
    model.requires_grad_(False)
    held = _held(model, base, settings, device)
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # the embedding is saved once, and the export knows that it is shared
        model = get_peft_model(model, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.olpack_start, model.olpack_held = begin(model, base, settings, compute_dtype(device)), held
    model.peft_config["default"].base_model_name_or_path = base.label
    return model.train()


def _load(base: Base, settings: Train, device: torch.device, *, sharded: bool):
    """The base as `train.quantization` or its own config.json has it."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from olpack.model.four_bits import check_kernel
    from olpack.train.frozen import FrozenConfig, use_packed

    check_kernel()
    dtype, kind, quantization = compute_dtype(device), settings.quantization, None
    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    if base.leftover_quantization:
        del config.quantization_config
    if not use_packed(config, base, dtype) and not quantization_of(base.config):
        if kind in ("nf4", "fp4"):
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
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
        device_map={"": device},
    )
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # it would repack the weight for good at the first evaluation, and train on nothing
        if isinstance(layer, Linear8bitLt):  # as its first pass would; peft moves the weight before that, and the scales would be lost
            layer.init_8bit_state()
    return model


def _held(model, base: Base, settings: Train, device: torch.device) -> Held | None:
    if settings.quantization == "none" or quantization_of(base.config):
        return None
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from olpack.train.frozen import HqqLinear

    text = {id(module) for module in model.get_decoder().modules()}
    modules = [name for name, module in model.named_modules() if id(module) in text and isinstance(module, (Linear4bit, Linear8bitLt, HqqLinear))]
    dtype = str(compute_dtype(device)).removeprefix("torch.")
    return Held(settings.quantization, settings.double_quantization, dtype, settings.initialization, modules)
