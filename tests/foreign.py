"""Weight files of other software, for ``tests.packages`` and ``tests.frameworks``.

Each subject is checked in a virtual environment that is thrown away, on top of the packages of the
running interpreter, through the command that people type: what ``bnguard inspect`` says of the
file, what ``bnguard recalibrate`` changes in it, and what its own software makes of the result.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from torch import nn

_ROOT = Path(__file__).parent.parent

# torchvision refuses to be imported next to a torch of another build (CPU-only, say), unless
# these operators are known; what the networks here need of it is written in Python.
TORCHVISION_SCHEMAS = """
import torch
_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@dataclass(frozen=True)
class Subject:
    """A weight file of some software; its functions run where that is installed.

    Attributes:
        name: What the table calls it.
        requires: What is installed for it, without dependencies.
        file: Returns the path from which the software reads the file; may write it into the folder
            that it is given.
        model: Builds the software's own network.
        data: Returns batches that fit the network, without labels.
        score: Loads the file with the software's own code and scores it; larger is better.
        expected: Codes that ``inspect`` should report at the level of a warning.
        weights: The model in a file that holds several.
        loss: By how much the score may fall.
    """

    name: str
    requires: Sequence[str]
    file: Callable[[str], Path]
    model: Callable[[], nn.Module]
    data: Callable[[], Iterable[object]]
    score: Callable[[str], float]
    expected: frozenset[str] = frozenset()
    weights: str | None = None
    loss: float = 0.02


@dataclass(frozen=True)
class Outcome:
    """What was seen of one subject; ``faults`` says what is not as it should be."""

    cells: Sequence[str]
    faults: Sequence[str]


