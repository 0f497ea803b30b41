"""The rows of metrics.jsonl, thinned while they are read: what a report shows of a run of any
length.

    first reading       the step and the split of every line (9 bytes each): which lines count,
                        and where
    second reading      training rows into at most POINTS bins of neighbouring steps, validation
                        rows chosen

A resumed run logs some steps again, and a file may hold its rows in any order: of each step the
last row counts. So nothing of a row is kept but sums, extremes and, for medians, every n-th value.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ebwm_scale.core.plain_text import cut
from ebwm_scale.core.renamed_keys import with_new_names
from ebwm_scale.core.rows import Rows

POINTS = 300  # bins per curve: what a screen can show
MAX_STEPS = 256  # refinement steps of a row that are read
MAX_VALIDATION = 5_000  # validation rows that are kept
MAX_NAMED = 50  # further evaluations of a row
MAX_SAMPLED = 20_000  # values behind a median
NUMBERS = (
    "grad_norm",
    "learning_rate",
    "step_size",
    "step_time_s",
    "tokens_per_s",
    "frames_per_s",
    "patches_per_s",
    "model_tflops",
    "mfu",
    "peak_memory_gib",
    "tokens_seen",
    "frames_seen",
    "patches_seen",
)
VALIDATION = (  # what is kept of a validation row, beside its step and losses
    "initial_loss",
    "perplexity",
    "unigram_entropy",
    "persistence_loss",
    "linear_extrapolation_loss",
    "num_tokens",
    "num_frames",
    "num_patches",
)
VALIDATION_LISTS = ("alpha_curvature", "share_overshoot")  # with a number per refinement step
MAX_PARTS = 300  # layers and kinds of parameter whose norms are read of a row
NORMS = ("gradient", "weight", "update")
LAYER = re.compile(r"layer_(\d{1,4})")
_PART = re.compile(rf"{LAYER.pattern}|[a-z_]{{1,24}}")
_TRAINING, _VALIDATION = 1, 2


def number(value: Any) -> float:
    """`value` as a float; NaN for what is no finite number (absent, null, text, infinite, absurdly
    large).
    """
    if type(value) is not float:  # the common case first: a long run has millions of values
        if not isinstance(value, (int, str)):
            return math.nan
        if isinstance(value, str) and len(value) > 40:
            return math.nan
        try:
            value = float(value)
        except (ValueError, OverflowError):
            return math.nan
    # larger ones overflow in averages and axis limits
    return value if -1e30 < value < 1e30 else math.nan


def values_of(row: dict, key: str) -> list[float]:
    """A logged list as floats; a single number counts as a list of one, absent and null as none."""
    value = row.get(key)
    if isinstance(value, list):
        return [number(item) for item in value[:MAX_STEPS]]
    if value is None:
        return []
    return [number(value)]


def losses_of(row: dict) -> list[float]:
    """The loss after each refinement step; a single one where the row has no list."""
    return values_of(row, "loss_per_step") or values_of(row, "loss")


def norms_of(row: dict) -> dict[tuple[str, str], float]:
    """(layer or kind of parameter, gradient or weight or update) -> norm."""
    norms = row.get("norms")
    found = {}
    for part, values in list(norms.items())[:MAX_PARTS] if isinstance(norms, dict) else ():
        if isinstance(values, dict) and _PART.fullmatch(part):
            found |= {(part, kind): number(values[kind]) for kind in NORMS if kind in values}
    return found


def final_loss(row: dict) -> float:
    """The loss after the last refinement step."""
    if row.get("loss") is not None:
        return number(row["loss"])
    losses = losses_of(row)
    return losses[-1] if losses else math.nan


def is_broken(row: dict) -> bool:
    """Whether a loss of the row is missing or not finite."""
    losses = losses_of(row)
    return not losses or any(v != v for v in losses) or final_loss(row) != final_loss(row)


def named_results(row: dict) -> dict[str, str]:
    """Further evaluations of a validation row: path (sets/NAME, tasks/NAME) -> its figures."""
    found = {}
    for kind in ("sets", "questions", "tasks"):
        named = row.get(kind)
        for name, values in list(named.items())[:MAX_NAMED] if isinstance(named, dict) else ():
            figures = values.items() if isinstance(values, dict) else ()
            words = [
                f"{key} {number(value):.4g}"
                for key, value in list(figures)[:MAX_NAMED]
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            ]
            found[cut(f"{kind}/{name}", 60)] = cut(", ".join(words), 120)
    return found


class Curve:
    """One logged quantity over the training: its rows in bins of neighbouring steps.

    x, mean, low, high: (n,) float64, n at most POINTS, only bins that a row with this quantity
    falls into; mean, low and high are NaN where none of them is finite. first, last: finite values,
    or NaN.
    """

    def __init__(self, num_bins: int, stride: int):
        self._rows, self._steps = [0] * num_bins, [0] * num_bins
        self._count, self._sum = [0] * num_bins, [0.0] * num_bins
        self._low, self._high = [math.inf] * num_bins, [-math.inf] * num_bins
        self._stride, self._sample = stride, array("d")
        self.num_rows, self.num_finite = 0, 0
        self._at = {}  # of the finite values with the lowest and the highest rank: (rank, value)

    def add(self, place: int, rank: int, step: int, value: float) -> None:
        """place: the bin; rank: where the row stands among all, by step."""
        self.num_rows += 1
        self._rows[place] += 1
        self._steps[place] += step
        if value != value:
            return
        self.num_finite += 1
        self._count[place] += 1
        self._sum[place] += value
        if value < self._low[place]:
            self._low[place] = value
        if value > self._high[place]:
            self._high[place] = value
        if rank % self._stride == 0:
            self._sample.append(value)
        if not self._at or rank < self._at["first"][0]:
            self._at.setdefault("last", (rank, value))
            self._at["first"] = (rank, value)
        if rank > self._at["last"][0]:
            self._at["last"] = (rank, value)

    @property
    def first(self) -> float:
        return self._at["first"][1] if self._at else math.nan

    @property
    def last(self) -> float:
        return self._at["last"][1] if self._at else math.nan

    @property
    def median(self) -> float:
        """Of the finite values, of every n-th one in a long run; NaN without any."""
        if self._sample:
            return float(np.median(np.frombuffer(self._sample)))
        return float(np.nanmedian(self.mean)) if self.num_finite else math.nan

    @property
    def highest(self) -> float:
        return max(self._high) if self.num_finite else math.nan

    @property
    def x(self) -> np.ndarray:
        rows = np.array(self._rows)
        return (np.array(self._steps, float) / np.maximum(rows, 1))[rows > 0]

    @property
    def mean(self) -> np.ndarray:
        return self._of_bins(self._sum, divide=True)

    @property
    def low(self) -> np.ndarray:
        return self._of_bins(self._low)

    @property
    def high(self) -> np.ndarray:
        return self._of_bins(self._high)

    def mean_at_end(self, share: float) -> float:
        """Mean of the finite values in the last share of the bins; NaN without any."""
        first = len(self._rows) - max(1, round(len(self._rows) * share))
        count = sum(self._count[first:])
        return sum(self._sum[first:]) / count if count else math.nan

    def share_above(self, limit: float) -> float:
        """Share of the finite values above a limit, of every n-th one in a long run."""
        sample = np.frombuffer(self._sample) if self._sample else self.mean
        return float(np.mean(sample[np.isfinite(sample)] > limit))

    def _of_bins(self, values: list[float], *, divide: bool = False) -> np.ndarray:
        rows, count = np.array(self._rows), np.array(self._count)
        result = np.array(values, float)
        if divide:
            result = result / np.maximum(count, 1)
        return np.where(count > 0, result, np.nan)[rows > 0]


@dataclass
class Training:
    """The training rows. curves: by the name of a number, or (name of a list, index in it). norms:
    by (layer or kind of parameter, kind of norm), of the rows that have them.
    """

    num_rows: int = 0
    last_step: int = 0
    num_broken: int = 0  # rows whose loss is missing or not finite
    curves: dict[str | tuple[str, int], Curve] = field(default_factory=dict)
    norms: dict[tuple[str, str], Curve] = field(default_factory=dict)

    @property
    def thinned(self) -> bool:
        return self.num_rows > POINTS

    def of_list(self, name: str) -> list[Curve]:
        """The curves of a list, in its order."""
        found = sorted(key[1] for key in self.curves if isinstance(key, tuple) and key[0] == name)
        return [self.curves[name, index] for index in found]

    def median(self, name: str) -> float:
        return self.curves[name].median if name in self.curves else math.nan


@dataclass
class Validation:
    """The validation rows, the chosen ones whole.

    Steps rise; the first and the last row are among them.
    """

    rows: list[dict] = field(default_factory=list)
    num_rows: int = 0
    num_broken: int = 0
    best: dict | None = None  # the row with the lowest finite loss, of all


def read_metrics(rows: Rows) -> tuple[Training, Validation, int]:
    """(training, validation, number of unreadable or unusable lines); UserError if the file cannot
    be read.
    """
    kinds, steps = bytearray(), array("q")
    unusable = 0
    for row in rows:
        kind = _kind_of(row)
        unusable += kind == 0
        kinds.append(kind)
        steps.append(row["step"] if kind else 0)
    unreadable = rows.unreadable + unusable
    split, step_of = np.frombuffer(kinds, np.uint8), np.frombuffer(steps, np.int64)
    ranks = np.full(len(split), -1, np.int64)
    counts = {}
    for kind in (_TRAINING, _VALIDATION):
        lines = _counting_lines(np.flatnonzero(split == kind), step_of)
        ranks[lines] = np.arange(len(lines))
        counts[kind] = len(lines)
    training = _Gathering(counts[_TRAINING])
    validation = _Choosing(counts[_VALIDATION])
    for line, row in enumerate(rows):
        if line >= len(ranks):  # written while we read
            break
        rank = int(ranks[line])
        if rank < 0:
            continue
        if split[line] == _TRAINING:
            training.add(rank, row)
        else:
            validation.add(rank, row)
    return training.result, validation.result(), unreadable


def _kind_of(row: dict) -> int:
    step, split = row.get("step"), row.get("split", "train")
    if not isinstance(step, int) or isinstance(step, bool) or not -(2**62) < step < 2**62:
        return 0
    if split == "train":
        return _TRAINING
    return _VALIDATION if split == "validation" else 0


def _counting_lines(lines: np.ndarray, step_of: np.ndarray) -> np.ndarray:
    """The lines that count, in the order of their steps: the last of each step."""
    steps = step_of[lines]
    if len(steps) < 2 or (np.diff(steps) > 0).all():
        return lines
    order = np.argsort(steps, kind="stable")
    is_last = np.append(np.diff(steps[order]) > 0, True)
    return lines[order[is_last]]


class _Gathering:
    """Training rows into bins."""

    def __init__(self, num_rows: int):
        self.num_rows, self.num_bins = num_rows, min(num_rows, POINTS)
        stride = max(1, math.ceil(num_rows / MAX_SAMPLED))
        self.curves = defaultdict(lambda: Curve(self.num_bins, stride))
        self.norms = defaultdict(lambda: Curve(self.num_bins, stride))
        self.result = Training(num_rows=num_rows, curves=self.curves, norms=self.norms)

    def add(self, rank: int, row: dict) -> None:
        place = rank * self.num_bins // self.num_rows
        step = row["step"]
        result = self.result
        for index, value in enumerate(losses_of(row)):
            self.curves["loss_per_step", index].add(place, rank, step, value)
        for index, value in enumerate(values_of(row, "energy_per_step")):
            self.curves["energy_per_step", index].add(place, rank, step, value)
        for name in NUMBERS:
            if name in row:
                self.curves[name].add(place, rank, step, number(row[name]))
        for key, value in norms_of(row).items():
            if key in self.norms or len(self.norms) < MAX_PARTS * len(NORMS):
                self.norms[key].add(place, rank, step, value)
        result.num_broken += is_broken(row)
        if rank == self.num_rows - 1:
            result.last_step = step


class _Choosing:
    """Validation rows: evenly spaced ones are kept, with the numbers that a page shows."""

    def __init__(self, num_rows: int):
        self.num_rows, self.kept = num_rows, {}
        most = min(num_rows, MAX_VALIDATION)
        self.chosen = set(np.linspace(0, num_rows - 1, most).round().astype(int).tolist())
        self.num_broken, self.best = 0, None

    def add(self, rank: int, row: dict) -> None:
        row = with_new_names(row)
        slim = {"step": row["step"], "loss": final_loss(row), "loss_per_step": losses_of(row)}
        slim |= {key: number(row[key]) for key in VALIDATION if row.get(key) is not None}
        slim |= {key: values_of(row, key) for key in VALIDATION_LISTS if row.get(key) is not None}
        named = named_results(row)
        if named:
            slim["named"] = named
        self.num_broken += is_broken(row)
        if rank in self.chosen:
            self.kept[rank] = slim
        loss = slim["loss"]
        if loss == loss and (self.best is None or loss < self.best["loss"]):
            self.best = slim

    def result(self) -> Validation:
        rows = [self.kept[rank] for rank in sorted(self.kept)]
        return Validation(rows, self.num_rows, self.num_broken, self.best)


def thin_by_stride(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every n-th point and the last one: validation points are exact, so they are chosen and not
    averaged.
    """
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    return x[keep], y[keep]


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a number of validation rows, NaN where it is missing."""
    steps = np.array([row["step"] for row in rows], float)
    return steps, np.array([number(row.get(key)) for row in rows], float)


def of_refinement_step(rows: list[dict], index: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, losses after a refinement step) of the validation rows that reach it."""
    reached = [row for row in rows if len(row["loss_per_step"]) > index]
    steps = np.array([row["step"] for row in reached], float)
    return steps, np.array([row["loss_per_step"][index] for row in reached], float)
