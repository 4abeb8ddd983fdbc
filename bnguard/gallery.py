"""Eight faults in small trainings on handwritten digits, each with its repair."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnguard.errors import ConfigurationError, nearest_name
from bnguard.monitor import watch
from bnguard.recalibration.api import recalibrate
from bnguard.report import Report
from bnguard.swapping.api import swap

# Digits that are trained on; the other 597 validate.
_TRAINED = 1200


class Digits(NamedTuple):
    """Handwritten digits.

    Attributes:
        images: Shape ``(1797, 1, 8, 8)``, in [0, 1].
        labels: Shape ``(1797,)``.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Run:
    """A watched training.

    Attributes:
        model: The trained model.
        report: What bnguard reports at the end.
        accuracy: Accuracy in eval mode on the validation digits.
    """

    model: nn.Module
    report: Report
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A mistake that raises no error, and its repair.

    Attributes:
        sentence: The mistake.
        code: Code of the finding that names it.
        repair: The repair, as a user would write it.
        train: Trains with the mistake.
        accuracy_after: Applies the repair to that run, and returns the new accuracy.
    """

    sentence: str
    code: str
    repair: str
    train: Callable[[], Run]
    accuracy_after: Callable[[Run], float]


def load_digits() -> Digits:
    """Return the digits of scikit-learn in their order.

    Raises:
        ConfigurationError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigurationError(
            'the digits come with scikit-learn, which is not installed: pip install "bnguard[demo]"'
        ) from error
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return Digits(images, torch.tensor(digits.target))


@functools.cache
def _digits() -> Digits:
    """Return the digits in a random order, with mean 0 and deviation 1."""
    images, labels = load_digits()
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return Digits(images[order], labels[order])


def _network(momentum: float = 0.1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 8, 1), (8, 16, 2), (16, 32, 2)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs, momentum=momentum),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def _perceptron() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (64, 32):
        layers += [nn.Linear(inputs, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(32, 10))


def _shuffle(size: int) -> Sequence[Tensor]:
    """Return the indices of an epoch's batches."""
    return torch.split(torch.randperm(_TRAINED), size)


def _train(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    batches: Callable[[], Iterable[Tensor]] = lambda: _shuffle(32),
    loss: Callable[[Tensor], Tensor] | None = None,
    lr: float = 0.05,
) -> Run:
    """Train for three epochs on the first 1,200 images, and evaluate on the others after each.

    Args:
        model: Returns class scores.
        images: What the digits were turned into.
        batches: Returns the indices of an epoch's batches.
        loss: Returns the loss of a batch of indices; the cross-entropy by default.
        lr: Learning rate of SGD with momentum 0.9.
    """
    digits, labels = _digits()
    inputs = digits if images is None else images
    loss = loss or (lambda batch: F.cross_entropy(model(inputs[batch]), labels[batch]))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    accuracy = 0.0
    with warnings.catch_warnings():
        # Where GroupNorm was the repair, nothing is left to watch.
        warnings.filterwarnings("ignore", ".*nothing to watch")
        monitor = watch(
            model,
            optimizer=optimizer,
            every_n_steps=20,
            max_overhead=0.0,
            on_findings=lambda group: None,
        )
    with monitor:
        for _ in range(3):
            model.train()
            for batch in batches():
                optimizer.zero_grad()
                value = loss(batch)
                # Many loops skip such a step, so that the weights stay finite.
                if value.isfinite():
                    value.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            accuracy = _accuracy(model, inputs)
        return Run(model, monitor.report(), accuracy)


def _accuracy(model: nn.Module, images: Tensor) -> float:
    """Return the accuracy in eval mode on the images that are not trained on."""
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(part) for part in torch.split(images[_TRAINED:], 128)])
    return (scores.argmax(1) == _digits().labels[_TRAINED:]).double().mean().item()


def _recalibrate(run: Run, images: Tensor) -> float:
    """Recalibrate on the first 1,200 images and return the accuracy on the others."""
    recalibrate(run.model, torch.split(images[:_TRAINED], 128), progress=False)
    return _accuracy(run.model, images)


def _train_on_pairs(model: nn.Module) -> Run:
    return _train(model, batches=lambda: _shuffle(2)[:250], lr=0.01)


def _sort_by_class() -> Iterable[Tensor]:
    return torch.split(_digits().labels[:_TRAINED].argsort(stable=True), 32)


def _with_a_nan() -> Tensor:
    images = _digits().images.clone()
    images[7, 0, 3, 3] = torch.nan
    return images


def _finite() -> Iterable[Tensor]:
    """Return the batches that hold no NaN."""
    return (batch for batch in _shuffle(32) if _with_a_nan()[batch].isfinite().all())


class _FrozenBackbone(nn.Sequential):
    """A backbone that stays in eval mode, and a head."""

    def train(self, mode: bool = True) -> _FrozenBackbone:
        super().train(mode)
        self[0].eval()
        return self


def _train_second_head(kind: type[nn.Sequential]) -> Run:
    """Train a second head on another scanner's images, and measure the first head."""
    images = _digits().images
    network = _network()
    _train(network)
    backbone, first = network[:-1].requires_grad_(False), network[-1]
    run = _train(kind(backbone, nn.Linear(128, 10)), 1.0 - 0.4 * images.flip(-1))
    return Run(run.model, run.report, _accuracy(nn.Sequential(backbone, first), images))


