"""The report of a run: everything a run folder has -> one self-contained page that first answers "did it learn?".

    python -m ebwm_scale.report RUN [--baseline RUN]        writes RUN/report.html and RUN/report_plot.png

The page needs no network and no script. What the folder lacks is named in the page instead of guessed; every mark is
computed from the numbers beside it. This file reads, judges and writes the page; report_plots.py draws the curves.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any, Iterable, Sequence

import yaml

from .errors import EXIT_BAD_INPUT, EXIT_FINISHED, UserError
from .report_plots import PALETTE, Plot, final_loss, headline_png, losses_of, median, number, report_plots, show, show_change

LEARNED_NATS = 1.0          # text: a model that learned context is at least this far below the unigram entropy
STEP_GAIN = 0.001           # later refinement steps count as useful when they lower the loss by this fraction
MAX_SHOWN = {"continuations": 24, "positions": 16, "candidates": 10, "events": 300, "validations": 60, "text": 6000}
# Differences between two runs, besides the kind of model, that a reader of the comparison must know of.
COMPARED = (("model", "num_layers"), ("model", "width"), ("data", "manifest"), ("data", "context_length"), ("optimizer", "learning_rate"),
            ("train", "global_batch_size"), ("train", "precision"), ("train", "seed"))


@dataclass(frozen=True)
class Run:
    """What a run folder holds; `notes` says what is missing or could not be read."""
    folder: Path
    config: dict
    training: list[dict]            # one row per step, steps rising
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
        return kind != "baseline" if kind else any(row.get("energy_per_step") for row in self.training) or any(
            len(losses_of(row)) > 1 for row in self.validation)

    @property
    def label(self) -> str:
        return f"energy model ({self.name})" if self.refines else "Transformer++"

    @property
    def is_text(self) -> bool:
        kind = self.setting("state", "kind")
        return kind != "embedding" if kind else not any(row.get("copy_last_loss") is not None for row in self.validation)

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
        return next((v for v in (number(row.get(key)) for row in reversed(self.validation)) if v == v), math.nan)

    @property
    def last_step(self) -> int:
        return max(rows[-1]["step"] for rows in (self.training, self.validation) if rows)


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""
    mark: str           # yes | no | unknown
    claim: str
    figure: str         # the number that decides
    detail: str         # where it comes from


# ------------------------------------------------------------------------------------------------------------------- reading

def read_run(folder: Path) -> Run:
    """The run in `folder`; UserError when it is no folder or has no metrics, notes for everything else."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the folder that train.py wrote (--run-dir)")
    path, notes = folder / "metrics.jsonl", []
    if not path.is_file():
        raise UserError(f"{folder}: has no metrics.jsonl; give a run folder in which training has logged at least one step")
    rows, unreadable = _read_lines(path)
    usable = [row for row in rows if isinstance(row.get("step"), int) and not isinstance(row["step"], bool)]
    unreadable += len(rows) - len(usable)
    training = _by_step(row for row in usable if row.get("split", "train") == "train")
    validation = _by_step(row for row in usable if row.get("split") == "validation")
    if not training and not validation:
        raise UserError(f"{path}: has no complete row ({unreadable} unreadable); let the run log at least one step, then try again")
    if unreadable:
        notes.append(f"metrics.jsonl: {unreadable:,} unreadable line{'s' * (unreadable > 1)} left out (a killed process leaves one).")
    if not validation:
        notes.append("No validation row in metrics.jsonl, so most of the verdict is unknown: "
                     "the run was not evaluated yet (evaluation.every_steps).")
    if not training:
        notes.append("No training row in metrics.jsonl, so there are no training curves.")
    events, unreadable = _read_lines(folder / "events.jsonl") if (folder / "events.jsonl").is_file() else ([], 0)
    if not events:
        notes.append("events.jsonl is missing or empty: starts, resumes and signals are not known.")
    if unreadable:
        notes.append(f"events.jsonl: {unreadable:,} unreadable line{'s' * (unreadable > 1)} left out.")
    config = _read_mapping(folder / "config.yaml", yaml.safe_load, notes, "the settings are not known")
    samples = _read_mapping(folder / "samples.json", json.loads, notes, "no continuations to show; the evaluation writes them")
    summary = _read_mapping(folder / "summary.json", json.loads, notes, "the numbers of parameters are not known")
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
        notes.append(f"{path.name} cannot be read ({' '.join(str(error).split())[:160]}): {consequence}.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds a {type(value).__name__} where a mapping is expected: {consequence}.")
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
        return "Cannot say", sentence + f"; the {run.reference_name} to hold it against was not logged.", checks
    sentence += f", {show(abs(gap))} {'below' if gap > 0 else 'above'} "
    sentence += "the unigram entropy." if run.is_text else "the loss of copying the last frame."
    answer = "Yes" if checks[0].mark == "yes" else "Not enough yet" if gap > 0 else "No"
    return answer, sentence, checks


