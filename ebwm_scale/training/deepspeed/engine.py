"""The DeepSpeed engine of a run: configuration in, an engine with a client optimizer out."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from ebwm_scale.config.reduce_bucket import reduce_bucket_size
from ebwm_scale.config.schema import Config
from ebwm_scale.core.world import World
from ebwm_scale.planning.parameters import count_parameters
from ebwm_scale.training.deepspeed.partitioned import partitioned
from ebwm_scale.training.deepspeed.zero_state import ZeroState
from ebwm_scale.training.muon import Matrix, MuonAndAdamW
from ebwm_scale.training.optimizer import BLOCK_MATRIX, new_optimizer
from ebwm_scale.training.schedule import learning_rate
from ebwm_scale.training.weight_average import WeightAverage
from ebwm_scale.world_model import WorldModel


def deepspeed_config(
    config: Config, *, micro_batch: int, accumulation: int, num_parameters: int
) -> dict[str, Any]:
    """What DeepSpeed is given.

    Gradient clipping is always set: its default is 1.0, not off. So is the bucket that gradients
    are reduced in: DeepSpeed allocates all of it, half a billion numbers, also for a model that has
    fewer.
    """
    clipping = config.optimizer.gradient_clipping
    if needs_manual_clipping(config):
        clipping = 0.0
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clipping,
        "zero_optimization": {
            "stage": config.deepspeed.zero_stage,
            "reduce_bucket_size": reduce_bucket_size(num_parameters),
        },
        "bf16": {
            "enabled": config.train.precision == "bf16",
            "check_grad_overflow": True,  # a step that is not finite is skipped
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    if config.deepspeed.offload != "none":
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        settings["zero_force_ds_cpu_optimizer"] = False
    if config.deepspeed.offload == "parameters":
        settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if needs_manual_gathering(config):
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return _merge(settings, config.deepspeed.raw)


def needs_manual_clipping(config: Config) -> bool:
    """DeepSpeed's fp32 path without ZeRO clips but keeps the norm to itself, so Engine.step does it
    there.
    """
    return config.deepspeed.zero_stage == 0 and config.train.precision == "fp32"


def needs_manual_gathering(config: Config) -> bool:
    """An energy model asks for its parameters when it needs them (refinement/block_recompute.py):
    DeepSpeed's module hooks know only one forward and one backward, and under a double backward
    they would hand out partitions for parameters.
    """
    return config.deepspeed.zero_stage == 3 and config.model.kind == "energy"


class Engine:
    """A thin, typed face of deepspeed.DeepSpeedEngine: forward, backward, step with the norm,
    learning rates.
    """

    def __init__(
        self,
        config: Config,
        model: WorldModel,
        world: World,
        *,
        micro_batch: int,
        accumulation: int,
    ):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.config = config
        self.world = world
        self.accumulation = accumulation
        self.module = model
        model.to(world.device)
        # The optimizer's class depends on stage and precision, and they share no interface.
        self.optimizer: Any
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=new_optimizer(model, config),
            config=deepspeed_config(
                config,
                micro_batch=micro_batch,
                accumulation=accumulation,
                num_parameters=count_parameters(model)["total"],
            ),
        )
        if config.train.precision == "bf16" and config.deepspeed.zero_stage == 0:
            undo_optimizer_dry_run(self.optimizer)
        if needs_manual_gathering(config):
            self.optimizer.parameter_offload._remove_module_hooks()
        self.average: WeightAverage | None = None
        if isinstance(self.state.inner, MuonAndAdamW) and config.deepspeed.zero_stage > 0:
            self._share_matrices(self.state.inner)
        if config.train.ema is not None:
            self.average = WeightAverage(config.train.ema)
            self.average.begin(self.state.weights())

    @property
    def state(self) -> ZeroState:
        """What a checkpoint holds of it."""
        return ZeroState(
            self.deepspeed,
            stage=self.config.deepspeed.zero_stage,
            half=self.config.train.precision == "bf16",
            rank=self.world.rank,
            world_size=self.world.size,
            average=self.average,
        )

    def _share_matrices(self, optimizer: MuonAndAdamW) -> None:
        """Tell Muon which parts of its matrices this process has."""
        matrices = []
        for name, p in self.module.named_parameters():
            if p.requires_grad and BLOCK_MATRIX.fullmatch(name):
                shape = torch.Size(getattr(p, "ds_shape", p.shape))
                matrices.append(Matrix(shape, self.state.place_of(p), self.state.group_of(p)))
        optimizer.share(
            matrices, rank=self.world.rank, world_size=self.world.size, device=self.world.device
        )

    def set_learning_rates(self, step: int) -> float:
        """Every group's learning rate at an optimizer step; returns the model's."""
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        return rate

    def set_accumulation(self, accumulation: int) -> None:
        """Micro-batches of the step that begins: a batch may be larger than the one before it."""
        if accumulation == self.accumulation:
            return
        self.accumulation = accumulation
        micro = self.deepspeed.train_micro_batch_size_per_gpu()
        self.deepspeed.set_train_batch_size(accumulation * micro * self.world.size)
        self.deepspeed.micro_steps = 0  # a step ends where a multiple of the new number does

    def forward(self, *arguments, **options):
        return self.deepspeed(*arguments, **options)

    def backward(self, loss: torch.Tensor) -> None:
        if not needs_manual_gathering(self.config):
            self.deepspeed.backward(loss)
            return
        # All that is left to do is to hand gradients to the hooks that reduce them; autograd wants
        # to see the parameters' shapes meanwhile.
        parameters = list(self.module.parameters())
        for p in parameters:
            p.data = p.data.new_empty(1).expand(partitioned(p).ds_shape)
        self.deepspeed.backward(loss)
        for p in parameters:
            p.data = p.data.new_empty(0)

    def step(self) -> torch.Tensor | float | None:
        """Advance one micro-batch; at the end of an accumulation update the weights and return the
        gradient norm before clipping.

        If the norm is not finite, on whatever rank the reason was, no rank updates anything.
        """
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        norm = None
        if boundary and needs_manual_clipping(self.config):
            limit = self.config.optimizer.gradient_clipping or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)
            if not math.isfinite(norm):
                self.optimizer.zero_grad(set_to_none=True)  # it passes over what has no gradient
        self.deepspeed.step()
        if boundary and norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        if self.average is not None and norm is not None and math.isfinite(norm):
            self.average.update(self.state.weights())
        return norm


def undo_optimizer_dry_run(wrapper) -> None:
    """Undo the optimizer step that DeepSpeed's bf16 wrapper without ZeRO takes at its construction,
    with zero gradients, to allocate state.

    It leaves Adam's step count at 1, so that bias correction shrinks the first updates (by a
    quarter at the first one), and has decayed the weights once. Without it the first update is the
    one that stages 1 and 2, and fp32, make.
    """
    wrapper.optimizer.state.clear()
    wrapper.refresh_fp32_params()


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """extra over base, section by section."""
    result = dict(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merge(result[key], value)
        else:
            result[key] = value
    return result
