"""Replace BN by another norm, and distil the original network into the result."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.errors import CalibrationError, ConfigurationError, in_one_line
from bnguard.layers.bn_layer import (
    BatchNormLayer,
    device_of,
    find_layers,
    require_module,
    run_uncompiled,
)
from bnguard.layers.preserve import preserve_modes, preserve_random_states
from bnguard.observe.mode_gap import float_tensors, places_of_rows, relative_change
from bnguard.recalibration.api import measure_score
from bnguard.recalibration.batches import Batch, Forward, call, read_batches
from bnguard.recalibration.options import (
    Keep,
    Score,
    Selection,
    is_whole,
    patterns_of,
    require_keep,
    require_score,
)
from bnguard.recalibration.statistics import read_inputs
from bnguard.swapping.imitation import Pair
from bnguard.swapping.result import HARMFUL_CHANGE_STD, ReplacedLayer, Swap
from bnguard.swapping.surgery import (
    add_tail,
    check_optimizer,
    check_reachable,
    hand_over_parameters,
    plan_swap,
    replace_modules,
)
from bnguard.swapping.targets import Factory, Groups, Target, find_target
from bnguard.swapping.teacher import OwnDevice, Taught, teach

_SAMPLES_TO_COMPARE = 128
# What a swapped model may lose of its score, and how much a negative one, a loss, may grow.
_MAX_SCORE_LOSS = 0.05
_MAX_LOSS_GROWTH = 0.25


def swap(
    model: nn.Module,
    to: str | Factory = "group",
    *,
    groups: Groups | None = None,
    layers: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    sample: object = None,
    teacher_data: Iterable[object] | None = None,
    steps: int = 200,
    forward: Forward | None = None,
    score: Score | None = None,
    keep: Keep = "if-better",
    fabric: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    in_place: bool = False,
    progress: bool = True,
) -> Swap:
    """Replace BN by another norm, and distil the original network into the result.

    Affine parameters, eps, dtype, device, modes, ``requires_grad`` and hooks are kept, and so are
    the activation and drop that a BN subclass brings along. The outputs change anyway, and
    a trained network is worth little after a swap to ``"group"``, ``"layer"`` or ``"instance"``
    until it has been distilled: give ``teacher_data``.

    Args:
        model: The model; stays as it is unless ``in_place``.
        to: ``"group"`` (Wu and He 2018), ``"layer"`` (group norm of one group), ``"instance"``,
            ``"batch-renorm"`` (Ioffe 2017), ``"frozen"`` (running statistics as constants),
            ``"sync"`` (SyncBatchNorm), or a function that is given the BN module and returns the
            one to put in its place.
        groups: Groups of a group norm, at most; or exactly that many, by name or pattern of
            layers. By default those whose output on ``teacher_data`` is nearest to BN's, layer by
            layer; without data 32 at most, of four channels at least.
        layers: Names or patterns (``"backbone.*"``) of the layers to replace; all by default.
        exclude: Names or patterns of layers to leave.
        sample: A batch as a loader yields it, to measure how many values reach each layer and how
            far the outputs change. The first batch of ``teacher_data`` by default.
        teacher_data: Batches, with or without labels, on which the swapped model learns to give
            what the model gave. Each group norm begins with the affine parameters that fit best.
            Statistics that do not fit these data are recalibrated first, in a copy. If eval mode
            still differs from batch statistics, the network teaches with the statistics of these
            batches: use the batch size that it was trained with. All parameters learn, also those
            with ``requires_grad=False``. With ``torch.distributed`` initialised every rank calls
            this, with its own share of the data, and all get the same model.
        steps: Optimizer steps to learn at most, of 32 samples or one batch, whichever is more;
            fewer once the outputs hardly come nearer. 0 only fits the affine parameters.
        forward: ``forward(model, batch)`` calls the model, where batches hold anything else.
        score: ``score(model)`` says how good a model is, the higher the better; measured in eval
            mode before and after. It also decides in which mode the network teaches.
        keep: ``"if-better"`` returns the model as it was if the swapped one, once taught, is
            clearly worse: by 5 % of the score (25 % of a negative one), or without a score if the
            outputs are further than 0.5 σ from the teacher's. A score of NaN is never good enough.
            ``"always"`` returns it anyway.
        fabric: Lightning's ``Fabric`` on whose device, in whose mixed precision and on whose ranks
            the model learns; it has been launched, and every rank calls this with its own share of
            the data. The model then goes back to its device.
        optimizer: Optimizer of the model; its parameter groups follow to the swapped one, with the
            state of the parameters that are kept.
        in_place: Whether the model itself is changed.
        progress: Show a progress bar, where there is a terminal.

    Returns:
        The swapped model, what was replaced, what was left, and how far the outputs moved.

    Raises:
        ConfigurationError: An option does not fit, or a layer cannot be replaced; model and
            optimizer are as they were.
        CalibrationError: The forward failed; model and optimizer are as they were.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        >>> swap(model, "group").model[1].num_groups
        16
    """
    _check(model, steps, score, keep)
    target = find_target(to, groups)
    plan = plan_swap(model, target, layers, exclude)
    if isinstance(groups, Mapping):
        patterns_of("groups", groups, find_layers(model))
    if in_place and model in {layer.module for layer in plan.layers}:
        raise ConfigurationError(
            "the model is itself a BN layer, which cannot be replaced in place: leave in_place out"
        )
    if optimizer is not None:
        check_optimizer(optimizer, model)
    if fabric is not None and teacher_data is None:
        raise ConfigurationError("fabric is for distilling: give teacher_data too")
    if fabric is not None and not hasattr(fabric, "all_reduce"):
        raise ConfigurationError(f"fabric takes a Fabric of Lightning, not {fabric!r}")
    data = _Remembered(teacher_data) if isinstance(teacher_data, Iterator) else teacher_data
    score_before = None if score is None else measure_score(model, score)
    with preserve_random_states(model), run_uncompiled():
        batch = _read_sample(model, sample, data, forward)
        positions: Mapping[str, int] = {}
        expected: object = None
        if batch is not None:
            positions, expected = _measure_positions(model, plan.layers, forward, batch)
        teacher = None if data is None else _copy_model(model)[0]
        subject, successors = (model, {}) if in_place else _copy_model(model)
        swapped = _replace_layers(subject, plan, target, positions)
        learns = in_place and data is not None
        weights = {p: p.detach().clone() for p in model.parameters()} if learns else {}
        with _roll_back_on_error(swapped, weights):
            _check_nothing_left(swapped)
            change, taught = None, None
            if batch is not None:
                before = () if in_place else plan.layers
                output = _run_swapped(swapped.model, forward, batch, before)
                change = _distance(output, expected, batch.size)
            if data is not None and teacher is not None:
                taught = teach(
                    swapped.model,
                    teacher,
                    data,
                    pairs=swapped.pairs_with(teacher),
                    chooses_groups=to == "group" and groups is None,
                    steps=steps,
                    forward=forward,
                    score=score,
                    engine=OwnDevice(model) if fabric is None else fabric,
                    progress=progress,
                )
            score_after = None if score is None else measure_score(swapped.model, score)
        score_before = score_before if taught is None or taught.score is None else taught.score
        is_kept = keep == "always" or _is_good_enough(taught, score_before, score_after)
        replaced = tuple(
            ReplacedLayer(
                name=layer.name,
                before=type(layer.module).__name__,
                after=type(norm).__name__,
                groups=norm.num_groups if isinstance(norm, nn.GroupNorm) else None,
                positions=positions.get(layer.name),
                channels=layer.channels,
            )
            for layer, norm in zip(swapped.layers, swapped.norms, strict=True)
        )
        if not is_kept and in_place:
            _restore_weights(swapped, weights)
    if optimizer is not None and is_kept:
        hand_over_parameters(optimizer, swapped.model, successors, swapped.parameters())
    return Swap(
        model=swapped.model if is_kept else model,
        is_kept=is_kept,
        is_in_place=in_place,
        to=to if isinstance(to, str) else getattr(to, "__name__", type(to).__name__),
        replaced=replaced,
        skipped=plan.skipped,
        output_change=change,
        distillation=None if taught is None else taught.distillation,
        score_before=score_before,
        score_after=score_after,
        notes=() if taught is None else taught.notes,
    )


def _is_good_enough(
    taught: Taught | None, score_before: float | None, score_after: float | None
) -> bool:
    """Return whether a swap is kept; one that was not taught has to score a number."""
    if score_before is None or score_after is None:
        return taught is None or taught.distillation.distance <= HARMFUL_CHANGE_STD
    if math.isnan(score_after):
        return False
    allowed = _MAX_SCORE_LOSS if score_before > 0 else _MAX_LOSS_GROWTH
    least = score_before - allowed * abs(score_before)
    return taught is None or math.isnan(score_before) or score_after >= least


@dataclass(frozen=True, eq=False)
class _SwappedModel:
    """A model whose BN layers have been replaced.

    Attributes:
        model: The model with the other norm.
        layers: The BN layers that were in it.
        norms: What normalises in place of each.
        replacements: What replaced each module: the norm, perhaps with an activation.
    """

    model: nn.Module
    layers: tuple[BatchNormLayer, ...]
    norms: tuple[nn.Module, ...]
    replacements: Mapping[nn.Module, nn.Module]

    def pairs_with(self, teacher: nn.Module) -> list[Pair]:
        """Return each BN layer of the teacher with what replaced it."""
        in_teacher = {layer.name: layer for layer in find_layers(teacher)}
        return [
            Pair(in_teacher[layer.name], self.replacements[layer.module], norm)
            for layer, norm in zip(self.layers, self.norms, strict=True)
        ]

    def parameters(self) -> list[tuple[list[nn.Parameter], list[nn.Parameter]]]:
        """Return the parameters of each BN module with those of its replacement."""
        return [
            (list(old.parameters()), list(new.parameters()))
            for old, new in self.replacements.items()
        ]


def _check(model: object, steps: object, score: object, keep: str) -> None:
    require_module(model, "swap")
    require_score(score)
    require_keep(keep)
    if not is_whole(steps, 0):
        raise ConfigurationError(f"steps must be a whole number of at least 0, not {steps!r}")


def _copy_model(model: nn.Module) -> tuple[nn.Module, Mapping[nn.Parameter, nn.Parameter]]:
    """Return a copy of a model, and the copy of each of its parameters."""
    memo: dict[int, object] = {}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): swap it "
            "in place, without teacher data"
        ) from error
    successors = {
        p: q for p in model.parameters() if isinstance(q := memo.get(id(p)), nn.Parameter)
    }
    return twin, successors


def _read_sample(
    model: nn.Module, sample: object, data: Iterable[object] | None, forward: Forward | None
) -> Batch | None:
    """Return the batch on which sizes and outputs are measured; None without data."""
    if sample is None and data is None:
        return None
    source = data if sample is None and data is not None else [sample]
    for name, value in model.named_parameters():
        if is_lazy(value):
            raise ConfigurationError(f"{name} is lazy: put a batch through the model first")
        if value.is_meta:
            raise ConfigurationError(f"{name} is on the meta device: load the weights first")
    device = device_of(model)
    batches = read_batches(source, model, forward, samples=_SAMPLES_TO_COMPARE, device=device)
    for batch in batches:
        return batch
    raise ConfigurationError("there are no samples to distil on: the data are empty")


def _measure_positions(
    model: nn.Module, layers: Sequence[BatchNormLayer], forward: Forward | None, sample: Batch
) -> tuple[Mapping[str, int], object]:
    """Return the values per channel and sample that reach each layer, the fewest of its calls.

    Layers that the sample does not reach are left out. The second value is what the model, in
    eval mode, returned.
    """
    positions: dict[str, int] = {}

    def measure(index: int, values: Tensor) -> None:
        name, here = layers[index].name, values.shape[2:].numel()
        positions[name] = min(here, positions.get(name, here))

    with read_inputs(layers, measure):
        return positions, _run_in_eval_mode(model, forward, sample)


def _run_in_eval_mode(model: nn.Module, forward: Forward | None, batch: Batch) -> object:
    """Return what a model gives for a batch in eval mode; the model stays as it is."""
    with preserve_modes(model), preserve_random_states(model), torch.no_grad():
        model.eval()
        return call(model, forward, batch)


def _replace_layers(
    model: nn.Module, plan: Selection, target: Target, positions: Mapping[str, int]
) -> _SwappedModel:
    """Replace the layers of the plan; a model that fails stays as it was."""
    names = {layer.name for layer in plan.layers}
    layers = tuple(layer for layer in find_layers(model) if layer.name in names)
    norms = tuple(target.build(layer, positions.get(layer.name)) for layer in layers)
    replacements = {
        layer.module: add_tail(norm, layer) for layer, norm in zip(layers, norms, strict=True)
    }
    check_reachable(model, replacements)
    return _SwappedModel(replace_modules(model, replacements), layers, norms, replacements)


def _check_nothing_left(swapped: _SwappedModel) -> None:
    for layer in find_layers(swapped.model):
        if layer.module in swapped.replacements:
            raise ConfigurationError(
                f"{layer.label} is part of another BN layer, where it cannot be replaced: leave "
                f"that one out, or pass a factory that makes both"
            )


@contextmanager
def _roll_back_on_error(
    swapped: _SwappedModel, weights: Mapping[nn.Parameter, Tensor]
) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _restore_weights(swapped, weights)
        raise


@torch.no_grad()
def _restore_weights(swapped: _SwappedModel, weights: Mapping[nn.Parameter, Tensor]) -> None:
    replace_modules(swapped.model, {new: old for old, new in swapped.replacements.items()})
    for parameter, values in weights.items():
        parameter.copy_(values)


def _run_swapped(
    model: nn.Module, forward: Forward | None, batch: Batch, before: Sequence[BatchNormLayer]
) -> object:
    """Return what a swapped copy gives in eval mode.

    Raises:
        ConfigurationError: It fails, or runs a layer of the model that it is a copy of.
    """
    called: list[str] = []
    try:
        with read_inputs(before, lambda index, _: called.append(before[index].name)):
            output = _run_in_eval_mode(model, forward, batch)
    except CalibrationError as error:
        raise ConfigurationError(
            f"the swapped {type(model).__name__} fails on a batch that the model takes: "
            f"{in_one_line(error.__cause__ or error)}: where the code uses a BN layer by more than "
            "a call, exclude that layer"
        ) from error
    if called:
        raise ConfigurationError(
            f"{called[0]}: a copy of {type(model).__name__} still runs the layer of the model, by "
            "a function or compiled method that it holds in an attribute: swap it in place"
        )
    return output


def _distance(output: object, expected: object, samples: int) -> float:
    found, wanted = list(float_tensors(output)), list(float_tensors(expected))
    places = places_of_rows([wanted], [samples]) or range(len(wanted))
    return relative_change([found[place] for place in places], [wanted[place] for place in places])


class _Remembered:
    """Data that an iterator yields once, kept as far as they were read.

    >>> numbers = _Remembered(iter([1, 2]))
    >>> next(iter(numbers)), list(numbers), list(numbers)
    (1, [1, 2], [1, 2])
    """

    def __init__(self, source: Iterator[object]) -> None:
        self._source = source
        self._kept: list[object] = []

    def __iter__(self) -> Iterator[object]:
        yield from self._kept
        for item in self._source:
            self._kept.append(item)
            yield item
