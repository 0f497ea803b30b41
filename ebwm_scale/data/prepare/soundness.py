"""Which decoded pictures show what was recorded, in a file with damage.

    packets    K  p  p  X  p  p  K  p      X cannot be decoded, or the decoder conceals errors in it
    pictures   +  +  +  -  -  -  +  +      up to the next key frame they build on it: left out

The decoder tells of concealed errors when it gives the picture out. Pictures that were decoded
after it but are shown before it build on it too: so each is held back until those decoded before it
are out.

Where no key frame follows soon, pictures are taken again a moment after the damage, and counted as
doubtful: a player shows them, and what is wrong fades as parts of the picture are coded anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ebwm_scale.data.prepare.findings import Findings
from ebwm_scale.data.prepare.timeline import Timeline

_KEY_FRAME_WITHIN_S = 10.0
_DOUBTFUL_AFTER_S = 1.0
# Where files are joined, the file's own checks condemn one of the last packets before, for what
# does not follow it. If a key frame comes next, no other picture builds on it; if it is damaged
# itself, the decoder says so.
_WAIT_FOR_JOIN = 2
_MAX_HELD = 16  # frames; more are never coded out of order


@dataclass
class Judged:
    """A frame, in the order in which they are shown. hole: pictures may be missing before it."""

    frame: Any  # av.VideoFrame
    number: int | None  # of its packet, if that is known
    sound: bool
    doubtful: bool
    hole: bool


class Soundness:
    """Hears of every packet, and says of every frame whether it is taken.

    rate: packets a second, to tell how far away the next key frame is. find_key_packets: gives the
    numbers (from 1, rising) of the packets that hold key frames; called once, when there is damage.
    """

    def __init__(
        self,
        rate: float,
        timeline: Timeline,
        findings: Findings,
        find_key_packets: Callable[[], list[int]],
    ):
        self.num_packets = 0  # read so far
        self.first_error: str | None = None
        self._hole = False
        self._held: deque[Judged] = deque()
        self._last_pts: int | None = None
        # Timestamp -> number of a packet whose picture is not out.
        self._numbers: dict[int | None, int] = {}
        self._rate = rate
        self._timeline = timeline
        self._findings = findings
        self._find_key_packets = find_key_packets
        self._key_packets: list[int] | None = None
        self._num_expected = 0  # pictures still to come: one for each packet
        self._fields = False  # there may be two packets to a picture
        # Packets until one that the file's own checks find damaged counts as such.
        self._condemned = 0
        # Numbers of packets: what is decoded from the first on builds on it, up to a key frame
        # after the last.
        self._first_damage: int | None = None
        self._last_damage = 0
        self._in_damage = False  # frames that build on damage have come
        self._doubtful = False
        self._doubtful_from_s: float | None = None  # None: wait for the next key frame

    def packet_read(self, packet) -> None:
        """A packet (av.Packet) was read, and is decoded next."""
        if packet.is_keyframe:
            self._condemned = 0
        elif self._condemned:
            self._condemned -= 1
            if not self._condemned:
                self._findings.damaged_packets += 1
                self._damage("the file's own checks find it damaged")
        if packet.is_corrupt:
            self._condemned = _WAIT_FOR_JOIN
        self.num_packets += 1
        self._last_pts = packet.pts
        if not packet.is_discard:  # by an edit list
            self._num_expected += 1
            if packet.pts is not None:
                self._numbers[packet.pts] = self.num_packets

    def packet_failed(self, why: str) -> None:
        """The packet read last cannot be decoded, or not wholly."""
        self._findings.damaged_packets += 1
        self._num_expected -= 1
        self._numbers.pop(self._last_pts, None)
        self._hole = True
        self._damage(why)

    def read_failed(self, why: str) -> None:
        """The file cannot be read behind the packet read last."""
        self._findings.unreadable += 1
        self._hole = True
        self._damage(why)

    def judge(self, frame) -> Iterator[Judged]:
        """Take the next frame; gives those out that need not be held back any longer."""
        number = self._numbers.pop(frame.pts, None)
        self._num_expected -= 1
        self._fields = self._fields or frame.interlaced_frame
        now_s = self._timeline.time_s or 0.0
        if frame.is_corrupt:
            self._findings.faulty_pictures += 1
            self._damage("errors that the decoder concealed", number)
            for held in self._held:
                if number is not None and held.number is not None and held.number > number:
                    held.sound = False
        elif frame.key_frame and (number is None or number > self._last_damage):
            self._first_damage = None
            self._doubtful = False
        elif (
            self._first_damage is not None
            and self._doubtful_from_s is not None
            and now_s >= self._doubtful_from_s
        ):
            self._first_damage = None
            self._doubtful = True
        sound = not frame.is_corrupt
        if self._first_damage is None:
            self._in_damage = False
        elif self._in_damage or number is None or number >= self._first_damage:
            sound = False
            self._in_damage = True  # what was decoded before and comes now has lost its place
        self._held.append(Judged(frame, number, sound, self._doubtful, self._hole))
        self._hole = False
        while self._held and not self._is_early(self._held[0]):
            yield self._released()

    def rest(self) -> Iterator[Judged]:
        """The frames still held back, once no more come."""
        while self._held:
            yield self._released()
        if not self._fields:
            self._findings.without_picture = max(0, self._num_expected)

    def _is_early(self, judged: Judged) -> bool:
        """Whether a frame may build on one that is shown after it."""
        if judged.number is None or len(self._held) > _MAX_HELD:
            return False
        oldest = self.num_packets - 2 * _MAX_HELD  # a packet from before it gives no picture
        return any(oldest < number < judged.number for number in self._numbers.values())

    def _released(self) -> Judged:
        judged = self._held.popleft()
        if not judged.sound:
            self._findings.left_out_pictures += 1
        elif judged.doubtful:
            self._findings.doubtful_pictures += 1
        return judged

    def _damage(self, why: str, number: int | None = None) -> None:
        """number: of the damaged packet; without, the last one read."""
        number = self.num_packets if number is None else number
        now_s = self._timeline.time_s or 0.0
        self.first_error = self.first_error or why
        self._findings.damage(now_s)
        if self._first_damage is None or number < self._first_damage:
            self._first_damage = number
        self._last_damage = max(self._last_damage, number)
        if self._key_packets is None:
            self._key_packets = self._find_key_packets()
        following = bisect_right(self._key_packets, number)
        near = False
        if following < len(self._key_packets):
            distance_s = (self._key_packets[following] - number) / self._rate
            near = distance_s <= _KEY_FRAME_WITHIN_S
        self._doubtful_from_s = None if near else now_s + _DOUBTFUL_AFTER_S
