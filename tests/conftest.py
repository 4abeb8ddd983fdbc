"""What every test starts from."""

import pytest
import torch

# The networks are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


# Benchmarks are run by hand, with peers that the tests do without.
collect_ignore = ["benchmarks"]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
