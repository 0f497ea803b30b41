"""The report as one self-contained page of HTML: verdict, curves, continuations with their candidates' energies, facts."""

from __future__ import annotations

import math
from collections import Counter
from datetime import datetime, timezone
from html import escape
from typing import Any

import yaml

from . import report_clips
from .redaction import redacted
from .report_clips import clips_section
from .report_plots import PALETTE, Plot, final_loss, losses_of, median, number, report_plots, show
from .report_run import Check, Run, judge

MAX_SHOWN = {
    "continuations": 24,
    "positions": 16,
    "candidates": 10,
    "events": 300,
    "validations": 60,
    "text": 6000,
}

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
PAGE_COLOURS = {
    "page": ("#f6f7f9", "#12161c"),
    "card": ("#ffffff", "#1b2129"),
    "mark": ("#dbeeff", "#123a5e"),
    "good": ("#00705a", "#3fcfa9"),
    "bad": ("#b3400a", "#ff9a66"),
}
SIGNS = {"yes": "✓", "no": "✗", "unknown": "?"}


def render(run: Run, baseline: Run | None) -> str:
    """The page as HTML text."""
    answer, sentence, checks = judge(run, baseline)
    headline, plots = report_plots(run, baseline)
    colours = {**PALETTE, **PAGE_COLOURS}
    light, dark = (
        ";".join(f"--{role}:{pair[i]}" for role, pair in colours.items()) for i in (0, 1)
    )
    notes = list(run.notes)
    notes += [
        f"Comparison run: {note}"
        for note in (baseline.notes if baseline else ())
        if note.startswith(("metrics", "config"))
    ]
    parts = [
        f'<header><h1>{escape(run.name)}</h1><p class="muted">{escape(_subtitle(run))}</p></header>',
        _verdict(answer, sentence, checks),
        _notes(notes),
        f"<h2>{escape(headline.title)}</h2>{_figure(headline, heading=False)}",
        f'<h2>How it trained</h2><div class="grid">{"".join(_figure(plot) for plot in plots)}</div>',
        _continuations(run),
        clips_section(run.samples, refines=run.refines),
        f'<h2>Facts</h2><div class="card scroll">{_facts(run, baseline)}</div>',
        f'<h2>Details</h2><div class="card">{_validation_table(run)}{_configuration(run)}{_events(run)}</div>',
        f'<p class="small muted" style="margin-top:24px">Written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by ebwm_scale.report.</p>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(answer)} – {escape(run.name)}</title>'
        f"<style>:root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{CSS}{report_clips.CSS}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"
    )


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
        f'<span class="detail">{escape(check.detail)}</span></li>'
        for check in checks
    )
    return (
        f'<section class="card verdict" aria-label="Verdict"><div class="answer {tone}"><span class="question">Did it learn?</span>'
        f'<strong>{escape(answer)}</strong><p>{escape(sentence)}</p></div><ul class="checks">{lines}</ul></section>'
    )


