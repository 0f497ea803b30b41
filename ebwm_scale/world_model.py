"""The model that is trained: observed states in, a loss out. START HERE.

    observed stream -> K, V (network.encode_context) -> refinement -> loss   (kind: energy)
    observed stream -> hidden state -> next state -> loss      (kind: baseline, maybe looped)

The observed stream holds states (tokens, frames or a frame's patches) and, where the data has them,
conditions such as actions behind each frame (model/conditions.py).

Energy-based or Transformer++, for text or for frame embeddings. The refinement itself is in
refinement/loop.py, the networks are in model/. In training, gradients of an energy model are
computed inside `forward`, step by step; `loss.backward()` only hands them out. So an engine sees
one ordinary module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebwm_kernels.vocabulary.formulas import Clamps, state_dtype
from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE, LEAST_COUNT
from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import UserError
from ebwm_scale.model.baseline import (
    BaselineTransformer,
    Output,
    TwoLinearOutput,
    initialize_output,
)
from ebwm_scale.model.conditions import (
    ConditionEmbeddings,
    Conditions,
    interleaved,
    refuse_conditions,
)
from ebwm_scale.model.documents import document_starts, last_document
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.model.groups import regroup
from ebwm_scale.model.projection import Projection
from ebwm_scale.model.sequence import SequenceGroup, SequencePart, cut
from ebwm_scale.model.states import EmbeddingState, VocabularyState
from ebwm_scale.model.width_scaling import scale_initial
from ebwm_scale.model.workspace import WorkspaceState
from ebwm_scale.refinement.block_recompute import gathered
from ebwm_scale.refinement.exits import EXITS
from ebwm_scale.refinement.graphed import GraphedRefinement
from ebwm_scale.refinement.loop import MIN_STEP_SIZE, refine
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.refinement.step_plan import num_landscapes


@dataclass
class StepOutput:
    """What a batch gives.

    loss: scalar with graph. loss_per_step, energy_per_step: (N,) float tensors without graph. Of a
    baseline loss_per_step has a loss of each pass that is scored, and there is no energy.
    state: final states or None. initial_loss: the criterion of x_0 itself, in eval mode.
    """

    loss: Tensor
    loss_per_step: Tensor
    energy_per_step: Tensor | None
    state: Tensor | None = None
    initial_loss: Tensor | None = None


@dataclass(frozen=True)
class _Given:
    """What of a batch this process refines and scores.

    observed, targets, conditions: as `WorldModel.forward` takes them, of its own positions.
    first_visible: of all positions, see WorldModel.first_visible. part: its positions, where
    several processes share the samples; num_scored: see Targets.
    """

    observed: Tensor
    targets: Tensor
    conditions: Conditions | None
    first_visible: Tensor | None
    part: SequencePart | None = None
    num_scored: Tensor | None = None


class WorldModel(nn.Module):
    """An energy model or Transformer++, with its embeddings.

    config: resolved, with model.vocabulary_size (text) or state.dimension (frames) set.
    """

    network: EnergyTransformer | BaselineTransformer
    token_embedding: nn.Embedding  # of text
    frame_projection: nn.Linear  # of frames
    condition_embeddings: ConditionEmbeddings | None  # of data with conditions
    output: Output | TwoLinearOutput  # of a baseline
    step_size: nn.Parameter  # of an energy model
    workspace_step_size: nn.Parameter  # of an energy model with a workspace
    exit_logits: nn.Parameter | None  # of an energy model whose exits are learned
    state_map: nn.Parameter  # of an energy model of text that is not tied to token_embedding
    sequence: SequenceGroup | None = None  # the processes that share each sample in `forward`

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.graphs = GraphedRefinement()
        model = config.model
        width = resolved.model_sizes(model).width
        size = resolved.state_size(config)
        group_size = resolved.group_size(config)
        grid = resolved.grid(config)
        num_conditions = resolved.num_conditions(config)
        if config.state.kind == "vocabulary":
            self.token_embedding = nn.Embedding(size, width)  # N(0, 1), as released
        else:
            self.frame_projection = Projection(size, width)
            nn.init.xavier_normal_(self.frame_projection.weight)
            nn.init.zeros_(self.frame_projection.bias)
        self.condition_embeddings = None
        self.exit_logits = None
        if num_conditions:
            self.condition_embeddings = ConditionEmbeddings(config.data.conditions, width)
        if model.kind == "baseline":
            self.network = BaselineTransformer(model, group_size, grid, num_conditions)
            if config.state.kind == "vocabulary":
                self.output = Output(width, size, bias=False)
                self.output.clamps = Clamps(soft=model.logit_softcap)
                self.output.backend = model.attention_backend
            elif model.output == "one_linear":
                self.output = Output(width, size, bias=True)
            else:
                self.output = TwoLinearOutput(width, size)
            initialize_output(self.output, predicts=model.predicts)
            scale_initial(self, model)
            return
        refinement = config.refinement
        content_scale = 1 / (refinement.step_size * config.state.map_scale)  # energy_head.py
        self.network = EnergyTransformer(
            model,
            num_landscapes(refinement),
            content_scale,
            group_size,
            grid,
            resolved.reencoded_blocks(config),
            config.state.workspace,
            1 / refinement.workspace_step_size,
            num_conditions,
        )
        self.step_size = nn.Parameter(
            torch.tensor([float(refinement.step_size)]), requires_grad=refinement.learnable
        )  # (1,): engines want no 0-d ones
        if config.state.workspace is not None:
            self.workspace_step_size = nn.Parameter(
                torch.tensor([float(refinement.workspace_step_size)]),
                requires_grad=refinement.learnable,
            )
        if refinement.loss_weights == EXITS:
            self.exit_logits = nn.Parameter(torch.zeros(refinement.num_steps))
        if config.state.kind == "vocabulary" and not config.state.tie_embedding:
            self.state_map = nn.Parameter(torch.empty(size, width))
            nn.init.xavier_normal_(self.state_map)
        scale_initial(self, model)

    @property
    def state_size(self) -> int:
        """Numbers of a state: the vocabulary's size, or the dimension of a frame embedding."""
        return resolved.state_size(self.config)

    @property
    def energy_network(self) -> EnergyTransformer:
        """The network of an energy model; TypeError for a baseline."""
        if not isinstance(self.network, EnergyTransformer):
            raise TypeError("a baseline has no energies and no landscapes")
        return self.network

    def regroup(self, group_size: int, grid: tuple[int, int] | None) -> None:
        """Read sequences of other groups from now on, for example larger mazes than trained on.

        No parameter depends on them. Raises ValueError as RotaryTable does.
        """
        regroup(self.network, group_size, grid)
        data = self.config.data.replace(group_size=group_size, grid=grid)
        self.config = self.config.replace(data=data)

    def state_space(self) -> VocabularyState | EmbeddingState:
        """The state space on this model's parameters as they are now; build it once per use.

        Under `state.map_scale` it multiplies the whole map, V x D numbers.
        """
        clamps = Clamps(
            self.config.refinement.change_clamp,
            self.config.refinement.state_clamp,
            self.config.model.logit_softcap,
        )
        if self.config.state.kind == "embedding":
            return EmbeddingState(self.frame_projection, clamps)
        if self.config.state.tie_embedding:
            weight = self.token_embedding.weight
        else:
            weight = self.state_map
        if self.config.state.map_scale != 1:
            weight = weight * self.config.state.map_scale
        return VocabularyState(
            weight,
            self.config.refinement.update,
            clamps,
            num_candidates=resolved.num_candidates(self.config),
            backend=self.config.model.attention_backend,
        )

    def workspace(self) -> WorkspaceState | None:
        """The workspace on this model's parameters as they are now; None without one."""
        workspace_map = self.energy_network.workspace_map
        if workspace_map is None:
            return None
        beta = self.workspace_step_size.squeeze(0).clamp(min=MIN_STEP_SIZE)
        return WorkspaceState(workspace_map, beta)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Those that embed_observed reads."""
        if self.config.state.kind == "vocabulary":
            read = list(self.token_embedding.parameters())
        else:
            read = list(self.frame_projection.parameters())
        if self.condition_embeddings is not None:
            read += self.condition_embeddings.parameters()
        return read

    def embed_observed(self, observed: Tensor, conditions: Conditions | None = None) -> Tensor:
        """(B, S) token ids or (B, S, dimension) frame embeddings -> the observed stream (B, S, D).

        conditions: of each of the T groups, see model/conditions.py; their A tokens stand behind
        it, so that the stream is (B, T (P + A), D). Differentiable in them. Raises DataError for
        conditions that are missing, not those of this model, or of another shape.
        """
        if self.config.state.kind == "vocabulary":
            states = self.token_embedding(observed)
        else:
            states = self.frame_projection(observed.to(self.frame_projection.weight.dtype))
        if self.condition_embeddings is None:
            refuse_conditions(conditions)
            return states
        num_groups = observed.shape[1] // self.network.group_size
        return interleaved(states, self.condition_embeddings(conditions, len(observed), num_groups))

    def first_visible(self, observed: Tensor) -> Tensor | None:
        """(B, S) int32: where each position's document begins; None without data.mask_documents.

        observed: token ids (B, S).
        """
        if not self.config.data.mask_documents:
            return None
        return document_starts(observed, self._eos_id())

    def visible_prompt(self, prompt: Tensor) -> Tensor:
        """What the position after a prompt sees of it: under data.mask_documents its last document.

        prompt: token ids (S,), or states (S, dimension).
        """
        if not self.config.data.mask_documents:
            return prompt
        return last_document(prompt, self._eos_id())

    def _eos_id(self) -> int:
        eos_id = self.config.data.eos_id
        if eos_id is None:
            raise UserError(
                "data.mask_documents is true and data.eos_id absent: training takes it from the "
                "dataset; without one, give the id of the token between documents"
            )
        return eos_id

    def landscapes(self, num_steps: int) -> list[int]:
        """The landscape of each of num_steps steps.

        Steps beyond the trained ones stay in the last landscape.
        """
        last = self.energy_network.num_landscapes - 1
        return [min(i, last) for i in range(num_steps)]

    def forward(
        self,
        observed: Tensor,
        targets: Tensor,
        *,
        conditions: Conditions | None = None,
        sample_ids: Tensor,
        source: NoiseSource,
        num_steps: int | None = None,
        noise_scale: float = 1.0,
        step_size_scale: float = 1.0,
        keep_state: torch.dtype | None = None,
        restart: tuple[Tensor, Tensor] | None = None,
    ) -> StepOutput:
        """The loss of a batch.

        In training, gradients of an energy model are computed in here, step by step;
        `loss.backward()` only hands them out. In eval mode: the largest number of steps, no
        randomness but x_0, no second-order graph.

        observed, targets: (B, S) ids or (B, S, dimension) embeddings. conditions: of the observed
        groups, where the data has some. sample_ids: (B,) int64.
        num_steps, noise_scale, step_size_scale: this training step's point of the schedules.
        keep_state: return the final states, in this dtype. restart: (rows, states) from the
        replay buffer.

        With `sequence` set, each of its processes is given the whole samples, and refines and
        scores its own positions: means and gradients are over those, and the means of all
        processes' are what one process has. DataError unless all were given the same samples.
        """
        given = _Given(observed, targets, conditions, self.first_visible(observed))
        if self.sequence is not None:
            self.sequence.require_same(observed, sample_ids)
            given = self._own_part(given, self.sequence)
        with cut(self.network, given.part):
            if self.config.model.kind == "baseline":
                output = self._score_directly(given)
            else:
                with gathered(self.resident_parameters()):
                    output = self._refine(
                        given,
                        sample_ids,
                        source,
                        num_steps,
                        noise_scale,
                        step_size_scale,
                        keep_state,
                        restart,
                    )
        if resolved.has_masked_targets(self.config):
            return self._over_all_positions(output, targets)
        return output

    def _own_part(self, whole: _Given, sequence: SequenceGroup) -> _Given:
        """Of samples that several processes share, given whole."""
        energy = isinstance(self.network, EnergyTransformer)
        front = int(energy and self.config.model.conditioning == "time_embed")
        part = sequence.part(whole.observed.shape[1], front)
        # Engines average over processes: each scores over an n-th of what all of them score.
        # Gradients cross the exchange, so the factor has to be in the losses from the start.
        dtype = state_dtype(self.network.norm.weight)
        num_scored = (whole.targets != IGNORE).sum().to(dtype) / sequence.size
        return replace(
            whole,
            observed=part.own(whole.observed),
            targets=part.own(whole.targets),
            part=part,
            num_scored=num_scored,
        )

    def _over_all_positions(self, output: StepOutput, targets: Tensor) -> StepOutput:
        """Means over all positions, masked ones counting as 0; over the share of them that the
        data scores, where it says so.

        So sums of micro-batches do not depend on how a batch was cut.
        """
        share = (targets != IGNORE).double().mean() / resolved.scored_share(self.config)
        share = share.to(output.loss.dtype)
        return replace(
            output,
            loss=output.loss * share,
            loss_per_step=output.loss_per_step * share,
            initial_loss=None if output.initial_loss is None else output.initial_loss * share,
        )

    def resident_parameters(self) -> list[nn.Parameter]:
        """Those that are whole for the length of a step under ZeRO stage 3.

        That is all of them, or those outside the blocks (refinement/block_recompute.py).
        """
        if self.config.refinement.recompute != "block":
            return list(self.parameters())
        resident = []
        for name, parameter in self.named_parameters():
            if not name.startswith("network.layers."):
                resident.append(parameter)
        return resident

    def _refine(
        self,
        given: _Given,
        sample_ids,
        source,
        num_steps,
        noise_scale,
        step_size_scale,
        keep_state,
        restart,
    ) -> StepOutput:
        refinement = self.config.refinement
        weight = self.energy_network.norm.weight
        observed, targets, part = given.observed, given.targets, given.part
        noise = TrainingNoise(
            source,
            refinement,
            sample_ids,
            (observed.shape[0], observed.shape[1], self.state_size),
            kind=self.config.state.initial,
            noise_scale=noise_scale,
            step_size_scale=step_size_scale,
            randomize=self.training,
            device=weight.device,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            last_observed=observed if self.config.state.kind == "embedding" else None,
            restart=restart,
            workspace=self.config.state.workspace,
            workspace_kind=self.config.state.workspace_initial,
            first_position=0 if part is None else part.first,
        )
        result = refine(
            self,
            self.embed_observed(observed, given.conditions),
            targets,
            config=refinement,
            landscapes=self.landscapes(num_steps or refinement.num_steps),
            noise=noise,
            training=self.training,
            keep_state=keep_state,
            first_visible=given.first_visible,
            num_scored=given.num_scored,
        )
        assert result.loss is not None, "refine was given targets"
        initial_loss = None
        if not self.training:
            initial_loss = self._initial_loss(noise.initial_state(), given).detach()
        return StepOutput(
            result.loss,
            torch.stack(result.loss_per_step),
            torch.stack(result.energy_per_step),
            result.state,
            initial_loss,
        )

    def _initial_loss(self, state: Tensor, given: _Given) -> Tensor:
        space = self.state_space()
        if given.num_scored is None:
            return space.loss(state, given.targets)
        losses = space.loss(state, given.targets, reduction="none")
        return losses.sum() / given.num_scored.clamp(min=LEAST_COUNT)

    def _score_directly(self, given: _Given) -> StepOutput:
        """Of a baseline. In eval mode every loop is scored, in training as model.loop_loss says."""
        network = self.network
        assert isinstance(network, BaselineTransformer)
        observed, first_visible = given.observed, given.first_visible
        embedded = self.embed_observed(observed, given.conditions)
        scores_every = self.config.model.loop_loss == "every"
        if scores_every or not self.training:
            hidden = network.after_each_loop(embedded, first_visible)
        else:
            hidden = [network(embedded, first_visible)]
        z_terms = [torch.zeros((), dtype=state_dtype(h), device=h.device) for h in hidden]
        losses = torch.stack(
            [self._baseline_loss(h, observed, given.targets, z) for h, z in zip(hidden, z_terms)]
        )
        z_losses = torch.stack(z_terms)
        if given.num_scored is not None:
            scored_here = (given.targets != IGNORE).sum()
            share = scored_here / given.num_scored.clamp(min=LEAST_COUNT)
            losses = losses * share
            z_losses = z_losses * share
        loss = losses.mean() if scores_every else losses[-1]
        return StepOutput(loss, losses.detach() - z_losses, None)

    def predict_directly(self, observed: Tensor, conditions: Conditions | None = None) -> Tensor:
        """A baseline's predictions (B, S, size) of the state after each of the observed ones."""
        return self.prediction_of(self.baseline_hidden(observed, conditions), observed)

    def baseline_hidden(self, observed: Tensor, conditions: Conditions | None) -> Tensor:
        """A baseline's hidden states (B, S, D) at observed states."""
        embedded = self.embed_observed(observed, conditions)
        return self.network(embedded, self.first_visible(observed))

    def prediction_of(self, hidden: Tensor, last: Tensor) -> Tensor:
        """A baseline's predictions (B, S, size) of its hidden states; last: the states there."""
        prediction = self.output(hidden)
        if self.config.model.predicts == "change":
            wide = torch.float64 if prediction.dtype == torch.float64 else torch.float32
            return prediction.to(wide) + last.to(wide)
        return prediction

    def _baseline_loss(
        self, hidden: Tensor, observed: Tensor, targets: Tensor, z_sum: Tensor | None = None
    ) -> Tensor:
        """z_sum (): receives the part of the z-loss, which only training has."""
        if self.config.state.kind == "vocabulary":
            z_weight = self.config.train.z_loss if self.training else 0.0
            return self.output(hidden, targets, z_weight=z_weight, z_sum=z_sum)
        prediction = self.prediction_of(hidden, observed)
        wide = torch.float64 if prediction.dtype == torch.float64 else torch.float32
        return F.smooth_l1_loss(prediction.to(wide), targets.to(wide), beta=1.0)
