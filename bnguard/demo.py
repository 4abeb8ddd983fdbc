"""A small network with a fault to find, and the handwritten digits of scikit-learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from bnguard.gallery import load_digits
from bnguard.lightning.framework import LightningDataModule, LightningModule

Batch = tuple[Tensor, Tensor]


class DigitsNet(LightningModule):
    """A convolutional network for 8x8 digits with seven BN layers.

    Args:
        width: Channels of the first block; they double three times.
        momentum: Momentum of the BN layers. The default is the fault of the demo: meant to smooth
            the noise of small batches, it takes 598 updates to forget the initial statistics.
        lr: Learning rate of SGD with momentum 0.9.
    """

    def __init__(self, width: int = 16, momentum: float = 0.005, lr: float = 0.005) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        blocks: list[nn.Module] = [_block(1, width, 1, momentum)]
        for stage in range(3):
            channels = width * 2**stage
            blocks += [
                _block(channels, 2 * channels, 2, momentum),
                _block(2 * channels, 2 * channels, 1, momentum),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores, shape ``(N, 10)``, for images of shape ``(N, 1, 8, 8)``."""
        scores: Tensor = self.classifier(self.features(images).flatten(1))
        return scores

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch, and log it with the accuracy."""
        return self._log_step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log cross-entropy and accuracy of a batch."""
        self._log_step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum 0.9."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def _log_step(self, batch: Batch, stage: str) -> Tensor:
        images, labels = batch
        scores = self(images)
        loss = F.cross_entropy(scores, labels)
        accuracy = (scores.argmax(1) == labels).float().mean()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_accuracy": accuracy}, on_epoch=True)
        return loss


class DigitsData(LightningDataModule):
    """Handwritten digits, 8x8 pixels: 1,200 to train in batches of a size, 597 to validate."""

    def __init__(self, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Load the digits and split them by the seed; needs scikit-learn."""
        dataset = TensorDataset(*load_digits())
        generator = torch.Generator().manual_seed(self.seed)
        self.train, self.val = random_split(dataset, [1200, 597], generator)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training digits, shuffled, without the last, smaller batch."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation digits."""
        return DataLoader(self.val, 128)


def _block(inputs: int, outputs: int, stride: int, momentum: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs, momentum=momentum),
        nn.ReLU(),
    )
