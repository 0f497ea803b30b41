"""Worlds whose best plans are known, for tests of planning: a square that actions push about.

`Walk` is an environment as Gymnasium has them, without that package. A dataset of its walks is
tests/data/worlds.py's. `LinearWorld` stands in for what a model has learned of it: states are the
square's place, and an action adds to it.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))

import world_sources as sources  # noqa: F401  from here, so that its folder is known
from worlds import BRIGHT, MOVES, SIDE, write_world

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.control import joint_energy, planner
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.inference.imagination import Imagined
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.world_model import WorldModel

SIZE = 16


class Discrete:
    """As gymnasium.spaces.Discrete."""

    def __init__(self, n, start=0):
        self.n, self.start, self.shape, self.dtype = n, start, (), np.dtype(np.int64)
        self.seed(0)

    def seed(self, seed):
        self.draws = np.random.Generator(np.random.PCG64(seed))


class MultiDiscrete(Discrete):
    """As gymnasium.spaces.MultiDiscrete."""

    def __init__(self, nvec):
        super().__init__(0)
        self.nvec = np.array(nvec)
        self.shape = self.nvec.shape


class Box(Discrete):
    """As gymnasium.spaces.Box."""

    def __init__(self, low, high, shape):
        super().__init__(0)
        self.low, self.high = np.full(shape, low, np.float32), np.full(shape, high, np.float32)
        self.shape, self.dtype = shape, np.dtype(np.float32)


class Walk:
    """A square of a frame; an action moves it by so many pixels, of which whole ones are seen.

    target: (row, column) where info says success; None: it says nothing, and the episode ends with
    a reward of 5 in the corner (0, 0).
    """

    def __init__(self, *, continuous=True, target=None, start=None, fails_at=None, reward=-1.0):
        self.action_space = Box(-1, 1, (2,)) if continuous else Discrete(len(MOVES))
        self.continuous, self.target, self.start = continuous, target, start
        self.fails_at, self.reward, self.metadata, self.taken = fails_at, reward, {}, []

    def reset(self, *, seed=None):
        draws = np.random.Generator(np.random.PCG64(seed))
        self.place = draws.integers(SIZE - SIDE + 1, size=2)
        if self.start is not None:
            self.place = np.array(self.start)
        self.taken = []
        return self.place.astype(np.float32), {}

    def step(self, action):
        if len(self.taken) == self.fails_at:
            raise RuntimeError("the wheel fell off")
        self.taken.append(action)
        move = action if self.continuous else MOVES[action]
        self.place = np.clip(self.place + move, 0, SIZE - SIDE)
        pixel = np.rint(self.place).astype(int)
        observation, info = self.place.astype(np.float32), {}
        if self.target is not None:
            info["success"] = bool((pixel == self.target).all())
            return observation, 0.0, False, False, info
        done = bool((pixel == 0).all())
        return observation, 5.0 if done else self.reward, done, False, info

    def close(self):
        self.metadata = None

    def render(self):
        return frame_at(np.rint(self.place).astype(int))


def frame_at(place):
    """The frame uint8 (16, 16, 3) with the square at (row, column)."""
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    frame[:, :, 2] = 40
    row, column = place
    frame[row : row + SIDE, column : column + SIDE] = BRIGHT
    return frame


def world(folder, **options):
    """(manifest) of a dataset of walks."""
    return load_manifest(write_world(folder, **options))


def model_of(manifest, **changes):
    """A fresh tiny model of a dataset, in eval mode, and its configuration."""
    model = {"num_layers": 1, "width": 16, "num_heads": 2, **changes.pop("model", {})}
    sections = {
        "model": model,
        "state": {"kind": "embedding", "initial": "most_recent"},
        "refinement": {"step_size": 3.0},
        "data": {"manifest": str(manifest.path)},
    }
    if model.get("kind") == "baseline":
        del sections["refinement"], sections["state"]["initial"]
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    config = fill_from_data(config_from_dict(sections), manifest)
    torch.manual_seed(0)
    return WorldModel(config).eval(), config


class LinearWorld:
    """What a planner is told instead of what a model imagines: a place (1, 2) that actions push.

    A frame's state is its square's place in units of `scale` pixels. Actions are stored ones: moves
    in pixels, or ids of MOVES.
    """

    def __init__(self, spec, scale=4.0):
        self.spec, self.scale = spec, scale
        self.asked = 0

    def states(self, frames):
        places = []
        for frame in frames:
            rows, columns = np.nonzero(frame[:, :, 0] > BRIGHT // 2)
            places.append([rows.min() / self.scale, columns.min() / self.scale])
        return torch.tensor(places, dtype=torch.float32)[:, None]

    def moves(self, actions):
        """(N, H, 2) in units of places; of probabilities the expected ones."""
        table = torch.tensor(MOVES, dtype=torch.float32) / self.scale
        if not self.spec.is_discrete:
            mean, std = self.spec.observe.statistics("action")
            return (actions * std + mean) / self.scale
        if actions.is_floating_point():
            return (actions @ table.to(actions))[:, :, 0]
        return table[actions[..., 0]]

    def imagine_futures(self, model, situation, actions, *, energies=False, **options):
        self.asked += len(actions)
        states = situation.states[-1] + self.moves(actions).cumsum(1)[:, :, None]
        return Imagined(states, torch.zeros(actions.shape[:2]) if energies else None)

    def transition_energies(self, model, situation, states, actions):
        before = situation.states[-1].expand(len(states), 1, *states.shape[2:])
        before = torch.cat([before, states[:, :-1]], 1)
        residual = states - before - self.moves(actions)[:, :, None]
        return residual.square().sum((-2, -1)) / 2

    def put_into(self, monkeypatch, plans):
        """Have a planner see and imagine this world."""
        monkeypatch.setattr(planner, "imagine_futures", self.imagine_futures)
        monkeypatch.setattr(joint_energy, "transition_energies", self.transition_energies)
        monkeypatch.setattr(plans, "states_of", self.states)
        monkeypatch.setattr(plans, "shown", self.shown)

    def shown(self, states):
        places = (states[:, 0] * self.scale).round().int().tolist()
        return np.stack([frame_at(place) for place in places])
