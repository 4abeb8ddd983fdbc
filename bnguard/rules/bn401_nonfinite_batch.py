"""BN401 non-finite-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import BadValueOrigin, History, LayerHistory
from bnguard.rules.base import ModelRule


@dataclass(frozen=True, kw_only=True)
class NonFiniteBatch(ModelRule):
    """A NaN or Inf passed through the network, and this is where it began.

    Why it matters:
        The loss shows it many layers and steps later. Whether the data, the weights of one layer or
        an overflow made it decides what to repair, and the first layer that saw it shows that.

    What you see:
        The loss is NaN from some step on, or for one step with a gradient scaler; or validation is
        NaN although training goes on (BN402).

    Example:
        Features with a logarithm::

            # Fault: log(0) is -Inf
            features = torch.log(batch.clamp(min=0.0))
            # Fix: keep it finite, and check once
            features = torch.log(batch.clamp(min=1e-6))
            assert torch.isfinite(features).all()

    Fix:
        Check what comes before the layer named, or the data if it is the first. An overflow in
        float16 needs a smaller learning rate, or bfloat16. Until then, ``bnguard.watch(model,
        restore_poisoned=True)`` keeps the statistics clean.

    What it does not mean:
        A few bad batches do not ruin a run if they are skipped and the statistics are restored. A
        gradient that is not finite, with finite activations, is not seen here: use
        ``torch.autograd.set_detect_anomaly``.

    Evidence:
        The first layer, in the order of the forward, whose statistics were not finite, in the first
        step in which one was; whether the model's input of that step was finite; and, if a bad
        batch came again, the module that turned finite input into NaN or Inf. In evaluation, the
        batches that contained NaN or Inf.

    Limits:
        max_bad_batches: 0.
        max_normalised_std: 100, as in BN403: if an earlier layer enlarged a value that much, Inf is
            the end of that.

    References:
        pytorch/pytorch#88474, "Mixed precision training fails due to NaN in batch norm
            running_mean".
        Micikevicius et al., "Mixed Precision Training" (2018), section 3.2, arXiv:1710.03740.
    """

    code: ClassVar[str] = "BN401"
    name: ClassVar[str] = "non-finite-batch"
    explains: ClassVar[tuple[str, ...]] = ("BN201", "BN204", "BN402", "BN302")

    max_bad_batches: int = 0
    max_normalised_std: float = 100.0

    def has_done_harm(self, layer: LayerHistory) -> bool:
        """Return whether an evaluation contained NaN or Inf."""
        seen = layer.evaluated
        return seen is None or seen.nonfinite_batches > 0 or bool(seen.running.bad_channels)

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Find the first layer in the first bad step."""
        layers = history.layers_in_order
        poisoned = [layer for layer in layers if layer.poisoned_step is not None]
        if poisoned:
            first = min(poisoned, key=lambda layer: layer.poisoned_step or 0)
            yield self._describe_training(first, layers)
            return
        for layer in layers:
            if layer.evaluated is not None and (
                layer.evaluated.nonfinite_batches > self.max_bad_batches
            ):
                yield self._describe_evaluation(layer, layers, layer.evaluated.nonfinite_batches)
                return

    def _describe_training(self, layer: LayerHistory, layers: tuple[LayerHistory, ...]) -> Finding:
        where, fix = _origin(layer, layers)
        is_alive = all(other.has_finite_affine for other in layers)
        if layer.run.bad_input_step == layer.poisoned_step:
            # Weights that are not finite later became so in this batch.
            where, fix = _IN_THE_DATA if is_alive else _IN_THE_DATA_AND_LEARNT
        elif layer.run.origin is not None and not _is_aftermath(layer, layers):
            where, fix = _describe_origin(layer.run.origin, is_first=layer is layers[0])
        elif not is_alive:
            where = f"{where}; the weights are not finite now"
            fix = Fix(f"go back to a checkpoint whose weights are finite, and {fix.summary}")
        if is_alive and any(other.running and other.running.bad_channels for other in layers):
            fix = Fix(f"{fix.summary}; then recalibrate the running statistics", "recalibrate")
        return self.make_finding(
            layer,
            Severity.ERROR,
            f"a training batch contained NaN or Inf, first at this layer: {where}",
            Evidence("batches not finite", 1, self.max_bad_batches),
            fix,
            channels=() if layer.running is None else layer.running.bad_channels,
            step=layer.poisoned_step,
        )

    def _describe_evaluation(
        self, layer: LayerHistory, layers: tuple[LayerHistory, ...], batches: int
    ) -> Finding:
        where, fix = _origin(layer, layers)
        finding = self.make_finding(
            layer,
            Severity.ERROR,
            f"evaluation batches contain NaN or Inf, first at this layer: {where}",
            Evidence("batches not finite", batches, self.max_bad_batches),
            fix,
            step=None if layer.evaluated is None else layer.evaluated.step,
        )
        # Finite values that each layer enlarges end as Inf.
        before = layers[: layers.index(layer)]
        is_amplified = any(
            one.evaluated is not None
            and one.evaluated.largest_normalised_std > self.max_normalised_std
            for one in before
        )
        return dataclasses.replace(finding, cause="BN403") if is_amplified else finding