def _unknown(claim: str, why: str) -> Check:
    return Check("unknown", claim, "–", why)


def _against_reference(run: Run) -> Check:
    if run.is_text:
        claim, rule = "It uses the context, not only token frequencies", f"asked for: at least {LEARNED_NATS:g} nat below"
    else:
        claim, rule = "It predicts better than copying the last frame", "asked for: below"
    if not run.validation:
        return _unknown(claim, "no validation row yet")
    loss, reference = final_loss(run.validation[-1]), run.reference_loss
    if loss != loss:
        return Check("no", claim, "not finite", f"the validation loss at step {run.validation[-1]['step']:,} is not a finite number")
    if reference != reference:
        return _unknown(claim, f"validation rows carry no {'unigram_entropy' if run.is_text else 'copy_last_loss'}")
    ok = reference - loss >= LEARNED_NATS if run.is_text else loss < reference
    return Check("yes" if ok else "no", claim, show_change(loss - reference) + " nats" * run.is_text,
                 f"loss {show(loss)}, {run.reference_name} {show(reference)}; {rule}")


def _against_initial(run: Run) -> Check:
    claim = "Refinement turns noise into a prediction"
    row = run.validation[-1] if run.validation else {}
    loss, initial = final_loss(row), number(row.get("initial_loss"))
    if not math.isfinite(loss) or not math.isfinite(initial):
        return _unknown(claim, "no validation row with a finite loss and initial_loss yet")
    return Check("yes" if loss < initial else "no", claim, show_change(loss - initial) + " nats" * run.is_text,
                 f"initial random state {show(initial)}, after the last refinement step {show(loss)}")


def _against_first_step(run: Run) -> Check:
    claim = "Thinking longer helps: later refinement steps beat the first"
    losses = losses_of(run.validation[-1]) if run.validation else []
    if len(losses) == 1:
        return _unknown(claim, "the model was evaluated with a single refinement step")
    if not losses or not math.isfinite(losses[0]) or not math.isfinite(losses[-1]):
        return _unknown(claim, "no validation row with finite losses per step yet")
    change = losses[-1] - losses[0]
    return Check("yes" if change < -STEP_GAIN * abs(losses[0]) else "no", claim, show_change(change) + " nats" * run.is_text,
                 f"after step 1 {show(losses[0])}, after step {len(losses)} {show(losses[-1])}; asked for: at least {STEP_GAIN:.1%} lower")


