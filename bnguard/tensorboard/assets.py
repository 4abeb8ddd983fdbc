"""The files of the page, an explicit list of them, and the pages of the rules."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping

from bnguard.rules import RULES

# Nothing but these is served or embedded.
STATIC_FILES: Mapping[str, str] = {
    "app.js": "text/javascript",
    "channels.js": "text/javascript",
    "curves.js": "text/javascript",
    "dom.js": "text/javascript",
    "empty.js": "text/javascript",
    "findings.js": "text/javascript",
    "heatmap.js": "text/javascript",
    "host.js": "text/javascript",
    "index.js": "text/javascript",
    "layer.js": "text/javascript",
    "overview.js": "text/javascript",
    "plot.js": "text/javascript",
    "scale.js": "text/javascript",
    "signal.js": "text/javascript",
    "source.js": "text/javascript",
    "state.js": "text/javascript",
    "style.css": "text/css",
    "toolbar.js": "text/javascript",
}


@functools.cache
def static_text(name: str) -> str:
    """Return one of the static files.

    Raises:
        KeyError: The file is not on the list.
    """
    if name not in STATIC_FILES:
        raise KeyError(name)
    folder = importlib.resources.files("bnguard.tensorboard").joinpath("static")
    return folder.joinpath(name).read_text("utf-8")


def rule_pages() -> dict[str, str]:
    """Return the page of each rule, by its code; the first line is code and name.

    >>> rule_pages()["BN301"].splitlines()[0]
    'BN301 statistic-drift'
    """
    return {rule.code: f"{rule.code} {rule.name}\n\n{rule.page()}" for rule in RULES}
