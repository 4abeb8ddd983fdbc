"""What every test starts from."""

import pytest
import torch

# The networks are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


# Run by hand, with packages that the tests do without.
collect_ignore = ["benchmarks", "lightning/recordings.py"]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
