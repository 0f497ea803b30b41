"""Token ids from elsewhere as documents: their texts decide order and split, as if read as texts.

So a dataset made of texts, and one made of the same texts tokenised elsewhere, have equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.data.prepare.reading.left_out import LeftOut, kind_of
from ebwm_scale.data.prepare.reading.opening import label
from ebwm_scale.data.prepare.reading.selection import EVERYTHING
from ebwm_scale.data.prepare.reading.source import COMPRESSIONS, Source
from ebwm_scale.data.prepare.reading.taking import Document, Taker
from ebwm_scale.data.prepare.reading.token_files import TYPES, token_documents
from ebwm_scale.data.tokenizer import Tokenizer
from ebwm_scale.data.walking import Report, walk_files

_KIND = "tokens"
_SUFFIXES = (".bin", ".npy")
_BESIDE = (".idx", ".starts.npy", "index.json")  # read together with the ids


@dataclass(frozen=True)
class TokenDocument(Document):
    """A document and its ids (int64, 1-D), without an end of sequence."""

    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), compare=False)


class TokenInput:
    """Files of ids that this tokenizer made. default_type: of ids whose file does not say it."""

    def __init__(self, tokenizer: Tokenizer, default_type: str):
        if default_type not in TYPES:
            raise DataError(f"type of token ids is {default_type}: must be {' or '.join(TYPES)}")
        self.tokenizer, self.default_type = tokenizer, default_type
        self.identity = ["ids", default_type]

    def find(self, inputs: Sequence[str | Path], left_out: LeftOut, report: Report) -> list[Source]:
        """The files of ids in files and folders, each once."""
        sources: dict[Path, Source] = {}
        for text in map(str, inputs):
            path = Path(text)
            if path.is_file():
                found = [_source(path.name, path)]
            elif path.is_dir():
                found = list(_in_folder(path, left_out, report))
            else:
                raise DataError(
                    f"{printable(path)}: no such file or folder; give files or folders with token "
                    f"ids ({', '.join('*' + suffix for suffix in _SUFFIXES)})"
                )
            for source in found:
                sources.setdefault(Path(source.place).resolve(), source)
        return list(sources.values())

    def read(self, source: Source, left_out: LeftOut) -> Iterator[Document]:
        """The file's documents; DataError for ids that are not the tokenizer's."""
        left_out.num_files += 1
        taker = Taker(source, EVERYTHING, left_out, "documents")
        ids_of_documents = token_documents(source, self.default_type, self.tokenizer.eos_id)
        for number, ids in enumerate(ids_of_documents, start=1):
            largest, smallest = int(ids.max()), int(ids.min())
            if largest >= self.tokenizer.vocabulary_size or smallest < 0:
                wrong = smallest if smallest < 0 else largest
                raise DataError(
                    f"{label(source)}: document {number} has the token {wrong}, and the tokenizer "
                    f"has {self.tokenizer.vocabulary_size}: another tokenizer, or ids of another "
                    "type than --tokens says"
                )
            text = self.tokenizer.decode(ids.tolist())
            document = taker.text(str(number), text, f"{source.name}#{number}")
            if document is not None:
                yield TokenDocument(**vars(document), ids=ids)
        taker.finish()


def _in_folder(folder: Path, left_out: LeftOut, report: Report) -> Iterator[Source]:
    for path in walk_files(folder, report=report):
        name = path.relative_to(folder).as_posix()
        if path.name.endswith(_BESIDE):
            continue
        if _plain_suffix(path.name) in _SUFFIXES:
            yield _source(name, path)
        else:
            left_out.kinds[kind_of(PurePosixPath(path.name))] += 1


def _source(name: str, path: Path) -> Source:
    suffix = path.suffix.lower()
    if _plain_suffix(path.name) not in _SUFFIXES:
        raise DataError(
            f"{printable(path)}: token ids are read from {' and '.join(_SUFFIXES)} (each also "
            "compressed); leave --tokens out to read text"
        )
    status = path.stat()
    return Source(
        name,
        str(path),
        _KIND,
        COMPRESSIONS.get(suffix, ""),
        size=status.st_size,
        stamp=str(status.st_mtime_ns),
        given=True,
    )


def _plain_suffix(name: str) -> str:
    """The suffix behind which no compression stands."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
