"""Runs: what was made of the documents, on disk, in the order in which it is packed.

tasks    [a d b]     [f c e]        documents as they were read
runs     [b d a]     [c f e]        each sorted by its documents' order, of bounded size
buckets  b d | a     c | f e        a bucket is a range of orders, the same range in every run
         b c d   |   f a e          merged in memory, bucket by bucket: the order of the whole

Three files a run: keys, a row for each document; payload, their tokens or texts one after the
other; digests, sorted. The keys are written last; a run without them is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ebwm_scale.core.disk import replacement
from ebwm_scale.data.prepare.splitting import SplitRule, draws_of

KEYS = np.dtype(
    [
        ("order", "<u8"),
        ("draw", "<u8"),
        ("digest", ">u8", (4,)),
        ("start", "<u8"),  # in the payload
        ("size", "<u8"),
        ("num_bytes", "<u8"),  # of the text in UTF-8
    ]
)
_RUN_BYTES = 48 * 2**20  # of payload
_RUN_DOCUMENTS = 100_000
_BUCKET_BYTES = 32 * 2**20
_MAX_BITS = 16
_KEYS, _PAYLOAD, _DIGESTS = ".keys", ".payload", ".digests"


class RunWriter:
    """Collects documents and writes a run whenever enough have come together.

    Runs are called by the numbers of their documents. `num_kept` documents are on disk already when
    a task is begun again: those must not be added a second time.
    """

    def __init__(self, folder: Path, dtype: np.dtype, seed: int):
        self.folder, self.dtype, self.seed = folder, dtype, seed
        self.num_kept = _clear_behind_first_gap(folder)
        self._first = self.num_kept
        self._rows: list[tuple] = []
        self._payloads: list[np.ndarray] = []
        self._num_items = 0

    def add(self, digest: str, payload: np.ndarray, num_bytes: int) -> None:
        draw, order = draws_of(digest, self.seed)
        words = tuple(np.frombuffer(bytes.fromhex(digest), dtype=">u8").tolist())
        self._rows.append((order, draw, words, 0, len(payload), num_bytes))
        self._payloads.append(payload)
        self._num_items += len(payload)
        is_full = self._num_items * self.dtype.itemsize >= _RUN_BYTES
        if is_full or len(self._rows) >= _RUN_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a run."""
        if not self._rows:
            return
        keys = np.array(self._rows, dtype=KEYS)
        places = _sorted_places(keys)
        keys = keys[places]
        keys["start"] = np.cumsum(keys["size"]) - keys["size"]
        end = self._first + len(keys)
        path = self.folder / f"{self._first:012d}-{end:012d}"
        with replacement(path.with_suffix(_PAYLOAD)) as temporary, temporary.open("wb") as file:
            for place in places:
                self._payloads[place].astype(self.dtype, copy=False).tofile(file)
        with replacement(path.with_suffix(_DIGESTS)) as temporary:
            keys["digest"][_sorted_digests(keys["digest"])].tofile(temporary)
        with replacement(path.with_suffix(_KEYS)) as temporary:
            keys.tofile(temporary)
        self._first = end
        self._rows, self._payloads, self._num_items = [], [], 0


