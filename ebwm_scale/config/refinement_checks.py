"""What has to hold between the keys of `refinement`, and between them and the model's."""

from __future__ import annotations

from ebwm_scale.config.requirement import Require
from ebwm_scale.config.resolved import (
    min_num_steps,
    model_sizes,
    reencoded_blocks,
)
from ebwm_scale.config.schema import Config
from ebwm_scale.core.plain_text import shown


def check_refinement(config: Config, require: Require) -> None:
    refinement = config.refinement
    lowest = min_num_steps(refinement)
    require(
        lowest <= refinement.num_steps,
        f"refinement.min_num_steps is {lowest}: "
        f"must be at most refinement.num_steps {refinement.num_steps}",
    )
    require(
        not refinement.compile or refinement.recompute == "none",
        f"refinement.compile is true with refinement.recompute {refinement.recompute}: "
        "a compiled step decides itself what it keeps; use none",
    )
    _check_backprop_steps(config, require)
    require(
        refinement.damping > 0 or refinement.damping_after == 1,
        f"refinement.damping_after is {refinement.damping_after} with refinement.damping 0: no "
        "step is damped; give damping a power, such as 3, or leave damping_after out",
    )
    has_logits = config.state.kind == "embedding" or refinement.update != "probabilities"
    require(
        refinement.decay == 0 or has_logits,
        f"refinement.decay is {refinement.decay} with refinement.update probabilities: each step "
        "starts from probabilities, which sum to 1; use mirror or logits, or 0",
    )
    require(
        refinement.momentum == 0 or refinement.num_steps > 1,
        f"refinement.momentum is {refinement.momentum} with refinement.num_steps 1: there is no "
        "step to go on from; use more steps or leave the key out",
    )
    _check_accept(config, require)
    _check_spectral_penalty(config, require)
    _check_level(config, require)
    _check_loss_weights(config, require)
    _check_candidates(config, require)
    _check_reencoding(config, require)
    _check_replay(config, require)
    for name in ("step_size", "num_steps", "noise"):
        points = getattr(refinement.schedule, name)
        listed = shown([list(point) for point in points])
        progress = [point[0] for point in points]
        require(
            progress == sorted(progress) and all(0 <= p <= 1 for p in progress),
            f"refinement.schedule.{name} is {listed}: progress must rise within [0, 1]",
        )
        low = 1 if name == "num_steps" else 0
        require(
            all(value >= low for _, value in points),
            f"refinement.schedule.{name} is {listed}: values must be {low} or more",
        )


def _check_backprop_steps(config: Config, require: Require) -> None:
    refinement = config.refinement
    if refinement.backprop_steps is None:
        return
    given = f"refinement.backprop_steps is {refinement.backprop_steps}"
    require(
        refinement.graph == "full",
        f"{given} with refinement.graph {refinement.graph}: only a graph through all steps is cut "
        "off, use full or leave the key out",
    )
    require(
        refinement.backprop_steps < refinement.num_steps,
        f"{given}: must be below refinement.num_steps {refinement.num_steps}, "
        "or the key changes nothing",
    )


def _check_accept(config: Config, require: Require) -> None:
    refinement = config.refinement
    if refinement.accept == "always":
        return
    given = f"refinement.accept is {refinement.accept}"
    require(
        config.state.kind == "embedding" or refinement.update != "probabilities",
        f"{given} with refinement.update probabilities: each step starts from probabilities, so "
        "none leaves a state as it is; use mirror or logits, or always",
    )
    require(
        refinement.noise == 0,
        f"{given} with refinement.noise {refinement.noise}: noise moves a state that is to stay; "
        "leave one of the two out",
    )
    require(
        refinement.state_clamp is None,
        f"{given} with refinement.state_clamp {refinement.state_clamp}: a state beyond the bound "
        "could not stay; leave one of the two out",
    )
    require(
        refinement.candidates is None,
        f"{given} with refinement.candidates {refinement.candidates}: a row that stays has no "
        "candidates yet, beside rows that have some; leave one of the two out",
    )
    require(
        not refinement.compile,
        f"{given} with refinement.compile: energies after a step are not compiled; use compile "
        "false",
    )


def _check_spectral_penalty(config: Config, require: Require) -> None:
    refinement = config.refinement
    if refinement.spectral_penalty == 0:
        require(
            refinement.spectral_bound == 0.8,
            f"refinement.spectral_bound is {refinement.spectral_bound} without "
            "refinement.spectral_penalty: give the penalty a weight or leave the key out",
        )
        return
    given = f"refinement.spectral_penalty is {refinement.spectral_penalty}"
    require(
        refinement.num_steps > 1,
        f"{given} with refinement.num_steps 1: there is no second move to compare; "
        "use more steps or leave the key out",
    )
    require(
        config.state.kind == "embedding" or refinement.update == "mirror",
        f"{given} with refinement.update {refinement.update}: a move is measured in front of a "
        "linear map, use mirror or 0",
    )


