"""Rules of other packages, by the entry point group ``bnguard.rules``."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from torch import nn

import bnguard
from bnguard.rules import RULES, installed_rules

RULE = """
import bnguard

class WideLayer(bnguard.Rule):
    \"\"\"A layer has too many channels.\"\"\"

    code, name, is_static = {code!r}, {name!r}, True

    def check(self, layer):
        if layer.channels > 3:
            evidence = bnguard.Evidence("channels", layer.channels, 3)
            fix = bnguard.Fix("make it narrower")
            yield self.make_finding(layer, bnguard.Severity.WARNING, "it is wide", evidence, fix)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs packages as pip leaves them: a module, and a dist-info with the entry point."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def install(module, source, target="WideLayer"):
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        entry = f"[bnguard.rules]\n{module} = {module}:{target}\n"
        (info / "entry_points.txt").write_text(entry)

    installed_rules.cache_clear()
    yield install
    installed_rules.cache_clear()


def test_a_rule_of_another_package_runs_and_is_chosen_and_listed(install, tmp_path):
    install("wide_rules", RULE.format(code="WD101", name="wide-layer"))
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(4))
    (finding,) = bnguard.inspect(model, select=["wide-layer"]).findings
    assert (finding.code, finding.layer) == ("WD101", "1")
    assert "WD101" not in repr(bnguard.inspect(model, ignore=["WD101"]))
    assert "WD101" in repr(bnguard.watch(model).report())

    def command(*words):
        program = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import bnguard.cli.main as c; "
        )
        program += f"sys.exit(c.main({list(words)!r}))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        return done.stdout

    assert "WD101 wide-layer" in " ".join(command("rules").split())
    assert "too many channels" in command("explain", "WD101")


@pytest.mark.parametrize(
    ("source", "target", "problem"),
    [
        ("raise RuntimeError('oops')", "x", "RuntimeError: oops"),
        ("x = 3", "x", "TypeError: 3 is not a bnguard.Rule"),
        ("", "x", "AttributeError: .*"),
        (RULE.format(code="BN301", name="wide"), "WideLayer", "BN301 wide collides with BN301 .*"),
        (
            RULE.format(code="WD1", name="hygiene"),
            "WideLayer",
            "WD1 hygiene collides with BN109 .*",
        ),
    ],
)
def test_what_cannot_be_used_is_left_out_with_one_line(install, source, target, problem):
    install(f"broken_{abs(hash((source, target)))}", source, target)
    with pytest.warns(UserWarning, match=rf"a rule is left out, entry point .*: {problem}$"):
        assert installed_rules() == RULES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert installed_rules() == RULES
