"""Scaling laws from runs: loss = a x^-b per form of model, with intervals, the point where two
forms cross, and losses at equal FLOPs.

    study = collect("runs/scaling_text", axis="size")
        one row per run: labels, parameters, FLOPs, losses
    compare(study["runs"], x="parameters")
        exponents, their difference to the reference form, crossover

Intervals are 95 % percentile bootstraps over seeds: at each x, seeds are drawn with replacement,
the same ones for every form, because runs of one seed share their data order. Three seeds are few:
such an interval says how much seeds matter, not how far a straight line in log-log is wrong (see
`residual`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.load import load_config
from ebwm_scale.config.resolved import context_length
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.renamed_keys import with_new_names
from ebwm_scale.core.rows import Rows
from ebwm_scale.planning.flops import model_flops, step_flops

RESAMPLES = 2000
QUANTITIES = {  # x of a fit: what it is, and for which axes of a study it varies
    "parameters": ("parameters without embeddings", ("size", "width", "depth")),
    "flops": ("FLOPs of the whole training", ("size", "width", "depth", "data", "batch")),
    "tokens": ("observed positions seen", ("data",)),
    "tokens_per_step": ("observed positions per step", ("batch",)),
    "num_layers": ("layers", ("depth",)),
    "width": ("width", ("width",)),
}
NOT_COUNTED = ("token_embedding", "state_map", "output", "frame_projection", "step_size")


def collect(folder: Path, axis: str) -> dict[str, Any]:
    """Rows of a sweep's finished runs.

    Raises UserError for a folder without a sweep, and for an axis that it does not have.
    """
    try:
        sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: no sweep of python -m ebwm_scale.launch: {error}") from None
    needed = {axis, "form", "seed"}
    if not sweep["labels"] or not needed <= set(sweep["labels"][0]):
        raise UserError(
            f"{folder}: its axes are "
            f"{', '.join(sweep['labels'][0]) if sweep['labels'] else 'none'}; a study needs "
            f"{', '.join(sorted(needed))}"
        )
    rows, missing = [], []
    for name, labels in zip(sweep["runs"], sweep["labels"]):
        row = read_run(folder / name)
        if row is None:
            missing.append(name)
        else:
            rows.append(
                {"form": labels["form"], "point": labels[axis], "seed": labels["seed"], **row}
            )
    if not rows:
        raise UserError(
            f"{folder}: none of its {len(missing)} runs has finished; look at them with python -m "
            f"ebwm_scale.launch --status {folder}"
        )
    return {"axis": axis, "missing": missing, "runs": rows}


def read_run(folder: Path) -> dict[str, Any] | None:
    """What a finished run says about scaling; None if it has not finished."""
    if not (folder / "summary.json").exists():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = load_config(folder / "config.yaml")
    validation, step_times = [], []
    for row in Rows(folder / "metrics.jsonl"):
        if row.get("split") == "validation":
            validation.append(row)
        elif isinstance(row.get("step_time_s"), float):
            step_times.append(row["step_time_s"])
    last = with_new_names(validation[-1])
    flops = model_flops(step_flops(config, samples=config.train.global_batch_size))
    tokens = config.train.global_batch_size * context_length(config)
    # In full batches: steps of a ramp count for as much of one as they hold.
    samples = BatchRamp.of(config.train).samples_before(last["step"])
    full_steps = samples / config.train.global_batch_size
    parts = summary["parameters"]
    return {
        "parameters": parts["total"] - sum(parts.get(part, 0) for part in NOT_COUNTED),
        "all_parameters": parts["total"],
        "num_layers": config.model.num_layers,
        "width": config.model.width,
        "tokens_per_step": tokens,
        "tokens": samples * context_length(config),
        "flops_per_step": flops,
        "flops": flops * full_steps,
        "learning_rate": config.optimizer.learning_rate,
        "loss": last["loss"],
        "loss_per_step": last.get("loss_per_step"),
        "initial_loss": last.get("initial_loss"),
        "persistence_loss": last.get("persistence_loss"),
        "curve": [[row["step"], row["loss"]] for row in validation],
        "step_time_s": float(np.median(step_times)) if step_times else None,
    }


def table_of(rows: Sequence[dict[str, Any]], x: str) -> dict[str, dict[float, dict[str, float]]]:
    """{form: {x: {seed: loss}}}."""
    table: dict[str, dict[float, dict[str, float]]] = {}
    for row in rows:
        table.setdefault(row["form"], {}).setdefault(float(row[x]), {})[str(row["seed"])] = row[
            "loss"
        ]
    return table


def compare(
    rows: Sequence[dict[str, Any]], x: str, *, reference: str = "transformer++"
) -> dict[str, Any]:
    """Power laws of every form, and each against the reference.

    Returns {"x", "reference", "forms": {form: {"points", "factor", "exponent", "residual"}},
    "against_reference": {form: {"exponent_difference", "relative_rate",
    "loss_difference_at_largest", "crossover"}}}. relative_rate: by how much faster the loss falls,
    (b - b_ref) / b_ref. crossover: where the fits meet, with the share of resamples in which the
    form is behind at the largest x and gains on the reference; null where there is none.
    """
    table = table_of(rows, x)
    if reference not in table:
        raise UserError(f"the study has no form {reference}: it has {', '.join(table)}")
    for form, points in table.items():
        if len(points) < 3:
            raise UserError(f"{form} has {len(points)} values of {x}: a power law needs 3 or more")
    fits = {
        form: _fit(
            np.array(sorted(points)),
            np.array([[np.mean(list(points[at].values())) for at in sorted(points)]]),
        )[0]
        for form, points in table.items()
    }
    resampled = {
        form: _fit(np.array(sorted(points)), _resampled_means(points))
        for form, points in table.items()
    }
    result: dict[str, Any] = {
        "x": x,
        "what": QUANTITIES[x][0],
        "reference": reference,
        "forms": {},
        "against_reference": {},
    }
    for form, points in table.items():
        log_a, b = fits[form]
        places = sorted(points)
        result["forms"][form] = {
            "points": [
                {
                    "x": at,
                    "losses": sorted(points[at].values()),
                    "mean": float(np.mean(list(points[at].values()))),
                }
                for at in places
            ],
            "factor": float(np.exp(log_a)),
            "exponent": _interval(resampled[form][:, 1], b),
            "residual": float(
                max(
                    abs(np.log(np.mean(list(points[at].values()))) - (log_a - b * np.log(at)))
                    for at in places
                )
            ),
        }
    base, base_draws = fits[reference], resampled[reference]
    end = max(table[reference])
    for form in table:
        if form == reference:
            continue
        fit, drawn = fits[form], resampled[form]
        rate = drawn[:, 1] / base_draws[:, 1] - 1
        largest = max(table[form]) if x == "flops" else end
        behind = _power_law(drawn, largest) - _power_law(base_draws, largest)
        result["against_reference"][form] = {
            "exponent_difference": _interval(drawn[:, 1] - base_draws[:, 1], fit[1] - base[1]),
            "relative_rate": _interval(rate, fit[1] / base[1] - 1),
            "loss_difference_at_largest": _interval(
                behind, float(_power_law(fit, largest) - _power_law(base, largest))
            ),
            "crossover": _crossover(drawn, base_draws, behind),
        }
    return result


def _power_law(fit: np.ndarray, place: float) -> np.ndarray:
    """a x^-b at one x, of every row (ln a, b) of `fit`."""
    return np.exp(fit[..., 0] - fit[..., 1] * np.log(place))


def _resampled_means(points: dict[float, dict[str, float]]) -> np.ndarray:
    """(RESAMPLES, number of x): means over seeds drawn with replacement, the same seeds in every
    form with as many.
    """
    means = []
    for index, at in enumerate(sorted(points)):
        losses = np.array([points[at][seed] for seed in sorted(points[at])])
        picks = np.random.Generator(np.random.Philox(index)).integers(
            0, len(losses), (RESAMPLES, len(losses))
        )
        means.append(losses[picks].mean(1))
    return np.stack(means, 1)


def _fit(places: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(n, 2) of (log a, b) of loss = a x^-b, by least squares on logarithms, for each row of losses
    (n, number of x).
    """
    x, y = np.log(places), np.log(losses)
    slope = (y - y.mean(1, keepdims=True)) @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return np.stack([y.mean(1) - slope * x.mean(), -slope], 1)


