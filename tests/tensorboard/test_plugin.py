"""The tab's data over HTTP, from the stock TensorBoard, with both of its loaders."""

import json
import math
import subprocess
import sys
import threading

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from bnguard.tensorboard.metadata import (
    CHANNELS_TAG,
    FINDINGS_TAG,
    STATS_TAG,
    Header,
    standard_metrics,
)
from bnguard.tensorboard.plugin import STATIC_FILES
from bnguard.tensorboard.writer import BatchNormLog, ChannelSnapshot, EventSink
from tests.tensorboard.digits import METRICS
from tests.tensorboard.serving import tensorboard

LOADERS = pytest.mark.parametrize("loader", ["true", "false"])


def test_tensorboard_lists_the_tab_and_enables_it_by_itself(server):
    listing = server.read("data/plugins_listing").json()
    assert listing["bnguard"]["tab_name"] == "BatchNorm"
    assert listing["bnguard"]["enabled"] is True
    assert listing["bnguard"]["loading_mechanism"]["module_path"].endswith("/static/index.js")


def test_a_run_tells_its_layers_metrics_steps_and_findings(server):
    run = server.get("run", run="lagging").json()
    assert run["layers"][0] == "bn"
    assert len(run["layers"]) == 21
    assert [metric["key"] for metric in run["metrics"]] == [metric.key for metric in METRICS]
    assert (run["first_step"], run["last_step"], run["steps"]) == (2, 80, 40)
    assert {finding["code"] for finding in run["findings"]} == {"BN301"}
    assert set(run["channels"]) == set(run["layers"])
    assert run["problems"] == []
    over = next(metric for metric in run["metrics"] if metric["key"] == "eval_shift_std")
    assert over["over_ever"] > 0


def test_statistics_survive_the_way_to_the_page(server):
    head, steps, values = server.get("stats", run="healthy", metric="values_per_channel").series()
    assert head["shape"] == [40, 21]
    assert steps.tolist() == list(range(2, 82, 2))
    assert values[:, 0].tolist() == [32 * 64] * 40
    unknown = server.get("stats", run="healthy", metric="eval_shift_std").series()[2]
    assert np.isnan(unknown[0]).all()
    assert np.isfinite(unknown[-1]).all()


def test_curves_of_a_layer_are_the_same_numbers(server):
    _, steps, by_metric = server.get("layer", run="lagging", layer="layer2.0.bn2").series()
    run = server.get("run", run="lagging").json()
    _, _, by_layer = server.get("stats", run="lagging", metric="gain").series()
    row = [metric["key"] for metric in run["metrics"]].index("gain")
    column = run["layers"].index("layer2.0.bn2")
    assert by_metric.shape == (len(steps), len(METRICS))
    assert np.array_equal(by_metric[:, row], by_layer[:, column])


def test_channels_come_with_the_names_of_their_rows(server):
    head, steps, values = server.get("channels", run="lagging", layer="layer3.0.bn1").series()
    assert steps.tolist() == [20, 40, 60, 80]
    assert head["names"][:2] == ["batch_shift_std", "batch_log_variance_ratio"]
    assert values.shape == (4, len(head["names"]), 48)
    assert np.isfinite(values).all()


def test_rules_have_their_pages(server):
    assert "Why it matters" in dict(server.get("rules").json()["BN301"][1])


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("run", {"run": "no such run"}),
        ("run", {}),
        ("stats", {"run": "healthy", "metric": "nothing"}),
        ("layer", {"run": "healthy", "layer": "<script>"}),
        ("channels", {"run": "healthy", "layer": "../../stats"}),
    ],
)
def test_what_is_not_there_is_refused_as_plain_text(server, path, query):
    answer = server.get(path, **query)
    assert answer.status == 404
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "run" in answer.body.decode()


@pytest.mark.parametrize("name", STATIC_FILES)
def test_static_files_have_their_type(server, name):
    answer = server.get(f"static/{name}")
    assert answer.status == 200
    assert answer.headers["Content-Type"].split(";")[0] == STATIC_FILES[name]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "static/../plugin.py",
        "static/..%2fplugin.py",
        "static/%2e%2e/loader.py",
        "static//etc/passwd",
        "static/",
        "static/index.js/..",
        "static/README.md",
    ],
)
def test_nothing_else_is_served(server, path):
    assert server.get(path).status == 404


