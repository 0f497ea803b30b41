"""How well a world model imagines, and judges: the measures of imagination.json.

    errors    SmoothL1 of imagined frames after 1, 2, 4 .. steps in the model's space, and PSNR and
              SSIM in pixels: beside copying the last frame (persistence), going on from the last
              two in a straight line, another model, and the model under another episode's actions
    judge     how often a real next frame has a lower energy than a wrong one: of another time, of
              another episode, or the real one under another action; the same by how far its
              energy lies above that of the model's own prediction in the same context, and by
              the prediction error of the model, and of the other one
    steps     the error of the next frame after each refinement step

Intervals are of a bootstrap over episodes; differences are paired by window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_scale.config import resolved
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.evaluation.clusters import auroc_ci, mean_ci
from ebwm_scale.evaluation.pixels import measure_pixels
from ebwm_scale.inference.generation import candidate_energies
from ebwm_scale.inference.imagination import ACTION, Window, imagine, with_actions_of
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.inference.windows import longest_window, windows_of
from ebwm_scale.world_model import WorldModel

FURTHER_STEPS = 2  # refinement steps beyond the trained ones whose error is measured


@dataclass(frozen=True)
class Imagination:
    """What is measured on: windows of c observed frames and the true ones behind them."""

    model: WorldModel
    windows: list[Window]
    num_context: int
    batch_size: int
    seed: int

    @property
    def episodes(self) -> list[str]:
        return [window.episode for window in self.windows]

    def of(
        self,
        model: WorldModel,
        windows: Sequence[Window],
        num_steps: int,
        config: ThinkingConfig | None = None,
        progress: Progress = no_progress,
        what: str = "imagining",
    ) -> Tensor:
        """Imagined states (n, k, P, dimension); window i draws the noise of sample i."""
        states = []
        firsts = range(0, len(windows), self.batch_size)
        for first in tracked(list(firsts), what, progress):
            part = windows[first : first + self.batch_size]
            imagined = imagine(
                model,
                part,
                num_context=self.num_context,
                num_steps=num_steps,
                config=config or ThinkingConfig(seed=self.seed),
                sample_ids=torch.arange(first, first + len(part)),
            )
            states.append(imagined.states)
        return torch.cat(states)


def evaluate_imagination(
    model: WorldModel,
    split,
    *,
    horizons: Sequence[int],
    max_windows: int,
    batch_size: int,
    seed: int,
    against: WorldModel | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The content of imagination.json.

    split: of a video dataset. horizons: numbers of imagined steps; those that no held-out episode
    is long enough for are left out, and named. against: a model of the same data.
    Raises UserError for another model that is not, or where no horizon fits.
    """
    if against is not None:
        refuse_another_space(model, against)
    of, observe, fitting = windows_ahead(
        model, split, horizons, max_windows=max_windows, batch_size=batch_size, seed=seed
    )
    windows, num_context = of.windows, of.num_context
    say(f"{len(windows)} windows of {len(set(of.episodes))} episodes; {fitting[-1]} steps ahead")
    result: dict[str, Any] = {
        "kind": model.config.model.kind,
        "num_windows": len(windows),
        "num_episodes": len(set(of.episodes)),
        "context_frames": num_context,
        "horizons": fitting,
        "horizons_left_out": sorted(set(horizons) - set(fitting)),
    }
    imagined = imagined_frames(of, fitting[-1], against, progress)
    result["errors"] = _errors(of, imagined, fitting)
    result["pixels"] = measure_pixels(
        windows, imagined, observe.space, num_context, fitting, of.episodes
    )
    say("judging next frames")
    result["judge"] = judged(of, against, progress)
    if model.config.model.kind == "energy":
        result["trained_steps"] = model.config.refinement.num_steps
        result["steps"] = _after_each_step(of, progress)
    return result


