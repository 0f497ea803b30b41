"""Where a run is written: found out whether that is possible before anything else, and without
torch.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.ownership import Ownership
from ebwm_scale.core.plain_text import cut
from ebwm_scale.core.processes import is_first


def check_folder(path: Path, *, resume: bool) -> None:
    """ConfigError if a run cannot be written to `path`, or would overwrite one; CheckpointError if
    one is being written there.

    Nothing is left behind: the file tried has no name.
    """
    advice = "name another with --run-dir"
    try:
        existing = path
        while not existing.exists():
            if existing.is_symlink():
                raise ConfigError(f"{cut(existing, 300)}: a link to nothing; {advice}")
            longest = len(os.fsencode(existing.name))
            existing = existing.parent
            if existing.is_dir() and longest > os.pathconf(existing, "PC_NAME_MAX"):
                raise ConfigError(f"{cut(path)}: a name of {longest} bytes is too long; {advice}")
        if not existing.is_dir():
            raise ConfigError(f"{cut(existing, 300)}: is a file, no folder; {advice}")
        folders = [existing, path / "checkpoints", path / "watch"]
        for folder in folders:
            if folder.exists():
                with tempfile.TemporaryFile(dir=folder):
                    pass
        for name in ("config.yaml", "metrics.jsonl", "events.jsonl"):
            file = path / name
            if file.exists() and not os.access(file, os.W_OK):
                raise ConfigError(f"{cut(file, 300)}: cannot be written: permission; {advice}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{cut(path, 300)}: cannot be written: {reason}; {advice}") from None
    if (path / "metrics.jsonl").exists() and not resume:
        # whoever writes there now is the better reason, and --resume would be refused for it
        Ownership(path, Faults(None, rank=0)).refuse_if_in_use(watch_aloud=is_first())
        raise ConfigError(
            f"{cut(path, 300)} already holds a run: continue it with --resume, "
            "or name another folder with --run-dir"
        )
