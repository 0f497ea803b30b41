"""A whole refinement as one CUDA graph: the host launches a tile's steps once, and replays them.

A step of a small model is hundreds of short kernels per block, and the host takes longer to launch
them than the GPU to run them. Nothing in a refinement reads a number back, its gradients are
computed inside it, and engines' hooks fire outside (deferred_backward.py). So all of it is recorded
at fixed addresses once, and then replayed as one launch:

    each batch       inputs and drawn noise are copied into the recording's tensors
                     replay: observed stream, steps, inner gradients, double backward, sums
                     loss.backward() hands the sums out, and hooks see ordinary gradients

A recording serves batches that are alike: in shapes, planned steps, factors that are plain numbers,
and addresses of parameters. A kind of batch is recorded when it comes again, after WARM_UP eager
runs, which compile what has to be compiled. Everything else runs eagerly, with the same numbers,
and why is said once.

The gradients lie in the recordings' tensors until they are handed out: a loss has to be
back-propagated before the next refinement of the same model.

No GPU has run this. Tests replay recordings of operations (tests/refinement/test_graphed.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model.rotary import RotaryTable
from ebwm_scale.refinement.deferred_backward import CollectedSums
from ebwm_scale.refinement.sampling import DrawnNoise, NoiseSampler
from ebwm_scale.refinement.step_plan import StepPlan

WARM_UP = 2  # eager runs of a kind of batch before it is recorded
MAX_GRAPHS = 4  # of a model: each keeps gradients of its own
MAX_KINDS = 64  # of batches that are remembered before they come again
DEVICES = ("cuda",)


@dataclass
class RefinementResult:
    """loss: scalar with graph, None without targets; everything else is detached.

    energy_per_step[i] is the mean energy before step i, loss_per_step[i] the loss after it, without
    the z-loss that is in `loss`.
    state: the final state (B, S, size), where it was asked for.
    """

    loss: Tensor | None
    loss_per_step: list[Tensor]
    energy_per_step: list[Tensor]
    state: Tensor | None

    def copied(self) -> RefinementResult:
        """The same in memory of its own."""
        return RefinementResult(
            None if self.loss is None else self.loss.clone(),
            [loss.clone() for loss in self.loss_per_step],
            [energy.clone() for energy in self.energy_per_step],
            None if self.state is None else self.state.clone(),
        )


@dataclass(frozen=True)
class GivenTensors:
    """What a refinement is given.

    observed (B, S, D) with its graph; targets (B, S) or (B, S, size); first_visible (B, S);
    num_scored (): see Targets.
    """

    observed: Tensor
    targets: Tensor | None
    first_visible: Tensor | None
    num_scored: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        for tensor in (self.observed, self.targets, self.first_visible, self.num_scored):
            if tensor is not None:
                yield tensor

    def held(self) -> GivenTensors:
        """Tensors of the same kind and contents, at addresses of their own, without the graph."""

        def hold(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        observed = hold(self.observed)
        assert observed is not None
        rest = (self.targets, self.first_visible, self.num_scored)
        return GivenTensors(observed, *map(hold, rest))


@dataclass
class Computed:
    """result: its loss has no graph yet. gradients: of everything the loss depends on."""

    result: RefinementResult
    gradients: CollectedSums | None


Compute = Callable[[GivenTensors, NoiseSampler], Computed]
Capture = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass
class Recording:
    """A refinement of one kind of batch: what it reads, what it writes, and how it is run again.

    tables: what else it reads; held here, since the model makes others for longer sequences.
    """

    given: GivenTensors
    noise: DrawnNoise
    tables: list[Tensor]
    computed: Computed
    replay: Callable[[], None]

    def run(self, given: GivenTensors, noise: DrawnNoise) -> None:
        """Refine another batch of the same kind into `computed`."""
        with torch.no_grad():
            for held, new in zip(self.given.tensors(), given.tensors()):
                held.copy_(new)
            for held, new in zip(self.noise.tensors(), noise.tensors()):
                held.copy_(new)
        self.replay()


class GraphedRefinement:
    """The recordings of one model.

    capture: how a function is recorded; it returns what runs it again. say: told, once for each
    reason, why batches are refined eagerly.
    """

    def __init__(
        self, capture: Capture | None = None, say: Callable[[str], None] = lambda text: None
    ):
        self.capture = CudaCapture() if capture is None else capture
        self.say = say
        self.warm_up = WARM_UP
        self.recordings: dict[Hashable, Recording] = {}
        self.times_seen: Counter[Hashable] = Counter()
        self.said: set[str] = set()
        self.failed = False
        self.config: Any = None  # the model's, when the recordings were made
        self.replays = 0

    def __reduce__(self):
        return GraphedRefinement, ()  # a copy of a model records its own

    def may_serve(
        self, world_model, config: RefinementConfig, given: GivenTensors, tile_rows: int
    ) -> bool:
        """Whether batches of this model can be recorded at all; where not, it is said why."""
        if given.observed.device.type not in DEVICES or not config.cuda_graph or self.failed:
            return False
        reason = why_not_graphed(world_model, config, given, tile_rows)
        if reason is not None:
            self._runs_eagerly(reason)
        return reason is None

    def run(
        self,
        compute: Compute,
        given: GivenTensors,
        noise: NoiseSampler,
        world_model,
        plan: Sequence[StepPlan],
        keep_state: torch.dtype | None,
    ) -> RefinementResult:
        """The result of `compute`, replayed where this kind of batch has been recorded."""
        if self.config is not world_model.config:
            self.forget()
            self.config = world_model.config
        drawn = DrawnNoise.draw(noise, plan, with_workspace=world_model.workspace() is not None)
        kind = kind_of(given, drawn, world_model, plan, keep_state)
        recording = self.recordings.get(kind)
        if recording is None and self._is_due(kind):
            tables = tables_of(world_model)
            recording = self._record(kind, compute, given, drawn, tables)
        if recording is None:
            return _handing_out(compute(given, drawn))
        recording.run(given, drawn)
        self.replays += 1
        return self._handing_out(recording, given)

    def forget(self) -> None:
        """Drop all recordings, and what has been seen."""
        self.recordings.clear()
        self.times_seen.clear()

    def _is_due(self, kind: Hashable) -> bool:
        """Whether a kind of batch is to be recorded now; counts that it has come."""
        if len(self.times_seen) >= MAX_KINDS and kind not in self.times_seen:
            self.times_seen.clear()
            if not self.recordings:
                self._runs_eagerly(f"of {MAX_KINDS} batches no kind came {self.warm_up + 1} times")
        self.times_seen[kind] += 1
        if self.times_seen[kind] <= self.warm_up:
            return False
        if len(self.recordings) >= MAX_GRAPHS:
            self._runs_eagerly(f"batches of more than {MAX_GRAPHS} kinds; the others are replayed")
            return False
        return True

    def _record(
        self,
        kind: Hashable,
        compute: Compute,
        given: GivenTensors,
        noise: DrawnNoise,
        tables: list[Tensor],
    ) -> Recording | None:
        held, held_noise = given.held(), noise.held()
        computed: list[Computed] = []
        try:
            replay = self.capture(lambda: computed.append(compute(held, held_noise)))
        except RuntimeError as error:
            self.failed = True
            self.forget()
            self._runs_eagerly(f"recording failed: {str(error).splitlines()[0]}")
            return None
        recording = Recording(held, held_noise, tables, computed[0], replay)
        self.recordings[kind] = recording
        return recording

    def _handing_out(self, recording: Recording, given: GivenTensors) -> RefinementResult:
        """The result of the last replay, with a loss that hands out its gradients."""
        result = recording.computed.result.copied()
        gradients = recording.computed.gradients
        assert gradients is not None and result.loss is not None, "recorded with a backward"
        held = recording.given.observed
        sources = [given.observed if one is held else one for one in gradients.sources]
        replay = self.replays

        def still_there() -> bool:
            return replay == self.replays

        result.loss = _HeldSumsAsGradients.apply(
            result.loss, gradients.sums, gradients.dtypes, still_there, *sources
        )
        return result

    def _runs_eagerly(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            self.say(f"refinement without a CUDA graph: {reason}")


def why_not_graphed(
    world_model, config: RefinementConfig, given: GivenTensors, tile_rows: int
) -> str | None:
    """What speaks against recording this model's refinement; None: nothing."""
    if any(hasattr(parameter, "ds_id") for parameter in world_model.parameters()):
        return "ZeRO stage 3 gathers parameters during a step"
    if config.recompute == "step":
        return "refinement.recompute step reads the state of random generators"
    if config.compile:
        return "refinement.compile chooses its own launches"
    if world_model.network.part is not None:
        return "parallel.sequence exchanges numbers between processes during a step"
    if world_model.exit_logits is not None:
        return "learned exits change the weights of the losses at every step"
    if given.first_visible is not None:
        return "data.mask_documents: attention may read where documents begin"
    num_rows = given.observed.shape[0] * given.observed.shape[1]
    if num_rows > tile_rows:
        return (
            f"a batch has more rows than a tile of {tile_rows}, and a graph would hold the initial "
            "states of all tiles"
        )
    return None


