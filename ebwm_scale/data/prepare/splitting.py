"""Which split a document, or a video, belongs to, and its place in the order: by its hash alone.

sha256("SEED:DIGEST") -> draw    below validation_fraction: validation, else train
                      -> order   documents are packed by rising order

So moving, renaming or adding files never moves a document to the other split, and two copies of a
text are never on both sides. If a side would be empty, the lowest (highest) draw goes there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from ebwm_scale.core.errors import DataError

SPLITS = ("train", "validation")


class Splittable(Protocol):
    """What split_documents needs of a document, or of a video."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...


AnyDocument = TypeVar("AnyDocument", bound=Splittable)
Place = tuple[int, str]  # (draw, digest)


def draws_of(digest: str, seed: int) -> tuple[int, int]:
    """(draw, order) of a content, each 64 bits."""
    drawn = hashlib.sha256(f"{seed}:{digest}".encode()).digest()
    return int.from_bytes(drawn[:8], "big"), int.from_bytes(drawn[8:16], "big")


def threshold_of(validation_fraction: float) -> int:
    """Draws below it are in validation; DataError for a fraction that is none."""
    if not 0 < validation_fraction < 1:
        raise DataError(
            f"validation fraction is {validation_fraction}: must lie between 0 and 1, for example "
            "0.05"
        )
    return math.ceil(validation_fraction * 2**64)


@dataclass(frozen=True)
class SplitRule:
    """What is in validation: draws below the threshold, or one content alone, or all but one."""

    threshold: int
    alone: str = ""  # digest of the one document of a side that would be empty
    alone_in: str = ""  # that side

    @classmethod
    def of(cls, validation_fraction: float, lowest: Place, highest: Place) -> SplitRule:
        """The rule for contents between two places; DataError for less than 2 contents."""
        threshold = threshold_of(validation_fraction)
        if lowest == highest:
            raise too_few(1)
        if lowest[0] >= threshold:
            return cls(threshold, lowest[1], "validation")
        if highest[0] < threshold:
            return cls(threshold, highest[1], "train")
        return cls(threshold)

    def split_of(self, draw: int, digest: str) -> str:
        if self.alone:
            return self.alone_in if digest == self.alone else _OTHER[self.alone_in]
        return "validation" if draw < self.threshold else "train"

    def chosen(self, split: str, draws: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Whether each content is in a split: bool (N,), of draws (N,) and digests (N, 4) of 64
        bits."""
        if self.alone:
            words = np.frombuffer(bytes.fromhex(self.alone), dtype=">u8")
            in_validation = (digests == words).all(axis=1)
            if self.alone_in == "train":
                in_validation = ~in_validation
        else:
            in_validation = draws < np.uint64(self.threshold)
        return in_validation if split == "validation" else ~in_validation


_OTHER = {"train": "validation", "validation": "train"}


def too_few(count: int) -> DataError:
    return DataError(
        f"{count} different documents: the validation split is made of whole documents, "
        "so at least 2 are needed; cut the text into several files, or into the lines of a "
        ".jsonl file"
    )


def split_documents(
    documents: Sequence[AnyDocument], *, validation_fraction: float, seed: int
) -> dict[str, list[AnyDocument]]:
    """{"train": [...], "validation": [...]}, each in the shuffled order in which it is packed.

    Raises DataError with fewer than 2 different documents.
    """
    threshold_of(validation_fraction)
    draws = {document.digest: draws_of(document.digest, seed) for document in documents}
    if not draws:
        raise too_few(0)
    places = [(draw, digest) for digest, (draw, _) in draws.items()]
    rule = SplitRule.of(validation_fraction, min(places), max(places))
    splits: dict[str, list[AnyDocument]] = {name: [] for name in SPLITS}
    for document in sorted(documents, key=lambda d: (draws[d.digest][1], d.digest, d.name)):
        splits[rule.split_of(draws[document.digest][0], document.digest)].append(document)
    return splits
