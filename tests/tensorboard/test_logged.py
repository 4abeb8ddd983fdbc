"""The last report of a run, from its event files."""

import numpy as np
import pytest
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from bnguard.cli.main import main
from bnguard.findings import Severity
from bnguard.tensorboard.log_report import LoggedRun, logged_runs
from bnguard.tensorboard.metadata import FINDINGS_TAG, STATS_TAG, LogError, standard_metrics
from bnguard.tensorboard.records import as_findings, finding_record
from bnguard.tensorboard.writer import BatchNormLog, EventSink


def test_runs_tell_their_findings(digits_log):
    healthy, lagging = logged_runs(digits_log)
    assert (healthy.name, lagging.name) == ("healthy", "lagging")
    assert (lagging.first_step, lagging.last_step, len(lagging.layers)) == (2, 80, 21)
    assert lagging.worst_severity is Severity.WARNING
    assert "21 BN layers · step 2 to 80" in str(lagging)
    assert "BN301 statistic-drift" in str(lagging)
    fix = (
        "\n         → recalibrate the running statistics\n           bnguard recalibrate last.ckpt"
    )
    assert fix in str(lagging)


def test_a_root_cause_is_above_what_it_explains_whatever_its_severity():
    raw = {"evidence": {"measure": "shift", "value": 2.0, "limit": 1.0}, "layer": "bn"}
    gap = {**raw, "code": "BN302", "severity": "error", "cause": "BN301"}
    drift = {**raw, "code": "BN301", "severity": "warning", "cause": "BN999"}
    findings = as_findings(map(finding_record, [gap, drift]))
    _, first, *lines = str(LoggedRun(name="run", findings=tuple(findings))).splitlines()
    assert first == "error  BN301 : shift 2 (limit 1)"
    assert lines[-1].strip() == "leads to BN302 : shift 2 (limit 1) at bn"


def test_a_clean_run_says_so(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        metrics = standard_metrics()
        BatchNormLog(writer, ["bn"], metrics).add_stats(np.zeros((len(metrics), 1)), 0)
    (run,) = logged_runs(tmp_path)
    assert str(run).endswith("nothing is wrong")
    assert run.worst_severity is None


def test_a_terminal_is_told_nothing_by_a_name():
    texts = ("code", "name", "layer", "message", "cause")
    finding = finding_record(
        {
            **dict.fromkeys(texts, "\x1b]0;owned\x07\nfake line\u202e"),
            "evidence": {"measure": "\x1b\n", "value": 1.0, "unit": "\x1b\n"},
            "fix": {"summary": "\x1b\n", "command": "\x1b\n"},
        }
    )
    text = str(LoggedRun(name="a\x1b[2J", findings=tuple(as_findings([finding]))))
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert len(text.splitlines()) == 5


def test_what_cannot_be_read_says_what_to_do(tmp_path):
    with pytest.raises(LogError, match="holds no run that bnguard watched"):
        logged_runs(tmp_path)
    with pytest.raises(LogError, match="is not a folder"):
        logged_runs(tmp_path / "nothing")


def test_the_numbers_of_a_group_are_those_of_its_worst_layer():
    def found(layer, **evidence):
        raw = {"code": "BN1", "severity": "warning", "layer": layer, "evidence": evidence}
        return finding_record(raw)

    def text(*records):
        run = str(LoggedRun(name="run", findings=tuple(as_findings(records))))
        return " ".join(run.partition("BN1 : ")[2].split())

    shifts = [found("a", value=2.0, limit=1.0), found("b", value=7.0, limit=1.0)]
    assert text(*shifts).startswith("7 (limit 1) at 2 layers, worst b:")
    least = {"limit": 0.5, "is_minimum": True}
    shares = [found("a", value=0.1, **least), found("b", value=0.3, **least)]
    assert text(*shares).startswith("0.1 (at least 0.5) at 2 layers, worst a:")
    broken = [found("a", value=9.0, limit=1.0), found("b", value=float("nan"), limit=1.0)]
    assert text(*broken).startswith("nan (limit 1) at 2 layers, worst b:")


def written(folder, *, findings=()):
    metrics = standard_metrics()
    with SummaryWriter(folder) as writer:
        log = BatchNormLog(writer, ["bn"], metrics)
        for step in range(3):
            log.add_stats(np.zeros((len(metrics), 1)), step)
        log.add_findings(findings, 2)
        yield writer


def damage(folder, how):
    """Damage the log of a run whose last step is 2."""
    for writer in written(folder, findings=[{"code": "BN1", "severity": "error"}]):
        if how == "type":
            EventSink(writer)._add(STATS_TAG, {"dtype": 20}, 9, b"")
        elif how == "findings":
            EventSink(writer).add_string(FINDINGS_TAG, b"{", 9)
    (file,) = folder.iterdir()
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "junk":
        (folder / "events.out.tfevents.9999999999.host").write_bytes(b"junk" * 50)
    elif how == "record":
        with (folder / "events.out.tfevents.9999999999.host").open("wb") as stream:
            RecordWriter(stream).write(b"\xff no event")
    elif how == "folder":
        (folder / "events.out.tfevents.9999999999.host").mkdir()


@pytest.mark.parametrize(
    ("how", "remark"),
    [
        ("type", "1 event was left out: of another shape or type, or damaged"),
        ("findings", "the findings of step 9 are not readable"),
        ("cut", "ends in the middle of a record"),
        ("junk", "ends in the middle of a record"),
        ("record", "an event file is damaged (DecodeError"),
        ("folder", "an event file is damaged (IsADirectoryError"),
    ],
)
def test_one_bad_file_hides_nothing_else(tmp_path, how, remark, capsys):
    list(written(tmp_path / "a"))
    damage(tmp_path / "b", how)
    list(written(tmp_path / "c"))
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("a", "c"):
        assert f"{name} · 1 BN layer · step 0 to 2 · nothing is wrong" in printed
    assert printed.count(f"note: {remark}" if how not in ("cut", "junk") else remark) == 1
    assert "b · 1 BN layer · step 0 to 2 · " in printed
    assert "b · 1 BN layer · step 0 to 2 · nothing is wrong" not in printed
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--html", str(page)]) == 0
    assert remark in page.read_text("utf-8")


def test_a_run_that_cannot_be_shown_at_all_hides_no_other(tmp_path, capsys):
    list(written(tmp_path / "a"))
    with SummaryWriter(tmp_path / "b") as writer:
        EventSink(writer).add_array(STATS_TAG, np.zeros((1, 1), dtype=np.float32), 0, b"junk")
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "a · 1 BN layer · step 0 to 2 · nothing is wrong" in printed
    assert "b · cannot be shown: the header of bnguard/stats is not readable" in printed
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--html", str(page)]) == 0
    assert "not shown: run b: the header of bnguard/stats" in page.read_text("utf-8")
