"""What a swap keeps, what it refuses, and that it leaves the model that it was given alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrize, prune

from bnguard.errors import BNGuardError, ConfigurationError
from bnguard.layers.bn_layer import find_layers
from bnguard.swapping.api import swap
from bnguard.swapping.norms import BatchRenorm, FrozenNorm, limits_after
from tests.networks import conv_net, mlp


def settled(model, sample):
    """The model with running statistics and affine parameters that are not the initial ones."""
    for layer in find_layers(model):
        if layer.weight is not None:
            nn.init.uniform_(layer.module.weight, 0.5, 2.0)
            nn.init.uniform_(layer.module.bias, -1.0, 1.0)
    model.train()
    with torch.no_grad():
        for _ in range(40):
            model(sample)
    return model.eval()


@pytest.fixture
def images():
    return torch.rand(8, 1, 8, 8)


@pytest.fixture
def net(images):
    return settled(conv_net(), images)


def fingerprint(model):
    """All that must be as it was: values, identities, modes, flags, hooks."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        [list(module._forward_hooks.values()) for module in model.modules()],
    )


def assert_unchanged(model, before):
    after = fingerprint(model)
    assert after[1:] == before[1:]
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())


@pytest.mark.parametrize("to", ["group", "layer", "instance", "batch-renorm", "frozen", "sync"])
def test_every_target_leaves_no_batchnorm_and_the_given_model_alone(net, images, to):
    net[4].weight.requires_grad_(False)
    net.train()
    net[1].eval()
    before, state = fingerprint(net), torch.get_rng_state()
    result = swap(net, to, sample=images)
    assert_unchanged(net, before)
    assert torch.equal(torch.get_rng_state(), state)
    left = [type(layer.module) for layer in find_layers(result.model)]
    assert left == ([nn.SyncBatchNorm] * 3 if to == "sync" else [])
    assert [layer.name for layer in result.replaced] == ["1", "4", "7"]
    for index in (1, 4, 7):
        old, new = net[index], result.model[index]
        assert torch.equal(new.weight, old.weight)
        assert torch.equal(new.bias, old.bias)
        assert new.weight is not old.weight
        assert new.weight.requires_grad == old.weight.requires_grad
        assert new.eps == old.eps
        assert new.training == old.training
    assert result.model(images).shape == (8, 10)


@pytest.mark.parametrize("to", ["batch-renorm", "frozen", "sync"])
def test_targets_with_running_statistics_compute_the_same_in_eval_mode(net, images, to):
    result = swap(net, to, sample=images)
    assert result.output_change == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(result.model.eval()(images), net(images))


def test_the_output_change_is_measured(net, images):
    result = swap(net, "layer", sample=images)
    with torch.no_grad():
        old, new = net(images), result.model.eval()(images)
    naive = ((new - old).square().mean() / old.var(0, correction=0).mean()).sqrt()
    assert result.output_change == pytest.approx(naive.item(), rel=1e-5)
    assert result.output_change > 0.01
    assert swap(net, "layer").output_change is None


def test_layer_and_instance_norm_are_what_their_papers_say(images):
    x = torch.randn(4, 6, 5, 5)
    model = nn.Sequential(nn.BatchNorm2d(6, affine=False))
    layer = swap(model, "layer").model(x)
    instance = swap(model, "instance").model(x)
    torch.testing.assert_close(layer, nn.functional.layer_norm(x, x.shape[1:]))
    torch.testing.assert_close(instance, nn.functional.instance_norm(x))


def test_groups_keep_enough_values_where_a_sample_tells_the_size():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.BatchNorm2d(64)
            self.point = nn.BatchNorm2d(64)
            self.flat = nn.BatchNorm1d(64)

        def forward(self, x):
            x = self.point(self.maps(x).mean((2, 3), keepdim=True))
            return self.flat(x.flatten(1))

    model = Pooled()
    known = swap(model, "group", sample=torch.randn(2, 64, 4, 4))
    assert known.groups == {"maps": 16, "point": 4, "flat": 4}
    assert [layer.values_per_group for layer in known.replaced] == [64, 16, 16]
    assert swap(model, "group").groups == {"maps": 16, "point": 16, "flat": 4}
    wanted = swap(model, "group", groups=32, sample=torch.randn(2, 64, 4, 4))
    assert wanted.groups == {"maps": 32, "point": 4, "flat": 4}
    instance = swap(model, "instance", sample=torch.randn(2, 64, 4, 4))
    assert instance.groups == {"maps": 64, "point": 4, "flat": 4}
    again = swap(model, "group", groups=known.groups)
    assert again.groups == known.groups
    with pytest.raises(ConfigurationError, match="point: its 64 channels"):
        swap(model, "group", groups={"point": 64}, sample=torch.randn(2, 64, 4, 4))
    with pytest.raises(ConfigurationError, match="maps: its 64 channels"):
        swap(model, "group", groups={"m*": 7})


