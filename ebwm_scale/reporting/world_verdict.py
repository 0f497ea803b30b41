"""Whether a model imagines its world, judged from imagination.json and plan_actions.json: claims
with the intervals that decide them.

A claim is yes or no where its 95 % interval lies on one side of the line, and unknown where it
holds the line.
"""

from __future__ import annotations

from typing import Any

from ebwm_scale.reporting.numbers import by_sign, show, show_change
from ebwm_scale.reporting.page import with_interval
from ebwm_scale.reporting.verdict import Check

Interval = dict[str, float]
CHANCE = 0.5  # AUROC of a judge that cannot tell
FARTHEST = 8  # steps ahead that the answer asks for


def judge_world(
    imagination: dict[str, Any], planning: dict[str, Any] | None = None
) -> tuple[str, str, list[Check]]:
    """(answer to "does it imagine its world?", a sentence with the numbers, the checks)."""
    errors = imagination["errors"]
    beats = _at_every_horizon(errors, "persistence", "Imagined frames beat copying the last one")
    checks = [beats]
    asked = [beats]
    if "gain_over_shuffled_actions" in errors[0]:
        acts = _uses_actions(errors)
        checks.append(acts)
        asked.append(acts)
    if "gain_over_against" in errors[0]:
        checks.append(_at_every_horizon(errors, "against", "They beat the other model's"))
    checks += _judges(imagination["judge"])
    if "steps" in imagination:
        checks += _steps_pay(imagination)
    if planning is not None:
        checks += _planning(planning)
    marks = {check.mark for check in asked}
    answer = "Not shown"
    if marks == {"yes"}:
        answer = "Yes"
    elif "no" in marks:
        answer = "No"
    return answer, _sentence(errors), checks


def _sentence(errors: list[dict]) -> str:
    row = [each for each in errors if each["horizon"] <= FARTHEST][-1]
    share = 1 - row["model"]["mean"] / row["persistence"]["mean"]
    steps = "step" if row["horizon"] == 1 else "steps"
    return (
        f"After {row['horizon']} imagined {steps} a frame's error is {share:.0%} below that of "
        f"the last seen frame ({show(row['model']['mean'])} against "
        f"{show(row['persistence']['mean'])})."
    )


def _at_every_horizon(errors: list[dict], other: str, claim: str) -> Check:
    rows = [row for row in errors if row["horizon"] <= FARTHEST]
    gains = [row[f"gain_over_{other}"] for row in rows]
    better = sum(gain["low"] > 0 for gain in gains)
    mark = "unknown"
    if better == len(gains):
        mark = "yes"
    elif any(gain["high"] < 0 for gain in gains):
        mark = "no"
    return Check(
        mark,
        f"{claim} at every horizon to {rows[-1]['horizon']}",
        f"{better} of {len(gains)}",
        f"error lower by, paired: {_listed(rows, other)}",
    )


def _uses_actions(errors: list[dict]) -> Check:
    """At one horizon it is enough: the first frame may not show what was done."""
    rows = [row for row in errors if row["horizon"] <= FARTHEST]
    gains = [row["gain_over_shuffled_actions"] for row in rows]
    mark = "no" if all(gain["high"] < 0 for gain in gains) else "unknown"
    if any(gain["low"] > 0 for gain in gains):
        mark = "yes"
    row = max(rows, key=lambda each: each["gain_over_shuffled_actions"]["mean"])
    share = row["gain_over_shuffled_actions"]["mean"] / row["shuffled_actions"]["mean"]
    return Check(
        mark,
        "It uses the actions: under another episode's it imagines worse",
        f"{share:.0%}",
        f"error lower by, paired: {_listed(rows, 'shuffled_actions')}",
    )


def _listed(rows: list[dict], other: str) -> str:
    return "; ".join(f"{r['horizon']}: {with_interval(r[f'gain_over_{other}'])}" for r in rows)


def _judges(judges: dict[str, Any]) -> list[Check]:
    checks = []
    names = {"another_action": "the real one under another action", "another_time": "another time"}
    for kind, name in names.items():
        if kind not in judges.get("energy", {}):
            continue
        own = judges["energy"][kind]["auroc"]
        above = {"low": own["low"] - CHANCE, "high": own["high"] - CHANCE}
        beside = judges["prediction_error"][kind]["auroc"]
        checks.append(
            Check(
                by_sign(above, "yes", "no", "unknown"),
                f"The energy tells real next frames from wrong ones: {name}",
                show(own["mean"]),
                f"AUROC {with_interval(own)}; distance from its own prediction: "
                f"{with_interval(beside)}",
            )
        )
    return checks


def _steps_pay(imagination: dict[str, Any]) -> list[Check]:
    trained = imagination["trained_steps"]
    gains = {
        row["num_steps"]: row["gain_over_previous"]
        for row in imagination["steps"]
        if "gain_over_previous" in row and row["num_steps"] <= trained
    }
    if not gains:
        return []
    paying = sum(gain["low"] > 0 for gain in gains.values())
    mark = "unknown"
    if paying == len(gains):
        mark = "yes"
    elif any(gain["high"] < 0 for gain in gains.values()):
        mark = "no"
    listed = "; ".join(f"step {n}: {with_interval(gain)}" for n, gain in gains.items())
    claim = "Each refinement step after the first lowers the error of the next frame"
    return [Check(mark, claim, f"{paying} of {len(gains)}", f"less than before: {listed}")]


def _planning(planning: dict[str, Any]) -> list[Check]:
    names = {
        "random": "random actions",
        "persistence": "planning with the last frame",
        "against": "the other model",
    }
    checks = []
    for key, name in names.items():
        gains = planning["gains"].get(key, {})
        measure = "success" if "success" in gains else "return"
        if measure not in gains:
            continue
        gain = gains[measure]
        figure = show_change(gain["mean"])
        if measure == "success":
            figure = f"{show_change(100 * gain['mean'])} points"
        own, other = (planning["actors"][who][measure] for who in ("model", key))
        checks.append(
            Check(
                by_sign(gain, "yes", "no", "unknown"),
                f"Planning with it does better than {name}",
                figure,
                f"{measure} {with_interval(own)} against {with_interval(other)}; more by, paired: "
                f"{with_interval(gain)}",
            )
        )
    return checks