def kind_of(
    given: GivenTensors,
    noise: DrawnNoise,
    world_model,
    plan: Sequence[StepPlan],
    keep_state: torch.dtype | None,
) -> Hashable:
    """What batches that one recording serves have in common."""
    tensors = [_form(tensor) for tensor in given.tensors()]
    presence = (given.targets is None, given.first_visible is None, given.num_scored is None)
    addresses = [(p.data_ptr(), p.requires_grad) for p in world_model.parameters()]
    autocast = torch.is_autocast_enabled("cuda")
    return (
        tuple(tensors),
        presence,
        noise.form(),
        tuple(plan),
        keep_state,
        autocast,
        tuple(addresses),
    )


def tables_of(world_model) -> list[Tensor]:
    """The tensors that a model has made for itself, and reads in every refinement."""
    tables: list[Tensor] = []
    for module in world_model.modules():
        if isinstance(module, RotaryTable):
            tables += module.kept()
    return tables


def _form(tensor: Tensor) -> Hashable:
    return (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)


def _handing_out(computed: Computed) -> RefinementResult:
    """An eager refinement, with a loss that hands out its gradients."""
    result = computed.result
    if result.loss is None or computed.gradients is None:
        return result
    return replace(result, loss=computed.gradients.as_loss(result.loss))


