"""On an accelerator: no wait between two looks, and CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnguard.layers.bn_layer import find_layers
from bnguard.observe.batch_statistics import BatchProbe
from tests.networks import conv_net
from tests.observe.oracle import Oracle, check_window

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_nothing_waits_between_readings():
    model = conv_net().cuda()
    oracle = Oracle(model[1])
    probe = BatchProbe(find_layers(model))
    for step in range(70):
        model(torch.randn(16, 1, 8, 8, device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            probe.read(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    check_window(probe.readings()["1"].window, oracle)


def test_a_forward_replayed_by_a_cuda_graph_is_seen():
    layer = nn.BatchNorm1d(3).cuda()
    inputs = torch.randn(8, 3, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(inputs)
    oracle = Oracle(layer)
    probe = BatchProbe(find_layers(layer))
    for step in range(5):
        inputs.normal_()
        oracle.record(layer, (inputs,))
        graph.replay()
        probe.read(step)
    check_window(probe.readings()[""].window, oracle)
