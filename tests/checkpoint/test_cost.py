"""A large checkpoint is not read to be inspected: the benchmark, scaled down."""

from bnguard.checkpoint import read_checkpoint
from tests.benchmarks.inspection import LAYERS, measure, write_checkpoint


def test_inspection_costs_what_bn_layers_cost(tmp_path):
    """5 GB may cost 2 s and 500 MB; a file fifty times smaller has as many layers."""
    path = tmp_path / "large.ckpt"
    write_checkpoint(path, 0.1)
    assert path.stat().st_size > 100e6
    assert len(read_checkpoint(path).layers) == LAYERS
    seconds, megabytes = measure("bnguard", path, repeats=1, clock="process_time")
    assert seconds < 2.0
    assert 0 < megabytes < 50
