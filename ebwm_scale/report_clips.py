"""The clips of a video run as a part of the report: context, each candidate with its energy, the truth, and the model's own continuation."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from .report_plots import number, show

MAX_CLIPS, MAX_FRAMES = 12, 64
_IMAGE = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+")

CSS = """
.strip{display:flex;gap:6px;overflow-x:auto;padding:2px 0 10px}.frame{flex:0 0 auto;width:92px;margin:0}
.frame img,.frame .none{display:block;width:92px;height:92px;object-fit:cover;border-radius:4px;background:var(--grid)}
.frame figcaption{margin-top:3px;font-size:.75rem;line-height:1.25}.frame.truth img{outline:3px solid var(--good);outline-offset:-3px}
.frame.candidate img{outline:3px solid var(--curve3);outline-offset:-3px}
"""


def clips_section(samples: dict | None, *, refines: bool) -> str:
    """HTML of samples["clips"]; empty without any."""
    listed = (samples or {}).get("clips")
    listed = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if not listed:
        return ""
    energies = (
        " A lower energy means a better fit; the true frame's is beside it." if refines else ""
    )
    return (
        f'<h2>Clips</h2><p class="small muted">Held-out clips at the end of training. The model sees the context and predicts the next frame; every number '
        f"under a picture is its SmoothL1 distance from the true frame.{energies}</p>"
        f'<div class="stack">{"".join(_clip(item, refines) for item in listed[:MAX_CLIPS])}</div>'
    )


def _clip(item: dict, refines: bool) -> str:
    context = _list(item.get("context"))
    frames = [
        _frame(image, f"context {i + 1 - len(context)}" if i + 1 < len(context) else "last seen")
        for i, image in enumerate(context)
    ]
    frames[-1:] = (
        [_frame(context[-1], f"last seen<br>{_loss(item.get('copy_last_loss'))}")]
        if context
        else []
    )
    for candidate in _list(item.get("candidates")):
        if not isinstance(candidate, dict):
            continue
        step = candidate.get("step")
        title = (
            "prediction" if not refines else "initial state" if step == 0 else f"after step {step}"
        )
        energy = f"<br>energy {show(number(candidate.get('energy')))}" if refines else ""
        frames.append(
            _frame(
                candidate.get("image"),
                f"{title}<br>{_loss(candidate.get('loss'))}{energy}",
                "candidate",
            )
        )
    truth = f"<br>energy {show(number(item.get('truth_energy')))}" if refines else ""
    frames.append(_frame(item.get("truth"), f"truth<br>0{truth}", "truth"))
    start = number(item.get("start_s"))
    where = (
        f"{item.get('video', 'unnamed')}, from {start:.2f} s"
        if start == start
        else str(item.get("video", "unnamed"))
    )
    losses, copies = _list(item.get("continuation_loss")), _list(item.get("continuation_copy_loss"))
    own = [
        _frame(image, f"+{i + 1}<br>{_loss(losses[i] if i < len(losses) else None)}", "candidate")
        for i, image in enumerate(_list(item.get("continuation")))
    ]
    real = [
        _frame(image, f"truth<br>copying {_loss(copies[i] if i < len(copies) else None)}", "truth")
        for i, image in enumerate(_list(item.get("continuation_truth")))
    ]
    going_on = (
        f'<details><summary>A continuation of its own, from the first {item.get("first", "?")} frames on</summary><div class="strip">{"".join(own)}</div>'
        f'<div class="strip">{"".join(real)}</div></details>'
        if own
        else ""
    )
    return f'<article class="card"><h3>{escape(where)}</h3><div class="strip">{"".join(frames)}</div>{going_on}</article>'


def _frame(image: Any, caption: str, kind: str = "") -> str:
    """caption is HTML of ours: numbers only."""
    shown = (
        f'<img src="{image}" alt="">'
        if isinstance(image, str) and _IMAGE.fullmatch(image)
        else '<div class="none"></div>'
    )
    return f'<figure class="frame {kind}">{shown}<figcaption>{caption}</figcaption></figure>'


def _loss(value: Any) -> str:
    loss = number(value)
    return show(loss) if loss == loss else "–"


def _list(value: Any) -> list:
    return value[:MAX_FRAMES] if isinstance(value, list) else []
