"""Measures the mode gap of a model that is watched, on batches of its own.

The smallest module that holds all BN layers and is called in evaluation runs again on rows of its
first batches, once in each mode, and so does the largest, for the flips. One batch alone may hold a
single class, or only the real images of a GAN. This needs no label and no step function of the
user. Forward hooks of the user do run again, because pruning, weight normalisation and offloading
work through them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from bnguard.distributed import number_of_ranks
from bnguard.layers.bn_layer import BatchNormLayer, is_wrapper, run_uncompiled
from bnguard.layers.preserve import (
    preserve_buffers,
    preserve_modes,
    preserve_random_states,
    preserve_statistics,
)
from bnguard.observe.history import ModeGap
from bnguard.observe.hooks import Hooks, pause_hooks
from bnguard.observe.mode_gap import flipped_share, float_tensors, places_of_rows, relative_change

# Largest batch that is kept, in bytes, of the smallest and the largest module each; rows of later
# batches make as much again.
MAX_CAPTURED_BYTES = 128 * 2**20
# The same for batches of training, which are kept from one evaluation to the next.
_MAX_TRAINING_BYTES = 32 * 2**20

# Samples up to which batches of an evaluation are joined: statistics of fewer are noise.
_ENOUGH_SAMPLES = 32

# The fractions of its multiples spread evenly.
_GOLDEN_RATIO = 0.618

# Batches of an evaluation that are mixed: the first alone may hold one class or kind of data.
_MIXED_BATCHES = 4

# Fewer samples are not halved into batches with statistics of their own.
_MIN_SAMPLES_TO_HALVE = 4

# Change of the outputs in eval mode, without the rest of the batch, up to which rows are samples.
_MAX_DEPENDENCE = 0.01


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a module during evaluation, and the settings that it ran under.

    Attributes:
        first: The call with the first batch, if several were joined.
    """

    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    device: str
    is_autocast: bool
    autocast_dtype: torch.dtype
    is_inference: bool
    first: _Call | None = None

    @property
    def rows(self) -> int:
        """The size that the first dimension of all inputs shares; 0 if they differ.

        0 with a sparse input too, of which rows cannot be taken.
        """
        tensors = [tensor for tensor in _tensors((self.args, self.kwargs)) if tensor.dim()]
        sizes = {len(tensor) for tensor in tensors}
        are_dense = all(tensor.layout is torch.strided for tensor in tensors)
        return sizes.pop() if len(sizes) == 1 and are_dense else 0

    def outputs(self) -> list[Tensor]:
        """Run the module on a copy of the inputs and return its floating-point tensors."""
        args, kwargs = _copy((self.args, self.kwargs))
        mode = torch.inference_mode() if self.is_inference else torch.no_grad()
        with mode, torch.autocast(self.device, self.autocast_dtype, enabled=self.is_autocast):
            return list(float_tensors(self.module(*args, **kwargs)))

    def part(self, rows: slice | list[int]) -> _Call:
        """Return the call for some of its rows."""
        args, kwargs = tree_map(
            lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() else leaf,
            (self.args, self.kwargs),
        )
        return dataclasses.replace(self, args=args, kwargs=kwargs, first=None)

    def spread_part(self, count: int) -> _Call:
        """Return the call for that many of its rows, one from each stretch, or for all.

        Rows may be in some order, or of domains that take turns: no period is followed.
        """
        count = min(count, self.rows)
        stretch = self.rows / max(count, 1)
        return self.part([int((i + i * _GOLDEN_RATIO % 1.0) * stretch) for i in range(count)])

    def join(self, other: _Call) -> _Call:
        """Return one call for the rows of both; this one if their inputs do not fit together."""
        if not other.rows or self.is_inference != other.is_inference:
            return self
        try:
            args, kwargs = tree_map(_join, (self.args, self.kwargs), (other.args, other.kwargs))
        except (RuntimeError, ValueError):
            return self
        return dataclasses.replace(self, args=args, kwargs=kwargs)


def _mix(calls: Sequence[_Call]) -> _Call:
    """Return one call with rows of all; as many as the first call has, if those are enough."""
    first, *others = calls
    if not others:
        return first
    share = first.rows if first.rows < _ENOUGH_SAMPLES else first.rows // len(calls)
    start = mixed = first.spread_part(share)
    for other in others:
        mixed = mixed.join(other.spread_part(share))
    return first if mixed is start else dataclasses.replace(mixed, first=first)