def _notes(notes: list[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<section class="notes card small"><h3>Not in this report</h3><ul>{lines}</ul></section>'
        if notes
        else ""
    )


def _figure(plot: Plot, *, heading: bool = True) -> str:
    title = f"<h3>{escape(plot.title)}</h3>" if heading else ""
    if plot.svg is None:
        return f'<figure class="card empty">{title}<figcaption>{escape(plot.caption)}</figcaption></figure>'
    drawing = (
        f'<div class="wide">{plot.svg}</div><div class="narrow">{plot.narrow_svg}</div>'
        if plot.narrow_svg
        else plot.svg
    )
    return f'<figure class="card">{title}{drawing}<figcaption>{escape(plot.caption)}</figcaption></figure>'


def _continuations(run: Run) -> str:
    listed = _mappings((run.samples or {}).get("continuations"))
    if not listed:
        return ""
    step = run.samples.get("step")
    cards = "".join(
        _continuation(item, is_open=i == 0)
        for i, item in enumerate(listed[: MAX_SHOWN["continuations"]])
    )
    left = len(listed) - MAX_SHOWN["continuations"]
    more = f'<p class="small muted">{left:,} more in samples.json.</p>' if left > 0 else ""
    energies = " In the tables, a lower energy means a better fit." if run.refines else ""
    origin = f" at step {step:,}" if isinstance(step, int) else ""
    return (
        f'<h2>Continuations</h2><p class="small muted">Written by the model{origin}. <span class="key prompt">given text</span> '
        f'<span class="key continuation">the model\'s continuation</span>{energies}</p><div class="stack">{cards}{more}</div>'
    )


def _continuation(item: dict, *, is_open: bool) -> str:
    prompt, text, reference = (
        _cut(item.get(key)) for key in ("prompt", "continuation", "reference")
    )
    real = (
        _folded("How the real text goes on", f'<p class="text">{escape(reference)}</p>')
        if reference
        else ""
    )
    positions = _mappings(item.get("positions"))
    tables = "".join(_position(position) for position in positions[: MAX_SHOWN["positions"]])
    left = len(positions) - MAX_SHOWN["positions"]
    more = (
        f'<p class="small muted">{left:,} more positions in samples.json.</p>' if left > 0 else ""
    )
    if tables:
        real += _folded(
            f"Candidates for the next token, {len(positions):,} position{'s' * (len(positions) > 1)}",
            f'<div class="positions">{tables}</div>{more}',
            is_open=is_open,
        )
    return (
        f'<article class="card"><p class="text"><span class="prompt">{escape(prompt)}</span>'
        f'<span class="continuation">{escape(text)}</span></p>{real}</article>'
    )


def _position(position: dict) -> str:
    truth, candidates = (
        _token(position.get("truth")),
        _mappings(position.get("candidates"))[: MAX_SHOWN["candidates"]],
    )
    energies = [number(c.get("energy")) for c in candidates]
    truth_energy = number(position.get("truth_energy"))
    with_energy = any(e == e for e in [*energies, truth_energy])
    rows = []
    for candidate, energy in zip(candidates, energies):
        rows.append(
            _candidate(
                _token(candidate.get("token")),
                number(candidate.get("probability")),
                energy,
                with_energy,
                is_truth=candidate.get("token") == position.get("truth"),
            )
        )
    if candidates and all(c.get("token") != position.get("truth") for c in candidates):
        rows.append(_candidate(truth, math.nan, truth_energy, with_energy, is_truth=True))
    energy_head = '<th scope="col" class="value">energy</th>' if with_energy else ""
    return (
        f'<div><p class="context"><span class="prompt">…{escape(_cut(position.get("context"))[-160:])}</span><b>{escape(truth)}</b></p>'
        '<table><thead><tr><th scope="col">token</th><th scope="col" class="value">probability</th><th aria-hidden="true"></th>'
        f"{energy_head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _candidate(
    token: str, probability: float, energy: float, with_energy: bool, *, is_truth: bool
) -> str:
    known = probability == probability
    width = min(max(probability, 0.0), 1.0) * 100 if known else 0
    cell = (
        f'<td class="value">{show(energy) if energy == energy else "–"}</td>' if with_energy else ""
    )
    return (
        f'<tr{" class=truth" if is_truth else ""}><td class="token">{escape(token)}{" ✓ true" if is_truth else ""}</td>'
        f'<td class="value">{f"{probability:.1%}" if known else "not listed"}</td>'
        f'<td aria-hidden="true"><span class="bar"><i style="width:{width:.1f}%"></i></span></td>{cell}</tr>'
    )


def _facts(run: Run, baseline: Run | None) -> str:
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
    if run.training:
        last = run.training[-1]
        facts += [
            ("Seen in training", f"{int(last[f'{unit}_seen']):,} {unit}")
            for unit in ("tokens", "frames")
            if math.isfinite(number(last.get(f"{unit}_seen")))
        ]
        for name, key, unit in (
            ("Median step time", "step_time_s", "s"),
            ("Median throughput", "tokens_per_s", "tokens per second"),
            ("Median throughput", "frames_per_s", "frames per second"),
            ("Model compute", "model_tflops", "TFLOP/s"),
        ):
            value = median(run.training, key)
            facts.append((name, f"{show(value)} {unit}" if value == value else ""))
        mfu = median(run.training, "mfu")
        facts.append(
            (
                "Model FLOPs utilisation",
                f"{mfu:.1%}"
                if mfu == mfu
                else "not measured (no accelerator, or its peak is not known)",
            )
        )
        peak = max(
            (v for v in (number(row.get("peak_memory_gib")) for row in run.training) if v == v),
            default=math.nan,
        )
        facts.append(("Peak memory", f"{show(peak)} GiB" if peak == peak else ""))
    if run.validation:
        finite = [row for row in run.validation if math.isfinite(final_loss(row))]
        if finite:
            best = min(finite, key=final_loss)
            facts.append(
                ("Lowest validation loss", f"{show(final_loss(best))} at step {best['step']:,}")
            )
        for unit in ("tokens", "frames"):
            count = run.validation[-1].get(f"num_{unit}")
            facts.append(("Validation", f"{count:,} {unit}" if isinstance(count, int) else ""))
    if baseline:
        facts.append(
            ("Compared with", f"{baseline.name} ({baseline.label}, {baseline.last_step:,} steps)")
        )
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
        for name, value in facts
        if value not in ("", None)
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _parameters(run: Run) -> dict[str, int]:
    """Parameters by part with their total last; empty when they are not known."""
    parts = (run.summary or {}).get("parameters")
    parts = (
        {str(k): v for k, v in parts.items() if isinstance(v, int)}
        if isinstance(parts, dict)
        else {}
    )
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
    heads += [f"after step {i + 1}" if run.refines else "loss" for i in range(count)]
    more = (
        {"perplexity": "perplexity"}
        if run.is_text
        else {"copying the last frame": "copy_last_loss", "going straight on": "linear_loss"}
    )
    heads += more
    body = []
    for row in shown:
        losses = losses_of(row)
        body.append(
            [f"{row['step']:,}"]
            + [_cell(row.get("initial_loss"))] * run.refines
            + [_cell(losses[i]) if i < len(losses) else "–" for i in range(count)]
            + [_cell(row.get(key)) for key in more.values()]
        )
    every = f", one of {stride}" if stride > 1 else ""
    return _folded(
        f"Validation numbers ({len(rows):,} evaluations{every})",
        _table(heads, body, numeric=set(heads)),
    )


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    text = redacted(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    return _folded("Resolved configuration", f'<pre tabindex="0">{escape(text)}</pre>')


def _events(run: Run) -> str:
    if not run.events:
        return ""
    counted = Counter(str(event.get("event", "unnamed"))[:40] for event in run.events).most_common(
        8
    )
    left = max(len(run.events) - MAX_SHOWN["events"], 0)
    body = []
    for event in run.events[left:]:
        more = redacted(
            ", ".join(
                f"{key}: {value}"
                for key, value in event.items()
                if key not in ("time", "event", "step")
            )
        )
        body.append([*(_cut(event.get(key))[:40] for key in ("time", "event", "step")), more[:400]])
    note = (
        f'<p class="small muted">The {left:,} events before these are in events.jsonl.</p>'
        if left
        else ""
    )
    return _folded(
        f"Events ({', '.join(f'{count:,} {name}' for name, count in counted)})",
        note + _table(["time", "event", "step", "more"], body, numeric={"step"}),
    )


def _table(heads: list[str], rows: list[list[str]], *, numeric: set[str]) -> str:
    kinds = [' class="value"' if head in numeric else "" for head in heads]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(heads, kinds))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _folded(title: str, content: str, *, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{escape(title)}</summary>{content}</details>"


def _mappings(value: Any) -> list[dict]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _cell(value: Any) -> str:
    return "–" if value is None else show(number(value))


def _cut(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= MAX_SHOWN["text"] else text[: MAX_SHOWN["text"]] + "…"


def _token(value: Any) -> str:
    """A token with its blanks made visible, since a space in front is part of it."""
    return _cut(value)[:80].replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(empty)"
