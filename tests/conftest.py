"""What every test starts from."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# The networks are tiny: a second thread costs more than it brings. No outcome may hang on how many
# there are, which is to be seen with two.
torch.set_num_threads(int(os.environ.get("BNGUARD_TEST_THREADS", "1")))


# Processes that tests start, in folders of their own, import modules of the tests.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
)

# A shell starts what runs in the background with Ctrl-C ignored, and so would all that is started
# from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run, and no clock: what a busy machine does tells nothing of the code.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

# Run by hand, with packages that the tests do without.
collect_ignore = ["benchmarks", "lightning/recordings.py"]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
