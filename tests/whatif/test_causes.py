"""Which cause the numbers name, on numbers made for it."""

import dataclasses
import math

import pytest

from bnguard.whatif.causes import reach_verdict
from bnguard.whatif.evidence import Dropout, Numbers, Training
from bnguard.whatif.result import Row
from bnguard.whatif.samples import BatchOrder

SHUFFLED = BatchOrder(variance_ratio=1.0, batches=32)
SORTED = BatchOrder(variance_ratio=50.0, batches=32)


def row(name, score, change=None, flipped=None):
    far = math.inf if math.isnan(score) else 1.0 - score
    return Row(
        name=name,
        label=name,
        score=score,
        change=far if change is None else change,
        flipped_share=far if flipped is None else flipped,
    )


def training(order=SHUFFLED, data=1.0, batches=1.0, noise=0.01, flipped=None):
    return Training(
        batch_size=32,
        order=order,
        change=flipped,
        flipped_share=flipped,
        from_data=data,
        from_batches=batches,
        from_batches_by_noise=noise,
    )


def numbers(
    stored,
    reference,
    evaluation,
    batches=0.95,
    told=None,
    input_drift=None,
    stored_drift=None,
    **changes,
):
    scores = {"stored": stored, "reference": reference, "evaluation": evaluation}
    scores["averaged"] = stored if reference is not None else None
    rows = {name: row(name, score) for name, score in scores.items() if score is not None}
    drifts = {"stored": stored_drift, "reference": input_drift}
    for name in drifts.keys() & rows.keys():
        rows[name] = dataclasses.replace(rows[name], input_drift=drifts[name])
    rows |= {"batches": row("batches", batches), "batches of 2": row("batches of 2", batches / 2)}
    rows["shuffled batches"] = Row(name="shuffled batches", label="shuffled", change=0.05)
    told = None if reference is None else told or training()
    return Numbers(rows=rows, samples=1000, training=told, **changes)


def test_statistics_that_were_lost_are_told_from_those_with_too_few_updates():
    few = reach_verdict(numbers(0.6, 0.95, 0.95, initial_weight=0.3))
    lost = reach_verdict(numbers(0.6, 0.95, 0.95, initial_weight=1.0, untouched=("a", "b")))
    assert few.name == lost.name == "unconverged-statistics"
    assert "momentum" in few.message
    assert "momentum" not in lost.message + lost.advice
    assert lost.evidence[0] == "initial: a and 1 more"


@pytest.mark.parametrize(
    ("given", "name", "cured_by"),
    [
        (numbers(0.95, 0.95, 0.95), "none", None),
        (numbers(0.2, 0.2, 0.2, 0.2), "none", None),
        (numbers(0.2, 0.2, 0.2, 0.2, expected_score=0.9), "weights", None),
        (numbers(0.95, 0.95, 0.95, expected_score=0.9), "none", None),
        (numbers(0.94, 0.95, 0.945), "none", None),
        (numbers(0.6, 0.95, 0.95), "stale-statistics", "reference"),
        (numbers(math.nan, 0.95, 0.95), "stale-statistics", "reference"),
        (numbers(0.6, 0.95, 0.95, initial_weight=0.3), "unconverged-statistics", "reference"),
        (numbers(0.95, 0.95, 0.95, initial_weight=0.3), "harmless", None),
        (numbers(0.95, 0.95, 0.95, input_drift=2.0), "harmless", None),
        (numbers(0.95, 0.95, 0.95, stored_drift=2.0), "harmless", None),
        (numbers(0.95, 0.3, 0.95, input_drift=2.0, stored_drift=0.1), "harmless", None),
        (numbers(0.95, None, 0.95, stored_drift=2.0), "harmless", None),
        (numbers(0.95, None, 0.95, stored_drift=0.4), "none", None),
        (numbers(0.3, 0.95, 0.95, drifts=(4.0, 0.1, 0.2)), "other-preprocessing", None),
        (numbers(0.3, 0.95, 0.95, drifts=(1.5, 2.0, 1.4)), "stale-statistics", "reference"),
        (numbers(0.3, 0.95, 0.95, drifts=(0.4, 0.1)), "stale-statistics", "reference"),
        (
            numbers(0.3, None, 0.95, drifts=(4.0, 0.1), stored_drift=4.0),
            "unfit-statistics",
            "evaluation",
        ),
        (numbers(0.6, 0.95, 0.95, poisoned=("bn",)), "poisoned-statistics", "reference"),
        (numbers(0.6, 0.6, 0.95), "data-shift", "evaluation"),
        (numbers(0.6, 0.55, 0.95, initial_weight=0.3), "data-shift", "evaluation"),
        (numbers(0.6, 0.7, 0.95), "data-shift", "evaluation"),
        (numbers(0.77, 0.775, 0.81, 0.8, input_drift=0.05), "none", None),
        (numbers(0.77, 0.775, 0.81, 0.8, input_drift=2.0), "data-shift", "evaluation"),
        (numbers(0.6, 0.6, 0.95, input_drift=0.05), "data-shift", "evaluation"),
        (numbers(0.6, 0.9, 0.95), "stale-statistics", "reference"),
        (numbers(0.6, None, 0.95), "unfit-statistics", "evaluation"),
        (numbers(0.6, None, 0.95, stored_drift=2.0), "unfit-statistics", "evaluation"),
        (numbers(0.6, None, 0.95, stored_drift=0.05), "stale-statistics", "evaluation"),
        (numbers(0.6, None, 0.95, initial_weight=0.3), "unconverged-statistics", "evaluation"),
        (numbers(0.3, 0.5, 0.5, 0.95), "small-batch-noise", None),
        (
            numbers(0.3, 0.9, 0.9, told=training(batches=0.9, noise=0.5)),
            "small-batch-noise",
            "reference",
        ),
        (numbers(0.95, 0.95, 0.95, told=training(SORTED, flipped=0.6)), "none", None),
        (
            numbers(0.3, 0.5, 0.5, 0.5, told=training(SORTED, batches=0.1, flipped=0.6)),
            "correlated-batches",
            "reference",
        ),
        (
            numbers(0.5, 0.5, 0.5, 0.5, told=training(SORTED, batches=0.1, flipped=0.6)),
            "correlated-batches",
            None,
        ),
    ],
)
def test_the_numbers_name_the_cause(given, name, cured_by):
    cause = reach_verdict(given)
    assert (cause.name, cause.cured_by) == (name, cured_by)
    assert cause.is_fault is (name not in {"none", "harmless"})
    assert cause.evidence
    assert cause.advice
    assert cause.next_step


