"""Inspecting a model that does not train: beside a reference, and with rules of one's choice."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.tensorboard import SummaryWriter

import bnguard
from bnguard.errors import ConfigurationError
from bnguard.findings import Evidence, Severity
from bnguard.loggers import TensorBoard
from bnguard.tensorboard.log_report import logged_runs
from tests.networks import conv_net, digits


def accused(report):
    return {finding.code for finding in report.findings if finding.severity > Severity.INFO}


def train(model, after_step=lambda: None, epochs=4, lr=0.1):
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(1200).split(64)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            after_step()


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = conv_net()
    train(model)
    return model


def moved(model):
    """A copy with other weights beside the same buffers, as where an average was swapped in."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * parameter.std(correction=0) * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("as_state", [False, True])
def test_other_weights_beside_the_statistics_of_the_reference_are_told(model, as_state):
    copied = moved(model)
    subject, reference = (copied.state_dict(), model.state_dict()) if as_state else (copied, model)
    report = bnguard.inspect(subject, reference=reference)
    assert accused(report) == {"BN304"}
    assert len(report.findings) >= 3
    assert "those of the reference" in report.findings[0].message


def test_wrapped_copies_are_compared_by_the_names_inside(model):
    averaged = AveragedModel(model)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(1.1)
    assert accused(bnguard.inspect(averaged, reference=model)) == {"BN304"}


@pytest.mark.parametrize(
    "make",
    [
        copy.deepcopy,
        lambda model: copy.deepcopy(model).eval().half(),
        lambda model: AveragedModel(model, use_buffers=True),
    ],
    ids=["copied", "half", "averaged"],
)
def test_what_fits_its_reference_is_not_accused(model, make):
    assert accused(bnguard.inspect(make(model), reference=model)) == set()


def test_averaged_buffers_and_estimated_ones_are_not_accused(model):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, lambda: averaged.update_parameters(model), epochs=1)
    assert accused(bnguard.inspect(averaged, reference=model)) == set()
    from_the_start = AveragedModel(conv_net(), use_buffers=True)
    train(model, lambda: from_the_start.update_parameters(model), epochs=1)
    assert accused(bnguard.inspect(from_the_start)) == set()
    alone = moved(model)
    update_bn(digits()[0][:1200].split(64), alone)
    assert accused(bnguard.inspect(alone, reference=model)) == set()


def watched_average(use_buffers):
    """Watch an average beside the model that trains, and evaluate it."""
    torch.manual_seed(0)
    model = conv_net()
    train(model, epochs=1)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    with bnguard.watch(averaged, on_findings=lambda group: None) as beside:

        def after_step():
            averaged.update_parameters(model)
            beside.step()

        for _ in range(2):
            model.train()
            train(model, after_step, epochs=3, lr=0.5)
            averaged.eval()
            with torch.no_grad(), beside.evaluation():
                averaged(digits()[0][1200:])
        return beside.report()


def test_an_average_that_is_watched_beside_the_model_tells_its_stale_statistics():
    report = watched_average(use_buffers=False)
    assert report.findings[0].code == "BN304"
    assert "were computed with" in report.findings[0].message


def test_an_average_with_its_own_statistics_is_not_accused():
    assert accused(watched_average(use_buffers=True)) == set()


