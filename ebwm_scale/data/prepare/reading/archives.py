"""Tar archives, those of WebDataset above all: read like a folder, front to back.

    00017.mp4  00017.json  00017.txt    one sample: the text is 00017.txt
    00018.jpg  00018.json               the text is the field of 00018.json
    notes/a.md  news.jsonl.gz           files like those of a folder

Of members with one key, the .txt is taken and the .json beside it describes it; with --field it is
the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from ebwm_scale.data.format import tar
from ebwm_scale.data.prepare.reading.left_out import LeftOut, kind_of
from ebwm_scale.data.prepare.reading.opening import label, open_source
from ebwm_scale.data.prepare.reading.selection import Selection
from ebwm_scale.data.prepare.reading.source import JSON, PROSE, TAR, Source, kind_by_name
from ebwm_scale.data.prepare.reading.taking import Document

ReadMember = Callable[[Source, Selection, LeftOut], Iterator[Document]]


def read_tar(
    source: Source, selection: Selection, left_out: LeftOut, read_member: ReadMember
) -> Iterator[Document]:
    """The documents of an archive's members, each read by the reader of its kind."""
    with open_source(source) as stream:
        group: list[Source] = []
        key = None
        for member in tar.walk(stream, label(source), wanted=_is_read):
            if member.key != key:
                yield from _of_group(group, selection, left_out, read_member)
                group, key = [], member.key
            path = f"{member.key}.{member.field}" if member.field else member.key
            kind = _kind_of_member(path)
            if kind is None:
                left_out.kinds[kind_of(PurePosixPath(path))] += 1
                continue
            inside = Source(f"{source.name}/{path}", f"{source.place}/{path}", *kind)
            group.append(replace(inside, content=member.content))
        yield from _of_group(group, selection, left_out, read_member)


def _of_group(
    group: list[Source], selection: Selection, left_out: LeftOut, read_member: ReadMember
) -> Iterator[Document]:
    """The documents of members with one key."""
    kinds = {member.kind for member in group}
    beside = None  # the kind that only describes the other
    if {PROSE, JSON} <= kinds:
        beside = PROSE if selection.field_given else JSON
    for member in group:
        if member.kind != beside:
            yield from read_member(member, selection, left_out)


def _is_read(path: str) -> bool:
    return _kind_of_member(path) is not None


def _kind_of_member(path: str) -> tuple[str, str] | None:
    """(kind, compression); hidden members and archives in archives are of another kind."""
    if any(part.startswith(".") for part in PurePosixPath(path).parts):
        return None
    kind = kind_by_name(path)
    return None if kind is None or kind[0] == TAR else kind
