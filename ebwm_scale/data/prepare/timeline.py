"""Timestamps of a file -> seconds on a player's clock: never backwards, never still for long.

    in the file    0  .1  .2  .3 | 0  .1  .2 | 60  60.1        joined at |, and a gap
    on the clock   0  .1  .2  .3  .4  .5  .6   .7  .8          three pieces, one after the other

Players do the same: a step far back, or too long to be meant, lasts as long as an ordinary one. A
picture that is a little out of order is shown at once, and the next one at its own time.
"""

from __future__ import annotations

from ebwm_scale.data.prepare.findings import Findings

LONGEST_STILL_S = 5.0  # a longer step is a gap, in a video whose pictures usually follow sooner
_LONGEST_STILL_OF_ANY_S = 60.0  # in a slide show too
_ORDINARY_STEPS = 3  # of a slide show that a still may last
_JOIN_S = 1.0  # a step back by this much is never disorder within one recording
_JOIN_STEPS = 10  # ... nor one by as many ordinary steps
_STANDSTILL = 8  # timestamps that do not rise, in a row, until they are taken for missing ones


class Timeline:
    """Places pictures, in the order in which they are shown, on the clock.

    mean_step_s: between pictures, as the file declares it.
    """

    def __init__(self, mean_step_s: float, findings: Findings):
        still_s = max(LONGEST_STILL_S, _ORDINARY_STEPS * mean_step_s)
        self.longest_s = min(still_s, _LONGEST_STILL_OF_ANY_S)
        self.step_s = min(mean_step_s, self.longest_s)  # the last ordinary one
        self.time_s: float | None = None  # of the last picture
        self._offset_s = 0.0
        self._num_not_rising = 0  # in a row
        self._findings = findings

    def place(self, stamp_s: float | None, *, sound: bool = True) -> tuple[float, bool]:
        """(time of the next picture, whether it continues the one before).

        stamp_s: None if the file has none. sound: False for a picture that is left out because of
        damage, whose order says nothing.
        """
        if self.time_s is None:
            if stamp_s is None:
                self._findings.without_time += 1
            self._offset_s = -(stamp_s or 0.0)
            self.time_s = 0.0
            return 0.0, True
        ordinary_s = self.time_s + self.step_s
        if stamp_s is None:
            self._findings.without_time += 1
            self.time_s = ordinary_s
            return ordinary_s, True
        time_s = stamp_s + self._offset_s
        step_s = time_s - self.time_s
        joined = sound and step_s <= -min(_JOIN_S, _JOIN_STEPS * self.step_s)
        if joined or step_s > self.longest_s:
            self._findings.joins += joined
            if not joined:
                self._findings.gaps += 1
                self._findings.gap_s += step_s - self.step_s
            self._offset_s += ordinary_s - time_s
            self.time_s = ordinary_s
            return ordinary_s, False
        if step_s <= 0:
            self._findings.out_of_order += sound
            self._num_not_rising += 1
            share = 0.25 if self._num_not_rising < _STANDSTILL else 1.0
            self.time_s += share * self.step_s
            return self.time_s, True
        if self._num_not_rising == 0:
            self.step_s = step_s
        self._num_not_rising = 0
        self.time_s = time_s
        return time_s, True
