"""Which rules run, on which layers, with which limits; in code or in ``pyproject.toml``.

.. code-block:: toml

    [tool.bnguard]
    select = ["BN1", "BN3"]
    ignore = ["BN109"]

    [tool.bnguard.per-layer-ignores]
    "head.*" = ["BN301"]

    [tool.bnguard.limits.BN301]
    max_shift_std = 2.0
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnguard.errors import ConfigurationError, nearest_name
from bnguard.findings import Finding
from bnguard.rules import Rule, installed_rules, rule_named

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEYS = ("select", "ignore", "per-layer-ignores", "limits")

Limit = float | int


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Which rules run, on which layers, with which limits.

    A rule is named by its code, its name, or a prefix of its code (``BN3`` for BN301 to BN306).

    Attributes:
        select: The rules to run; None runs all.
        ignore: The rules not to run, even if selected.
        per_layer_ignores: The rules to ignore on some layers, by glob of their names.
        limits: Limits in place of those of the rules, by rule, then by name.

    Raises:
        ConfigurationError: A rule or a limit does not exist; the message has the nearest name.

    Example:
        >>> configuration = Configuration(ignore=["BN2"], limits={"BN301": {"max_shift_std": 2.0}})
        >>> [rule.code for rule in configuration.rules() if rule.code.startswith("BN2")]
        []
    """

    select: Collection[str] | None = None
    ignore: Collection[str] = ()
    per_layer_ignores: Mapping[str, Collection[str]] = field(default_factory=dict)
    limits: Mapping[str, Mapping[str, Limit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chosen = {"select": self.select or (), "ignore": self.ignore}
        for key, names in (*chosen.items(), *self.per_layer_ignores.items()):
            if isinstance(names, str):
                raise ConfigurationError(f"{key} must be a list of codes, not {names!r}")
            _codes(names)
        for name, changed in self.limits.items():
            if not isinstance(changed, Mapping):
                raise ConfigurationError(
                    f"limits of {name} must be numbers by name, not {changed!r}"
                )
        self.rules()

    def changed(self, **attributes: Any) -> Configuration:
        """Return the configuration with other attributes; those that are None stay as they are.

        Raises:
            ConfigurationError: A rule or a limit does not exist.
        """
        given = {name: value for name, value in attributes.items() if value is not None}
        return dataclasses.replace(self, **given)

    def rules(self, rules: Iterable[Rule] | None = None) -> tuple[Rule, ...]:
        """Return the rules that run, with their limits; the user's own always run.

        Args:
            rules: The rules to choose from; all that are installed by default.

        Raises:
            ConfigurationError: One of them is not a rule.
        """
        own = {rule.code for rule in installed_rules()}
        selected = own if self.select is None else _codes(self.select)
        running = selected - _codes(self.ignore)
        limits = {rule_named(name).code: changed for name, changed in self.limits.items()}
        rules = installed_rules() if rules is None else tuple(rules)
        for rule in rules:
            if not isinstance(rule, Rule):
                raise ConfigurationError(
                    f"rules takes objects of bnguard.rules.Rule, not {rule!r}: select=[...] takes "
                    "codes"
                )
        return tuple(
            with_limits(rule, limits.get(rule.code, {}))
            for rule in rules
            if rule.code in running or rule.code not in own
        )

    def is_wanted(self, finding: Finding) -> bool:
        """Return whether the rule of a finding is not ignored on its layer."""
        return not any(
            finding.layer is not None
            and fnmatch.fnmatchcase(finding.layer, pattern)
            and finding.code in _codes(names)
            for pattern, names in self.per_layer_ignores.items()
        )


def _codes_meant(name: str) -> set[str]:
    """Return the codes of the rules that a code, a name or a prefix of codes names.

    >>> sorted(_codes_meant("BN40"))
    ['BN401', 'BN402', 'BN403', 'BN404']
    """
    if name.upper().startswith("BN") and len(name) < len("BN101"):
        codes = {rule.code for rule in installed_rules() if rule.code.startswith(name.upper())}
        if codes:
            return codes
    return {rule_named(name).code}


def with_limits(rule: Rule, limits: Mapping[str, Limit]) -> Rule:
    """Return a rule with other limits.

    Raises:
        ConfigurationError: The rule lacks a limit of that name, or the value is not a number.
    """
    known = [limit.name for limit in dataclasses.fields(rule)]
    for name, value in limits.items():
        if name not in known:
            near = nearest_name(name, known)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(known)}"
            raise ConfigurationError(f"{rule.code} has no limit {name!r}: {hint}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigurationError(f"{rule.code}: {name} must be a number, not {value!r}")
        if math.isnan(value) or (name.endswith("_quantile") and not 0.0 <= value <= 1.0):
            kind = "between 0 and 1" if name.endswith("_quantile") else "a number"
            raise ConfigurationError(f"{rule.code}: {name} must be {kind}, not {value!r}")
    return dataclasses.replace(rule, **limits) if limits else rule


def read_configuration(path: Path | None = None) -> Configuration:
    """Return the configuration in ``[tool.bnguard]`` of a ``pyproject.toml``, or the default.

    Args:
        path: The file; by default the nearest one in the working directory or above it.

    Raises:
        ConfigurationError: The file cannot be read, or names an unknown key, rule or limit.
    """
    if path is None:
        above = (folder / "pyproject.toml" for folder in (Path.cwd(), *Path.cwd().parents))
        path = next(filter(Path.is_file, above), None)
    if path is None:
        return Configuration()
    table = _table(path)
    for key in table:
        if key not in _KEYS:
            near = nearest_name(key, _KEYS)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(_KEYS)}"
            raise ConfigurationError(f"{path}: [tool.bnguard] has no key {key!r}: {hint}")
    try:
        return Configuration(
            select=_names(table["select"], "select") if "select" in table else None,
            ignore=_names(table.get("ignore", []), "ignore"),
            per_layer_ignores={
                pattern: _names(names, f"per-layer-ignores.{pattern}")
                for pattern, names in _mapping(table, "per-layer-ignores").items()
            },
            limits={name: _mapping(table["limits"], name) for name in _mapping(table, "limits")},
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: [tool.bnguard]: {error}") from error


def _codes(names: Iterable[str]) -> set[str]:
    return {code for name in names for code in _codes_meant(name)}


def _table(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    if "bnguard" not in text:  # It may be invalid for reasons of other tools.
        return {}
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: is not valid TOML: {error}") from error
    try:
        return _mapping(_mapping(document, "tool"), "bnguard")
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _mapping(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{key} must be a table")
    return value


def _names(value: object, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError(f"{key} must be a list of codes")
    return tuple(value)
