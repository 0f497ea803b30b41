"""Files and `section.key=value` overrides -> a checked Config, or one message with all problems."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebwm_scale.config.checks import check
from ebwm_scale.config.messages import problems_of
from ebwm_scale.config.schema import Config, Section
from ebwm_scale.config.shipped import find_config
from ebwm_scale.config.sizes import resolve
from ebwm_scale.config.strict_yaml import MAX_DEPTH, is_utf8, parse_yaml, read_yaml
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import cut
from ebwm_scale.core.renamed_keys import read_old_names

MAX_PROBLEMS = 40  # that one message lists


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: defaults), apply overrides, check, resolve defaults.

    path: a file, or the name of a shipped configuration. Raises ConfigError that lists every
    problem found.
    """
    values: Any = {}
    if path is not None:
        values = read_yaml(find_config(path))
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(
                f"{cut(path, 300)}: expected sections ({', '.join(Config.model_fields)}), "
                f"got {type(values).__name__}"
            )
    problems: list[str] = []
    for override in overrides:
        _apply_override(values, override, problems)
    return config_from_dict(values, problems)


def config_from_dict(values: dict[str, Any], problems: list[str] | None = None) -> Config:
    """The typed, resolved and checked configuration of a nested dict.

    problems: those found before. Raises ConfigError with all of them.
    """
    problems = [] if problems is None else problems
    values = read_old_names(values, problems)
    try:
        config = Config.model_validate(_without_empty_sections(values))
    except ValidationError as error:
        raise ConfigError(_report(problems + problems_of(error))) from None
    if not problems:
        config = resolve(config)
        problems = check(config)
    if problems:
        raise ConfigError(_report(problems))
    return config


def _without_empty_sections(values: dict[str, Any]) -> dict[str, Any]:
    """A section without keys is what `model:` alone gives: all its defaults."""
    return {key: {} if value is None else value for key, value in values.items()}


def _report(problems: list[str]) -> str:
    """A line per problem, each once; of very many the first ones."""
    lines = list(dict.fromkeys(problems))
    more = len(lines) - MAX_PROBLEMS
    if more > 0:
        lines[MAX_PROBLEMS:] = [f"and {more} more problems"]
    return "\n".join(lines)


def _apply_override(values: dict, override: str, problems: list[str]) -> None:
    """Put `section.key=value` into the nested dict; what keeps it from that joins the problems."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    name = f"--set {cut(override)}"
    if not equals or len(keys) < 2 or not all(keys):
        problems.append(f"{name}: expected section.key=value")
        return
    if len(keys) > MAX_DEPTH:
        problems.append(f"{name}: more than {MAX_DEPTH} levels deep")
        return
    if not is_utf8(override):
        problems.append(f"{name}: not UTF-8")
        return
    try:
        value = parse_yaml(text, name)
    except ConfigError as error:
        if not _is_text(keys):
            problems.append(str(error))
            return
        value = text
    if _is_text(keys) and value is not None and text[:1] not in ("'", '"'):
        value = text  # as typed: a path or a name may hold what YAML would read otherwise
    for key in keys[:-1]:
        if values.get(key) is None:  # absent, or a section without keys
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            problems.append(f"{name}: {cut(key)} is not a section")
            return
    values[keys[-1]] = value


def _is_text(keys: list[str]) -> bool:
    """Whether section.key takes any text."""
    if len(keys) != 2:
        return False
    section = Config.model_fields.get(keys[0])
    kind = None if section is None else section.annotation
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        return False
    field = kind.model_fields.get(keys[1])
    if field is None:
        return False
    hint = field.annotation
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint is str or (is_union and str in typing.get_args(hint))
