"""olpack: from a base model and a data set to quantized assistants that Ollama serves, and the measured reasons to pick one."""

import logging
import os

__version__ = "0.2.0"

# Once imported, bitsandbytes asks for a package whose kernel it only uses for inference in bfloat16, which nothing here does.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "Failed to load CPU gemm_4bit_forward" not in str(record.msg))

# Threads of torch and of llama.cpp wait for each other by spinning. Beside other processes most of them wait for one that does not run, and GNU's
# OpenMP spins for milliseconds: training took 15 times as long. A tenth of a millisecond is as fast on a quiet machine; on a busy one, threads sleep
# at once (benchmarks/LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    _busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    os.environ.setdefault("GOMP_SPINCOUNT", "0" if _busy else "10000")