_IN_THE_DATA = (
    "the model's input already did",
    Fix("check the data for NaN and Inf, and skip the batches that contain one"),
)
_IN_THE_DATA_AND_LEARNT = (
    "the model's input already did; the weights are not finite since",
    Fix("go back to a checkpoint whose weights are finite, and skip batches with NaN or Inf"),
)


_MAKERS = "an overflow, a division, a logarithm, or weights that diverged (lower the learning rate)"


def _is_aftermath(layer: LayerHistory, layers: tuple[LayerHistory, ...]) -> bool:
    """Return whether the first bad batch made the weights not finite, instead of being their work.

    The weights were finite in that batch if layers before the first bad one were finite then, and
    not later.
    """
    origin, before = layer.run.origin, layers[: layers.index(layer)]
    is_in_weights = origin is not None and bool(origin.bad_parameters)
    return is_in_weights and any(other.poisoned_step is not None for other in before)


def _origin(layer: LayerHistory, layers: tuple[LayerHistory, ...]) -> tuple[str, Fix]:
    index = layers.index(layer)
    if index == 0:
        return (
            "it is the first BN layer, so it came from the data or the layers before",
            Fix("check the batch of that step for NaN and Inf, then the layers before the first"),
        )
    before = layers[index - 1].name
    return (
        f"it began after {before or 'the layer before'}, which was finite",
        Fix(f"check what is between {before} and {layer.name}: {_MAKERS}"),
    )


def _describe_origin(origin: BadValueOrigin, *, is_first: bool) -> tuple[str, Fix]:
    place = f"{origin.module or 'the model'} ({origin.kind})"
    if origin.bad_parameters:
        names = ", ".join(origin.bad_parameters)
        return (
            f"{place} has parameters that are not finite: {names}",
            Fix("go back to a checkpoint whose weights are finite; lower the learning rate"),
        )
    if origin.is_input_bad and is_first:
        return (
            f"the input of {place} already did: from the data, or from the forward before it",
            Fix(f"check the data for NaN and Inf, then what the forward computes before {place}"),
        )
    if origin.is_input_bad:
        return (
            f"the input of {place} already did, and no module before made it: the forward did, in "
            "between",
            Fix(f"check what the forward computes before {place}: {_MAKERS}"),
        )
    of = f"input{_up_to(origin.largest_input)}"
    if origin.largest_parameter is not None:
        of += f" and parameters{_up_to(origin.largest_parameter)}"
    return f"{place} made it from finite {of}", Fix(f"check {place}: {_MAKERS}")


def _up_to(largest: float | None) -> str:
    return "" if largest is None else f" up to {largest:.2g}"