class Environment:
    """A virtual environment that sees the packages of the running interpreter."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self._python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        (self._site,) = folder.rglob("site-packages")
        (self._site / "base.pth").write_text("\n".join(site.getsitepackages()), "utf-8")

    def install(self, requirements: Sequence[str]) -> None:
        """Install packages without their dependencies, above all without another torch."""
        if not requirements:
            return
        self._run("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *requirements)
        # The libraries of torchaudio need the torch that they were built with; its Python does not.
        for library in (self._site / "torchaudio").glob("lib/*torchaudio*"):
            library.unlink()
        vision = self._site / "torchvision" / "__init__.py"
        if vision.exists() and TORCHVISION_SCHEMAS not in vision.read_text("utf-8"):
            vision.write_text(TORCHVISION_SCHEMAS + vision.read_text("utf-8"), "utf-8")

    def call(self, function: Callable[..., object], *arguments: object) -> object:
        """Call a function of this repository there, and return what it gives as JSON."""
        line = "import sys; from tests.foreign import answer; answer(*sys.argv[1:])"
        named = (_module_of(function), function.__name__)
        return json.loads(self._run("-c", line, *named, *map(str, arguments)).splitlines()[-1])

    def bnguard(self, *arguments: object, may_fail: bool = False) -> dict[str, object]:
        """Run a command of bnguard, and return its JSON document."""
        printed = self._run("-m", "bnguard", *map(str, arguments), "--json", may_fail=may_fail)
        document: dict[str, object] = json.loads(printed)
        return document

    def _run(self, *arguments: str, may_fail: bool = False) -> str:
        done = subprocess.run(
            [str(self._python), "-W", "ignore", *arguments],
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode and not (may_fail and done.returncode == 1):
            said = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(f"{' '.join(arguments[:4])}: {said[-1] if said else 'no output'}")
        return done.stdout


def answer(module: str, name: str, *arguments: str) -> None:
    """Print what a function returns, as the last line."""
    returned = getattr(importlib.import_module(module), name)(*arguments)
    print("\n" + json.dumps(str(returned) if isinstance(returned, Path) else returned))


def count_layers(module: str, name: str) -> int:
    """Count the BN layers with running statistics, as PyTorch knows them."""
    model = getattr(importlib.import_module(module), name)()
    return sum(
        isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_var is not None
        for layer in model.modules()
    )


def check(subject: Subject, environment: Environment, folder: Path) -> Outcome:
    """Inspect a file, recalibrate it, and put the result in the place of the original."""
    environment.install(subject.requires)
    path = Path(str(environment.call(subject.file, folder)))
    chosen = ("--weights", subject.weights) if subject.weights else ()
    calls = [
        f"--{option}={_module_of(function)}.{function.__name__}"
        for option, function in (("model", subject.model), ("data", subject.data))
    ]
    # The name stays: some software finds its files by it.
    repaired = folder / "repaired" / path.name
    repaired.parent.mkdir()

    expected_layers = environment.call(
        count_layers, _module_of(subject.model), subject.model.__name__
    )
    layers, before = _inspected(environment, path, subject.weights)
    environment.bnguard("recalibrate", path, *calls, *chosen, "--output", repaired)
    _, after = _inspected(environment, repaired, subject.weights)
    difference = environment.bnguard("diff", path, repaired, *chosen, may_fail=True)
    entries = difference["entries"]
    moved = max(
        (layer["max_shift_std"] or 0 for layer in difference["layers"]),  # type: ignore[attr-defined]
        default=0,
    )

    score = float(str(environment.call(subject.score, path)))
    _replace(path, repaired)
    score_after = float(str(environment.call(subject.score, path)))

    faults = []
    if layers != expected_layers:
        faults.append("BN count")
    if before != subject.expected:
        faults.append("findings before")
    if after:
        faults.append("findings after")
    if entries:
        faults.append("other entries changed")
    if score_after < score - subject.loss:
        faults.append("score")
    cells = (
        f"{layers} of {expected_layers}",
        " ".join(sorted(before)) or "none",
        " ".join(sorted(after)) or "none",
        f"{len(entries)}",  # type: ignore[arg-type]
        f"{moved:.2f} σ",
        f"{score:.3f} → {score_after:.3f}",
    )
    return Outcome(cells, faults)


def main(description: str, subjects: Sequence[Subject]) -> int:
    """Check the subjects that are named, or all of them, and print the table."""
    parser = argparse.ArgumentParser(description=description.partition("\n\n")[0])
    names = [subject.name for subject in subjects]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    chosen = parser.parse_args().names
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}")

    table = Table("file of", "BN layers", "found", "found after", "other entries", "moved", "score")
    faults = 0
    with TemporaryDirectory() as folder:
        environment = Environment(Path(folder, "environment"))
        for subject in subjects:
            if chosen and subject.name not in chosen:
                continue
            files = Path(folder, subject.name.replace(" ", "-"))
            files.mkdir()
            try:
                outcome = check(subject, environment, files)
            except RuntimeError as error:
                outcome = Outcome(("–",) * 6, [str(error)])
            faults += bool(outcome.faults)
            table.add_row(subject.name, *outcome.cells)
            for fault in outcome.faults:
                print(f"{subject.name}: {fault}", file=sys.stderr)
    Console(width=120).print(table)
    return int(faults > 0)


def _inspected(environment: Environment, path: Path, weights: str | None) -> tuple[int, set[str]]:
    document = environment.bnguard("inspect", path, may_fail=True)
    reports = [checkpoint["report"] for checkpoint in document["checkpoints"]]  # type: ignore[attr-defined]
    mine = f"{weights}: " if weights else ""
    layers = [name for report in reports for name in report["layers"]]
    codes = {
        finding["code"]
        for report in reports
        for finding in report["findings"]
        if finding["severity"] in ("warning", "error")
    }
    return sum(layer["name"].startswith(mine) for layer in layers), codes


def _replace(path: Path, repaired: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        shutil.copytree(repaired, path)
    else:
        shutil.copyfile(repaired, path)


def _module_of(function: Callable[..., object]) -> str:
    """Return the module of a function, also where it is the one that was run."""
    if function.__module__ == "__main__":
        return str(sys.modules["__main__"].__spec__.name)
    return function.__module__