def test_batches_that_do_well_only_as_they_come_are_correlated():
    given = numbers(0.3, 0.5, 0.5, 0.95)
    rows = dict(given.rows)
    rows["batches"] = row("batches", 0.95, change=0.9, flipped=0.5)
    rows["shuffled batches"] = Row(
        name="shuffled batches", label="shuffled", change=0.05, flipped_share=0.01
    )
    cause = reach_verdict(Numbers(rows=rows, samples=1000, training=training()))
    assert cause.name == "correlated-batches"


def test_parts_of_correlated_batches_that_do_a_little_better_do_not_hide_them():
    given = numbers(0.3, 0.5, 0.5, 0.95)
    rows = dict(given.rows)
    rows["batches"] = row("batches", 0.95, change=0.9, flipped=0.5)
    rows["batches of 32"] = row("batches of 32", 0.96, change=0.9, flipped=0.5)
    rows["shuffled batches"] = Row(
        name="shuffled batches", label="shuffled", change=0.05, flipped_share=0.01
    )
    cause = reach_verdict(Numbers(rows=rows, samples=1000, training=training()))
    assert cause.name == "correlated-batches"


@pytest.mark.parametrize(
    ("scores", "is_better"),
    [
        ((0.94, 0.95, 0.945), True),
        ((0.94, 0.94, 0.94, 0.945), True),
        ((0.94, 0.9, 0.9, 0.9), False),
    ],
    ids=["of the running statistics", "of each batch", "none is better"],
)
def test_a_better_score_in_the_table_is_said_to_be_chance(scores, is_better):
    cause = reach_verdict(numbers(*scores))
    assert cause.name == "none"
    assert ("by more than chance (±" in cause.message) is is_better


def test_samples_of_a_batch_that_are_alike_are_not_the_noise_of_small_batches():
    given = numbers(0.3, 0.5, 0.5, 0.95)
    assert reach_verdict(given).name == "small-batch-noise"
    shuffled = dataclasses.replace(given, orders={"batches": SHUFFLED})
    assert reach_verdict(shuffled).name == "small-batch-noise"
    alike = dataclasses.replace(given, orders={"batches": SORTED})
    assert reach_verdict(alike).name == "correlated-batches"


def test_large_batches_that_do_well_alone_are_not_taken_for_noisy():
    assert reach_verdict(numbers(0.4, None, 0.4, batch_size=16)).name == "small-batch-noise"
    verdict = reach_verdict(numbers(0.4, None, 0.4, batch_size=64))
    assert verdict.name == "correlated-batches"
    assert "several streams" in verdict.message


@pytest.mark.parametrize(
    ("stored", "active", "name"),
    [(0.3, 0.1, "dropout-before-bn"), (0.3, 0.9, "other-preprocessing"), (0.95, 0.1, "harmless")],
)
def test_dropout_is_named_if_the_stored_statistics_are_those_with_it(stored, active, name):
    dropout = Dropout("Dropout", active, 1.0)
    given = numbers(stored, 0.95, 0.95, dropout=dropout, drifts=(4.0, 0.1), stored_drift=4.0)
    cause = reach_verdict(given)
    assert cause.name == name
    assert ("Dropout" in cause.message) is (active < 0.5)


@pytest.mark.parametrize(
    ("change", "flipped", "name"),
    [
        (0.2, 0.2, "none"),
        (0.3, 0.02, "none"),
        (0.3, 0.2, "stale-statistics"),
        (0.8, 0.02, "stale-statistics"),
        (math.inf, None, "stale-statistics"),
        (0.8, None, "stale-statistics"),
        (0.3, None, "none"),
    ],
)
def test_without_a_score_the_outputs_tell(change, flipped, name):
    rows = {
        "stored": Row(name="stored", label="a", change=change, flipped_share=flipped),
        "reference": Row(name="reference", label="b", change=0.01, flipped_share=0.0),
        "averaged": Row(name="averaged", label="c", change=0.01, flipped_share=0.0),
        "evaluation": Row(name="evaluation", label="d", change=0.0, flipped_share=0.0),
    }
    cause = reach_verdict(Numbers(rows=rows, samples=100, training=training()))
    assert cause.name == name
