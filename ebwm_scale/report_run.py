"""What a run folder holds, and what its numbers say: did it learn? Read leniently, judged strictly; missing is said, never guessed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable

import yaml

from .errors import UserError
from .report_plots import final_loss, losses_of, median, number, show, show_change

LEARNED_NATS = (
    1.0  # text: a model that learned context is at least this far below the unigram entropy
)
STEP_GAIN = (
    0.001  # later refinement steps count as useful when they lower the loss by this fraction
)
# Differences between two runs, besides the kind of model, that a reader of the comparison must know of.
COMPARED = (
    ("model", "num_layers"),
    ("model", "width"),
    ("data", "manifest"),
    ("data", "context_length"),
    ("optimizer", "learning_rate"),
    ("train", "global_batch_size"),
    ("train", "precision"),
    ("train", "seed"),
)


@dataclass(frozen=True)
class Run:
    """What a run folder holds; `notes` says what is missing or could not be read."""

    folder: Path
    config: dict
    training: list[dict]  # one row per step, steps rising
    validation: list[dict]
    events: list[dict] = field(default_factory=list)
    samples: dict | None = None
    summary: dict | None = None
    notes: tuple[str, ...] = ()

    def setting(self, section: str, key: str) -> Any:
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def name(self) -> str:
        return str(self.setting("logging", "run_name") or self.folder.resolve().name)

    @property
    def refines(self) -> bool:
        """Whether this is an energy model; without a configuration, the rows tell."""
        kind = self.setting("model", "kind")
        return (
            kind != "baseline"
            if kind
            else any(row.get("energy_per_step") for row in self.training)
            or any(len(losses_of(row)) > 1 for row in self.validation)
        )

    @property
    def label(self) -> str:
        return f"energy model ({self.name})" if self.refines else "Transformer++"

    @property
    def is_text(self) -> bool:
        kind = self.setting("state", "kind")
        return (
            kind != "embedding"
            if kind
            else not any(row.get("copy_last_loss") is not None for row in self.validation)
        )

    @property
    def loss_unit(self) -> str:
        return "nats per token" if self.is_text else "SmoothL1"

    @property
    def reference_name(self) -> str:
        return "unigram entropy" if self.is_text else "copying the last frame"

    @property
    def reference_loss(self) -> float:
        """What can be had without any model of the context: token frequencies for text, the last frame for video."""
        key = "unigram_entropy" if self.is_text else "copy_last_loss"
        return next(
            (v for v in (number(row.get(key)) for row in reversed(self.validation)) if v == v),
            math.nan,
        )

    @property
    def last_step(self) -> int:
        return max(rows[-1]["step"] for rows in (self.training, self.validation) if rows)


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    mark: str  # yes | no | unknown
    claim: str
    figure: str  # the number that decides
    detail: str  # where it comes from


# ------------------------------------------------------------------------------------------------------------------- reading


def read_run(folder: Path) -> Run:
    """The run in `folder`; UserError when it is no folder or has no metrics, notes for everything else."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such run folder; give the folder that train.py wrote (--run-dir)"
        )
    path, notes = folder / "metrics.jsonl", []
    if not path.is_file():
        raise UserError(
            f"{folder}: has no metrics.jsonl; give a run folder in which training has logged at least one step"
        )
    rows, unreadable = _read_lines(path)
    usable = [
        row
        for row in rows
        if isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    ]
    unreadable += len(rows) - len(usable)
    training = _by_step(row for row in usable if row.get("split", "train") == "train")
    validation = _by_step(row for row in usable if row.get("split") == "validation")
    if not training and not validation:
        raise UserError(
            f"{path}: has no complete row ({unreadable} unreadable); let the run log at least one step, then try again"
        )
    if unreadable:
        notes.append(
            f"metrics.jsonl: {unreadable:,} unreadable line{'s' * (unreadable > 1)} left out (a killed process leaves one)."
        )
    if not validation:
        notes.append(
            "No validation row in metrics.jsonl, so most of the verdict is unknown: "
            "the run was not evaluated yet (evaluation.every_steps)."
        )
    if not training:
        notes.append("No training row in metrics.jsonl, so there are no training curves.")
    events, unreadable = (
        _read_lines(folder / "events.jsonl") if (folder / "events.jsonl").is_file() else ([], 0)
    )
    if not events:
        notes.append("events.jsonl is missing or empty: starts, resumes and signals are not known.")
    if unreadable:
        notes.append(
            f"events.jsonl: {unreadable:,} unreadable line{'s' * (unreadable > 1)} left out."
        )
    config = _read_mapping(
        folder / "config.yaml", yaml.safe_load, notes, "the settings are not known"
    )
    samples = _read_mapping(
        folder / "samples.json",
        json.loads,
        notes,
        "no continuations to show; the evaluation writes them",
    )
    summary = _read_mapping(
        folder / "summary.json", json.loads, notes, "the numbers of parameters are not known"
    )
    return Run(folder, config or {}, training, validation, events, samples, summary, tuple(notes))