def test_answers_have_their_types(server):
    assert server.get("runs").headers["Content-Type"] == "application/json"
    binary = server.get("stats", run="healthy", metric="gain")
    assert binary.headers["Content-Type"] == "application/octet-stream"
    assert binary.headers["X-Content-Type-Options"] == "nosniff"


@pytest.fixture(scope="module")
def difficult_log(tmp_path_factory):
    """A resumed run, a long one, and others that are broken on purpose."""
    folder = tmp_path_factory.mktemp("difficult")
    metrics = standard_metrics()
    for start, offset in ((0, 0.0), (50, 1000.0)):
        writer = SummaryWriter(folder / "resumed")
        log = BatchNormLog(writer, ["bn"], metrics)
        log.add_findings([{"code": "BN302", "layer": "bn", "step": start}], start)
        for step in range(start, 120 if start else 100):
            log.add_stats(np.full((len(metrics), 1), offset + step), step)
        writer.close()
    writer = SummaryWriter(folder / "hostile")
    names = [
        "<img src=x onerror=alert(1)>",
        "../../../etc/passwd",
        "a\u202eb\n\x1b[31m",
        "x" * 5000,
    ]
    log = BatchNormLog(writer, names, metrics)
    values = np.array([[math.nan, math.inf, -math.inf, 1e30]] * len(metrics))
    for step in range(3):
        log.add_stats(values, step)
    log.add_findings([{"code": "</script>", "layer": name, "fix": 7} for name in names], 2)
    log.add_channels(names[1], ChannelSnapshot(running_mean=np.zeros(2), running_var=np.ones(2)), 2)
    EventSink(writer).add_array(STATS_TAG, np.zeros((2, 2), dtype=np.float32), 3)
    writer.close()
    contents = {
        "schema": json.dumps({"schema": 99}).encode(),
        "garbage": b"\xff\x00not json",
        "deep": b"[" * 100_000,
        "many": json.dumps(
            {"schema": 1, "layers": ["bn"] * 30_000, "metrics": [{"key": "a"}]}
        ).encode(),
    }
    rows = len(metrics)
    shape = {"dim": [{"size": rows}, {"size": 1}]}
    for name, tag, tensor in (
        # RESOURCE: TensorBoard knows the type, and no array that it could become.
        ("resource", STATS_TAG, {"dtype": 20, "tensor_shape": shape}),
        ("bfloat16", STATS_TAG, {"dtype": 14, "tensor_shape": shape, "tensor_content": b"\0\0"}),
        ("unknown", STATS_TAG, {"dtype": 99, "tensor_shape": shape}),
        ("large", STATS_TAG, {**_sized(3 * 10**9), "float_val": [1.0]}),
        ("nothing said", FINDINGS_TAG, {"dtype": 20}),
        ("channels", CHANNELS_TAG + "bn", {"dtype": 20, "tensor_shape": shape}),
    ):
        writer = SummaryWriter(folder / name)
        log = BatchNormLog(writer, ["bn"], metrics)
        for step in range(3):
            log.add_stats(np.full((rows, 1), step), step)
        log.add_findings([{"code": "BN301", "layer": "bn", "step": 1}], 2)
        statistics = {"running_mean": np.zeros(2), "running_var": np.ones(2)}
        log.add_channels("bn", ChannelSnapshot(**statistics), 2)
        EventSink(writer)._add(tag, tensor, 9, b"")
        writer.close()
    for name, content in contents.items():
        writer = SummaryWriter(folder / name)
        EventSink(writer).add_array(STATS_TAG, np.zeros((1, 1), dtype=np.float32), 0, content)
        writer.close()
    writer = SummaryWriter(folder / "lying")
    _add_tensor(writer, Header(layers=("bn",), metrics=metrics), {"tensor_content": b"\0" * 4})
    writer.close()
    writer = SummaryWriter(folder / "huge")
    _add_tensor(writer, Header(layers=("bn",), metrics=metrics), {"float_val": [1.0]}, 10**14)
    writer.close()
    return folder


def _add_tensor(writer, header, data, size=1000):
    EventSink(writer)._add(STATS_TAG, {**_sized(size), **data}, 0, header.encode())


def _sized(size):
    return {"dtype": 1, "tensor_shape": {"dim": [{"size": size}]}}


@pytest.fixture(scope="module", params=["true", "false"], ids=["data-server", "python-loader"])
def difficult(request, difficult_log):
    with tensorboard(difficult_log, "--load_fast", request.param) as running:
        running.wait_for_runs(14)
        yield running


