"""Choosing rules and limits, in code and in pyproject.toml."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import bnguard
from bnguard.configuration import Configuration, read_configuration
from bnguard.errors import ConfigurationError

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="the parser came with 3.11")


def codes(configuration):
    return {rule.code for rule in configuration.rules()}


def test_by_default_all_rules_run():
    assert Configuration().rules() == bnguard.RULES


def test_rules_are_meant_by_code_name_or_prefix():
    assert codes(Configuration(select=["BN40"])) == {"BN401", "BN402", "BN403", "BN404"}
    assert codes(Configuration(select=["statistic-drift", "bn303"])) == {"BN301", "BN303"}
    assert codes(Configuration(select=["BN3"], ignore=["BN302", "input-shift"])) == {
        "BN301",
        "BN303",
        "BN304",
        "BN306",
    }


def test_what_is_ignored_does_not_run_also_where_it_is_selected():
    assert codes(Configuration(select=["BN301"], ignore=["BN3"])) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": ["BN31"]}, "did you mean BN301"),
        ({"ignore": ["statistics-drift"]}, "did you mean BN301 statistic-drift"),
        ({"ignore": ["BN9"]}, "no rule is called 'BN9'"),
        ({"per_layer_ignores": {"*": ["hygeine"]}}, "did you mean BN109 hygiene"),
        ({"limits": {"BN301": {"max_shift": 2}}}, "did you mean max_shift_std"),
        ({"limits": {"BN301": {"max_shift_std": "2"}}}, "must be a number"),
        ({"limits": {"BN301": {"max_shift_std": True}}}, "must be a number"),
        ({"limits": {"BN301": {"max_shift_std": float("nan")}}}, "must be a number, not nan"),
        ({"limits": {"BN301": {"channel_quantile": 90}}}, "must be between 0 and 1, not 90"),
        ({"limits": {"BN301": 2.0}}, "limits of BN301 must be numbers by name, not 2.0"),
        ({"limits": {"drift": {}}}, "no rule is called 'drift'"),
        ({"select": "BN301"}, "select must be a list of codes, not 'BN301'"),
        ({"per_layer_ignores": {"head.*": "BN1"}}, r"head.\* must be a list of codes"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_answered_with_the_nearest(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Configuration(**options)


def test_a_limit_changes_its_rule_alone():
    rules = Configuration(limits={"statistic-drift": {"max_shift_std": 7.0}}).rules()
    changed = [rule for rule, usual in zip(rules, bnguard.RULES, strict=True) if rule != usual]
    assert [(rule.code, rule.max_shift_std) for rule in changed] == [("BN301", 7.0)]


def two_layers_with_a_keras_momentum():
    return nn.Sequential(nn.BatchNorm1d(2, momentum=0.99), nn.BatchNorm1d(2, momentum=0.99))


def findings(**options):
    model = two_layers_with_a_keras_momentum()
    with bnguard.watch(model, on_findings=lambda group: None, **options) as monitor:
        model(torch.randn(8, 2))
        monitor.step()
    return {(finding.code, finding.layer) for finding in monitor.report().findings}


def test_a_watched_run_uses_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert findings() == {("BN103", "0"), ("BN103", "1")}
    assert findings(per_layer_ignores={"1": ["BN1"]}) == {("BN103", "0")}
    assert findings(ignore=["momentum-out-of-range"]) == set()
    assert findings(select=["BN3"]) == set()
    assert findings(limits={"BN103": {"max_momentum": 1.0}}) == set()


@needs_toml
def test_the_project_file_is_read_and_what_code_says_goes_before_it(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(
        """
        [tool.bnguard]
        ignore = ["BN103"]
        [tool.bnguard.per-layer-ignores]
        "1" = ["BN1"]
        [tool.bnguard.limits.BN301]
        max_shift_std = 2.0
        """
    )
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    read = read_configuration()
    assert read.ignore == ("BN103",)
    assert read.limits == {"BN301": {"max_shift_std": 2.0}}
    assert findings() == set()
    assert findings(ignore=[]) == {("BN103", "0")}


@needs_toml
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.bnguard]\nignroe = []", "no key 'ignroe': did you mean ignore"),
        ("[tool.bnguard]\nignore = 'BN1'", "ignore must be a list"),
        ("[tool.bnguard]\nignore = ['BN31']", "did you mean BN301"),
        ("[tool.bnguard]\nlimits = 3", "limits must be a table"),
        ("[tool.bnguard", "is not valid TOML"),
        ("[tool]\nbnguard = 3", "bnguard must be a table"),
        ("[tool]\nbnguard.ignroe = []", "no key 'ignroe'"),
    ],
    ids=str,
)
def test_a_bad_project_file_is_one_line_that_names_it(text, message, tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_configuration(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) or "TOML" in str(caught.value)


def test_a_project_file_without_it_changes_nothing(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text("[project]\nname = 'x'\n")
    assert read_configuration(path) == Configuration()
