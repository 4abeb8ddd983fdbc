"""Trainings of a BN network with real Trainers, whose findings are known."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network():
    """Its momentum is so small that the statistics do not converge: BN303 fires."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, momentum=0.001), nn.Linear(8, 2)
    )


def samples():
    inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(1)) * 2 + 5
    return TensorDataset(inputs, (inputs.sum(1) > 30).long())


def fit(lightning, logger, *callbacks, poison_at=None, **options):
    """Train for two epochs of six batches; a batch of NaN poisons the statistics: BN402 fires."""

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def training_step(self, batch, batch_idx):
            if self.global_step == poison_at:
                self.layers(torch.full_like(batch[0], torch.nan))
            loss = F.cross_entropy(self.layers(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.layers(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=logger,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=2,
        **options,
    )
    loader = DataLoader(samples(), 8)
    trainer.fit(Net(), loader, loader)
    return trainer


class Model(nn.Module):
    """The same network as Hugging Face's ``Trainer`` calls it."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, inputs, labels):
        logits = self.layers(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train_with_hugging_face(transformers, folder, callback, **options):
    """Train for twelve steps, evaluated twice."""
    data = [{"inputs": inputs, "labels": label} for inputs, label in samples()]
    trainer = transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=12,
            per_device_train_batch_size=8,
            eval_strategy="steps",
            eval_steps=6,
            logging_steps=2,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        ),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback],
    )
    trainer.train()
