"""Which files a checkpoint consists of, and its manifest.json, which holds their sizes and hashes,
and its own.

    config.yaml, trainer.json               of the run
    state-RRRRR-of-NNNNN.safetensors        one for each of the N processes that wrote it
    replay_rank_R.pt                        one for each of them, where there is a replay buffer

The list must be exactly these: a file that is not listed would be loaded without having been
checked. Checkpoints of format 2 from before the manifest held its own hash are read too; of theirs
every value is checked against a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.core.files import file_sha256, read_small
from ebwm_scale.core.plain_text import shown
from ebwm_scale.core.strict_json import canonical_json, is_whole, other_version, parse

VERSION = 2
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 * 2**20  # two files for each of a million processes
_OF_A_RUN = ("config.yaml", "trainer.json")
_STATE = re.compile(r"state-(\d{5,})-of-(\d{5,})\.safetensors")
_REPLAY = re.compile(r"replay_rank_(\d+)\.pt")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a file: size in bytes, sha256 in hex."""

    size: int
    sha256: str


def manifest_text(entries: dict[str, dict[str, Any]]) -> str:
    """The text of manifest.json.

    entries: {name: {"size": bytes, "sha256": hex}} of all other files.
    """
    values = {"version": VERSION, "files": entries}
    return json.dumps(values | {"sha256": _own_hash(values)}, indent=1)


def check_files(folder: Path) -> None:
    """Raise CheckpointError for the first file of a checkpoint that is missing, damaged or not of
    the format.
    """
    try:
        entries = _read_manifest(folder / MANIFEST)
        _refuse_other_files(folder, entries)
        for name, entry in entries.items():
            _check_file(folder / name, entry)
    except OSError as error:
        where = error.filename or folder
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None


def _read_manifest(path: Path) -> dict[str, Entry]:
    try:
        values = parse(read_small(path, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: no manifest.json, so this is no complete checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    problem = other_version(values, "version", VERSION)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    if not values.keys() <= {"version", "files", "sha256"}:
        raise CheckpointError(f"{path} is damaged: its keys are {shown(sorted(values))}")
    if not isinstance(values.get("files"), dict):
        raise CheckpointError(f"{path} is damaged: files is {shown(values.get('files'))}")
    if "sha256" in values and values["sha256"] != _own_hash(values):
        raise CheckpointError(f"{path} does not match its own hash: damaged")
    entries = {name: _entry(path, name, value) for name, value in values["files"].items()}
    _refuse_incomplete(path, set(entries))
    return entries


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"size", "sha256"}:
        raise CheckpointError(f"{path} is damaged: {shown(name)} is {shown(value)}")
    size, sha256 = value["size"], value["sha256"]
    if not is_whole(size) or size < 0:
        raise CheckpointError(f"{path} is damaged: the size of {shown(name)} is {shown(size)}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise CheckpointError(f"{path} is damaged: the sha256 of {shown(name)} is {shown(sha256)}")
    return Entry(size, sha256)


def _refuse_incomplete(path: Path, names: set[str]) -> None:
    """The list must be what N processes write, for one N."""
    states = [match for match in map(_STATE.fullmatch, names) if match]
    world_size = int(states[0][2]) if states else 0
    if world_size != len(states) or not states:
        raise CheckpointError(
            f"{path} is damaged: it lists {len(states)} files state-*.safetensors of {world_size} "
            "processes"
        )
    expected = {*_OF_A_RUN}
    for rank in range(world_size):
        expected.add(f"state-{rank:05d}-of-{world_size:05d}.safetensors")
    if any(map(_REPLAY.fullmatch, names)):
        expected.update(f"replay_rank_{rank}.pt" for rank in range(world_size))
    wrong = sorted(names ^ expected)
    if wrong:
        what = "is no file of a checkpoint" if wrong[0] in names else "is not listed"
        raise CheckpointError(f"{path} is damaged: {shown(wrong[0])} {what}")


def _refuse_other_files(folder: Path, entries: dict[str, Entry]) -> None:
    """Files that loading would take for the checkpoint's own, and the manifest does not list."""
    for path in sorted(folder.iterdir()):
        loaded = _STATE.fullmatch(path.name) or _REPLAY.fullmatch(path.name)
        if path.name not in entries and (loaded or path.suffix in (".safetensors", ".pt")):
            raise CheckpointError(f"{path} is not listed in {MANIFEST}: it is not of this save")


def _check_file(path: Path, entry: Entry) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    if size != entry.size:
        what = "truncated" if size < entry.size else "too long"
        raise CheckpointError(f"{path} has {size} bytes, its manifest says {entry.size}: {what}")
    if file_sha256(path) != entry.sha256:
        raise CheckpointError(f"{path} does not match its hash: damaged")


def _own_hash(values: dict[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON without the hash itself."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()
