"""What a form or a command line asks an explorer: the fields of text, their limits, and errors that
name the field, its value and what is allowed.

The limits keep one request to seconds and a page to megabytes; `ebwm think` has none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebwm_scale.core.errors import UserError
from ebwm_scale.core.plain_text import shown
from ebwm_scale.data.tokenizer import check_text
from ebwm_scale.inference.generation import Sampling
from ebwm_scale.inference.thinking import ThinkingConfig

MAX_CHARACTERS = 100_000  # of a prompt


@dataclass(frozen=True)
class Field:
    """A number in the form. empty: what no text stands for; a field without one must be given."""

    name: str
    label: str
    low: float
    high: float
    is_whole: bool
    empty: str | None = None
    thinks: bool = False  # of no use to a Transformer++

    def read(self, text: str) -> float | None:
        text = text.strip()
        if not text and self.empty is not None:
            return None
        try:
            value = int(text) if self.is_whole else float(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high:
            kind = "a whole number" if self.is_whole else "a number"
            alone = f", or empty: {self.empty}" if self.empty is not None else ""
            raise UserError(
                f"{self.label} is {shown(text, 40)}: give {kind} from {self.low:g} to "
                f"{self.high:g}{alone}"
            )
        return value


FIELDS = (
    Field("max_new", "new tokens", 0, 32, True),
    Field("num_positions", "positions of the prompt", 0, 32, True),
    Field("num_steps", "steps", 1, 32, True, "as trained", True),
    Field("num_starts", "starts", 1, 8, True, thinks=True),
    Field("step_size", "step size", 1e-9, 1e9, False, "as trained", True),
    Field("noise", "Langevin noise", 0, 1e3, False, thinks=True),
    Field("tolerance", "stop when the energy falls by no more than", 0, 1e9, False, "never", True),
    Field("settled", "stop when no probability changes by more than", 0, 1, False, "never", True),
    Field("strip", "strip of steps: until none changes by more than", 0, 1, False, thinks=True),
    Field("temperature", "temperature", 0, 100, False),
    Field("top_k", "only so many of the most probable", 1, 2**31 - 1, True, "all"),
    Field("top_p", "only the fewest that hold so much probability", 1e-9, 1, False, "all"),
    Field("seed", "seed", 0, 2**31 - 1, True),
)


@dataclass(frozen=True)
class TextRequest:
    """A prompt, and how it is continued and looked at.

    num_positions: of the prompt's end. strip: the largest change of a probability that has settled,
    for the strip of steps; the thinking itself stops by tolerance and settled.
    """

    prompt: str = ""
    max_new: int = 8
    num_positions: int = 8
    num_steps: int | None = None
    num_starts: int = 1
    step_size: float | None = None
    noise: float = 0.0
    tolerance: float | None = None
    settled: float | None = None
    strip: float = 0.1
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 33
    accept_only_if_lower: bool = False

    @property
    def thinking(self) -> ThinkingConfig:
        """As `ebwm think` would be asked for it."""
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

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    def texts(self) -> dict[str, str]:
        """What the form's fields hold."""
        found = {}
        for field in FIELDS:
            value = getattr(self, field.name)
            found[field.name] = "" if value is None else f"{value:.10g}"
        return found


def read_request(fields: Mapping[str, str], start: TextRequest) -> TextRequest:
    """The request that a form's fields make; what is absent is as in `start`.

    A form leaves out a box that is not ticked, so accept_only_if_lower absent is false. Raises
    UserError for the first field that cannot be.
    """
    changes: dict[str, Any] = {}
    for field in FIELDS:
        if field.name in fields:
            changes[field.name] = field.read(fields[field.name])
    prompt = fields.get("prompt", start.prompt)
    prompt = prompt.replace("\r\n", "\n").replace("\r", "\n")  # as forms send line ends
    if len(prompt) > MAX_CHARACTERS:
        raise UserError(
            f"the prompt has {len(prompt):,} characters: give at most {MAX_CHARACTERS:,}"
        )
    check_text(prompt, "the prompt")
    accepts = "accept_only_if_lower" in fields
    return dataclasses.replace(start, prompt=prompt, accept_only_if_lower=accepts, **changes)
