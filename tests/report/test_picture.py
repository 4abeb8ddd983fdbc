"""The picture of a report, read from the objects of its figure."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import bnguard
from bnguard.errors import ConfigurationError
from bnguard.observe.history import History, Run
from bnguard.report import Report
from bnguard.report.picture import Course
from tests.networks import mlp


@pytest.fixture(scope="module")
def report():
    """The report of 30 steps with a momentum that is too small."""
    model = mlp()
    model[1].momentum = model[4].momentum = 0.001
    with bnguard.watch(model, every_n_steps=10, on_findings=lambda group: None) as monitor:
        for _ in range(30):
            model(torch.randn(32, 64))
            monitor.step()
        return monitor.report()


def test_a_picture_is_layers_by_steps_with_the_limit_and_the_verdict(report):
    pytest.importorskip("matplotlib")
    figure = report.plot()
    axes, bar = figure.axes
    title = figure.get_suptitle()
    assert title.startswith(
        "BN303 unconverged-statistics: initial statistics left 97.04% (limit 5%)"
    )
    assert title.endswith("→ recalibrate the running statistics, or raise momentum")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4"]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["99.9%", "0%", "limit 5%"]
    assert bar.get_ylabel() == "initial statistics left"
    (image,) = axes.collections
    steps = np.array([1, 10, 20, 30])
    np.testing.assert_allclose(image.get_array(), np.tile(100 * 0.999**steps, (2, 1)))
    np.testing.assert_allclose(image.get_coordinates()[0, :, 0], [0, *steps])
    assert image.norm(5.0) == 0.5


def test_a_healthy_model_and_one_that_was_not_trained_have_a_picture(report):
    pytest.importorskip("matplotlib")
    healthy = Report(History(layers=report.layers, run=Run(steps=30)), (), ())
    heading = "bnguard · 2 BN layers · 30 steps · no problems found"
    assert healthy.plot().get_suptitle() == heading
    assert bnguard.inspect(mlp()).plot().get_suptitle().startswith("bnguard · 2 BN layers")


def test_without_matplotlib_a_line_says_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r'pip install "bnguard\[plot\]"$'):
        report.plot()


def test_a_long_training_keeps_moments_that_are_spread_evenly_over_it():
    course = Course()
    for step in range(1, 1001):
        course.note(History(layers=(), run=Run()), (), step)
    gaps = np.diff([moment.step for moment in course.moments])
    assert 50 <= len(course.moments) <= 100
    assert set(gaps) == {16}
