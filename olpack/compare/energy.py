"""The energy that NVIDIA cards have used, as their driver counts it."""

from __future__ import annotations

import ctypes
import functools
import sys


def joules() -> float | None:
    """Energy used by all cards since the driver was loaded, in joules; None where there is no card, or one that does not tell.

    Cards from Volta on count it themselves (nvmlDeviceGetTotalEnergyConsumption, in millijoules), the rest of the machine is not in it.
    """
    library, cards = _cards()
    total = 0
    for card in cards:
        used = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(card, ctypes.byref(used)) != 0:
            return None
        total += used.value
    return total / 1000 if cards else None


@functools.cache
def _cards() -> tuple[ctypes.CDLL | None, list[ctypes.c_void_p]]:
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None, []
    count = ctypes.c_uint()
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None, []
    cards = [ctypes.c_void_p() for _ in range(count.value)]
    found = [card for index, card in enumerate(cards) if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(card)) == 0]
    return library, found