def _interval(draws: np.ndarray, value: float) -> dict[str, float]:
    return {
        "mean": float(value),
        "low": float(np.quantile(draws, 0.025)),
        "high": float(np.quantile(draws, 0.975)),
    }


def _crossover(drawn: np.ndarray, base: np.ndarray, behind: np.ndarray) -> dict[str, float] | None:
    gains = (drawn[:, 1] > base[:, 1]) & (behind > 0)
    if not gains.any():
        return None
    log_x = (drawn[gains, 0] - base[gains, 0]) / (drawn[gains, 1] - base[gains, 1])
    low, middle, high = np.exp(np.quantile(log_x, [0.025, 0.5, 0.975]).clip(None, 700))
    return {
        "share_of_resamples": float(gains.mean()),
        "median": float(middle),
        "low": float(low),
        "high": float(high),
    }


def iso_flop(
    rows: Sequence[dict[str, Any]], *, reference: str = "transformer++", budgets: int = 6
) -> dict[str, Any]:
    """The lowest validation loss that each form reached within a budget of FLOPs, over its sizes
    and along its curves; per seed, with the difference to the reference.

    Curves are those of runs whose learning rate ends with the run: at less than a run's own budget
    they are a bound from above.
    """
    best: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        best.setdefault(row["form"], {}).setdefault(str(row["seed"]), []).extend(
            (step * row["flops_per_step"], loss) for step, loss in row["curve"]
        )
    low = max(min(flops for flops, _ in seeds[seed]) for seeds in best.values() for seed in seeds)
    high = min(max(flops for flops, _ in seeds[seed]) for seeds in best.values() for seed in seeds)
    if low >= high:
        return {"budgets": [], "forms": {}}
    places = np.exp(np.linspace(np.log(low), np.log(high), budgets))
    reached = {
        form: {
            seed: [
                min((loss for flops, loss in points if flops <= place * (1 + 1e-9)), default=np.nan)
                for place in places
            ]
            for seed, points in seeds.items()
        }
        for form, seeds in best.items()
    }
    result: dict[str, Any] = {"budgets": places.tolist(), "forms": {}}
    for form, seeds in reached.items():
        values = np.array(list(seeds.values()))
        entry = {
            "mean": values.mean(0).tolist(),
            "lowest": values.min(0).tolist(),
            "highest": values.max(0).tolist(),
        }
        if form != reference:
            shared = [seed for seed in seeds if seed in reached[reference]]
            difference = np.array(
                [np.subtract(seeds[seed], reached[reference][seed]) for seed in shared]
            )
            entry["difference"] = {
                "mean": difference.mean(0).tolist(),
                "lowest": difference.min(0).tolist(),
                "highest": difference.max(0).tolist(),
            }
        result["forms"][form] = entry
    return result
