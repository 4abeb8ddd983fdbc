"""Learn to watch the Trainer of Hugging Face transformers: one callback. Nothing is downloaded.

pip install transformers accelerate
python examples/huggingface_trainer.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Subset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from bnguard.transformers import BatchNormCallback


def digits() -> list[dict[str, torch.Tensor]]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return [
        {"pixel_values": image.repeat_interleave(4, 1).repeat_interleave(4, 2), "labels": label}
        for image, label in zip(images, torch.tensor(data.target), strict=True)
    ]


def main() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10,
        layer_type="basic",
    )  # fmt: skip
    samples = digits()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=ResNetForImageClassification(config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=30,
                learning_rate=5e-3,  # the default suits large pretrained networks
                per_device_train_batch_size=32,
                eval_strategy="steps",
                eval_steps=15,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Subset(samples, range(1200)),
            eval_dataset=Subset(samples, range(1200, 1500)),
            callbacks=[BatchNormCallback()],  # the only line to add
        )
        trainer.train()


if __name__ == "__main__":
    main()
