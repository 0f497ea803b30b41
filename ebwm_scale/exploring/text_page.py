"""A prompt and its continuation as values for templates/explore_text.html.j2: for each position the
candidates of one or two models, step by step.

The models are given the same tokens: those of the prompt, and those that the first one chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.data.tokenizer import Tokenizer
from ebwm_scale.exploring.request import FIELDS, TextRequest
from ebwm_scale.inference.step_by_step import LINE_POINTS, View, continued, look
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.reporting.line_chart import Curve, line_chart
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.plain import page_text
from ebwm_scale.reporting.plane_chart import plane_chart
from ebwm_scale.world_model import WorldModel

MAX_SHOWN = 2_000  # characters of the text before the first position
CONTEXT_TOKENS = 12  # before a position
DRAWN = 5  # candidates
OFF_PLANE = 0.01  # of a path's extent: what is less is not said


@dataclass(frozen=True)
class NamedModel:
    """A trained model, and what its page calls it."""

    name: str
    model: WorldModel

    @property
    def thinks(self) -> bool:
        return self.model.config.model.kind == "energy"

    @property
    def kind(self) -> str:
        return "energy model" if self.thinks else "Transformer++"


@dataclass(frozen=True)
class TextExplorer:
    """One or two models of text with one tokenizer."""

    models: Sequence[NamedModel]
    tokenizer: Tokenizer

    def answer(self, request: TextRequest) -> dict[str, Any]:
        """The values of a page for a request; UserError for one that a model cannot follow."""
        first_model = self.models[0]
        device = next(first_model.model.parameters()).device
        prompt = torch.tensor(
            self.tokenizer.encode(request.prompt) or [self.tokenizer.eos_id], device=device
        )
        length = resolved.context_length(first_model.model.config)
        notes = []
        if len(prompt) > length:
            notes.append(
                f"The prompt of {len(prompt):,} tokens is cut to its last {length}, the context."
            )
            prompt = prompt[-length:]
        tokens = continued(
            first_model.model,
            prompt,
            request.max_new,
            self._thinking(first_model, request),
            request.sampling,
            self.tokenizer.eos_id,
        ).to(device)
        first = max(1, len(prompt) - request.num_positions)
        found: list[list[View]] = []
        also: list[list[int]] = []
        for each in self.models:
            views = look(
                each.model,
                tokens,
                first,
                self._thinking(each, request),
                settled=request.strip,
                also=also,
            )
            also = also or [view.candidates[:DRAWN] for view in views]
            found.append(views)
        return self._values(request, tokens, len(prompt), first, found, notes)

    def form(self, request: TextRequest) -> dict[str, Any]:
        """The values of a page that has no answer yet."""
        return {
            "prompt": request.prompt,
            "fields": _fields(request),
            "accepts": request.accept_only_if_lower,
            "thinks": any(each.thinks for each in self.models),
            "asked": _told(request),
            "notes": [],
            "positions": [],
        }

    def _thinking(self, each: NamedModel, request: TextRequest) -> ThinkingConfig:
        return request.thinking if each.thinks else ThinkingConfig(seed=request.seed)

    def _values(
        self,
        request: TextRequest,
        tokens: Tensor,
        num_prompt: int,
        first: int,
        found: list[list[View]],
        notes: list[str],
    ) -> dict[str, Any]:
        ids = tokens.tolist()
        positions = []
        most = max((view.settles_after or 0 for view in found[0]), default=0)
        for index, place in enumerate(range(first, len(ids))):
            steps = found[0][index].settles_after
            before = self.tokenizer.decode(ids[max(0, place - CONTEXT_TOKENS) : place])
            positions.append(
                {
                    "number": place,
                    "piece": self._piece(ids[place]),
                    "is_prompt": place < num_prompt,
                    "context": page_text(before),
                    "steps": "" if steps is None else str(steps),
                    "heat": 0 if steps is None else round(steps / max(most, 1), 2),
                    "views": [
                        self._view(each, views[index], ids[place], f"{place}-{number}")
                        for number, (each, views) in enumerate(zip(self.models, found))
                    ],
                }
            )
        return self.form(request) | {
            "before": page_text(self.tokenizer.decode(ids[:first])[-MAX_SHOWN:]),
            "continuation": page_text(self.tokenizer.decode(ids[num_prompt:])),
            "strip": show(request.strip),
            "positions": positions,
            "notes": notes,
        }

    def _piece(self, token: int) -> str:
        return page_text(self.tokenizer.piece(token), 40)

    def _view(self, each: NamedModel, view: View, here: int, key: str) -> dict[str, Any]:
        moments = [*view.moments, *([view.one_more] if view.one_more is not None else [])]
        last = len(view.moments) - 1
        rows = []
        for number, token in enumerate(view.candidates):
            chances = [moment.probabilities[number] for moment in moments]
            rows.append(
                {
                    "piece": self._piece(token),
                    "is_here": token == here,
                    "chances": [show(chance) for chance in chances],
                    "widths": [f"{100 * chance:.1f}" for chance in chances],
                    "energy": "" if view.certain is None else show(view.certain[number]),
                }
            )
        return {
            "key": key,
            "name": each.name,
            "kind": each.kind,
            "thinks": each.thinks,
            "last": last,
            "moments": [_moment_name(number, last) for number in range(len(moments))],
            "energies": ["" if m.energy is None else show(m.energy) for m in moments],
            "rows": rows,
            "has_certain": view.certain is not None,
            "sentences": self._sentences(view),
            "charts": [chart for chart in self._charts(view) if chart is not None],
            "plane": _plane(view),
            "plane_sentence": self._plane_sentence(view),
        }

    def _sentences(self, view: View) -> list[str]:
        lines = []
        if view.steps is None or view.moments[-1].energy is None:
            return lines
        taken = f"{view.steps} {'step' if view.steps == 1 else 'steps'} taken"
        if view.accepted != view.steps:
            taken += f", {view.accepted} of them accepted"
        if view.num_starts > 1:
            taken += f"; start {view.start + 1} of {view.num_starts} ended lowest"
        lines.append(f"{taken}.")
        if view.one_more is not None and view.one_more.energy is not None:
            top = view.candidates[0]
            lines.append(
                f"One more step would take the energy from {show(view.moments[-1].energy)} to "
                f"{show(view.one_more.energy)}, and the probability of “{self._piece(top)}” from "
                f"{show(view.moments[-1].probabilities[0])} to "
                f"{show(view.one_more.probabilities[0])}."
            )
        return lines

    def _plane_sentence(self, view: View) -> str:
        """What the directions are, and how much of the path they show."""
        if view.plane is None:
            return ""
        up = "the one in which the path departs most from it"
        if not view.plane.plane.up_is_path:
            up = f"towards “{self._piece(view.candidates[min(1, len(view.candidates) - 1)])}”"
        text = f"To the right: from the first state to the last. Upwards: {up}."
        off = view.plane.plane.off_plane
        if off > OFF_PLANE:
            text += f" The path leaves the plane by {off:.0%} of its extent: seen from above."
        return text

    def _charts(self, view: View) -> list[dict[str, Any] | None]:
        if view.steps is None:
            return []
        moments = [*view.moments, *([view.one_more] if view.one_more is not None else [])]
        steps = [moment.num_steps for moment in moments]
        every = max(1, len(steps) // 8)
        energies = [float("nan") if m.energy is None else m.energy for m in moments]
        chances = []
        for number, token in enumerate(view.candidates[:DRAWN]):
            values = [moment.probabilities[number] for moment in moments]
            chances.append(Curve(self._piece(token), steps, values))
        share = [number / (LINE_POINTS - 1) for number in range(LINE_POINTS)]
        lines = [Curve(f"to {self._piece(line.end)}", share, line.energies) for line in view.lines]
        start = self._piece(view.lines[0].start) if view.lines else ""
        return [
            line_chart(
                "Energy of the prediction",
                [Curve("energy", steps, energies)],
                x_label="refinement steps taken",
                y_label="Energy, in the landscape of each step; no unit",
                x_ticks=steps[::every],
            ),
            line_chart(
                "Candidates",
                chances,
                x_label="refinement steps taken",
                y_label="Probability",
                x_ticks=steps[::every],
                y_range=(0.0, 1.0),
            ),
            line_chart(
                f"Between “{start}” and others",
                lines,
                x_label=f"share of the other token beside “{start}”",
                y_label="Energy of a mixture of two tokens, in the last landscape; no unit",
                x_ticks=[0.0, 0.5, 1.0],
            ),
        ]


def _plane(view: View) -> dict[str, Any] | None:
    if view.plane is None:
        return None
    plane = view.plane.plane
    return plane_chart(
        "Around the path of the steps",
        plane.xs,
        plane.ys,
        view.plane.energies,
        plane.path,
        x_label="distance from the last state",
        y_label="Energy (no unit) on a plane in the space of embeddings, in the last landscape",
    )


def _moment_name(number: int, last: int) -> str:
    if number == 0 and last > 0:
        return "before the first step"
    if number > last:
        return f"after step {number}, one more than asked for"
    return f"after step {number}"


def _fields(request: TextRequest) -> list[dict[str, Any]]:
    texts = request.texts()
    return [
        {
            "name": field.name,
            "label": field.label,
            "value": texts[field.name],
            "empty": field.empty or "",
            "mode": "numeric" if field.is_whole else "decimal",
            "thinks": field.thinks,
        }
        for field in FIELDS
    ]


def _told(request: TextRequest) -> str:
    """The request in a line, for a page without its form; what is not set is left out."""
    texts = request.texts()
    parts = [f"{field.label} {texts[field.name]}" for field in FIELDS if texts[field.name]]
    if request.accept_only_if_lower:
        parts.append("a step is accepted only if it lowers the energy")
    return "; ".join(parts)
