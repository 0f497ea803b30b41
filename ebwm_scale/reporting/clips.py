"""The clips of a video run as plain values for the report: context, candidates with their energies,
the truth, and a continuation.
"""

from __future__ import annotations

import re
from typing import Any

from ebwm_scale.reporting.curves import number
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.plain import mappings, page_text

MAX_CLIPS, MAX_FRAMES = 12, 64
_IMAGE = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+")


def clips_of(samples: dict | None, *, refines: bool) -> list[dict[str, Any]]:
    """samples["clips"] for templates/clips.html.j2; empty without any."""
    listed = mappings((samples or {}).get("clips"), MAX_CLIPS)
    return [_clip(item, refines) for item in listed]


def _clip(item: dict, refines: bool) -> dict[str, Any]:
    title = page_text(str(item.get("video", "unnamed")), 200)
    start = number(item.get("start_s"))
    if start == start:
        title += f", from {start:.2f} s"
    first = item.get("first")
    return {
        "title": title,
        "frames": _context(item) + _candidates(item, refines) + [_truth(item, refines)],
        "first": first if isinstance(first, int) else "?",
        "own": _continuation(item, "continuation", "continuation_loss", "+{}", ""),
        "real": _continuation(
            item, "continuation_truth", "continuation_persistence_loss", "truth", "copying "
        ),
    }


def _context(item: dict) -> list[dict]:
    images = _list(item.get("context"))
    frames = [_frame(image, f"context {i + 1 - len(images)}") for i, image in enumerate(images)]
    if images:
        frames[-1] = _frame(images[-1], "last seen", _loss(item.get("persistence_loss")))
    return frames


def _candidates(item: dict, refines: bool) -> list[dict]:
    frames = []
    for candidate in mappings(item.get("candidates"), MAX_FRAMES):
        step = candidate.get("step")
        if not refines:
            title = "prediction"
        elif step == 0:
            title = "initial state"
        else:
            title = f"after step {step if isinstance(step, int) else '?'}"
        lines = [title, _loss(candidate.get("loss"))]
        if refines:
            lines.append(f"energy {show(number(candidate.get('energy')))}")
        frames.append(_frame(candidate.get("image"), *lines, kind="candidate"))
    return frames


def _truth(item: dict, refines: bool) -> dict:
    lines = ["truth", "0"]
    if refines:
        lines.append(f"energy {show(number(item.get('truth_energy')))}")
    return _frame(item.get("truth"), *lines, kind="truth")


def _continuation(item: dict, images: str, losses: str, title: str, what: str) -> list[dict]:
    """Frames with a loss each; the list of losses may be shorter."""
    values = _list(item.get(losses))
    kind = "candidate" if images == "continuation" else "truth"
    frames = []
    for i, image in enumerate(_list(item.get(images))):
        loss = _loss(values[i]) if i < len(values) else "–"
        frames.append(_frame(image, title.format(i + 1), what + loss, kind=kind))
    return frames


def _frame(image: Any, *lines: str, kind: str = "") -> dict:
    """An image is shown only as a data: URI of a picture; anything else could be fetched."""
    shown = image if isinstance(image, str) and _IMAGE.fullmatch(image) else None
    return {"image": shown, "lines": lines, "kind": kind}


def _loss(value: Any) -> str:
    loss = number(value)
    return show(loss) if loss == loss else "–"


def _list(value: Any) -> list:
    return value[:MAX_FRAMES] if isinstance(value, list) else []
