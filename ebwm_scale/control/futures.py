"""Futures under candidate actions: what a solver compares.

    situation = frames and conditions seen so far
    futures   = imagine_futures(model, situation, actions)     one for each candidate

Every candidate is imagined from the same noise, so that futures differ by their actions alone, and
a candidate's future does not depend on those beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebwm_scale.inference.imagination import ACTION, Imagined, Window, imagine
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel


@dataclass(frozen=True)
class Situation:
    """What was seen, in a model's units.

    states (c, P, dimension): of the last c frames. actions (c - 1, width): taken between them.
    sensed: by name, what else each frame is conditioned on, (c, width).
    """

    states: Tensor
    actions: Tensor
    sensed: dict[str, Tensor]

    @property
    def num_frames(self) -> int:
        return len(self.states)

    def last_frames(self, count: int) -> Situation:
        """Of the last frames alone."""
        if count >= self.num_frames:
            return self
        return replace(
            self,
            states=self.states[-count:],
            actions=self.actions[len(self.actions) - count + 1 :],
            sensed={name: values[-count:] for name, values in self.sensed.items()},
        )

    def conditions(self, actions: Tensor) -> dict[str, Tensor]:
        """Those of all frames but the last imagined one, by name, under further actions.

        actions: (N, H, width) from the last seen frame on, ids or numbers; or (N, H, width, values)
        probabilities. Returns (N, c - 1 + H, ..) each; what is sensed keeps its last value.
        """
        past = self.actions.expand(len(actions), *self.actions.shape)
        if actions.dim() > past.dim():  # probabilities of ids; those of the past are certain
            past = torch.nn.functional.one_hot(past, actions.shape[-1]).to(actions)
        result = {ACTION: torch.cat([past, actions], 1)}
        for name, values in self.sensed.items():
            ahead = values[-1:].expand(actions.shape[1] - 1, *values.shape[1:])
            known = torch.cat([values, ahead])
            result[name] = known.expand(len(actions), *known.shape)
        return result


def imagine_futures(
    model: WorldModel,
    situation: Situation,
    actions: Tensor,
    *,
    thinking: ThinkingConfig = ThinkingConfig(),
    energies: bool = False,
    batch_size: int = 64,
) -> Imagined:
    """H imagined frames for each of N candidates: states (N, H, P, dimension).

    actions: (N, H, width) from the last seen frame on. energies: those of each frame as well, of an
    energy model; they cost a pass more per frame.
    """
    parts = []
    names = model.config.data.conditions
    for some in actions.split(batch_size):
        conditions = situation.conditions(some)
        windows = []
        for number in range(len(some)):
            own = {each.name: conditions[each.name][number] for each in names}
            windows.append(Window("", 0, situation.states, own))
        parts.append(
            imagine(
                model,
                windows,
                num_context=situation.num_frames,
                num_steps=actions.shape[1],
                config=thinking,
                sample_ids=torch.zeros(len(some), dtype=torch.int64),
                energies=energies,
            )
        )
    return joined(parts)


def persistent_futures(situation: Situation, actions: Tensor) -> Imagined:
    """The futures of who knows no model: the last frame stays, whatever is done."""
    last = situation.states[-1]
    return Imagined(last.expand(*actions.shape[:2], *last.shape), None)


def joined(parts: list[Imagined]) -> Imagined:
    """Futures of several batches as those of one."""
    energies = [part.energies for part in parts if part.energies is not None]
    return Imagined(
        torch.cat([part.states for part in parts]),
        torch.cat(energies) if energies else None,
    )
