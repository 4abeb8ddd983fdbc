"""The mode gap: how far the two modes disagree on the same batch, everything else in eval mode.

The smallest module that holds all BN layers and is called during evaluation is run again on a
batch that it was called with: once with running statistics, once with those of the batch. The same
is done with the largest, where it is another and gives what looks like class scores, to count the
predictions that change. No user step function is called, and no label is needed. Forward hooks of
the user's do run again: pruning, weight normalisation and offloading work through them, so that
without them it would be another model that is measured.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from bnguard.distributed import number_of_ranks
from bnguard.layers.bn_layer import BatchNormLayer, as_written, is_wrapper
from bnguard.layers.moments import wide
from bnguard.layers.preserve import (
    preserve_buffers,
    preserve_modes,
    preserve_random_states,
    preserve_statistics,
)
from bnguard.observe.history import ModeGap
from bnguard.observe.hooks import Hooks

_IS_TRAINING = operator.attrgetter("is_training")

# What a captured batch may take, in bytes; a larger one is not kept, and the gap not measured. Two
# are kept at most: what the smallest module was called with, and what the largest was.
MAX_CAPTURED_BYTES = 128 * 2**20

# Samples up to which batches of an evaluation are put together: statistics of fewer are noise.
_ENOUGH_SAMPLES = 32

# Difference of the probabilities of two classes up to which they tie.
_MAX_TIE = 0.05


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a module during evaluation, and the settings that it ran under.

    ``depth`` is larger the deeper the module lies in the model.
    """

    depth: int
    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    device: str
    is_autocast: bool
    autocast_dtype: torch.dtype
    is_inference: bool

    @property
    def samples(self) -> int:
        """The size that the first dimension of the inputs shares; 0 where it does not."""
        sizes = {len(tensor) for tensor in _tensors((self.args, self.kwargs)) if tensor.dim()}
        return sizes.pop() if len(sizes) == 1 else 0

    def outputs(self, samples: int | None = None) -> list[Tensor]:
        """Return the floating-point tensors that the module gives, for the first samples or all."""
        inputs = (self.args, self.kwargs)
        if samples is not None:
            inputs = tree_map(
                lambda leaf: leaf[:samples] if isinstance(leaf, Tensor) and leaf.dim() else leaf,
                inputs,
            )
        args, kwargs = inputs
        mode = torch.inference_mode() if self.is_inference else torch.no_grad()
        with mode, torch.autocast(self.device, self.autocast_dtype, enabled=self.is_autocast):
            outputs = self.module(*args, **kwargs)
        return [tensor for tensor in _tensors(outputs) if tensor.is_floating_point()]


