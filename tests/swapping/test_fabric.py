"""Distilling under Lightning's Fabric: its precision, its loss scaler, its ranks."""

from __future__ import annotations

import textwrap

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from bnguard.errors import ConfigurationError
from bnguard.swapping.api import swap
from tests.cli.running import on_ranks
from tests.networks import digits, mlp


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
    with pytest.raises(ConfigurationError, match="fabric takes a Fabric of Lightning"):
        swap(model, "group", teacher_data=batches, fabric=fabric)


RANKS = """
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
    results = []
    for options in ({"fabric": fabric}, {}):
        torch.manual_seed(0)
        result = swap(mlp(32), teacher_data=data, steps=30, progress=False, **options)
        learnt = result.distillation
        weights = torch.cat([p.detach().flatten() for p in result.model.parameters()])
        results.append((learnt.distance_before, learnt.distance, learnt.best_step, weights))
    torch.save(results, f"{rank}.pt")
    # Else the threads of gloo may outlive what they use, and abort the process.
    fabric.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_learn_the_same(tmp_path):
    (tmp_path / "swap.py").write_text(textwrap.dedent(RANKS))
    for done in on_ranks(2, tmp_path, tmp_path / "swap.py"):
        assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    with_fabric, alone = first
    for here, there in zip(first, second, strict=True):
        assert here[:3] == there[:3]
        assert torch.equal(here[3], there[3])
        assert here[1] < 0.8 * here[0]
    torch.testing.assert_close(with_fabric[3], alone[3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt", "swap.py"]
