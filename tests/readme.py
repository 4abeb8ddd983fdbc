"""What the README shows of commands is what they print.

``python -m tests.readme`` runs the commands behind the markers ``<!-- output: COMMAND | LINES -->``
in a folder of their own and writes the lines that they name, and the table of rules, into
README.md; the tests compare the two. Line numbers as in ``5-9, 43-44``; all lines without them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from bnguard.rules import RULES

README = Path(__file__).parent.parent / "README.md"

_OUTPUT = re.compile(r"(<!-- output: (.*?)(?: \| ([-\d, ]+))? -->\n```text\n)(.*?)(```)", re.DOTALL)
_RULES = re.compile(r"(<!-- rules -->\n)(.*?)(<!-- /rules -->)", re.DOTALL)
_END = "\x1e"

# One process for all commands: to import torch and Lightning takes longer than most of them.
_PROGRAM = f"""
import json, sys
from bnguard.cli.main import main
for arguments in json.loads(sys.argv[1]):
    status = main(arguments)
    print(status, end={_END!r}, flush=True)
"""


def with_outputs(text: str, folder: Path) -> str:
    """Return the README with what its commands print now."""
    commands = [found[2] for found in _OUTPUT.finditer(text)]
    printed = iter(run_commands(commands, folder))

    def written(found: re.Match[str]) -> str:
        return found[1] + _chosen(next(printed), found[3]) + found[5]

    return _OUTPUT.sub(written, text)


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


def run_commands(commands: list[str], folder: Path) -> list[str]:
    """Run ``bnguard`` commands one after the other, and return what each prints on a terminal."""
    arguments = [shlex.split(command)[1:] for command in commands]
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, json.dumps(arguments)],
        cwd=folder,
        stdout=end,
        stderr=subprocess.DEVNULL,
        # The networks are tiny: a second thread costs more than it brings.
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "dumb"},
    ):
        os.close(end)
        printed = b""
        # At its end, Linux raises an error, and others read nothing.
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 65536):
                printed += piece
        os.close(terminal)
    text = printed.decode().replace("\r\n", "\n").replace(f"{folder.resolve()}/", "")
    outputs = text.split(_END)[:-1]
    assert len(outputs) == len(commands), text
    for output in outputs:
        assert output[-1] in "01", output
    return [
        "".join(f"{line.rstrip()}\n" for line in output[:-1].strip("\n").splitlines())
        for output in outputs
    ]


def _chosen(output: str, ranges: str | None) -> str:
    """Return the lines of ``5-9, 43-44``, with a line of ``…`` for what is left out between."""
    if ranges is None:
        return output
    lines = output.splitlines(keepends=True)
    bounds = [tuple(map(int, part.split("-"))) for part in ranges.split(",")]
    return "…\n".join("".join(lines[first - 1 : last]) for first, last in bounds)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = with_rules(README.read_text("utf-8"))
        README.write_text(with_outputs(text, Path(folder)), "utf-8")