def windows_ahead(
    model: WorldModel,
    split,
    horizons: Sequence[int],
    *,
    max_windows: int,
    batch_size: int,
    seed: int,
) -> tuple[Imagination, Observation, list[int]]:
    """Windows of held-out episodes, and those of the horizons that fit into the longest one.

    Raises UserError where none fits.
    """
    observe = Observation(split.manifest, next(model.parameters()).device)
    num_context = max(1, (resolved.num_groups(model.config) + 1) // 2)
    longest = longest_window(split, observe) - num_context
    fitting = sorted(h for h in set(horizons) if h <= longest)
    if not fitting:
        raise UserError(
            f"--horizons {' '.join(map(str, sorted(horizons)))}: after {num_context} observed "
            f"frames the held-out episodes have {longest} more; ask for fewer steps"
        )
    windows = windows_of(
        split, observe, num_frames=num_context + fitting[-1], max_windows=max_windows
    )
    return Imagination(model, windows, num_context, batch_size, seed), observe, fitting


def refuse_another_space(model: WorldModel, against: WorldModel) -> None:
    """UserError for a model whose frames and conditions are not the same."""
    ours, theirs = model.config, against.config
    for name, get in (
        ("state.dimension", lambda config: config.state.dimension),
        ("data.group_size", resolved.group_size),
        ("data.conditions", lambda config: config.data.conditions),
    ):
        if get(ours) != get(theirs):
            raise UserError(
                f"--against: its {name} is not that of this run: compare models of the same data"
            )


def imagined_frames(
    of: Imagination,
    num_steps: int,
    against: WorldModel | None = None,
    progress: Progress = no_progress,
) -> dict[str, Tensor]:
    """Frames ahead (n, k, P, dimension) by who imagines them; the truth first."""
    states = torch.stack([window.states for window in of.windows])
    c = of.num_context
    last = states[:, c - 1 : c]
    steps = torch.arange(1, num_steps + 1, device=states.device)[:, None, None]
    speed = last - states[:, max(0, c - 2) : max(1, c - 1)]
    imagined = {
        "truth": states[:, c : c + num_steps],
        "model": of.of(of.model, of.windows, num_steps, progress=progress),
        "persistence": last.expand(-1, num_steps, -1, -1),
        "linear_extrapolation": last + steps * speed,
    }
    shuffled = shuffled_actions(of.windows, c)
    if shuffled is not None:
        imagined["shuffled_actions"] = of.of(
            of.model, shuffled, num_steps, progress=progress, what="under other actions"
        )
    if against is not None:
        imagined["against"] = of.of(
            against, of.windows, num_steps, progress=progress, what="the other model"
        )
    return imagined


def shuffled_actions(windows: Sequence[Window], num_context: int) -> list[Window] | None:
    """Each window with the actions of another episode from its last observed frame on; None where
    there are no actions, or no other episode.
    """
    others = _of_other_episodes(windows)
    if others is None or ACTION not in windows[0].conditions:
        return None
    return [
        with_actions_of(window, windows[other], num_context - 1)
        for window, other in zip(windows, others)
    ]


def _of_other_episodes(windows: Sequence[Window]) -> list[int] | None:
    """For each window the number of one of another episode; None where all are of one."""
    others = []
    for number, window in enumerate(windows):
        candidates = [
            (number + shift) % len(windows)
            for shift in range(1, len(windows))
            if windows[(number + shift) % len(windows)].episode != window.episode
        ]
        if not candidates:
            return None
        others.append(candidates[len(candidates) // 2])
    return others


def _errors(
    of: Imagination, imagined: dict[str, Tensor], horizons: Sequence[int]
) -> list[dict[str, Any]]:
    """Errors at each horizon, and by how much the model's are lower than each other one's."""
    rows = []
    for horizon in horizons:
        truth = imagined["truth"][:, horizon - 1]
        errors = {
            name: frame_errors(states[:, horizon - 1], truth)
            for name, states in imagined.items()
            if name != "truth"
        }
        row: dict[str, Any] = {"horizon": horizon}
        for name, values in errors.items():
            row[name] = mean_ci(values, of.episodes)
        for name, values in errors.items():
            if name != "model":
                row[f"gain_over_{name}"] = mean_ci(values - errors["model"], of.episodes)
        rows.append(row)
    return rows


def frame_errors(states: Tensor, truth: Tensor) -> Tensor:
    """(n,) mean SmoothL1 of frames (n, P, dimension)."""
    error = F.smooth_l1_loss(states, truth, beta=1.0, reduction="none")
    return error.mean((1, 2)).cpu()


def judged(
    of: Imagination, against: WorldModel | None = None, progress: Progress = no_progress
) -> dict[str, Any]:
    """By judge and kind of wrong frame: AUROC over all pairs, and the share within one context."""
    return {
        judge: {kind: told_apart(values) for kind, values in kinds.items()}
        for judge, kinds in judgements(of, against, progress).items()
    }


@dataclass(frozen=True)
class Judgements:
    """What a judge makes of real next frames and of wrong ones, (n,) each: lower is more real."""

    real: Tensor
    wrong: Tensor
    episodes: list[str]

    @property
    def lower(self) -> Tensor:
        """(n,): 1 where the real frame is lower than the wrong one of its context; a tie: 0.5."""
        return (self.real < self.wrong).double() + 0.5 * (self.real == self.wrong).double()


def judgements(
    of: Imagination, against: WorldModel | None = None, progress: Progress = no_progress
) -> dict[str, dict[str, Judgements]]:
    """By judge and kind of wrong frame."""
    wrong = _wrong_frames(of)
    others = _of_other_episodes(of.windows)
    judges: dict[str, Callable[[list[Window], list[Tensor]], list[Tensor]]] = {}
    if of.model.config.model.kind == "energy":
        judges["energy"] = lambda windows, frames: _energies(of, windows, frames, progress)
        judges["energy_above_prediction"] = lambda windows, frames: _above_prediction(
            of, windows, frames, progress
        )
    judges["prediction_error"] = lambda windows, frames: _distances(of, of.model, windows, frames)
    if against is not None:
        judges["prediction_error_of_against"] = lambda windows, frames: _distances(
            of, against, windows, frames
        )
    real = torch.stack([window.states[of.num_context] for window in of.windows])
    acted = _other_actions(of, others)
    result: dict[str, dict[str, Judgements]] = {}
    for name, judge in judges.items():
        of_real, *of_wrong = judge(of.windows, [real, *wrong.values()])
        result[name] = {}
        for kind, values in zip(wrong, of_wrong):
            result[name][kind] = Judgements(of_real, values, of.episodes)
        if acted is not None:
            rows, windows = acted
            (values,) = judge(windows, [real[rows]])
            episodes = [of.episodes[row] for row in rows]
            result[name]["another_action"] = Judgements(of_real[rows], values, episodes)
    return result


def told_apart(judgements: Judgements) -> dict[str, Any]:
    """AUROC over all pairs, and the share within one context."""
    return {
        "auroc": auroc_ci(judgements.real, judgements.wrong, judgements.episodes),
        "within_a_context": mean_ci(judgements.lower, judgements.episodes),
        "num_windows": len(judgements.real),
    }


def _wrong_frames(of: Imagination) -> dict[str, Tensor]:
    """By kind, a frame (n, P, dimension) for each window that is not its next one."""
    c = of.num_context
    frames = {}
    generator = torch.Generator().manual_seed(of.seed)
    at_other_times = []
    for window in of.windows:
        far = [t for t in range(window.num_frames) if abs(t - c) > 1]
        choice = far or [t for t in range(window.num_frames) if t != c]
        place = int(torch.randint(len(choice), (), generator=generator))
        at_other_times.append(window.states[choice[place]])
    frames["another_time"] = torch.stack(at_other_times)
    others = _of_other_episodes(of.windows)
    if others is not None:
        frames["another_episode"] = torch.stack([of.windows[other].states[c] for other in others])
    return frames


def _other_actions(
    of: Imagination, others: Sequence[int] | None
) -> tuple[list[int], list[Window]] | None:
    """The windows whose last observed action can be replaced by another one, and these with it."""
    if others is None or ACTION not in of.windows[0].conditions:
        return None
    c = of.num_context
    rows = []
    windows = []
    for row, window in enumerate(of.windows):
        own = window.conditions[ACTION][c - 1]
        for shift in range(len(of.windows)):
            other = of.windows[(others[row] + shift) % len(of.windows)]
            if not torch.equal(other.conditions[ACTION][c - 1], own):
                rows.append(row)
                windows.append(with_actions_of(window, other, c - 1))
                break
    return (rows, windows) if rows else None


def _energies(
    of: Imagination, windows: list[Window], frames: list[Tensor], progress: Progress
) -> list[Tensor]:
    """Energies (n,) of each list of next frames (n, P, dimension)."""
    c = of.num_context
    rows = []
    for number, window in enumerate(tracked(windows, "energies", progress)):
        candidates = torch.cat([each[number] for each in frames])[None]
        embedded = of.model.state_space().embed(candidates).vectors[0]
        conditions = {name: values[:c] for name, values in window.conditions.items()}
        rows.append(candidate_energies(of.model, window.context(c), embedded, conditions))
    return list(torch.stack(rows, 1).cpu())


def _above_prediction(
    of: Imagination, windows: list[Window], frames: list[Tensor], progress: Progress
) -> list[Tensor]:
    """Energies (n,) of each list of next frames over that of what the model predicts itself.

    Training tells the energy its slope and no level, so that contexts differ by a number that says
    nothing of the frame; the difference does not have it.
    """
    predicted = of.of(of.model, windows, 1)[:, 0]
    *found, own = _energies(of, windows, [*frames, predicted], progress)
    return [energies - own for energies in found]


def _distances(
    of: Imagination, model: WorldModel, windows: list[Window], frames: list[Tensor]
) -> list[Tensor]:
    """Distances (n,) of each list of next frames from what a model predicts."""
    predicted = of.of(model, windows, 1)[:, 0]
    return [frame_errors(predicted, each) for each in frames]


def _after_each_step(of: Imagination, progress: Progress) -> list[dict[str, Any]]:
    """The error of the next frame after each refinement step; the gain is over the step before."""
    rows: list[dict[str, Any]] = []
    before: Tensor | None = None
    for count, error in errors_after_steps(of, progress).items():
        row: dict[str, Any] = {"num_steps": count, "error": mean_ci(error, of.episodes)}
        if before is not None:
            row["gain_over_previous"] = mean_ci(before - error, of.episodes)
        rows.append(row)
        before = error
    return rows


def errors_after_steps(of: Imagination, progress: Progress = no_progress) -> dict[int, Tensor]:
    """By number of refinement steps, the errors (n,) of the next frames."""
    truth = torch.stack([window.states[of.num_context] for window in of.windows])
    errors = {}
    for count in range(1, of.model.config.refinement.num_steps + FURTHER_STEPS + 1):
        config = ThinkingConfig(num_steps=count, seed=of.seed)
        what = f"{count} refinement steps"
        states = of.of(of.model, of.windows, 1, config, progress, what)[:, 0]
        errors[count] = frame_errors(states, truth)
    return errors