class GapProbe:
    """Keeps rows of the first batches in a mode, and measures the mode gap on them.

    Args:
        model: The model.
        layers: Its BN layers.
        is_training: Whether the batches are those of training: with some of the layers in train
            mode.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[BatchNormLayer],
        *,
        is_training: bool = False,
    ) -> None:
        self.hooks = Hooks()
        self._is_training = is_training
        self._model = model
        self._layers = [layer for layer in layers if layer.is_tracking and layer.has_modes]
        means = [layer.running_mean for layer in self._layers]
        self._device = "cpu" if not means or means[0] is None else means[0].device.type
        # By the depth of the module in the model: the largest and the smallest that is called.
        self._kept: dict[int, list[_Call]] = {}
        self._full: set[int] = set()
        self._of_batch: _OfBatch | None = None
        self._reason = (
            "training called every BN layer in eval mode, as evaluation does"
            if not self._layers
            else "no module that holds all BN layers was seen in eval mode (if it runs under "
            "torch.compile, watch the compiled model)"
        )
        for depth, module in enumerate(_holders(model, self._layers)):
            keep = partial(self._keep, depth, _without_compilation(module))
            self.hooks.before(module, keep, with_kwargs=True)

    @property
    def has_batch(self) -> bool:
        """Whether a batch was kept."""
        return bool(self._kept)

    def start_anew(self) -> None:
        """Drop the batch, and keep the next one."""
        self._kept, self._full, self._of_batch = {}, set(), None

    def close(self) -> None:
        """Remove the hooks and drop the batch."""
        self.hooks.close()
        self.start_anew()

    def measure(self, held: Collection[str] = ()) -> ModeGap | str:
        """Return the mode gap on the batch, or why it was not measured.

        A second call, with other running statistics, costs one forward. Layers that are held in
        eval mode, by name, keep their running statistics.
        """
        if not self._kept:
            return self._reason
        if _is_spread_over_ranks(self._layers):
            return "the batch of a SyncBatchNorm is spread over the ranks"
        smallest, largest = max(self._kept), min(self._kept)
        try:
            with (
                pause_hooks(self.hooks),
                run_uncompiled(),
                preserve_modes(self._model),
                preserve_random_states(self._model),
                preserve_buffers(self._model),
                preserve_statistics(self._layers),
            ):
                # The loop may have put the model back in train mode since.
                for module in self._model.modules():
                    module.training = False
                return self._compare(smallest, largest, held)
        except Exception as error:
            if _mix(self._kept[smallest]).rows == 1:
                return "1 sample of evaluation is too few for batch statistics"
            return f"the model raised {type(error).__name__} when the batch was run again"

    def _compare(self, smallest: int, largest: int, held: Collection[str]) -> ModeGap:
        inner, running = _run(_mix(self._kept[smallest]))
        outer, scores = inner, running
        if largest != smallest:
            outer, scores = _run(_mix(self._kept[largest]))
        self._kept = {smallest: [inner], largest: [outer]}
        if self._of_batch is None:
            are_samples = _has_independent_rows(inner, running)
            for layer in self._layers:
                layer.module.training = layer.name not in held
            outputs = inner.outputs()
            self._of_batch = _OfBatch(
                outputs=outputs,
                scores=outputs if outer is inner else outer.outputs(),
                samples=inner.rows if are_samples else 0,
                # Statistics of half a batch are as far from those of the whole as these are from
                # the truth.
                sampling_change=_change_of_half(inner, outputs) if are_samples else None,
            )
        batch = self._of_batch
        return ModeGap(
            samples=batch.samples,
            relative_change=relative_change(*_choose_compared(running, batch.outputs, inner.rows)),
            sampling_change=batch.sampling_change,
            flipped_share=flipped_share(*_choose_compared(scores, batch.scores, outer.rows)),
        )

    def _keep(
        self,
        depth: int,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> None:
        if depth in self._full:
            return
        kept = self._kept.get(depth, [])
        if not kept:
            is_wanted = not self._kept or not min(self._kept) < depth < max(self._kept)
        else:
            rows = [call.rows for call in kept]
            is_wanted = all(rows) and (len(kept) < _MIXED_BATCHES or sum(rows) < _ENOUGH_SAMPLES)
        if not is_wanted:
            self._full.add(depth)
            return
        if any(layer.is_training for layer in self._layers) != self._is_training:
            return
        call = _Call(
            module,
            args,
            kwargs,
            device=self._device,
            is_autocast=torch.is_autocast_enabled(self._device),
            autocast_dtype=torch.get_autocast_dtype(self._device),
            is_inference=torch.is_inference_mode_enabled(),
        )
        if self._is_training and not call.rows:  # whatever it is, it would be kept for an epoch
            return
        if kept and kept[0].rows >= _ENOUGH_SAMPLES:
            call = call.spread_part(kept[0].rows // (len(kept) + 1))
        size = sum(map(_bytes, _tensors((call.args, call.kwargs))))
        if size > (_MAX_TRAINING_BYTES if self._is_training else MAX_CAPTURED_BYTES):
            self._reason = f"a batch of {size / 2**20:.0f} MiB is too large to keep"
            return
        args, kwargs = _copy((call.args, call.kwargs))
        self._kept[depth] = [*kept, dataclasses.replace(call, args=args, kwargs=kwargs)]
        self._kept = {depth: self._kept[depth] for depth in (min(self._kept), max(self._kept))}


def _copy(
    inputs: tuple[tuple[object, ...], dict[str, object]],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Copy the tensors, because a forward may write to its inputs."""
    args, kwargs = tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs
    )
    return args, kwargs


