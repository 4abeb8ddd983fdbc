"""The demo, run once, and its checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.running import DEMOS, bnguard


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo, run once: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = bnguard(folder, "demo", "--output", "out")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def checkpoint(demo, tmp_path):
    return Path(shutil.copy(demo[0] / "out" / "digits-0.ckpt", tmp_path / "last.ckpt"))


@pytest.fixture(params=list(DEMOS))
def of_demo(request):
    """The options that name the demo's model and data, of each of Lightning's two packages."""
    return DEMOS[request.param]
