"""Shows the runs in a folder without TensorBoard: their findings, and the tab as one HTML page."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text
from tensorboard import context
from tensorboard.backend.event_processing import (
    data_provider,
    event_accumulator,
    plugin_event_multiplexer,
)

from bnguard.errors import in_one_line, printable
from bnguard.findings import Finding, Severity, counted
from bnguard.report.terminal import UNWRAPPED, count_causes, findings_view
from bnguard.report.views import as_text
from bnguard.tensorboard.metadata import PLUGIN_NAME, LogError
from bnguard.tensorboard.plugin import STATIC_FILES, rule_pages, static_text
from bnguard.tensorboard.reader import LogReader, Series, SeriesCache, thin
from bnguard.tensorboard.records import as_findings, group_causes

# As many as a plot can show; an attachment should stay small.
_MOST_STEPS = 600
_MOST_SNAPSHOTS = 3
# A module at a data: address has no folder, so its imports need bare names.
_IMPORT = re.compile(r'(\bfrom )"\./([\w.]+)"')
# Comments, blank lines and indents.
_UNNEEDED = re.compile(r"^ */\*\*.*?\*/\n|^ *//[^\n]*\n|^\n|^ +", re.MULTILINE | re.DOTALL)
# In a data: address nearly all characters may stay as they are.
_SAFE_IN_DATA = " !\"$&'()*+,/:;=>?@[]^`{|}"
_START = """
import { start } from "bnguard/app.js";
import { EmbeddedSource } from "bnguard/source.js";
const data = JSON.parse(document.getElementById("data").textContent);
start(document.body, new EmbeddedSource(data));
"""


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The last report of a run in its event files; rich and ``str()`` show it.

    Attributes:
        name: Folder of the run, relative to the one that was read.
        layers: Names in forward order.
        first_step: First training step logged.
        last_step: Newest training step logged.
        findings: As they were logged; the repair of a fix is the whole command.
        problem: Why the run cannot be shown; empty if it can.
        remarks: What could not be read, a line each.
    """

    name: str
    layers: tuple[str, ...] = ()
    first_step: int = 0
    last_step: int = 0
    findings: tuple[Finding, ...] = ()
    problem: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def worst_severity(self) -> Severity | None:
        """The highest severity among the findings; None if there are none."""
        return max((finding.severity for finding in self.findings), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the run as plain data for JSON."""
        found = [finding.to_dict() for finding in self.findings]
        return {**dataclasses.asdict(self), "findings": found}

    def __str__(self) -> str:
        return as_text(self, UNWRAPPED)

    def __rich__(self) -> RenderableType:
        name = printable(self.name)
        if self.problem:
            return Text(f"{name} · cannot be shown: {printable(self.problem)}")
        nothing = "no findings in what can be read" if self.remarks else "nothing is wrong"
        head = (
            f"{name} · {counted(len(self.layers), 'BN layer')} · step {self.first_step} to "
            f"{self.last_step} · {' · '.join(count_causes(self.findings)) or nothing}"
        )
        causes = findings_view(group_causes(self.findings), lambda fix: fix.repair or "")
        remarks = [Text(printable(f"note: {remark}"), "dim") for remark in self.remarks]
        return Group(Text(head, "bold"), causes, *remarks)


def open_log(folder: Path) -> LogReader:
    """Return a reader of the event files in a folder and its subfolders.

    Raises:
        LogError: The folder does not exist, or bnguard logged no run in it.
    """
    if not folder.is_dir():
        raise LogError(f"{folder} is not a folder: name the one that TensorBoard is started on")
    multiplexer = plugin_event_multiplexer.EventMultiplexer(
        # 0 would keep everything; data of other plugins are not needed.
        size_guidance=dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 1),
        tensor_size_guidance={PLUGIN_NAME: 0},
    )
    multiplexer.AddRunsFromDirectory(str(folder))
    damages = {}
    for name in sorted(multiplexer.Runs()):
        damage = _load(multiplexer.GetAccumulator(name), folder / name)
        if damage:
            damages[name] = damage
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    reader = LogReader(provider, context.RequestContext(), "", SeriesCache(), damages)
    if not reader.runs():
        raise LogError(
            f"{folder} holds no run that bnguard watched: train with bnguard run, or with the "
            "BatchNormMonitor callback"
        )
    return reader


def _load(accumulator: event_accumulator.EventAccumulator, folder: Path) -> str:
    """Read the event files of a run as far as possible; return what stopped it, if anything."""
    try:
        accumulator.Reload()
    except Exception as error:  # A complete record that holds no event.
        return f"an event file is damaged ({in_one_line(error)}): what follows there is not shown"
    for file in sorted(folder.iterdir()):
        if "tfevents" in file.name and file.is_file() and _is_cut(file):
            return f"{file.name} ends in the middle of a record, or is damaged there"
    return ""


def _is_cut(file: Path) -> bool:
    """Return whether an event file ends in the middle of a record.

    A record is its length in 8 bytes, 4 of a checksum, the data, and 4 of another.
    """
    size, place = file.stat().st_size, 0
    with file.open("rb") as stream:
        while place < size:
            stream.seek(place)
            place += 8 + 4 + int.from_bytes(stream.read(8), "little") + 4
    return place > size


def logged_runs(folder: Path) -> tuple[LoggedRun, ...]:
    """Return the last report of every run below a folder, sorted by name.

    Raises:
        LogError: The folder does not exist, or bnguard logged no run in it.
    """
    reader = open_log(folder)
    return tuple(_read_run(reader, entry["name"]) for entry in reader.runs())


def _read_run(reader: LogReader, name: str) -> LoggedRun:
    try:
        run = reader.run(name)
    except LogError as error:
        return LoggedRun(name=name, problem=str(error))
    return LoggedRun(
        name=name,
        layers=run["layers"],
        first_step=int(run["first_step"]),
        last_step=int(run["last_step"]),
        findings=tuple(as_findings(run["findings"])),
        remarks=tuple(run["problems"]),
    )


def write_page(folder: Path, file: Path) -> None:
    """Write the page of all runs below a folder as one self-contained HTML file.

    Long runs are thinned to what a plot can show; a peak of a single step survives.

    Raises:
        LogError: No run there can be shown, or the file cannot be written.
    """
    page = page_html(open_log(folder))
    try:
        file.write_text(page, "utf-8")
    except OSError as error:
        raise LogError(f"{file} cannot be written: {error.strerror}") from error


def page_html(reader: LogReader) -> str:
    """Return the page of all runs that can be shown, with their data.

    Raises:
        LogError: No run can be shown; the message says why.
    """
    runs, problems, codes = [], [], set()
    for entry in reader.runs():
        try:
            run = reader.run(entry["name"])
            runs.append({"listed": {**entry, "version": ""}, **_embed(reader, run)})
            codes |= {finding["code"] for finding in run["findings"]}
        except LogError as error:
            problems.append(f"{entry['name']}: {error}")
    if not runs:
        raise LogError(f"no run can be shown: {problems[0]}")
    # The page shows remarks per run, so each run names those that cannot be shown.
    for embedded in runs:
        embedded["problems"] += [f"not shown: run {problem}" for problem in problems]
    rules = {code: page for code, page in rule_pages().items() if code in codes}
    data = json.dumps({"runs": runs, "rules": _compress(json.dumps(rules).encode())})
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
<style>{_UNNEEDED.sub("", static_text("style.css"))}</style>
</head>
<body>
<script type="application/json" id="data">{_inert(data)}</script>
{inline}
</body>
</html>
"""


def _embed(reader: LogReader, run: dict[str, Any]) -> dict[str, Any]:
    name, channels, problems = run["name"], {}, list(run["problems"])
    for layer in run["channels"]:
        if layer in run["layers"]:
            try:
                series = reader.channels(name, layer)
                channels[layer] = _snapshots(series)
                problems += [f"{layer}: {series.left_out}"] if series.left_out else []
            except LogError as error:
                problems.append(f"{layer}: {error}")
    kept = {**run, "channels": list(channels), "version": ""}
    stats = [reader.stats(name, metric["key"]) for metric in run["metrics"]]
    return {
        "run": _compress(json.dumps(kept).encode()),
        "problems": problems,
        "stats": _pack(_round(stats), "<f4"),
        "channels": channels,
    }


def _round(metrics: Sequence[Series]) -> Series:
    """Return the metrics of a run as one series, with the steps and figures a chart can show."""
    values = np.stack([metric.values for metric in metrics], axis=1)
    series = thin(Series(metrics[0].steps, values), _MOST_STEPS)
    # The 10 leading bits of each fraction: zeros at the end compress well.
    bits = (series.values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return Series(series.steps, bits.view(np.float32))


def _pack(series: Series, dtype: str) -> str:
    """Return a series as text: first bytes together, then second ones; the steps in a row.

    Neighbouring bytes are alike then, which halves what is left of them.
    """
    values = np.moveaxis(series.values.astype(dtype), 0, -1)
    planes = np.frombuffer(values.tobytes(), np.uint8).reshape(-1, values.itemsize).T
    return _compress(series.pack(planes.tobytes()))


def _compress(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _snapshots(series: Series) -> str:
    # Keep the newest: a merged snapshot would belong to no step.
    newest = slice(-_MOST_SNAPSHOTS, None)
    kept = Series(series.steps[newest], series.values[newest], series.names)
    return _pack(kept, "<f2")  # They are logged in half precision.


def _modules() -> dict[str, str]:
    """Return the modules of the tab as data: addresses, by bare name; without their comments."""
    modules = {}
    for name in STATIC_FILES:
        if posixpath.splitext(name)[1] == ".js" and name != "index.js":
            text = _IMPORT.sub(r'\1"bnguard/\2"', _UNNEEDED.sub("", static_text(name)))
            modules[f"bnguard/{name}"] = f"data:text/javascript,{quote(text, _SAFE_IN_DATA)}"
    return modules


def _inert(text: str) -> str:
    """Return JSON or a script that cannot end its script element."""
    return text.replace("<", "\\u003c")


def _policy(scripts: Iterable[str]) -> str:
    """Return a policy that runs only these scripts, and loads nothing."""
    digests = (hashlib.sha256(_inert(script).encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src data: {allowed}"
