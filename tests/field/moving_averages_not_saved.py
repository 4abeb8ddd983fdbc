"""A checkpoint of what the optimizer trains, without the moving averages: zhengyang-wang/Unet_3D#5.

Training looked right; the evaluation script loads the parameters into a fresh network.
apache/mxnet#989 resumes at a much lower accuracy in the same way.
"""

from __future__ import annotations

from functools import partial

import bnguard
from tests.field.situation import Run, Situation, Watch, accuracy, evaluate, train
from tests.networks import conv_net, digits


def _loaded(*, with_buffers: bool) -> Watch:
    trained, fresh = conv_net(), conv_net()
    train(trained, epochs=3)
    state = trained.state_dict() if with_buffers else dict(trained.named_parameters())
    fresh.load_state_dict(state, strict=False)
    return Watch(fresh)


def _run(*, with_buffers: bool) -> Run:
    images, labels = digits()
    watch = _loaded(with_buffers=with_buffers)
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


def _recalibrated() -> float:
    images, labels = digits()
    model = _loaded(with_buffers=False).model
    bnguard.recalibrate(model, list(images[:1200].split(64)))
    return accuracy(model.eval(), images[1200:], labels[1200:])


SITUATION = Situation(
    healthy=partial(_run, with_buffers=True),
    faulty=partial(_run, with_buffers=False),
    cause="BN304",
    repaired=_recalibrated,
)
