"""Training scripts that know nothing of bnguard: ``python trainings.py NAME``.

Each saves its weights as ``weights.pt``. The momentum of 0.001 is the fault (BN303).
"""

import copy
import itertools
import multiprocessing
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 40


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16 * STEPS, 8, generator=generator) * 3 + 2
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def loader(**options):
    return DataLoader(data(), batch_size=16, **options)


def network(momentum=0.001, outputs=1):
    return nn.Sequential(
        nn.Linear(8, 16, bias=False),
        nn.BatchNorm1d(16, momentum=momentum),
        nn.ReLU(),
        nn.Linear(16, outputs),
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def fit(model, optimizer, batches, forward=None):
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.mse_loss((forward or model)(inputs), targets).backward()
        optimizer.step()


def evaluate(model):
    model.eval()
    with torch.no_grad():
        return [F.mse_loss(model(inputs), targets).item() for inputs, targets in loader()]


def save(model, name="weights.pt"):
    torch.save(model.state_dict(), name)


def plain():
    model = network()
    fit(model, sgd(model), loader(shuffle=True))
    evaluate(model)
    save(model)


def healthy():
    model = network(momentum=0.1)
    # Decays gamma as well: a habit, which is mentioned and no more.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-4)
    for _ in range(2):
        fit(model, optimizer, loader(shuffle=True))
        evaluate(model)
    save(model)


def workers():
    model = network()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(square, [3]) == [9]
    fit(model, sgd(model), loader(num_workers=1, shuffle=True))
    save(model)


def square(number):
    return number**2


def raising():
    model = network()
    fit(model, sgd(model), loader())
    save(model)
    raise ValueError("the script's own error")


def two_models():
    first, second = network(), network(momentum=0.1)
    fit(first, sgd(first), loader())
    fit(second, sgd(second), loader())
    save(nn.ModuleList([copy.deepcopy(first), copy.deepcopy(second)]))


def never():
    model = network()
    evaluate(model)
    save(model)


def functional():
    """The weights are passed to the model, and the optimizer holds copies of its own."""
    model = network()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([value.requires_grad_() for value in weights.values()], lr=0.01)
    fit(model, optimizer, loader(), lambda x: torch.func.functional_call(model, weights, (x,)))


class BatchNormalization(nn.Module):
    """A layer that normalises in a way of its own, as that of Keras does."""

    def forward(self, inputs):
        return (inputs - inputs.mean(0)) / inputs.std(0)


def of_another_framework():
    model = nn.Sequential(nn.Linear(8, 16), BatchNormalization(), nn.Linear(16, 1))
    fit(model, sgd(model), loader())


def compiled():
    model = network()
    fast = torch.compile(model, backend="eager")
    fit(fast, sgd(model), loader())
    evaluate(fast)
    save(model)


def gan():
    critic, generator = network(0.1), network(0.1, outputs=8)
    of_critic, of_generator = sgd(critic), sgd(generator)
    for inputs, _ in loader():
        noise = torch.randn(16, 8)
        of_critic.zero_grad()
        (critic(generator(noise).detach()).mean() - critic(inputs).mean()).backward()
        of_critic.step()
        of_generator.zero_grad()
        (-critic(generator(noise)).mean()).backward()
        of_generator.step()
    save(nn.ModuleList([copy.deepcopy(critic), copy.deepcopy(generator)]))


def teacher():
    model = network(0.1)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    optimizer = sgd(model)
    for batch in itertools.chain(loader(), loader()):
        fit(model, optimizer, [batch])
        averaged.update_parameters(model)
    evaluate(averaged)
    save(model)


def follower(kind="faulty"):
    """An average of the parameters alone, written by hand; healthy: of the buffers too."""
    model = network(0.1)
    averaged = copy.deepcopy(model)
    optimizer = sgd(model)
    for batch in itertools.chain(loader(), loader()):
        fit(model, optimizer, [batch])
        for own, new in zip(averaged.parameters(), model.parameters(), strict=True):
            own.data.lerp_(new.data, 0.1)
        if kind == "healthy":
            for own, new in zip(averaged.buffers(), model.buffers(), strict=True):
                own.copy_(new)
    evaluate(averaged)
    save(model)


def ddp():
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = nn.parallel.DistributedDataParallel(network())
    batches = [batch for number, batch in enumerate(loader()) if number % 2 == rank]
    fit(model, sgd(model), batches + batches)
    evaluate(model)
    if rank == 0:
        save(model.module)
    torch.distributed.destroy_process_group()


def lightning(package_name, *, has_callback=False):
    package = __import__("importlib").import_module(package_name)

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.network(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.mse_loss(self.network(batch[0]), batch[1]))

        def configure_optimizers(self):
            return sgd(self)

    callbacks = []
    if has_callback:
        from bnguard.lightning import BatchNormMonitor

        callbacks.append(BatchNormMonitor())
    trainer = package.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=package.loggers.CSVLogger("."),
    )
    module = Module()
    trainer.fit(module, loader(), loader())
    save(module)


def lightning_cli():
    from lightning.pytorch.cli import LightningCLI

    from tests.cli.other_lightning import DeepDigitsNet, DigitsData

    arguments = ["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    arguments += ["--trainer.limit_train_batches=20", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(DeepDigitsNet, DigitsData, args=arguments, seed_everything_default=0)
    save(cli.model)


def fabric():
    from lightning.fabric import Fabric

    tool = Fabric(accelerator="cpu", devices=1)
    tool.launch()
    model = network()
    wrapped, optimizer = tool.setup(model, sgd(model))
    wrapped.train()
    for inputs, targets in tool.setup_dataloaders(loader()):
        optimizer.zero_grad()
        tool.backward(F.mse_loss(wrapped(inputs), targets))
        optimizer.step()
    evaluate(wrapped)
    save(model)


def accelerate():
    from accelerate import Accelerator

    tool = Accelerator(cpu=True)
    model = network()
    wrapped, optimizer, batches = tool.prepare(model, sgd(model), loader())
    wrapped.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        tool.backward(F.mse_loss(wrapped(inputs), targets))
        optimizer.step()
    evaluate(wrapped)
    save(model)


def transformers():
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, inputs, labels):
            outputs = self.network(inputs)
            return {"loss": F.mse_loss(outputs, labels), "logits": outputs}

    model = Model()
    samples = [{"inputs": inputs, "labels": labels} for inputs, labels in data()]
    arguments = TrainingArguments(
        output_dir="hf",
        max_steps=STEPS,
        per_device_train_batch_size=16,
        eval_strategy="steps",
        eval_steps=20,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=samples, eval_dataset=samples).train()
    save(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, *options = sys.argv[1:]
    globals()[name](
        *(option for option in options if option != "--callback"),
        **({"has_callback": True} if "--callback" in options else {}),
    )
