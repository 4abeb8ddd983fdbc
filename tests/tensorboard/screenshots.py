"""Takes the pictures of the README, of real runs: ``python -m tests.tensorboard.screenshots OUT``.

Needs scikit-learn, playwright and an installed Chromium; takes about a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests.tensorboard.browsing import Tab, chromium
from tests.tensorboard.digits import write_all
from tests.tensorboard.serving import tensorboard

RUN = "&p.bnguard.run=slow-momentum"
PICTURES = {
    "tab-light": (RUN, (1500, 1000), ""),
    "tab-dark": (RUN + "&p.bnguard.step=120", (1500, 1000), "dark-mode"),
    "tab-layer": (RUN + "&p.bnguard.step=120&p.bnguard.layer=layer3.1.bn1", (1500, 2100), ""),
    "tab-compare": (RUN + "&p.bnguard.compare=healthy", (1500, 1250), ""),
    "tab-narrow": (RUN, (460, 1400), ""),
}


def take(log: Path, out: Path) -> None:
    """Take every picture of a log that :func:`write_all` wrote."""
    out.mkdir(parents=True, exist_ok=True)
    with tensorboard(log) as server, chromium() as browser:
        server.wait_for_runs(3)
        for name, (link, size, theme) in PICTURES.items():
            tab = Tab(browser, server.url, link, size)
            tab.page.evaluate("theme => theme && document.body.classList.add(theme)", theme)
            tab.frame.locator(".verdict:not(:empty)").wait_for()
            tab.page.wait_for_timeout(500)
            tab.page.screenshot(path=out / f"{name}.png")
            tab.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder))
        take(Path(folder), Path(sys.argv[1]))
