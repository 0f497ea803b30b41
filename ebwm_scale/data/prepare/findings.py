"""What was left out of a video, or put right in it, in counts and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Findings:
    """Counts for one video, which `total` adds up. A video without any is stored whole."""

    damaged_packets: int = 0  # that the decoder refused, or that the file's own checks condemn
    faulty_pictures: int = 0  # in which the decoder concealed errors
    left_out_pictures: int = 0  # faulty ones, and those that build on damage
    doubtful_pictures: int = 0  # stored, although they may show remains of damage
    damage_at_s: float | None = None  # the first of it
    unreadable: int = 0  # places where the file cannot be read; what follows was read on
    without_picture: int = 0  # packets that gave none, and no error either
    missing_packets: int = 0  # that the file declares and does not hold
    joins: int = 0  # where timestamps start again
    gaps: int = 0  # during which there is no picture
    gap_s: float = 0.0  # of all gaps
    out_of_order: int = 0  # timestamps not after the one before
    without_time: int = 0  # pictures without a timestamp
    changes: int = 0  # of size or orientation
    interlaced: int = 0  # pictures of which one field is stored
    damaged_images: int = 0  # of a folder of images, left out
    other_streams: int = 0  # further videos in the same file

    def damage(self, time_s: float) -> None:
        """Remember when damage was first met."""
        if self.damage_at_s is None:
            self.damage_at_s = round(time_s, 3)

    def phrases(self) -> list[str]:
        """What happened, most harmful first; empty for a video that is stored whole."""
        at = "" if self.damage_at_s is None else f" (first at {self.damage_at_s:.1f} s)"
        result = [
            (
                self.damaged_packets,
                f"{_count(self.damaged_packets, 'damaged packet')} left out{at}",
            ),
            (
                self.left_out_pictures,
                (
                    f"{_count(self.left_out_pictures, 'picture')} left out because of damage, "
                    f"{self.faulty_pictures} of them with errors that the decoder concealed{at}"
                ),
            ),
            (
                self.doubtful_pictures,
                (
                    f"{_count(self.doubtful_pictures, 'picture')} kept that may show remains of "
                    "damage, because no key frame follows"
                ),
            ),
            (
                self.damaged_images,
                f"{_count(self.damaged_images, 'image')} left out as damaged{at}",
            ),
            (self.unreadable, f"{_count(self.unreadable, 'place')} where the file is unreadable"),
            (
                self.without_picture,
                f"{_count(self.without_picture, 'packet')} that gave no picture",
            ),
            (
                self.missing_packets,
                f"{_count(self.missing_packets, 'packet')} declared but missing: the file is cut",
            ),
            (self.joins, f"{_count(self.joins, 'join')} where timestamps start again"),
            (self.gaps, f"{_count(self.gaps, 'gap')} of {self.gap_s:.1f} s in all closed"),
            (self.out_of_order, f"{_count(self.out_of_order, 'timestamp')} out of order moved"),
            (
                self.without_time,
                f"{_count(self.without_time, 'picture')} without a timestamp spaced evenly",
            ),
            (self.changes, f"{_count(self.changes, 'change')} of size or orientation"),
            (
                self.interlaced,
                f"{_count(self.interlaced, 'interlaced picture')} of which one field is taken",
            ),
            (self.other_streams, f"{_count(self.other_streams, 'other video stream')} not used"),
        ]
        return [phrase for count, phrase in result if count]

    def counts(self) -> dict[str, int | float]:
        """Everything but zeros, for JSON."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value}


def total(findings: Iterable[Findings]) -> Findings:
    """The sums over several videos; when damage was met is of one video only."""
    result = Findings()
    for found in findings:
        for field in dataclasses.fields(Findings):
            if field.name != "damage_at_s":
                value = getattr(result, field.name) + getattr(found, field.name)
                setattr(result, field.name, value)
    return result


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
