"""The base in 4 bits with an adapter on it."""

from __future__ import annotations

import torch

from olpack.base import Base
from olpack.errors import OlpackError
from olpack.recipe import Train


def pick_device() -> torch.device:
    """The first CUDA GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU (few of them multiply bfloat16 any faster)."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_with_adapter(base: Base, settings: Train, device: torch.device, *, sharded: bool = False):
    """Load the base, frozen, and put a fresh LoRA adapter on it (B is zero: the model still answers as the base does).

    Args:
        sharded: its layers will be spread over several GPUs, for which 4-bit weights are stored as the compute dtype.

    Returns:
        a peft.PeftModel in training mode; adapter weights are float32.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = compute_dtype(device)
    nf4 = None
    if settings.quantization == "nf4":
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
                                 bnb_4bit_quant_storage=dtype if sharded else torch.uint8)  # fmt: skip
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.path, local_files_only=True, quantization_config=nf4, dtype=dtype, device_map={"": device} if device.type == "cuda" else None
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise OlpackError(f"{base.label} does not fit into the GPU's memory.", "Take a smaller base, or set `train.quantization: nf4`.") from None
        raise OlpackError(f"{base.label} does not load: {str(error).splitlines()[0]}", "`olpack plan` checks the base.") from error
    model.config.use_cache = False
    model.requires_grad_(False)
    torch.manual_seed(settings.seed)
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=settings.target_modules,
                      bias="none", task_type="CAUSAL_LM")
    try:
        model = get_peft_model(model, lora)
    except ValueError as error:
        raise OlpackError(f"`train.target_modules` does not fit the base: {str(error).splitlines()[0]}", "Use `all-linear`.") from None
    model.peft_config["default"].base_model_name_or_path = base.label
    return model.train()
