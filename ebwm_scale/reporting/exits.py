"""The learned distribution over exits of an evaluation in words."""

from __future__ import annotations

from typing import Any


def exit_sentences(result: dict[str, Any]) -> list[str]:
    """One, of a model that learned it (refinement/exits.py); none of others."""
    exits = result.get("exits")
    if exits is None:
        return []
    shares = ", ".join(f"{probability:.0%}" for probability in exits["probabilities"])
    sentence = (
        f"The learned exit is expected after {exits['expected_step']:.2f} steps; "
        f"probabilities of steps 1 to {len(exits['probabilities'])}: {shares}."
    )
    return [sentence]
