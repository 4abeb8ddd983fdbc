"""From the numbers to a verdict; pure.

Each cause is a function that returns its verdict, or None if it does not apply; the first verdict
is the answer. They are in the order of trust: what is certain, then what explains most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bnguard.findings import factor
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.whatif.evidence import (
    MAX_INITIAL_WEIGHT,
    MAX_INPUT_DRIFT,
    MAX_STORED_DRIFT,
    Numbers,
    exceeds_healthy_change,
)
from bnguard.whatif.result import Row, Verdict

# Samples of a batch from which its noise is below 0.18 σ, less than networks learn to rely on.
_MAX_NOISY_BATCH = 32

_RECALIBRATE = "bnguard.recalibrate(model, train_loader)"
_ADAPT = 'bnguard.recalibrate(model, loader, method="adapt")'
_SWAP = 'model = bnguard.swap(model, to="group").model'
_SHUFFLE = (
    "train_loader = torch.utils.data.DataLoader(\n"
    "    train_loader.dataset, train_loader.batch_size, shuffle=True\n"
    ")"
)
_WATCH = "monitor = bnguard.watch(model, optimizer=optimizer)"
_DIAGNOSE_WITH_REFERENCE = "print(bnguard.diagnose(model, loader, reference=train_loader))"
_DIAGNOSE_TRAINING = "print(bnguard.diagnose(model, train_loader, score=train_score))"
_MIX = (
    "shuffle the training data, put what a step forwards separately (domains, real and generated "
    "samples) into one batch, and train on"
)


def reach_verdict(numbers: Numbers) -> Verdict:
    """Return the verdict of the first cause that applies."""
    return next(verdict for find in CAUSES if (verdict := find(numbers)) is not None)


def no_statistics(layers: Sequence[BatchNormLayer]) -> Verdict:
    """Return the verdict on a model without running statistics."""
    return Verdict(
        name="no-statistics",
        message="no BN layer has running statistics (track_running_stats=False), so there is "
        "nothing to compare: each batch is normalised by its own statistics, in eval mode too",
        evidence=(f"without running statistics: {_layers([layer.name for layer in layers])}",),
        is_fault=False,
        advice="predictions depend on the rest of their batch; if they must not, replace BN and "
        "train on",
        next_step=_SWAP,
    )


def poisoned_statistics(numbers: Numbers) -> Verdict | None:
    """NaN or Inf in the stored statistics."""
    if not numbers.poisoned:
        return None
    return Verdict(
        name="poisoned-statistics",
        message="NaN or Inf has entered the running statistics, and averaging never removes it",
        evidence=(
            f"not finite: {_layers(numbers.poisoned)}",
            numbers.compared("stored", numbers.fresh),
        ),
        advice="recalibrate; bnguard.watch(model, restore_poisoned=True) keeps it from recurring",
        next_step=_RECALIBRATE,
        cured_by=numbers.fresh,
    )


def unconverged_statistics(numbers: Numbers) -> Verdict | None:
    """The initial statistics are still there, and recalibration helps."""
    if not (numbers.is_cured and numbers.is_unconverged):
        return None
    if numbers.untouched:
        message = (
            "the running statistics are the initial mean 0 and variance 1: they were lost when the "
            "weights were saved or loaded, or never updated"
        )
        evidence = f"initial: {_layers(numbers.untouched)}"
        advice = "load the state dict that holds the buffers too, or recalibrate on training data"
    else:
        message = (
            "the running statistics still hold a part of the initial mean 0 and variance 1: too "
            "few updates for the momentum"
        )
        evidence = _initial_weight(numbers)
        advice = "recalibrate on training data, and train on with a larger momentum"
    return Verdict(
        name="unconverged-statistics",
        message=message,
        evidence=(evidence, numbers.compared("stored", numbers.fresh)),
        advice=advice,
        next_step=_RECALIBRATE,
        cured_by=numbers.fresh,
    )


def batches_alone(numbers: Numbers) -> Verdict | None:
    """No running statistics do as well as those of each batch."""
    names = [name for name in numbers.rows if name.startswith("batches")]
    scored = [name for name in names if numbers.rows[name].score is not None]
    if not scored:
        return None
    name = numbers.best_of(scored)
    # Parts of batches do as well by chance, and do not show what a batch has in common.
    if "batches" in scored and numbers.loss("batches", name) == 0.0:
        name = "batches"
    lost = numbers.loss(numbers.best, name)
    if lost <= max(numbers.chance(name), numbers.gain("stored", numbers.best)):
        return None
    compared = numbers.compared("stored", numbers.best, name)
    alike = _what_batches_share(numbers, name)
    size = numbers.batch_size or 0
    if not alike and name == "batches" and size > _MAX_NOISY_BATCH:
        return Verdict(
            name="correlated-batches",
            message=f"only the statistics of each batch do well, and batches of {size} have little "
            "noise: the network was trained on batches whose samples are alike, as where a step "
            "forwards several streams separately (domains, real and generated samples)",
            evidence=(compared,),
            advice=_MIX,
            next_step=_SHUFFLE,
        )
    if not alike:
        return Verdict(
            name="small-batch-noise",
            message="only the statistics of small batches do well: the network has learned with "
            "their noise, which running statistics do not have",
            evidence=(compared,),
            advice="train on with larger batches, or with another norm in place of BN",
            next_step=_SWAP,
        )
    return Verdict(
        name="correlated-batches",
        message="only the statistics of each batch do well, and the samples of a batch are alike: "
        "the data are sorted or grouped, or come in several streams, and BN normalises each batch "
        "by what its samples share",
        evidence=(compared, alike),
        advice=_MIX,
        next_step=_SHUFFLE,
    )


def sorted_training(numbers: Numbers) -> Verdict | None:
    """Training batches that are sorted, and stored statistics that are those of such batches."""
    training = numbers.training
    if training is None or training.order is None or not training.is_sorted:
        return None
    if not training.is_stored:
        return None
    flipped = training.flipped_share
    moved = f"changes the outputs by {training.change:.3g} σ"
    return Verdict(
        name="correlated-batches",
        message="the network was trained on batches that are sorted, grouped, or of several "
        "streams: it relies on what a batch has in common, and its running statistics describe "
        "none of the data",
        evidence=(
            f"training batches {training.order}",
            "shuffling them "
            + (moved if flipped is None else f"flips {flipped:.1%} of their predictions"),
            numbers.compared("stored", "reference"),
        ),
        advice=f"{_MIX}; recalibrate then",
        next_step=_SHUFFLE,
        cured_by="reference" if numbers.is_cured_by_training else None,
    )


def dropout_before(numbers: Numbers) -> Verdict | None:
    """Stored statistics that are those of the data with dropout active."""
    if not (numbers.is_cured and numbers.has_dropout_stored):
        return None
    return Verdict(
        name="dropout-before-bn",
        message=f"{_dropout_message(numbers)}, and the outputs suffer",
        evidence=(numbers.compared("stored", numbers.fresh), *_dropout_evidence(numbers)),
        advice="move dropout behind the last BN layer and train on; until then recalibrate",
        next_step=_RECALIBRATE,
        cured_by=numbers.fresh,
    )


def other_preprocessing(numbers: Numbers) -> Verdict | None:
    """Training and evaluation data both miss the stored statistics, and only at the input."""
    if not (numbers.is_cured_by_training and numbers.is_off_at_input_alone):
        return None
    if numbers.training is None or numbers.training.is_stored:
        return None
    return Verdict(
        name="other-preprocessing",
        message="the training data and the evaluation data both miss the stored statistics at the "
        "first BN layer, and later layers fit once that is corrected: either both loaders prepare "
        "the data differently from training (scale, offset, order of the channels, normalisation), "
        "or other data updated the statistics (validation without eval(), a dry run, a second "
        "stream)",
        evidence=(
            numbers.compared("stored", "reference"),
            *_input_drift(numbers),
            _drifts(numbers),
        ),
        advice="compare what the loaders yield with what training was given; recalibrating would "
        "hide a wrong preprocessing, and is right if the data are prepared as in training",
        next_step=_look_at("loader", "train_loader"),
    )


def small_training_batches(numbers: Numbers) -> Verdict | None:
    """Stored statistics that the noise of small training batches explains."""
    training = numbers.training
    if training is None or not numbers.is_cured_by_training:
        return None
    is_biased = training.is_stored and numbers.loss("averaged", "reference") > 0.0
    if not (is_biased or training.is_noisy):
        return None
    return Verdict(
        name="small-batch-noise",
        message=f"training batches of {training.batch_size} are so small that the running "
        "statistics, which average over theirs, misstate the data",
        evidence=(
            numbers.compared("stored", "averaged", "reference"),
            f"stored variances off by {factor(training.from_batches)} from those of training "
            f"batches (noise explains {factor(training.from_batches_by_noise)})",
        ),
        advice="recalibrate on training data; larger batches, or another norm, fix it for good",
        next_step=_RECALIBRATE,
        cured_by="reference",
    )


def stale_statistics(numbers: Numbers) -> Verdict | None:
    """Statistics of training data do better: the stored ones do not fit weights and data."""
    if numbers.is_cured_by_training:
        message = (
            "the running statistics do not fit the weights: weights that were averaged, loaded or "
            "pruned, or that change faster than the running average; or other data updated the "
            "statistics (a forward in train mode outside training, a second stream)"
        )
    elif numbers.training is None and numbers.is_harmed and numbers.has_known_input:
        message = (
            "the evaluation data match the running statistics of the first BN layer, and those of "
            "later layers do not fit the weights"
        )
    else:
        return None
    return Verdict(
        name="stale-statistics",
        message=message,
        evidence=(numbers.compared("stored", numbers.fresh), *_input_drift(numbers)),
        advice="recalibrate on training data",
        next_step=_RECALIBRATE,
        cured_by=numbers.fresh,
    )


def data_shift(numbers: Numbers) -> Verdict | None:
    """Statistics of the evaluation data do better than those of training data."""
    if numbers.training is None or not numbers.is_harmed or _is_chance(numbers):
        return None
    return Verdict(
        name="data-shift",
        message="the evaluation data differ from the training data: preprocessing, or domain",
        evidence=(
            numbers.compared("stored", "reference", "evaluation"),
            *_input_drift(numbers),
        ),
        advice="make the preprocessing the same; if the data themselves differ, adapt to them",
        next_step=_ADAPT,
        cured_by="evaluation",
    )


def unfit_statistics(numbers: Numbers) -> Verdict | None:
    """The stored statistics do not fit, and only training data can tell why."""
    if numbers.training is not None or not numbers.is_harmed:
        return None
    return Verdict(
        name="unfit-statistics",
        message="the running statistics do not fit the evaluation data"
        + (
            " at the first BN layer, and later layers fit once that is corrected: a preprocessing "
            "that differs from training, or statistics that other data updated"
            if numbers.is_off_at_input_alone
            else ": either they are stale, or the data differ from those of training"
        ),
        evidence=(numbers.compared("stored", "evaluation"), *_input_drift(numbers)),
        advice="pass the training data as reference= to tell the two apart",
        next_step=_DIAGNOSE_WITH_REFERENCE,
        cured_by="evaluation",
    )


def poor_weights(numbers: Numbers) -> Verdict | None:
    """No statistics reach the score that the user expects."""
    expected, best = numbers.expected_score, numbers.rows[numbers.best].score
    if expected is None or best is None or best >= expected:
        return None
    return Verdict(
        name="weights",
        message="no statistics reach the expected score: the weights, the data or their labels are "
        "at fault, and not BN",
        evidence=(
            f"best score {best:.4g} (expected {expected:.4g})",
            numbers.compared("stored", numbers.fresh, "evaluation"),
            *(_input_drift(numbers) if numbers.is_off_training or numbers.is_off_stored else ()),
        ),
        advice="diagnose it on training data: that distinguishes bad training from overfitting",
        next_step=_DIAGNOSE_TRAINING,
    )


def harmless(numbers: Numbers) -> Verdict | None:
    """Something is off, and other statistics do no better on these data."""
    has_dropout = numbers.is_off_stored and numbers.has_dropout_stored
    # What is left of the initial statistics explains how far they are off, as does dropout.
    is_off_stored = numbers.is_off_stored and not (numbers.is_unconverged or has_dropout)
    is_off = numbers.is_off_training or is_off_stored
    found = []
    if numbers.is_unconverged:
        found.append(
            "the running statistics still hold a part of the initial mean 0 and variance 1"
        )
    elif has_dropout:
        found.append(_dropout_message(numbers))
    if numbers.is_off_training:
        found.append(
            "the evaluation data differ from the training data at the first BN layer"
            + (", and from its statistics" if is_off_stored else ", and fit its statistics")
        )
    elif is_off_stored:
        found.append("these data differ from the statistics of the first BN layer")
    if not found:
        return None
    loaders = ("loader",) if numbers.training is None else ("loader", "train_loader")
    return Verdict(
        name="harmless",
        message=f"{'; '.join(found)}. {_no_better(numbers).capitalize()}",
        evidence=(
            *((_initial_weight(numbers),) if numbers.is_unconverged else ()),
            *(_dropout_evidence(numbers) if has_dropout else ()),
            *(_input_drift(numbers) if numbers.is_off_training or numbers.is_off_stored else ()),
            numbers.compared("stored", numbers.fresh, "evaluation"),
        ),
        is_fault=False,
        advice="compare what the loaders yield with what training was given, before these data are "
        "used to recalibrate"
        if is_off
        else "recalibrate anyway: other data may need it",
        next_step=_look_at(*loaders) if is_off else _RECALIBRATE,
    )


def no_fault(numbers: Numbers) -> Verdict:
    """No other statistics do better."""
    return Verdict(
        name="none",
        message=_no_better(numbers),
        evidence=(numbers.compared("stored", numbers.fresh, "evaluation"),),
        is_fault=False,
        advice="if the network does badly, look at weights, data and labels; BN can be watched "
        "when it is trained next",
        next_step=_WATCH,
    )


CAUSES: tuple[Callable[[Numbers], Verdict | None], ...] = (
    poisoned_statistics,
    unconverged_statistics,
    batches_alone,
    sorted_training,
    dropout_before,
    other_preprocessing,
    small_training_batches,
    stale_statistics,
    data_shift,
    unfit_statistics,
    poor_weights,
    harmless,
    no_fault,
)


def _layers(names: Sequence[str]) -> str:
    first, *others = names
    return f"{first or 'the model'}{f' and {len(others)} more' if others else ''}"


def _initial_weight(numbers: Numbers) -> str:
    return f"initial statistics left {numbers.initial_weight:.0%} (limit {MAX_INITIAL_WEIGHT:.0%})"


def _dropout_message(numbers: Numbers) -> str:
    assert numbers.dropout is not None
    return (
        f"{numbers.dropout.kind} comes before BN layers and acts in training alone: their running "
        "variances include what it adds, which the inputs in eval mode do not have"
    )


def _dropout_evidence(numbers: Numbers) -> tuple[str, ...]:
    assert numbers.dropout is not None
    return (
        f"stored variances off by {factor(numbers.dropout.inactive)} from those of the data, by "
        f"{factor(numbers.dropout.active)} with dropout active",
    )


def _what_batches_share(numbers: Numbers, name: str) -> str:
    """Return what shows that the samples of a batch are alike; empty if nothing does."""
    row, shuffled = numbers.rows[name], numbers.rows.get("shuffled batches")
    if name == "batches" and shuffled is not None:
        flipped = (row.flipped_share or 0.0) - (shuffled.flipped_share or 0.0)
        if exceeds_healthy_change(row.change - shuffled.change, flipped):
            return _shuffling(row, shuffled)
    order = numbers.orders.get(name)
    if order is None or not order.is_sorted:
        return ""
    return f"evaluation batches {order}"


def _shuffling(row: Row, shuffled: Row) -> str:
    if row.flipped_share is None or shuffled.flipped_share is None:
        return f"outputs changed: {row.change:.3g} σ as they come, {shuffled.change:.3g} σ shuffled"
    return (
        f"predictions flipped: {row.flipped_share:.1%} as they come, "
        f"{shuffled.flipped_share:.1%} shuffled"
    )


def _is_chance(numbers: Numbers) -> bool:
    """Return whether the data look alike, and chance explains what other statistics gain."""
    scores = [numbers.rows[name].score for name in ("reference", numbers.best)]
    if not all(score is not None and 0.0 <= score <= 1.0 for score in scores):
        return False
    gained = numbers.gain("reference", numbers.best)
    return numbers.has_known_input and gained <= numbers.chance("reference")


def _no_better(numbers: Numbers) -> str:
    """Return that no other statistics do better, and by how much they would have to."""
    scored = [name for name, row in numbers.rows.items() if row.score is not None]
    if "stored" not in scored or numbers.best not in scored:
        return "no other statistics change the outputs by more than they do in healthy networks"
    best = numbers.best_of(scored)
    if numbers.gain("stored", best) <= 0.0:
        return "no other statistics do better than the stored ones"
    return (
        "no other statistics do better than the stored ones by more than chance "
        f"(±{numbers.tolerance(best):.2g} on {numbers.samples} samples)"
    )


def _input_drift(numbers: Numbers) -> tuple[str, ...]:
    """Return how far evaluation data are off at the first BN layer, as in the table."""
    limits = {"stored": MAX_STORED_DRIFT, "reference": MAX_INPUT_DRIFT}
    rows = [numbers.rows[name] for name in limits if name in numbers.rows]
    drifts = [
        f"{_figure(row.input_drift)} {row.label} (limit {limits[row.name]})"
        for row in rows
        if row.input_drift is not None
    ]
    return (f"drift at the first BN layer, evaluation data: {', '.join(drifts)}",) * bool(drifts)


def _drifts(numbers: Numbers) -> str:
    first, *later = numbers.drifts
    most = f", of later ones at most {_figure(max(later))}" if later else ""
    return (
        "drift of training data from the stored statistics if earlier layers are corrected: of the "
        f"first BN layer {_figure(first)}{most}"
    )


def _figure(drift: float) -> str:
    """Return a drift as the table shows it."""
    return f"{drift:.2f}" if drift < 100 else f"{drift:.2g}"


def _look_at(*loaders: str) -> str:
    """Return code that prints what loaders yield, channel by channel."""
    return (
        f"for data in ({', '.join(loaders)},):\n"
        "    batch = next(iter(data))\n"
        "    inputs = batch[0] if isinstance(batch, (list, tuple)) else batch\n"
        "    channels = inputs.float().transpose(0, 1).flatten(1)\n"
        "    print(channels.amin(1), channels.amax(1), channels.mean(1), channels.std(1))"
    )