def _join(one: object, other: object) -> object:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.dim()):
        return one
    return torch.cat([one, other])


def _bytes(tensor: Tensor) -> int:
    if tensor.layout is torch.strided:
        return tensor.nbytes
    # A sparse tensor has no nbytes: its values, and an index per value and dimension.
    return tensor._nnz() * (tensor.itemsize + 8 * tensor.dim())


def _holders(model: nn.Module, layers: Sequence[BatchNormLayer]) -> Iterator[nn.Module]:
    """Yield the modules that hold all the layers, the model first, deeper ones later.

    Without wrappers other than compiled modules, inside which hooks do not run.
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


@dataclass(frozen=True, eq=False)
class _OfBatch:
    """The outputs with batch statistics, and how far sampling alone moves them."""

    outputs: list[Tensor]
    scores: list[Tensor]
    samples: int
    sampling_change: float | None


def _run(call: _Call) -> tuple[_Call, list[Tensor]]:
    """Return a call and its outputs; the call of the first batch if the joined rows do not run.

    The nodes of two graphs can be joined, but not their adjacency matrices.
    """
    try:
        return call, call.outputs()
    except Exception:
        if call.first is None:
            raise
    return call.first, call.first.outputs()


def _change_of_half(call: _Call, outputs: Sequence[Tensor]) -> float | None:
    """Return the change if the first half of the rows runs alone; None if it is unknown.

    Not every second row: in data that have an order, rows far apart differ more than neighbours.
    """
    places = places_of_rows([outputs], [call.rows])
    if not places or call.rows < _MIN_SAMPLES_TO_HALVE:
        return None
    half = slice(call.rows // 2)
    alone = call.part(half).outputs()
    return relative_change(
        [alone[place] for place in places], [outputs[place][half] for place in places]
    )


def _has_independent_rows(call: _Call, outputs: Sequence[Tensor]) -> bool:
    """Return whether the outputs in eval mode for half the rows do not depend on the other half.

    Those of the nodes of a graph do: nodes are not samples.
    """
    try:
        change = _change_of_half(call, outputs)
    except Exception:  # half a graph does not fit the other inputs
        return False
    if change is None or change <= _MAX_DEPENDENCE or not math.isfinite(change):
        return True
    # A model that draws random numbers, such as a VAE, changes without any other rows.
    return relative_change(call.outputs(), outputs) > _MAX_DEPENDENCE


def _choose_compared(
    outputs: Sequence[Tensor], reference: Sequence[Tensor], rows: int
) -> tuple[list[Tensor], list[Tensor]]:
    places = places_of_rows([reference], [rows]) or range(len(reference))
    return [outputs[place] for place in places], [reference[place] for place in places]


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
