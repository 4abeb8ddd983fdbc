"""Parameters loaded without the buffers, and evaluated."""

from __future__ import annotations

import torch

import bnguard
from tests.networks import digits
from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import EVALUATE, Watched, pretrained


def run(is_faulty, architecture):
    trained, loaded = pretrained(architecture), build(architecture)
    names = {name for name, _ in trained.named_parameters()}
    state = trained.state_dict()
    if is_faulty:
        state = {name: value for name, value in state.items() if name in names}
    loaded.load_state_dict(state, strict=False)
    with bnguard.watch(loaded, on_findings=lambda group: None) as monitor:
        loaded.eval()
        with torch.no_grad(), monitor.evaluation():
            loaded(digits()[0][EVALUATE])
    return Watched(monitor.report(), 0)


FAULT = Fault("BN304", "loaded without buffers", run, ("mlp", "resnet"), is_cause=True)
