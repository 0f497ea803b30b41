"""The files that W&B writes offline: which rows they hold, and cutting one behind a row.

    wandb/offline-run-<time>-<id>/run-<id>.wandb        a file for each start of a run
        header (7 bytes) | record | record | ...        records in LevelDB's log format

A record is cut into pieces that cross no border of 32 KiB; a piece is a checksum (4 bytes), its
length (2), its kind (1: whole, 2: first, 3: middle, 4: last) and its bytes. The records are W&B's
protocol buffers. A killed process leaves a torn end, which is where reading stops.

Format: LevelDB, doc/log_format.md; records: wandb.proto.wandb_internal_pb2.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK, PIECE = 7, 2**15, struct.Struct("<IHB")
WHOLE, FIRST, LAST = 1, 2, 4


def parts_of(folder: Path, identity: str) -> list[Path]:
    """The files of a run's starts below wandb/, the earliest first."""
    return sorted(folder.glob(f"offline-run-*-{identity}/run-{identity}.wandb"))


def is_uploaded(part: Path) -> bool:
    """Whether `wandb sync` has sent it; it leaves a mark beside it."""
    return part.with_name(f"{part.name}.synced").exists()


def history(part: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where its record begins, values by name) of each row that was logged."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2  # made when it is imported: type checkers do not see it
    for start, content in records(part.read_bytes()):
        record = protocol.Record()
        try:
            record.ParseFromString(content)
        except Exception:  # noqa: BLE001  protobuf's own error, of a torn end
            return
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield start, {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(where it begins, its bytes) of each whole record of a file."""
    place, start, pieces = HEADER, HEADER, []
    while place + PIECE.size <= len(data):
        left = BLOCK - place % BLOCK
        if left < PIECE.size:  # a block's end that is too short for another piece
            place += left
            continue
        _, length, kind = PIECE.unpack_from(data, place)
        content = data[place + PIECE.size : place + PIECE.size + length]
        if not kind or len(content) < length:
            return
        if kind in (WHOLE, FIRST):
            start, pieces = place, []
        pieces.append(content)
        place += PIECE.size + length
        if kind in (WHOLE, LAST):
            yield start, b"".join(pieces)


def cut(part: Path, step: int) -> int:
    """End a file before the first row beyond `step`; how many rows were cut off.

    What W&B noted after it (of the machine, of the console) goes with it: it belongs to steps that
    are made again.
    """
    beyond = [start for start, values in history(part) if values.get("step", 0) > step]
    if beyond:
        os.truncate(part, beyond[0])
    return len(beyond)
