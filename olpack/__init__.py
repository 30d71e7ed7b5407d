"""olpack: from a base model and a data set to quantized assistants that Ollama serves, and the measured reasons to pick one."""

import logging

__version__ = "0.2.0"

# Once imported, bitsandbytes asks for a package whose kernel it only uses for inference in bfloat16, which nothing here does.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "Failed to load CPU gemm_4bit_forward" not in str(record.msg))
