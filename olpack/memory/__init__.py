"""What a model needs of a machine's memory, before anything is downloaded, trained or loaded.

    subject = find("Qwen/Qwen3-8B")                    # a folder, a config.json, a Hub id, a GGUF; typical("8B") without any
    footprints = plan(subject, ["Q4_K_M"], contexts=[8192])
    print_estimate(estimate(subject, context=8192))

Nothing here repeats llama.cpp's rules. A model without a file becomes a GGUF with a real header and a hole in place of the weights; llama.cpp
chooses the types of its tensors, loads it without allocating, lays out the KV cache, reserves the compute graph, and says what it would take.
"""

from __future__ import annotations

from olpack.memory.footprint import Footprint, plan, read
from olpack.memory.machine import Machine, this_machine
from olpack.memory.subject import Subject, find, typical

__all__ = ["Footprint", "Machine", "Subject", "find", "plan", "read", "this_machine", "typical"]
