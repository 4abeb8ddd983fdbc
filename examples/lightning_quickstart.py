"""Add the callback to a Lightning Trainer, and repair what it finds.

python examples/lightning_quickstart.py
"""

import tempfile

from pytorch_lightning import Trainer, seed_everything

import bnguard
from bnguard.demo import DigitsData, DigitsNet
from bnguard.lightning import BatchNormMonitor


def main() -> None:
    seed_everything(0)
    model, data = DigitsNet(), DigitsData(batch_size=16)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=3,
            callbacks=[BatchNormMonitor()],  # the only line to add
            default_root_dir=folder,
            accelerator="cpu",
        )
        trainer.fit(model, data)
        trainer.validate(model, data)

        # The repair that the report proposes: new running statistics from training images.
        print(bnguard.recalibrate(model, data.train_dataloader()))
        trainer.validate(model, data)


if __name__ == "__main__":
    main()
