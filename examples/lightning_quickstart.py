"""Learn to watch a Lightning Trainer with one callback, and to repair what it finds.

pip install lightning            (or import from pytorch_lightning, which bnguard installs)
python examples/lightning_quickstart.py
"""

import tempfile

from lightning.pytorch import Trainer, seed_everything

import bnguard
from bnguard.demo import DigitsData, DigitsNet
from bnguard.lightning import BatchNormMonitor


def main() -> None:
    seed_everything(0)
    model, data = DigitsNet(), DigitsData(batch_size=16)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=2,
            callbacks=[BatchNormMonitor()],  # the only line to add
            default_root_dir=folder,
            accelerator="cpu",
        )
        trainer.fit(model, data)
        (before,) = trainer.validate(model, data, verbose=False)

        # The repair that the report proposes: new running statistics from training images.
        print(bnguard.recalibrate(model, data.train_dataloader()))
        (after,) = trainer.validate(model, data, verbose=False)
    accuracies = [metrics["val_accuracy"] for metrics in (before, after)]
    print("bnguard · accuracy in eval mode {:.1%} → {:.1%}".format(*accuracies))


if __name__ == "__main__":
    main()