def test_a_group_of_one_value_is_refused_at_the_first_forward_where_the_size_was_not_known():
    model = swap(nn.Sequential(nn.BatchNorm2d(8)), "instance").model
    model(torch.randn(2, 8, 2, 1))
    with pytest.raises(ConfigurationError, match="8 groups got an input of shape"):
        model(torch.randn(2, 8, 1, 1))


def test_one_value_a_sample_cannot_be_grouped():
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    with pytest.raises(ConfigurationError, match=r"1: gets one value a sample.*exclude '1'"):
        swap(model, "group")
    assert swap(model, "frozen").model(torch.randn(2, 3)).shape == (2, 1)


def test_a_shared_module_is_replaced_everywhere_by_one(images):
    norm = nn.BatchNorm2d(1)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = norm
            self.others = nn.ModuleList([nn.Sequential(norm), nn.ModuleDict({"again": norm})])

    result = swap(Shared(), "frozen")
    model = result.model
    assert isinstance(model.first, FrozenNorm)
    assert model.others[0][0] is model.first
    assert model.others[1]["again"] is model.first
    assert len(result.replaced) == 1


def test_a_layer_that_a_plain_list_holds_is_refused():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.norms = [self.norm]

    model = Hidden()
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match=r"in \.norms, where.*ModuleList"):
        swap(model, "group", in_place=True)
    assert_unchanged(model, before)


def test_a_layer_that_is_registered_nowhere_is_refused_rather_than_left():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.more = {"late": nn.BatchNorm2d(4)}

    with pytest.raises(ConfigurationError, match=r"in \.more, where it cannot be replaced"):
        swap(Hidden(), "group")


def test_a_layer_inside_a_layer_is_refused_rather_than_left():
    class Twice(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.after = nn.BatchNorm2d(channels)

        def forward(self, x):
            return self.after(super().forward(x))

    model = nn.Sequential(Twice(4))
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match=r"is part of another BN layer|computes more"):
        swap(model, "group", in_place=True)
    assert_unchanged(model, before)


def test_the_root_can_be_the_layer_but_not_in_place():
    layer = nn.BatchNorm2d(8)
    assert swap(layer, "group").model.num_groups == 2
    with pytest.raises(ConfigurationError, match="is itself a BN layer"):
        swap(layer, "group", in_place=True)


def test_affine_false_stays_so():
    model = nn.Sequential(nn.BatchNorm2d(8, affine=False))
    x = torch.randn(4, 8, 3, 3)
    for to in ("group", "layer", "instance", "batch-renorm", "frozen", "sync"):
        norm = swap(model, to).model
        assert list(norm.parameters()) == []
        assert norm(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_eps_and_flags_are_kept(dtype):
    model = nn.Sequential(nn.BatchNorm2d(8, eps=0.3)).to(dtype).eval()
    model[0].bias.requires_grad_(False)
    for to in ("group", "batch-renorm", "frozen", "sync"):
        norm = swap(model, to).model[0]
        assert norm.weight.dtype == dtype
        assert (norm.eps, norm.training) == (0.3, False)
        assert (norm.weight.requires_grad, norm.bias.requires_grad) == (True, False)
        assert norm(torch.randn(2, 8, 3, 3, dtype=dtype)).dtype == dtype


def test_devices_are_kept():
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(8))
    for to in ("group", "frozen", "sync"):
        tensors = swap(model, to).model.state_dict().values()
        assert {tensor.device.type for tensor in tensors if tensor.dim()} == {"meta"}


def test_a_sync_batchnorm_is_swapped_and_left_where_it_is_the_target():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(conv_net())
    assert len(swap(model, "group").replaced) == 3
    with pytest.raises(ConfigurationError, match="no BN layer is left to swap: 1 is a Sync"):
        swap(model, "sync")


def test_untracked_layers():
    model = nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(ConfigurationError, match="0: has no running statistics to freeze"):
        swap(model, "frozen")
    synced = swap(model, "sync").model[0]
    assert (synced.running_mean, synced.track_running_stats) == (None, False)
    assert swap(model, "batch-renorm").model[0].running_var.sum() == 8


