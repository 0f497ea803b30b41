"""Which code this is: the release, and the commit where it runs from a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ebwm_scale import __version__


def code_version() -> str:
    """`0.1.0 1a2b3c4`; `-dirty` at its end: there were uncommitted changes."""
    return f"{__version__} {_git('describe', '--always', '--dirty')}".strip()


def uncommitted() -> list[str]:
    """Files that differ from the commit, so that `-dirty` can be looked into.

    Names only: contents might hold what is nobody's business.
    """
    return _git("status", "--porcelain").splitlines()


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
