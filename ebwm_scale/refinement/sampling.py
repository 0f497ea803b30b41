"""The random numbers of refinement: initial states, step sizes, Langevin noise.

Every number is addressed by (seed, training step, sample, position), see refinement/noise.py, so
that nothing depends on processes, batches or tiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.refinement.noise import NoiseSource, Purpose
from ebwm_scale.refinement.step_plan import StepPlan


class NoiseSampler(Protocol):
    """The random numbers of one refinement, wherever they come from.

    Training: TrainingNoise. Parity: recorded ones.
    """

    def slice(self, samples: slice, positions: slice) -> NoiseSampler:
        """The same numbers for a part of the batch."""
        ...

    def initial_state(self) -> Tensor:
        """x_0 (B, S, size); the caller's to overwrite."""
        ...

    def starts_at_zero(self) -> bool:
        """Whether x_0 is known to be 0 everywhere, so that nobody has to look at it."""
        ...

    def initial_workspace(self) -> Tensor:
        """z_0 (B, S, width), of a model with a workspace."""
        ...

    def step_size_factor(self) -> Tensor | float:
        """Factor on alpha: a number or (B, S, 1)."""
        ...

    def langevin(self, step: int) -> Tensor | None:
        """(B, S, size) added to the state before a step, or None."""
        ...


