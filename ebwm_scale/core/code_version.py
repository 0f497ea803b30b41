"""Which code this is: the release, and the commit where it runs from a checkout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ebwm_scale import __version__

ROOT = Path(__file__).resolve().parents[2]  # the checkout, if there is one


def code_version() -> str:
    """`0.1.0 1a2b3c4`; `-dirty` at its end: there were uncommitted changes."""
    return f"{__version__} {commit()}".strip()


def commit() -> str:
    """The commit of this checkout, with `-dirty` where files differ from it.

    Elsewhere EBWM_COMMIT, which a container image sets, or nothing: a package that is installed
    inside another project's repository is not that project's commit.
    """
    if _is_checkout():
        return _git("describe", "--always", "--dirty")
    return os.environ.get("EBWM_COMMIT", "")


def uncommitted() -> list[str]:
    """Files that differ from the commit, so that `-dirty` can be looked into.

    Names only: contents might hold what is nobody's business.
    """
    return _git("status", "--porcelain").splitlines() if _is_checkout() else []


def _is_checkout() -> bool:
    top = _git("rev-parse", "--show-toplevel")
    return bool(top) and Path(top).resolve() == ROOT


def _git(*arguments: str) -> str:
    # safe.directory: git says nothing about another user's folder, such as one that is mounted
    # into a container. It would protect from hooks in a folder whose code runs here already.
    try:
        return subprocess.run(
            ["git", "-c", f"safe.directory={ROOT}", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.rstrip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
