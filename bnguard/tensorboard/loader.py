"""Loads the tab when TensorBoard starts: must be quick, and must not fail."""

from __future__ import annotations

import argparse
import logging

from tensorboard.plugins import base_plugin

_PLUGIN_NAME = "bnguard"

# TensorBoard keeps 10 or 100 steps a tag, by default and by loader.
_STEPS_KEPT = 2000

logger = logging.getLogger("bnguard")


class BatchNormLoader(base_plugin.TBLoader):  # type: ignore[misc]
    """Loads the BatchNorm tab into TensorBoard."""

    def fix_flags(self, flags: argparse.Namespace) -> None:
        """Let TensorBoard keep enough steps for a plot, unless the user set a number."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(_PLUGIN_NAME, _STEPS_KEPT)

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin | None:
        """Return the plugin, or None if it fails to load: TensorBoard continues without it."""
        try:
            from bnguard.tensorboard.plugin import BatchNormPlugin

            return BatchNormPlugin(context)
        except Exception as error:
            logger.warning("bnguard: no BatchNorm tab, because loading it failed: %s", error)
            return None
