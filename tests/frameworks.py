"""Files that frameworks save: ``python -m tests.frameworks [NAME …]``.

Each framework trains a small network on handwritten digits for so few steps that the running
statistics are still partly initial (BN303), and saves it with its own saver. The file is
recalibrated, put in the place of the original, and read by the framework's own loader; the score is
the accuracy on digits that neither step has used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.foreign import Subject, main

# One epoch is 20 updates: with PyTorch's momentum of 0.1, 12 % of the initial statistics is left.
_FEW_UPDATES = frozenset({"BN303"})


def _digits(*, is_training: bool) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target)
    part = slice(0, 1280) if is_training else slice(1280, None)
    return images[part], labels[part]


def _loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*_digits(is_training=True)), batch_size=64)


def _accuracy(predict: Callable[[Tensor], Tensor]) -> float:
    images, labels = _digits(is_training=False)
    with torch.no_grad():
        return (predict(images).argmax(1) == labels).float().mean().item()


def digits_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def digits_data() -> Iterable[Tensor]:
    return list(_digits(is_training=True)[0].split(128))


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=0.01)


def _train(network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    for images, labels in _loader():
        optimizer.zero_grad()
        output = network(images)
        logits = output if isinstance(output, Tensor) else output.logits
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    return network


def timm_file(folder: str) -> Path:
    from timm.utils import CheckpointSaver

    network = timm_model()
    optimizer = _optimizer(network)
    _train(network, optimizer)
    saver = CheckpointSaver(network, optimizer, checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(0)
    return Path(folder, "last.pth.tar")


def timm_model() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=10, in_chans=1)


def timm_score(path: str) -> float:
    from timm.models import load_checkpoint

    network = timm_model()
    load_checkpoint(network, path)
    return _accuracy(network.eval())


def mmengine_model() -> nn.Module:
    from mmengine.model import BaseModel

    class Classifier(BaseModel):
        def __init__(self):
            super().__init__()
            self.network = digits_network()

        def forward(self, images, labels=None, mode="tensor"):
            logits = self.network(images)
            if mode == "tensor":
                return logits
            return {"loss": nn.functional.cross_entropy(logits, labels)}

    return Classifier()


def mmengine_file(folder: str) -> Path:
    from mmengine.runner import Runner

    Runner(
        model=mmengine_model(),
        work_dir=folder,
        train_dataloader=_loader(),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "Adam", "lr": 0.01}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        log_level="ERROR",
    ).train()
    return Path(folder, "epoch_1.pth")


def mmengine_score(path: str) -> float:
    from mmengine.runner import load_checkpoint

    network = mmengine_model()
    load_checkpoint(network, path, strict=True)
    return _accuracy(network.eval())


def ultralytics_file(folder: str) -> Path:
    from PIL import Image
    from ultralytics import YOLO

    for part, is_training in (("train", True), ("val", False)):
        for index, (image, label) in enumerate(zip(*_digits(is_training=is_training), strict=True)):
            path = Path(folder, "digits", part, str(int(label)), f"{index}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * image[0]).byte().numpy()).convert("RGB").save(path)
    YOLO("yolo11n-cls.yaml").train(
        data=str(Path(folder, "digits")),
        **{"epochs": 1, "imgsz": 32, "batch": 64, "device": "cpu", "workers": 0, "plots": False},
        project=folder,
        name="run",
        verbose=False,
    )
    return Path(folder, "run", "weights", "last.pt")


def ultralytics_model() -> nn.Module:
    from ultralytics.nn.tasks import ClassificationModel

    return ClassificationModel("yolo11n-cls.yaml", nc=10, verbose=False)


def _colour(images: Tensor) -> Tensor:
    return nn.functional.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1)


def ultralytics_data() -> Iterable[Tensor]:
    return [_colour(images) for images in digits_data()]


def ultralytics_score(path: str) -> float:
    from ultralytics import YOLO

    network = YOLO(path).model.float().eval()

    def predict(images: Tensor) -> Tensor:
        output = network(_colour(images))
        return output[0] if isinstance(output, tuple) else output

    return _accuracy(predict)


def _skorch() -> object:
    from skorch import NeuralNetClassifier

    return NeuralNetClassifier(
        digits_network(),
        **{"criterion": nn.CrossEntropyLoss, "optimizer": torch.optim.Adam, "lr": 0.01},
        **{"max_epochs": 1, "batch_size": 64, "train_split": None, "verbose": 0},
    )


def skorch_file(folder: str) -> Path:
    net = _skorch()
    net.fit(*_digits(is_training=True))
    path = Path(folder, "params.safetensors")
    net.save_params(f_params=path, use_safetensors=True)
    return path


def skorch_score(path: str) -> float:
    net = _skorch().initialize()
    net.load_params(f_params=path, use_safetensors=True)
    return _accuracy(lambda images: torch.from_numpy(net.predict_proba(images)))


def _brain(folder: Path) -> object:
    from speechbrain.core import Brain
    from speechbrain.utils.checkpoints import Checkpointer

    class Digits(Brain):
        def compute_forward(self, batch, stage):
            return self.modules.network(batch[0])

        def compute_objectives(self, predictions, batch, stage):
            return nn.functional.cross_entropy(predictions, batch[1])

    network = digits_network()
    return Digits(
        {"network": network},
        partial(torch.optim.Adam, lr=0.01),
        checkpointer=Checkpointer(folder, recoverables={"network": network}),
    )


def speechbrain_file(folder: str) -> Path:
    brain = _brain(Path(folder, "save"))
    brain.fit(range(1), _loader(), progressbar=False)
    brain.checkpointer.save_checkpoint(name="digits")
    return Path(folder, "save", "CKPT+digits", "network.ckpt")


def speechbrain_score(path: str) -> float:
    brain = _brain(Path(path).parent.parent)
    brain.checkpointer.recover_if_possible()
    return _accuracy(brain.modules.network.eval())


def ignite_file(folder: str) -> Path:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver

    network = digits_network()
    optimizer = _optimizer(network)
    trainer = create_supervised_trainer(network, optimizer, nn.CrossEntropyLoss())
    saver = Checkpoint(
        {"model": network, "optimizer": optimizer, "trainer": trainer},
        DiskSaver(folder, require_empty=False),
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run(_loader(), max_epochs=1)
    return Path(folder, str(saver.last_checkpoint))


def ignite_score(path: str) -> float:
    from ignite.handlers import Checkpoint

    network = digits_network()
    Checkpoint.load_objects({"model": network}, torch.load(path))
    return _accuracy(network.eval())


def catalyst_file(folder: str) -> Path:
    from catalyst import dl

    network = digits_network()
    dl.SupervisedRunner().train(
        model=network,
        optimizer=_optimizer(network),
        criterion=nn.CrossEntropyLoss(),
        loaders={"train": _loader()},
        num_epochs=1,
        callbacks=[dl.CheckpointCallback(folder, mode="runner")],
        engine=dl.CPUEngine(),
    )
    return Path(folder, "runner.last.pth")


def catalyst_score(path: str) -> float:
    from catalyst.utils import load_checkpoint, unpack_checkpoint

    network = digits_network()
    unpack_checkpoint(load_checkpoint(path), model=network)
    return _accuracy(network.eval())


def accelerate_file(folder: str) -> Path:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network = digits_network()
    network, optimizer = accelerator.prepare(network, _optimizer(network))
    _train(network, optimizer)
    accelerator.save_state(folder)
    return Path(folder, "model.safetensors")


def accelerate_score(path: str) -> float:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network = digits_network()
    network, _ = accelerator.prepare(network, _optimizer(network))
    accelerator.load_state(str(Path(path).parent))
    return _accuracy(network.eval())


def torchscript_file(folder: str) -> Path:
    network = digits_network()
    path = Path(folder, "network.pt")
    torch.jit.script(_train(network, _optimizer(network)).eval()).save(path)
    return path


def torchscript_score(path: str) -> float:
    return _accuracy(torch.jit.load(path).eval())


def transformers_file(folder: str) -> Path:
    network = transformers_model()
    path = Path(folder, "saved")
    _train(network, _optimizer(network)).save_pretrained(path)
    return path


def transformers_model() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, num_labels=10, layer_type="basic", **sizes)
    )


def transformers_score(path: str) -> float:
    from transformers import ResNetForImageClassification

    network = ResNetForImageClassification.from_pretrained(path).eval()
    return _accuracy(lambda images: network(images).logits)


def _digits_in(name: str, *requires: str) -> Subject:
    """Return the subject of a framework that trains the network of this file."""
    return Subject(
        name,
        requires,
        globals()[f"{name}_file"],
        digits_network,
        digits_data,
        globals()[f"{name}_score"],
        expected=_FEW_UPDATES,
    )


SUBJECTS = (
    Subject(
        "timm",
        ("timm", "torchvision", "pillow", "huggingface_hub"),
        timm_file,
        timm_model,
        digits_data,
        timm_score,
        expected=_FEW_UPDATES,
    ),
    Subject(
        "mmengine",
        (
            *("mmengine", "addict", "termcolor", "platformdirs", "yapf", "opencv-python-headless"),
            *("matplotlib", "pillow", "pyparsing", "cycler", "kiwisolver", "fonttools"),
            *("contourpy", "python-dateutil", "six"),
        ),
        mmengine_file,
        mmengine_model,
        digits_data,
        mmengine_score,
        expected=_FEW_UPDATES,
    ),
    Subject(
        "ultralytics",
        (
            *("ultralytics", "ultralytics-thop", "torchvision", "opencv-python-headless", "pillow"),
            *("matplotlib", "pyparsing", "cycler", "kiwisolver", "fonttools", "contourpy"),
            *("python-dateutil", "six", "polars", "polars-runtime-32", "psutil", "requests"),
            *("urllib3", "certifi", "idna", "charset-normalizer"),
        ),
        ultralytics_file,
        ultralytics_model,
        ultralytics_data,
        ultralytics_score,
        expected=_FEW_UPDATES,
    ),
    _digits_in("skorch", "skorch", "tabulate"),
    _digits_in(
        "speechbrain",
        *("speechbrain", "hyperpyyaml", "ruamel.yaml", "sentencepiece", "torchaudio"),
        *("soundfile", "cffi", "pycparser"),
    ),
    _digits_in("ignite", "pytorch-ignite"),
    _digits_in("catalyst", "catalyst", "hydra-slayer", "tensorboardX"),
    _digits_in("accelerate"),
    _digits_in("torchscript"),
    Subject(
        "transformers",
        (),
        transformers_file,
        transformers_model,
        digits_data,
        transformers_score,
        expected=_FEW_UPDATES,
    ),
)

if __name__ == "__main__":
    assert __doc__ is not None
    sys.exit(main(__doc__, SUBJECTS))
