"""What loaders yield and models return, and one clear line where it does not fit."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard.errors import BNGuardError, CalibrationError, ConfigurationError

X = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))


def net(*last):
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3), *last
    )


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, scale=1.0):
        return {"logits": self.net(x) * scale}


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor
    temperature: torch.Tensor


class WithLoss(Named):
    """As those of Hugging Face transformers: a loss of the batch beside what has a row a sample."""

    def forward(self, x, labels):
        logits = self.net(x)
        return Output((logits[:, 0] - labels).square().mean(), logits, torch.ones(1))


def names(diagnosis):
    return [row.name for row in diagnosis.rows]


@pytest.mark.parametrize(
    ("make", "loader", "forward"),
    [
        (net, list(X.split(10)), None),
        (net, [(x, 0) for x in X.split(10)], None),
        (net, [[x, 0] for x in X.split(10)], None),
        (Named, [{"x": x, "label": 0} for x in X.split(10)], None),
        (WithLoss, [{"x": x, "labels": x[:, 0]} for x in X.split(10)], None),
        (net, [{"image": x} for x in X.split(10)], lambda model, batch: model(batch["image"])),
        (net, DataLoader(TensorDataset(X, X), 10), None),
        (lambda: nn.DataParallel(net()), list(X.split(10)), None),
    ],
    ids=[
        "tensors",
        "tuples",
        "lists",
        "mappings",
        "loss",
        "forward=",
        "DataLoader",
        "DataParallel",
    ],
)
def test_all_ways_to_yield_a_batch_give_the_same(make, loader, forward):
    torch.manual_seed(1)
    found = bnguard.diagnose(make(), loader, forward=forward)
    torch.manual_seed(1)
    expected = bnguard.diagnose(net(), X.split(10))
    assert [row.change for row in found.rows] == [row.change for row in expected.rows]
    assert found.samples == 120


def test_what_has_a_row_a_sample_by_chance_is_not_compared():
    alone = bnguard.diagnose(WithLoss(), [{"x": x, "labels": x[:, 0]} for x in X.split(1)])
    assert names(alone) == ["stored", "evaluation", "batches of 2", "batches of 8", "batches of 32"]


def test_an_iterator_is_read_once_and_kept():
    loader = iter(X.split(10))
    found = bnguard.diagnose(net(), loader)
    assert found.samples == 120
    with pytest.raises(CalibrationError, match="the loader is empty: an iterator that can be read"):
        bnguard.diagnose(net(), loader)
    both = iter(X.split(10))
    with pytest.raises(CalibrationError, match="the reference is empty"):
        bnguard.diagnose(net(), both, both)


def test_samples_bound_a_loader_without_end():
    def endless():
        while True:
            yield torch.randn(8, 4)

    found = bnguard.diagnose(net(), endless(), endless(), samples=60)
    assert (found.samples, found.reference_samples) == (60, 60)


def test_batches_of_different_sizes_and_of_one():
    found = bnguard.diagnose(net(), [*X[:100].split(10), X[100:117], X[117:118]])
    assert found.samples == 118
    assert {"batches", "batches of 2", "batches of 32", "shuffled batches"} <= set(names(found))
    alone = bnguard.diagnose(net(), X.split(1))
    assert "batches" not in names(alone)
    assert alone.row("batches of 32").gap is None
    assert any("batches of 1: 1 has one value per channel" in note for note in alone.notes)


def test_a_batch_size_that_cannot_be_is_said():
    found = bnguard.diagnose(net(), X.split(10), batch_sizes=(3, 500))
    assert "batches of 3" in names(found)
    assert "no row for batches of 500: there are 120 samples" in found.notes


def test_a_row_is_of_batches_of_the_size_that_it_names():
    """What is left over never makes one large batch, under the name of a smaller one."""
    model = net().eval()
    few = bnguard.diagnose(model, X[:12].split(2), batch_sizes=(8, 12))
    assert "no row for batches of 8: 12 samples make only one" in few.notes
    assert "batches of 12" in names(few)
    threes = bnguard.diagnose(model, X.split(3), batch_sizes=(2,)).row("batches of 2")
    twos = bnguard.diagnose(model, X.split(2)).row("batches")
    assert threes.change == pytest.approx(twos.change, rel=1e-5)
    images = [torch.randn(4, 1, side, side) for side in (6, 7, 8, 9, 10, 11)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    found = bnguard.diagnose(model, images, batch_sizes=(2, 8))
    assert "batches of 2" in names(found)
    assert any("batches of 8: the samples do not fit together" in note for note in found.notes)


def test_batch_statistics_of_parts_are_those_of_batches_of_that_size():
    """Parts of a larger batch, at every layer, are as good as smaller batches."""
    model = net().eval()
    rows = {size: bnguard.diagnose(model, X.split(size), batch_sizes=(5,)) for size in (5, 20, 120)}
    expected = rows[5].row("batches").change
    assert rows[20].row("batches of 5").change == pytest.approx(expected, rel=1e-5)
    assert rows[120].row("batches of 5").change == pytest.approx(expected, rel=1e-5)
    train = copy.deepcopy(model).train()
    with torch.no_grad():
        direct = torch.cat([train(x) for x in X.split(5)])
    bnguard.recalibrate(model, X.split(20))
    with torch.no_grad():
        fresh = model(X)
    by_hand = ((direct - fresh).square().mean() / fresh.var(correction=0)).sqrt().item()
    assert expected == pytest.approx(by_hand, rel=1e-3)


def test_the_score_of_batch_statistics_is_that_of_the_batch_size():
    """Also where the score puts all of its samples in at once."""
    model, labels = net().eval(), torch.randint(0, 3, (120,))

    def score(scored):
        return (scored(X).argmax(1) == labels).double().mean()

    found = bnguard.diagnose(model, X.split(10), score=score, batch_sizes=(4, 60))
    train = copy.deepcopy(model).train()
    for size, name in ((4, "batches of 4"), (60, "batches of 60"), (120, "batches")):
        with torch.no_grad():
            outputs = torch.cat([train(x) for x in X.split(size)])
        right = (outputs.argmax(1) == labels).double().mean().item()
        assert found.row(name).score == right
    in_tens = bnguard.diagnose(
        model,
        X.split(10),
        score=lambda scored: torch.cat([scored(x) for x in X.split(10)]).mean(),
        batch_sizes=(4, 60),
    )
    assert in_tens.row("batches of 4").score is not None
    assert in_tens.row("batches of 60").score is None
    assert in_tens.row("shuffled batches").score is None


def test_batches_with_nan_are_left_out_and_said():
    data = X.clone()
    data[15] = torch.nan
    found = bnguard.diagnose(net(), data.split(10), data.split(10))
    assert found.samples == 110
    assert "evaluation data: 1 batch left out for NaN or Inf (11 used)" in found.notes
    assert all(row.change < 10 for row in found.rows)


class Twice(nn.Module):
    """Calls its layer on two streams, or on what its own output led to."""

    def __init__(self, is_chained=False):
        super().__init__()
        self.first, self.bn, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.is_chained = is_chained

    def forward(self, x):
        one = self.bn(self.first(x))
        other = self.bn(one.relu() if self.is_chained else self.first(-x))
        return self.last(one + other)


def test_a_layer_that_is_called_several_times():
    found = bnguard.diagnose(Twice(), X.split(10), X.split(10))
    assert found.row("evaluation").drift_std < 1e-5
    assert found.notes == ()
    chained = bnguard.diagnose(Twice(is_chained=True), X.split(10), X.split(10))
    assert any("pooled over batches" in note for note in chained.notes)


def test_layers_without_statistics_and_frozen_ones_are_skipped():
    model = net().train()
    model[1] = nn.BatchNorm1d(8, track_running_stats=False)
    (skipped,) = bnguard.diagnose(model, X.split(10)).skipped
    assert (skipped.name, skipped.reason) == ("1", "has no running statistics")
    model = net().train()
    model[1].eval()
    found = bnguard.diagnose(model, X.split(10))
    assert [layer.name for layer in found.skipped] == ["1"]
    assert [layer.name for layer in found.layers] in ([], ["4"])


def test_images_of_different_sizes_as_inputs_and_outputs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    batches = [torch.randn(4, 3, 16, 16), torch.randn(4, 3, 20, 20)] * 3
    found = bnguard.diagnose(model, batches)
    assert found.samples == 24
    assert found.row("shuffled batches") is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    found = bnguard.diagnose(net().to(dtype), X.to(dtype).split(10))
    assert found.row("evaluation").change == 0.0


def poisoned_weights():
    model = net()
    nn.init.constant_(model[0].bias, torch.nan)
    return model


class Classes(Twice):
    def forward(self, x):
        return super().forward(x).argmax(1)


class Varying(Twice):
    def forward(self, x):
        scores = super().forward(x)
        return scores[: 1 + int(abs(scores.sum().item() * 1e4)) % 9]


@pytest.mark.parametrize(
    ("make", "loader", "options", "error", "message"),
    [
        (lambda: nn.Linear(4, 2), X.split(10), {}, CalibrationError, "Linear has no BN layers"),
        (net, [], {}, CalibrationError, "the loader is empty"),
        (net, [{"y": X}], {}, CalibrationError, "pass a forward"),
        (net, [torch.randn(8, 5)], {}, CalibrationError, "the forward failed at batch 0"),
        (poisoned_weights, X.split(10), {}, CalibrationError, "0.bias contains NaN or Inf"),
        (Classes, X.split(10), {}, CalibrationError, "returns no floating-point tensors"),
        (Varying, X.split(10), {}, CalibrationError, "outputs change their shape"),
        (net, X.split(10), {"samples": 1}, ConfigurationError, "samples 1"),
        (
            net,
            X.split(10),
            {"samples": 2.5},
            ConfigurationError,
            "samples 2.5 is not a whole number",
        ),
        (net, X.split(10), {"batch_sizes": 4}, ConfigurationError, "batch sizes 4"),
        (net, X.split(10), {"batch_sizes": ("a",)}, ConfigurationError, "batch sizes"),
        (net, X.split(10), {"score": 0.9}, ConfigurationError, "score=0.9 is not a function"),
        (net, X.split(10), {"score": lambda model: None}, ConfigurationError, "a number"),
        (net, X.split(10), {"batch_sizes": (0,)}, ConfigurationError, "batch sizes"),
        (net, X.split(10), {"expected_score": 1.0}, ConfigurationError, "needs a score"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(make, loader, options, error, message):
    with pytest.raises(error, match=message) as raised:
        bnguard.diagnose(make(), loader, **options)
    assert isinstance(raised.value, BNGuardError)
    assert len(str(raised.value).splitlines()) == 1


def test_a_model_without_running_statistics_has_nothing_to_compare():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False))
    diagnosis = bnguard.diagnose(model, torch.randn(64, 4).split(16))
    assert (diagnosis.cause.name, diagnosis.cause.is_fault) == ("no-statistics", False)
    assert "no BN layer has running statistics" in str(diagnosis).replace("\n", " ")
    assert diagnosis.to_dict()["rows"] == []


def test_batches_that_cannot_be_joined_are_compared_with_a_score():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 4), Transposed(), nn.BatchNorm1d(4), Pooled())
    batches = [torch.randint(16, (8, 3 + index % 5)) for index in range(20)]
    diagnosis = bnguard.diagnose(model, batches, score=lambda model: 0.5, batch_sizes=())
    assert diagnosis.row("batches").score == 0.5


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(2)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, nn.Linear(4, 4)])
def test_sparse_batches_and_those_of_another_network(change):
    assert bnguard.diagnose(net(), [change(part) for part in X.split(10)]).samples == len(X)
