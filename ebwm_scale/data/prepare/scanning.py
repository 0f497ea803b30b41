"""Reading all documents, once, on all cores, into runs on disk; what was done survives a kill.

    tasks -> a process each: read, make (tokens, or the text) -> runs/KEY/...   the documents
                                                               runs/KEY/done.json  and the rest

KEY says what a task reads and what is made of it. So the same command goes on behind the tasks that
are done, and within a task behind the runs that are whole.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ebwm_scale.core.disk import replace_text
from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.core.progress import Progress
from ebwm_scale.core.redaction import redacted
from ebwm_scale.data.format.writer import lock_folder
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.source import Source, patterns
from ebwm_scale.data.prepare.reading.taking import Document
from ebwm_scale.data.prepare.reading.tasks import Task, tasks_of
from ebwm_scale.data.prepare.runs import Runs, RunWriter
from ebwm_scale.data.prepare.splitting import Place, draws_of
from ebwm_scale.data.prepare.workers import each_in_a_process
from ebwm_scale.data.walking import Report

STILL_S = 600.0  # a process that reads nothing for so long is ended
_WORTH_KEEPING = 256 * 2**20  # bytes of input that were read before an error in the input
_DONE = "done.json"
_MEGABYTE = 10**6


class Input(Protocol):
    """How inputs are found and read. identity: what tells its documents from another one's."""

    identity: list[Any]

    def find(
        self, inputs: Sequence[str | Path], left_out: LeftOut, report: Report
    ) -> list[Source]: ...

    def read(self, source: Source, left_out: LeftOut) -> Iterator[Document]: ...


class Maker(Protocol):
    """What is made of documents.

    dtype: of the payloads.
    """

    dtype: np.dtype

    def __call__(self, documents: Iterator[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        """(document, payload) in the order of the documents."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was noticed, as JSON."""
        ...


@dataclass
class Scan:
    """What all tasks together found."""

    runs: Runs
    num_documents: int = 0
    lowest: Place | None = None  # the places of the contents with the extreme draws
    highest: Place | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    facts: list[dict[str, Any]] = field(default_factory=list)  # of the makers

    def places(self) -> tuple[Place, Place]:
        assert self.lowest is not None and self.highest is not None, "a scan finds documents"
        return self.lowest, self.highest


@contextlib.contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """`.NAME.work` beside the output, locked: where a long piece of work keeps what it has done.

    Removed at the end of the block, and by an error in the input unless much was read; a kill, a
    full disk or Ctrl-C leave it to the next run of the same command.
    """
    folder = output.with_name(f".{output.name}.work")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        yield folder
    except UserError:
        if _bytes_done(folder) < _WORTH_KEEPING:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def scan(
    inputs: Sequence[str | Path],
    how: Input,
    make: Callable[[int], Maker],
    work: Path,
    *,
    seed: int,
    identity: str,
    dtype: np.dtype,
    report: Report,
    progress: Progress,
    workers: int | None = None,
) -> Scan:
    """Read all inputs and write what is made of them as runs into `work`.

    make(num_threads): makes the maker, in each process. What was left out is reported. Raises
    DataError when no document is found, and for inputs that cannot be read.
    """
    found = LeftOut()
    tasks = tasks_of(how.find(inputs, found, report))
    keys = [task.key(how.identity, f"{identity}/{seed}") for task in tasks]
    folders = [work / "runs" / key for key in keys]
    _clear_others(work / "runs", set(keys))
    _run_tasks(tasks, folders, how, make, dtype, seed, progress, workers)
    result = Scan(Runs(folders, dtype))
    files = LeftOut()
    for folder in folders:
        done = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        files.add(LeftOut.from_json(done["left_out"]))
        result.num_documents += done["num_documents"]
        result.facts.append(done["facts"])
        for name, better in (("lowest", min), ("highest", max)):
            place = None if done[name] is None else (int(done[name][0]), str(done[name][1]))
            known = [p for p in (getattr(result, name), place) if p is not None]
            setattr(result, name, better(known) if known else None)
    files.add(found)
    result.left_out = files
    if not result.num_documents:
        where = ", ".join(printable(redacted(str(i))) for i in inputs) or "no input"
        raise DataError(
            f"{where}: no text found ({files.nothing_but()}); looked for {patterns()}: give files "
            "or folders with UTF-8 text"
        )
    for line in files.lines():
        report(line)
    return result


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _run_tasks(
    tasks: Sequence[Task],
    folders: Sequence[Path],
    how: Input,
    make: Callable[[int], Maker],
    dtype: np.dtype,
    seed: int,
    progress: Progress,
    workers: int | None,
) -> None:
    """Each task that is not done, in a process of its own."""
    waiting = [i for i, folder in enumerate(folders) if not (folder / _DONE).is_file()]
    workers = min(workers or num_cores(), max(len(waiting), 1))
    num_threads = max(1, num_cores() // workers)
    read = multiprocessing.get_context("fork").RawArray("Q", len(tasks))
    for i in set(range(len(tasks))) - set(waiting):
        read[i] = tasks[i].size
    total = sum(task.size for task in tasks)

    def look() -> None:
        done = sum(min(read[i], task.size) for i, task in enumerate(tasks))
        progress("reading: MB", done // _MEGABYTE, -(-total // _MEGABYTE))

    def work(number: int, moved: Callable[[], None]) -> None:
        def count(num_bytes: int) -> None:
            read[number] += num_bytes
            moved()

        _do(tasks[number], folders[number], how, make(num_threads), seed, count)
        read[number] = tasks[number].size

    outcomes = each_in_a_process(waiting, work, workers=workers, still_s=STILL_S, look=look)
    for outcome in outcomes:
        if outcome.problem is not None:
            raise DataError(outcome.problem)
    look()


def _do(
    task: Task,
    folder: Path,
    how: Input,
    maker: Maker,
    seed: int,
    count: Callable[[int], None],
) -> None:
    """Read a task's documents, write their runs, and at last what else there is to say."""
    writer = RunWriter(folder, maker.dtype, seed)
    left_out = LeftOut()
    places: list[Place] = []
    num_documents = 0

    def documents() -> Iterator[Document]:
        nonlocal num_documents
        for source in task.sources:
            for document in how.read(source, left_out):
                count(document.num_bytes)
                place = draws_of(document.digest, seed)[0], document.digest
                places[:] = min([place, *places]), max([place, *places])
                num_documents += 1
                if num_documents > writer.num_kept:
                    yield document
            count(0)

    for document, payload in maker(documents()):
        writer.add(document.digest, payload, document.num_bytes)
    writer.flush()
    lowest, highest = places or (None, None)
    done = {
        "num_documents": num_documents,
        "num_input_bytes": task.size,
        "lowest": lowest,
        "highest": highest,
        "left_out": left_out.to_json(),
        "facts": maker.facts(),
    }
    replace_text(folder / _DONE, json.dumps(done))


def _clear_others(folder: Path, keys: set[str]) -> None:
    """Remove the runs of other inputs or settings, which an earlier command left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in keys:
            shutil.rmtree(path, ignore_errors=True)


def _bytes_done(work: Path) -> int:
    size = 0
    for path in work.glob(f"runs/*/{_DONE}"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            size += json.loads(path.read_text(encoding="utf-8"))["num_input_bytes"]
    return size
