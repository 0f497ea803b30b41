"""Checksums for streamed samples: from the index that our writers put beside every shard, without a
byte of the shard changed.

Which index a streamed shard has, the first that applies:

    the manifest's    if every shard of the stream has the name of one in the manifest's train
                      split, the stream is that dataset's: the index file beside the manifest, or
                      the one beside the shard with the same sha256
    the shard's own   NAME.index.json beside NAME.tar, for paths and addresses (a pipe: command has
                      no place beside it)
    none              shards of other tools: a flipped bit in a number is then not noticed; said
                      once per process

An index that is there and is not what it should be is a damaged shard, not a shard without one.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.redaction import redacted
from ebwm_scale.data.format.index import MAX_INDEX_BYTES, ShardIndex, load_index, parse_index
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shard_table import ShardInfo
from ebwm_scale.data.format.tar import Member

_WORD_WITH_TAR = re.compile(r"[^\s'\"=:;|<>()]+\.tar\b")


def no_report(_: str) -> None:
    """For callers that want to hear nothing."""


class Checksums:
    """The checksums of one shard's samples."""

    def __init__(self, index: ShardIndex):
        self.index = index
        self.rows = {key: row for row, key in enumerate(index.keys)}

    def check(self, key: str, fields: Mapping[str, Member]) -> None:
        """ValueError if a sample is not the one that the index describes."""
        row = self.rows.get(key)
        if row is None:
            raise ValueError(
                "is not in the index of its shard: damaged, or an index of another shard"
            )
        for name, (_, size, crc32) in zip(self.index.names, self.index.places[row].tolist()):
            if name not in fields:
                raise ValueError(f"has no {name}, which the index says it has: damaged")
            content = fields[name].content
            found = zlib.crc32(content)
            if len(content) != size or found != crc32:
                raise ValueError(
                    f"checksum of {name} is {found:08x} ({len(content)} bytes), the index says "
                    f"{crc32:08x} ({size}): damaged"
                )


class StreamIndexes:
    """Finds the index of each shard of a stream. report: is told once if a shard has none."""

    def __init__(self, shards: Sequence[str], manifest: Manifest, report: Callable[[str], None]):
        self.manifest = manifest
        self.report = report
        self.said = False
        listed: dict[str, ShardInfo] = {}
        wanted = {shard_name(url) for url in shards}
        if "train" in manifest.splits and None not in wanted:
            for shard in manifest.splits["train"].shards:
                name = posixpath.basename(shard.path)
                if name in wanted:
                    listed[name] = shard
        self.listed = listed if wanted == listed.keys() else {}

    def named(self, url: str) -> ShardInfo | None:
        """What the manifest says of a shard, if the stream is that dataset's."""
        return self.listed.get(shard_name(url) or "")

    def of(self, url: str) -> Checksums | None:
        """The checksums of a shard; None if it has no index.

        DataError for an index that is damaged, OSError for one that cannot be read.
        """
        name = shard_name(url)
        shard = self.named(url)
        if shard is not None and (self.manifest.folder / shard.index_path).exists():
            return Checksums(load_index(self.manifest, shard))
        content = None
        if name is not None and not url.startswith("pipe:"):
            content = _beside(url, must_answer=shard is not None)
        if name is None or content is None:
            self._say_once(url)
            return None
        if shard is not None and hashlib.sha256(content).hexdigest() != shard.index_sha256:
            raise DataError(
                f"{redacted(url)}: the index beside it is not the one that {self.manifest.path} "
                "names: damaged, or of another dataset"
            )
        where = f"the index beside {redacted(url)}"
        return Checksums(parse_index(content, where, name, size=2**62))

    def _say_once(self, url: str) -> None:
        if not self.said:
            self.said = True
            self.report(
                f"data.stream: {redacted(url)} has no index, neither beside {self.manifest.path} "
                "nor beside itself: its samples have no checksums, so a flipped bit in their "
                "numbers is not noticed"
            )


def shard_name(url: str) -> str | None:
    """The file name of the shard that an address, or the one .tar that a pipe: command names; None
    where that cannot be said.
    """
    if url.startswith("pipe:"):
        names = {posixpath.basename(word) for word in _WORD_WITH_TAR.findall(url)}
        return names.pop() if len(names) == 1 else None
    name = posixpath.basename(re.split(r"[?#]", url)[0])
    return name if name.endswith(".tar") else None


def _beside(url: str, *, must_answer: bool) -> bytes | None:
    """The content of NAME.index.json beside NAME.tar; None if there is none.

    must_answer: the manifest says that there is one, so any other answer than "no such file" is
    raised. Of a foreign shard, a server that refuses to say is taken to have none.
    """
    import fsspec

    place = re.split(r"[?#]", url)[0]
    query = url[len(place) :]  # with its mark
    if is_signed(query[1:]):
        return None  # a signature is for one address alone
    try:
        opened: Any = fsspec.open(f"{place.removesuffix('.tar')}.index.json{query}", "rb")
        with opened as file:
            content = file.read(MAX_INDEX_BYTES + 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return None
    except ImportError:
        raise
    except Exception:  # each file system has errors of its own
        if must_answer:
            raise
        return None
    if len(content) > MAX_INDEX_BYTES:
        raise DataError(f"the index beside {redacted(url)} has more than {MAX_INDEX_BYTES} bytes")
    return content


def is_signed(query: str) -> bool:
    """Whether the query of an address holds a signature, which is for that address alone."""
    return bool(re.search(r"(?i)(sig|signature|token|credential)[^=&]*=", query))