def _read_lines(path: Path) -> tuple[list[dict], int]:
    """(objects, number of lines that are none). A killed process leaves a torn line, and a resumed one may write on behind it."""
    objects, unreadable = [], 0
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    objects.append(value)
                else:
                    unreadable += 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return objects, unreadable


def _by_step(rows: Iterable[dict]) -> list[dict]:
    """One row per step, steps rising; a resumed run logs some steps again, and the last one counts."""
    latest = {row["step"]: row for row in rows}
    return [latest[step] for step in sorted(latest)]


def _read_mapping(path: Path, parse, notes: list[str], consequence: str) -> dict | None:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {consequence}.")
        return None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(
            f"{path.name} cannot be read ({' '.join(str(error).split())[:160]}): {consequence}."
        )
        return None
    if not isinstance(value, dict):
        notes.append(
            f"{path.name} holds a {type(value).__name__} where a mapping is expected: {consequence}."
        )
        return None
    return value


# ------------------------------------------------------------------------------------------------------------------- judging


def judge(run: Run, baseline: Run | None) -> tuple[str, str, list[Check]]:
    """(answer to "did it learn?", one sentence with the numbers, the checks behind it)."""
    checks = [_against_reference(run)]
    if run.refines:
        checks += [_against_initial(run), _against_first_step(run)]
    if run.refines or baseline:
        checks.append(_against_baseline(run, baseline))
    checks += [_ran_to_the_end(run), _stayed_finite(run)]
    if not run.validation:
        return "Cannot say yet", "There is no validation loss so far.", checks
    loss, step = final_loss(run.validation[-1]), run.validation[-1]["step"]
    if loss != loss:
        return "No", f"The validation loss at step {step:,} is not a finite number.", checks
    sentence = f"After {step:,} training steps the validation loss is {show(loss)} {run.loss_unit}"
    if run.is_text and loss < 30:
        sentence += f" (perplexity {show(math.exp(loss))})"
    gap = run.reference_loss - loss
    if gap != gap:
        return (
            "Cannot say",
            sentence + f"; the {run.reference_name} to hold it against was not logged.",
            checks,
        )
    sentence += f", {show(abs(gap))} {'below' if gap > 0 else 'above'} "
    sentence += "the unigram entropy." if run.is_text else "the loss of copying the last frame."
    answer = "Yes" if checks[0].mark == "yes" else "Not enough yet" if gap > 0 else "No"
    return answer, sentence, checks


def _unknown(claim: str, why: str) -> Check:
    return Check("unknown", claim, "–", why)


def _against_reference(run: Run) -> Check:
    if run.is_text:
        claim, rule = (
            "It uses the context, not only token frequencies",
            f"asked for: at least {LEARNED_NATS:g} nat below",
        )
    else:
        claim, rule = "It predicts better than copying the last frame", "asked for: below"
    if not run.validation:
        return _unknown(claim, "no validation row yet")
    loss, reference = final_loss(run.validation[-1]), run.reference_loss
    if loss != loss:
        return Check(
            "no",
            claim,
            "not finite",
            f"the validation loss at step {run.validation[-1]['step']:,} is not a finite number",
        )
    if reference != reference:
        return _unknown(
            claim,
            f"validation rows carry no {'unigram_entropy' if run.is_text else 'copy_last_loss'}",
        )
    ok = reference - loss >= LEARNED_NATS if run.is_text else loss < reference
    return Check(
        "yes" if ok else "no",
        claim,
        show_change(loss - reference) + " nats" * run.is_text,
        f"loss {show(loss)}, {run.reference_name} {show(reference)}; {rule}",
    )


