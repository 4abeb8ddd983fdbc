"""A trained network adapts to the data of the test, and normalises with them: DequanWang/tent#3.

The statistics of training are removed, gamma and beta alone learn, and no batch is run in eval
mode. In qinenergy/cotta#17 the statistics stay, and nothing learns.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.field.situation import Run, Situation, Watch, shuffled
from tests.networks import conv_net, digits


@functools.cache
def _trained() -> dict[str, torch.Tensor]:
    model, (images, labels) = conv_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        for batch in shuffled(64)():
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.state_dict()


def adapt(
    *, drops_buffers: bool = True, learns: bool = True, is_watched_first: bool = False
) -> Run:
    """Adapt to test images of little contrast, in batches of 64."""
    model, (images, labels) = conv_net(), digits()
    model.load_state_dict(_trained())
    images, labels = 0.5 * images[1200:] + 0.3, labels[1200:]
    watch = Watch(model) if is_watched_first else None
    layers = [module for module in model if isinstance(module, _BatchNorm)]
    model.train().requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(learns)
        layer.track_running_stats = False
        if drops_buffers:
            layer.running_mean = layer.running_var = None
    affine = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer = torch.optim.Adam(affine, lr=1e-3)
    watch = watch or Watch(model, {"optimizer": optimizer} if learns else {})
    hits = 0.0
    for batch, expected in zip(images.split(64), labels.split(64), strict=True):
        with torch.set_grad_enabled(learns):
            scores = model(batch)
        if learns:
            optimizer.zero_grad()
            nn.functional.softmax(scores, 1).mul(-F.log_softmax(scores, 1)).sum().backward()
            optimizer.step()
        hits += (scores.argmax(1) == expected).sum().item()
    return watch.end(hits / len(labels))


SITUATION = Situation(healthy=adapt)
