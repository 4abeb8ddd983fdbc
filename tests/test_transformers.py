"""The callback in a real Trainer of transformers, on a tiny ResNet from a config."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bnguard.transformers import BatchNormCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def train(folder, callbacks, **options):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4],
        depths=[1],
        num_labels=2,
        layer_type="basic",
    )
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"pixel_values": torch.randn(1, 16, 16, generator=generator), "labels": torch.tensor(i % 2)}
        for i in range(48)
    ]
    trainer = transformers.Trainer(
        model=transformers.ResNetForImageClassification(config),
        args=transformers.TrainingArguments(
            **{
                "output_dir": folder,
                "max_steps": 12,
                "per_device_train_batch_size": 8,
                "eval_strategy": "steps",
                "eval_steps": 6,
                "save_strategy": "no",
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                **options,
            }
        ),
        train_dataset=samples,
        eval_dataset=samples,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.model


def test_a_run_is_watched_and_trains_as_it_would_unwatched(tmp_path, capsys):
    callback = BatchNormCallback(every_n_steps=4)
    watched, unwatched = train(tmp_path, [callback]), train(tmp_path, [])
    own, other = watched.state_dict(), unwatched.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in other)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in watched.modules())
    printed = capsys.readouterr().out
    assert printed.count("bnguard: warning: BN303") == 1
    assert "BN layers · 12 steps" in printed
    assert callback.report.history.run.steps == 12
    # Six batches an evaluation; the event comes after the first of them.
    assert {layer.evaluated.batches for layer in callback.report.layers} == {5}


def test_accumulated_batches_are_read_one_by_one(tmp_path):
    callback = BatchNormCallback()
    train(tmp_path, [callback], gradient_accumulation_steps=2, max_steps=6)
    assert callback.report.history.run.steps == 6
    assert {layer.updates_seen for layer in callback.report.layers} == {12}
    assert callback.report.history.run.plan.accumulated_batches == 2


def test_an_error_of_our_own_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bnguard.monitor.Monitor.step", lambda *_: (_ for _ in ()).throw(KeyError("oops"))
    )
    callback = BatchNormCallback()
    with pytest.warns(UserWarning, match="an error of its own, KeyError: 'oops'"):
        model = train(tmp_path, [callback])
    assert callback.report is None
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_training_that_failed_leaves_no_hooks_to_the_next(tmp_path):
    class Fails(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.model = kwargs["model"]
            raise RuntimeError("mine")

    callback, failing = BatchNormCallback(), Fails()
    with pytest.raises(RuntimeError, match="mine"):
        train(tmp_path, [callback, failing])
    assert any(part._forward_pre_hooks for part in failing.model.modules())
    train(tmp_path, [callback])
    assert not any(part._forward_pre_hooks for part in failing.model.modules())
