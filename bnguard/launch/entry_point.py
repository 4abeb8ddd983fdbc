"""What Lightning's entry points call in every script: it has to cost nothing."""

from __future__ import annotations

import os
from typing import Any


def callbacks() -> list[Any]:
    """Return the callback that watches if ``BNGUARD=1`` is set, as ``bnguard run`` sets it."""
    if os.environ.get("BNGUARD") != "1":
        return []
    from bnguard.launch.callback import AddedMonitor

    return [AddedMonitor()]
