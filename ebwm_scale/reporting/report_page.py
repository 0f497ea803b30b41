"""The report of a run as one self-contained page: verdict, curves, continuations or clips, facts,
details.

reporting/read_run.py reads the run folder, reporting/run_data.py judges, reporting/plots.py draws;
here all of it becomes the plain, bounded values that templates/report.html.j2 shows.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import yaml

from ebwm_scale.core.redaction import redacted
from ebwm_scale.reporting.clips import clips_of
from ebwm_scale.reporting.continuations import continuations_of
from ebwm_scale.reporting.curves import number
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.page import drawing
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.plain import printable
from ebwm_scale.reporting.plots import report_plots
from ebwm_scale.reporting.run_data import Run
from ebwm_scale.reporting.verdict import judge

MAX_VALIDATIONS = 60  # rows of the table
MAX_TABLE_STEPS = 16  # refinement steps in it
MAX_FACTS = 60
SIGNS = {"yes": "✓", "no": "✗", "unknown": "?"}
TONES = {"Yes": "yes", "No": "no", "Not enough yet": "no"}


def render(run: Run, baseline: Run | None) -> str:
    """The page as HTML text."""
    answer, sentence, checks = judge(run, baseline)
    headline, plots = report_plots(run, baseline)
    notes = list(run.notes)
    if baseline:
        about_numbers = [note for note in baseline.notes if note.startswith(("metrics", "config"))]
        notes += [f"Comparison run: {note}" for note in about_numbers]
    return render_page(
        "report.html.j2",
        title=f"{answer} – {run.name}",
        name=run.name,
        subtitle=_subtitle(run),
        answer=answer,
        tone=TONES.get(answer, "unknown"),
        sentence=sentence,
        checks=checks,
        signs=SIGNS,
        notes=notes,
        headline=drawing(headline),
        plots=[drawing(plot) for plot in plots],
        refines=run.refines,
        continuations=continuations_of(run.samples),
        clips=clips_of(run.samples, refines=run.refines),
        facts=facts_of(run, baseline),
        validations=_validations(run),
        configuration=redacted(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
        if run.config
        else "",
        events=_events(run),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
    )


def _subtitle(run: Run) -> str:
    kind = "Energy-based world model" if run.refines else "Transformer++ (baseline)"
    total = _parameters(run).get("total")
    pieces = [kind, f"{total:,} parameters" if total else None, f"{run.last_step:,} training steps"]
    return " · ".join(piece for piece in pieces if piece)


def facts_of(run: Run, baseline: Run | None) -> list[tuple[str, str]]:
    """(name, value) of what is known, as text."""
    get = run.setting

    def listed(section: str, keys: str) -> str:
        return " · ".join(
            f"{key.replace('_', ' ')} {get(section, key)}"
            for key in keys.split()
            if get(section, key) is not None
        )

    facts: list[tuple[str, Any]] = [
        ("Model", listed("model", "size num_layers width num_heads conditioning predicted_input"))
    ]
    facts += [
        (f"Parameters, {name.replace('_', ' ')}", f"{count:,}")
        for name, count in _parameters(run).items()
    ]
    facts += [
        (
            "Refinement",
            listed("refinement", "num_steps graph loss update landscapes") if run.refines else "",
        )
    ]
    data = (run.summary or {}).get("data")
    facts += [
        (f"Data, {str(key).replace('_', ' ')}", f"{value:,}" if isinstance(value, int) else value)
        for key, value in (data.items() if isinstance(data, dict) else ())
    ]
    facts += [
        ("Training", listed("train", "global_batch_size max_steps precision seed")),
        ("Context", listed("data", "context_length")),
    ]
    if run.training.num_rows:
        for unit in ("tokens", "frames"):
            seen = run.training.curves.get(f"{unit}_seen")
            if seen is not None and seen.num_finite:
                facts.append(("Seen in training", f"{int(seen.last):,} {unit}"))
        for name, key, unit in (
            ("Median step time", "step_time_s", "s"),
            ("Median throughput", "tokens_per_s", "tokens per second"),
            ("Median throughput", "frames_per_s", "frames per second"),
            ("Model compute", "model_tflops", "TFLOP/s"),
        ):
            value = run.training.median(key)
            facts.append((name, f"{show(value)} {unit}" if value == value else ""))
        mfu = run.training.median("mfu")
        facts.append(
            (
                "Model FLOPs utilisation",
                f"{mfu:.1%}"
                if mfu == mfu
                else "not measured (no accelerator, or its peak is not known)",
            )
        )
        peak = run.training.curves.get("peak_memory_gib")
        if peak is not None and peak.num_finite:
            facts.append(("Peak memory", f"{show(peak.highest)} GiB"))
    if run.validation:
        best = run.validated.best
        if best is not None:
            facts.append(
                ("Lowest validation loss", f"{show(best['loss'])} at step {best['step']:,}")
            )
        for unit in ("tokens", "frames"):
            count = number(run.validation[-1].get(f"num_{unit}"))
            facts.append(("Validation", f"{int(count):,} {unit}" if math.isfinite(count) else ""))
    if baseline:
        facts.append(
            ("Compared with", f"{baseline.name} ({baseline.label}, {baseline.last_step:,} steps)")
        )
    known = [(name, value) for name, value in facts if value not in ("", None)]
    return [
        (printable(str(name), 120), printable(str(value), 400)) for name, value in known[:MAX_FACTS]
    ]


def _parameters(run: Run) -> dict[str, int]:
    """Parameters by part with their total last; empty when they are not known."""
    parts = (run.summary or {}).get("parameters")
    if not isinstance(parts, dict):
        return {}
    counts = {
        name: count
        for name, count in list(parts.items())[:20]
        if isinstance(count, int) and not isinstance(count, bool)
    }
    total = counts.pop("total", sum(counts.values()))
    return {**counts, "total": total} if counts or total else {}


def _validations(run: Run) -> dict[str, Any] | None:
    """The table of validation rows: at most MAX_VALIDATIONS of them, the last one included."""
    rows = run.validation
    if not rows:
        return None
    stride = math.ceil(len(rows) / MAX_VALIDATIONS)
    shown = [row for i, row in enumerate(reversed(rows)) if i % stride == 0][::-1]
    count = min(max(len(row["loss_per_step"]) for row in shown), MAX_TABLE_STEPS)
    heads = ["training step"]
    if run.refines:
        heads += ["initial state", *(f"after step {i + 1}" for i in range(count))]
    else:
        heads += ["loss"] * count
    if run.is_text:
        more = {"perplexity": "perplexity"}
    else:
        more = {
            "persistence_loss": "persistence",
            "linear_extrapolation_loss": "linear extrapolation",
        }
    body = []
    for row in shown:
        losses = row["loss_per_step"]
        cells = [f"{row['step']:,}"]
        if run.refines:
            cells.append(_cell(row.get("initial_loss")))
        cells += [_cell(losses[i]) if i < len(losses) else "–" for i in range(count)]
        cells += [_cell(row.get(key)) for key in more]
        body.append(cells)
    every = f", {len(shown):,} of them shown" if len(shown) < run.validated.num_rows else ""
    return {
        "title": f"Validation numbers ({run.validated.num_rows:,} evaluations{every})",
        "heads": [*heads, *more.values()],
        "rows": body,
    }


def _events(run: Run) -> dict[str, Any]:
    events = run.events
    counted = sorted(events.counts.items(), key=lambda item: -item[1])[:8]
    rows = []
    for event in events.newest:
        more = [
            f"{key}: {str(value)[:200]}"
            for key, value in event.items()
            if key not in ("time", "event", "step")
        ]
        cells = [printable(str(event.get(key, "")), 40) for key in ("time", "event", "step")]
        rows.append([*cells, printable(redacted(", ".join(more)), 400)])
    left = events.total - len(events.newest)
    return {
        "title": f"Events ({', '.join(f'{count:,} {name}' for name, count in counted)})",
        "left": f"{left:,}" if left else "",
        "rows": rows,
    }


def _cell(value: Any) -> str:
    return "–" if value is None else show(number(value))