def initial_state(
    kind: str,
    shape: tuple[int, int, int],
    *,
    normal: Callable[[], Tensor],
    last: Tensor | None,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """x_0 of the given shape (B, S, size), of training and of thinking; the caller's to overwrite.

    kind: `state.initial`: "random_noise" takes it from `normal`, "zeros", or "most_recent", which
    starts from `last`, the last observed state (B, 1 or S, size). Only the first draws numbers.
    """
    if kind == "most_recent":
        if last is None:
            raise ValueError("state.initial most_recent needs the last observed state")
        last = last.to(device=device, dtype=dtype)
        return last.expand(shape).clone()
    if kind == "zeros":
        return torch.zeros(shape, device=device, dtype=dtype)
    return normal()


class TrainingNoise:
    """The random numbers of a batch of samples in training and validation.

    source: addresses of this training step. config: `refinement`. shape: (B, S, size).
    kind: `state.initial`. noise_scale, step_size_scale: this step's point of the schedules.
    randomize False (validation): no random step sizes and no Langevin noise; x_0 stays random but
    is always the same for a sample.
    last_observed: (B, S, size), for kind "most_recent".
    restart: (rows (n,), states (n, S, size)) of samples that go on from the replay buffer.
    workspace: its width, or None. workspace_kind: `state.workspace_initial`.
    first_position: of the batch's, counted from the start of a sample (model/sequence.py).
    """

    def __init__(
        self,
        source: NoiseSource,
        config: RefinementConfig,
        sample_ids: Tensor,
        shape: tuple[int, int, int],
        *,
        kind: str,
        noise_scale: float = 1.0,
        step_size_scale: float = 1.0,
        randomize: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        last_observed: Tensor | None = None,
        restart: tuple[Tensor, Tensor] | None = None,
        workspace: int | None = None,
        workspace_kind: str = "zeros",
        first_position: int = 0,
    ):
        self.source = source
        self.config = config
        self.sample_ids = sample_ids
        self.first_position = first_position
        self.positions = slice(first_position, first_position + shape[1])
        self.size = shape[2]
        self.kind = kind
        self.langevin_scale = config.noise * noise_scale
        self.step_size_scale = step_size_scale
        self.randomize = randomize
        self.device = device
        self.dtype = dtype
        self.last_observed = last_observed
        self.restart = restart
        self.workspace = workspace
        self.workspace_kind = workspace_kind

    def slice(self, samples: slice, positions: slice) -> TrainingNoise:
        """The same numbers for a part of the batch."""
        part = copy.copy(self)
        part.sample_ids = self.sample_ids[samples]
        first = self.first_position
        part.positions = slice(first + positions.start, first + positions.stop)
        if self.last_observed is not None:
            part.last_observed = self.last_observed[samples, positions]
        if self.restart is not None:
            rows, states = self.restart
            inside = (rows >= samples.start) & (rows < samples.stop)
            part.restart = None
            if inside.any():
                part.restart = (rows[inside] - samples.start, states[inside, positions])
        return part

    def initial_state(self) -> Tensor:
        """x_0 (B, S, size)."""
        state = initial_state(
            self.kind,
            (len(self.sample_ids), self._num_positions, self.size),
            normal=lambda: self._normal(Purpose.INITIAL_STATE),
            last=self.last_observed,
            device=self.device,
            dtype=self.dtype,
        )
        if self.restart is not None:
            rows, states = self.restart
            state[rows] = states.to(device=self.device, dtype=self.dtype)
        return state

    def starts_at_zero(self) -> bool:
        """`state.initial: zeros`, and no sample goes on from the replay buffer."""
        return self.kind == "zeros" and self.restart is None

    def initial_workspace(self) -> Tensor:
        """z_0 (B, S, width)."""
        if self.workspace is None:
            raise ValueError("state.workspace is absent: there is no workspace to start")
        width = self.workspace
        return initial_state(
            self.workspace_kind,
            (len(self.sample_ids), self._num_positions, width),
            normal=lambda: self._normal(Purpose.WORKSPACE, width),
            last=None,
            device=self.device,
            dtype=self.dtype,
        )

    def step_size_factor(self) -> Tensor | float:
        """The schedule's factor, times one per position that is uniform in [1 / r, r]."""
        r = self.config.step_size_random_factor
        if not self.randomize or r == 1:
            return self.step_size_scale
        uniform = self.source.uniform(
            self.sample_ids,
            self.positions.stop,
            purpose=Purpose.STEP_SIZE,
            device=self.device,
            dtype=self.dtype,
        )
        return self.step_size_scale * (1 / r + (r - 1 / r) * uniform[:, self.positions])

    def langevin(self, step: int) -> Tensor | None:
        """N(0, 1) times the noise's deviation (B, S, size); None without noise."""
        if not self.randomize or self.langevin_scale == 0:
            return None
        return self._normal(Purpose.LANGEVIN + step).mul_(self.langevin_scale)

    @property
    def _num_positions(self) -> int:
        return self.positions.stop - self.positions.start

    def _normal(self, purpose: int, size: int | None = None) -> Tensor:
        """N(0, 1) (B, S, size); default: of the state's size."""
        return self.source.normal(
            self.sample_ids,
            self._num_positions,
            self.size if size is None else size,
            purpose=purpose,
            first_position=self.positions.start,
            device=self.device,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class DrawnNoise:
    """Random numbers that were drawn before a refinement, of a whole batch (graphed.py).

    state (B, S, size), overwritten by who asks for it; None: zeros that nobody asks for.
    workspace (B, S, width); factor: a number or (B, S, 1); of_langevin: one per planned step.
    """

    state: Tensor | None
    workspace: Tensor | None
    factor: Tensor | float
    of_langevin: tuple[Tensor | None, ...]

    @classmethod
    def draw(
        cls, noise: NoiseSampler, plan: Sequence[StepPlan], *, with_workspace: bool
    ) -> DrawnNoise:
        """What the planned steps will ask for."""
        langevin = tuple(noise.langevin(step.index) for step in plan)
        starts_at_zero = noise.starts_at_zero() and langevin[0] is None
        return cls(
            None if starts_at_zero else noise.initial_state(),
            noise.initial_workspace() if with_workspace else None,
            noise.step_size_factor(),
            langevin,
        )

    def tensors(self) -> Iterator[Tensor]:
        """All that is a tensor."""
        for value in (self.state, self.workspace, self.factor, *self.of_langevin):
            if isinstance(value, Tensor):
                yield value

    def form(self) -> Hashable:
        """What two draws have in common that one recording serves: shapes, and plain numbers."""
        values = (self.state, self.workspace, self.factor, *self.of_langevin)
        return tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in values)

    def held(self) -> DrawnNoise:
        """The same at addresses of its own."""
        return self._with(lambda tensor: tensor.clone())

    def slice(self, samples: slice, positions: slice) -> DrawnNoise:
        """The same numbers for a part of the batch."""
        return self._with(lambda tensor: tensor[samples, positions])

    def initial_state(self) -> Tensor:
        """x_0 (B, S, size)."""
        assert self.state is not None, "it starts at zero"
        return self.state

    def starts_at_zero(self) -> bool:
        """Whether nobody has to look at x_0."""
        return self.state is None

    def initial_workspace(self) -> Tensor:
        """z_0 (B, S, width)."""
        assert self.workspace is not None, "it was drawn for a model with a workspace"
        return self.workspace

    def step_size_factor(self) -> Tensor | float:
        """Factor on alpha: a number or (B, S, 1)."""
        return self.factor

    def langevin(self, step: int) -> Tensor | None:
        """(B, S, size), or None."""
        return self.of_langevin[step]

    def _with(self, change: Callable[[Tensor], Tensor]) -> DrawnNoise:
        return DrawnNoise(
            None if self.state is None else change(self.state),
            None if self.workspace is None else change(self.workspace),
            change(self.factor) if isinstance(self.factor, Tensor) else self.factor,
            tuple(None if one is None else change(one) for one in self.of_langevin),
        )
