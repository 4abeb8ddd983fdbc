"""The page of the tab as one file: to attach to an issue, or to look at without TensorBoard."""

from __future__ import annotations

import base64
import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bnguard.tensorboard.assets import STATIC_FILES, rule_pages, static_text
from bnguard.tensorboard.decoding import Series, thinned
from bnguard.tensorboard.log_report import open_log
from bnguard.tensorboard.metadata import LogError
from bnguard.tensorboard.reader import LogReader

# What a picture can show; an attachment should stay small.
_MOST_STEPS = 600
_MOST_SNAPSHOTS = 12

# A module that stands in a data: address has no folder, so its imports are given bare names.
_IMPORT = re.compile(r'(\bfrom )"\./([\w.]+)"')

_START = """
import { start } from "bnguard/app.js";
import { EmbeddedSource } from "bnguard/source.js";
const data = JSON.parse(document.getElementById("data").textContent);
start(document.body, new EmbeddedSource(data));
"""


def write_page(folder: Path, file: Path) -> None:
    """Write the page of all runs below a folder as one self-contained HTML file.

    Long runs are thinned to what a picture can show; a peak of a single step survives.

    Raises:
        LogError: No run there can be shown, or the file cannot be written.
    """
    page = page_html(open_log(folder))
    try:
        file.write_text(page, "utf-8")
    except OSError as error:
        raise LogError(f"{file} cannot be written: {error.strerror}") from error


def page_html(reader: LogReader) -> str:
    """Return the page of all runs that can be shown, with its data in it.

    Raises:
        LogError: None can; the message says why.
    """
    runs, problems = [], []
    for entry in reader.runs():
        try:
            runs.append(_embedded(reader, entry["name"]))
        except LogError as error:
            problems.append(f"{entry['name']}: {error}")
    if not runs:
        raise LogError(f"no run can be shown: {problems[0]}")
    # The page shows the remarks of a run; what has no run of its own is said with each.
    for embedded in runs:
        embedded["run"]["problems"] += [f"not shown: run {problem}" for problem in problems]
    data = json.dumps({"runs": runs, "rules": rule_pages()})
    scripts = {
        "importmap": json.dumps({"imports": _modules()}),
        "module": _START,
    }
    inline = "\n".join(
        f'<script type="{kind}">{_inert(text)}</script>' for kind, text in scripts.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts.values())}">
<title>BatchNorm report</title>
<style>{static_text("style.css")}</style>
</head>
<body>
<script type="application/json" id="data">{_inert(data)}</script>
{inline}
</body>
</html>
"""


def _embedded(reader: LogReader, name: str) -> dict[str, Any]:
    run = reader.run(name)
    channels, problems = {}, list(run["problems"])
    for layer in run["channels"]:
        if layer in run["layers"]:
            try:
                series = reader.channels(name, layer)
                channels[layer] = _snapshots(series)
                problems += [f"{layer}: {series.left_out}"] if series.left_out else []
            except LogError as error:
                problems.append(f"{layer}: {error}")
    return {
        "run": {**run, "channels": list(channels), "problems": problems, "version": ""},
        "stats": {
            metric["key"]: _packed(reader.stats(name, metric["key"]), _MOST_STEPS)
            for metric in run["metrics"]
        },
        "channels": channels,
    }


def _packed(series: Series, most_steps: int) -> str:
    return base64.b64encode(thinned(series, most_steps).pack()).decode()


def _snapshots(series: Series) -> str:
    # The newest are kept: merged, a snapshot would be of no step.
    newest = slice(-_MOST_SNAPSHOTS, None)
    kept = Series(series.steps[newest], series.values[newest], series.names)
    return base64.b64encode(kept.pack()).decode()


def _modules() -> dict[str, str]:
    """Return the modules of the tab, each by a bare name, as data: addresses."""
    modules = {}
    for name in STATIC_FILES:
        if posixpath.splitext(name)[1] == ".js" and name != "index.js":
            text = _IMPORT.sub(r'\1"bnguard/\2"', static_text(name))
            content = base64.b64encode(text.encode()).decode()
            modules[f"bnguard/{name}"] = f"data:text/javascript;base64,{content}"
    return modules


def _inert(text: str) -> str:
    """Return JSON or a script without anything that ends a script element."""
    return text.replace("<", "\\u003c")


def _policy(scripts: Iterable[str]) -> str:
    """Return a policy under which nothing runs but what stands here, and nothing is loaded."""
    digests = (hashlib.sha256(_inert(script).encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src data: {allowed}"
