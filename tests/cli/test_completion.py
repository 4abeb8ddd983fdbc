"""``bnguard completion``: what a shell makes of the script."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bnguard.cli.main import COMMANDS
from tests.cli.running import bnguard, is_one_line_error

# As a shell asks it: the words of the line, the last of which is to be completed.
ASK = """
source script.sh
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_bnguard
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_a_shell_completes_commands_options_values_and_files(tmp_path):
    pytest.importorskip("shtab")
    (tmp_path / "script.sh").write_text(bnguard(tmp_path, "completion", "bash").stdout)
    (tmp_path / "last.ckpt").touch()

    def completed(*words):
        command = ["bash", "-c", ASK, "bash", "bnguard", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.stdout.split()

    assert completed("") == list(COMMANDS)
    assert completed("recalibrate", "--m") == ["--method", "--memory", "--metric"]
    assert completed("inspect", "--fail-on", "") == ["error", "warning", "never"]
    assert completed("inspect", "la") == ["last.ckpt"]


def without_shtab():
    sys.modules["shtab"] = None


def test_without_shtab_the_command_says_what_to_install(tmp_path):
    done = bnguard(tmp_path, "completion", "bash", prepare=without_shtab)
    assert "pip install shtab" in is_one_line_error(done)
