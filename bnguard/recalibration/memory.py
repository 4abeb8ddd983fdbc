"""How much memory a calibration may take."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from bnguard.errors import ConfigurationError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
# Where the system does not tell what is free.
_UNKNOWN_FREE = 4 * 2**30


def memory_limit(memory: str | float, device: torch.device) -> int:
    """Return a limit in bytes.

    Args:
        memory: ``"2GiB"``, ``"500 MB"``, bytes as a whole number, or a share of what is free on
            the device, between 0 and 1.
        device: The device.

    Raises:
        ConfigurationError: It is none of these.

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
    raise ConfigurationError(f"memory={memory!r} is no amount: use '2GiB', or a share like 0.5")


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, as far as the system tells."""
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
