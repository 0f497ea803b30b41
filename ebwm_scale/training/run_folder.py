"""A run's folder: metrics.jsonl, events.jsonl, the console lines and Weights & Biases. Rank 0 writes; every step appears once."""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import uuid
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import EXIT_RANK_LOST, ConfigError
from ..rows import Rows


class RunFolder:
    """On ranks other than 0 nothing is written."""

    def __init__(self, path: Path, config: Config, *, is_main: bool):
        self.path, self.is_main = path, is_main
        self._tracker = None
        if is_main:
            path.mkdir(parents=True, exist_ok=True)
            self._owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
            _write_atomically(path / "owner", self._owner)
            _write_atomically(path / "config.yaml", config.to_yaml())
            self._tracker = _tracker(path, config)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def leave_if_taken_over(self) -> None:
        """End this process if a later one writes here: a node that was taken for dead, and its run started elsewhere, may come back."""
        owner = (self.path / "owner").read_text(encoding="utf-8") if self.is_main else None
        if self.is_main and owner != self._owner:
            print(
                f"{self.path} was taken over by the process {owner}; this one ends and writes nothing more",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_RANK_LOST)

    def metrics(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite are written as null, since JSON has no word for them."""
        if self.is_main:
            self.leave_if_taken_over()
            _append(self.path / "metrics.jsonl", row)
            if self._tracker is not None:
                prefix = "validation/" if row.get("split") == "validation" else "train/"
                self._tracker.log(
                    {prefix + key: value for key, value in _flat(row).items()}, step=row["step"]
                )

    def event(self, name: str, **fields: Any) -> None:
        if self.is_main:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            _append(self.path / "events.jsonl", {"time": now, "event": name, **fields})

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def warn(self, text: str, **fields: Any) -> None:
        """One clear line on stderr, and an event."""
        if self.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)
            self.event("warning", message=text, **fields)

    def write(self, name: str, value: Any) -> None:
        if self.is_main:
            _write_atomically(self.path / name, json.dumps(value, indent=1, ensure_ascii=False))

    def forget_after(self, step: int) -> int | None:
        """Drop metric rows beyond `step` (a resumed run logs them again) and unreadable lines; the last validated step that stays."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return None
        rows, validated = Rows(path), None
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with open(beside if self.is_main else os.devnull, "wb") as file:
            for _, line, row in rows.located():
                logged = row.get("step")
                if not isinstance(logged, int) or logged > step or not line.endswith(b"\n"):
                    continue
                file.write(line)
                if row.get("split") == "validation":
                    validated = logged
        if self.is_main:
            os.replace(beside, path)
        # a killed process leaves a torn end; every other line of no use is worth a word
        if rows.unreadable > rows.torn:
            self.warn(rows.in_words())
        return validated

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def _tracker(path: Path, config: Config):
    """A W&B run that keeps its id over resumes, or None."""
    settings = config.logging
    if settings.wandb == "off":
        return None
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"logging.wandb is {settings.wandb}: the package wandb is not installed; pip install wandb, or logging.wandb=off"
        ) from None
    identity = path / "wandb_id"
    if not identity.exists():
        _write_atomically(identity, uuid.uuid4().hex[:12])
    return wandb.init(
        project=settings.wandb_project,
        name=settings.run_name or path.name,
        id=identity.read_text().strip(),
        resume="allow",
        mode=settings.wandb,
        dir=str(path),
        config=config.to_dict(),
    )


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in row.items():
        if isinstance(value, list):
            result.update({f"{key}/{i}": item for i, item in enumerate(value)})
        elif isinstance(value, (int, float)) and key != "step":
            result[key] = value
    return result


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(row)) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