def _against_initial(run: Run) -> Check:
    start = {"most_recent": "the last frame", "zeros": "zeros"}.get(
        run.setting("state", "initial"), "noise"
    )
    claim = f"Refinement turns {start} into a prediction"
    row = run.validation[-1] if run.validation else {}
    loss, initial = final_loss(row), number(row.get("initial_loss"))
    if not math.isfinite(loss) or not math.isfinite(initial):
        return _unknown(claim, "no validation row with a finite loss and initial_loss yet")
    return Check(
        "yes" if loss < initial else "no",
        claim,
        show_change(loss - initial) + " nats" * run.is_text,
        f"initial state {show(initial)}, after the last refinement step {show(loss)}",
    )


def _against_first_step(run: Run) -> Check:
    claim = "Thinking longer helps: later refinement steps beat the first"
    losses = losses_of(run.validation[-1]) if run.validation else []
    if len(losses) == 1:
        return _unknown(claim, "the model was evaluated with a single refinement step")
    if not losses or not math.isfinite(losses[0]) or not math.isfinite(losses[-1]):
        return _unknown(claim, "no validation row with finite losses per step yet")
    change = losses[-1] - losses[0]
    return Check(
        "yes" if change < -STEP_GAIN * abs(losses[0]) else "no",
        claim,
        show_change(change) + " nats" * run.is_text,
        f"after step 1 {show(losses[0])}, after step {len(losses)} {show(losses[-1])}; asked for: at least {STEP_GAIN:.1%} lower",
    )


def _against_baseline(run: Run, baseline: Run | None) -> Check:
    other = baseline.label if baseline else "Transformer++"
    claim = f"It is at least as good as {other} at the same step"
    if baseline is None:
        return _unknown(claim, "no run to compare with was given (--baseline RUN)")
    mine, theirs = (
        {row["step"]: final_loss(row) for row in rows if math.isfinite(final_loss(row))}
        for rows in (run.validation, baseline.validation)
    )
    common = mine.keys() & theirs.keys()
    if not common:
        return _unknown(claim, "the two runs have no validation at the same step")
    if run.is_text != baseline.is_text or abs(run.reference_loss - baseline.reference_loss) > 1e-3:
        return _unknown(
            claim,
            f"different validation data: {run.reference_name} {show(run.reference_loss)} here, "
            f"{baseline.reference_name} {show(baseline.reference_loss)} there",
        )
    step = max(common)
    gap = (mine[step] - theirs[step]) / abs(theirs[step]) if theirs[step] else math.nan
    if gap != gap:
        return _unknown(claim, f"the loss of {other} at step {step:,} is 0")
    detail = f"at step {step:,}: {show(mine[step])} here, {show(theirs[step])} there"
    if step < max(mine):
        detail += f" (the last common step; this run goes on to {max(mine):,})"
    ratio = median(run.training, "step_time_s") / (
        median(baseline.training, "step_time_s") or math.nan
    )
    if ratio == ratio:
        detail += f"; equal steps, not equal time: one step takes {ratio:.2g} × as long here"
    differing = [
        f"{section}.{key} {run.setting(section, key)} / {baseline.setting(section, key)}"
        for section, key in COMPARED
        if run.config
        and baseline.config
        and run.setting(section, key) != baseline.setting(section, key)
    ]
    if differing:
        detail += f"; settings that differ (here / there): {', '.join(differing)}"
    return Check("yes" if gap <= 0 else "no", claim, f"{gap:+.1%}".replace("-", "−"), detail)


def _ran_to_the_end(run: Run) -> Check:
    claim, planned = "It ran to the planned end", run.setting("train", "max_steps")
    if not isinstance(planned, int):
        return _unknown(claim, f"reached step {run.last_step:,}; train.max_steps is not known")
    return Check(
        "yes" if run.last_step >= planned else "no",
        claim,
        f"{run.last_step / max(planned, 1):.0%}",
        f"step {run.last_step:,} of {planned:,} (train.max_steps)",
    )


def _stayed_finite(run: Run) -> Check:
    claim = "Its losses stayed finite"
    rows = run.training + run.validation
    broken = sum(
        any(v != v for v in losses_of(row) or [math.nan]) or final_loss(row) != final_loss(row)
        for row in rows
    )
    skipped = sum(event.get("event") == "skip" for event in run.events)
    detail = f"{len(rows):,} logged rows" + (
        f"; {skipped:,} skipped step{'s' * (skipped > 1)} in the events" if skipped else ""
    )
    return Check(
        "no" if broken else "yes",
        claim,
        f"{broken:,} not finite" if broken else "all finite",
        detail,
    )
