"""A loader that does not shuffle a dataset sorted by class: xuyxu/Deep-Clustering-Network#2.

As in sorted_in_long_runs, with the loader given to the monitor: it says so at the first step.
"""

from __future__ import annotations

from tests.field.sorted_in_long_runs import situation

SITUATION = situation(has_loader=True)
