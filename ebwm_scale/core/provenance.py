"""What every result file carries besides its numbers: command, machine, versions, commit."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from ebwm_scale.core.code_version import ROOT, commit


def provenance(*packages: str, arguments: list[str] | None = None) -> dict:
    """command, machine, versions (python, torch and the packages named), commit (with -dirty where
    files differ from it).

    arguments: of the command, where they are not those of the process.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["-m", spec.name] if spec is not None else [os.path.relpath(sys.argv[0], ROOT)]
    return {
        "command": " ".join(
            ["python", *start, *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "machine": f"{os.cpu_count()}-core {platform.machine()} machine",
        "versions": versions,
        "commit": commit(),
    }
