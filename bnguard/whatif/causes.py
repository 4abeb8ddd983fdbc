"""From the numbers to the cause that they name; pure.

Each cause is a function that returns what it concludes, or None; the first that concludes anything
is the answer. They stand in the order of trust: what is certain, then what explains most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.whatif.evidence import (
    MAX_INITIAL_WEIGHT,
    MAX_INPUT_DRIFT,
    MAX_STORED_DRIFT,
    Numbers,
    is_harmful,
)
from bnguard.whatif.result import Row, Verdict

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


def name_cause(numbers: Numbers) -> Verdict:
    """Return the cause that the numbers name."""
    return next(cause for find in CAUSES if (cause := find(numbers)) is not None)


def no_statistics(layers: Sequence[BatchNormLayer]) -> Verdict:
    """Return that there are no running statistics to try others in place of."""
    return Verdict(
        name="no-statistics",
        message="no BN layer has running statistics (track_running_stats=False), so there are no "
        "others to try: each batch is normalised by its own, in eval mode too",
        evidence=(f"without running statistics: {_layers([layer.name for layer in layers])}",),
        is_fault=False,
        advice="predictions depend on the rest of their batch; if they must not, replace BN and "
        "train on",
        next_step=_SWAP,
    )


def poisoned_statistics(numbers: Numbers) -> Verdict | None:
    """NaN or Inf in the stored statistics: nothing else needs to be asked."""
    if not numbers.poisoned:
        return None
    return Verdict(
        name="poisoned-statistics",
        message="NaN or Inf has entered the running statistics, and averaging never takes it out",
        evidence=(
            f"not finite: {_layers(numbers.poisoned)}",
            numbers.compared("stored", numbers.fresh),
        ),
        advice="recalibrate; bnguard.watch(model, restore_poisoned=True) keeps it from recurring",
        next_step=_RECALIBRATE,
        cured_by=numbers.fresh,
    )


def unconverged_statistics(numbers: Numbers) -> Verdict | None:
    """The initial statistics are still there, and recalibration is a cure."""
    is_cured = numbers.is_cured_by_training or numbers.training is None
    if not (numbers.is_harmed and is_cured and numbers.initial_weight > MAX_INITIAL_WEIGHT):
        return None
    if numbers.untouched:
        return Verdict(
            name="unconverged-statistics",
            message="the running statistics are the initial mean 0 and variance 1: they were lost "
            "when the weights were saved or loaded, or never updated",
            evidence=(
                f"initial: {_layers(numbers.untouched)}",
                numbers.compared("stored", numbers.fresh),
            ),
            advice="load the state dict that holds the buffers too, or recalibrate on training "
            "data",
            next_step=_RECALIBRATE,
            cured_by=numbers.fresh,
        )
    return Verdict(
        name="unconverged-statistics",
        message="the running statistics still hold a part of the initial mean 0 and variance 1: "
        "too few updates for the momentum",
        evidence=(_initial_weight(numbers), numbers.compared("stored", numbers.fresh)),
        advice="recalibrate on training data, and train on with a larger momentum",
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
    # Parts of batches do as well as these by chance, and do not tell what they have in common.
    if "batches" in scored and numbers.loss("batches", name) == 0.0:
        name = "batches"
    lost = numbers.loss(numbers.best, name)
    if lost <= max(numbers.chance(name), numbers.gain("stored", numbers.best)):
        return None
    compared = numbers.compared("stored", numbers.best, name)
    shuffled = numbers.rows.get("shuffled batches")
    if name != "batches" or shuffled is None or not _is_moved_by_shuffling(numbers):
        return Verdict(
            name="small-batch-noise",
            message="only the statistics of small batches do well: the network has learnt with "
            "their noise, and no running statistics can stand in for it",
            evidence=(compared,),
            advice="train on with larger batches, or with another norm in place of BN",
            next_step=_SWAP,
        )
    return Verdict(
        name="correlated-batches",
        message="only the statistics of each batch do well, and only in the order in which "
        "the batches come: they are sorted or grouped, and BN has learnt to rely on it",
        evidence=(compared, _shuffling(numbers.rows["batches"], shuffled)),
        advice="shuffle the training data and train on: no running statistics can stand in",
        next_step=_SHUFFLE,
    )


def sorted_training(numbers: Numbers) -> Verdict | None:
    """Training batches that are sorted, and stored statistics that are those of such batches."""
    training = numbers.training
    if training is None or training.order is None or not training.is_sorted:
        return None
    if not training.is_stored:
        return None
    order, flipped = training.order, training.flipped_share
    moved = f"changes the outputs by {training.change:.3g} σ"
    return Verdict(
        name="correlated-batches",
        message="the network was trained on batches that are sorted or grouped: it relies on what "
        "a batch has in common, and its statistics describe no data that ever were",
        evidence=(
            f"training batches differ {order.variance_ratio:.3g} times as much as independent "
            f"samples (limit {order.limit:.2g})",
            "shuffling them "
            + (moved if flipped is None else f"flips {flipped:.1%} of their predictions"),
            numbers.compared("stored", "reference"),
        ),
        advice="shuffle the training data and train on; recalibrate then",
        next_step=_SHUFFLE,
        cured_by="reference" if numbers.is_cured_by_training else None,
    )


def other_preprocessing(numbers: Numbers) -> Verdict | None:
    """Training and evaluation data alike miss the stored statistics, and only at the input."""
    if not (numbers.is_cured_by_training and numbers.is_off_at_input_alone):
        return None
    if numbers.training is None or numbers.training.is_stored:
        return None
    return Verdict(
        name="other-preprocessing",
        message="the training data and the evaluation data both miss the stored statistics at the "
        "first BN layer, and later layers fit once that is set right: the first suspicion is that "
        "both loaders prepare the data otherwise than training did (scale, offset, order of the "
        "channels, normalisation)",
        evidence=(
            numbers.compared("stored", "reference"),
            *_input_drift(numbers),
            _drifts(numbers),
        ),
        advice="compare what the loaders yield with what training was given; recalibrating would "
        "hide a wrong preprocessing, and is right only where the weights before that layer have "
        "changed",
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
            f"log-variance ratio of the stored statistics to those of training batches "
            f"{training.from_batches:.2g} (by noise {training.from_batches_by_noise:.2g})",
        ),
        advice="recalibrate on training data; larger batches, or another norm, cure it for good",
        next_step=_RECALIBRATE,
        cured_by="reference",
    )


def stale_statistics(numbers: Numbers) -> Verdict | None:
    """Statistics of training data do better: the stored ones are not those of these weights."""
    if numbers.is_cured_by_training:
        message = (
            "the running statistics are not those of the weights: averaged, loaded or pruned "
            "weights, fast ones that the running average lags behind, or updates by other data "
            "than those of training"
        )
    elif numbers.training is None and numbers.is_harmed and numbers.has_known_input:
        message = (
            "data arrive at the first BN layer as they did in training, and the statistics of "
            "later layers are not those of the weights"
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
        advice="make the preprocessing the same; where the data themselves differ, adapt to them",
        next_step=_ADAPT,
        cured_by="evaluation",
    )


def unfit_statistics(numbers: Numbers) -> Verdict | None:
    """The stored statistics do not fit, and only training data can tell why."""
    if numbers.training is not None or not numbers.is_harmed:
        return None
    return Verdict(
        name="unfit-statistics",
        message="the running statistics do not fit the evaluation data: "
        + (
            "at the first BN layer, and later ones fit once that is set right; the first suspicion "
            "is a preprocessing that is not that of training"
            if numbers.is_off_at_input_alone
            else "either they are stale, or the data differ from those of training"
        ),
        evidence=(numbers.compared("stored", "evaluation"), *_input_drift(numbers)),
        advice="give the training data as reference=, which tells the two apart",
        next_step=_DIAGNOSE_WITH_REFERENCE,
        cured_by="evaluation",
    )


def poor_weights(numbers: Numbers) -> Verdict | None:
    """All statistics do equally badly, by what the user expects."""
    expected, best = numbers.expected_score, numbers.rows[numbers.best].score
    if expected is None or best is None or best >= expected:
        return None
    return Verdict(
        name="weights",
        message="no statistics bring the score that is expected: the weights are to blame, the "
        "data or their labels, and not BN",
        evidence=(
            f"best score {best:.4g} (expected {expected:.4g})",
            numbers.compared("stored", numbers.fresh, "evaluation"),
            *(_input_drift(numbers) if numbers.is_off_training or numbers.is_off_stored else ()),
        ),
        advice="diagnose it on training data: that tells a fault of training from overfitting",
        next_step=_DIAGNOSE_TRAINING,
    )


def harmless(numbers: Numbers) -> Verdict | None:
    """Something is off, and other statistics do no better on these data."""
    is_unconverged = numbers.initial_weight > MAX_INITIAL_WEIGHT
    # What is left of the initial statistics explains how far these are off.
    is_off_stored = numbers.is_off_stored and not is_unconverged
    found = []
    if is_unconverged:
        found.append(
            "the running statistics still hold a part of the initial mean 0 and variance 1"
        )
    if numbers.is_off_training and is_off_stored:
        found.append(
            "the first BN layer gets other values from the evaluation data than from the training "
            "data, and than its statistics say"
        )
    elif numbers.is_off_training:
        found.append(
            "the first BN layer gets other values from the training data than from the evaluation "
            "data, which its statistics fit"
        )
    elif is_off_stored:
        found.append("the first BN layer gets other values from these data than its statistics say")
    if not found:
        return None
    is_off = numbers.is_off_training or is_off_stored
    loaders = ("loader",) if numbers.training is None else ("loader", "train_loader")
    return Verdict(
        name="harmless",
        message=f"{'; '.join(found)}. {_no_better(numbers).capitalize()}",
        evidence=(
            *((_initial_weight(numbers),) if is_unconverged else ()),
            *(_input_drift(numbers) if numbers.is_off_training or numbers.is_off_stored else ()),
            numbers.compared("stored", numbers.fresh, "evaluation"),
        ),
        is_fault=False,
        advice="compare what the loaders yield with what training was given, before these data are "
        "used to recalibrate"
        if is_off
        else "recalibrate all the same: other data may need it",
        next_step=_look_at(*loaders) if is_off else _RECALIBRATE,
    )


def no_fault(numbers: Numbers) -> Verdict:
    """No other statistics do better."""
    return Verdict(
        name="none",
        message=_no_better(numbers),
        evidence=(numbers.compared("stored", numbers.fresh, "evaluation"),),
        is_fault=False,
        advice="where it does badly, look at weights, data and labels; BN can be watched when it "
        "is trained next",
        next_step=_WATCH,
    )


CAUSES: tuple[Callable[[Numbers], Verdict | None], ...] = (
    poisoned_statistics,
    unconverged_statistics,
    batches_alone,
    sorted_training,
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


def _is_chance(numbers: Numbers) -> bool:
    """Return whether the data look alike, and chance explains what other statistics gain."""
    scores = [numbers.rows[name].score for name in ("reference", numbers.best)]
    if not all(score is not None and 0.0 <= score <= 1.0 for score in scores):
        return False
    gained = numbers.gain("reference", numbers.best)
    return numbers.has_known_input and gained <= numbers.chance("reference")


def _no_better(numbers: Numbers) -> str:
    """Return that no other statistics do better, and by how much they would have to."""
    if numbers.rows["stored"].score is None or numbers.rows[numbers.best].score is None:
        return "no other statistics change the outputs by more than they do in healthy networks"
    if numbers.gain("stored", numbers.best) <= 0.0:
        return "no other statistics do better than the stored ones"
    return (
        "no other statistics do better than the stored ones by more than chance "
        f"(±{numbers.tolerance:.2g} on {numbers.samples} samples)"
    )


def _input_drift(numbers: Numbers) -> tuple[str, ...]:
    """Return how far evaluation data are off at the first BN layer, as the table has it."""
    limits = {"stored": MAX_STORED_DRIFT, "reference": MAX_INPUT_DRIFT}
    rows = [numbers.rows[name] for name in limits if name in numbers.rows]
    drifts = [
        f"{_figure(row.input_drift)} {row.label} (limit {limits[row.name]})"
        for row in rows
        if row.input_drift is not None
    ]
    if not drifts:
        return ()
    return (f"drift at the first BN layer, evaluation data: {', '.join(drifts)}",)


def _drifts(numbers: Numbers) -> str:
    first, *later = numbers.drifts
    most = f", of later ones at most {_figure(max(later))}" if later else ""
    return (
        "drift of training data from the stored statistics, where those of the layers before are "
        f"right: of the first BN layer {_figure(first)}{most}"
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


def _is_moved_by_shuffling(numbers: Numbers) -> bool:
    row, shuffled = numbers.rows["batches"], numbers.rows["shuffled batches"]
    flipped = (row.flipped_share or 0.0) - (shuffled.flipped_share or 0.0)
    return is_harmful(row.change - shuffled.change, flipped)


def _shuffling(row: Row, shuffled: Row) -> str:
    if row.flipped_share is None or shuffled.flipped_share is None:
        return f"outputs changed: {row.change:.3g} σ as they come, {shuffled.change:.3g} σ shuffled"
    return (
        f"predictions flipped: {row.flipped_share:.1%} as they come, "
        f"{shuffled.flipped_share:.1%} shuffled"
    )
