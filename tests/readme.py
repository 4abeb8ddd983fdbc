"""What the README shows of commands is what they print.

``python -m tests.readme`` runs the commands behind the markers ``<!-- output: COMMAND -->`` in a
folder of their own, one after the other, and writes what they print, and the table of rules, into
README.md; the tests compare the two.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bnguard.rules import RULES

README = Path(__file__).parent.parent / "README.md"

_OUTPUT = re.compile(r"(<!-- output: (.*?) -->\n```text\n)(.*?)(```)", re.DOTALL)
_RULES = re.compile(r"(<!-- rules -->\n)(.*?)(<!-- /rules -->)", re.DOTALL)


def with_outputs(text: str, folder: Path) -> str:
    """Return the README with what its commands print now."""
    return _OUTPUT.sub(lambda found: found[1] + _printed(found[2], folder) + found[4], text)


def with_rules(text: str) -> str:
    """Return the README with the table of the rules as they are now."""
    rows = [
        f"| {rule.code} | {rule.name} | {rule.headline()} | {'✓' if rule.is_static else ''} |\n"
        for rule in RULES
    ]
    table = "".join(["| code | name | fault | static |\n|---|---|---|---|\n", *rows])
    return _RULES.sub(lambda found: f"{found[1]}{table}{found[3]}", text)


def without_numbers(text: str) -> str:
    """Return text in which every number is ``#``: another processor rounds differently.

    Columns that numbers make wider or narrower, and lines that they make longer, are the same too.
    """
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d,.]*(e[-+]\d+)?", "#", text))


def _printed(command: str, folder: Path) -> str:
    program, *arguments = shlex.split(command)
    path = shutil.which(program, path=str(Path(sys.executable).parent))
    assert path is not None
    # As a terminal shows it: where there is none, nothing is wrapped.
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [path, *arguments],
        cwd=folder,
        stdout=end,
        stderr=subprocess.DEVNULL,
        # The networks are tiny: a second thread costs more than it brings.
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "dumb"},
    ) as process:
        os.close(end)
        printed = b""
        # At its end, Linux raises an error, and others read nothing.
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 65536):
                printed += piece
        os.close(terminal)
    assert process.returncode in (0, 1), printed
    text = printed.decode().replace("\r\n", "\n")
    text = text.strip("\n").replace(f"{folder.resolve()}/", "")
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = with_rules(README.read_text("utf-8"))
        README.write_text(with_outputs(text, Path(folder)), "utf-8")
