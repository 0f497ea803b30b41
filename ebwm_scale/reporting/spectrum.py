"""The step's eigenvalues of an evaluation in words."""

from __future__ import annotations

from typing import Any

from ebwm_scale.reporting.page import with_interval


def spectrum_sentences(result: dict[str, Any]) -> list[str]:
    """One for each number of steps that was measured; none of results that are older."""
    lines = []
    for row in result.get("step_spectrum", [])[:2]:
        grows = row["share_that_grows"]["mean"]
        lines.append(
            f"After {row['num_steps']} steps the strongest eigenvalue of a further step is "
            f"{with_interval(row['step_eigenvalue'])}, that of alpha times the energy's curvature "
            f"{with_interval(row['alpha_curvature'])}; small changes grow in {grows:.0%} of the "
            "predictions (of groups: of the groups)."
        )
    return lines
