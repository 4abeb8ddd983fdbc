"""The work of ``bnguard demo``: train into a fault, repair the checkpoint, and measure both."""

from __future__ import annotations

import shlex
from pathlib import Path

import rich
import torch

from bnguard.cli import recalibrate
from bnguard.cli.output import UNLIMITED_WIDTH
from bnguard.demo import DigitsData, DigitsNet
from bnguard.lightning import BatchNormMonitor
from bnguard.lightning.framework import Trainer, package_of


def tell_story(folder: Path, seed: int) -> None:
    """Train, name, repair and prove, and print each as it is done."""
    # The network is so small that a second thread costs more than it brings.
    torch.set_num_threads(1)
    console = rich.get_console()
    if not console.is_terminal:
        console.width = UNLIMITED_WIDTH
    lightning = package_of(None)
    lightning.seed_everything(seed, verbose=False)
    net, data = DigitsNet(), DigitsData()

    _title("1. Train: handwritten digits, batches of 16, BN momentum 0.005, 3 epochs")
    logger = lightning.loggers.TensorBoardLogger(folder, name="logs")
    checkpoint = folder / f"digits-{logger.version}.ckpt"
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[
            BatchNormMonitor(),
            lightning.callbacks.ModelCheckpoint(folder, checkpoint.stem),
        ],
        logger=logger,
        log_every_n_steps=25,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, data)

    _title("2. Repair the checkpoint with the training images; no label is read")
    command = [
        "recalibrate",
        str(checkpoint),
        *("--model", "bnguard.demo.DigitsNet"),
        *("--data", "bnguard.demo.DigitsData"),
        *("--split", "train"),
    ]
    print(f"$ bnguard {shlex.join(command)}")
    recalibrate.run(command[1:])
    repaired = checkpoint.with_stem(f"{checkpoint.stem}-recalibrated")

    _title("3. Prove it on the 597 validation images, which neither step has used")
    before, after = (_accuracy(path) for path in (checkpoint, repaired))
    rich.print(f"accuracy in eval mode: {before:.1%} before, [bold]{after:.1%}[/bold] after")

    _title("What to do next")
    print(f"tensorboard --logdir {folder / 'logs'}")
    print(f"bnguard inspect {checkpoint}")
    print("bnguard explain BN303")
    print("and in your own code: Trainer(callbacks=[bnguard.lightning.BatchNormMonitor()])")


def _accuracy(checkpoint: Path) -> float:
    """Return the accuracy of a checkpoint on the validation data, by the Trainer's own loop."""
    net = DigitsNet.load_from_checkpoint(checkpoint, weights_only=True)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    (metrics,) = trainer.validate(net, DigitsData(), verbose=False)
    return metrics["val_accuracy"]


def _title(text: str) -> None:
    rich.print(f"\n[bold]{text}[/bold]")
