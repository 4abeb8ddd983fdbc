"""The tests of other projects, with bnguard in the place of what they test.

``python -m tests.peers PATH…`` takes checkouts (fvcore, PyTorch, torchcontrib, Opacus, Lightning),
runs those of their tests that concern BN, and prints a table. What the projects themselves need
has to be installed already. The module is also the pytest plugin that makes the exchange.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from tests.foreign import TORCHVISION_SCHEMAS

_ROOT = Path(__file__).parent.parent


def fvcore() -> None:
    """``update_bn_stats`` becomes ``recalibrate``."""
    import fvcore.nn
    import fvcore.nn.precise_bn

    import bnguard

    def update_bn_stats(model, data_loader, num_iters=200, progress=None):
        batches = list(islice(data_loader, num_iters))
        assert len(batches) == num_iters
        result = bnguard.recalibrate(model, batches)
        # fvcore stores the variance that divides by n, PyTorch and bnguard by n - 1.
        for layer in result.layers:
            values = layer.values
            model.get_submodule(layer.name).running_var *= (values - 1) / values

    fvcore.nn.update_bn_stats = fvcore.nn.precise_bn.update_bn_stats = update_bn_stats


def pytorch() -> None:
    """``update_bn`` becomes ``recalibrate``."""
    import torch.optim.swa_utils

    import bnguard

    def update_bn(loader, model, device=None):
        bnguard.recalibrate(model, loader)

    torch.optim.swa_utils.update_bn = update_bn


def torchcontrib() -> None:
    """``SWA.bn_update`` becomes ``recalibrate``."""
    # Its tests were written for a torch that had this module.
    old = ModuleType("torch._six")
    old.inf, old.nan, old.string_classes = float("inf"), float("nan"), (str,)
    sys.modules.setdefault("torch._six", old)
    from torchcontrib.optim import SWA

    import bnguard

    SWA.bn_update = staticmethod(
        lambda loader, model, device=None: bnguard.recalibrate(model, loader)
    )


def opacus() -> None:
    """``ModuleValidator.fix`` becomes ``swap`` for BN; the rest of it stays."""
    # Its tests import torchvision; the operators live as long as this module.
    exec(TORCHVISION_SCHEMAS, globals())
    from opacus.validators import ModuleValidator

    import bnguard

    fix = ModuleValidator.fix

    def swapped(module, **arguments):
        copy = ModuleValidator.clone_module(module)
        if bnguard.layers.bn_layer.find_layers(copy):
            copy = bnguard.swap(copy, to="group").model
        return fix(copy, **arguments)

    ModuleValidator.fix = staticmethod(swapped)


def lightning() -> None:
    """Every Trainer has a ``BatchNormMonitor``."""
    from bnguard.lightning import BatchNormMonitor

    for package in ("lightning.pytorch", "pytorch_lightning"):
        trainer = importlib.import_module(package).Trainer
        configure = trainer.__init__

        def init(self, *args, _configure=configure, **arguments):
            _configure(self, *args, **arguments)
            self.callbacks.append(BatchNormMonitor())

        trainer.__init__ = init


@dataclass(frozen=True)
class Suite:
    """Where a project's tests of BN are.

    Attributes:
        exchange: Puts bnguard in place.
        tests: The files, relative to the checkout; the first tells which project it is.
        chosen: Which of their tests, as pytest's ``-k`` has it.
    """

    exchange: Callable[[], None]
    tests: Sequence[str]
    chosen: str = ""


SUITES = (
    Suite(fvcore, ("tests/test_precise_bn.py",)),
    Suite(pytorch, ("test/optim/test_swa_utils.py",), "update_bn or bn_update"),
    Suite(torchcontrib, ("test/test_swa.py",), "bn_update"),
    Suite(
        opacus,
        (
            "opacus/tests/module_validator_test.py",
            "opacus/tests/validators/batch_norm_test.py",
        ),
    ),
    Suite(lightning, ("tests/tests_pytorch/callbacks/test_stochastic_weight_avg.py",)),
)


def pytest_configure() -> None:
    """Make the exchange before the tests import anything."""
    globals()[os.environ["BNGUARD_PEER"]]()


def run(suite: Suite, checkout: Path) -> tuple[list[str], list[str]]:
    """Return the names of the tests that passed and of those that failed.

    Raises:
        RuntimeError: Nothing was run.
    """
    files = [name for name in suite.tests if (checkout / name).exists()]
    with TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.peers",
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(
            [*command, *files, "-k", suite.chosen, "--junitxml", str(results), "-W", "default"],
            cwd=checkout,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join((str(_ROOT), str(checkout), str(checkout / "test"))),
                "BNGUARD_PEER": suite.exchange.__name__,
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
        )
        cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    if not cases:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(said[-1] if said else "pytest printed nothing")
    passed, failed = [], []
    for case in cases:
        if case.find("skipped") is None:
            is_bad = case.find("failure") is not None or case.find("error") is not None
            (failed if is_bad else passed).append(case.get("name", ""))
    return passed, failed


def main() -> int:
    """Run the suites of the checkouts given, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a checkout")
    table = Table("suite", "in place", "tests", "passed", "failed")
    is_bad = False
    for path in parser.parse_args().paths:
        suite = next((suite for suite in SUITES if (path / suite.tests[0]).exists()), None)
        if suite is None:
            parser.error(f"{path}: none of the projects that are known")
        name = suite.exchange.__name__
        try:
            passed, failed = run(suite, path.absolute())
        except RuntimeError as error:
            passed, failed = [], [str(error)]
        is_bad |= bool(failed)
        counts = (len(passed) + len(failed), len(passed), len(failed))
        table.add_row(name, suite.exchange.__doc__, *map(str, counts))
        for test in failed:
            print(f"{name}: {test}", file=sys.stderr)
    Console(width=110).print(table)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
