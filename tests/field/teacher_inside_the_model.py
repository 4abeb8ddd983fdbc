"""The teacher of lucidrains/byol-pytorch and others is a part of the module: pytorch/ignite#2590.

As in teacher_without_buffers, with student and teacher in one module that is watched.
"""

from __future__ import annotations

from tests.field.teacher_without_buffers import situation

SITUATION = situation(is_part=True)
