"""``bnguard demo``: train into a fault, repair it, and measure both."""

from __future__ import annotations

import shlex
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from bnguard.cli import recalibrate
from bnguard.cli.output import command_parser, output, say, show
from bnguard.errors import ConfigurationError

if TYPE_CHECKING:
    from bnguard.report import Report

_EXAMPLES = """
examples:
  bnguard demo
  bnguard demo --output digits --seed 1
  bnguard demo --list
  bnguard demo --fault frozen-backbone --picture frozen.png
"""


def run(arguments: list[str]) -> int:
    """Train a small network into a BN fault, name it, repair it, and measure both."""
    values = make_parser().parse_args(arguments)
    if values.list:
        _list_faults()
        return 0
    if values.fault is not None:
        _demonstrate(values.fault, values.seed, values.picture)
        return 0
    if values.picture is not None:
        raise ConfigurationError("--picture draws the report of a fault: name one with --fault")
    folder = Path(values.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output {folder} is a file: name a folder")
    # torch and Lightning are imported from here on.
    from bnguard.lightning.scoring import quiet_lightning

    # All of it is bnguard's own: what its Trainers print belongs to the story.
    with redirect_stdout(output()), quiet_lightning():
        _tell_story(folder, values.seed)
    return 0


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "demo",
        "Train a small network on handwritten digits into a BN fault, name it, "
        "repair the checkpoint, and measure both. --fault shows another fault. Takes some seconds.",
        _EXAMPLES,
    )
    parser.add_argument("--fault", type=str, metavar="NAME", help="train into a fault of --list")
    parser.add_argument(
        "--picture", type=str, metavar="FILE", help="draw the report of --fault: .png, .svg, .pdf"
    )
    parser.add_argument("--list", action="store_true", help="list the faults, and stop")
    parser.add_argument("--output", type=str, default="bnguard-demo", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and shuffling")
    return parser


def _list_faults() -> None:
    """Print a line per fault: name, code, mistake."""
    from rich.table import Table

    from bnguard.gallery import FAULTS

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, fault in FAULTS.items():
        table.add_row(f"[bold]{name}", fault.code, fault.sentence)
    show(table)


def _demonstrate(name: str, seed: int, picture: str | None) -> None:
    """Train with a fault, print what bnguard reports, repair it, and measure both."""
    import torch

    from bnguard.gallery import find_fault

    fault = find_fault(name)
    if picture is not None and not Path(picture).absolute().parent.is_dir():
        raise ConfigurationError(f"--picture {picture} cannot be written: its folder is missing")
    # The network is so small that a second thread costs more than it brings.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    _show_title(f"1. {fault.sentence}")
    run = fault.train()
    show(run.report)
    if picture is not None:
        _draw(run.report, picture)
    _show_title(f"2. Repair: {fault.repair}")
    after = fault.accuracy_after(run)
    show(f"accuracy in eval mode: {run.accuracy:.1%} before, [bold]{after:.1%}[/bold] after")
    say(f"\n$ bnguard explain {fault.code}")


def _draw(report: Report, file: str) -> None:
    try:
        report.plot().savefig(file)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--picture {file} cannot be written: {error}") from error
    say(f"drawn: {file}")


def _tell_story(folder: Path, seed: int) -> None:
    """Train, name, repair and prove, and print each as it is done."""
    import rich
    import torch

    from bnguard.demo import DigitsData, DigitsNet
    from bnguard.lightning import BatchNormMonitor
    from bnguard.lightning.framework import Trainer, package_of
    from bnguard.report.terminal import UNWRAPPED

    # The network is so small that a second thread costs more than it brings.
    torch.set_num_threads(1)
    console = rich.get_console()
    if not console.is_terminal:
        console.width = UNWRAPPED
    lightning = package_of(None)
    lightning.seed_everything(seed, verbose=False)
    net, data = DigitsNet(), DigitsData()
    make_trainer = partial(
        Trainer, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )

    _show_title("1. Train: handwritten digits, batches of 16, BN momentum 0.005, 3 epochs")
    logger = lightning.loggers.TensorBoardLogger(folder, name="logs")
    checkpoint = folder / f"digits-{logger.version}.ckpt"
    saving = lightning.callbacks.ModelCheckpoint(folder, checkpoint.stem)
    callbacks = [BatchNormMonitor(), saving]
    trainer = make_trainer(max_epochs=3, callbacks=callbacks, logger=logger, log_every_n_steps=25)
    trainer.fit(net, data)

    _show_title("2. Repair the checkpoint with the training images; no label is read")
    arguments = [str(checkpoint), "--model", "bnguard.demo.DigitsNet"]
    arguments += ["--data", "bnguard.demo.DigitsData", "--split", "train"]
    print(f"$ bnguard recalibrate {shlex.join(arguments)}")
    recalibrate.run(arguments)

    _show_title("3. Prove it on the 597 validation images, which neither step has used")
    accuracies = []
    for path in (checkpoint, checkpoint.with_stem(f"{checkpoint.stem}-recalibrated")):
        net = DigitsNet.load_from_checkpoint(path, weights_only=True)
        validator = make_trainer(logger=False, enable_checkpointing=False)
        (metrics,) = validator.validate(net, DigitsData(), verbose=False)
        accuracies.append(metrics["val_accuracy"])
    before, after = accuracies
    rich.print(f"accuracy in eval mode: {before:.1%} before, [bold]{after:.1%}[/bold] after")

    _show_title("What to do next")
    print(f"tensorboard --logdir {folder / 'logs'}")
    print(f"bnguard inspect {checkpoint}")
    print("bnguard explain BN303")
    print("and in your own code: Trainer(callbacks=[bnguard.lightning.BatchNormMonitor()])")


def _show_title(text: str) -> None:
    from rich.text import Text

    show(Text(f"\n{text}", "bold"))
