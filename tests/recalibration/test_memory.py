"""Amounts of memory as people write them."""

import pytest
import torch

from bnguard.errors import ConfigurationError
from bnguard.recalibration.memory import free_memory, memory_limit

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