def _against_baseline(run: Run, baseline: Run | None) -> Check:
    other = baseline.label if baseline else "Transformer++"
    claim = f"It is at least as good as {other} at the same step"
    if baseline is None:
        return _unknown(claim, "no run to compare with was given (--baseline RUN)")
    mine, theirs = ({row["step"]: final_loss(row) for row in rows if math.isfinite(final_loss(row))}
                    for rows in (run.validation, baseline.validation))
    common = mine.keys() & theirs.keys()
    if not common:
        return _unknown(claim, "the two runs have no validation at the same step")
    if run.is_text != baseline.is_text or abs(run.reference_loss - baseline.reference_loss) > 1e-3:
        return _unknown(claim, f"different validation data: {run.reference_name} {show(run.reference_loss)} here, "
                               f"{baseline.reference_name} {show(baseline.reference_loss)} there")
    step = max(common)
    gap = (mine[step] - theirs[step]) / abs(theirs[step]) if theirs[step] else math.nan
    if gap != gap:
        return _unknown(claim, f"the loss of {other} at step {step:,} is 0")
    detail = f"at step {step:,}: {show(mine[step])} here, {show(theirs[step])} there"
    if step < max(mine):
        detail += f" (the last common step; this run goes on to {max(mine):,})"
    ratio = median(run.training, "step_time_s") / (median(baseline.training, "step_time_s") or math.nan)
    if ratio == ratio:
        detail += f"; equal steps, not equal time: one step takes {ratio:.2g} × as long here"
    differing = [f"{section}.{key} {run.setting(section, key)} / {baseline.setting(section, key)}" for section, key in COMPARED
                 if run.config and baseline.config and run.setting(section, key) != baseline.setting(section, key)]
    if differing:
        detail += f"; settings that differ (here / there): {', '.join(differing)}"
    return Check("yes" if gap <= 0 else "no", claim, f"{gap:+.1%}".replace("-", "−"), detail)


def _ran_to_the_end(run: Run) -> Check:
    claim, planned = "It ran to the planned end", run.setting("train", "max_steps")
    if not isinstance(planned, int):
        return _unknown(claim, f"reached step {run.last_step:,}; train.max_steps is not known")
    return Check("yes" if run.last_step >= planned else "no", claim, f"{run.last_step / max(planned, 1):.0%}",
                 f"step {run.last_step:,} of {planned:,} (train.max_steps)")


def _stayed_finite(run: Run) -> Check:
    claim = "Its losses stayed finite"
    rows = run.training + run.validation
    broken = sum(any(v != v for v in losses_of(row) or [math.nan]) or final_loss(row) != final_loss(row) for row in rows)
    skipped = sum(event.get("event") == "skip" for event in run.events)
    detail = f"{len(rows):,} logged rows" + (f"; {skipped:,} skipped step{'s' * (skipped > 1)} in the events" if skipped else "")
    return Check("no" if broken else "yes", claim, f"{broken:,} not finite" if broken else "all finite", detail)


# ------------------------------------------------------------------------------------------------------------------ the page