def _clear_behind_first_gap(folder: Path) -> int:
    """How many documents lie in whole runs from the first on; what is behind them is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    num_kept = 0
    for path in sorted(folder.glob(f"*{_KEYS}")):
        first, _, end = path.stem.partition("-")
        if int(first) != num_kept:
            break
        num_kept = int(end)
    for path in folder.iterdir():
        first = path.stem.partition("-")[0]
        has_keys = path.with_suffix(_KEYS).is_file()
        if path.name.startswith(".") or not has_keys or int(first) >= num_kept:
            path.unlink()
    return num_kept


@dataclass(frozen=True)
class Totals:
    """Of one split: documents, bytes of text, and payload items of each bucket."""

    num_documents: int
    num_bytes: int
    items: np.ndarray  # (buckets,)


@dataclass
class Given:
    """extremes: (draw, digest) of the documents with the lowest and the highest draw."""

    num_documents: int = 0
    num_copies: int = 0
    num_elsewhere: int = 0
    extremes: list[tuple[int, str]] = field(default_factory=list)


class Runs:
    """All runs of some folders, read in the order of their documents.

    distinct: of several copies of a document one is given. without: other runs, whose documents are
    left out. Copies have the same place in the order, so this looks at one bucket at a time.
    """

    def __init__(
        self,
        folders: Iterable[Path],
        dtype: np.dtype,
        *,
        distinct: bool = False,
        without: Runs | None = None,
    ):
        self.dtype = dtype
        self.distinct = distinct
        self.without = without
        self._paths = [p for folder in folders for p in sorted(folder.glob(f"*{_KEYS}"))]
        size = sum(
            path.stat().st_size + path.with_suffix(_PAYLOAD).stat().st_size for path in self._paths
        )
        self.bits = _bits_for(size)

    @property
    def num_buckets(self) -> int:
        return 2**self.bits

    def totals(self, rule: SplitRule, splits: Sequence[str]) -> dict[str, Totals]:
        """Of each split; reads the keys of one run, or of one bucket, at a time."""
        items = {split: np.zeros(self.num_buckets, dtype=np.int64) for split in splits}
        counts = dict.fromkeys(splits, 0)
        sizes = dict.fromkeys(splits, 0)
        for keys in self._pieces_of_keys():
            buckets = self._bucket_of(keys["order"])
            for split in splits:
                chosen = rule.chosen(split, keys["draw"], keys["digest"])
                counts[split] += int(chosen.sum())
                sizes[split] += int(keys["num_bytes"][chosen].sum())
                np.add.at(items[split], buckets[chosen], keys["size"][chosen].astype(np.int64))
        return {split: Totals(counts[split], sizes[split], items[split]) for split in splits}

    def documents(
        self, rule: SplitRule, split: str, *, first_bucket: int = 0
    ) -> Iterator[np.ndarray]:
        """The payload of each document of a split in the order, from a bucket on."""
        for bucket in range(first_bucket, self.num_buckets):
            yield from self.bucket(rule, split, bucket)

    def bucket(self, rule: SplitRule, split: str, bucket: int) -> Iterator[np.ndarray]:
        """The payload of each document of a split in a bucket, in the order."""
        pieces = [self._part(path, bucket) for path in self._paths]
        keys = np.concatenate([part for part, _ in pieces]) if pieces else np.empty(0, KEYS)
        of_run = np.repeat(np.arange(len(pieces)), [len(part) for part, _ in pieces])
        chosen = rule.chosen(split, keys["draw"], keys["digest"])
        keys, of_run = keys[chosen], of_run[chosen]
        for place in self._places(keys):
            start = int(keys["start"][place])
            yield pieces[of_run[place]][1][start : start + int(keys["size"][place])]

    def sizes(self, rule: SplitRule, split: str, bucket: int) -> np.ndarray:
        """int64, of the payload of each document that bucket() gives."""
        parts = [self._keys(path, bucket) for path in self._paths]
        keys = np.concatenate([np.empty(0, KEYS), *parts])
        keys = keys[rule.chosen(split, keys["draw"], keys["digest"])]
        return keys["size"][self._places(keys)].astype(np.int64)

    def given(self) -> Given:
        """How many documents are given, how many are not, and those with the extreme draws."""
        given = Given()
        for keys in self._pieces_of_keys():
            given.num_documents += len(keys)
            for row in keys[[int(keys["draw"].argmin()), int(keys["draw"].argmax())]]:
                given.extremes.append((int(row["draw"]), row["digest"].tobytes().hex()))
            given.extremes = [min(given.extremes), max(given.extremes)]
        for bucket in range(self.num_buckets) if self.is_selective else ():
            keys = self._all_keys(bucket)
            is_copy, is_elsewhere = self._left_out(keys, _sorted_places(keys))
            given.num_copies += int(is_copy.sum())
            given.num_elsewhere += int(is_elsewhere.sum())
        return given

    @property
    def is_selective(self) -> bool:
        return self.distinct or self.without is not None

    def _pieces_of_keys(self) -> Iterator[np.ndarray]:
        """The keys of all documents that are given, not empty: of a run each, or of a bucket."""
        if self.is_selective:
            for bucket in range(self.num_buckets):
                keys = self._all_keys(bucket)
                keys = keys[self._places(keys)]
                if len(keys):
                    yield keys
            return
        for path in self._paths:
            yield np.fromfile(path, dtype=KEYS)

    def _all_keys(self, bucket: int) -> np.ndarray:
        parts = [self._keys(path, bucket) for path in self._paths]
        return np.concatenate([np.empty(0, KEYS), *parts])

    def _places(self, keys: np.ndarray) -> np.ndarray:
        """Where each document is that is given, of the keys of a bucket, in the order."""
        places = _sorted_places(keys)
        if not self.is_selective:
            return places
        is_copy, is_elsewhere = self._left_out(keys, places)
        return places[~(is_copy | is_elsewhere)]

    def _left_out(self, keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(is a further copy, is in the runs that it must not be in), bool by the order.

        A document is counted as one of them only.
        """
        words = keys["digest"][places]
        is_elsewhere = np.zeros(len(places), dtype=bool)
        is_copy = np.zeros(len(places), dtype=bool)
        if self.without is not None and len(places):
            orders = keys["order"][places]
            others = self.without.digests_between(int(orders.min()), int(orders.max()))
            is_elsewhere = np.isin(_as_texts(words), others)
        if self.distinct:
            is_copy[1:] = (words[1:] == words[:-1]).all(axis=1)
            is_copy &= ~is_elsewhere
        return is_copy, is_elsewhere

    def digests_between(self, lowest: int, highest: int) -> np.ndarray:
        """The digests, 32 bytes each, of documents whose order is in a range, both ends in it."""
        found = [np.empty((0, 4), ">u8")]
        for path in self._paths:
            mapped = np.memmap(path, dtype=KEYS, mode="r")
            orders = mapped["order"]
            first = int(np.searchsorted(orders, np.uint64(lowest), side="left"))
            end = int(np.searchsorted(orders, np.uint64(highest), side="right"))
            found.append(np.array(mapped["digest"][first:end]))
        return _as_texts(np.concatenate(found))

    def digests(self) -> Iterator[str]:
        """The digests of the documents that are given, sorted; memory is that of one range."""
        bits = _bits_for(sum(path.with_suffix(_DIGESTS).stat().st_size for path in self._paths))
        for part in range(2**bits):
            found = self._digests_in(part, bits)
            found = found[_sorted_digests(found)]
            if self.distinct and len(found):
                is_first = np.append(True, (found[1:] != found[:-1]).any(axis=1))
                found = found[is_first]
            if self.without is not None:
                others = self.without._digests_in(part, bits)
                found = found[~np.isin(_as_texts(found), _as_texts(others))]
            text = found.tobytes().hex()
            yield from (text[at : at + 64] for at in range(0, len(text), 64))

    def _digests_in(self, part: int, bits: int) -> np.ndarray:
        """Those whose highest bits are `part`, (documents, 4)."""
        words = [np.empty((0, 4), ">u8")]
        for path in self._paths:
            mapped = np.memmap(path.with_suffix(_DIGESTS), dtype=">u8", mode="r").reshape(-1, 4)
            words.append(np.array(mapped[slice(*_range(mapped[:, 0], part, bits))]))
        return np.concatenate(words).astype(">u8")

    def _bucket_of(self, values: np.ndarray) -> np.ndarray:
        if not self.bits:
            return np.zeros(len(values), dtype=np.int64)
        return (values >> np.uint64(64 - self.bits)).astype(np.int64)

    def _keys(self, path: Path, bucket: int) -> np.ndarray:
        # memmap: finding the range touches a few pages of the keys, not all
        mapped = np.memmap(path, dtype=KEYS, mode="r")
        return np.array(mapped[slice(*_range(mapped["order"], bucket, self.bits))])

    def _part(self, path: Path, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys, payload) of a run's documents in a bucket; `start` counts in that payload."""
        keys = self._keys(path, bucket)
        if not len(keys):
            return keys, np.empty(0, self.dtype)
        offset = int(keys["start"][0])
        payload = np.fromfile(
            path.with_suffix(_PAYLOAD),
            dtype=self.dtype,
            count=int(keys["size"].sum()),
            offset=offset * self.dtype.itemsize,
        )
        keys["start"] -= np.uint64(offset)
        return keys, payload


