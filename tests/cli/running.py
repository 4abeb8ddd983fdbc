"""Running the real command, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

BNGUARD = shutil.which("bnguard", path=str(Path(sys.executable).parent))
DEMO = ("--model", "bnguard.demo.DigitsNet", "--data", "bnguard.demo.DigitsData")


def bnguard(folder, *arguments):
    assert BNGUARD is not None
    return subprocess.run(
        [BNGUARD, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # The networks are tiny: a second thread costs more than it brings.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def is_one_line_error(done):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("bnguard: error: ")
    return line
