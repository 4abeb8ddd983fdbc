"""Measures what BN does to training itself: activations, noise, and how gradients change."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError, in_one_line
from bnguard.layers.bn_layer import BatchNormLayer, is_wrapper
from bnguard.layers.moments import wide
from bnguard.layers.preserve import preserve_buffers, preserve_gradients, preserve_random_states
from bnguard.observe.hooks import Hooks
from bnguard.observe.windows import LayerView

# Beyond this a sigmoid or a tanh hardly changes.
_SATURATED = 2.0
# With fewer, the linear estimate of the noise is more than 15 % too small.
_MIN_SAMPLES = 16


@dataclass(frozen=True)
class TrainingViews:
    """Asks for what BN does to training, in ``watch(..., views=TrainingViews(loss))``.

    A measurement takes one forward and backward per BN layer, and one more: with 50 layers and
    every 1,000 steps it makes training 5 % longer. Meanwhile it holds two copies of the weights.
    The model is left as it was.

    Attributes:
        loss: Returns the loss of the model, which is in train mode, on a batch that stays the same.
        every_n_steps: Steps from one measurement to the next; the first is after step 2.

    Raises:
        ConfigurationError: The loss cannot be called, or the steps are not a positive number.
    """

    loss: Callable[[nn.Module], Tensor]
    every_n_steps: int = 1000

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise ConfigurationError(
                f"loss={self.loss!r} cannot be called: give a function that takes the model"
            )
        if not (isinstance(self.every_n_steps, int) and self.every_n_steps > 0):
            raise ConfigurationError(
                f"every_n_steps must be a whole number of at least 1, not {self.every_n_steps!r}"
            )


class ViewProbe:
    """Measures every N steps what BN does to training, while nothing else observes the model."""

    def __init__(
        self,
        model: nn.Module,
        views: TrainingViews,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        # DistributedDataParallel would synchronise gradients.
        self._model = next(module for module in model.modules() if not is_wrapper(module))
        self._views = views
        self._pause = pause
        self._newest: int | None = None
        self._steps = 0
        self._is_on = True
        self._before: dict[nn.Parameter, Tensor] = {}
        self.measured: dict[str, LayerView] = {}

    def note_step(self, step: int, layers: Sequence[BatchNormLayer]) -> None:
        """Measure the newest update if the weights before it are known; keep them now and then.

        Batches whose gradients are accumulated share the number of their step.
        """
        if step == self._newest:
            return
        self._newest = step
        if self._before and self._model.training:
            with self._pause():
                self._try_to_measure(step, layers)
        is_due = self._is_on and self._steps % self._views.every_n_steps == 0
        self._before = _values(self._model.parameters()) if is_due else {}
        self._steps += 1

    def _try_to_measure(self, step: int, layers: Sequence[BatchNormLayer]) -> None:
        try:
            self.measured = self._measure(step, layers)
        except Exception as error:  # the user's loss; watching goes on without it
            self._is_on = False
            warnings.warn(
                f"bnguard: nothing is measured for views any more: {in_one_line(error)}",
                stacklevel=2,
            )

    def _measure(self, step: int, layers: Sequence[BatchNormLayer]) -> dict[str, LayerView]:
        model, before = self._model, self._before
        after = _values(before)
        views: dict[str, LayerView] = {}
        forward = _ForwardProbe(model, layers)
        with preserve_gradients(model), torch.enable_grad():
            try:
                _write(before)
                first = self._gradients([p for p in before if p.requires_grad])
                forward.hooks.close()
                forward.hooks.raise_error()
                is_first = True
                for layer, own in forward.parts():
                    cosine = change = None
                    shared = [p for p in own if p in first]
                    if shared and not is_first:
                        then = self._gradients(shared)
                        cosine, change = compare_gradients(
                            [first[p] for p in shared], [then[p] for p in shared]
                        )
                    views[layer.name] = dataclasses.replace(
                        forward.views[layer.name],
                        step=step,
                        gradient_cosine=cosine,
                        gradient_change=change,
                    )
                    # From here on, this layer is one of those before the next.
                    _write({p: after[p] for p in own})
                    is_first = False
            finally:
                forward.hooks.close()
                _write(after)
        return views

    def _gradients(self, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of the loss; each pass has the same buffers and random numbers."""
        with preserve_buffers(self._model), preserve_random_states(self._model):
            loss = self._views.loss(self._model)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        return {p: torch.zeros_like(p) if g is None else g for p, g in pairs}


