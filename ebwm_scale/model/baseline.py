"""Transformer++: the same blocks on the observed stream alone.

It predicts the next state directly; of a sequence of groups, the state of the same place in the
next group, given all groups up to its own, with their conditions.

Looped (model.loops n), the same blocks are passed n times, and what enters the first pass is added
again before each further one:

    h_1 = blocks(x)      h_(i+1) = blocks(h_i + x)      prediction after pass i: output(norm(h_i))

That is the usual form of looped transformers (arXiv 2311.12424): a pass that is told the input
again can be the same step of an iterative algorithm each time, where h_i alone would have to carry
the input along. So it is the fair comparison for refinement: depth from the same parameters,
without an energy. One pass is Transformer++ itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ebwm_kernels import vocabulary_cross_entropy
from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, clamped_step
from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import ModelConfig
from ebwm_scale.model.blocks import Block, initialize_released
from ebwm_scale.model.conditions import states_of
from ebwm_scale.model.module_list import ModuleList
from ebwm_scale.model.norm import RMSNorm
from ebwm_scale.model.rotary import RotaryTable
from ebwm_scale.model.sequence import SequencePart


class BaselineTransformer(nn.Module):
    """group_size, grid, num_conditions: how the positions are grouped, see RotaryTable."""

    part: SequencePart | None = None  # this process's, of a sequence cut over several

    def __init__(
        self,
        config: ModelConfig,
        group_size: int = 1,
        grid: tuple[int, int] | None = None,
        num_conditions: int = 0,
    ):
        super().__init__()
        sizes = model_sizes(config)
        self.group_size = group_size
        self.num_loops = config.loops
        self.num_conditions = num_conditions
        self.layers = ModuleList(
            Block(config, group_size, num_conditions, grid) for _ in range(sizes.num_layers)
        )
        self.norm = RMSNorm(sizes.width, config.norm_epsilon, config.attention_backend)
        self.rotary = RotaryTable(
            sizes.head_dimension, config.rope_theta, group_size, grid, num_conditions
        )
        initialize_released(self)

    def forward(self, observed: Tensor, first_visible: Tensor | None = None) -> Tensor:
        """Hidden states (B, S, D) of the observed stream (B, S, D), after the last pass; of its
        states alone, where conditions stand between them.

        first_visible (B, S): the first position that each sees, the start of its document.
        """
        last = observed
        for hidden in self._passes(observed, first_visible, self.num_loops):
            last = hidden  # what left earlier passes need not be kept
        return self._read_out(last)

    def after_each_loop(
        self, observed: Tensor, first_visible: Tensor | None = None, num_loops: int | None = None
    ) -> list[Tensor]:
        """As forward, after each pass; num_loops: how many, also more than were trained."""
        passes = self._passes(observed, first_visible, num_loops or self.num_loops)
        return [self._read_out(hidden) for hidden in passes]

    def _passes(
        self, observed: Tensor, first_visible: Tensor | None, num_loops: int
    ) -> Iterator[Tensor]:
        """What leaves the blocks after each pass, (B, S, D)."""
        if self.part is None:
            rotary = self.rotary(observed.shape[1], observed)
        else:
            whole = self.part.length * self.part.group.size
            rotary = self.part.observed_rotary(self.rotary(whole, observed))
        hidden = observed
        for loop in range(num_loops):
            if loop > 0:
                hidden = hidden + observed
            for layer in self.layers:
                *_, hidden = layer.observed_with_keys(hidden, rotary, first_visible=first_visible)
            yield hidden

    def _read_out(self, hidden: Tensor) -> Tensor:
        """What is predicted from: the states of the stream, without their conditions."""
        return self.norm(states_of(hidden, self.group_size, self.num_conditions))

    @property
    def context_group(self) -> int:
        """Rows of a group in the observed stream."""
        return self.group_size + self.num_conditions

    def context_key(self, landscape: int) -> int:
        """It has one context and no landscapes; see EnergyTransformer.context_key."""
        return 0


class Output(nn.Linear):
    """Hidden states (B, S, D) to logits, or, given targets, to their loss.

    For the loss, logits exist a chunk at a time. One module serves both, so that an
    engine that partitions its weight sees it used. clamps: of logits (model.logit_softcap).
    z_weight, z_sum: of the z-loss, see ebwm_kernels.vocabulary_descend. backend: of the loss
    (model.attention_backend), see ebwm_kernels.pointwise.
    """

    clamps = NO_CLAMPS
    backend = "auto"

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        z_weight: float = 0.0,
        z_sum: Tensor | None = None,
    ) -> Tensor:
        if targets is not None:
            return vocabulary_cross_entropy(
                hidden.flatten(0, 1),
                self.weight,
                targets.flatten(),
                clamps=self.clamps,
                z_weight=z_weight,
                z_sum=z_sum,
                backend=self.backend,
            )
        return clamped_step(None, super().forward(hidden), self.clamps)


class TwoLinearOutput(nn.Module):
    """Hidden states (B, S, D) to frame embeddings (B, S, dimension) as released: D x D, then up,
    with a bias.
    """

    def __init__(self, width: int, dimension: int):
        super().__init__()
        self.hidden = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, dimension)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(self.hidden(hidden))


def initialize_output(output: nn.Module, *, predicts: str = "state") -> None:
    """Xavier weights and no bias, as released; predicts "change": a fresh one predicts none."""
    for name, parameter in output.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_normal_(parameter)
    if predicts == "change":
        last = output.up if isinstance(output, TwoLinearOutput) else output
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
