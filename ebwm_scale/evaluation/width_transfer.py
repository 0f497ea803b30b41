"""What a sweep of learning rates over widths says (tools/study_width.py, docs/width.md).

    rows        a line of JSON per run: kind, parametrization, width, rate, seed, loss
    best rate   of the rates that were tried, that of the lowest loss
    vertex      where a parabola through the best rate and its two neighbours, over the logarithm of
                the rate, is lowest
    transfer    what it costs to take the base's best rate to another width, in nats per token

At the base width both parametrizations are one model, whose rows say "standard".
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ebwm_scale.core.errors import UserError

BASE = 32  # the width whose rate is taken to others
KINDS = {"baseline": "Transformer++", "energy": "energy model"}
PARAMETRIZATIONS = ("standard", "width_scaled")

Curve = dict[float, float]
"""rate -> loss."""


def read_rows(path: Path) -> list[dict]:
    """The runs of a result file, whose first line says what it is; a loss that was not finite is
    infinite. Raises UserError.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[1:]]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no result of tools/study_width.py: {error}") from None
    for row in rows:
        if row["loss"] is None:
            row["loss"] = math.inf
    return rows


def curve(rows: list[dict], kind: str, parametrization: str, width: int, seed: int) -> Curve:
    """Losses by rate of one seed."""
    if width == BASE:
        parametrization = "standard"
    wanted = {"kind": kind, "parametrization": parametrization, "width": width, "seed": seed}
    return {row["rate"]: row["loss"] for row in rows if wanted.items() <= row.items()}


def best_rates(rows: list[dict], seed: int | None = None) -> dict[tuple[str, str, int], float]:
    """By (kind, parametrization, width), of a seed, by default the first of the rows."""
    found = {}
    seed = rows[0]["seed"] if seed is None else seed
    for kind in KINDS:
        for parametrization in PARAMETRIZATIONS:
            for width in widths_of(rows):
                losses = curve(rows, kind, parametrization, width, seed)
                if losses:
                    found[kind, parametrization, width] = min(losses, key=losses.__getitem__)
    return found


def widths_of(rows: list[dict]) -> list[int]:
    return sorted({row["width"] for row in rows})


def vertex(losses: Curve) -> float | None:
    """See above; None where the best rate is the lowest or highest, or a neighbour diverged."""
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if place in (0, len(rates) - 1):
        return None
    xs = [math.log(rate) for rate in rates[place - 1 : place + 2]]
    low, mid, high = (losses[rate] for rate in rates[place - 1 : place + 2])
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    left, right = (mid - low) / (xs[1] - xs[0]), (high - mid) / (xs[2] - xs[1])
    curvature = (right - left) / (xs[2] - xs[0])
    slope = left + curvature * (xs[1] - xs[0])  # of the parabola, in the middle
    return math.exp(xs[1] - slope / (2 * curvature))


def cost_of_transfer(
    rows: list[dict], kind: str, parametrization: str, width: int, seed: int
) -> float:
    """Loss at a width with the base's best rate, above that with its own best rate, in nats."""
    losses = curve(rows, kind, parametrization, width, seed)
    base = curve(rows, kind, parametrization, BASE, seed)
    return losses[min(base, key=base.__getitem__)] - min(losses.values())


def loss_table(rows: list[dict], kind: str, seed: int) -> list[str]:
    """Lines of Markdown: a row per parametrization and width, a column per rate; the best bold."""
    rates = sorted({row["rate"] for row in rows if row["kind"] == kind})
    lines = [f"| {KINDS[kind]} | width | {' | '.join(f'{rate:g}' for rate in rates)} | vertex |"]
    lines.append("|---" * (len(rates) + 3) + "|")
    for parametrization in PARAMETRIZATIONS:
        for width in widths_of(rows):
            if width == BASE and parametrization != "standard":
                continue
            losses = curve(rows, kind, parametrization, width, seed)
            if not losses:
                continue
            name = "both" if width == BASE else f"`{parametrization}`"
            best = min(losses.values())
            cells = [_cell(losses.get(rate), best) for rate in rates]
            lowest = vertex(losses)
            cells.append("at the edge" if lowest is None else f"{lowest:.4f}")
            lines.append(f"| {name} | {width} | {' | '.join(cells)} |")
    return lines


def _cell(loss: float | None, best: float) -> str:
    if loss is None:
        return ""
    if not math.isfinite(loss):
        return "diverged"
    return f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"


def transfer_table(rows: list[dict], seed: int) -> list[str]:
    """Lines of Markdown: what the base's best rate costs at the other widths."""
    widths = [width for width in widths_of(rows) if width != BASE]
    names = " | ".join(f"width {width}" for width in widths)
    lines = [f"| nats above the best | | {names} |", "|---" * (len(widths) + 2) + "|"]
    for kind, name in KINDS.items():
        for parametrization in PARAMETRIZATIONS:
            cells = []
            for width in widths:
                cost = cost_of_transfer(rows, kind, parametrization, width, seed)
                cells.append(f"{cost:.3f}" if math.isfinite(cost) else "diverged")
            lines.append(f"| {name} | `{parametrization}` | {' | '.join(cells)} |")
    return lines


def best_loss_table(rows: list[dict], seed: int) -> list[str]:
    """Lines of Markdown: the best loss of `width_scaled` less that of `standard`."""
    widths = [width for width in widths_of(rows) if width != BASE]
    names = " | ".join(f"width {width}" for width in widths)
    lines = [f"| best loss, `width_scaled` less `standard` | {names} |"]
    lines.append("|---" * (len(widths) + 1) + "|")
    for kind, name in KINDS.items():
        cells = []
        for width in widths:
            standard, scaled = (
                min(curve(rows, kind, parametrization, width, seed).values())
                for parametrization in PARAMETRIZATIONS
            )
            cells.append(f"{scaled - standard:+.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