class GapProbe:
    """Keeps one batch of an evaluation, and measures the mode gap on it.

    Args:
        model: The model.
        layers: Its BN layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[BatchNormLayer]) -> None:
        self.hooks = Hooks()
        self._model = model
        self._layers = [layer for layer in layers if layer.is_tracking and layer.has_modes]
        means = [layer.running_mean for layer in self._layers]
        self._device = "cpu" if not means or means[0] is None else means[0].device.type
        self._smallest: _Call | None = None
        self._largest: _Call | None = None
        self._reason = (
            "training called every BN layer in eval mode, as evaluation does"
            if not self._layers
            else "no module that holds all BN layers was seen in eval mode (where the model runs "
            "under torch.compile, watch what torch.compile returned)"
        )
        for depth, module in enumerate(_holders(model, self._layers)):
            keep = self._keeper(depth, _without_compilation(module))
            self.hooks.before(module, keep, with_kwargs=True)

    def close(self) -> None:
        """Take the hooks off and let the batch go."""
        self.hooks.close()
        self._smallest = self._largest = None

    def measure(self) -> ModeGap | str:
        """Return the mode gap on the batch kept, or why it could not be measured."""
        if self._smallest is None or self._largest is None:
            return self._reason
        if _is_spread_over_ranks(self._layers):
            return "the batch of a SyncBatchNorm is spread over the ranks"
        try:
            with (
                as_written(),
                preserve_modes(self._model),
                preserve_random_states(self._model),
                preserve_buffers(self._model),
                preserve_statistics(self._layers),
            ):
                return _measured(self._smallest, self._largest, self._layers)
        except Exception as error:
            return f"the batch could not be run again: {type(error).__name__}: {error}"

    def _keeper(self, depth: int, module: nn.Module) -> Callable[..., None]:
        def keep(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            is_smallest = self._smallest is None or depth > self._smallest.depth
            is_largest = self._largest is None or depth < self._largest.depth
            kept = [
                call
                for call in (self._smallest, self._largest)
                if call is not None and call.depth == depth
            ]
            is_small = any(0 < call.samples < _ENOUGH_SAMPLES for call in kept)
            if not (is_smallest or is_largest or is_small) or any(map(_IS_TRAINING, self._layers)):
                return
            size = sum(tensor.nbytes for tensor in _tensors((args, kwargs)))
            if size > MAX_CAPTURED_BYTES:
                self._reason = f"a batch of {size / 2**20:.0f} MiB is too large to keep"
                return
            call = _kept(depth, module, args, kwargs, self._device)
            if is_small:
                call = _together(kept[0], call)
                is_smallest, is_largest = (
                    kept[0] is own for own in (self._smallest, self._largest)
                )
            self._smallest = call if is_smallest else self._smallest
            self._largest = call if is_largest else self._largest

        return keep


def _kept(
    depth: int,
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    device: str,
) -> _Call:
    # Copies, because a forward may write to its input.
    args, kwargs = tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs)
    )
    return _Call(
        depth=depth,
        module=module,
        args=args,
        kwargs=kwargs,
        device=device,
        is_autocast=torch.is_autocast_enabled(device),
        autocast_dtype=torch.get_autocast_dtype(device),
        is_inference=torch.is_inference_mode_enabled(),
    )


def _together(first: _Call, second: _Call) -> _Call:
    """Return one call for the samples of both; the first where their inputs do not fit together."""
    samples = first.samples, second.samples

    def joined(one: object, other: object) -> object:
        if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.dim()):
            return one
        return torch.cat([one, other])

    if 0 in samples or (first.is_inference != second.is_inference):
        return first
    try:
        args, kwargs = tree_map(joined, (first.args, first.kwargs), (second.args, second.kwargs))
    except (RuntimeError, ValueError):
        return first
    return replace(first, args=args, kwargs=kwargs)


def _holders(model: nn.Module, layers: Sequence[BatchNormLayer]) -> Iterator[nn.Module]:
    """Yield the modules that hold all the layers, the model first, deeper ones later.

    Wrappers are left out, but for compiled modules: what these hold is called where no hook sees.
    """
    inside = {id(layer.module) for layer in layers}
    if not inside:
        return
    for module in model.modules():
        held = {id(child) for child in module.modules() if child is not module}
        is_compiled = _without_compilation(module) is not module
        if inside <= held and (is_compiled or not is_wrapper(module)):
            yield module


def _without_compilation(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def _is_spread_over_ranks(layers: Sequence[BatchNormLayer]) -> bool:
    is_synchronised = any(isinstance(layer.module, nn.SyncBatchNorm) for layer in layers)
    return is_synchronised and number_of_ranks() > 1


def _measured(smallest: _Call, largest: _Call, layers: Sequence[BatchNormLayer]) -> ModeGap:
    samples = smallest.samples
    running = smallest.outputs()
    scores_running = running if largest is smallest else largest.outputs()
    for layer in layers:
        layer.module.training = True
    batch = smallest.outputs()
    scores_batch = batch if largest is smallest else largest.outputs()
    sampling = None
    if samples >= 4:
        # Statistics of half a batch are as far from those of the whole as these are from the truth.
        half = samples // 2
        sampling = _relative_change(smallest.outputs(half), [part[:half] for part in batch])
    return ModeGap(
        samples=samples,
        relative_change=_relative_change(running, batch),
        sampling_change=sampling,
        flipped_share=_flipped_share(scores_running, scores_batch),
    )


def _relative_change(outputs: list[Tensor], reference: list[Tensor]) -> float:
    """Return the root mean square of the change, in standard deviations of each reference."""
    ratios = []
    for output, expected in zip(outputs, reference, strict=True):
        expected, output = wide(expected), wide(output)
        variance = (
            (expected - expected.mean(0, keepdim=True)).square().mean() if expected.dim() else 0.0
        )
        if variance > 0.0:
            ratios.append(((output - expected).square().mean() / variance).item())
    if not ratios:
        return 0.0
    change = math.sqrt(sum(ratios) / len(ratios))
    return change if math.isfinite(change) else math.inf


def _flipped_share(outputs: list[Tensor], reference: list[Tensor]) -> float | None:
    """Return the share of predictions that change, where an output looks like class scores.

    Where both modes find the two classes about as probable, to change between them is no harm: a
    network that has hardly learnt decides by next to nothing.
    """
    for output, expected in zip(outputs, reference, strict=True):
        if output.dim() == 2 and output.shape[1] > 1:
            classes = output.argmax(1, keepdim=True), expected.argmax(1, keepdim=True)
            margins = [
                (p.gather(1, classes[0]) - p.gather(1, classes[1])).abs()
                for p in map(_probabilities, (output, expected))
            ]
            # Negated, so that predictions that are not finite count.
            return (~(torch.maximum(*margins) <= _MAX_TIE)).float().mean().item()
    return None


def _probabilities(scores: Tensor) -> Tensor:
    """Return class probabilities: the scores themselves, where they are, or else their softmax."""
    scores = wide(scores)
    are_probabilities = (scores >= 0.0).all() and (scores.sum(1) - 1.0).abs().max() < 1e-2
    return scores if are_probabilities else scores.softmax(1)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