def test_a_resumed_run_has_each_step_once_with_its_newest_value(difficult):
    _, steps, values = difficult.get("stats", run="resumed", metric="gain").series()
    assert steps.tolist() == list(range(120))
    assert values[:, 0].tolist() == [*range(50), *range(1050, 1120)]
    assert [
        finding["step"] for finding in difficult.get("run", run="resumed").json()["findings"]
    ] == [50]


def test_hostile_names_are_passed_on_as_data(difficult):
    run = difficult.get("run", run="hostile").json()
    assert run["layers"][0] == "<img src=x onerror=alert(1)>"
    assert run["findings"][0]["fix"] == {"summary": "", "command": ""}
    assert run["problems"] == ["1 event was left out: of another shape or type, or damaged"]
    values = difficult.get("stats", run="hostile", metric="gain").series()[2]
    assert np.isnan(values[0, 0])
    assert values[0, 1:3].tolist() == [math.inf, -math.inf]
    snapshot = difficult.get("channels", run="hostile", layer="../../../etc/passwd").series()[2]
    assert snapshot.shape[2] == 2


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("schema", "schema version '99'"),
        ("garbage", "not readable"),
        ("deep", "not readable"),
        ("many", "more than 20000"),
    ],
)
def test_headers_that_do_not_fit_are_refused_with_a_reason(difficult, run, reason):
    listed = {entry["name"]: entry["problem"] for entry in difficult.get("runs").json()}
    assert reason in listed[run]
    answer = difficult.get("run", run=run)
    assert (answer.status, reason in answer.body.decode()) == (404, True)


@pytest.mark.parametrize("run", ["lying", "huge"])
def test_tensors_that_contradict_themselves_are_refused_with_a_reason(difficult, run):
    answer = difficult.get("run", run=run)
    assert answer.status == 404
    assert "broken" in answer.body.decode() or "shape" in answer.body.decode()


@pytest.mark.parametrize("run", ["resource", "bfloat16", "unknown", "large"])
def test_an_event_that_cannot_be_read_hides_no_other(difficult, run):
    answer = difficult.get("run", run=run)
    assert answer.status == 200, answer.body
    assert answer.json()["steps"] == 3
    assert answer.json()["problems"] == [
        "1 event was left out: of another shape or type, or damaged"
    ]
    assert difficult.get("stats", run=run, metric="gain").series()[1].tolist() == [0, 1, 2]


def test_findings_and_channels_survive_what_cannot_be_read(difficult):
    run = difficult.get("run", run="nothing said").json()
    assert [finding["code"] for finding in run["findings"]] == ["BN301"]
    assert run["problems"] == ["the findings of step 9 are not readable: it holds no text"]
    head, steps, _ = difficult.get("channels", run="channels", layer="bn").series()
    assert head["shape"][2] == 2
    assert steps.tolist() == [2]


@LOADERS
def test_a_live_run_shows_what_was_written_since(tmp_path, loader):
    writer = SummaryWriter(tmp_path / "live")
    log = BatchNormLog(writer, ["bn"], standard_metrics())
    log.add_stats(np.zeros((len(standard_metrics()), 1)), 0)
    writer.flush()
    with tensorboard(tmp_path, "--load_fast", loader) as running:
        (before,) = running.wait_for_runs(1)
        log.add_stats(np.ones((len(standard_metrics()), 1)), 1)
        writer.flush()
        for _ in range(100):
            (after,) = running.get("runs").json()
            if after["version"] != before["version"]:
                break
            threading.Event().wait(0.1)
        assert running.get("stats", run="live", metric="gain").series()[1].tolist() == [0, 1]
    writer.close()


@LOADERS
def test_many_steps_are_kept_and_a_path_prefix_holds(tmp_path, loader):
    writer = SummaryWriter(tmp_path / "long")
    log = BatchNormLog(writer, ["bn"], standard_metrics())
    for step in range(1500):
        log.add_stats(np.zeros((len(standard_metrics()), 1)), step)
    writer.close()
    with tensorboard(tmp_path, "--load_fast", loader, "--path_prefix", "/here") as running:
        assert running.url.endswith("/here/")
        running.wait_for_runs(1)
        assert running.get("run", run="long").json()["steps"] == 1500


def test_the_plugin_imports_neither_torch_nor_lightning():
    code = (
        "import sys; import bnguard.tensorboard.plugin, bnguard.tensorboard.log_report; "
        "heavy = ('torch', 'lightning', 'pytorch_lightning'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