def test_layers_and_exclude_choose_by_pattern(net):
    result = swap(net, "group", layers=["[14]"], exclude=["4"])
    assert [layer.name for layer in find_layers(result.model)] == ["4", "7"]
    assert {layer.name: layer.reason for layer in result.skipped} == {
        "4": "is excluded",
        "7": "is not among the layers asked for",
    }
    with pytest.raises(ConfigurationError, match="exclude 'head' matches no BN layer"):
        swap(net, "group", exclude="head")


def test_in_place_changes_the_model_itself_and_keeps_its_parameters(net):
    weight = net[1].weight
    result = swap(net, "group", in_place=True)
    assert result.model is net
    assert net[1].weight is weight
    assert find_layers(net) == ()


def test_in_place_puts_the_layers_back_after_an_exception(net):
    calls = []
    net[4].register_forward_hook(lambda module, args, output: calls.append(type(module)))
    before = fingerprint(net)
    with pytest.raises(ConfigurationError, match="swapped Sequential fails on a batch"):
        swap(
            net,
            lambda bn: nn.Linear(3, 5),
            sample=torch.rand(2, 1, 8, 8),
            in_place=True,
        )
    assert_unchanged(net, before)
    net(torch.rand(2, 1, 8, 8))
    assert calls[-1] is nn.BatchNorm2d


def test_a_parametrized_layer_keeps_its_parametrization():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    parametrize.register_parametrization(model[1], "weight", Doubled())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = swap(model, "group", in_place=True, optimizer=optimizer)
    assert torch.equal(result.model[1].weight, torch.full((8,), 2.0))
    result.model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(result.model[1].weight, 2 * result.model[1].parametrizations.weight.original)
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_hooks_move_and_their_handles_still_remove_them(net, images):
    seen = []
    handle = net[1].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    model = swap(net, "group", in_place=True).model
    model(images)
    handle.remove()
    model(images)
    assert [kind.__name__ for kind in seen] == ["GroupNorm"]


class Follows:
    """Momentum state tells whether an optimizer still knows a parameter."""

    @staticmethod
    def trained(net, images):
        groups = [
            {"params": list(net[:4].parameters()), "lr": 0.1},
            {"params": net[4:].parameters()},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        net(images).square().sum().backward()
        optimizer.step()
        return optimizer


@pytest.mark.parametrize("in_place", [False, True])
def test_the_optimizer_follows_with_its_state(net, images, in_place):
    net.train()
    optimizer = Follows.trained(net, images)
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
    result = swap(net, "group", optimizer=optimizer, in_place=in_place)
    groups = [group["params"] for group in optimizer.param_groups]
    assert [*groups[0], *groups[1]] == list(result.model.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert len(optimizer.state) == len(momenta)
    for parameter, momentum in zip(result.model.parameters(), momenta, strict=True):
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)
    weight = result.model[1].weight.clone()
    result.model(images).square().sum().backward()
    optimizer.step()
    assert not torch.equal(result.model[1].weight, weight)


def test_removed_parameters_leave_the_optimizer_and_new_ones_join_the_group_of_the_layer(
    net, images
):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.gain * x

    net.train()
    optimizer = Follows.trained(net, images)
    old = {id(p) for index in (1, 4, 7) for p in net[index].parameters()}
    model = swap(net, lambda bn: Gain(), optimizer=optimizer, in_place=True).model
    first, second = (group["params"] for group in optimizer.param_groups)
    assert [p is model[1].gain for p in first].count(True) == 1
    assert sum(p is model[4].gain or p is model[7].gain for p in second) == 2
    assert not {id(p) for p in (*first, *second, *optimizer.state)} & old
    assert {*first, *second} == set(model.parameters())


def test_an_optimizer_of_another_model_is_refused(net):
    with pytest.raises(ConfigurationError, match="none of the model's parameters"):
        swap(net, "group", optimizer=torch.optim.SGD(conv_net().parameters()))


def test_a_factory_gets_the_layer_and_its_norm_gets_the_affine_parameters(net):
    model = swap(net.double(), lambda bn: nn.GroupNorm(2, bn.num_features)).model
    assert isinstance(model[4], nn.GroupNorm)
    assert torch.equal(model[4].weight, net[4].weight)
    assert swap(net, lambda bn: nn.Identity()).replaced[0].after == "Identity"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda bn: nn.BatchNorm2d(bn.num_features), "made a BatchNorm2d for layer 1, which still"),
        (lambda bn: None, "made a NoneType for layer 1, not a torch.nn.Module"),
        (nn.GroupNorm, "failed for layer 1: TypeError: .*: it is called with the BN layer"),
    ],
)
def test_a_factory_that_makes_no_other_norm_is_refused(net, factory, message):
    with pytest.raises(ConfigurationError, match=message):
        swap(net, factory)


