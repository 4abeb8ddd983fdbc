"""BN207 several-streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import LOGARITHM, Evidence, Finding, Fix, Severity, Skipped
from bnguard.layers.distances import FloatArray
from bnguard.observe.history import LayerHistory, Stream
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class SeveralStreams(Rule):
    """One layer is called several times per forward, with data of different distributions.

    Why it matters:
        In training each call is normalised with its own statistics. The running statistics are a
        mixture that fits none of them, so in eval mode every stream is shifted and scaled. Two
        domains, clean and adversarial images, or photographs and sketches in one shared encoder do
        this.

    What you see:
        Training looks good on all streams; in eval mode all of them get worse, although each alone
        is easy.

    Example:
        A shared encoder for two domains::

            # Fault: two calls, two sets of statistics, but only one in eval mode
            first, second = encoder(a), encoder(b)
            # Fix: both modes see the mixture
            first, second = encoder(torch.cat([a, b])).chunk(2)

    Fix:
        Concatenate the streams, or give each its own BN layers. Concatenating changes training, so
        train on. Recalibration cannot help: one set of statistics cannot fit two streams.

    What it does not mean:
        Siamese calls with the same distribution are fine. Calls under ``torch.no_grad`` are not
        streams (BN206). It is ``info`` for a critic that nobody calls in eval mode. A harmless mode
        gap (BN302) does not disprove it: it does not show what the other stream suffers.

    Evidence:
        The distance of the streams' average means in standard deviations, and the logarithm of the
        ratio of their variances; the upper decile over channels, for the two streams that are
        furthest apart, each minus two standard errors (from how the batches of a stream differ).

    Limits:
        max_distance_std: 1. Healthy runs of the zoo, siamese ones and accumulation among them, stay
            below 0.03.
        max_log_variance_ratio: 1, a factor of 2.7; a digit and its negative have 2.3.
        min_batches: 8 batches of each stream before it is compared.

    References:
        Xie et al., "Adversarial Examples Improve Image Recognition" (2020),
            arXiv:1911.09665.
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 5, arXiv:2105.07576.
        adapt-python/adapt#92 and scikit-adaptation/skada#252, source and target in separate calls.
        keras-team/keras#11927, one encoder for several inputs; pytorch/pytorch#1738, a block called
            in a loop.
    """

    code: ClassVar[str] = "BN207"
    name: ClassVar[str] = "several-streams"
    explains: ClassVar[tuple[str, ...]] = ("BN203", "BN301", "BN302", "BN305")

    max_distance_std: float = 1.0
    max_log_variance_ratio: float = 1.0
    min_batches: int = 8

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare the streams, two at a time."""
        if len(layer.streams) < 2:
            return
        streams = tuple(stream for stream in layer.streams if stream.batches >= self.min_batches)
        if len(streams) < 2:
            yield self.skip(layer, f"fewer than {self.min_batches} batches of each stream")
            return
        is_critic = layer.run.is_adversarial and not layer.calls.is_in_eval_mode
        distance, ratio = distances(streams)
        by_mean = Evidence("distance of the streams", distance, self.max_distance_std, "σ")
        by_var = Evidence(
            "variance of the streams off by", ratio, self.max_log_variance_ratio, LOGARITHM
        )
        worst = max(by_mean, by_var, key=lambda evidence: evidence.value / evidence.limit)
        if worst.value <= worst.limit:
            return
        yield self.make_finding(
            layer,
            Severity.INFO if is_critic else Severity.WARNING,
            f"{len(streams)} streams with different statistics share the layer: its running "
            "statistics fit none of them",
            worst,
            Fix("concatenate the streams before the layer, or give each its own BN layers"),
        )


def distances(streams: tuple[Stream, ...]) -> tuple[float, float]:
    """Return the largest distance of means, in σ, and |log variance ratio| between streams."""
    pairs = [(a, b) for index, a in enumerate(streams) for b in streams[index + 1 :]]
    with np.errstate(all="ignore"):
        means = [_upper(_mean_distance(a, b)) for a, b in pairs]
        ratios = [_upper(_log_ratio(a, b)) for a, b in pairs]
    return max(means), max(ratios)


# Standard errors that chance explains.
_BY_CHANCE = 2.0


def _mean_distance(a: Stream, b: Stream) -> FloatArray:
    by_chance = _BY_CHANCE * np.hypot(a.mean_error, b.mean_error)
    rest = np.maximum(np.abs(a.mean - b.mean) - by_chance, 0.0)
    return np.asarray(rest / np.sqrt(_pool(a, b)))


def _log_ratio(a: Stream, b: Stream) -> FloatArray:
    by_chance = _BY_CHANCE * np.hypot(a.var_error / a.var_unbiased, b.var_error / b.var_unbiased)
    ratio = np.abs(np.log(a.var_unbiased / b.var_unbiased))
    return np.asarray(np.where(np.isfinite(by_chance), np.maximum(ratio - by_chance, 0.0), ratio))


def _pool(a: Stream, b: Stream) -> FloatArray:
    return np.asarray((a.var_unbiased + b.var_unbiased) / 2)


def _upper(values: FloatArray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, 0.9)) if finite.size else 0.0
