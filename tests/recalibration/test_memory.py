"""Amounts of memory as people write them, and freed memory that is kept for a while."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from bnguard.errors import ConfigurationError
from bnguard.recalibration.memory import free_memory, keep_freed_memory, memory_limit

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("memory", "limit"),
    [
        ("2GiB", 2 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("500mb", 500_000_000),
        ("64 KiB", 2**16),
        ("12345", 12345),
        (10**9, 10**9),
    ],
)
def test_amounts(memory, limit):
    assert memory_limit(memory, CPU) == limit


def test_a_share_of_the_free_memory():
    free = free_memory(CPU)
    assert free > 2**20
    assert 0.2 * free < memory_limit(0.25, CPU) < 0.3 * free


@pytest.mark.parametrize("memory", ["much", "", "2 GiBs", "-1", "0", 0, -5, 0.0, 1.5, "i"])
def test_invalid_amounts(memory):
    with pytest.raises(ConfigurationError, match="is not an amount: use"):
        memory_limit(memory, CPU)


def held_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(
    not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")), reason="needs glibc"
)
def test_freed_memory_is_kept_meanwhile_and_returned_at_the_end():
    torch.ones(24 * 2**20)
    before = held_mib()
    with keep_freed_memory():
        torch.ones(24 * 2**20)
        assert held_mib() > before + 80
    assert held_mib() < before + 20
    torch.ones(24 * 2**20)
    assert held_mib() < before + 20


def test_nothing_is_kept_without_glibc(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with keep_freed_memory():
        pass
