"""Loaders of all kinds, wrapped models, and layers that stay as they are."""

import collections
import copy
import itertools

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard.errors import CalibrationError, ConfigurationError


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6))


class Named(nn.Module):
    """Takes its input by name."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, scale=1.0):
        return self.net(x * scale)


def expected(model, x):
    """Statistics of the first layer, and of the second in eval mode after it."""
    first = model[0](x).double()
    twin = copy.deepcopy(model).double().eval()
    twin[1].running_mean.copy_(first.mean(0))
    twin[1].running_var.copy_(first.var(0))
    with torch.no_grad():
        second = twin[:3](x.double())
    return [first.mean(0), first.var(0), second.mean(0), second.var(0)]


def check(model, found, x):
    values = []
    for layer in (found[1], found[3]):
        values += [layer.running_mean.double(), layer.running_var.double()]
    for value, truth in zip(values, expected(model, x), strict=True):
        assert torch.allclose(value, truth, atol=1e-5)


Point = collections.namedtuple("Point", "x label")


@pytest.mark.parametrize(
    "yielded",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, torch.zeros(len(x))],
        lambda x: [x],
        lambda x: Point(x, torch.zeros(len(x))),
    ],
    ids=["tensor", "tuple", "list", "list of one", "named tuple"],
)
def test_batches_that_the_model_takes_as_they_are(yielded):
    model, x = net(), torch.randn(30, 4)
    before = copy.deepcopy(model)
    result = bnguard.recalibrate(model, [yielded(part) for part in x.split(7)])
    assert (result.samples, result.batches) == (30, 5)
    check(before, model, x)


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, collections.UserDict])
def test_entries_of_mappings_are_passed_by_name_if_the_forward_has_them(kind):
    model, x = Named(), torch.randn(30, 4)
    before = copy.deepcopy(model)
    bnguard.recalibrate(
        model, [kind(x=part, label=torch.zeros(len(part)), scale=1.0) for part in x.split(7)]
    )
    check(before.net, model.net, x)


def test_a_mapping_without_a_parameter_of_the_forward():
    with pytest.raises(CalibrationError, match=r"\(image\) is a parameter of Named\.forward"):
        bnguard.recalibrate(Named(), [{"image": torch.randn(4, 4)}])


def test_anything_else_asks_for_forward():
    with pytest.raises(CalibrationError, match=r"yields str, .* pass a forward"):
        bnguard.recalibrate(net(), ["a", "b"])


class Graph:
    """A batch of a class of its own."""

    def __init__(self, x):
        self.x = x
        self.moves = 0

    def to(self, device):
        self.moves += 1
        return self


def test_forward_calls_the_model_on_batches_of_any_kind():
    model, x = net(), torch.randn(30, 4)
    before, batches = copy.deepcopy(model), [Graph(part) for part in x.split(6)]
    bnguard.recalibrate(model, batches, forward=lambda model, batch: model(batch.x))
    check(before, model, x)
    assert all(batch.moves == 1 for batch in batches)


def test_a_forward_that_fails_names_the_batch_and_what_to_pass():
    with pytest.raises(
        CalibrationError, match=r"failed at batch 0: RuntimeError: .*pass a forward"
    ):
        bnguard.recalibrate(net(), [torch.randn(4, 9)])


def test_an_infinite_loader_is_cut_at_exactly_the_number_of_samples():
    model, x = net(), torch.randn(7, 4)
    before = copy.deepcopy(model)
    result = bnguard.recalibrate(model, itertools.repeat(x), samples=24)
    assert (result.samples, result.batches) == (24, 4)
    check(before, model, torch.cat([x, x, x, x[:3]]))


def test_a_generator_and_a_data_loader():
    model, x = net(), torch.randn(30, 4)
    before = copy.deepcopy(model)
    bnguard.recalibrate(model, (part for part in x.split(4)))
    check(before, model, x)
    loader = DataLoader(TensorDataset(x, torch.zeros(30)), batch_size=8)
    bnguard.recalibrate(model, loader)
    check(before, model, x)


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)


def test_a_lightning_module_is_called_on_the_input():
    model, x = Lit(), torch.randn(30, 4)
    before = copy.deepcopy(model.net)
    bnguard.recalibrate(model, [(part, torch.zeros(len(part))) for part in x.split(7)])
    check(before, model.net, x)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["DataParallel", "torch.compile"],
)
def test_wrapped_models(wrap):
    model, x = net(), torch.randn(30, 4)
    before, wrapped = copy.deepcopy(model), wrap(model)
    wrapped.eval()(x)
    result = bnguard.recalibrate(wrapped, x.split(7))
    assert set(result.after) == {"1", "3"}
    check(before, model, x)


def test_compiled_parts():
    model, x = net(), torch.randn(30, 4)
    before = copy.deepcopy(model)
    model[1].compile(backend="eager")
    outer = nn.Sequential(model[0], model[1], torch.compile(model[2:], backend="eager"))
    with torch.no_grad():
        outer.eval()(x)
    result = bnguard.recalibrate(outer, x.split(7))
    assert len(result.after) == 2
    check(before, model, x)


def test_a_method_that_is_compiled():
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.run = torch.compile(self.run, backend="eager")

        def run(self, x):
            return self.net(x)

        def forward(self, x):
            return self.run(x)

    model, x = Compiled(), torch.randn(30, 4)
    before = copy.deepcopy(model.net)
    bnguard.recalibrate(model, x.split(7))
    check(before, model.net, x)


def test_layers_that_the_user_froze_are_kept():
    model, x = net().train(), torch.randn(30, 4)
    model[1].eval()
    kept = model[1].running_mean.clone()
    result = bnguard.recalibrate(model, x.split(7))
    assert [(layer.name, layer.reason) for layer in result.skipped] == [
        ("1", "is in eval mode while the model is in train mode")
    ]
    assert torch.equal(model[1].running_mean, kept)
    assert [module.training for module in model] == [True, False, True, True]


def test_in_a_model_in_eval_mode_no_layer_counts_as_frozen():
    assert set(bnguard.recalibrate(net().eval(), [torch.randn(30, 4)]).after) == {"1", "3"}


def test_layers_without_running_statistics_are_skipped():
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4))
    result = bnguard.recalibrate(model, torch.randn(30, 4).split(10))
    assert [(layer.name, layer.reason) for layer in result.skipped] == [
        ("0", "has no running statistics")
    ]
    assert abs(result.after["1"].var - 10 / 9 * 0.9).max() < 0.05


def test_a_layer_that_no_batch_reaches_is_kept_and_reported():
    model = nn.Sequential(net(), nn.BatchNorm1d(6))
    result = bnguard.recalibrate(
        model, torch.randn(30, 4).split(7), forward=lambda model, batch: model[0](batch)
    )
    assert [(layer.name, layer.reason) for layer in result.skipped] == [
        ("1", "was not reached by any batch")
    ]
    assert (model[1].running_var == 1.0).all()


def test_no_layer_is_reached():
    with pytest.raises(CalibrationError, match="no batch reached a BN layer"):
        bnguard.recalibrate(
            net(), [torch.randn(30, 4)], forward=lambda model, batch: model[0](batch)
        )


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (torch.randn(32, 4), r"is a tensor of shape \(32, 4\), .*: pass loader\.split\(32\)"),
        (TensorDataset(torch.randn(32, 4)), "is a TensorDataset, which yields samples"),
        ({"train": [torch.randn(32, 4)]}, "is of type dict, and yields no batches"),
        ("data.pt", "is of type str, and yields no batches"),
        (None, "is of type NoneType, and yields no batches"),
        ((torch.randn(32, 4), torch.zeros(32)), "is a tuple of tensors .*, one batch by the look"),
        ([torch.randn(32, 4), torch.zeros(32, 4).long()], "is a list of tensors .*: pass .*loader"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_yields_no_batches_is_named(loader, message):
    with pytest.raises(CalibrationError, match=f"^the loader {message}"):
        bnguard.recalibrate(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), loader)


def test_lazy_layers_want_a_batch_first():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    for repair in (bnguard.recalibrate, bnguard.diagnose):
        with pytest.raises(CalibrationError, match="0 is lazy and has seen no batch"):
            repair(model, [torch.randn(30, 4)])
    model(torch.randn(30, 4))
    assert bnguard.recalibrate(model, [torch.randn(30, 4)]).is_kept


@pytest.mark.parametrize("repair", [bnguard.recalibrate, bnguard.diagnose])
def test_layers_without_values_want_them_first(repair):
    with pytest.raises(CalibrationError, match="1 is on the meta device and holds no values"):
        repair(net().to("meta"), [torch.randn(30, 4)])


def test_inference_mode():
    x = torch.randn(30, 4)
    with torch.inference_mode():
        model = net()
        before = copy.deepcopy(model)
    with pytest.raises(CalibrationError, match="1 was made in inference mode"):
        bnguard.recalibrate(model, x.split(7))
    with torch.inference_mode():
        bnguard.recalibrate(model, x.split(7))
        check(before, model, x)


def test_layers_can_be_chosen_by_name_and_by_pattern():
    model, x = nn.Sequential(net(), net()[1:]), torch.randn(30, 4)
    assert set(bnguard.recalibrate(model, [x], layers=["0.*"]).after) == {"0.1", "0.3"}
    assert set(bnguard.recalibrate(model, [x], layers=["1.1", "0.3"]).after) == {"0.3", "1.1"}
    with pytest.raises(ConfigurationError, match="layers '2' matches no BN layer"):
        bnguard.recalibrate(model, [x], layers=["2"])


def test_a_model_without_bn_layers():
    with pytest.raises(CalibrationError, match="Linear has no BN layers"):
        bnguard.recalibrate(nn.Linear(4, 4), [torch.randn(30, 4)])


def test_an_empty_loader_and_too_few_values():
    with pytest.raises(CalibrationError, match="loader is empty"):
        bnguard.recalibrate(net(), [])
    with pytest.raises(CalibrationError, match="1: 1 value a channel is too few"):
        bnguard.recalibrate(net(), [torch.randn(1, 4)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method 'best' does not exist: use 'exact' or"),
        ({"keep": "maybe"}, "keep 'maybe' does not exist"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite 'ignore' does not exist"),
        ({"samples": 0}, "samples 0"),
        ({"samples": 2.5}, "samples 2.5 is not a whole number"),
        ({"samples": "all"}, "samples 'all' is not a whole number"),
        ({"prior": float("nan"), "method": "adapt"}, "prior nan"),
        ({"prior": "much", "method": "adapt"}, "prior 'much'"),
        ({"tolerance": float("nan")}, "tolerance nan"),
        ({"tolerance": "low"}, "tolerance 'low'"),
        ({"score": 0.9}, "score=0.9 is not a function"),
        ({"layers": 9}, "layers '9' matches no BN layer"),
        ({"prior": 10}, "prior 10 needs method 'adapt'"),
        ({"tolerance": 0.0}, "tolerance 0"),
        ({"method": "ema"}, "method 'ema' does not exist: use 'exact' or 'precise' or 'adapt'"),
        ({"memory": "much"}, "memory 'much' is not an amount"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigurationError, match=message):
        bnguard.recalibrate(net(), [torch.randn(30, 4)], **options)


@pytest.mark.parametrize("call", [bnguard.recalibrate, bnguard.diagnose])
@pytest.mark.parametrize("model", ["last.ckpt", None, net().state_dict(), nn.BatchNorm1d])
def test_other_objects_than_models_are_refused(call, model):
    with pytest.raises(ConfigurationError, match=r"takes a torch\.nn\.Module, not"):
        call(model, [torch.randn(30, 4)])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("call", [bnguard.recalibrate, bnguard.diagnose])
def test_a_scripted_model_cannot_be_read(call):
    x = torch.randn(30, 4)
    for model in (torch.jit.script(net()), torch.jit.trace(net().eval(), x)):
        with pytest.raises(CalibrationError, match="TorchScript, whose layers cannot be read"):
            call(model, [x])


@pytest.mark.parametrize(
    "buffer", [torch.ones(1).expand(3), torch.eye(3).to_sparse()], ids=["expanded", "sparse"]
)
def test_buffers_of_any_kind(buffer):
    class Scale(nn.Module):
        def forward(self, x):
            return x * self.table.to_dense().sum()

    model, x = net().append(Scale()), torch.randn(40, 4)
    model[-1].register_buffer("table", buffer)
    bnguard.recalibrate(model, x.split(8))
    check(model, model, x)
    assert model[-1].table is buffer


def test_parts_on_the_meta_device_do_not_say_where_the_model_is():
    model, x = net(), torch.randn(40, 4)
    model.register_buffer("offloaded", torch.empty(3, device="meta"))
    model = nn.Sequential(nn.Linear(3, 3, device="meta"), model)
    result = bnguard.recalibrate(model, x.split(8), forward=lambda model, x: model[1](x))
    assert len(result.layers) == 2


def test_errors_are_one_line():
    def loader():
        yield torch.randn(8, 4)
        raise OSError("disk is gone\nat sector 5")

    with pytest.raises(CalibrationError, match=r"batch 1: OSError: disk is gone$"):
        bnguard.recalibrate(net(), loader())
    with pytest.raises(CalibrationError) as raised:
        bnguard.recalibrate(net(), [[[torch.randn(8, 4)]]])
    assert len(str(raised.value).splitlines()) == 1


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise OSError("disk is gone")


def test_an_error_of_a_worker_says_what_it_was():
    loader = DataLoader(Broken(), batch_size=4, num_workers=1)
    with pytest.raises(CalibrationError, match=r"^the loader failed at batch 0: OSError: disk is"):
        bnguard.recalibrate(net(), loader)


@pytest.mark.filterwarnings("ignore:isinstance.treespec:FutureWarning")
@pytest.mark.parametrize("call", [bnguard.recalibrate, bnguard.diagnose])
def test_an_exported_graph_cannot_be_read(call):
    x = torch.randn(30, 4)
    graph = torch.export.export(net(), (x,)).module()
    with pytest.raises(CalibrationError, match=r"made by torch\.export, whose layers cannot be"):
        call(graph, [x])
    call(torch.fx.symbolic_trace(net()), [x])


class Padded(nn.Module):
    """Takes a nested tensor, the first position of each row."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, rows):
        return self.net(torch.nested.to_padded_tensor(rows, 0.0)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    rows = [torch.randn(3 + index % 2, 4) for index in range(40)]
    batches = [torch.nested.nested_tensor(part, layout=layout) for part in (rows[:20], rows[20:])]
    model = Padded()
    bnguard.recalibrate(model, batches)
    check(model.net, model.net, torch.stack([row[0] for row in rows]))
    assert bnguard.diagnose(model, batches).samples == 40


@pytest.mark.parametrize("call", [bnguard.recalibrate, bnguard.diagnose])
def test_batches_that_cannot_be_moved_are_said(call):
    with pytest.raises(CalibrationError, match="batch 1 of the loader cannot be moved to cpu"):
        call(net(), [torch.randn(30, 4), torch.randn(30, 4, device="meta")])


def test_a_last_batch_of_one_that_no_layer_takes_is_for_drop_last():
    model = net().append(nn.BatchNorm1d(6, track_running_stats=False))
    with pytest.raises(CalibrationError, match=r"more than 1 value.* \(drop_last=True\)$"):
        bnguard.recalibrate(model, torch.randn(33, 4).split(32), method="precise")
