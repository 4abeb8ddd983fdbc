"""Running the real command, in a process of its own.

To import torch and Lightning takes seconds, so the processes are forked from one that has done it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.ports import free_port

BNGUARD = shutil.which("bnguard", path=str(Path(sys.executable).parent))
DEMO = ("--model", "bnguard.demo.DigitsNet", "--data", "bnguard.demo.DigitsData")
_OTHER = "tests.cli.other_lightning"
# A class several levels below Lightning's, of each of the two packages.
DEMOS = {
    "pytorch_lightning": DEMO,
    "lightning.pytorch": ("--model", f"{_OTHER}.DeepDigitsNet", "--data", f"{_OTHER}.DigitsData"),
}

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("torch", "pytorch_lightning", "lightning.pytorch", "bnguard.cli.main"),
        *(f"bnguard.cli.{name}" for name in ("diagnose", "inspect", "recalibrate", "run", "swap")),
        *("bnguard.monitor", "bnguard.report.terminal", "bnguard.lightning.monitor"),
        *("bnguard.recalibration.api", "bnguard.swapping.api", "bnguard.demo", "sklearn.datasets"),
    ]
)


def bnguard(folder, *arguments, prepare=None, meanwhile=None):
    """Run ``bnguard ARGUMENTS`` in a folder.

    Args:
        folder: The current directory of the process.
        arguments: The arguments.
        prepare: Called in the process, before the command.
        meanwhile: Called with the process while the command runs.
    """
    return _fork(folder, ["bnguard", *map(str, arguments)], prepare, meanwhile)


def script(folder, *arguments, prepare=None):
    """Run ``python ARGUMENTS``, a script and its arguments, as :func:`bnguard` runs a command."""
    return _fork(folder, [*map(str, arguments)], prepare, None)


def on_ranks(size, folder, *arguments, command=script):
    """Run a script or a command on several ranks at once, each with what torchrun tells it."""
    port = free_port()

    def run(rank):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": port}
        variables |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GLOO_SOCKET_IFNAME": "lo"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        texts = {name: str(value) for name, value in variables.items()}
        return command(folder, *arguments, prepare=functools.partial(set_variables, texts))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def set_variables(variables):
    os.environ.update(variables)


def import_first_from(folder):
    sys.path.insert(0, str(folder))


def _fork(folder, command, prepare, meanwhile):
    with TemporaryDirectory() as files:
        out, err = Path(files, "out"), Path(files, "err")
        process = FORKS.Process(target=_run, args=(folder, command, out, err, prepare))
        process.start()
        if meanwhile is not None:
            meanwhile(process)
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{' '.join(command)} takes more than 300 s")
        return subprocess.CompletedProcess(
            command, process.exitcode, out.read_text("utf-8"), err.read_text("utf-8")
        )


def _run(folder, command, out, err, prepare):
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(folder)
    # What this process starts, it starts as python does, not by a server of its own.
    multiprocessing.set_start_method(None, force=True)
    if prepare is not None:
        prepare()
    sys.argv = command
    import torch

    # The networks are tiny: a second thread costs more than it brings.
    torch.set_num_threads(1)
    if command[0] != "bnguard":
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
        return
    from bnguard.cli.main import main

    sys.exit(main())


def is_one_line_error(done):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("bnguard: error: ")
    return line
