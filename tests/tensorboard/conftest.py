"""Real logs and a real TensorBoard, made once."""

import pytest

from tests.tensorboard.digits import train
from tests.tensorboard.serving import tensorboard


@pytest.fixture(scope="session")
def digits_log(tmp_path_factory):
    """Two runs: one whose running statistics lag, and a healthy one."""
    folder = tmp_path_factory.mktemp("digits")
    train(folder / "lagging", momentum=0.004, steps=80)
    train(folder / "healthy", steps=80)
    return folder


@pytest.fixture(scope="session", params=["true", "false"], ids=["data-server", "python-loader"])
def server(request, digits_log):
    with tensorboard(digits_log, "--load_fast", request.param) as running:
        running.wait_for_runs(2)
        yield running
