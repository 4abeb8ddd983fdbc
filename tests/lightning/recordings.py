"""Takes the terminal pictures of the README: ``python -m tests.lightning.recordings``.

They are of real runs: the commands run in a terminal of their own, which pyte emulates, and what
stands on its screen is drawn by rich. Needs scikit-learn and pyte; takes about a minute.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

OUT = Path(__file__).parents[2] / ".pictures"
COLUMNS, LINES = 100, 70

TRAIN = """
import logging, warnings
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from bnguard.demo import DigitsData, DigitsNet
from bnguard.lightning import BatchNormMonitor

logging.disable()
warnings.simplefilter("ignore")
seed_everything(0, verbose=False)
trainer = Trainer(
    accelerator="cpu", max_epochs=3, enable_model_summary=False,
    logger=CSVLogger("logs", name=None), callbacks=[BatchNormMonitor(), RichProgressBar()],
)
trainer.fit(DigitsNet(), DigitsData())
"""
CHECKPOINT = "logs/version_0/checkpoints/epoch=2-step=225.ckpt"
REPAIR = [
    *("recalibrate", CHECKPOINT),
    *("--model", "bnguard.demo.DigitsNet", "--data", "bnguard.demo.DigitsData", "--split", "train"),
]

Screen = list[Text]


def record(command: list[str], folder: Path, is_moment: Callable[[str], bool]) -> list[Screen]:
    """Run a command in a terminal; return its screen at the first such moment, and at the end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    run = subprocess.Popen(
        command, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    screens: list[Screen] = []
    while data := _read(master):
        stream.feed(data)
        if not screens and is_moment("\n".join(screen.display)):
            screens.append(_lines(screen))
    os.close(master)
    assert run.wait() == 0, "\n".join(screen.display)
    return [*screens, _lines(screen)]


def save(name: str, command: str, lines: Screen) -> None:
    """Draw a screen as an SVG file, without the empty lines at its end."""
    while lines and not lines[-1].plain.strip():
        lines.pop()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in [Text(f"$ {command}"), *lines]:
        console.print(line, no_wrap=True, crop=True, highlight=False)
    OUT.mkdir(exist_ok=True)
    console.save_svg(str(OUT / f"{name}.svg"), title="bnguard")


def _read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # the terminal is closed
        return b""


def _lines(screen: pyte.Screen) -> Screen:
    lines = []
    for row in range(screen.lines):
        line = Text()
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            line.append(cell.data, _style(cell))
        line.rstrip()
        lines.append(line)
    return lines


def _style(cell: pyte.screens.Char) -> str:
    colour = cell.fg if cell.fg != "default" else ""
    if len(colour) == 6 and all(digit in "0123456789abcdef" for digit in colour):
        colour = f"#{colour}"
    colour = {"brown": "yellow", "brightbrown": "bright_yellow"}.get(colour, colour)
    return " ".join(part for part in ("bold" if cell.bold else "", colour) if part)


def main() -> None:
    """Record a training and the repair of its checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.py").write_text(TRAIN)
        running, done = record(
            [sys.executable, "train.py"],
            folder,
            lambda text: "Epoch 1/2" in text and " 30/" in text,
        )
        save("terminal-running", "python train.py", running)
        start = next(i for i, line in enumerate(done) if "steps ·" in line.plain)
        save("terminal-report", "python train.py", [Text("…"), *done[start:]])
        bnguard = [str(Path(sys.executable).parent / "bnguard"), *REPAIR]
        (_, repaired) = record(bnguard, folder, lambda text: True)
        save("terminal-repair", f"bnguard {' '.join(REPAIR[:2])} …", repaired)


if __name__ == "__main__":
    main()
