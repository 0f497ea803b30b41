"""The sources behind what the user names: files, folders, globs and addresses.

corpus                       a folder: walked, linked folders followed once, hidden names left out
corpus/news.jsonl.zst        a file
corpus/**/*.parquet          a glob, if nothing has that name
wiki (load_from_disk)        a folder of Hugging Face datasets: its Arrow files and nothing else
s3://bucket/text             anything fsspec lists and opens; a folder, a glob or a file

The same file named twice counts once. Files of kinds that are not read are counted by kind.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.core.redaction import redacted
from ebwm_scale.data.prepare.reading.left_out import PACKED, LeftOut, kind_of
from ebwm_scale.data.prepare.reading.opening import file_system, remote_error
from ebwm_scale.data.prepare.reading.source import (
    ARROW,
    PROSE,
    Source,
    is_url,
    kind_by_name,
    patterns,
)
from ebwm_scale.data.walking import Report, walk_files

_STATE = "state.json"  # of a saved Hugging Face dataset: which files it has
_BOOKKEEPING = (_STATE, "dataset_info.json")
_SPLITS = "dataset_dict.json"  # of several saved datasets, which are the splits of one
_NO_PROSE = (*PACKED, ".pkl", ".pickle", ".npy", ".npz", ".bin", ".h5", ".hdf5", ".pdf", ".docx")
_STAMPS = ("ETag", "etag", "sha256", "oid", "LastModified", "last_modified", "mtime", "created")
_WILD = "*?["


def find_sources(
    inputs: Sequence[str | Path], left_out: LeftOut, *, report: Report = print
) -> list[Source]:
    """The sources of all inputs, in their order, each once; files of other kinds go to left_out.

    Raises DataError for an input that is not there, a named file that is no text, a cycle of linked
    folders, and an address that cannot be listed.
    """
    sources: dict[str, Source] = {}
    for text in map(str, inputs):
        for source in _of_input(text, left_out, report):
            known = source.place if is_url(source.place) else str(Path(source.place).resolve())
            sources.setdefault(known, source)
    return list(sources.values())


def _of_input(text: str, left_out: LeftOut, report: Report) -> Iterator[Source]:
    if is_url(text):
        yield from _of_url(text, left_out)
        return
    path = Path(text)
    if path.is_dir():
        yield from _of_folder(path, left_out, report)
    elif path.is_file():
        yield _named(path)
    elif any(character in text for character in _WILD):
        yield from _of_glob(text, left_out, report)
    else:
        raise DataError(
            f"{printable(path)}: no such file or folder; give files or folders with text "
            f"({patterns()})"
        )


def _of_glob(pattern: str, left_out: LeftOut, report: Report) -> Iterator[Source]:
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = {path for path in found if path.is_file()}
    if not found:
        raise DataError(f"{printable(pattern)}: no file or folder matches; mend the pattern")
    # `**` gives a folder beside what is in it; only one that stands alone is meant.
    entered = {parent for path in found for parent in path.parents}
    for path in found:
        if path in files:
            yield _named(path)
        elif path not in entered:
            yield from _of_folder(path, left_out, report)


def _named(path: Path) -> Source:
    """A file that the user named: of a kind that is read, or prose; DataError for what is none."""
    kind = kind_by_name(path.name)
    if kind is None:
        if path.suffix.lower() in _NO_PROSE:
            raise _not_read(str(path), kind_of(PurePosixPath(path.name)))
        kind = (PROSE, "")
    return _local(path.name, path, kind, given=True)


def _not_read(place: str, kind: str) -> DataError:
    return DataError(
        f"{printable(redacted(place))}: a {kind} file is not read: taken as prose it would be one "
        f"document; give {patterns()}"
    )


def _local(name: str, path: Path, kind: tuple[str, str], *, given: bool = False) -> Source:
    status = path.stat()
    stamp = str(status.st_mtime_ns)
    return Source(name, str(path), *kind, size=status.st_size, stamp=stamp, given=given)


def _of_folder(folder: Path, left_out: LeftOut, report: Report) -> Iterator[Source]:
    files = list(walk_files(folder, report=report))
    saved = {path.parent: _saved_files(path) for path in files if path.name == _STATE}
    for path in files:
        name = path.relative_to(folder).as_posix()
        arrow_files = saved.get(path.parent)
        if arrow_files is not None:
            if path.name in arrow_files:
                yield _local(name, path, (ARROW, ""))
            elif path.name not in _BOOKKEEPING:
                left_out.kinds[kind_of(PurePosixPath(path.name))] += 1
            continue
        if path.name == _SPLITS:
            report(_all_splits(path))
            continue
        kind = kind_by_name(path.name)
        if kind is None:
            left_out.kinds[kind_of(PurePosixPath(path.name))] += 1
        else:
            yield _local(name, path, kind)


def _saved_files(state: Path) -> set[str] | None:
    """The Arrow files of a saved Hugging Face dataset; None where the file is something else."""
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("_data_files"), list):
        return None
    if values.get("_indices_data_files"):
        raise DataError(
            f"{printable(state.parent)}: a saved dataset whose rows are chosen by a list of "
            "indices; write it with flatten_indices() and save_to_disk again"
        )
    names = {_file_name(entry) for entry in values["_data_files"]}
    missing = sorted(name for name in names if not (state.parent / name).is_file())
    if missing:
        raise DataError(
            f"{printable(state.parent)}: a saved dataset without its file {printable(missing[0])}; "
            "copy it again"
        )
    return names


def _all_splits(listing: Path) -> str:
    return (
        f"{printable(listing.parent)}: all splits of this saved dataset are read; to read one, "
        "name its folder"
    )


def _file_name(entry: Any) -> str:
    name = entry.get("filename", "") if isinstance(entry, dict) else ""
    return PurePosixPath(name).name


def _of_url(url: str, left_out: LeftOut) -> Iterator[Source]:
    """What is behind an address; a web page has no folders, and `?` begins its query."""
    fs, path = file_system(url)
    is_web = url.lower().startswith(("http://", "https://"))
    is_glob = not is_web and any(character in path for character in _WILD)
    try:
        if is_glob:
            found = fs.glob(path, detail=True)
        else:
            info = fs.info(path)
            if info.get("type") != "directory":
                source = _remote(url, url, info, left_out, given=True)
                if source is not None:
                    yield source
                return
            found = fs.find(path, detail=True)
    except DataError:
        raise
    except ImportError as error:
        raise remote_error(url, error) from None
    except Exception as error:  # noqa: BLE001 (each file system raises what its client does)
        raise remote_error(url, error) from None
    names = [name for name in sorted(found) if found[name].get("type") != "directory"]
    if not names:
        raise DataError(f"{printable(redacted(url))}: no file there; mend the address")
    base = path.rstrip("/") + "/"
    for name in names:
        inside = name.removeprefix(base)
        if any(part.startswith(".") for part in PurePosixPath(inside).parts):
            continue
        place = fs.unstrip_protocol(name)
        source = _remote(place, inside, found[name], left_out, given=is_glob)
        if source is not None:
            yield source


def _remote(url: str, name: str, info: dict, left_out: LeftOut, *, given: bool) -> Source | None:
    """A file behind an address; None for one of another kind that was not named."""
    file = PurePosixPath(name.partition("?")[0] if "://" in name else name)
    kind = kind_by_name(file.name)
    if kind is None:
        if given:
            raise _not_read(url, kind_of(file))
        left_out.kinds[kind_of(file)] += 1
        return None
    stamp = "/".join(str(info[key]) for key in _STAMPS if info.get(key) is not None)
    shown_name = file.name if given else name
    size = int(info.get("size") or 0)
    return Source(shown_name, url, *kind, size=size, stamp=stamp, given=given)
