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
from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import ModelConfig
from ebwm_scale.model.blocks import Block, RMSNorm, initialize_released
from ebwm_scale.model.conditions import states_of
from ebwm_scale.model.module_list import ModuleList
from ebwm_scale.model.rotary import RotaryTable


class BaselineTransformer(nn.Module):
    """group_size, grid, num_conditions: how the positions are grouped, see RotaryTable."""

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
            Block(config, group_size, num_conditions) for _ in range(sizes.num_layers)
        )
        self.norm = RMSNorm(sizes.width, config.norm_epsilon)
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
        rotary = self.rotary(observed.shape[1], observed)
        hidden = observed
        for loop in range(num_loops):
            if loop > 0:
                hidden = hidden + observed
            for layer in self.layers:
                keys, values = layer.keys_values(hidden, rotary)
                hidden = layer.forward_observed(
                    hidden, keys, values, rotary, first_visible=first_visible
                )
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
    engine that partitions its weight sees it used.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(hidden)
        return vocabulary_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten())


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
