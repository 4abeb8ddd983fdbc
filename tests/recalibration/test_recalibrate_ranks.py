"""The same statistics on any number of ranks, in real processes with a share of the data each."""

import runpy
from pathlib import Path

import pytest
import torch

from tests.cli.running import on_ranks

SCRIPT = Path(__file__).with_name("ranks.py")
CASES = runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module", params=[2, 3], ids=["two ranks", "three ranks"])
def ranks(request, tmp_path_factory):
    """What every rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    for done in on_ranks(request.param, folder, SCRIPT):
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES["OPTIONS"]))
def test_all_ranks_get_the_statistics_of_one_process_over_all_data(ranks, case):
    shares = CASES["shares"](case, len(ranks))
    alone = CASES["result_of"](case, [batch for share in shares for batch in share])
    for rank in ranks:
        found = rank[case]
        if case not in ("tolerance", "precise"):
            assert (found["samples"], found["left_out"]) == (alone["samples"], alone["left_out"])
            assert found["batches"] == alone["batches"]
        for key, value in alone["state"].items():
            assert torch.equal(found["state"][key], ranks[0][case]["state"][key])
            assert torch.allclose(found["state"][key], value, rtol=1e-5, atol=1e-5), key


@pytest.mark.slow
def test_no_rank_waits_for_one_that_failed(ranks):
    assert ranks[1]["failure"] == "the loader failed at batch 3: OSError: disk on fire"
    for rank in (rank for number, rank in enumerate(ranks) if number != 1):
        assert rank["failure"].startswith("rank 1 failed: the loader failed")


@pytest.mark.slow
def test_the_gate_opens_on_all_ranks_or_on_none(ranks):
    assert [rank["decision"] for rank in ranks] == [False] * len(ranks)
