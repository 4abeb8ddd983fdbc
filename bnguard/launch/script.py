"""Runs a script or module in this process as ``python`` would run it."""

from __future__ import annotations

import io
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from bnguard.errors import ConfigurationError


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a script as ``python PATH ARGUMENTS`` does; what it raises passes through.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise ConfigurationError(f"cannot open {path}: {error.strerror}") from error
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11
        sys.path[0] = str(Path(path).resolve().parent)
    file_name = str(Path(path).absolute())
    main = _new_main()
    main.__file__ = file_name
    main.__loader__ = SourceFileLoader("__main__", file_name)
    vars(main)["__cached__"] = None
    exec(compile(source, file_name, "exec", dont_inherit=True), vars(main))


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module as ``python -m NAME ARGUMENTS`` does; what it raises passes through."""
    sys.argv = ["-m", *arguments]
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11
        sys.path[0] = str(Path.cwd())
    _new_main()
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # what python -m calls


def hide_own_frames() -> None:
    """Let tracebacks that end the process begin in the script."""
    show = sys.excepthook

    def show_of_script(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        main = vars(sys.modules["__main__"])
        while trace is not None and trace.tb_frame.f_globals is not main:
            trace = trace.tb_next
        show(kind, error.with_traceback(trace), trace)

    sys.excepthook = show_of_script


def _new_main() -> ModuleType:
    """Put an empty ``__main__`` in the place of the one that started the process."""
    main = ModuleType("__main__")
    vars(main)["__builtins__"] = sys.modules["builtins"]
    vars(main)["__annotations__"] = {}
    sys.modules["__main__"] = main
    return main
