"""What a form or a command line asks an explorer of frames: which clip or episode, how to think
about its next frame, what to do in it, and what to plan.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebwm_scale.control.planner import SOLVERS
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.plain_text import shown
from ebwm_scale.exploring.request import Field
from ebwm_scale.inference.thinking import ThinkingConfig

MOST_AHEAD = 16  # imagined frames
MOST_FUTURES = 512  # of a plan
MAX_ACTION_TEXT = 400  # characters
THINKING = ("num_steps", "num_starts", "step_size", "noise", "tolerance", "settled")


@dataclass(frozen=True)
class FrameRequest:
    """See fields_of. number: of the clip or episode, from 0 on, as `ebwm think --episode` counts.

    action: numbers or ids in the units of the dataset, None: what was done. goal: a frame of the
    same clip or episode to plan for, None: the one at the end of the horizon.
    """

    number: int = 0
    first: int = 0
    num_context: int = 1
    num_ahead: int = 4
    num_steps: int | None = None
    num_starts: int = 1
    step_size: float | None = None
    noise: float = 0.0
    tolerance: float | None = None
    settled: float | None = None
    seed: int = 33
    accept_only_if_lower: bool = False
    action: str = ""
    goal: int | None = None
    horizon: int = 1
    budget: int = 64
    solver: str = "cem"

    def thinking(self, thinks: bool) -> ThinkingConfig:
        """As `ebwm think` would be asked for it; of a Transformer++, which does not think, the seed
        alone.
        """
        if not thinks:
            return ThinkingConfig(seed=self.seed)
        return ThinkingConfig(
            num_steps=self.num_steps,
            step_size=self.step_size,
            noise=self.noise,
            num_starts=self.num_starts,
            accept_only_if_lower=self.accept_only_if_lower,
            tolerance=self.tolerance,
            settled=self.settled,
            seed=self.seed,
        )


@dataclass(frozen=True)
class FrameFields:
    """The fields of a run's form. has_actions: with those of actions and plans. thinks: with those
    of refinement.
    """

    unit: str
    count: int
    longest: int  # frames of the longest one
    num_groups: int
    thinks: bool
    has_actions: bool

    @property
    def fields(self) -> tuple[Field, ...]:
        last = max(0, self.longest - 2)
        found = [
            Field("number", f"{self.unit}", 0, self.count - 1, True),
            Field("first", "first frame", 0, last, True),
            Field("num_context", "observed frames", 1, self.num_groups, True),
            Field("num_ahead", "imagined frames", 1, MOST_AHEAD, True),
        ]
        if self.thinks:
            found += [
                Field("num_steps", "steps", 1, 32, True, "as trained"),
                Field("num_starts", "starts", 1, 8, True),
                Field("step_size", "step size", 1e-9, 1e9, False, "as trained"),
                Field("noise", "Langevin noise", 0, 1e3, False),
                Field("tolerance", _TOLERANCE, 0, 1e9, False, "never"),
                Field("settled", _SETTLED, 0, 1e9, False, "never"),
            ]
        found.append(Field("seed", "seed", 0, 2**31 - 1, True))
        if self.has_actions:
            found += [
                Field("goal", "plan: goal, a frame's number", 0, self.longest - 1, True, "last"),
                Field("horizon", "plan: steps ahead", 1, self.num_groups, True),
                Field("budget", "plan: imagined futures", 3, MOST_FUTURES, True),
            ]
        return tuple(found)

    def read(self, given: Mapping[str, str], start: FrameRequest) -> FrameRequest:
        """The request that a form's fields make; what is absent is as in `start`.

        A form leaves out a box that is not ticked. Raises UserError for the first field that cannot
        be.
        """
        changes: dict[str, Any] = {}
        for field in self.fields:
            if field.name in given:
                changes[field.name] = field.read(given[field.name])
        solver = given.get("solver", start.solver)
        if solver not in SOLVERS:
            raise UserError(f"solver is {shown(solver, 40)}: give one of {', '.join(SOLVERS)}")
        action = given.get("action", start.action).strip()
        if len(action) > MAX_ACTION_TEXT:
            raise UserError(
                f"the action has {len(action):,} characters: give at most {MAX_ACTION_TEXT}"
            )
        accepts = "accept_only_if_lower" in given
        return dataclasses.replace(
            start, solver=solver, action=action, accept_only_if_lower=accepts, **changes
        )

    def texts(self, request: FrameRequest) -> dict[str, str]:
        """What the form's fields hold."""
        found = {}
        for field in self.fields:
            value = getattr(request, field.name)
            found[field.name] = "" if value is None else f"{value:.10g}"
        return found


_TOLERANCE = "stop when the energy falls by no more than"
_SETTLED = "stop when no number changes by more than"


def numbers_of(text: str, width: int, num_values: int) -> Sequence[float]:
    """`width` numbers of a text, between spaces or commas; ids where there are num_values of them.

    Raises UserError for anything else.
    """
    words = re.split(r"[\s,;]+", text.strip())
    values = []
    for word in words:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        values.append(value)
    kind = f"ids from 0 to {num_values - 1}" if num_values else "numbers"
    is_id = all(v == int(v) and 0 <= v < num_values for v in values if math.isfinite(v))
    finite = all(map(math.isfinite, values))
    if len(values) != width or not finite or (num_values and not is_id):
        raise UserError(f"the action is {shown(text, 60)}: give {width} {kind}, as in the dataset")
    return values