def _train_two_domains(forward: Callable[[nn.Module, Tensor, Tensor], Iterable[Tensor]]) -> Run:
    """Train on labelled digits, and on unlabelled negatives for confident predictions."""
    images, labels = _digits()
    negatives = 2.0 - 2.0 * images
    model = _network()

    def loss(batch: Tensor) -> Tensor:
        scores, others = forward(
            model, images[batch], negatives[torch.randint(_TRAINED, batch.shape)]
        )
        confidence = others.softmax(1).square().sum(1).mean()
        return F.cross_entropy(scores, labels[batch]) - 0.1 * confidence

    return _train(model, loss=loss)


class _Sequences(nn.Module):
    """Classify sequences of shape ``(N, 9, L)``, whose last channel is 0 where they are padded."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((8, 16), (16, 32))
        self.convolutions = nn.ModuleList(nn.Conv1d(*size, 3, padding=1) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(outputs) for _, outputs in sizes)
        self.classifier = nn.Linear(32, 10)

    def forward(self, sequences: Tensor) -> Tensor:
        features, valid = sequences[:, :8], sequences[:, 8:]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            features = self.normalise(norm, convolution(features) * valid, valid).relu() * valid
        scores: Tensor = self.classifier(features.sum(2) / valid.sum(2))
        return scores

    def normalise(self, norm: nn.Module, features: Tensor, valid: Tensor) -> Tensor:
        normalised: Tensor = norm(features)
        return normalised


class _MaskedSequences(_Sequences):
    """The same, with statistics of the valid positions alone."""

    def normalise(self, norm: nn.Module, features: Tensor, valid: Tensor) -> Tensor:
        positions = valid.squeeze(1).bool()
        normalised = features.transpose(1, 2).clone()
        normalised[positions] = norm(normalised[positions])
        return normalised.transpose(1, 2)


def _train_on_padded(model: nn.Module) -> Run:
    """Train on sequences of 128 columns, of which nine in ten hold 8 columns and padding."""
    images = _digits().images.squeeze(1).repeat(1, 1, 16)
    generator = torch.Generator().manual_seed(0)
    is_long = torch.rand(len(images), 1, 1, generator=generator) < 0.1
    valid = (is_long | (torch.arange(128) < 8)).float()
    sequences = torch.cat([images * valid, valid], 1)
    return _train(model, sequences, batches=lambda: _shuffle(8))


def _brighter_camera() -> Tensor:
    return _digits().images + 1.5


def _train_for_brighter_camera() -> Run:
    images = torch.cat([_digits().images[:_TRAINED], _brighter_camera()[_TRAINED:]])
    return _train(_network(), images)


def find_fault(name: str) -> Fault:
    """Return the fault of a name.

    Raises:
        ConfigurationError: There is none; the message has the nearest name.
    """
    if name not in FAULTS:
        near = nearest_name(name, FAULTS)
        hint = f"did you mean {near!r}?" if near else "'bnguard demo --list' shows all"
        raise ConfigurationError(f"there is no fault {name!r}: {hint}")
    return FAULTS[name]


FAULTS: Mapping[str, Fault] = {
    "tiny-batches": Fault(
        sentence="Train with two images a batch",
        code="BN201",
        repair='bnguard.swap(model, to="group") before the training',
        train=lambda: _train_on_pairs(_perceptron()),
        accuracy_after=lambda run: _train_on_pairs(swap(_perceptron(), "group").model).accuracy,
    ),
    "slow-momentum": Fault(
        sentence="Take over TensorFlow's decay of 0.999 as a momentum of 0.001",
        code="BN303",
        repair="bnguard.recalibrate(model, train_loader)",
        train=lambda: _train(_network(momentum=0.001), batches=lambda: _shuffle(64), lr=0.01),
        accuracy_after=lambda run: _recalibrate(run, _digits().images),
    ),
    "frozen-backbone": Fault(
        sentence="Freeze a backbone by requires_grad alone, and train a second head for it",
        code="BN101",
        repair="backbone.eval() after every model.train()",
        train=lambda: _train_second_head(nn.Sequential),
        accuracy_after=lambda run: _train_second_head(_FrozenBackbone).accuracy,
    ),
    "nan-batch": Fault(
        sentence="Leave a NaN in one of 1,200 images, and skip steps whose loss is NaN",
        code="BN401",
        repair="if not images.isfinite().all(): continue",
        train=lambda: _train(_network(), _with_a_nan()),
        accuracy_after=lambda run: _train(_network(), _with_a_nan(), batches=_finite).accuracy,
    ),
    "sorted-data": Fault(
        sentence="Train on images sorted by class",
        code="BN203",
        repair="DataLoader(..., shuffle=True)",
        train=lambda: _train(_network(), batches=_sort_by_class),
        accuracy_after=lambda run: _train(_network()).accuracy,
    ),
    "two-streams": Fault(
        sentence="Call one network with digits, then with their negatives, in each step",
        code="BN207",
        repair="model(torch.cat([digits, negatives])).chunk(2)",
        train=lambda: _train_two_domains(lambda model, *streams: map(model, streams)),
        accuracy_after=lambda run: (
            _train_two_domains(lambda model, *streams: model(torch.cat(streams)).chunk(2)).accuracy
        ),
    ),
    "padding": Fault(
        sentence="Pad nine of ten sequences from 8 columns to 128, in batches of 8",
        code="BN211",
        repair="features[valid] = batch_norm(features[valid])",
        train=lambda: _train_on_padded(_Sequences()),
        accuracy_after=lambda run: _train_on_padded(_MaskedSequences()).accuracy,
    ),
    "domain-shift": Fault(
        sentence="Evaluate on the images of a brighter camera",
        code="BN305",
        repair="bnguard.recalibrate(model, images_of_the_brighter_camera)",
        train=_train_for_brighter_camera,
        accuracy_after=lambda run: _recalibrate(run, _brighter_camera()),
    ),
}