def _as_texts(words: np.ndarray) -> np.ndarray:
    """Digests (documents, 4) as one value each, to be compared."""
    return np.ascontiguousarray(words.astype(">u8")).view("S32").ravel()


def _bits_for(size: int) -> int:
    """The number of buckets, as a power of two, that leaves about _BUCKET_BYTES in each."""
    bits = 0
    while size >> bits > _BUCKET_BYTES and bits < _MAX_BITS:
        bits += 1
    return bits


def _range(values: np.ndarray, bucket: int, bits: int) -> tuple[int, int]:
    """(first, end) of the sorted values whose highest bits are the bucket's number."""
    if not bits:
        return 0, len(values)
    first = int(np.searchsorted(values, np.uint64(bucket << (64 - bits))))
    if bucket + 1 == 2**bits:
        return first, len(values)
    return first, int(np.searchsorted(values, np.uint64((bucket + 1) << (64 - bits))))


def _sorted_digests(words: np.ndarray) -> np.ndarray:
    return np.lexsort((words[:, 3], words[:, 2], words[:, 1], words[:, 0]))


def _sorted_places(keys: np.ndarray) -> np.ndarray:
    """Where each document of the order is: by order, then by digest."""
    words = keys["digest"]
    return np.lexsort((words[:, 3], words[:, 2], words[:, 1], words[:, 0], keys["order"]))