def compare_gradients(
    first: Iterable[Tensor], then: Iterable[Tensor]
) -> tuple[float | None, float | None]:
    """Return the cosine of two gradients, and |first - then| / |first|; None for one of 0.

    Santurkar et al., "How Does Batch Normalization Help Optimization?" (2018), section 2.2.

    >>> compare_gradients([torch.tensor([3.0, 4.0])], [torch.tensor([4.0, 3.0])])
    (0.96, 0.282842712474619)
    """
    a, b = (torch.cat([wide(part).flatten() for part in parts]) for parts in (first, then))
    if not a.any() or not b.any():
        return None, None
    return (a @ b / a.norm() / b.norm()).item(), ((a - b).norm() / a.norm()).item()


def normalisation_noise(values: Tensor, eps: float) -> float | None:
    """Return how far a sample's normalised value spreads over random batches of this size, in σ.

    To first order in the errors of mean and variance, which follow from how the samples differ:
    Var(mean) / var + Var(var) / (4 var²), averaged over values and channels.

    Args:
        values: A batch, shape ``(N, C, ...)``.
        eps: Added to the variance.

    Returns:
        The spread; None for fewer than 16 samples.
    """
    samples = len(values)
    if samples < _MIN_SAMPLES:
        return None
    wide_values = wide(values).reshape(samples, values.shape[1], -1)
    shifts = wide_values - wide_values.mean((0, 2), keepdim=True)
    squares = shifts.square().mean(2)
    var = squares.mean(0) + eps
    noise = (shifts.mean(2).var(0) / var + squares.var(0) / (4.0 * var.square())) / samples
    return noise.mean().sqrt().item()


class _ForwardProbe:
    """Reads the order of the modules in a forward, and the activations around each BN layer."""

    def __init__(self, model: nn.Module, layers: Iterable[BatchNormLayer]) -> None:
        self.hooks = Hooks()
        self.views: dict[str, LayerView] = {}
        self._layers = {layer.module: layer for layer in layers}
        self._order: dict[nn.Module, None] = {}
        for module in model.modules():
            if module._parameters or module in self._layers:
                self.hooks.before(module, partial(self._note_call, module))
        for layer in self._layers.values():
            self.hooks.after(layer.module, partial(self._note_output, layer))

    def parts(self) -> Iterator[tuple[BatchNormLayer, list[nn.Parameter]]]:
        """Yield each BN layer with its parameters and those since the BN layer before it."""
        seen: dict[nn.Parameter, None] = {}
        own: dict[nn.Parameter, None] = {}
        for module in self._order:
            own.update((p, None) for p in module.parameters(recurse=False) if p not in seen)
            if module in self._layers and self._layers[module].name in self.views:
                yield self._layers[module], list(own)
                seen.update(own)
                own = {}

    def _note_call(self, module: nn.Module, args: tuple[object, ...]) -> None:
        self._order.setdefault(module)

    @torch.no_grad()
    def _note_output(self, layer: BatchNormLayer, args: tuple[object, ...], output: object) -> None:
        values = args[0] if args else None
        if layer.name in self.views or not (
            isinstance(values, Tensor) and isinstance(output, Tensor)
        ):
            return
        self.views[layer.name] = LayerView(
            saturated_share=_saturated_share(output),
            saturated_share_without=_saturated_share(values),
            dead_share=_dead_share(output),
            dead_share_without=_dead_share(values),
            noise_std=normalisation_noise(values, layer.eps),
        )


def _saturated_share(values: Tensor) -> float:
    return (values.abs() > _SATURATED).double().mean().item()


def _dead_share(values: Tensor) -> float:
    return (values.transpose(0, 1).flatten(1).amax(1) <= 0).double().mean().item()


def _values(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    return {parameter: parameter.detach().clone() for parameter in parameters}


def _write(values: Mapping[nn.Parameter, Tensor]) -> None:
    for parameter, value in values.items():
        # .data keeps the version counter, which an optimizer or a backward may check.
        parameter.data.copy_(value)
