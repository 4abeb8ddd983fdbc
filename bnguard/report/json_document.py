"""Turns reports into plain data for JSON, in a versioned schema.

Schema version 1, the keys of a report:

* ``schema``: the number 1; ``bnguard``: version of the library.
* ``steps``: training steps observed, 0 for a checkpoint.
* ``findings``: a list, the worst first; each with ``code``, ``name``, ``severity`` (``info``,
  ``warning``, ``error``), ``layer`` (null for the model), ``message``, ``evidence`` (``measure``,
  ``value``, ``limit``, ``unit``, which is ``ln`` if value and limit are natural logarithms of a
  factor, ``is_minimum``: whether values below the limit are wrong),
  ``reasons`` (a list of the same: the evidence for the cause in the message), ``fix``
  (``summary``, ``repair``), ``channels``, ``step``,
  ``cause`` (code of a finding that explains this one, or null).
* ``over``: what was announced during training and is gone; each with ``code``, ``name``,
  ``severity``, ``layer``, ``message``, ``evidence`` (in words), ``first_step``, ``last_step``.
* ``layers``: a list in the order of registration; each with ``name``, ``kind``, ``channels``,
  ``updates``, ``initial_weight``, ``values_per_channel``, ``source`` (where its batch statistics
  were read), ``eval_shift_std`` and ``eval_log_variance_ratio`` (both: largest absolute value over
  the channels), ``view`` (a :class:`bnguard.observe.windows.LayerView`, or null).
* ``skipped``: a list of what is unknown; each with ``code``, ``layer``, ``reason``.
* ``notes``: lines on what was read in an unusual way, or could not be seen.

JSON cannot hold numbers that are not finite: they are the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bnguard import __version__
from bnguard.layers.distances import largest
from bnguard.observe.history import LayerHistory

if TYPE_CHECKING:
    from bnguard.report import Report
    from bnguard.whatif.result import Diagnosis

SCHEMA = 1


def report_document(report: Report) -> dict[str, Any]:
    """Return a report as plain data, in the schema of this module."""
    content = {
        "steps": report.history.run.steps,
        "findings": [finding.to_dict() for finding in report.findings],
        "over": [dataclasses.asdict(past) for past in report.over],
        "layers": [_layer(layer) for layer in report.layers],
        "skipped": [
            {"code": skipped.code, "layer": skipped.layer, "reason": skipped.reason}
            for skipped in report.skipped
        ],
        "notes": report.notes,
    }
    return add_version(content)


def diagnosis_document(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as plain data.

    Schema version 1: ``schema``, ``bnguard``, ``samples``, ``reference_samples``, ``cause``
    (``name``, ``message``, ``evidence``, ``is_fault``, ``advice``, ``next_step``, ``cured_by``: the
    name of a row, or null), ``rows`` (each with ``name``, ``label``, ``score``, ``change``,
    ``flipped_share``, ``gap``, ``drift_std``, ``drift_log_variance``, ``drift_layer``,
    ``input_drift``; null if unknown), ``layers`` (the worst first, each with
    ``name``, ``share``, ``shift_std``, ``log_variance_ratio``), ``skipped`` (each with ``name`` and
    ``reason``), ``notes``.
    """
    content = dataclasses.asdict(diagnosis)
    keys = ("samples", "reference_samples", "cause", "rows", "layers", "skipped", "notes")
    return add_version({key: content[key] for key in keys})


def add_version(content: Mapping[str, object]) -> dict[str, Any]:
    """Return content as a document for JSON: under its schema and the version of the library."""
    head = {"schema": SCHEMA, "bnguard": __version__}
    return head | {key: strict_json(value) for key, value in content.items()}


def json_text(report: Report) -> str:
    """Return a report as JSON."""
    return json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"


def _layer(layer: LayerHistory) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "channels": layer.channels,
        "updates": None if layer.running is None else layer.running.updates,
        "initial_weight": layer.initial_weight,
        "values_per_channel": layer.typical_values_per_channel,
        "source": layer.source,
        "eval_shift_std": largest(layer.eval_shift_std),
        "eval_log_variance_ratio": largest(layer.eval_log_variance_ratio),
        "view": None if layer.view is None else dataclasses.asdict(layer.view),
    }


def strict_json(value: object) -> object:
    """Return a value with numbers that are not finite as strings."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return json_float(value) if isinstance(value, float) else value


def json_float(value: float) -> float | str:
    """Return a number that is not finite as a string."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
