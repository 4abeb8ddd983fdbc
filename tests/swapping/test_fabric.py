"""Distilling that is interrupted and goes on, and that runs under Lightning's Fabric."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from bnguard.errors import CheckpointError, ConfigurationError
from bnguard.swapping.api import swap
from tests.networks import digits, mlp
from tests.ports import free_port


@pytest.fixture
def batches():
    return digits()[0][:320].flatten(1).split(32)


@pytest.fixture
def model(batches):
    torch.manual_seed(0)
    model = mlp(32)
    with torch.no_grad():
        for _ in range(6):
            for batch in batches:
                model(batch)
    return model.eval()


class Interrupted:
    """Calls the model, and is interrupted at one of the calls."""

    def __init__(self, at):
        self.left = at

    def __call__(self, model, batch):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return model(batch)


def test_an_interrupted_distillation_goes_on_where_it_was(model, batches, tmp_path):
    path = tmp_path / "swap.state"
    options = {"teacher_data": batches, "steps": 40, "progress": False, "state_file": path}
    with pytest.raises(KeyboardInterrupt):
        swap(model, "group", forward=Interrupted(at=140), **options)
    kept = torch.load(path, weights_only=True)["so_far"]
    assert 10 <= kept["steps"] < 40

    result = swap(model, "group", **options)
    learnt = result.distillation
    assert learnt.resumed_at == kept["steps"]
    assert learnt.steps == 40
    assert learnt.samples == 40 * 32
    assert learnt.distance_before == pytest.approx(kept["distance_before"])
    assert learnt.distance < kept["distance"]
    assert f"went on from step {kept['steps']}" in str(result)
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []

    whole = swap(model, "group", teacher_data=batches, steps=40, progress=False).distillation
    assert learnt.distance == pytest.approx(whole.distance, rel=0.3)


@pytest.mark.parametrize("engine", [None, "fabric"])
def test_the_optimizer_and_the_best_weights_are_in_the_state(model, batches, tmp_path, engine):
    """With batches that are all the same, an interruption changes nothing at all."""
    data = [batches[0]]
    path = tmp_path / "swap.state"
    fabric = None if engine is None else Fabric(accelerator="cpu", devices=1)
    options = {"teacher_data": data, "steps": 40, "fabric": fabric, "progress": False}
    forward = Interrupted(at=130)
    with pytest.raises(KeyboardInterrupt):
        swap(model, "group", forward=forward, state_file=path, **options)
    parts = swap(model, "group", state_file=path, **options)
    whole = swap(model, "group", **options)
    assert parts.distillation.resumed_at > 0
    assert parts.distillation.distance == whole.distillation.distance
    for part, all_of_it in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(part, all_of_it)


def test_a_state_of_another_swap_is_refused_and_kept(model, batches, tmp_path):
    path = tmp_path / "swap.state"
    options = {"teacher_data": batches, "steps": 40, "progress": False, "state_file": path}
    with pytest.raises(KeyboardInterrupt):
        swap(model, "group", forward=Interrupted(at=100), **options)
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"swap\.state: is the state of another distillation"):
        swap(model, "layer", **options)
    with torch.no_grad():
        model[0].bias += 1.0
    with pytest.raises(CheckpointError, match="state of another distillation"):
        swap(model, "group", **options)
    assert path.read_bytes() == content


def test_a_state_that_cannot_be_read_or_written_is_one_line(model, batches, tmp_path):
    (tmp_path / "notes.txt").write_text("no state")
    for path, message in (
        (tmp_path / "notes.txt", "is no state of a distillation"),
        (tmp_path / "nowhere" / "state", "cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            swap(model, "group", teacher_data=batches, state_file=path, progress=False)
        assert "\n" not in str(caught.value)


KILLED = """
    import os, signal, sys
    import torch
    from tests.networks import digits, mlp
    from bnguard import swap

    torch.manual_seed(0)
    batches = digits()[0][:320].flatten(1).split(32)
    calls = 0

    def forward(model, batch):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch)

    result = swap(
        mlp(32), teacher_data=batches, steps=40, forward=forward, state_file=sys.argv[1],
        progress=False,
    )
    print(result.distillation.resumed_at)
"""


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on(tmp_path):
    def run(calls):
        code = textwrap.dedent(KILLED)
        command = [sys.executable, "-c", code, str(tmp_path / "state"), str(calls)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert run(140).returncode < 0
    again = run(10_000)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout) >= 10
    assert list(tmp_path.iterdir()) == []


def test_fabric_says_the_precision(model, batches):
    seen = set()

    class Watched(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            out = self.inner(x)
            seen.add(out.dtype)
            return out

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    result = swap(
        Watched(model), "group", teacher_data=batches, steps=40, fabric=fabric, progress=False
    )
    assert torch.bfloat16 in seen
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.distillation.distance < 0.7 * result.distillation.distance_before


def test_a_loss_scaler_of_fabric_is_served(model, batches):
    """Half precision scales the loss, and skips the step where that was too much."""
    from lightning.fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
    result = swap(model, "group", teacher_data=batches, steps=60, fabric=fabric, progress=False)
    assert scaler.get_scale() < 2.0**30
    assert result.distillation.distance < result.distillation.distance_before


@pytest.mark.parametrize("fabric", [object(), "cuda"])
def test_what_is_no_fabric_is_refused(model, batches, fabric):
    with pytest.raises(ConfigurationError, match="fabric= takes a Fabric of Lightning"):
        swap(model, "group", teacher_data=batches, fabric=fabric)


RANKS = """
    import sys
    import torch
    from lightning.fabric import Fabric
    from tests.networks import digits, mlp
    from bnguard import swap

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.manual_seed(0)
    images = digits()[0][:320].flatten(1)
    # Other digits on each rank, and batches of other sizes.
    rank = fabric.global_rank
    data = images[rank::2].split(8 if rank else 32)
    result = swap(
        mlp(32), teacher_data=data, steps=30, fabric=fabric, state_file=f"{sys.argv[1]}/state",
        progress=False,
    )
    learnt = result.distillation
    weights = torch.cat([p.detach().flatten() for p in result.model.parameters()])
    torch.save(
        (learnt.distance_before, learnt.distance, learnt.best_step, weights),
        f"{sys.argv[1]}/{rank}.pt",
    )
"""


@pytest.mark.slow
def test_the_ranks_of_fabric_learn_the_same(tmp_path):
    port = free_port()
    code = textwrap.dedent(RANKS)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "GROUP_RANK": "0",
                "LOCAL_WORLD_SIZE": "2",
                "TORCHELASTIC_RUN_ID": "test",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[:3] == second[:3]
    assert torch.equal(first[3], second[3])
    assert first[1] < 0.8 * first[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]
