"""Real training runs on scikit-learn's handwritten digits, logged for the BatchNorm tab.

The numbers are read by hooks of this file's own, and held against the limits of the metrics, so
that the tab is tested apart from the monitor. ``python -m tests.tensorboard.digits LOGDIR`` writes
them all.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from bnguard.tensorboard.metadata import standard_metrics
from bnguard.tensorboard.writer import BatchNormLog, ChannelSnapshot

METRICS = standard_metrics()


class Block(nn.Module):
    def __init__(self, inputs, outputs, momentum):
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs, momentum=momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, momentum=momentum)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs, momentum=momentum),
            )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class SmallResNet(nn.Module):
    """A ResNet for 8x8 images, with 21 BN layers."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(12, momentum=momentum)
        widths = [12, 12, 12, 24, 24, 24, 48, 48, 48]
        blocks = [Block(a, b, momentum) for a, b in itertools.pairwise([12, *widths])]
        self.layer1 = nn.Sequential(*blocks[:3])
        self.layer2 = nn.Sequential(*blocks[3:6])
        self.layer3 = nn.Sequential(*blocks[6:])
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.head(x.mean((2, 3)))


@dataclass
class Probe:
    """What a hook read of one layer."""

    module: nn.BatchNorm2d
    count: int = 0
    batch: tuple[Tensor, Tensor] | None = None
    evaluation: list[Tensor] = field(default_factory=list)
    eval_moments: tuple[Tensor, Tensor] | None = None
    running_in_eval: tuple[Tensor, Tensor] | None = None

    def __call__(self, module, inputs):
        values = inputs[0].detach().transpose(0, 1).flatten(1)
        if module.training:
            self.count = values.shape[1]
            self.batch = (values.mean(1), values.var(1))
        else:
            self.evaluation.append(values)

    def end_evaluation(self):
        values = torch.cat(self.evaluation, 1)
        self.evaluation.clear()
        self.eval_moments = (values.mean(1), values.var(1))
        self.running_in_eval = (self.module.running_mean.clone(), self.module.running_var.clone())

    def eval_shift(self):
        mean, var = self.running_in_eval
        return (self.eval_moments[0] - mean) / (var + self.module.eps).sqrt()

    def numbers(self):
        module = self.module
        mean, var = module.running_mean, module.running_var
        numbers = dict.fromkeys((metric.key for metric in METRICS), float("nan"))
        batch_mean, batch_var = self.batch
        numbers |= {
            "batch_shift_std": _quantile(((batch_mean - mean) / (var + module.eps).sqrt()).abs()),
            "batch_log_variance_ratio": _signed(batch_var, var, module.eps),
            "values_per_channel": self.count,
            "gain": (module.weight.abs() / (var + module.eps).sqrt()).max().item(),
            "dead_channel_share": (var <= module.eps).float().mean().item(),
            "variance_kept": (batch_var / (batch_var + (batch_mean - mean) ** 2)).median().item(),
            "batch_mean": batch_mean.mean().item(),
            "running_mean": mean.mean().item(),
            "batch_std": batch_var.sqrt().mean().item(),
            "running_std": var.sqrt().mean().item(),
        }
        if self.eval_moments is not None:
            eval_var = self.eval_moments[1]
            numbers["eval_shift_std"] = _quantile(self.eval_shift().abs())
            var = self.running_in_eval[1]
            numbers["eval_log_variance_ratio"] = _signed(eval_var, var, module.eps)
        return [numbers[metric.key] for metric in METRICS]

    def snapshot(self):
        arrays = {
            "running_mean": self.module.running_mean,
            "running_var": self.module.running_var,
            "batch_mean": self.batch[0],
            "batch_var": self.batch[1],
            "gamma": self.module.weight,
            "beta": self.module.bias,
        }
        if self.eval_moments is not None:
            arrays["eval_mean"], arrays["eval_var"] = self.eval_moments
        plain = {name: array.detach().double().numpy() for name, array in arrays.items()}
        return ChannelSnapshot(eps=self.module.eps, **plain)


def drift(layer: str, probe: Probe, step: int) -> dict[str, object] | None:
    """Return a finding as BN301 would have it, in the worse of its two measures."""
    numbers = dict(zip((metric.key for metric in METRICS), probe.numbers(), strict=True))
    limits = {metric.key: metric for metric in METRICS}
    keys = ("eval_shift_std", "eval_log_variance_ratio")
    worst = max(keys, key=lambda key: abs(numbers[key]) / limits[key].limit)
    value, metric = abs(numbers[worst]), limits[worst]
    if value <= metric.limit:
        return None
    return {
        "code": "BN301",
        "name": "statistic-drift",
        "severity": "warning",
        "layer": layer,
        "step": step,
        "channels": [int(probe.eval_shift().abs().argmax())],
        "message": "inputs in eval mode do not match the running statistics",
        "evidence": {
            "measure": metric.name,
            "value": value,
            "limit": metric.limit,
            "unit": metric.unit,
        },
        "fix": {
            "summary": "recalibrate the running statistics",
            "command": "bnguard recalibrate last.ckpt --config config.yaml",
        },
    }


def _quantile(values: Tensor) -> float:
    return torch.quantile(values, 0.9).item()


def _signed(var: Tensor, running_var: Tensor, eps: float) -> float:
    ratios = torch.log((var + eps) / (running_var + eps))
    return ratios[ratios.abs().argsort()[int(0.9 * (len(ratios) - 1))]].item()


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return images, torch.from_numpy(data.target)


def train(folder: Path, *, momentum=0.1, batch_size=32, steps=300, every=2, darker=False) -> None:
    """Train a network and log it; `darker` dims what is evaluated on, from half-way on."""
    torch.manual_seed(0)
    images, labels = digits()
    model = SmallResNet(momentum)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    probes = {
        name: Probe(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    hooks = [probe.module.register_forward_pre_hook(probe) for probe in probes.values()]
    writer = SummaryWriter(folder)
    log = BatchNormLog(writer, list(probes), METRICS, ["BatchNorm2d"] * len(probes))
    findings: dict[str, dict[str, object]] = {}
    for step, batch in enumerate(_batches(batch_size, steps), 1):
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            model.eval()
            factor = 0.4 if darker and step > steps // 2 else 1.0
            with torch.no_grad():
                scores = model(factor * images[-360:])
            for probe in probes.values():
                probe.end_evaluation()
            accuracy = (scores.argmax(1) == labels[-360:]).float().mean().item()
            writer.add_scalar("accuracy/val", accuracy, step)
            for name, probe in probes.items():
                if (found := drift(name, probe, step)) is not None:
                    findings.setdefault(name, found)
                log.add_channels(name, probe.snapshot(), step)
            log.add_findings(findings.values(), step)
        if step % every == 0:
            writer.add_scalar("loss/train", loss.item(), step)
            rows = np.array([probe.numbers() for probe in probes.values()]).T
            log.add_stats(rows, step)
    for hook in hooks:
        hook.remove()
    writer.close()


def _batches(size: int, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        yield torch.randint(0, 1437, (size,))


def write_all(folder: Path, steps: int = 400) -> None:
    """Write the runs that the screenshots show."""
    train(folder / "slow-momentum", momentum=0.004, steps=steps)
    train(folder / "healthy", steps=steps)
    train(folder / "darker-validation", steps=steps, darker=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_all(Path(sys.argv[1]))
