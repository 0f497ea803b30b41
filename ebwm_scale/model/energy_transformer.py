"""The energy transformer: E(context, candidate next state), one number per position.

    context = network.encode_context(observed)      once per landscape: K and V, anchor, readout
    energy  = network.energy(embedded, context)     any number of times

`encode_context` in parts, for `refinement.reencode`, where the last blocks of the observed stream
are passed again with the predictions e added to it:

    front   = network.advance(network.start(observed), landscape, network.first_reencoded)
    stream  = network.add_predictions(front, e)     o_t + U e_t
    context = network.context_of(network.advance(stream, landscape, number of blocks))

Looped (`model.loops` n), the observed stream is read n times, as a looped baseline reads it
(baseline.py), and candidates see the last pass:

    h_1 = blocks(o)      h_(i+1) = blocks(h_i + o)      what is encoded: h_(n-1) + o

The observed stream passes all blocks, the predicted stream the last `model.predicted_layers` of
them. `model.predicted_input: anchored` adds to a candidate what the observed stream has where the
predicted one enters: the embedding of o_t, or, in front of a later block, its state at position t.
Both have seen o_1 .. o_t only. `model.energy_head` says what the energy is made of behind the
last block (energy_head.py).

In a sequence of groups of P positions, row t is cell t % P of the candidate for the next group. It
sees the observed groups up to its own whole, and all P candidates of its group. So a row's energy
depends on its whole group, and only the sum over a group's rows has a meaning of its own.
Conditions (conditions.py) are further rows of the observed groups: what is said of position t above
is said of the states alone.

Step conditioning (`model.conditioning`) tells refinement steps apart by a landscape index:
    default         not at all
    time_embed      a learned token per landscape stands in front of the context, at position 0
    adaln           shift, scale and gate of every block and of the final norm come from a
                    landscape embedding
    adaln_zero      the same, starting from zero: every block starts as the identity, the energy
                    as 0
    predicted_only  the same for the predicted stream alone, starting as `default`; so all
                    landscapes share one context
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import ModelConfig
from ebwm_scale.model.blocks import Block, initialize_released
from ebwm_scale.model.conditions import states_of, with_empty_conditions
from ebwm_scale.model.context import Context, ObservedStream
from ebwm_scale.model.energy_head import ContentTerms
from ebwm_scale.model.module_list import ModuleList
from ebwm_scale.model.norm import Modulation, RMSNorm
from ebwm_scale.model.rotary import Rotary, RotaryTable
from ebwm_scale.model.sequence import SequencePart

Advance = Callable[..., ObservedStream]
"""As EnergyTransformer.advance."""


class EnergyTransformer(nn.Module):
    """Blocks on two streams, a final norm, and a head that gives the energy.

    content_scale: a constant on the head's terms in the candidate (energy_head.py).
    group_size, grid: how the positions are grouped, see RotaryTable.
    num_conditions: further rows of each observed group, see conditions.py.
    reencoded_blocks: how many blocks, the last ones, the observed stream passes again.
    workspace: its width, or None; workspace_scale: a constant on the head's term in it.
    Raises ValueError for groups of several rows under time_embed, whose token would stand in front
    of the first.
    """

    head: nn.Linear | None  # of the linear term
    content: ContentTerms | None  # the other terms
    landscape_embedding: nn.Embedding | None
    modulations: ModuleList[nn.Linear] | None
    final_modulation: nn.Linear | None
    feedback: nn.Linear | None  # U: predictions into the observed stream
    workspace_map: nn.Linear | None  # Z: the workspace into the predicted stream
    workspace_feedback: nn.Linear | None  # Uz: the mapped workspace into the observed stream
    part: SequencePart | None = None  # this process's, of a sequence cut over several

    def __init__(
        self,
        config: ModelConfig,
        num_landscapes: int,
        content_scale: float = 1.0,
        group_size: int = 1,
        grid: tuple[int, int] | None = None,
        reencoded_blocks: int = 0,
        workspace: int | None = None,
        workspace_scale: float = 1.0,
        num_conditions: int = 0,
    ):
        super().__init__()
        context_group = group_size + num_conditions
        if context_group > 1 and config.conditioning == "time_embed":
            raise ValueError(
                f"model.conditioning is time_embed with groups of {context_group}: its token "
                "stands in front of the first group and belongs to none; "
                "use default, adaln, adaln_zero or predicted_only"
            )
        self.group_size = group_size
        self.num_loops = config.loops
        self.num_conditions = num_conditions
        self.conditioning = config.conditioning
        self.num_landscapes = num_landscapes
        sizes = model_sizes(config)
        width = sizes.width
        self.is_anchored = config.predicted_input == "anchored"
        self.first_predicted = sizes.num_layers - sizes.predicted_layers
        self.first_reencoded = sizes.num_layers - reencoded_blocks if reencoded_blocks else 0
        self.layers = ModuleList(
            Block(config, group_size, num_conditions, grid) for _ in range(sizes.num_layers)
        )
        self.norm = RMSNorm(width, config.norm_epsilon, config.attention_backend)
        self.head = None
        self.content = None
        if "linear" in config.energy_head:
            self.head = nn.Linear(width, 1, bias=False)
        if config.energy_head != ("linear",):
            self.content = ContentTerms(
                width,
                config.energy_head,
                config.norm_epsilon,
                content_scale,
                None if workspace is None else workspace_scale,
                config.attention_backend,
            )
        self.rotary = RotaryTable(
            sizes.head_dimension, config.rope_theta, group_size, grid, num_conditions
        )
        self.landscape_embedding = None
        if self.conditioning != "default":
            self.landscape_embedding = nn.Embedding(num_landscapes, width)
        self.modulations = None
        self.final_modulation = None
        if self.conditioning in ("adaln", "adaln_zero", "predicted_only"):
            # Of predicted_only the observed stream has none, so blocks in front need none.
            first = self.first_predicted if self.conditioning == "predicted_only" else 0
            self.modulations = ModuleList(
                nn.Linear(width, 6 * width) for _ in range(first, sizes.num_layers)
            )
            self.final_modulation = nn.Linear(width, 2 * width)
        self.feedback = None
        if reencoded_blocks:
            self.feedback = nn.Linear(width, width, bias=False)
        initialize_released(self)
        self.workspace_map = None
        self.workspace_feedback = None
        if workspace is not None:
            self.workspace_map = nn.Linear(workspace, width, bias=False)
            nn.init.normal_(self.workspace_map.weight, std=workspace**-0.5)
            if reencoded_blocks:
                self.workspace_feedback = nn.Linear(width, width, bias=False)
        for linear in (self.feedback, self.workspace_feedback):
            if linear is not None:
                nn.init.zeros_(linear.weight)  # so that a fresh model's contexts are all alike
        if self.content is not None:
            self.content.initialize(zero=self.conditioning == "adaln_zero")
        if self.conditioning in ("adaln_zero", "predicted_only"):
            assert self.modulations is not None and self.final_modulation is not None
            for linear in [*self.modulations, self.final_modulation]:
                nn.init.zeros_(linear.weight)
        if self.conditioning == "adaln_zero" and self.head is not None:
            nn.init.zeros_(self.head.weight)

    @property
    def context_group(self) -> int:
        """Rows of a group in the observed stream."""
        return self.group_size + self.num_conditions

    @property
    def shares_context(self) -> bool:
        """Whether one encoded context serves every landscape."""
        return one_context_serves_all(self.conditioning, self.num_landscapes)

    @property
    def predicted_blocks(self) -> list[Block]:
        """The blocks that the predicted stream passes."""
        return list(self.layers)[self.first_predicted :]

    @property
    def reads_output(self) -> bool:
        """Whether the head reads the observed stream's last output: its context term does."""
        return self.content is not None and self.content.context is not None

    def context_key(self, landscape: int) -> int:
        """Which encoded context a landscape reads: equal keys, equal contexts."""
        return 0 if self.shares_context else landscape

    def prepend_landscape(self, observed: Tensor, landscape: int) -> tuple[Tensor, int]:
        """(observed rows with the landscape's token in front, how many rows that is)."""
        if self.conditioning != "time_embed":
            return observed, 0
        assert self.landscape_embedding is not None
        token = self.landscape_embedding.weight[landscape].expand(observed.shape[0], 1, -1)
        return torch.cat([token, observed], 1), 1

    def encode_context(
        self, observed: Tensor, landscape: int = 0, first_visible: Tensor | None = None
    ) -> Context:
        """What the predicted stream reads of the observed one (B, S, D); first_visible: Context."""
        stream = self.start(observed, landscape, first_visible)
        return self.context_of(self.advance(stream, landscape, len(self.layers)))

    def start(
        self,
        observed: Tensor,
        landscape: int,
        first_visible: Tensor | None = None,
        advance: Advance | None = None,
    ) -> ObservedStream:
        """The observed stream (B, S, D) in front of the first block, before its last pass.

        first_visible: Context. advance: what takes it through the passes before; default: ours.
        """
        advance = advance or self.advance
        rows, offset = self.prepend_landscape(observed, landscape)
        stream = ObservedStream(rows, offset, first_visible=first_visible)
        for _ in range(self.num_loops - 1):
            passed = advance(stream, landscape, len(self.layers), whole=True)
            stream = replace(stream, rows=passed.rows + rows)
        return stream

    def advance(
        self, stream: ObservedStream, landscape: int, stop: int, *, whole: bool = False
    ) -> ObservedStream:
        """The stream in front of block `stop`; stop = number of blocks: behind the last one, where
        the head reads it, or with `whole`.
        """
        if stop == stream.block:
            return stream
        modulations, _ = self.modulations_of(landscape, predicted=False)
        rows = stream.rows
        rotary = self.observed_rotary(rows)
        keys_values = list(stream.keys_values)
        entry = stream.entry
        for index in range(stream.block, stop):
            layer = self.layers[index]
            if index == self.first_predicted:
                entry = rows
            if whole or self.goes_behind(index):
                keys, values, rows = layer.observed_with_keys(
                    rows, rotary, modulations[index], stream.first_visible
                )
            else:
                keys, values = layer.keys_values(rows, rotary, modulations[index])
            if index >= self.first_predicted:
                keys_values.append((keys, values))
        return replace(stream, rows=rows, block=stop, keys_values=tuple(keys_values), entry=entry)

    def goes_behind(self, block: int) -> bool:
        """Whether the last pass of the observed stream is read behind a block.

        Of the last one only the keys and values are, unless the head reads more.
        """
        return block + 1 < len(self.layers) or self.reads_output

    def add_predictions(
        self, stream: ObservedStream, embedded: Tensor, workspace: Tensor | None = None
    ) -> ObservedStream:
        """o_t + U e_t + Uz w_t, of position t's own candidate and workspace, (B, S, D) each."""
        assert self.feedback is not None, "refinement.reencode gives the map"
        change = self.feedback(embedded)
        if workspace is not None:
            assert self.workspace_feedback is not None, "a workspace comes with its map"
            change = change + self.workspace_feedback(workspace)
        change = with_empty_conditions(change, self.group_size, self.num_conditions)
        if stream.offset:
            change = F.pad(change, (0, 0, stream.offset, 0))
        return replace(stream, rows=stream.rows + change)

    def context_of(self, stream: ObservedStream) -> Context:
        """What the predicted stream reads of the observed one behind the last block."""
        anchor = None
        if self.is_anchored:
            assert stream.entry is not None, "the stream has passed all blocks"
            anchor = self._states_of(stream.entry[:, stream.offset :])
        readout = None
        if self.reads_output:
            assert self.content is not None
            readout = self.content.readout(self._states_of(stream.rows[:, stream.offset :]))
        return self.context(
            list(stream.keys_values), stream.offset, anchor, readout, stream.first_visible
        )

    def context(
        self,
        keys_values: list[tuple[Tensor, Tensor]],
        offset: int,
        anchor: Tensor | None,
        readout: Tensor | None,
        first_visible: Tensor | None,
    ) -> Context:
        """A Context of this network's groups."""
        return Context(
            keys_values,
            offset,
            anchor,
            readout,
            first_visible,
            self.group_size,
            self.context_group,
            self.part,
        )

    def _states_of(self, rows: Tensor) -> Tensor:
        return states_of(rows, self.group_size, self.num_conditions)

    def energy(
        self,
        embedded: Tensor,
        context: Context,
        landscape: int = 0,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """Energies (B, S) of embedded candidates (B, S, D), with their mapped workspaces or none.

        Row t is a candidate for position t + 1, given observed positions 0 .. t; with groups for
        position t + P, given the groups up to that of t, and beside the candidates of its group.
        """
        modulations, final = self.modulations_of(landscape, predicted=True)
        rotary = self.predicted_rotary(embedded, context)
        predicted = entering(embedded, workspace, context)
        for layer, keys_values, modulation in zip(
            self.predicted_blocks, context.keys_values, modulations
        ):
            predicted = layer.forward_predicted(
                predicted, keys_values, rotary, context.offset, modulation, context.first_visible
            )
        return self.energy_head(predicted, final, embedded, context.readout, workspace)

    def observed_rotary(self, rows: Tensor) -> Rotary:
        """Rotations of the observed rows (B, offset + S, D)."""
        if self.part is None:
            return self.rotary(rows.shape[1], rows)
        whole = self.part.front + self.part.length * self.part.group.size
        return self.part.observed_rotary(self.rotary(whole, rows))

    def predicted_rotary(self, predicted: Tensor, context: Context) -> Rotary:
        """p_t stands where the real o_(t+1) would, with groups o_(t+P)."""
        if self.context_group > 1:
            first_group = context.offset // self.context_group + 1
            return self.rotary.of_states(first_group, predicted.shape[1], predicted)
        first = context.offset + 1
        return self.rotary(first + predicted.shape[1], predicted).slice(first, predicted.shape[1])

    def energy_head(
        self,
        predicted: Tensor,
        final: tuple[Tensor, Tensor] | None,
        embedded: Tensor,
        readout: Tensor | None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """Energies (B, S) of the predicted stream (B, S, D) behind the last block.

        final: (shift, scale) of its norm, where there are any. embedded (B, S, D): the candidates
        that entered, workspace: what entered beside them. readout: that of the context.
        """
        normed = self.normed_output(predicted, final)
        return self.energy_of_normed(normed, embedded, readout, workspace)

    def energy_of_normed(
        self,
        normed: Tensor,
        embedded: Tensor,
        readout: Tensor | None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """`energy_head` from its normed input (B, S, D) on."""
        if self.content is None:
            assert self.head is not None, "a head has a term"
            return self.head(normed).squeeze(-1)
        energy = self.content.energy(normed, embedded, readout, workspace)
        assert energy is not None, "a head has a term"
        if self.head is not None:
            energy = energy + self.head(normed).squeeze(-1)
        return energy

    def normed_output(self, predicted: Tensor, final: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the head reads of the predicted stream (B, S, D)."""
        if final is None:
            return self.norm(predicted)
        return self.norm(predicted, *final)

    def modulations_of(
        self, landscape: int, *, predicted: bool
    ) -> tuple[Sequence[Modulation | None], tuple[Tensor, Tensor] | None]:
        """(one Modulation or None per block, (shift, scale) of the final norm) for a stream.

        One per block that the stream passes.
        """
        first = self.first_predicted if predicted else 0
        unconditioned = self.conditioning == "predicted_only" and not predicted
        if self.modulations is None or unconditioned:
            return [None] * (len(self.layers) - first), None
        assert self.landscape_embedding is not None and self.final_modulation is not None
        signal = F.silu(self.landscape_embedding.weight[landscape])
        linears = list(self.modulations)
        if self.conditioning != "predicted_only":
            linears = linears[first:]
        modulations = [Modulation(*linear(signal).chunk(6)) for linear in linears]
        if self.conditioning == "predicted_only":
            modulations = [_count_gates_from_one(modulation) for modulation in modulations]
        shift, scale = self.final_modulation(signal).chunk(2)
        return modulations, (shift, scale)


def entering(embedded: Tensor, workspace: Tensor | None, context: Context) -> Tensor:
    """What enters the predicted stream: e + w + anchor, (B, S, D), as far as they are there."""
    predicted = embedded
    if workspace is not None:
        predicted = predicted + workspace
    if context.anchor is not None:
        predicted = predicted + context.anchor
    return predicted


def one_context_serves_all(conditioning: str, num_landscapes: int) -> bool:
    """Whether the observed stream is the same in every landscape."""
    return conditioning in ("default", "predicted_only") or num_landscapes == 1


def _count_gates_from_one(modulation: Modulation) -> Modulation:
    """So that zero weights mean `default`."""
    return modulation._replace(
        attention_gate=1 + modulation.attention_gate,
        feed_forward_gate=1 + modulation.feed_forward_gate,
    )