def _check_level(config: Config, require: Require) -> None:
    refinement = config.refinement
    if refinement.level_weight == 0:
        return
    given = f"refinement.level_weight is {refinement.level_weight}"
    require(
        refinement.candidates is None,
        f"{given} with refinement.candidates {refinement.candidates}: the loss of a state of "
        "candidates is not at hand where a step starts; leave one of the two out",
    )


def _check_loss_weights(config: Config, require: Require) -> None:
    refinement = config.refinement
    weights = refinement.loss_weights
    for key, default in (("exit_entropy", 0.1), ("exit_learning_rate_multiplier", 10.0)):
        value = getattr(refinement, key)
        require(
            weights == "exits" or value == default,
            f"refinement.{key} is {value} with refinement.loss_weights {shown(weights)}: "
            "only exits are learned, use exits or leave the key out",
        )
    if weights is None:
        return
    require(
        refinement.loss == "every",
        f"refinement.loss_weights is given with refinement.loss {refinement.loss}: "
        "only the losses of every step are weighted, use every or leave the weights out",
    )
    require(
        weights != "exits" or refinement.num_steps > 1,
        "refinement.loss_weights is exits with refinement.num_steps 1: there is one exit; "
        "use more steps or leave the key out",
    )
    require(
        weights != "exits" or config.model.kind == "energy",
        "refinement.loss_weights is exits: a baseline takes no steps, leave the key out",
    )
    if isinstance(weights, str):
        return
    listed = shown(list(weights))
    require(
        len(weights) == refinement.num_steps,
        f"refinement.loss_weights is {listed}: "
        f"give one weight for each of refinement.num_steps {refinement.num_steps} "
        "(a training step of fewer steps takes the last of them)",
    )
    require(
        len(weights) > 0 and weights[-1] > 0,
        f"refinement.loss_weights is {listed}: "
        "the last weight must be above 0, since the last step gives the prediction",
    )


def _check_candidates(config: Config, require: Require) -> None:
    refinement = config.refinement
    if refinement.candidates is None:
        return
    given = f"refinement.candidates is {refinement.candidates}"
    require(
        config.model.kind == "energy",
        f"{given}: a baseline takes no further step, leave the key out",
    )
    require(
        config.state.kind == "vocabulary",
        f"{given} with state.kind embedding: frames have no tokens to choose from, "
        "leave the key out",
    )
    require(
        refinement.num_steps > 1,
        f"{given} with refinement.num_steps 1: there is no further step; "
        "use more steps or leave the key out",
    )
    require(
        refinement.decay == 0,
        f"{given} with refinement.decay {refinement.decay}: all other tokens keep the logits of "
        "the first step, so they cannot decay; leave one of the two out",
    )


def _check_reencoding(config: Config, require: Require) -> None:
    refinement = config.refinement
    if refinement.reencode == "none":
        require(
            refinement.reencode_every == 1,
            f"refinement.reencode_every is {refinement.reencode_every} with refinement.reencode "
            "none: nothing is encoded again, leave the key out",
        )
        return
    num_layers = model_sizes(config.model).num_layers
    require(
        reencoded_blocks(config) <= num_layers,
        f"refinement.reencode is {refinement.reencode}: "
        f"must be none, all, or at most model.num_layers {num_layers}",
    )
    require(
        config.model.kind == "energy",
        f"refinement.reencode is {refinement.reencode}: a baseline takes no further step; use none",
    )
    require(
        refinement.num_steps > 1,
        f"refinement.reencode is {refinement.reencode} with refinement.num_steps 1: "
        "there is no further step; use none or more steps",
    )
    require(
        not refinement.compile,
        f"refinement.reencode is {refinement.reencode} with refinement.compile: a compiled step "
        "reads no context that has a graph of its own; use compile false",
    )
    has_one_landscape = config.model.conditioning in ("default", "predicted_only")
    has_one_landscape = has_one_landscape or refinement.landscapes == "one"
    require(
        refinement.reencode_every == 1 or has_one_landscape,
        f"refinement.reencode_every is {refinement.reencode_every} with model.conditioning "
        f"{config.model.conditioning}: each step has a context of its own landscape, use 1",
    )
    context_length = config.data.context_length
    if refinement.tile_rows is not None and context_length is not None:
        require(
            refinement.tile_rows >= context_length,
            f"refinement.tile_rows is {refinement.tile_rows} with refinement.reencode "
            f"{refinement.reencode}: all positions of a sample are refined together, give at "
            f"least data.context_length {context_length}",
        )


def _check_replay(config: Config, require: Require) -> None:
    train = config.train
    if not config.refinement.replay:
        return
    require(
        train.micro_batch_size is None or train.micro_batch_size % 2 == 0,
        f"train.micro_batch_size is {train.micro_batch_size}: "
        "refinement.replay pairs samples, so it must be even",
    )
    require(
        train.global_batch_size % 2 == 0,
        f"train.global_batch_size is {train.global_batch_size}: "
        "refinement.replay pairs samples, so it must be even",
    )
    half = train.global_batch_size // 2
    require(
        config.refinement.replay_capacity >= half,
        f"refinement.replay_capacity is {config.refinement.replay_capacity}: "
        f"must be at least half of train.global_batch_size ({half})",
    )
