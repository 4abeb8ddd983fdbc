"""Every situation: healthy code is not accused, the cause comes first, and the fix works."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

import pytest
import torch

from tests.field import (
    adapted_at_test_time,
    augmentation_per_batch,
    averaged_point_of_schedule_free,
    key_encoder_in_train_mode,
    teacher_on_noise,
    train_forgotten_mid_epoch,
)
from tests.field.situation import LEAST_HARM, LEAST_SHARE_BACK, judge, situations

SITUATIONS = dict(situations())

pytestmark = pytest.mark.filterwarnings("ignore")


def _cases() -> Iterator[object]:
    for name, situation in SITUATIONS.items():
        reason = situation.expected_failure
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        yield pytest.param(name, marks=marks, id=name)


@pytest.mark.parametrize("name", list(_cases()))
def test_a_situation_is_judged_rightly(name):
    verdict = judge(SITUATIONS[name])
    assert verdict.healthy.accusations == ()
    assert verdict.healthy.announced == ()
    if verdict.faulty is not None:
        assert verdict.harm >= LEAST_HARM
        assert verdict.faulty.accusations[:1] == (verdict.cause,)
    if verdict.share_back is not None:
        assert verdict.share_back >= LEAST_SHARE_BACK


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_situation_names_its_public_source(name):
    docstring = importlib.import_module(f"tests.field.{name}").__doc__
    assert re.search(r"[\w.-]+/[\w.-]+#\d+", docstring)


def test_a_forgotten_train_after_a_validation_in_mid_epoch_is_named():
    torch.manual_seed(0)
    assert train_forgotten_mid_epoch.named().accusations[:1] == ("BN209",)


@pytest.mark.parametrize("augmentation", ["scale", "erased_square", "shift"])
def test_an_augmentation_of_whole_batches_is_not_accused_and_sorted_data_are(augmentation):
    augment = getattr(augmentation_per_batch, augmentation)
    torch.manual_seed(0)
    healthy = augmentation_per_batch.train(augment)
    assert healthy.accusations == healthy.announced == ()
    assert augmentation_per_batch.train(augment, is_sorted=True).accusations[:1] == ("BN203",)


def test_a_key_encoder_called_with_gradients_is_not_accused():
    torch.manual_seed(0)
    run = key_encoder_in_train_mode.learn(is_called_with_gradients=True)
    assert run.accusations == run.announced == ()


@pytest.mark.parametrize(
    "variant",
    [
        {"is_watched_first": True},
        {"drops_buffers": False},
        {"drops_buffers": False, "learns": False},
    ],
)
def test_an_adaptation_to_the_data_of_the_test_is_not_accused(variant):
    run = adapted_at_test_time.adapt(**variant)
    assert run.accusations == run.announced == ()


def test_a_key_encoder_that_runs_first_in_a_step_does_not_belong_to_the_evaluation_before():
    torch.manual_seed(0)
    run = key_encoder_in_train_mode.learn(reports=False)
    assert run.accusations == run.announced == ()


def test_the_evaluation_of_a_teacher_alone_is_noticed():
    torch.manual_seed(0)
    run = teacher_on_noise.distil(is_in_eval_mode=False, reports=False)
    assert run.accusations[:1] == ("BN101",)


@pytest.mark.parametrize("warms_up", [False, True])
def test_averaged_weights_are_judged_though_they_are_exchanged_again(warms_up):
    torch.manual_seed(0)
    run = averaged_point_of_schedule_free.train(warms_up=warms_up, reports=False)
    assert run.accusations[:1] == (() if warms_up else ("BN304",))
