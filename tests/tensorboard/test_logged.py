"""The last report of a run, from its event files."""

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from bnguard.tensorboard.logged import LoggedRun, logged_runs
from bnguard.tensorboard.metadata import LogError, standard_metrics
from bnguard.tensorboard.records import finding_record
from bnguard.tensorboard.summary import BatchNormLog


def test_runs_tell_their_findings(digits_log):
    healthy, lagging = logged_runs(digits_log)
    assert (healthy.name, lagging.name) == ("healthy", "lagging")
    assert (lagging.first_step, lagging.last_step, len(lagging.layers)) == (2, 80, 21)
    assert lagging.worst_severity == "warning"
    assert "21 BN layers · step 2 to 80" in str(lagging)
    assert "BN301 statistic-drift" in str(lagging)


def test_a_clean_run_says_so(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        metrics = standard_metrics()
        BatchNormLog(writer, ["bn"], metrics).add_stats(np.zeros((len(metrics), 1)), 0)
    (run,) = logged_runs(tmp_path)
    assert str(run).endswith("nothing is wrong")
    assert run.worst_severity is None


def test_a_terminal_is_told_nothing_by_a_name():
    finding = {
        "code": "BN1",
        "name": "x",
        "severity": "error",
        "layer": "\x1b]0;owned\x07\nfake line",
        "step": None,
        "message": "\u202eeman",
        "evidence": {"name": "", "value": 1.0, "limit": None, "unit": ""},
        "fix": {"summary": "", "command": ""},
    }
    text = str(LoggedRun(name="a\x1b[2J", findings=(finding,)))
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

    shifts = [found("a", value=2.0, limit=1.0), found("b", value=7.0, limit=1.0)]
    assert " 7 (limit 1) at b" in str(LoggedRun(name="run", findings=tuple(shifts)))
    shares = [found("a", value=0.1, limit=0.5), found("b", value=0.3, limit=0.5)]
    assert " 0.1 (limit 0.5) at a" in str(LoggedRun(name="run", findings=tuple(shares)))
    broken = [found("a", value=9.0, limit=1.0), found("b", value=float("nan"), limit=1.0)]
    assert " NaN (limit 1) at b" in str(LoggedRun(name="run", findings=tuple(broken)))
