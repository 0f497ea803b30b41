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
from ebwm_scale.reporting.facts import facts_of, parameters_of
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.page import drawing
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.plain import page_text
from ebwm_scale.reporting.plots import report_plots
from ebwm_scale.reporting.run_data import Run
from ebwm_scale.reporting.verdict import judge

MAX_VALIDATIONS = 60  # rows of the table
MAX_TABLE_STEPS = 16  # refinement steps in it
SIGNS = {"yes": "✓", "no": "✗", "unknown": "?"}
TONES = {"Yes": "yes", "No": "no", "Not enough yet": "no"}


def render(run: Run, baseline: Run | None, *, reload_s: float | None = None) -> str:
    """The page as HTML text; reload_s: it loads itself again after so many seconds."""
    answer, sentence, checks = judge(run, baseline)
    configuration = ""
    if run.config:
        configuration = redacted(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
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
        configuration=configuration,
        events=_events(run),
        reload_s=None if reload_s is None else max(1, round(reload_s)),
        named=_named(run),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
    )


def _subtitle(run: Run) -> str:
    kind = "Energy-based world model"
    if not run.refines:
        kind = "Looped Transformer++ (baseline)" if run.is_looped else "Transformer++ (baseline)"
    total = parameters_of(run).get("total")
    pieces = [kind]
    if total:
        pieces.append(f"{total:,} parameters")
    pieces.append(f"{run.last_step:,} training steps")
    return " · ".join(pieces)


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
    elif run.is_looped:
        heads += [f"after loop {i + 1}" for i in range(count)]
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


def _named(run: Run) -> list[list[str]]:
    """Further evaluations (evaluation.sets, questions, tasks): [name, step, figures], the newest of
    each.
    """
    newest = {}
    for row in run.validation:
        for name, figures in row.get("named", {}).items():
            newest[name] = [page_text(name, 80), f"{row['step']:,}", page_text(figures, 160)]
    return list(newest.values())


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
        cells = [page_text(str(event.get(key, "")), 40) for key in ("time", "event", "step")]
        rows.append([*cells, page_text(redacted(", ".join(more)), 400)])
    left = events.total - len(events.newest)
    return {
        "title": f"Events ({', '.join(f'{count:,} {name}' for name, count in counted)})",
        "left": f"{left:,}" if left else "",
        "rows": rows,
    }


def _cell(value: Any) -> str:
    return "–" if value is None else show(number(value))
