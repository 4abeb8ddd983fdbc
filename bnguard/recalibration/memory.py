"""How much memory a calibration may hold, and how the C library keeps what is freed meanwhile."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bnguard.errors import ConfigurationError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
# If the system does not report what is free.
_UNKNOWN_FREE = 4 * 2**30

# From glibc's malloc.h, with the default number of mappings.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _DEFAULT_MMAP_MAX = -1, -4, 2**16
# The largest block that moves glibc's thresholds, and where it puts that for trimming then.
_LARGEST_ADAPTED = 32 * 2**20
_ADAPTED_TRIM_THRESHOLD = 2 * _LARGEST_ADAPTED
_NEVER_TRIM = -1


def memory_limit(memory: str | float, device: torch.device) -> int:
    """Return a limit in bytes.

    Args:
        memory: ``"2GiB"``, ``"500 MB"``, bytes as a whole number, or a share of the free memory,
            between 0 and 1.
        device: Whose memory is shared.

    Raises:
        ConfigurationError: ``memory`` is none of these.

    Example:
        >>> memory_limit("2GiB", torch.device("cpu")) == 2 * 2**30
        True
    """
    if isinstance(memory, float) and 0.0 < memory <= 1.0:
        return int(memory * free_memory(device))
    if isinstance(memory, int) and memory > 0:
        return memory
    if isinstance(memory, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?i?)b?", memory.strip().lower())
        if match and match[2] in _UNITS and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2]])
    raise ConfigurationError(f"memory {memory!r} is not an amount: use '2GiB', or a share like 0.5")


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, as far as the system reports them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return free + reserved - used
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return _UNKNOWN_FREE
    match = re.search(r"MemAvailable: *(\d+) kB", text)
    return int(match[1]) * 2**10 if match else _UNKNOWN_FREE


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let glibc reuse the memory of large tensors instead of returning it to the system.

    Otherwise the system clears the pages of every activation again, which takes as long as some
    layers. At the end everything unused goes back, and glibc is as in any process that has freed
    a tensor of 32 MiB. Without glibc nothing happens.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    # Any call of mallopt ends glibc's own adaptation, so let it adapt as far as it does first.
    torch.empty(_LARGEST_ADAPTED - 2**16, dtype=torch.uint8)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _ADAPTED_TRIM_THRESHOLD)
        libc.malloc_trim(0)
