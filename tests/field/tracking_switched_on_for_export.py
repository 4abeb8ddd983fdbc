"""Weights trained without running statistics, exported with them: pytorch/pytorch#75252.

The way around an exporter that knows no such layers leaves mean 0 and variance 1 in all of them.
"""

from __future__ import annotations

from torch import nn

import bnguard
from tests.field.situation import Run, Situation, Watch, accuracy, evaluate, train
from tests.networks import conv_net, digits


def _net(*, tracks: bool) -> nn.Sequential:
    model = conv_net()
    for i in (1, 4, 7):
        model[i] = nn.BatchNorm2d(model[i].num_features, track_running_stats=tracks)
    return model


def _exported(*, tracks_in_training: bool) -> nn.Sequential:
    trained, exported = _net(tracks=tracks_in_training), _net(tracks=True)
    train(trained)
    exported.load_state_dict(trained.state_dict(), strict=False)
    return exported


def _run(*, tracks_in_training: bool) -> Run:
    images, labels = digits()
    watch = Watch(_exported(tracks_in_training=tracks_in_training))
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


def _recalibrated() -> float:
    images, labels = digits()
    model = _exported(tracks_in_training=False)
    bnguard.recalibrate(model, list(images[:1200].split(64)))
    return accuracy(model.eval(), images[1200:], labels[1200:])


SITUATION = Situation(
    healthy=lambda: _run(tracks_in_training=True),
    faulty=lambda: _run(tracks_in_training=False),
    cause="BN304",
    repaired=_recalibrated,
)
