"""launch.json of a run folder, read back.

It may have come from elsewhere, so that it is data here and no more: typed, and never a command.
What --resubmit takes from it is how many nodes, tasks and minutes, and those options of sbatch that
say where and when a job runs (HARMLESS). Others can start programs or write files on behalf of who
submits (export=BASH_ENV=..., output=, wrap=...): they count only when they are said again on the
command line. Another directory to start in, whose files programs may read as their settings, needs
the user to be there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ebwm_scale.core.disk import replace_text
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import one_line, shorten, shown

HARMLESS = frozenset(
    [
        "account",
        "begin",
        "cluster-constraint",
        "comment",
        "constraint",
        "contiguous",
        "core-spec",
        "cores-per-socket",
        "cpus-per-gpu",
        "cpus-per-task",
        "deadline",
        "dependency",
        "distribution",
        "exclude",
        "exclusive",
        "gpu-bind",
        "gpu-freq",
        "gpus",
        "gpus-per-node",
        "gpus-per-socket",
        "gpus-per-task",
        "gres",
        "gres-flags",
        "hint",
        "licenses",
        "mail-type",
        "mem",
        "mem-bind",
        "mem-per-cpu",
        "mem-per-gpu",
        "mincpus",
        "nice",
        "no-kill",
        "no-requeue",
        "nodelist",
        "nodes",
        "ntasks",
        "ntasks-per-core",
        "ntasks-per-gpu",
        "ntasks-per-node",
        "ntasks-per-socket",
        "oversubscribe",
        "partition",
        "power",
        "priority",
        "qos",
        "requeue",
        "reservation",
        "signal",
        "sockets-per-node",
        "spread-job",
        "switches",
        "thread-spec",
        "threads-per-core",
        "time",
        "time-min",
        "tmp",
        "use-min-nodes",
        "wckey",
    ]
)
RESOURCES = {  # the least of each number
    "nodes": 1,
    "gpus_per_node": 0,
    "tasks_per_node": 1,
    "minutes": 1,
    "parallel": 1,
}
LARGEST = 1_000_000


def read_request(folder: Path) -> dict[str, Any]:
    """launch.json of a run folder; ConfigError, one line, where it is not what ebwm_scale.launch
    writes."""
    path = folder / "launch.json"
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read ({_reason(error)}): launch the run anew from its config.yaml"
        ) from None
    if not isinstance(request, dict):
        raise _not_ours(path, "it", request, "a JSON object")
    if request.get("cluster") not in ("slurm", "local"):
        raise _not_ours(path, "cluster", request.get("cluster"), "slurm or local")
    directory = request.get("directory")
    if not isinstance(directory, str) or not Path(directory).is_absolute():
        raise _not_ours(path, "directory", directory, "an absolute path")
    one_line(f"{path}: directory", directory)
    for name in ("jobs", "overrides"):
        if not _texts(request.get(name, [])):
            raise _not_ours(path, name, request[name], "a list of texts")
    for job in request.get("jobs", []):
        if not re.fullmatch(r"[0-9]{1,12}(_[0-9]{1,9})?", job):
            raise _not_ours(path, "a job", job, "a job's id such as 1234 or 1234_5")
    rows_before = request.get("rows_before", 0)
    if not _whole(rows_before, 0):
        raise _not_ours(path, "rows_before", rows_before, "a whole number")
    _check_resources(path, request)
    return request


def save_request(folder: Path, request: dict[str, Any]) -> None:
    """Write launch.json of a run folder, whole or not at all."""
    replace_text(folder / "launch.json", json.dumps(request, indent=1, ensure_ascii=False))


def read_runs_of_sweep(folder: Path) -> list[str]:
    """The names of the runs that sweep.json lists, each a folder directly in the sweep's."""
    path = folder / "sweep.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({_reason(error)})") from None
    names = content.get("runs") if isinstance(content, dict) else None
    if not _texts(names):
        raise _not_ours(path, "runs", names, "a list of names of folders")
    for name in names:
        one_line(f"{path}: a run", name)
        if name in ("", ".", "..") or "/" in name:
            raise _not_ours(path, "a run", name, "the name of a folder beside sweep.json")
    return names


def options_for_resubmission(
    folder: Path, request: dict[str, Any], given: Sequence[str]
) -> tuple[str, ...]:
    """sbatch's options of launch.json, with those `given` on the command line in place of its own.
    Those that could run something must be given."""
    said = {option.partition("=")[0] for option in given}
    kept = [
        option for option in request["resources"]["slurm"] if option.partition("=")[0] not in said
    ]
    for option in kept:
        if option.partition("=")[0].replace("_", "-") not in HARMLESS:
            raise ConfigError(
                f"{folder / 'launch.json'} asks sbatch for {shown(option)}, which can run commands "
                "or write files: if you trust it, say it again with --resubmit ... --slurm, or say "
                "that option with another value"
            )
    return (*kept, *given)


def _check_resources(path: Path, request: dict[str, Any]) -> None:
    resources = request.get("resources")
    expected = {"cluster", "slurm", *RESOURCES}
    if not isinstance(resources, dict) or set(resources) != expected:
        raise _not_ours(path, "resources", resources, f"an object of {', '.join(sorted(expected))}")
    if resources["cluster"] != request["cluster"]:
        raise _not_ours(path, "resources.cluster", resources["cluster"], request["cluster"])
    for name, least in RESOURCES.items():
        if not _whole(resources[name], least):
            raise _not_ours(
                path, f"resources.{name}", resources[name], f"a whole number from {least}"
            )
    if not _texts(resources["slurm"]):
        raise _not_ours(path, "resources.slurm", resources["slurm"], "a list of OPTION=VALUE")
    for option in resources["slurm"]:
        check_option(f"{path}: resources.slurm", option)


def check_option(what: str, option: str) -> None:
    """An option of sbatch without its dashes, as --slurm takes it."""
    one_line(what, option)
    if not re.fullmatch("[a-z][a-z-]*", option.partition("=")[0]):
        raise ConfigError(
            f"{what} {shown(option)}: expected sbatch's long option without its dashes, for "
            "example partition=gpu"
        )


def _reason(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__, 200)


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def _not_ours(path: Path, what: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(
        f"{path}: {what} is {shown(value)}: must be {allowed}; launch the run anew from its "
        "config.yaml"
    )