class CudaCapture:
    """torch.cuda.graph; the graphs of a model share their memory."""

    def __init__(self):
        self.pool = None

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on: a loader pins memory, NCCL's watchdog asks for events.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            function()
        return graph.replay


class _HeldSumsAsGradients(torch.autograd.Function):
    """A value whose gradients are known, in tensors that the next replay overwrites."""

    @staticmethod
    def forward(ctx, value, sums, dtypes, still_there, *sources):
        ctx.sums = sums
        ctx.dtypes = dtypes
        ctx.still_there = still_there
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        if not ctx.still_there():
            raise RuntimeError(
                "refinement loss: another batch was refined since, into the same memory; call "
                "backward before the next forward, or set refinement.cuda_graph to false"
            )
        if ctx.sums is None or torch.is_grad_enabled():
            raise RuntimeError(
                "refinement loss: its gradients can be handed out once, and have no graph"
            )
        known = [(total, dtype) for total, dtype in zip(ctx.sums, ctx.dtypes) if total is not None]
        handed_out = iter(_scaled_and_rounded(known, grad))
        gradients = [None if total is None else next(handed_out) for total in ctx.sums]
        ctx.sums = None
        return None, None, None, None, *gradients


def _scaled_and_rounded(sums: Sequence[tuple[Tensor, torch.dtype]], factor: Tensor) -> list[Tensor]:
    """Each sum times a factor, then in its dtype, in memory of its own: a few launches for all."""
    results = [torch.empty_like(total, dtype=dtype) for total, dtype in sums]
    for precision in {total.dtype for total, _ in sums}:
        places = [i for i, (total, _) in enumerate(sums) if total.dtype == precision]
        scaled = [sums[i][0] for i in places]
        torch._foreach_mul_(scaled, factor.to(precision))
        torch._foreach_copy_([results[i] for i in places], scaled)
    return results
