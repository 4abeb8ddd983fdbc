"""What importing costs, and what lies at the top level."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bnguard

ROOT = Path(__file__).parent.parent

HEAVY = ("torch", "pytorch_lightning", "lightning", "tensorboard", "rich", "numpy")


def imported_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_importing_bnguard_imports_nothing_heavy():
    assert not imported_after("import bnguard") & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    ["bnguard.rules", "bnguard.rules.engine", "bnguard.observe.history", "bnguard.cli"],
)
def test_rules_and_command_line_do_not_import_torch(module):
    assert "torch" not in imported_after(f"import {module}")


def test_watching_imports_neither_lightning_nor_rich():
    names = imported_after("import torch, bnguard; bnguard.watch(torch.nn.BatchNorm1d(2))")
    assert not names & {"pytorch_lightning", "lightning", "tensorboard", "rich"}


def test_every_public_name_exists():
    assert sorted(bnguard.__all__) == sorted(["__version__", *bnguard._HOMES])
    for name in bnguard.__all__:
        assert getattr(bnguard, name) is not None
    assert dir(bnguard) == sorted(bnguard.__all__)
    with pytest.raises(AttributeError, match="no attribute 'wacht'"):
        bnguard.wacht  # noqa: B018


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked sdist is not a clone")
def test_the_top_level_holds_what_it_should():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {Path(name).parts[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} <= {
        "README.md",
        "pyproject.toml",
        "bnguard",
        "tests",
        "examples",
        "CHANGELOG.md",
    }


def test_printing_draws_nothing_from_the_random_numbers_of_python():
    code = (
        "import random; random.seed(1); import torch, bnguard; "
        "model = torch.nn.Sequential(torch.nn.BatchNorm1d(4)); "
        "print(bnguard.watch(model).report()); bnguard.inspect(model)._repr_html_(); "
        "bnguard.diagnose(model, [torch.randn(64, 4)]); import sys; assert 'rich' in sys.modules; "
        "drawn = random.random(); random.seed(1); assert drawn == random.random()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
