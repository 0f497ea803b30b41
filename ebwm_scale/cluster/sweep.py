"""Run folders before submission: what a sweep consists of, under readable names, each with its
resolved configuration and the code version.

An axis of a sweep is one key with its values (--sweep train.seed=1,2), or names for sets of
overrides (--sweep-file):

    form:                                   # the axis
      transformer++: [model.kind=baseline]  # a name, and the overrides it stands for
      energy: [model.kind=energy, model.predicted_input=anchored]
    size:
      w32: [model.width=32]
      w64: [model.width=64]
    combinations:  # no axis: further overrides of the runs that have all of these names
      form=energy size=w64: [optimizer.learning_rate=0.006]
"""

from __future__ import annotations

import datetime
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_scale.cluster.request import save_request
from ebwm_scale.config.load import load_config
from ebwm_scale.config.schema import Config
from ebwm_scale.config.strict_yaml import read_yaml
from ebwm_scale.core.code_version import code_version, uncommitted
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import cut, shown
from ebwm_scale.core.run_location import check_folder

MAX_NAME = 120
MAX_RUNS = 10_000
COMBINATIONS = "combinations"


@dataclass(frozen=True)
class Run:
    """name: unique in the sweep, fit for a file name, `seed=1_width=64`."""

    name: str
    overrides: tuple[str, ...]
    labels: tuple[tuple[str, str], ...] = ()  # (axis, which of it)


def expand(sweeps: Sequence[str], file: str | None = None) -> list[Run]:
    """["a.b=1,2", "c.d=x,y"] -> the four combinations, with those of a file's axes.

    Commas inside quotes or brackets do not separate.
    """
    keys, (axes, combinations) = [], ({}, {}) if file is None else file_axes(file)
    for text in sweeps:
        key, equals, values = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise ConfigError(
                f"--sweep {cut(text)}: expected section.key=value,value,... for example "
                "train.seed=1,2,3"
            )
        keys.append((key.strip(), split_values(values)))
    if len({key for key, _ in keys}) < len(keys):
        raise ConfigError(
            f"--sweep names a key twice: {', '.join(key for key, _ in keys)}; list all its values "
            "in one"
        )
    short = [key.rpartition(".")[2] for key, _ in keys]
    for (key, values), last in zip(keys, short):
        label = last if short.count(last) == 1 and last not in axes else key
        axes[label] = [(fit, (f"{key}={value}",)) for value, fit in zip(values, _fit(values))]
    number = math.prod(len(choices) for choices in axes.values())
    if number > MAX_RUNS:
        raise ConfigError(f"the sweep has {number:,} runs: at most {MAX_RUNS:,} in one")
    runs, taken = [], set()
    for choice in itertools.product(*axes.values()):
        name = "_".join(f"{label}={value}" for label, (value, _) in zip(axes, choice))[:MAX_NAME]
        unique = next(
            candidate
            for candidate in itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
            if candidate not in taken
        )
        taken.add(unique)
        labels = tuple((axis, fit) for axis, (fit, _) in zip(axes, choice))
        further = [overrides for wanted, overrides in combinations.items() if wanted <= set(labels)]
        runs.append(
            Run(
                unique,
                tuple(
                    override
                    for overrides in [*(overrides for _, overrides in choice), *further]
                    for override in overrides
                ),
                labels,
            )
        )
    return runs


def file_axes(
    path: str,
) -> tuple[
    dict[str, list[tuple[str, tuple[str, ...]]]], dict[frozenset[tuple[str, str]], tuple[str, ...]]
]:
    """{axis: [(name for the run's folder, overrides)]} of a sweep file, and {names that a run has
    to have, as (axis, name): overrides}.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"{path}: a sweep file maps each axis to its names, and each name to a list of "
            "overrides"
        )
    axes = {}
    for axis, names in content.items():
        if not isinstance(names, dict) or not names:
            raise ConfigError(
                f"{path}: {cut(axis)} is {shown(names)}: must map names to lists of overrides, "
                "such as small: [model.size=4xs]"
            )
        for name, overrides in names.items():
            if not isinstance(overrides, list) or not all(
                isinstance(override, str) and "=" in override for override in overrides
            ):
                raise ConfigError(
                    f"{path}: {cut(axis)}: {cut(name)} is {shown(overrides)}: must be a list of "
                    "section.key=value, such as [model.size=4xs]"
                )
        if axis == COMBINATIONS:
            continue
        axes[str(axis)] = [
            (fit, tuple(overrides))
            for fit, overrides in zip(_fit([str(name) for name in names]), names.values())
        ]
    combinations = {}
    known = {
        f"{axis}={name}": (axis, fit)
        for axis, names in content.items()
        if axis in axes
        for name, (fit, _) in zip(names, axes[axis])
    }
    for text, overrides in content.get(COMBINATIONS, {}).items():
        unknown = [word for word in str(text).split() if word not in known]
        if unknown:
            raise ConfigError(
                f"{path}: {COMBINATIONS}: {shown(text)} names {cut(', '.join(unknown))}, which is "
                f"not there; there are {cut(', '.join(known), 400)}"
            )
        combinations[frozenset(known[word] for word in str(text).split())] = tuple(overrides)
    return axes, combinations


def split_values(text: str) -> list[str]:
    values = [""]
    depth = 0
    quote = None
    for character in text:
        if quote is None and depth == 0 and character == ",":
            values.append("")
            continue
        if quote is not None:
            quote = None if character == quote else quote
        elif character in "\"'" and (values[-1] == "" or depth):
            quote = character  # an apostrophe inside a word opens nothing
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth = max(0, depth - 1)
        values[-1] += character
    return values


def _fit(values: Sequence[str]) -> list[str]:
    """For file names: of paths what tells them apart, and nothing that a shell or a terminal would
    read.
    """
    paths = [value.rstrip("/").split("/") for value in values]
    common = _num_common([path[:-1] for path in paths])
    for shorter in ([path[-1] for path in paths], ["/".join(path[common:]) for path in paths]):
        names = [_file_name(name) for name in shorter]
        if len(set(names)) == len(names):
            return names
    return [_file_name(value) for value in values]


def _file_name(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-")[-60:] or "empty"


def _num_common(folders: Sequence[Sequence[str]]) -> int:
    """How many of their first parts all of the paths share."""
    count = 0
    for parts in zip(*folders, strict=False):  # as far as the shortest goes
        if len(set(parts)) > 1:
            break
        count += 1
    return count


def check_new(folder: Path) -> None:
    """ConfigError if a run folder cannot be written, or already holds a run."""
    check_folder(folder, resume=True)
    if (folder / "metrics.jsonl").exists() or (folder / "launch.json").exists():
        raise ConfigError(
            f"{cut(folder, 300)} already holds a run: look at it with --status, go on with it with "
            "--resubmit, or name another --run-dir"
        )


def prepare(
    folder: Path, *, config_file: str, overrides: Sequence[str], request: dict[str, Any]
) -> Config:
    """Write config.yaml (resolved) and launch.json (the request and the code version) into a run
    folder; returns the configuration.
    """
    config = load_config(config_file, overrides)
    write_request(
        folder,
        config,
        {
            "config": str(config_file),
            "overrides": list(overrides),
            **request,
            "code": code_version(),
            "uncommitted": uncommitted(),
        },
    )
    return config


def write_request(folder: Path, config: Config, request: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    save_request(folder, {"time": now, **request})
