"""olpack: from a base model and a data set to quantized assistants that Ollama serves, and the measured reasons to pick one."""

import logging
import os

__version__ = "0.2.0"

# Once imported, bitsandbytes asks for a package whose kernel it only uses for inference in bfloat16, which nothing here does.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "Failed to load CPU gemm_4bit_forward" not in str(record.msg))

# Threads of torch and of llama.cpp wait for each other by spinning. Beside another process, even a single one, most of them wait for one that does
# not run, and GNU's OpenMP spins 300,000 turns, for milliseconds. A thousand turns cost a quiet machine next to nothing; on a busy one, threads sleep
# at once (benchmarks/openmp_waiting.md).
if "OMP_WAIT_POLICY" not in os.environ:
    _busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    os.environ.setdefault("GOMP_SPINCOUNT", "0" if _busy else "1000")
