"""The callbacks in a real kernel of Jupyter, as in a notebook."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")

pytestmark = pytest.mark.filterwarnings("ignore")

SETUP = """
import logging, warnings
warnings.simplefilter("ignore")
import {package} as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from bnguard.lightning import BatchNormMonitor, BatchNormRecalibration

for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
torch.manual_seed(0)
inputs = torch.randn(48, 6) * 2 + 5
loader = DataLoader(TensorDataset(inputs, (inputs.sum(1) > 30).long()), 8)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, momentum=0.001), nn.Linear(8, 2)
        )

    def forward(self, inputs):
        return self.layers(inputs)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Interrupts(pl.Callback):
    batch = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            raise KeyboardInterrupt


def make_trainer(bar=None, **options):
    global monitor, repair, interrupts
    monitor, repair, interrupts = BatchNormMonitor(), BatchNormRecalibration(), Interrupts()
    callbacks = [monitor, repair, interrupts, *([] if bar is None else [bar])]
    return pl.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=callbacks, enable_progress_bar=bar is not None,
        enable_model_summary=False, default_root_dir="runs", **options,
    )


def hooks(module):
    return [hook for part in module.modules() for hook in part._forward_pre_hooks.values()]
"""


@pytest.fixture(scope="module", params=["pytorch_lightning", "lightning.pytorch"])
def kernel(request, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("notebook")
    running, client = manager.start_new_kernel(kernel_name="python3", cwd=str(folder))
    try:
        assert execute(client, SETUP.format(package=request.param)) == ("", [])
        yield client
    finally:
        client.stop_channels()
        running.shutdown_kernel(now=True)


def execute(client, code):
    """Run a cell; return the text of all its outputs, and the names of its errors."""
    texts, errors = [], []

    def note(message):
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            texts.append(content["text"])
        elif message["msg_type"] in ("display_data", "execute_result"):
            texts.append(content["data"]["text/plain"])
        elif message["msg_type"] == "error":
            errors.append(content["ename"])

    client.execute_interactive(code, output_hook=note, timeout=120)
    return re.sub(r"\x1b\[[\d;]*m", "", "".join(texts)), errors


@pytest.mark.parametrize(
    "bar", ["pl.callbacks.RichProgressBar()", "pl.callbacks.TQDMProgressBar()", "None"]
)
def test_each_line_appears_once_whichever_the_bar(kernel, bar):
    for _ in range(2):  # As when a cell is run again.
        cell = f"net = Net(); trainer = make_trainer({bar}); trainer.fit(net, loader, loader)"
        printed, errors = execute(kernel, cell)
        assert errors == []
        assert printed.count("bnguard · watching 1 BN layer") == 1
        assert printed.count("bnguard: warning: BN303 unconverged-statistics at layers.1") == 1
        assert printed.count("bnguard: 1 BN layer recalibrated on 48 samples") >= 1
        assert printed.count("bnguard: BN layers recalibrated 2 times before validation") == 1
        assert printed.count("bnguard · 1 BN layer · 12 steps") == 1
        assert execute(kernel, "print(monitor.is_off, repair.is_off, hooks(net))") == (
            "False False []\n",
            [],
        )


def test_an_interrupted_fit_is_reported_and_goes_on(kernel):
    execute(kernel, "net = Net(); trainer = make_trainer(); interrupts.batch = 3")
    printed, errors = execute(kernel, "trainer.fit(net, loader, loader)")
    assert errors == ["SystemExit"]  # Lightning's own.
    assert printed.count("bnguard · 1 BN layer · 3 steps") == 1
    assert execute(kernel, "print(hooks(net)); interrupts.batch = None") == ("[]\n", [])

    printed, errors = execute(kernel, "trainer.fit(net, loader, loader)")
    assert errors == []
    assert printed.count("bnguard · watching 1 BN layer") == 1
    assert printed.count("bnguard · 1 BN layer · 12 steps") == 1

    printed, errors = execute(
        kernel,
        "path = trainer.checkpoint_callback.best_model_path\n"
        "trainer = make_trainer(); trainer.fit_loop.max_epochs = 4\n"
        "net = Net(); trainer.fit(net, loader, loader, ckpt_path=path)\n"
        "print(monitor.is_off, repair.is_off, hooks(net))",
    )
    assert errors == []
    assert printed.endswith("False False []\n")
    # It was announced before, and the run is the same.
    assert printed.count("bnguard: warning: BN303") == 0
    assert printed.count("bnguard · 1 BN layer · ") == 1


def test_results_are_shown_as_html(kernel):
    execute(kernel, "net = Net(); trainer = make_trainer(); trainer.fit(net, loader, loader)")
    setup = "import bnguard, copy; fixed = copy.deepcopy(net).layers"
    assert execute(kernel, setup) == ("", [])
    for cell, text in {
        "monitor.report": "bnguard · 1 BN layer · 12 steps",
        "bnguard.inspect(fixed)": "bnguard · 1 BN layer",
        "bnguard.watch(fixed)": "bnguard · 1 BN layer",
        "bnguard.diagnose(fixed, loader)": "bnguard · 48 evaluation samples",
        "bnguard.recalibrate(fixed, loader)": "recalibrated · exact",
        "bnguard.swap(fixed, to='group')": "swapped (group)",
    }.items():
        (page,) = pages(kernel, cell)
        assert page.startswith("<pre")
        assert text in page, cell


def pages(client, code):
    """Run a cell; return the HTML that its last expression shows."""
    found = []

    def note(message):
        if message["msg_type"] == "execute_result":
            found.append(message["content"]["data"]["text/html"])

    client.execute_interactive(code, output_hook=note, timeout=120)
    return found
