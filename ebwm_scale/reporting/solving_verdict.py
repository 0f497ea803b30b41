"""Whether thinking pays, judged from solving.json: claims with the intervals that decide them.

A claim is yes or no where its 95 % interval lies on one side of the line, and unknown where it
holds the line. That something costs nothing cannot be shown by an interval around zero: it is asked
whether it costs less than a hundredth, of the loss or of the instances.
"""

from __future__ import annotations

from typing import Any

from ebwm_scale.reporting.numbers import by_sign, show, show_change
from ebwm_scale.reporting.page import with_interval
from ebwm_scale.reporting.verdict import Check

COSTS_NOTHING = 0.01  # share of the loss
FEW_SOLVED = 0.01  # share of the instances
Interval = dict[str, float]


def judge_solving(result: dict[str, Any]) -> tuple[str, str, list[Check]] | None:
    """(answer to "does thinking pay?", a sentence with the numbers, the checks behind it); None of
    a model that takes no steps.
    """
    trained = result["trained_steps"]
    if trained is None:
        return None
    word = word_for_steps(result)
    checks = []
    answer = "Cannot say"
    sentence = f"One {word} was trained, and there is none to compare it with."
    if "gain_of_later_steps" in result:
        gain = result["gain_of_later_steps"]
        answer = _answer(gain)
        sentence = _sentence(result, gain)
        checks += [_each_step_pays(result), _more_is_solved(result, gain)]
    if "against" in result:
        checks.append(_against(result))
    if result["steps"][-1]["num_steps"] > trained:
        checks += [_goes_on(result), _goes_further(result)]
    if "settling" in result:
        checks += _settling(result)
    return answer, sentence, checks


def word_for_steps(result: dict[str, Any]) -> str:
    """A step of a looped baseline is a loop."""
    return "loop" if result["kind"] == "baseline" else "step"


def name_of_other(other: dict[str, Any]) -> str:
    """What the model of "against" is called."""
    if other["kind"] != "baseline":
        return "the other energy model"
    loops = other["trained_steps"]
    return "Transformer++" if loops is None else f"Transformer++ of {loops} loops"


def _answer(gain: dict[str, Interval]) -> str:
    loss, solved = gain["fall_of_loss"], gain["rise_of_solved"]
    if loss["low"] > 0 and solved["low"] > 0:
        return "Yes"
    return "No" if loss["high"] < 0 or solved["high"] < 0 else "Not shown"


def _sentence(result: dict[str, Any], gain: dict[str, Interval]) -> str:
    points = {point["num_steps"]: point for point in result["steps"]}
    trained = result["trained_steps"]
    word = word_for_steps(result)
    fall = show(gain["fall_of_loss"]["mean"])
    last = max(points)
    further = ""
    if last > trained:
        further = f", after {last} {points[last]['solved']['mean']:.1%}"
    return (
        f"After {trained} {word}s {points[trained]['solved']['mean']:.1%} of "
        f"{result['num_samples']:,} held-out instances are solved, after one {word} "
        f"{points[1]['solved']['mean']:.1%}{further}. With the trained {word}s the loss falls by "
        f"{fall} nats per scored token."
    )


def _each_step_pays(result: dict[str, Any]) -> Check:
    """Of the trained steps that were looked at, each against the one before it."""
    word = word_for_steps(result)
    gains = {
        point["num_steps"]: point["gain_over_previous"]["fall_of_loss"]
        for point in result["steps"]
        if "gain_over_previous" in point and point["num_steps"] <= result["trained_steps"]
    }
    paying = sum(gain["low"] > 0 for gain in gains.values())
    mark = "unknown"
    if paying == len(gains):
        mark = "yes"
    elif any(gain["high"] < 0 for gain in gains.values()):
        mark = "no"
    listed = "; ".join(f"{word} {n}: {with_interval(gain)}" for n, gain in gains.items())
    return Check(
        mark,
        f"Each trained {word} lowers the loss",
        f"{paying} of {len(gains)}",
        f"nats less than before: {listed}",
    )


def _more_is_solved(result: dict[str, Any], gain: dict[str, Interval]) -> Check:
    solved, word = gain["rise_of_solved"], word_for_steps(result)
    return Check(
        by_sign(solved, "yes", "no", "unknown"),
        f"More instances are solved after the last trained {word} than after the first",
        _points(solved["mean"]),
        f"share of instances, paired: {with_interval(solved)}",
    )


def _against(result: dict[str, Any]) -> Check:
    other = result["against"]
    solved = other["gain_over_it"]["rise_of_solved"]
    loss = other["gain_over_it"]["fall_of_loss"]
    return Check(
        by_sign(solved, "yes", "no", "unknown"),
        f"It solves more than {name_of_other(other)}",
        _points(solved["mean"]),
        f"share of instances, paired: {with_interval(solved)}; loss lower by {with_interval(loss)}",
    )


def _goes_on(result: dict[str, Any]) -> Check:
    trained, word = result["trained_steps"], word_for_steps(result)
    last = result["steps"][-1]
    (at_trained,) = [p for p in result["steps"] if p["num_steps"] == trained]
    fall = last["gain_over_trained"]["fall_of_loss"]
    return Check(
        _costs_nothing(fall, at_trained["loss"]["mean"]),
        f"More {word}s than were trained do no harm",
        show_change(-fall["mean"]) + " nats",
        f"{last['num_steps']} {word}s against {trained}, loss lower by {with_interval(fall)}; "
        "asked for: not worse by a hundredth",
    )


def _goes_further(result: dict[str, Any]) -> Check:
    trained, word = result["trained_steps"], word_for_steps(result)
    last = result["steps"][-1]
    rise = last["gain_over_trained"]["rise_of_solved"]
    return Check(
        by_sign(rise, "yes", "no", "unknown"),
        f"More {word}s than were trained solve more",
        _points(rise["mean"]),
        f"{last['num_steps']} {word}s against {trained}, share of instances, paired: "
        f"{with_interval(rise)}",
    )


def _settling(result: dict[str, Any]) -> list[Check]:
    settling, trained = result["settling"], result["trained_steps"]
    solved = settling["gain_over_trained"]["rise_of_solved"]
    mark = "unknown"
    if solved["low"] > -FEW_SOLVED:
        mark = "yes"
    elif solved["high"] < -FEW_SOLVED:
        mark = "no"
    checks = [
        Check(
            mark,
            "Stopping when the answer settles solves as many",
            f"{settling['mean_steps']['mean']:.1f} steps",
            f"{with_interval(settling['mean_steps'])} of at most {settling['max_steps']} steps; "
            f"share solved above that after {trained}: {with_interval(solved)}; asked for: not a "
            "hundredth of the instances fewer",
        )
    ]
    if "rank_correlation_of_steps_with_difficulty" in settling:
        correlation = settling["rank_correlation_of_steps_with_difficulty"]
        checks.append(
            Check(
                by_sign(correlation, "yes", "no", "unknown"),
                "Harder instances get more steps until they settle",
                show_change(correlation["mean"]),
                f"rank correlation of steps and difficulty: {with_interval(correlation)}",
            )
        )
    return checks


def _costs_nothing(fall: Interval, loss: float) -> str:
    """yes, no or unknown: whether the loss rises by less than a hundredth."""
    line = -COSTS_NOTHING * loss
    if fall["low"] > line:
        return "yes"
    return "no" if fall["high"] < line else "unknown"


def _points(share: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{show_change(100 * share)} points"
