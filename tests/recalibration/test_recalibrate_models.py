"""Exact recalibration of architectures that are ordinary, and of forwards that are not."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnguard
from tests.benchmarks.truth import errors, true_statistics


def conv(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep, self.up = conv(3, 4), conv(4, 8), conv(12, 4)

    def forward(self, x):
        skip = self.down(x)
        deep = F.interpolate(self.deep(F.max_pool2d(skip, 2)), scale_factor=2)
        return self.up(torch.cat([skip, deep], 1))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3, padding=1))
            for width in (3, 7, 11)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return {"pooled": x.mean((2, 3)), "features": [x]}


class Gan(nn.Module):
    """A discriminator on real and generated images, one after the other."""

    def __init__(self):
        super().__init__()
        self.generator = conv(3, 3)
        self.discriminator = nn.Sequential(conv(3, 4), conv(4, 4))

    def forward(self, x):
        return self.discriminator(x), self.discriminator(self.generator(x))


class Chain(nn.Module):
    """Two blocks, between which something happens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3, 4), conv(4, 4)

    def forward(self, x):
        return self.second(self.first(x))


class Checkpointed(Chain):
    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=False)
        return checkpoint(self.second, x, use_reentrant=False)


class SwallowsErrors(Chain):
    def forward(self, x):
        try:
            return self.second(self.first(x))
        except BaseException:
            return None


class MainThreadOnly(Chain):
    def forward(self, x):
        assert threading.current_thread() is threading.main_thread()
        return super().forward(x)


class ThreadLocal(Chain):
    local = threading.local()
    local.scale = 2.0  # In the main thread alone.

    def forward(self, x):
        return self.second(self.first(x) * self.local.scale)


class TwoAtATime(Chain):
    places = threading.Semaphore(2)

    def forward(self, x):
        with self.places:
            return super().forward(x)


class MemorisesGlobally(Chain):
    memory = {}  # noqa: RUF012

    def forward(self, x):
        self.memory["x"] = x
        return self.second(self.first(x) + self.memory["x"][:, :1])


class MixesTheBatch(Chain):
    def forward(self, x):
        x = self.first(x)
        return self.second(x + x.mean(0, keepdim=True))


class LooksAtTheSize(Chain):
    def forward(self, x):
        x = self.first(x)
        return self.second(x * 3.0 if len(x) == 5 else x)


class ReadsInMemoryOrder(Chain):
    """Gives other values where the layout is another."""

    def forward(self, x):
        scale = torch.linspace(0, 1, x[0].numel(), dtype=x.dtype)
        return super().forward(x * scale.as_strided(x.shape[1:], x.stride()[1:]))


class GlobalPooling(Chain):
    """One value per channel and sample below the pooling."""

    def forward(self, x):
        return self.second(F.adaptive_avg_pool2d(self.first(x), 1))


@pytest.mark.parametrize(
    "kind",
    [
        UNet,
        DenseNet,
        Gan,
        Checkpointed,
        SwallowsErrors,
        MainThreadOnly,
        ThreadLocal,
        TwoAtATime,
        MemorisesGlobally,
        MixesTheBatch,
        LooksAtTheSize,
        ReadsInMemoryOrder,
        GlobalPooling,
    ],
)
def test_the_statistics_are_those_of_the_whole_set(kind, monkeypatch):
    monkeypatch.setattr("bnguard.recalibration.lockstep._TIMEOUT_SECONDS", 0.2)
    model, x = kind(), torch.randn(65, 3, 6, 6) + torch.arange(65).view(-1, 1, 1, 1) / 20
    order = ["generator.1", "discriminator.0.1", "discriminator.1.1"] if kind is Gan else None
    truth = true_statistics(
        copy.deepcopy(model).double(), [batch.double() for batch in x.split(5)], order=order
    )
    alive = threading.active_count()
    assert max(errors(bnguard.recalibrate(model, x.split(5)), truth)) < 1e-4
    assert threading.active_count() == alive


class Between(Chain):
    def __init__(self, between):
        super().__init__()
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x - x.mean(0),
        lambda x: 5 * x.softmax(0),
        lambda x: x.cumsum(0),
        lambda x: x.flip(0).cumsum(0).flip(0),
        lambda x: x - x[:1],
        lambda x: x - x[-1:],
        lambda x: x + 0.5 * x.flip(0),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: torch.cat([3 * x[: len(x) // 2], x[len(x) // 2 :]]),
    ],
    ids=["mean", "softmax", "sum", "sum back", "first", "last", "pairs", "untracked", "half"],
)
@pytest.mark.parametrize("batch_size", [5, 8])
def test_samples_that_depend_on_one_another_are_not_joined(between, batch_size):
    model, x = Between(between), torch.randn(65, 3, 6, 6) + torch.arange(65).view(-1, 1, 1, 1) / 20
    batches = x.split(batch_size)
    truth = true_statistics(copy.deepcopy(model).double(), [batch.double() for batch in batches])
    assert max(errors(bnguard.recalibrate(model, batches), truth)) < 1e-4


class EarlyExit(nn.Module):
    """Leaves out the second block where a test on the whole batch says so."""

    def __init__(self, leaves):
        super().__init__()
        self.leaves, self.first, self.second = leaves, conv(3, 4), conv(4, 4)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.first(x)
        return self.last(y if self.leaves(x) else self.second(y))


@pytest.mark.parametrize(
    "leaves",
    [lambda x: x.mean() > 0, lambda x: x.amax() > 3],
    ids=["mean", "any"],
)
@pytest.mark.parametrize("first", [0, 7])
def test_each_batch_takes_the_branch_that_it_takes_alone(leaves, first):
    model, x = EarlyExit(leaves), torch.randn(96, 3, 6, 6).roll(first, 0)
    truth = true_statistics(copy.deepcopy(model).double(), [b.double() for b in x.split(1)])
    result = bnguard.recalibrate(model, x.split(1))
    assert max(errors(result, truth)) < 1e-4
    assert result.virtual_batches == 1


def test_a_layer_that_the_first_batches_do_not_reach():
    model = EarlyExit(lambda x: x.mean() < 1)
    model.last = nn.Identity()
    batches = [torch.randn(8, 3, 6, 6) + 3 * (index > 3) for index in range(8)]
    truth = true_statistics(copy.deepcopy(model).double(), [b.double() for b in batches])
    assert max(errors(bnguard.recalibrate(model, batches), truth)) < 1e-4
