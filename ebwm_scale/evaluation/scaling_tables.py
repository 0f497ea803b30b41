"""Result files of tools/scaling_study.py as tables in Markdown, for docs/scaling.md.

loss_table(study)          mean losses at each size, of every form
difference_table(study)    by how much each form's are above the reference's, paired by seed
exponent_table(study)      the power laws' exponents, and their differences
rate_table(studies)        of studies with several rates: the best one, and its neighbours' losses
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ebwm_scale.evaluation.scaling_laws import compare
from ebwm_scale.evaluation.seed_interval import seed_interval

REFERENCE = "transformer++"
Study = dict[str, Any]
Cell = tuple[str, str]  # form, point


def loss_table(study: Study) -> list[str]:
    """A row for each point: parameters of the reference, and the mean loss of each form."""
    losses = _losses(study)
    parameters = {
        run["point"]: run["parameters"] for run in study["runs"] if run["form"] == REFERENCE
    }
    forms, points = _forms(study), _points(study)
    lines = _head(["", "parameters", *map(_title, forms)])
    for point in points:
        means = [f"{statistics.fmean(losses[form, point].values()):.3f}" for form in forms]
        count = f"{parameters[point]:,}".replace(",", " ")
        lines.append(_row([point, count, *means]))
    return lines


def difference_table(study: Study) -> list[str]:
    """A row for each point: each form's loss minus the reference's, 95 % over seeds."""
    losses = _losses(study)
    others = [form for form in _forms(study) if form != REFERENCE]
    lines = _head(["", *map(_title, others)])
    for point in _points(study):
        cells = []
        for form in others:
            mine, reference = losses[form, point], losses[REFERENCE, point]
            found = seed_interval([mine[seed] - reference[seed] for seed in mine])
            cells.append("{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found))
        lines.append(_row([point, *cells]))
    return lines


def exponent_table(study: Study) -> list[str]:
    """Rows for parameters and FLOPs: exponents, and relative to the reference's in per cent."""
    forms = _forms(study)
    lines = _head(["exponent of the loss", *map(_title, forms)])
    for x, name in (("parameters", "in parameters"), ("flops", "in FLOPs of the training")):
        fit = compare(study["runs"], x)
        exponents = [fit["forms"][form]["exponent"] for form in forms]
        values = ["{mean:.4g} [{low:.4g}, {high:.4g}]".format(**found) for found in exponents]
        lines.append(_row([name, *values]))
        shares = [_relative(fit["against_reference"].get(form)) for form in forms]
        lines.append(_row(["relative", *shares]))
    return lines


def rate_table(studies: Sequence[Study]) -> list[str]:
    """A row for each point: each form's best rate, and its loss. Runs of one seed."""
    runs = [run for study in studies for run in study["runs"]]
    forms = _forms(studies[0])
    lines = _head(["", *map(_title, forms)])
    for point in _points(studies[0]):
        cells = []
        for form in forms:
            mine = [run for run in runs if (run["form"], run["point"]) == (form, point)]
            best = min(mine, key=lambda run: run["loss"])
            cells.append(f"{best['learning_rate']:g}: {best['loss']:.3f}")
        lines.append(_row([point, *cells]))
    return lines


def _losses(study: Study) -> dict[Cell, dict[str, float]]:
    """{(form, point): {seed: loss}}."""
    found: dict[Cell, dict[str, float]] = {}
    for run in study["runs"]:
        found.setdefault((run["form"], run["point"]), {})[run["seed"]] = run["loss"]
    return found


def _forms(study: Study) -> list[str]:
    return list(dict.fromkeys(run["form"] for run in study["runs"]))


def _points(study: Study) -> list[str]:
    return list(dict.fromkeys(run["point"] for run in study["runs"]))


def _relative(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    mean, low, high = (100 * found["relative_rate"][key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _title(form: str) -> str:
    return form.replace("transformer", "Transformer")


def _head(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|---" * len(titles) + "|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
