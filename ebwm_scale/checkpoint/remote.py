"""Copies of a run's checkpoints away from home, through fsspec: s3://, gs://, file://, ...

    RUN/checkpoints/step_000100/    published here
    REMOTE/checkpoints/step_000100/ its files, each read back and hashed; manifest.json comes last
    REMOTE/metrics.jsonl, ...       the rows of the run, up to the last whole line

A thread of rank 0 copies while training goes on. A copy without its manifest.json is none, so a
kill in between leaves the ones before it as they were. What fails is said and tried again with the
next checkpoint; it never ends a run. On a machine without the run folder, `fetch_run` brings it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from ebwm_scale.checkpoint.files import MANIFEST
from ebwm_scale.checkpoint.reader import NAME, published, step_of, verify
from ebwm_scale.core.errors import CheckpointError, ConfigError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.plain_text import printable, shorten
from ebwm_scale.core.redaction import redacted, redacted_error

ROWS = ("config.yaml", "metrics.jsonl", "events.jsonl", "quarantine.jsonl")
_BUFFER_BYTES = 2**22
_PATIENCE_S = 3600.0  # for the last copy, at the end of a run


class RemoteStore:
    """A folder behind an address. Raises ConfigError for an address that fsspec does not know or
    whose package is missing; OSError, or what its client raises, for the rest.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.remote is {printable(redacted(url))}: "
                f"{shorten(redacted_error(error, url))}; give an address such as "
                "s3://bucket/runs/mine, and install its package (s3fs, gcsfs, ...)"
            ) from None

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def put(self, source: Path, name: str) -> None:
        """Copy a file there; OSError if what can be read back is another."""
        self._make_folder(name)
        with source.open("rb") as file, self.fs.open(self.path(name), "wb") as target:
            shutil.copyfileobj(file, target, _BUFFER_BYTES)
        self._check(name, file_sha256(source))

    def put_bytes(self, content: bytes, name: str) -> None:
        self._make_folder(name)
        with self.fs.open(self.path(name), "wb") as target:
            target.write(content)
        self._check(name, hashlib.sha256(content).hexdigest())

    def get(self, name: str, target: Path) -> None:
        with self.fs.open(self.path(name), "rb") as file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy, _BUFFER_BYTES)

    def names(self, folder: str) -> list[str]:
        """Of what is in a folder; nothing where there is none."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(name), recursive=True)

    def checkpoints(self) -> list[str]:
        """Names of the whole ones, newest first."""
        names = [name for name in self.names("checkpoints") if NAME.fullmatch(name)]
        names.sort(key=step_of, reverse=True)
        return [name for name in names if MANIFEST in self.names(f"checkpoints/{name}")]

    def _make_folder(self, name: str) -> None:
        """Where there are folders; an object store needs none.

        A key that may write objects may still not make their bucket. What cannot be written is
        said by the write that follows, which is never suppressed.
        """
        with contextlib.suppress(NotImplementedError, PermissionError):
            self.fs.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)

    def _check(self, name: str, expected: str) -> None:
        digest = hashlib.sha256()
        self.fs.invalidate_cache()
        with self.fs.open(self.path(name), "rb") as file:
            while block := file.read(_BUFFER_BYTES):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise OSError(f"{name}: what was read back is not what was written")


class RemoteCopies:
    """The copies of one run's checkpoints; of rank 0.

    begin() after each publication, told() now and then, finish() at the end.
    """

    def __init__(self, url: str, run_dir: Path):
        self.store = RemoteStore(url)
        self.run_dir = run_dir
        self.copied: int | None = None  # the newest step that is there
        self._wanted: Path | None = None
        self._is_new = threading.Condition()
        self._ends = False
        self._told: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, folder: Path) -> None:
        """Copy this checkpoint; of several that wait, the newest alone is copied."""
        with self._is_new:
            self._wanted = folder
            self._is_new.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="remote copies")
            self._thread.start()

    def told(self) -> list[tuple[int, str | None]]:
        """(step, why it is not there, None where it is) of what has ended since it was asked."""
        found = []
        while not self._told.empty():
            found.append(self._told.get())
        return found

    def finish(self) -> list[tuple[int, str | None]]:
        """Wait for what is being copied, and the rows once more; as told()."""
        with self._is_new:
            self._ends = True
            self._is_new.notify()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                told = self.told()
                return [*told, (self.copied or 0, f"nothing came of it in {_PATIENCE_S:g} s")]
            with contextlib.suppress(Exception):  # the rows of the last save are there
                self._copy_rows()
        return self.told()

    def _work(self) -> None:
        while True:
            with self._is_new:
                while self._wanted is None and not self._ends:
                    self._is_new.wait()
                folder, self._wanted = self._wanted, None
            if folder is None:
                return
            try:
                self._copy(folder)
            except Exception as error:  # noqa: BLE001 (each file system raises what its client does)
                if self._wanted is None:  # else a newer one is on its way
                    problem = _said(error, self.store.url)
                    self._told.put((step_of(folder.name), problem))
            else:
                self.copied = step_of(folder.name)
                self._told.put((self.copied, None))

    def _copy(self, folder: Path) -> None:
        there = f"checkpoints/{folder.name}"
        names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        # one of the same step, from before its evaluation was made up, is no whole one meanwhile
        self.store.remove(f"{there}/{MANIFEST}")
        for name in names:
            self.store.put(folder / name, f"{there}/{name}")
        self._copy_rows()
        self.store.put(folder / MANIFEST, f"{there}/{MANIFEST}")
        self._prune(besides=folder.name)

    def _copy_rows(self) -> None:
        for name in ROWS:
            with contextlib.suppress(FileNotFoundError):
                content = (self.run_dir / name).read_bytes()
                if name.endswith(".jsonl"):
                    content = content[: content.rfind(b"\n") + 1]
                self.store.put_bytes(content, name)

    def _prune(self, *, besides: str) -> None:
        """Keep there what is kept here, and what is newer than all of it."""
        kept = {path.name for path in published(self.run_dir / "checkpoints")} | {besides}
        for name in self.store.checkpoints():
            if name not in kept and step_of(name) < step_of(besides):
                self.store.remove(f"checkpoints/{name}/{MANIFEST}")
                self.store.remove(f"checkpoints/{name}")


def check_remote(url: str, *, resume: bool) -> None:
    """Raise CheckpointError where checkpoint.remote cannot be reached, or holds another run."""
    store = RemoteStore(url)
    try:
        names = store.checkpoints()
    except Exception as error:  # noqa: BLE001 (each file system raises what its client does)
        raise _unreachable(url, error) from None
    if names and not resume:
        raise CheckpointError(
            f"checkpoint.remote {printable(redacted(url))} already holds a run ({names[0]}): "
            "continue it with --resume, or name another address"
        )


def _said(error: Exception, url: str) -> str:
    """What a store says of its failure, in one line."""
    return shorten(f"{type(error).__name__}: {redacted_error(error, url)}", 200)


def _unreachable(url: str, error: Exception) -> CheckpointError:
    said = _said(error, url)
    return CheckpointError(
        f"checkpoint.remote {printable(redacted(url))} cannot be read ({said}): check the address, "
        "the network and the credentials, or leave it out"
    )


def fetch_run(url: str, run_dir: Path, say: Callable[[str], None]) -> bool:
    """Bring a run's newest whole checkpoint and its rows to a machine that has no such run folder.

    Whether there was one. The folder appears as a whole. Raises CheckpointError where the store
    cannot be read, or none of its checkpoints is sound; ConfigError for an address that is none.
    """
    store = RemoteStore(url)
    shown = printable(redacted(url))
    staging = run_dir.with_name(f".{run_dir.name}.fetched-{os.getpid()}")
    try:
        names = store.checkpoints()
        if not names:
            return False
        shutil.rmtree(staging, ignore_errors=True)
        for name in names:
            problem = _fetched(store, name, staging)
            if problem is None:
                break
            say(
                f"warning: {shown}: {name} is not what was saved ({problem}); trying the one before"
            )
        else:
            raise CheckpointError(
                f"{shown}: none of {len(names)} checkpoints can be used; start a new run with "
                "another checkpoint.remote"
            )
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        os.rename(staging, run_dir)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # noqa: BLE001 (each file system raises what its client does)
        raise _unreachable(url, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"fetched {name} from {shown} into {run_dir}")
    return True


def _fetched(store: RemoteStore, name: str, staging: Path) -> str | None:
    """Bring one checkpoint and the rows; why it cannot be used, None where it can."""
    folder = staging / "checkpoints" / name
    folder.mkdir(parents=True)
    for file in store.names(f"checkpoints/{name}"):
        store.get(f"checkpoints/{name}/{file}", folder / file)
    try:
        verify(folder)
    except CheckpointError as error:
        shutil.rmtree(folder)
        return str(error)
    for file in ROWS:
        with contextlib.suppress(FileNotFoundError):
            store.get(file, staging / file)
    (staging / "checkpoints" / "latest").write_text(name + "\n", encoding="utf-8")
    return None
