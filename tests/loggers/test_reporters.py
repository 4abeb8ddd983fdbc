"""The reporters that need no other package, and a user's own, in real Trainers."""

import csv
import json
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from bnguard.findings import FindingGroup
from bnguard.lightning import BatchNormMonitor
from bnguard.loggers import CSV, JSON, REPORT_FILE, Console, Reporter, RunLog, TensorBoard
from bnguard.rules import RULES
from bnguard.tensorboard.log_report import logged_runs
from tests.loggers.runs import fit, train_with_hugging_face


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def lightning(request):
    return pytest.importorskip(request.param)


class Own(Reporter):
    """A user's own, with all methods."""

    def __init__(self):
        self.scalars, self.codes, self.reports, self.layers = [], [], [], []

    def log_scalars(self, scalars, step):
        self.scalars.append((step, dict(scalars)))

    def log_layers(self, report, step):
        self.layers.append(step)

    def log_findings(self, groups, step):
        self.codes += [group.worst.code for group in groups]

    def log_report(self, report, step):
        self.reports.append(report)


def test_a_reporter_of_the_users_own_gets_everything(lightning):
    own = Own()
    callback = BatchNormMonitor(reporters=[own], report="none", strict=True)
    fit(lightning, False, callback)
    # Every second batch, after each of two validations, and at the end.
    assert own.layers == [1, 3, 5, 5, 7, 9, 11, 11, 12]
    assert [step for step, _ in own.scalars] == own.layers
    assert len(own.scalars[-1][1]) == 5
    assert own.codes.count("BN303") == 1
    assert own.reports == [callback.report]


def test_a_reporter_may_leave_methods_out_and_may_fail(lightning, capsys):
    class Fails(Reporter):
        def log_findings(self, groups, step):
            raise OSError("disk full")

    own = Own()
    fit(lightning, False, BatchNormMonitor(reporters=[Fails(), own], strict=True))
    printed = capsys.readouterr().out
    assert printed.count("bnguard: Fails raised OSError: disk full; nothing more is logged") == 1
    assert len(own.reports) == 1


@pytest.mark.parametrize(("scalars", "number"), [("none", 0), ("summary", 5), ("all", 37)])
def test_as_many_columns_as_are_asked_for(lightning, tmp_path, scalars, number):
    logger = lightning.loggers.CSVLogger(tmp_path)
    fit(lightning, logger, BatchNormMonitor(scalars=scalars, strict=True))
    header = next(csv.reader((Path(logger.log_dir) / "metrics.csv").open()))
    assert sum("bnguard" in name for name in header) == number
    own = [name for name in header if "bnguard" not in name]
    # The user's own come first, in whatever order the columns or charts are.
    assert sorted(header, key=str.lower)[: len(own)] == sorted(own, key=str.lower)


def test_files_of_csv_and_json_and_what_is_printed(lightning, tmp_path, capsys):
    reporters = [CSV(tmp_path / "tables"), JSON(tmp_path), Console()]
    callback = BatchNormMonitor(reporters=reporters, report="none", strict=True)
    fit(lightning, False, callback)
    scalars = list(csv.DictReader((tmp_path / "tables/bnguard-scalars.csv").open()))
    assert scalars[-1] == {
        "step": "12",
        "name": "zz_bnguard/findings",
        "value": str(float(len(callback.report.findings))),
    }
    findings = list(csv.DictReader((tmp_path / "tables/bnguard-findings.csv").open("r")))
    assert [row["layer"] for row in findings if row["code"] == "BN303"] == ["layers.1"]
    document = json.loads((tmp_path / REPORT_FILE).read_text("utf-8"))
    assert document == callback.report.to_dict()
    assert "bnguard · 1 BN layer · 12 steps" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / REPORT_FILE).mkdir()
    own = Own()
    fit(pytest.importorskip("pytorch_lightning"), False, BatchNormMonitor(reporters=[own]))
    log = RunLog([JSON(tmp_path)], RULES)
    log.announce([FindingGroup(own.reports[0].findings[:1])], 1)
    log.conclude(own.reports[0], 1)
    log.add_file(tmp_path)
    printed = capsys.readouterr().out
    assert f"{tmp_path / REPORT_FILE} cannot be written: Is a directory; nothing more" in printed


def test_a_plain_loop_writes_the_tab(tmp_path):
    own = Own()
    fit(pytest.importorskip("pytorch_lightning"), False, BatchNormMonitor(reporters=[own]))
    with SummaryWriter(tmp_path) as writer:
        RunLog([TensorBoard(writer)], RULES).conclude(own.reports[0], 3)
    (run,) = logged_runs(tmp_path)
    assert len(run.findings) == len(own.reports[0].findings)


def test_hugging_face_writes_to_tensorboard_and_to_the_users_own(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from bnguard.transformers import BatchNormCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    own = Own()
    callback = BatchNormCallback(reporters=[own])
    train_with_hugging_face(transformers, tmp_path, callback, report_to=["tensorboard"])
    assert own.codes.count("BN303") == 1
    assert own.reports == [callback.report]
    assert len(own.scalars[-1][1]) == 5
    # At the logging steps, after the two evaluations, with the time it took, and at the end.
    assert own.layers == [2, 4, 6, 6, 8, 10, 12, 12, 12, 12]
    (run,) = logged_runs(tmp_path / "logs/bnguard")
    assert len(run.findings) == len(callback.report.findings)
    printed = capsys.readouterr().out
    assert printed.count("bnguard: warning: BN303") == 1
    assert "1 BN layer · 12 steps" in printed