CSS = """
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1040px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.5rem;line-height:1.25;margin:0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:44px 0 12px}
h3{font-size:1rem;margin:0 0 6px}
p{margin:0 0 8px}.muted,figcaption,.detail{color:var(--muted)}.small,figcaption,.detail{font-size:.875rem}
.card{background:var(--card);border:1px solid var(--grid);border-radius:12px;padding:16px}
.verdict{margin-top:20px;padding:0;overflow:hidden}.answer{padding:20px 20px 16px;border-left:8px solid var(--tone)}
.answer .question{font-size:.875rem;color:var(--muted)}
.answer strong{display:block;font-size:2.1rem;line-height:1.15;color:var(--tone);margin:2px 0 8px}
.yes{--tone:var(--good)}.no{--tone:var(--bad)}.unknown{--tone:var(--muted)}
.checks{list-style:none;margin:0;padding:0}
.checks li{display:grid;grid-template-columns:7rem 1fr auto;gap:2px 12px;padding:10px 20px;border-top:1px solid var(--grid);
align-items:baseline}
.badge{color:var(--tone);font-weight:600;white-space:nowrap}.badge span{display:inline-block;width:1.4em}
.figure{font-variant-numeric:tabular-nums;font-weight:600;text-align:right;white-space:nowrap}
.checks .detail{grid-column:2/4;overflow-wrap:anywhere}
.notes{margin-top:16px}.notes ul{margin:4px 0 0;padding-left:20px}
figure{margin:0}figure svg{display:block;width:100%;height:auto;overflow:visible}figcaption{margin-top:8px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px}
.narrow{display:none}.empty{display:grid;align-content:center;min-height:96px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:15px/1.6 var(--mono);margin:0 0 12px;padding:12px;border-radius:8px;
background:var(--page)}
.prompt{color:var(--muted)}.continuation{color:var(--ink);background:var(--mark);border-radius:3px;padding:1px 0}
.key{display:inline-block;padding:0 6px;border-radius:4px;font-size:.8125rem}
.stack>*+*{margin-top:16px}details{margin-top:8px}summary{cursor:pointer;padding:6px 0;font-weight:600}
summary:focus-visible{outline:2px solid var(--curve3)}
.positions{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px;margin-top:8px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 8px;border-bottom:1px solid var(--grid);vertical-align:top}th{color:var(--muted);font-weight:500}
td.value,th.value{text-align:right;white-space:nowrap}td.token{font-family:var(--mono);white-space:pre-wrap;overflow-wrap:anywhere}
tr.truth td{font-weight:700}.facts th{width:14rem}.facts td{overflow-wrap:anywhere}
.bar{display:block;height:8px;border-radius:4px;background:var(--grid);min-width:60px;margin-top:6px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--curve3)}
.context{font:13px/1.5 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 6px}
pre{overflow-x:auto;font:13px/1.5 var(--mono);margin:8px 0 0}
@media(max-width:600px){.checks li{grid-template-columns:1fr auto;padding:10px 14px}.checks .claim{grid-column:1/3}
.checks .detail{grid-column:1/3}
.checks .badge{order:-2}.checks .figure{order:-1}.answer{padding:16px 14px}.answer strong{font-size:1.8rem}.card{padding:12px}
.verdict{padding:0}
.narrow{display:block}.wide{display:none}.facts th{width:8.5rem}}
@media print{details>*{display:block}.card{break-inside:avoid}}
"""
# The page's own colours, (light, dark) as in PALETTE. Good and bad are blue-green and vermilion, and always carry a sign and a word.
PAGE_COLOURS = {"page": ("#f6f7f9", "#12161c"), "card": ("#ffffff", "#1b2129"), "mark": ("#dbeeff", "#123a5e"),
                "good": ("#00705a", "#3fcfa9"), "bad": ("#b3400a", "#ff9a66")}
SIGNS = {"yes": "✓", "no": "✗", "unknown": "?"}


def render(run: Run, baseline: Run | None) -> str:
    """The page as HTML text."""
    answer, sentence, checks = judge(run, baseline)
    headline, plots = report_plots(run, baseline)
    colours = {**PALETTE, **PAGE_COLOURS}
    light, dark = (";".join(f"--{role}:{pair[i]}" for role, pair in colours.items()) for i in (0, 1))
    notes = list(run.notes)
    notes += [f"Comparison run: {note}" for note in (baseline.notes if baseline else ()) if note.startswith(("metrics", "config"))]
    parts = [
        f'<header><h1>{escape(run.name)}</h1><p class="muted">{escape(_subtitle(run))}</p></header>',
        _verdict(answer, sentence, checks),
        _notes(notes),
        f"<h2>{escape(headline.title)}</h2>{_figure(headline, heading=False)}",
        f'<h2>How it trained</h2><div class="grid">{"".join(_figure(plot) for plot in plots)}</div>',
        _continuations(run),
        f'<h2>Facts</h2><div class="card scroll">{_facts(run, baseline)}</div>',
        f'<h2>Details</h2><div class="card">{_validation_table(run)}{_configuration(run)}{_events(run)}</div>',
        f'<p class="small muted" style="margin-top:24px">Written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by ebwm_scale.report.</p>',
    ]
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{escape(answer)} – {escape(run.name)}</title>'
            f"<style>:root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{CSS}</style></head>\n"
            f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n")


