"""Who acts while an environment is recorded.

    random                     an action drawn anew at each step
    sticky                     the action before again, with the probability of --stickiness
    scripted:FILE.py:NAME      NAME(observation, step, generator, env) of a file of the user's

A function of a file gets the observation, the number of the step, a numpy generator that is seeded
for the episode, and the environment itself, and returns an action of its space. Draw from the
generator alone, so that the same arguments give the same bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.plain_text import shorten

PLAIN = ("random", "sticky")
_SCRIPTED = "scripted:"
Act = Callable[[Any, int, np.random.Generator, Any], Any]


@dataclass(frozen=True)
class Policy:
    """name: as it was typed. act: (observation, step, generator, env) -> action. identity: what
    decides its actions, for the hash of a recording.
    """

    name: str
    act: Act
    identity: str
    stickiness: float = 0.0

    def action(self, observation: Any, step: int, generator: np.random.Generator, env: Any) -> Any:
        """The action of a step; DataError if a scripted one fails or leaves its space."""
        try:
            action = self.act(observation, step, generator, env)
        except Exception as error:  # noqa: BLE001 (a user's function raises what it likes)
            what = f"{type(error).__name__}: {shorten(error, 200)}"
            raise DataError(f"step {step}: the policy {self.name} fails: {what}") from None
        if env.action_space.contains(action):
            return action
        fitting = _as_space_likes(action, env.action_space)
        if fitting is None:
            raise DataError(
                f"step {step}: the policy {self.name} gives {shorten(repr(action), 100)}, which is "
                f"no action of {shorten(env.action_space, 100)}"
            )
        return fitting


def _as_space_likes(action: Any, space: Any) -> Any:
    """A list, or floats of another precision, as an array of the space; None if it is none."""
    if getattr(space, "dtype", None) is None or space.shape is None:
        return None
    try:
        array = np.asarray(action, dtype=space.dtype).reshape(space.shape)
    except (TypeError, ValueError):
        return None
    same = np.array_equal(np.asarray(action, dtype=np.float64).reshape(space.shape), array)
    close = same or (np.issubdtype(space.dtype, np.floating) and np.isfinite(array).all())
    value: Any = array if space.shape else array.item()
    return value if close and space.contains(value) else None


def make_policy(text: str, *, stickiness: float) -> Policy:
    """The policy that a text names; DataError for what is none, or a file that cannot be used."""
    if not 0 <= stickiness < 1:
        raise DataError(f"stickiness is {stickiness}: must be from 0 to below 1")
    if text == "random":
        return Policy(text, _random, text)
    if text == "sticky":
        return Policy(text, _random, f"sticky {stickiness}", stickiness)
    path, separator, function = text.removeprefix(_SCRIPTED).rpartition(":")
    if not text.startswith(_SCRIPTED) or not separator:
        raise DataError(
            f"policy {text}: must be {', '.join(PLAIN)} or scripted:FILE.py:FUNCTION, for example "
            "scripted:policies.py:act"
        )
    act = function_of_file(Path(path), function, "scripted:FILE.py:FUNCTION names a policy's file")
    return Policy(text, act, f"{function} {file_sha256(Path(path))}")


def _random(observation: Any, step: int, generator: np.random.Generator, env: Any) -> Any:
    return env.action_space.sample()


def function_of_file(path: Path, name: str, usage: str) -> Callable:
    """A function of a user's Python file; DataError for what cannot be had.

    usage: what the option takes, for messages.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; {usage}")
    specification = importlib.util.spec_from_file_location("ebwm_function_of_file", path)
    if specification is None or specification.loader is None:
        raise DataError(f"{path}: is no Python file; {usage}")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 (as above)
        what = f"{type(error).__name__}: {shorten(error, 200)}"
        raise DataError(f"{path}: cannot be imported: {what}") from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        there = ", ".join(functions) or "none"
        raise DataError(f"{path}: has no function {name}; it has {there}")
    return function