def with_a_lazy_head():
    return nn.Sequential(nn.BatchNorm1d(8), nn.LazyLinear(3))


def prepared_for_quantisation():
    fused = nni.ConvBnReLU2d(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).train()
    fused.qconfig = get_default_qat_qconfig("fbgemm")
    return nn.Sequential(nniqat.ConvBnReLU2d.from_float(fused))


def pruned():
    model = conv_net()
    prune.l1_unstructured(model[1], "weight", 2)
    return model


class ReadsItsLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(x) * self.bn.running_mean.view(-1, 1, 1)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (nn.Identity, {}, "has no BN layers: nothing to swap"),
        (conv_net, {"to": "grup"}, "did you mean 'group'"),
        (conv_net, {"groups": 0}, "whole numbers of at least 1"),
        (conv_net, {"to": "layer", "groups": {"1": 2}}, "are for the norm 'group'"),
        (conv_net, {"steps": -1}, "at least 0, not -1"),
        (lambda: nn.DataParallel(conv_net()), {}, "wrapped in DataParallel"),
        (lambda: torch.compile(conv_net()), {}, "wrapped in OptimizedModule"),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d()), {}, "0 is lazy"),
        (with_a_lazy_head, {"sample": torch.rand(4, 8)}, "1.weight is lazy"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(8)).to("meta"),
            {"sample": torch.rand(4, 8)},
            "0.weight is on the meta device",
        ),
        (conv_net, {"groups": {"backbone.*": 4}}, r"groups 'backbone.\*' matches no BN layer"),
        (conv_net, {"groups": 2.5}, "whole numbers of at least 1"),
        (conv_net, {"layers": 3}, "layers '3' matches no BN layer"),
        (conv_net, {"optimizer": 3}, "optimizer=3 is not an optimizer"),
        (pruned, {}, "1: its weight is recomputed at each call"),
        (
            ReadsItsLayer,
            {"sample": torch.rand(2, 3, 5, 5)},
            "fails on a batch that",
        ),
        (conv_net, {"groups": {"*": 5}}, "its 8 channels do not make 5 groups"),
        (conv_net, {"fabric": object()}, "give teacher_data too"),
        (conv_net, {"steps": 2.5}, "steps must be a whole number of at least 0, not 2.5"),
        (conv_net, {"to": None}, "unknown norm None"),
        (lambda: conv_net().state_dict(), {}, "takes a torch.nn.Module, not OrderedDict"),
        (prepared_for_quantisation, {}, "0: ConvBnReLU2d reads the statistics of its BN layer"),
    ],
)
def test_what_cannot_be_done_is_said(make, options, message):
    with pytest.raises(BNGuardError, match=message):
        swap(make(), **options)


def test_a_model_that_cannot_be_copied_can_be_swapped_in_place(net):
    net.leaf = net[0].weight * 1.0
    with pytest.raises(ConfigurationError, match=r"cannot be copied.*in place"):
        swap(net, "group")
    assert find_layers(swap(net, "group", in_place=True).model) == ()


def test_a_swapped_model_is_a_plain_module(net, images, tmp_path):
    model = swap(net, "group", sample=images).model
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    torch.testing.assert_close(again(images), copy.deepcopy(model)(images))
    assert set(model.state_dict()) == {
        name for name in net.state_dict() if "running" not in name and "num_batches" not in name
    }


def test_the_result_prints_itself(net, images):
    text = str(swap(net, "group", sample=images, exclude=["7"]))
    assert text.splitlines()[0] == "swapped (group) · 2 BN layers · 1 left"
    assert "BatchNorm2d  →  GroupNorm, 2 groups of 4 channels, 256 values" in text
    assert "left  7 is excluded" in text
    assert "outputs off by" in text
    assert "the model that you passed is unchanged: the swapped one is .model" in text
    assert ".model" not in str(swap(copy.deepcopy(net), "group", in_place=True))


def test_a_score_of_nan_is_not_kept(net):
    result = swap(net, "group", score=lambda model: float("nan"))
    assert result.model is net
    assert "not kept, since its score is NaN" in str(result)


def limits(layer):
    batches = layer.num_batches_tracked + layer.batches_ahead
    return [limit.item() for limit in limits_after(batches, layer.schedule)]


