"""Walking a folder of inputs: every file in it, linked folders included, each real folder once.

corpus/                  walked
  a.txt                  yielded
  part -> /elsewhere     followed: /elsewhere/b.txt is yielded as corpus/part/b.txt
  same -> part           leads to a folder that was walked already: its files are not yielded again
  back -> .              a cycle: DataError

A folder that can be reached without a link is walked without one, so links never change the
name of a file. What cannot be walked (a folder without permission, a link to nowhere, a pipe) is
said, never left out in silence.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable

Report = Callable[[str], None]
_Identity = tuple[int, int]  # device and inode: the same for every path to a folder


@dataclass
class _Folder:
    """A real folder: how it was first reached, and what is directly in it."""

    path: Path
    files: list[Path] = field(default_factory=list)
    folders: list[tuple[Path, _Identity]] = field(default_factory=list)


def walk_files(
    folder: str | Path, *, hidden: bool = False, report: Report = print
) -> Iterator[Path]:
    """The files in a folder and its subfolders, below `folder`, sorted by their paths' parts.

    Links to folders and files are followed, each real folder once. hidden: also what has a name
    that begins with a dot. Raises DataError for a link to a folder it is inside of, naming it.
    """
    root = Path(folder)
    folders = _scan(root, hidden, report)
    _refuse_cycles(_identity(root), folders)
    yield from sorted(path for found in folders.values() for path in found.files)


def _scan(root: Path, hidden: bool, report: Report) -> dict[_Identity, _Folder]:
    """Every real folder that can be reached from the root: along as few links as possible."""
    folders: dict[_Identity, _Folder] = {}
    unusable: dict[str, list[Path]] = {}
    within_reach = deque([(root, _identity(root))])
    behind_links: deque[tuple[Path, _Identity]] = deque()
    while within_reach or behind_links:
        path, identity = within_reach.popleft() if within_reach else behind_links.popleft()
        if identity in folders:
            continue
        found = folders[identity] = _Folder(path)
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            unusable.setdefault(f"folder that cannot be listed ({error.strerror})", []).append(path)
            continue
        for name in names:
            if name.startswith(".") and not hidden:
                continue
            entry = path / name
            kind = _kind(entry)
            if kind == "file":
                found.files.append(entry)
            elif kind != "folder":
                unusable.setdefault(kind, []).append(entry)
            elif entry.is_symlink():
                _refuse_link_to_a_parent(entry, root)
                behind_links.append((entry, _identity(entry)))
                found.folders.append(behind_links[-1])
            else:
                within_reach.append((entry, _identity(entry)))
                found.folders.append(within_reach[-1])
    for kind, paths in sorted(unusable.items()):
        report(
            f"warning: {printable(root)}: skipped: {len(paths)} x {kind}, "
            f"the first is {printable(paths[0])}"
        )
    return folders


def _kind(path: Path) -> str:
    """What a directory entry is, its links followed: "file", "folder", or in words what else."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(
                f"{printable(path)}: a link that leads back to itself; remove it"
            ) from None
        return f"link or file that cannot be reached ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    return "pipe, socket or device"


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def _refuse_link_to_a_parent(link: Path, root: Path) -> None:
    """DataError before a link to a parent folder makes this a walk of the whole disk."""
    target = link.resolve()
    if link.parent.resolve().is_relative_to(target) or root.resolve().is_relative_to(target):
        raise _cycle(link, target)


def _refuse_cycles(root: _Identity, folders: dict[_Identity, _Folder]) -> None:
    """DataError if folders and links lead from the root to a folder that one is inside of."""
    entered: list[tuple[Path, _Identity, Iterator[tuple[Path, _Identity]]]] = []
    inside: set[_Identity] = set()
    done: set[_Identity] = set()

    def enter(path: Path, identity: _Identity) -> None:
        entered.append((path, identity, iter(folders[identity].folders)))
        inside.add(identity)

    enter(folders[root].path, root)
    while entered:
        _, identity, remaining = entered[-1]
        step = next(remaining, None)
        if step is None:
            entered.pop()
            inside.remove(identity)
            done.add(identity)
            continue
        path, target = step
        if target in inside:
            links = [p for p, _, _ in entered if p.is_symlink()]
            link = path if path.is_symlink() else links[-1]
            raise _cycle(link, folders[target].path)
        if target not in done:
            enter(path, target)


def _cycle(link: Path, target: Path) -> DataError:
    return DataError(
        f"{printable(link)}: a link to {printable(os.readlink(link))} that leads back to "
        f"{printable(target)}, a folder it is reached through: remove the link, or name the "
        "folders to read one by one"
    )