@pytest.mark.parametrize(
    ("subject", "reference", "message"),
    [
        ([1], None, "inspect takes a model, a state dict or a path, not a list"),
        ({"state_dict": conv_net().state_dict()}, None, "are in the entry 'state_dict': pass that"),
        ({"bn.running_mean": [0.0]}, None, "bn.running_mean must be a tensor, not a list"),
        (
            {"bn.running_mean": torch.zeros(7), "bn.running_var": torch.ones(8)},
            None,
            r"bn.running_mean has shape \(7,\), running_var \(8,\)",
        ),
        (conv_net(), 3, "reference has to be a model or a state dict, not a int"),
        (conv_net(), nn.Linear(2, 2), "no weight in common"),
        ({}, {}, "no weight in common"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(subject, reference, message):
    with pytest.raises(ConfigurationError, match=message):
        bnguard.inspect(subject, reference=reference)


@pytest.mark.parametrize("of", [str, lambda path: path])
def test_a_path_is_read_as_the_command_reads_it_without_torch(of, tmp_path):
    torch.save(two_layers().state_dict(), tmp_path / "a.pt")
    report = bnguard.inspect(of(tmp_path / "a.pt"), select=["BN303"])
    assert repr(report) == "Report(2 BN layers, 2 infos: BN303)"
    program = "import sys, bnguard; bnguard.inspect('a.pt'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0


def test_a_path_that_cannot_be_inspected_is_one_line(tmp_path):
    with pytest.raises(bnguard.CheckpointError, match="no such file"):
        bnguard.inspect(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="not a path"):
        bnguard.inspect(tmp_path / "missing.pt", reference=conv_net())


def two_layers():
    return nn.Sequential(nn.BatchNorm1d(2, momentum=0.99), nn.BatchNorm1d(2, momentum=0.99))


def told(**options):
    return {(f.code, f.layer) for f in bnguard.inspect(two_layers(), **options).findings}


def test_rules_limits_and_layers_are_chosen_as_in_watch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = {(code, layer) for code in ("BN103", "BN303") for layer in "01"}
    assert told() == both
    assert told(select=["BN1"]) == {("BN103", "0"), ("BN103", "1")}
    assert told(ignore=["BN303"], per_layer_ignores={"1": ["BN1"]}) == {("BN103", "0")}
    assert told(select=["BN103"], limits={"BN103": {"max_momentum": 1.0}}) == set()
    with pytest.raises(ConfigurationError, match="did you mean BN103"):
        told(ignore=["BN13"])
    (tmp_path / "pyproject.toml").write_text(
        '[tool.bnguard]\nignore = ["BN3"]\nper-layer-ignores = {"0" = ["BN103"]}\n'
    )
    assert told() == {("BN103", "1")}
    assert told(ignore=[], per_layer_ignores={}) == both


@pytest.mark.parametrize(
    "subject",
    [
        nn.BatchNorm1d(8, device="meta"),
        nn.BatchNorm1d(8, device="meta").state_dict(),
        nn.LazyBatchNorm1d(),
    ],
    ids=["meta", "state dict", "lazy"],
)
def test_statistics_without_values_are_no_untracked_ones(subject):
    report = bnguard.inspect(subject)
    assert report.findings == ()
    reasons = {skipped.code: skipped.reason for skipped in report.skipped}
    assert reasons["BN104"] == "the running statistics have no values yet"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_of_a_scripted_model_that_is_inspected_which_it_saves(model):
    found = bnguard.inspect(torch.jit.script(model))
    assert [layer.name for layer in found.layers] == [
        layer.name for layer in bnguard.inspect(model.state_dict()).layers
    ]


def partly_dead(shares, channels=64):
    """A state dict whose layers have some channels without variance."""
    state = {}
    for place, share in enumerate(shares):
        layer = nn.BatchNorm2d(channels)
        layer.running_var[: round(share * channels)] = 0.0
        layer.num_batches_tracked.fill_(10_000)
        state |= {f"{place}.{key}": value for key, value in layer.state_dict().items()}
    return state


def test_the_furthest_towards_the_limit_comes_first_on_either_side_of_it():
    report = bnguard.inspect(partly_dead([1 / 64, 8 / 64, 3 / 64]))
    assert [finding.layer for finding in report.findings] == ["1", "2", "0"]
    assert [finding["layer"] for finding in report.to_dict()["findings"]] == ["1", "2", "0"]
    assert "at 3 layers, worst layer 1" in str(report)
    assert "dead channels 12.5% (limit 75%)" in str(report)


@pytest.mark.parametrize(
    ("further", "nearer"),
    [
        (Evidence("dead channels", 12.5, 50.0), Evidence("dead channels", 0.17, 50.0)),
        (Evidence("shift", 3.0, 1.0), Evidence("shift", 2.0, 1.0)),
        (Evidence("updates", 1, 0), Evidence("updates", 0, 0)),
        (
            Evidence("values per channel", 2, 16, is_minimum=True),
            Evidence("values per channel", 8, 16, is_minimum=True),
        ),
        (Evidence("gain", float("nan"), 1e3), Evidence("gain", 1e9, 1e3)),
    ],
)
def test_the_order_of_evidence_knows_on_which_side_its_limit_is(further, nearer):
    assert further.excess > nearer.excess


def test_the_tab_and_the_text_of_a_run_have_the_same_order(tmp_path):
    report = bnguard.inspect(partly_dead([1 / 64, 8 / 64, 3 / 64]))
    with SummaryWriter(tmp_path) as writer:
        TensorBoard(writer).log_layers(report, 1)
    (run,) = logged_runs(tmp_path)
    assert [finding.layer for finding in run.findings] == ["1", "2", "0"]
    assert not any(finding.evidence.is_minimum for finding in run.findings)
    assert "(limit 75%)" in str(run)
    assert "at 3 layers, worst layer 1" in str(run)


@pytest.mark.parametrize("as_state", [False, True])
def test_an_untrained_model_is_no_fault(as_state):
    model = conv_net()
    report = bnguard.inspect(model.state_dict() if as_state else model)
    assert accused(report) == set()
    (finding, *_) = [finding for finding in report.findings if finding.code == "BN303"]
    assert "as in a network that was not trained" in finding.message
    assert "momentum" not in finding.fix.summary


def test_an_untrained_model_with_random_gamma_and_beta_is_no_fault():
    torch.manual_seed(0)
    widths = (48, 48, 96, 96, 192)
    drawn = nn.Sequential(*map(nn.BatchNorm2d, widths))
    for layer in drawn:
        nn.init.normal_(layer.weight, 0.1, 0.1)
        nn.init.normal_(layer.bias, 0.0, 0.1)
    assert accused(bnguard.inspect(drawn)) == accused(bnguard.inspect(drawn.state_dict())) == set()
    for layer in drawn:
        layer.num_batches_tracked.fill_(100)
    report = bnguard.inspect(drawn)
    assert {f.severity for f in report.findings if f.code == "BN304"} == {Severity.ERROR}


def test_lost_statistics_of_a_trained_network_are_told_without_a_counter_that_moved(model):
    copied = conv_net()
    with torch.no_grad():
        for target, source in zip(copied.parameters(), model.parameters(), strict=True):
            target.copy_(source)
    for subject in (copied, copied.state_dict()):
        assert "BN304" in accused(bnguard.inspect(subject))


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision: buffers alone."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))


@pytest.mark.parametrize("as_state", [False, True])
@pytest.mark.parametrize("state", ["initial", "folded", "trained"])
def test_layers_that_never_train_have_no_momentum(as_state, state):
    frozen = type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), {"__module__": "torchvision.ops.misc"})
    backbone = nn.Sequential(frozen(8), frozen(8))
    for layer in backbone if state != "initial" else ():
        layer.bias.normal_()
    for layer in backbone if state == "trained" else ():
        layer.running_mean.normal_()
    report = bnguard.inspect(backbone.state_dict() if as_state else backbone)
    assert accused(report) == set()
    assert {"BN103", "BN303"}.isdisjoint(finding.code for finding in report.findings)
    assert report.notes == ()


def amplifying(gamma, eps=1e-5):
    layer = nn.BatchNorm2d(4, eps=eps)
    layer.running_var.fill_(1e-10)
    nn.init.constant_(layer.weight, gamma)
    layer.num_batches_tracked.fill_(10_000)
    return layer


def gains(subject, **options):
    report = bnguard.inspect(subject, select=["BN403"], **options)
    return [(f.severity, round(f.evidence.value)) for f in report.findings], report


def test_a_gain_is_judged_by_what_holds_for_each_eps_that_is_usual():
    found, report = gains(amplifying(5.0).state_dict())
    assert found == [(Severity.INFO, 1581)]
    assert "eps is not stored, the gain is 1,581 with eps 1e-05 and 158.1 with eps 0.001" in (
        report.findings[0].message
    )
    assert gains(amplifying(5.0))[0] == [(Severity.WARNING, 1581)]
    assert gains(amplifying(5.0, eps=1e-3))[0] == []
    state = amplifying(5.0).state_dict()
    changed = amplifying(5.0, eps=1e-3)
    assert gains(state, reference=changed)[0] == []
    assert gains(amplifying(50.0).state_dict())[0] == [(Severity.WARNING, 1581)]


@pytest.mark.parametrize(("updates", "is_told"), [(60, True), (100_000, False)])
def test_an_assumed_momentum_is_told_where_it_decides(updates, is_told):
    layer = nn.BatchNorm2d(4)
    layer.running_mean.fill_(0.5)
    layer.num_batches_tracked.fill_(updates)
    report = bnguard.inspect({f"bn.{key}": value for key, value in layer.state_dict().items()})
    told = "momentum is not stored, and 0.1 is assumed; if it was below 0.049, the 60 updates of bn"
    assert (told in " ".join(report.notes)) is is_told
    assert report.findings == ()
    assert "no problems found in what a checkpoint shows; training was not looked at" in (
        " ".join(str(report).split())
    )


def test_a_wrong_option_is_a_value_error_too():
    with pytest.raises(ValueError, match="no rule is called 'BN999'"):
        bnguard.inspect(nn.BatchNorm1d(2), select=["BN999"])