def test_batch_renorm_of_a_trained_layer_is_warmed_up_and_one_of_a_new_layer_is_not(net):
    trained, new = (swap(model, "batch-renorm").model[1] for model in (net, conv_net()))
    assert isinstance(trained, BatchRenorm)
    assert trained.num_batches_tracked == net[1].num_batches_tracked == 40
    assert limits(trained) == [3.0, 5.0]
    assert limits(new) == [1.0, 0.0]
    new.load_state_dict(trained.state_dict())
    assert limits(new) == [3.0, 5.0]


def test_batchnorm1d_of_flat_inputs():
    model = mlp(64)
    result = swap(model, "group", sample=torch.randn(4, 64))
    assert result.groups == {"1": 4, "4": 4}
    assert result.model(torch.randn(1, 64)).shape == (1, 10)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, ()),
        (nn.BatchNorm1d, (5,)),
        (nn.BatchNorm2d, (1, 1)),
        (nn.BatchNorm2d, (4, 4)),
        (nn.BatchNorm3d, (2, 2, 2)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 17, 48])
def test_groups_fit_every_number_of_channels_and_keep_their_values(kind, shape, channels):
    model = nn.Sequential(kind(channels))
    x = torch.randn(3, channels, *shape)
    if x[0].numel() == 1:
        with pytest.raises(ConfigurationError, match="gets one value a sample"):
            swap(model, "group", sample=x)
        return
    for to in ("group", "instance"):
        (layer,) = (result := swap(model, to, sample=x)).replaced
        assert channels % layer.groups == 0
        assert layer.values_per_group >= 16 or layer.groups == 1 or to == "instance"
        assert (result.model(x).flatten(1).std(1) > 0.1).all()


def test_other_norms_are_left_alone():
    class EvoNorm(nn.Module):
        """Has the buffers of BN, and is none."""

        def __init__(self):
            super().__init__()
            self.register_buffer("running_var", torch.ones(4))

    others = [nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), EvoNorm()]
    model = swap(nn.Sequential(nn.BatchNorm2d(4), *others), "layer").model
    assert [type(module) for module in model[1:]] == [type(module) for module in others]


def test_a_model_fused_for_quantisation_but_not_prepared_is_swapped():
    fused = nni.ConvBnReLU2d(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = swap(nn.Sequential(fused), "group").model
    assert model(torch.rand(2, 1, 5, 5)).shape == (2, 8, 3, 3)


class Compiled(nn.Module):
    """A copy of it still runs the model that it was made from."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.run = torch.compile(self.run, backend="eager")

    def run(self, x):
        return self.net(x)

    def forward(self, x):
        return self.run(x)


def test_a_copy_that_runs_the_old_layers_is_refused():
    x = torch.randn(4, 1, 8, 8)
    with pytest.raises(ConfigurationError, match="a copy of Compiled still runs"):
        swap(Compiled(), sample=x)
    model = Compiled()
    assert swap(model, sample=x, in_place=True).output_change > 0.01
    assert not find_layers(model)


def test_a_layer_that_is_called_by_keyword_tells_its_size():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(32)

        def forward(self, x):
            return self.norm(input=x)

    result = swap(Named(), sample=torch.randn(4, 32, 2, 2))
    assert [(layer.positions, layer.groups) for layer in result.replaced] == [(4, 8)]


def test_a_compiled_part_is_compiled_anew():
    """A graph that still held the BN layer would give what it gave."""
    inner = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(torch.compile(inner, backend="eager"))
    x = torch.rand(4, 1, 6, 6)
    model(x)
    swap(model, "group", in_place=True)
    torch.testing.assert_close(model(x), nn.Sequential(*inner)(x))
    assert isinstance(inner[1], nn.GroupNorm)


def test_the_groups_of_a_swap_make_it_again_without_a_sample():
    model = nn.Sequential(nn.Conv1d(1, 32, 1), nn.BatchNorm1d(32), nn.BatchNorm1d(32))
    chosen = swap(model, "group", sample=torch.randn(2, 1, 40)).groups
    assert chosen == {"1": 8, "2": 8}
    assert swap(model, "group", groups=chosen).groups == chosen
    alone = nn.Sequential(nn.BatchNorm1d(1))
    chosen = swap(alone, "group", sample=torch.randn(2, 1, 40)).groups
    assert swap(alone, "group", groups=chosen).groups == {"0": 1}


def test_nothing_is_compiled_to_look_at_a_model():
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph

    model = nn.Sequential(torch.compile(conv_net(), backend=backend))
    swap(model, sample=torch.randn(4, 1, 8, 8))
    assert not compiled
