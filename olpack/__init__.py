"""olpack: from a base model and a data set to quantized assistants that Ollama serves, and the measured reasons to pick one."""

import logging
import os

__version__ = "0.2.0"

# Once imported, bitsandbytes asks for a package whose kernel it only uses for inference in bfloat16, which nothing here does.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "Failed to load CPU gemm_4bit_forward" not in str(record.msg))

# Threads of torch and of llama.cpp wait for each other by spinning. Beside other processes most of them wait for one that does not run, and GNU's
# OpenMP spins for a millisecond and more: training took 15 times as long. It spins as briefly by itself where a process has more threads than
# cores (benchmarks/openmp_waiting.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
