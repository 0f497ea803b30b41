"""Streamed shards kept on a local disk, up to a limit: data.cache.

    FOLDER/KEY-SHA256.tar    a whole shard; its time is that of its last use
    FOLDER/KEY.part          one that is on its way, its space taken beforehand
    FOLDER/KEY.lock          held by who brings it; others wait for it
    FOLDER/.lock             held for a moment: to make room, and to take it

KEY is the hash of what a shard is: its sha256 where the manifest names it, else its address and
what the store says of its version. SHA256 is that of the bytes, and is checked whenever the shard
is used. So any number of processes of a machine share a folder, and a kill leaves nothing that
could be taken for a shard. What cannot be kept is streamed as without a cache, and that is said.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from ebwm_scale.config.permissions import PIPE
from ebwm_scale.core.disk import remove_quietly, sync
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import printable, shorten
from ebwm_scale.core.redaction import redacted
from ebwm_scale.data.format.shard_table import ShardInfo
from ebwm_scale.data.loading.stream_checks import is_signed

_BLOCK_BYTES = 2**22
_TRIES = 3  # other processes may make room between bringing a shard and opening it
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What stores say of the version of a file.
_STAMPS = (
    "ETag",
    "etag",
    "sha256",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "mtime",
    "created",
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class _NotKept(Exception):
    """A shard has to be streamed, and why."""


class ShardCache:
    """A folder of whole shards. open_remote: opens the bytes of an address. report: is told of what
    cannot be kept, each reason once.

    Raises ConfigError for a folder that cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        limit_bytes: int,
        open_remote: Callable[[str], contextlib.AbstractContextManager[BinaryIO]],
        report: Callable[[str], None],
    ):
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self._open_remote = open_remote
        self._report = report
        self._told: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._moment():
                pass
        except OSError as error:
            raise ConfigError(
                f"data.cache.folder is {printable(self.folder)}: cannot be written "
                f"({error.strerror}); name a folder of a local disk"
            ) from None

    @contextlib.contextmanager
    def open(self, url: str, shard: ShardInfo | None) -> Iterator[BinaryIO]:
        """The bytes of a shard, front to back, from the folder where it is there or can be brought.

        shard: what the manifest says of it. Raises what open_remote does.
        """
        file = None
        if url.startswith(PIPE):
            self._say("data.cache: what pipe: commands give is not kept")
        elif _ADDRESS.match(url) and not url.startswith("file://"):
            try:
                file = self._kept(url, shard)
            except _NotKept as error:
                self._say(str(error))
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                self._say(
                    f"{self._name}: its disk is full ({error.strerror}): shards are streamed "
                    "without being kept; make room, or lower data.cache.limit_gib"
                )
        if file is None:
            with self._open_remote(url) as stream:
                yield stream
            return
        with file:
            yield file

    def _kept(self, url: str, shard: ShardInfo | None) -> BinaryIO:
        """The whole and checked shard, opened; brought first where it is not there."""
        key, size = self._identity(url, shard)
        for _ in range(_TRIES):
            file = self._found(key)
            if file is not None:
                return file
            with _lock(self.folder / f"{key}.lock"):
                if not self._entries(key):
                    self._bring(url, key, size, shard)
        raise _NotKept(
            f"{self._name}: what is written there is not what is read back, or leaves at once"
        )

    def _identity(self, url: str, shard: ShardInfo | None) -> tuple[str, int | None]:
        """(key, bytes as far as they are known) of a shard."""
        if shard is not None:
            return _key(shard.sha256), shard.size
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        info = fs.info(path)
        place, mark, query = url.partition("?")
        address = place if is_signed(query) else place + mark + query
        stamps = [f"{name}={info[name]}" for name in _STAMPS if info.get(name) is not None]
        size = info.get("size")
        return _key(" ".join([address, str(size), *stamps])), size

    def _found(self, key: str) -> BinaryIO | None:
        """The shard of that key, opened at its beginning; None where there is no sound one."""
        for path in self._entries(key):
            try:
                file = path.open("rb")
            except FileNotFoundError:  # another process has made room
                continue
            digest = hashlib.sha256()
            try:
                os.utime(file.fileno())
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
            except OSError as error:
                self._say(f"{self._name}: cannot be read ({error.strerror}); brought again")
            if digest.hexdigest() == path.stem.partition("-")[2]:
                file.seek(0)
                return cast(BinaryIO, file)
            file.close()
            remove_quietly(path)
            self._say(f"{self._name}: a shard in it was damaged, and is brought again")
        return None

    def _entries(self, key: str) -> list[Path]:
        return sorted(self.folder.glob(f"{key}-*.tar"))

    def _bring(self, url: str, key: str, size: int | None, shard: ShardInfo | None) -> None:
        """Download a shard; its lock is held."""
        part = self.folder / f"{key}.part"
        try:
            with part.open("wb") as target:
                self._take_room(target.fileno(), size, part)
                digest, count = self._copy(url, target, size)
                target.truncate(count)
            if shard is not None and digest != shard.sha256:
                raise _NotKept(
                    f"{redacted(url)} is not the shard that the manifest names: it is not kept"
                )
            sync(part)
            os.replace(part, self.folder / f"{key}-{digest}.tar")
            sync(self.folder)
        finally:
            remove_quietly(part)

    def _copy(self, url: str, target: BinaryIO, size: int | None) -> tuple[str, int]:
        """(sha256, bytes) of what came."""
        digest = hashlib.sha256()
        count = 0
        with self._open_remote(url) as stream:
            while block := stream.read(_BLOCK_BYTES):
                count += len(block)
                if size is None:
                    self._take_room(None, count, Path(target.name))
                elif count > size:
                    break
                digest.update(block)
                target.write(block)
        if size is not None and count != size:
            raise _NotKept(f"{redacted(url)} has another length than its store says: not kept")
        target.flush()
        return digest.hexdigest(), count

    def _take_room(self, descriptor: int | None, size: int | None, part: Path) -> None:
        """Let the least recently used shards go until `size` more bytes fit, and take their space.

        descriptor: of the part whose space is taken. Raises _NotKept where the limit is too small.
        """
        if not size:
            return
        with self._moment():
            shards: list[tuple[float, int, Path]] = []
            total = size
            for entry in os.scandir(self.folder):
                path = Path(entry.path)
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if path.suffix == ".tar":
                        shards.append((status.st_mtime, status.st_size, path))
                        total += status.st_size
                    elif path.suffix == ".part" and path != part and not _is_left_over(path):
                        total += status.st_size
            shards.sort()
            room = sum(bytes_there for _, bytes_there, _ in shards)
            if total - room > self.limit_bytes:
                raise _NotKept(
                    f"{self._name}: a shard of {size / 2**20:,.1f} MiB does not fit into "
                    f"data.cache.limit_gib ({self.limit_bytes / 2**30:g}) beside those on their "
                    "way: it is streamed without being kept"
                )
            for _, bytes_there, path in shards:
                if total <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= bytes_there
            if descriptor is not None and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)

    def _moment(self):
        return _lock(self.folder / ".lock", keep=True)

    @property
    def _name(self) -> str:
        return f"data.cache.folder {printable(self.folder)}"

    def _say(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._report(shorten(reason, 400))


@contextlib.contextmanager
def _lock(path: Path, *, keep: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock file of all processes of this machine; the kernel lets go of it with the process.

    keep: the file stays. Raises BlockingIOError where it is held and wait is False.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(path, descriptor):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it has removed it
    try:
        yield
    finally:
        if not keep:
            remove_quietly(path)
        os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether the file of that name is the one that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_left_over(part: Path) -> bool:
    """Whether nobody brings this shard any more; then it is removed."""
    try:
        with _lock(part.with_suffix(".lock"), wait=False):
            remove_quietly(part)
            return True
    except BlockingIOError:
        return False


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
