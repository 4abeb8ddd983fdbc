"""No rule raises, whatever a history holds: NaN, nothing, one channel, numbers out of any range."""

from __future__ import annotations

import dataclasses
import random
import types
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnguard.observe import history as histories
from bnguard.observe.history import History, LayerHistory, Run
from bnguard.report import Report
from bnguard.rules.engine import run_rules

NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e-300, 1e300, np.nan, np.inf, -np.inf]
COUNTS = [0, 1, 2, 7, 100, 10**9]
WORDS = ["", "bn", "Dropout", "Linear", "float16", "float32", "SyncBatchNorm", "inputs: why"]


class Odd:
    """Fills the fields of a dataclass by their types with whatever they can hold."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.channels = self.random.choice([0, 1, 3])

    def filled(self, kind, **given):
        hints = typing.get_type_hints(kind, vars(histories))
        fields = {
            field.name: self.value(hints[field.name])
            for field in dataclasses.fields(kind)
            if field.name not in given
        }
        return kind(**fields, **given)

    def value(self, hint):
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin is types.UnionType or origin is typing.Union:
            return self.value(self.random.choice(parts))
        if origin is np.ndarray:
            return np.array([self.random.choice(NUMBERS) for _ in range(self.channels)])
        if origin is tuple:
            return tuple(self.value(parts[0]) for _ in range(self.random.randrange(4)))
        if isinstance(origin, type) and issubclass(origin, typing.Mapping):
            return {self.random.choice(COUNTS[1:]): 3 for _ in range(self.random.randrange(3))}
        if dataclasses.is_dataclass(hint):
            return self.filled(hint)
        return {
            bool: lambda: self.random.random() < 0.5,
            int: lambda: self.random.choice(COUNTS),
            float: lambda: self.random.choice(NUMBERS),
            str: lambda: self.random.choice(WORDS),
            types.NoneType: lambda: None,
        }[hint]()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_rule_raises_on_any_history(seed):
    odd = Odd(seed)
    run = odd.filled(Run)
    layers = tuple(
        odd.filled(LayerHistory, name=f"bn{number}", channels=odd.channels, run=run)
        for number in range(seed % 4)
    )
    history = History(layers=layers, run=run)
    conclusions = run_rules(history)
    assert [skip for skip in conclusions.skipped if skip.is_failure] == []
    report = Report(history, conclusions.findings, conclusions.skipped)
    assert str(report)
    assert report.to_dict()
