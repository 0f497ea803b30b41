"""What every result file carries besides its numbers: command, machine, versions, commit."""
from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def provenance(*packages: str) -> dict:
    """command, machine, versions (python, torch and the packages named), commit (with -dirty where files differ from it)."""
    versions = {"python": platform.python_version()}
    for package in ("torch", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {"command": " ".join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "machine": f"{os.cpu_count()}-core {platform.machine()} machine", "versions": versions, "commit": commit}
