"""Runs without any fault, by what is special about them, and the tuple of all."""

from __future__ import annotations

from tests.zoo.fault import Healthy
from tests.zoo.healthy.on_purpose import ON_PURPOSE
from tests.zoo.healthy.other_networks import OTHER_NETWORKS
from tests.zoo.healthy.other_training import OTHER_TRAINING
from tests.zoo.healthy.standard import STANDARD
from tests.zoo.healthy.under_lightning import UNDER_LIGHTNING

HEALTHY: tuple[Healthy, ...] = (
    *STANDARD,
    *ON_PURPOSE,
    *OTHER_NETWORKS,
    *OTHER_TRAINING,
    *UNDER_LIGHTNING,
)
