"""What the inspection of a large checkpoint costs: time, and memory beyond what imports take.

``python -m tests.benchmarks.inspection [GIGABYTES]`` writes a checkpoint of that size (1 by
default) into a temporary folder, reads its BN layers in fresh processes, and prints the medians
beside those of ``torch.load``. A checkpoint of 5 GB may cost 2 s and 500 MB.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

LAYERS = 400
CHANNELS = 256
REPEATS = 5

READERS = {
    "bnguard": """
from bnguard.checkpoint import read_checkpoint as read
""",
    "torch.load, mapped": """
import torch
def read(path): return torch.load(path, weights_only=True, mmap=True)
""",
    "torch.load": """
import torch
def read(path): return torch.load(path, weights_only=True)
""",
}
MEASURE = r"""
import re, sys, time
def peak(): return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1000
before, start = peak(), time.CLOCK()
value = read(sys.argv[1])
print(time.CLOCK() - start, peak() - before)
"""


def write_checkpoint(path: Path, gigabytes: float) -> None:
    """Write what a Trainer does: weights, BN layers, and an optimizer with two moments a weight."""
    size = int(gigabytes * 1e9 / 4 / 3 / LAYERS)
    # One storage a tensor, as in a real checkpoint, though the values do not matter.
    state = {}
    for number in range(LAYERS):
        norm = torch.nn.BatchNorm1d(CHANNELS).state_dict()
        state[f"layers.{number}.conv.weight"] = torch.zeros(size)
        state |= {f"layers.{number}.bn.{key}": value for key, value in norm.items()}
    moments = {
        number: {"exp_avg": torch.zeros(size), "exp_avg_sq": torch.zeros(size)}
        for number in range(LAYERS)
    }
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(range(LAYERS))}]}
    torch.save({"epoch": 1, "state_dict": state, "optimizer_states": [optimizer]}, path)


def measure(
    reader: str, path: Path, repeats: int, clock: str = "perf_counter"
) -> tuple[float, float]:
    """Return seconds and megabytes of reading in a fresh process, the median of several.

    ``clock="process_time"`` counts the seconds of the processor alone.
    """
    code = READERS[reader] + MEASURE.replace("CLOCK", clock)
    results = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        results.append([float(number) for number in done.stdout.split()])
    seconds, megabytes = map(statistics.median, zip(*results, strict=True))
    return seconds, megabytes


def main(gigabytes: float) -> None:
    """Print the table."""
    table = Table("reader", "seconds", "MB beyond imports", title=f"{gigabytes:g} GB")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.ckpt"
        write_checkpoint(path, gigabytes)
        for reader in READERS:
            seconds, megabytes = measure(reader, path, REPEATS)
            table.add_row(reader, f"{seconds:.3f}", f"{megabytes:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
