"""The counts of calls, when hooks that see nothing new are away most of the time."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnguard.layers.bn_layer import find_layers
from bnguard.observe import layer_calls
from bnguard.observe.layer_calls import ShapeProbe

EVENTS = ["usual", "short", "without_grad", "twice", "frozen", "evaluated", "checked", "alone"]


class Steps:
    """A model whose calls are counted, and which is called in several ways."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            nn.BatchNorm1d(2),
            nn.BatchNorm1d(2),
            nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)),
        )
        self.probe = ShapeProbe(self.model, find_layers(self.model), lambda: None)
        self.step = 1

    def take(self, event: str) -> None:
        if event == "without_grad":
            with torch.no_grad():
                self.model(torch.ones(4, 2))
        elif event == "frozen":
            self.model[1].train(not self.model[1].training)
        elif event == "evaluated":
            self.probe.wake()
            self.probe.is_evaluating = True
            with torch.no_grad():
                self.model.eval()(torch.ones(4, 2))
            self.model.train()
            self.probe.is_evaluating = False
        elif event == "checked":
            self.probe.wake()
        elif event == "alone":
            self.model[2](torch.ones(4, 2))
        self.model(torch.ones(2 if event == "short" else 4, 2))
        if event == "twice":
            self.model(torch.ones(4, 2))
        self.step += 1
        self.probe.start_step(self.step)

    def counts(self) -> list[object]:
        self.probe.wake()
        return [
            (name, record.values_per_channel(), record.samples(), record.calls, record.position)
            for name, record in copy.deepcopy(self.probe.records).items()
        ]


@given(events=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=6), gap=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_resting_hooks_change_no_count(events, gap):
    resting, watching = Steps(), Steps()
    for part in watching.probe._parts:
        part.rest = lambda step: None
    taken = ["usual"] * (layer_calls._STEPS_BEFORE_REST + 40)
    for event in events:
        taken += [event] + ["usual"] * gap
    for event in taken:
        resting.take(event)
        watching.take(event)
        assert not watching.probe._parts[0].resting
    assert resting.counts() == watching.counts()


def test_hooks_leave_when_they_see_nothing_new():
    steps = Steps()
    for _ in range(layer_calls._STEPS_BEFORE_REST + 5):
        steps.take("usual")
    hooks = [len(layer.module._forward_pre_hooks) for layer in find_layers(steps.model)]
    assert hooks == [1, 0, 1, 0]