def _subtitle(run: Run) -> str:
    kind = "Energy-based world model" if run.refines else "Transformer++ (baseline)"
    total = _parameters(run).get("total")
    pieces = [kind, f"{total:,} parameters" if total else None, f"{run.last_step:,} training steps"]
    return " · ".join(piece for piece in pieces if piece)


def _verdict(answer: str, sentence: str, checks: list[Check]) -> str:
    tone = {"Yes": "yes", "No": "no", "Not enough yet": "no"}.get(answer, "unknown")
    lines = "".join(
        f'<li class="{check.mark}"><span class="badge"><span aria-hidden="true">{SIGNS[check.mark]}</span>{check.mark}</span>'
        f'<span class="claim">{escape(check.claim)}</span><span class="figure">{escape(check.figure)}</span>'
        f'<span class="detail">{escape(check.detail)}</span></li>' for check in checks)
    return (f'<section class="card verdict" aria-label="Verdict"><div class="answer {tone}"><span class="question">Did it learn?</span>'
            f"<strong>{escape(answer)}</strong><p>{escape(sentence)}</p></div><ul class=\"checks\">{lines}</ul></section>")


def _notes(notes: list[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section class="notes card small"><h3>Not in this report</h3><ul>{lines}</ul></section>' if notes else ""


def _figure(plot: Plot, *, heading: bool = True) -> str:
    title = f"<h3>{escape(plot.title)}</h3>" if heading else ""
    if plot.svg is None:
        return f'<figure class="card empty">{title}<figcaption>{escape(plot.caption)}</figcaption></figure>'
    drawing = f'<div class="wide">{plot.svg}</div><div class="narrow">{plot.narrow_svg}</div>' if plot.narrow_svg else plot.svg
    return f'<figure class="card">{title}{drawing}<figcaption>{escape(plot.caption)}</figcaption></figure>'


def _continuations(run: Run) -> str:
    listed = _mappings((run.samples or {}).get("continuations"))
    if not listed:
        return ""
    step = run.samples.get("step")
    cards = "".join(_continuation(item, is_open=i == 0) for i, item in enumerate(listed[:MAX_SHOWN["continuations"]]))
    left = len(listed) - MAX_SHOWN["continuations"]
    more = f'<p class="small muted">{left:,} more in samples.json.</p>' if left > 0 else ""
    energies = " In the tables, a lower energy means a better fit." if run.refines else ""
    origin = f" at step {step:,}" if isinstance(step, int) else ""
    return (f'<h2>Continuations</h2><p class="small muted">Written by the model{origin}. <span class="key prompt">given text</span> '
            f'<span class="key continuation">the model\'s continuation</span>{energies}</p><div class="stack">{cards}{more}</div>')


def _continuation(item: dict, *, is_open: bool) -> str:
    prompt, text, reference = (_cut(item.get(key)) for key in ("prompt", "continuation", "reference"))
    real = _folded("How the real text goes on", f'<p class="text">{escape(reference)}</p>') if reference else ""
    positions = _mappings(item.get("positions"))
    tables = "".join(_position(position) for position in positions[:MAX_SHOWN["positions"]])
    left = len(positions) - MAX_SHOWN["positions"]
    more = f'<p class="small muted">{left:,} more positions in samples.json.</p>' if left > 0 else ""
    if tables:
        real += _folded(f"Candidates for the next token, {len(positions):,} position{'s' * (len(positions) > 1)}",
                        f'<div class="positions">{tables}</div>{more}', is_open=is_open)
    return (f'<article class="card"><p class="text"><span class="prompt">{escape(prompt)}</span>'
            f'<span class="continuation">{escape(text)}</span></p>{real}</article>')


def _position(position: dict) -> str:
    truth, candidates = _token(position.get("truth")), _mappings(position.get("candidates"))[:MAX_SHOWN["candidates"]]
    energies = [number(c.get("energy")) for c in candidates]
    truth_energy = number(position.get("truth_energy"))
    with_energy = any(e == e for e in [*energies, truth_energy])
    rows = []
    for candidate, energy in zip(candidates, energies):
        rows.append(_candidate(_token(candidate.get("token")), number(candidate.get("probability")), energy, with_energy,
                               is_truth=candidate.get("token") == position.get("truth")))
    if candidates and all(c.get("token") != position.get("truth") for c in candidates):
        rows.append(_candidate(truth, math.nan, truth_energy, with_energy, is_truth=True))
    energy_head = '<th scope="col" class="value">energy</th>' if with_energy else ""
    return (f'<div><p class="context"><span class="prompt">…{escape(_cut(position.get("context"))[-160:])}</span><b>{escape(truth)}</b></p>'
            '<table><thead><tr><th scope="col">token</th><th scope="col" class="value">probability</th><th aria-hidden="true"></th>'
            f"{energy_head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>")


def _candidate(token: str, probability: float, energy: float, with_energy: bool, *, is_truth: bool) -> str:
    known = probability == probability
    width = min(max(probability, 0.0), 1.0) * 100 if known else 0
    cell = f'<td class="value">{show(energy) if energy == energy else "–"}</td>' if with_energy else ""
    return (f'<tr{" class=truth" if is_truth else ""}><td class="token">{escape(token)}{" ✓ true" if is_truth else ""}</td>'
            f'<td class="value">{f"{probability:.1%}" if known else "not listed"}</td>'
            f'<td aria-hidden="true"><span class="bar"><i style="width:{width:.1f}%"></i></span></td>{cell}</tr>')


def _facts(run: Run, baseline: Run | None) -> str:
    get = run.setting

    def listed(section: str, keys: str) -> str:
        return " · ".join(f"{key.replace('_', ' ')} {get(section, key)}" for key in keys.split() if get(section, key) is not None)

    facts: list[tuple[str, Any]] = [("Model", listed("model", "size num_layers width num_heads conditioning predicted_input"))]
    facts += [(f"Parameters, {name.replace('_', ' ')}", f"{count:,}") for name, count in _parameters(run).items()]
    facts += [("Refinement", listed("refinement", "num_steps graph loss update landscapes") if run.refines else "")]
    data = (run.summary or {}).get("data")
    facts += [(f"Data, {str(key).replace('_', ' ')}", f"{value:,}" if isinstance(value, int) else value)
              for key, value in (data.items() if isinstance(data, dict) else ())]
    facts += [("Training", listed("train", "global_batch_size max_steps precision seed")), ("Context", listed("data", "context_length"))]
    if run.training:
        last = run.training[-1]
        facts += [("Seen in training", f"{int(last[f'{unit}_seen']):,} {unit}") for unit in ("tokens", "frames")
                  if math.isfinite(number(last.get(f"{unit}_seen")))]
        for name, key, unit in (("Median step time", "step_time_s", "s"), ("Median throughput", "tokens_per_s", "tokens per second"),
                                ("Model compute", "model_tflops", "TFLOP/s")):
            value = median(run.training, key)
            facts.append((name, f"{show(value)} {unit}" if value == value else ""))
        mfu = median(run.training, "mfu")
        facts.append(("Model FLOPs utilisation", f"{mfu:.1%}" if mfu == mfu else "not measured (no accelerator, or its peak is not known)"))
        peak = max((v for v in (number(row.get("peak_memory_gib")) for row in run.training) if v == v), default=math.nan)
        facts.append(("Peak memory", f"{show(peak)} GiB" if peak == peak else ""))
    if run.validation:
        finite = [row for row in run.validation if math.isfinite(final_loss(row))]
        if finite:
            best = min(finite, key=final_loss)
            facts.append(("Lowest validation loss", f"{show(final_loss(best))} at step {best['step']:,}"))
        count = run.validation[-1].get("num_tokens")
        facts.append(("Validation", f"{count:,} tokens" if isinstance(count, int) else ""))
    if baseline:
        facts.append(("Compared with", f"{baseline.name} ({baseline.label}, {baseline.last_step:,} steps)"))
    rows = "".join(f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
                   for name, value in facts if value not in ("", None))
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _parameters(run: Run) -> dict[str, int]:
    """Parameters by part with their total last; empty when they are not known."""
    parts = (run.summary or {}).get("parameters")
    parts = {str(k): v for k, v in parts.items() if isinstance(v, int)} if isinstance(parts, dict) else {}
    total = parts.pop("total", sum(parts.values()))
    return {**parts, "total": total} if parts or total else {}


def _validation_table(run: Run) -> str:
    rows = run.validation
    if not rows:
        return ""
    stride = math.ceil(len(rows) / MAX_SHOWN["validations"])
    shown = [row for i, row in enumerate(reversed(rows)) if i % stride == 0][::-1]
    count = max(len(losses_of(row)) for row in shown)
    heads = ["training step"] + ["initial state"] * run.refines
    heads += [f"after step {i + 1}" if run.refines else "loss" for i in range(count)] + ["perplexity"] * run.is_text
    body = []
    for row in shown:
        losses = losses_of(row)
        body.append([f"{row['step']:,}"] + [_cell(row.get("initial_loss"))] * run.refines
                    + [_cell(losses[i]) if i < len(losses) else "–" for i in range(count)] + [_cell(row.get("perplexity"))] * run.is_text)
    every = f", one of {stride}" if stride > 1 else ""
    return _folded(f"Validation numbers ({len(rows):,} evaluations{every})", _table(heads, body, numeric=set(heads)))


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return _folded("Resolved configuration", f'<pre tabindex="0">{escape(text)}</pre>')


def _events(run: Run) -> str:
    if not run.events:
        return ""
    counted = Counter(str(event.get("event", "unnamed"))[:40] for event in run.events).most_common(8)
    left = max(len(run.events) - MAX_SHOWN["events"], 0)
    body = []
    for event in run.events[left:]:
        more = ", ".join(f"{key}: {value}" for key, value in event.items() if key not in ("time", "event", "step"))
        body.append([*(_cut(event.get(key))[:40] for key in ("time", "event", "step")), more[:400]])
    note = f'<p class="small muted">The {left:,} events before these are in events.jsonl.</p>' if left else ""
    return _folded(f"Events ({', '.join(f'{count:,} {name}' for name, count in counted)})",
                   note + _table(["time", "event", "step", "more"], body, numeric={"step"}))


def _table(heads: list[str], rows: list[list[str]], *, numeric: set[str]) -> str:
    kinds = [' class="value"' if head in numeric else "" for head in heads]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(heads, kinds))
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _folded(title: str, content: str, *, is_open: bool = False) -> str:
    return f'<details{" open" * is_open}><summary>{escape(title)}</summary>{content}</details>'


def _mappings(value: Any) -> list[dict]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _cell(value: Any) -> str:
    return "–" if value is None else show(number(value))


def _cut(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= MAX_SHOWN["text"] else text[:MAX_SHOWN["text"]] + "…"


def _token(value: Any) -> str:
    """A token with its blanks made visible, since a space in front is part of it."""
    return _cut(value)[:80].replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(empty)"


# ------------------------------------------------------------------------------------------------------------------ entry points

def write_report(run_dir: Path, *, baseline_dir: Path | None = None) -> Path:
    """Write report.html and report_plot.png into the run folder and return the page's path; UserError when there is nothing to report."""
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    baseline = read_run(Path(baseline_dir)) if baseline_dir is not None else None
    page = render(run, baseline)
    _replace(run_dir / "report_plot.png", headline_png(run, baseline))
    return _replace(run_dir / "report.html", page.encode("utf-8", errors="replace"))


def _replace(path: Path, content: bytes) -> Path:
    """Write beside and rename: whoever opens `path` sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; make the run folder writable") from None
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ebwm_scale.report", description="Write RUN/report.html and RUN/report_plot.png.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="run folder to compare with, usually of model.kind baseline")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run, baseline_dir=options.baseline))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
