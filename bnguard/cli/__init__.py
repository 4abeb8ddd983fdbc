"""The command line, which starts in ``bnguard.cli.main``."""

from __future__ import annotations

from bnguard.cli.main import main

__all__ = ["main"]
