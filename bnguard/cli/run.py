"""``bnguard run``: an unchanged script, watched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from time import strftime
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from bnguard.cli.output import command_parser
from bnguard.errors import ConfigurationError, path_from_here
from bnguard.findings import Severity

if TYPE_CHECKING:
    from bnguard.launch.trained_models import Watching
    from bnguard.report import Report

_HELP = """
The report goes to standard error, and to --log-dir as bnguard-report.json and
as a TensorBoard log. Options of bnguard come before the script.

exit status: that of the script; 1 if it succeeded and --fail-on is met

examples:
  bnguard run train.py --lr 0.1
  bnguard run -m package.train --config config.yaml
  torchrun --nproc_per_node 2 -m bnguard run train.py
"""


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Return what runs the script that the arguments name, and returns the exit status."""
    own, target = _split(arguments)
    values = make_parser().parse_args(own)
    if not target:
        raise ConfigurationError("the script is missing: bnguard run SCRIPT.py, or -m MODULE")
    is_module = target[0] == "-m"
    name = target[1] if is_module and len(target) > 1 else target[0]
    if name == "-m":
        raise ConfigurationError("-m needs the name of a module")
    if not is_module and not Path(name).is_file():
        raise ConfigurationError(f"{name} is not a file: name a script, or a module with -m")
    return partial(_run, name, target[2 if is_module else 1 :], values, is_module=is_module)


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "run",
        "Run a training script as python would, and watch the BN layers of each model that it "
        "trains.",
        _HELP,
        "[options] (SCRIPT.py | -m MODULE) [arguments of the script]",
    )
    parser.add_argument(
        "--log-dir", type=str, help="folder for reports and logs; bnguard-runs/SCRIPT-TIME"
    )
    parser.add_argument("--html", type=str, help="file to write the report to as one page")
    parser.add_argument(
        "--fail-on",
        type=Literal["error", "warning", "never"],
        default="never",
        help="exit with status 1 if there is a finding so severe",
    )
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return bnguard's options, and what follows them: a script or ``-m``, and its arguments.

    >>> _split(["--html", "bn.html", "train.py", "--html", "x"])
    (['--html', 'bn.html'], ['train.py', '--html', 'x'])
    """
    place = 0
    while place < len(arguments) and arguments[place].startswith("-"):
        argument = arguments[place]
        if argument == "-m":
            break
        place += 1 if "=" in argument or argument in ("-h", "--help") else 2
    return arguments[:place], arguments[place:]


def _run(name: str, arguments: list[str], values: Namespace, *, is_module: bool) -> int:
    from bnguard.launch.script import hide_own_frames, run_module, run_script
    from bnguard.launch.trained_models import Watching

    label = name if is_module else Path(name).stem
    folder = Path(values.log_dir or f"bnguard-runs/{label}-{strftime('%Y%m%d-%H%M%S')}").absolute()
    page = None if values.html is None else Path(values.html).absolute()
    process = os.getpid()
    # Trainers of Lightning add their callback then, in the processes that they start as well.
    outside = os.environ.get("BNGUARD")
    os.environ["BNGUARD"] = "1"
    watching = Watching(folder)
    is_complete = False
    try:
        (run_module if is_module else run_script)(name, arguments)
        status, is_complete = 0, True
    except SystemExit as end:
        status = _status_of(end)
        is_complete = status == 0
    except BaseException:
        hide_own_frames()
        raise
    finally:
        # A process that the script forked may come here as well.
        worst = None
        if os.getpid() == process:
            worst = _conclude(watching, folder, page, is_complete=is_complete)
            if outside is None:
                del os.environ["BNGUARD"]
    if values.fail_on != "never" and status == 0 and worst is not None:
        return int(worst >= Severity[values.fail_on.upper()])
    return status


def _status_of(end: SystemExit) -> int:
    """Return the exit status that ``python`` makes of the end of a script."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _conclude(
    watching: Watching, folder: Path, page: Path | None, *, is_complete: bool
) -> Severity | None:
    """Print and write the reports; return the highest severity in them."""
    from bnguard.launch.trained_models import tell_user
    from bnguard.report.terminal import as_terminal_text

    concluded: list[Report] = []
    logs = folder
    try:
        sys.stdout.flush()
        reports = list(watching.conclude(is_complete=is_complete))
        for result in reports:
            _write(result.folder, result.report)
            if not result.is_shown:
                if len(reports) > 1:
                    tell_user(f"\n{result.name}, {path_from_here(result.folder)}:")
                tell_user(as_terminal_text(result.report))
            concluded.append(result.report)
        for number, (report, own_folder) in enumerate(_reports_of_callbacks(), start=1):
            place = folder if not reports and number == 1 else folder / f"trainer-{number}"
            _write(place, report)
            concluded.append(report)
            logs = logs if reports else own_folder or logs
        if concluded:
            tell_user(f"bnguard: report written to {path_from_here(folder)}")
            tell_user(f"bnguard: to see it: tensorboard --logdir {path_from_here(logs)}")
            groups = (group for report in concluded for group in report.groups)
            code = next((g.worst.code for g in groups if g.worst.severity > Severity.INFO), None)
            if code is not None:
                tell_user(f"bnguard: what {code} means: bnguard explain {code}")
        elif watching.is_first_rank and is_complete:
            tell_user(f"bnguard: {watching.why_nothing}")
        if page is not None and concluded:
            from bnguard.tensorboard.log_report import write_page

            write_page(logs, page)
            tell_user(f"bnguard: page written to {path_from_here(page)}")
    except Exception as error:  # the script ends as it would alone, whatever fails here
        tell_user(f"bnguard: the report is incomplete: {error}")
    severities = (finding.severity for report in concluded for finding in report.findings)
    return max(severities, default=None)


def _reports_of_callbacks() -> Iterable[tuple[Report, Path | None]]:
    """Yield what callbacks of Lightning reported, with the folder of the Trainer's logger."""
    callback = sys.modules.get("bnguard.launch.callback")
    for monitor in () if callback is None else callback.watching:
        if monitor.report is not None:
            yield monitor.report, getattr(monitor, "folder", None)


def _write(folder: Path, report: Report) -> None:
    from bnguard.loggers import JSON

    folder.mkdir(parents=True, exist_ok=True)
    JSON(folder).log_report(report, 0)
