"""What has to hold between keys, beyond the type and the bounds of each."""

from __future__ import annotations

import math
from collections.abc import Callable

from ebwm_scale.config.resolved import (
    context_group,
    decay_steps,
    group_size,
    min_num_steps,
    model_sizes,
    reencoded_blocks,
)
from ebwm_scale.config.schema import Config, TrainConfig
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import shown

Require = Callable[[bool, str], None]


def check(config: Config) -> list[str]:
    """Every problem of a resolved configuration that shows without data and devices.

    One sentence each.
    """
    problems: list[str] = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    _check_model(config, require)
    _check_state(config, require)
    _check_refinement(config, require)
    _check_replay(config, require)
    _check_data(config, require)
    _check_training(config, require)
    return problems + group_problems(config)


def group_problems(config: Config) -> list[str]:
    """Every problem of a configuration whose positions are predicted in groups; none without.

    One sentence each. The size of the groups may come from the data alone, so this is asked again
    when it is known.
    """
    problems: list[str] = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    _check_conditions(config, require)
    size = group_size(config)
    if context_group(config) == 1 or problems:
        return problems

    grid = config.data.grid
    require(
        grid is None or grid[0] * grid[1] == size,
        f"data.grid is {shown(list(grid or ()))} with data.group_size {size}: "
        "rows times columns must be the group size",
    )
    length = config.data.context_length
    require(
        length is None or length % size == 0,
        f"data.context_length is {length}: must be a multiple of data.group_size {size}",
    )
    rows = config.refinement.tile_rows
    require(
        rows is None or rows >= size,
        f"refinement.tile_rows is {rows}: a group of data.group_size {size} positions is refined "
        "together, use at least that or leave the key out",
    )
    is_energy = config.model.kind == "energy"
    require(
        not is_energy or config.model.conditioning != "time_embed",
        f"model.conditioning is time_embed with {_groups(config)}: its token stands in front "
        "of the first group and belongs to none; use default, adaln, adaln_zero or predicted_only",
    )
    num_axes = 2 if grid is None else 3
    pairs = model_sizes(config.model).head_dimension // 2
    require(
        pairs >= num_axes,
        f"model.width over model.num_heads is {2 * pairs}: positions in groups have {num_axes} "
        f"coordinates, which need {2 * num_axes} dimensions of a head",
    )
    for key in ("mask_documents", "mask_document_starts"):
        require(
            not getattr(config.data, key),
            f"data.{key} is true with {_groups(config)}: groups belong to no documents",
        )
    return problems


def _groups(config: Config) -> str:
    """What makes groups of a configuration's positions."""
    if config.data.group_size is not None:
        return f"data.group_size {config.data.group_size}"
    return "data.conditions"


def _check_conditions(config: Config, require: Require) -> None:
    conditions = config.data.conditions
    for number, condition in enumerate(conditions):
        key = f"data.conditions[{number}]"
        require(condition.name != "", f"{key}.name is absent: each condition needs a name")
        is_discrete = condition.kind == "discrete"
        require(
            is_discrete == (condition.num_values is not None),
            f"{key}.num_values is {condition.num_values or 'absent'}: a discrete condition needs "
            "it, a continuous one has none",
        )
    names = [condition.name for condition in conditions]
    require(
        len(set(names)) == len(names),
        f"data.conditions are named {shown(names)}: each name once",
    )


def _check_model(config: Config, require: Require) -> None:
    model = config.model
    sizes = model_sizes(model)
    require(
        sizes.width % sizes.num_heads == 0 and sizes.head_dimension % 2 == 0,
        f"model.width {sizes.width} over model.num_heads {sizes.num_heads}: "
        "a head needs a whole and even number of dimensions",
    )
    require(
        sizes.num_heads % sizes.num_kv_heads == 0,
        f"model.num_kv_heads is {sizes.num_kv_heads}: "
        f"must divide model.num_heads {sizes.num_heads}",
    )
    require(
        sizes.predicted_layers <= sizes.num_layers,
        f"model.predicted_layers is {sizes.predicted_layers}: "
        f"must be at most model.num_layers {sizes.num_layers}",
    )
    terms = list(model.energy_head)
    require(
        0 < len(terms) == len(set(terms)),
        f"model.energy_head is {shown(terms)}: "
        "give one term or more of linear, quadratic, bilinear, context, each once",
    )
    require(
        terms != ["context"],
        "model.energy_head is [context]: nothing reads the predicted stream; "
        "add linear, quadratic or bilinear",
    )
    require(
        model.loops == 1 or model.kind == "baseline",
        f"model.loops is {model.loops}: only a baseline passes its blocks again, an energy model "
        "takes refinement.num_steps; leave the key out",
    )
    require(
        model.loop_loss == "last" or model.loops > 1,
        f"model.loop_loss is {model.loop_loss} with model.loops {model.loops}: there is one loss; "
        "leave the key out",
    )
    is_frame_baseline = model.kind == "baseline" and config.state.kind == "embedding"
    require(
        model.output == "one_linear" or is_frame_baseline,
        f"model.output is {model.output}: "
        "only a baseline of frame embeddings has it, leave the key out",
    )
    require(
        model.predicts == "state" or is_frame_baseline,
        f"model.predicts is {model.predicts}: "
        "only a baseline of frame embeddings adds it to the last frame, leave the key out",
    )


def _check_workspace(config: Config, require: Require) -> None:
    state, refinement = config.state, config.refinement
    if state.workspace is None:
        require(
            state.workspace_initial == "zeros",
            f"state.workspace_initial is {state.workspace_initial} without state.workspace: "
            "give the workspace a width or leave the key out",
        )
        return
    given = f"state.workspace is {state.workspace}"
    require(
        config.model.kind == "energy",
        f"{given}: a baseline refines nothing, leave the key out",
    )
    require(
        refinement.num_steps > 1,
        f"{given} with refinement.num_steps 1: no step reads what another wrote; "
        "use more steps or leave the key out",
    )
    require(
        not refinement.replay,
        f"{given} with refinement.replay: the buffer stores states alone; use replay false",
    )
    require(
        not refinement.compile,
        f"{given} with refinement.compile: a compiled step has no workspace; use compile false",
    )


def _check_state(config: Config, require: Require) -> None:
    state = config.state
    _check_workspace(config, require)
    if state.kind == "embedding":
        require(
            config.refinement.update == "probabilities",
            f"refinement.update is {config.refinement.update}: "
            "embedding states have one update, leave the key out",
        )
        require(
            state.map_scale == 1,
            f"state.map_scale is {state.map_scale}: "
            "embedding states are mapped by their projection, leave the key out",
        )
        require(
            not state.tie_embedding,
            "state.tie_embedding is true: only vocabulary states have a token embedding to tie to",
        )
        return
    require(
        state.dimension is None,
        f"state.dimension is {state.dimension}: "
        "a vocabulary state takes model.vocabulary_size; leave the key out",
    )
    require(
        state.initial != "most_recent",
        "state.initial is most_recent: "
        "a vocabulary state has no most recent frame; allowed: random_noise, zeros",
    )


def _check_refinement(config: Config, require: Require) -> None:
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
    _check_loss_weights(config, require)
    _check_candidates(config, require)
    _check_reencoding(config, require)
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


def _check_data(config: Config, require: Require) -> None:
    data = config.data
    for number, source in enumerate(data.sources):
        require(
            source.manifest != "",
            f"data.sources[{number}].manifest is absent: each source needs a manifest",
        )
        require(
            source.weight > 0,
            f"data.sources[{number}].weight is {source.weight}: must be above 0",
        )
    require(
        not data.sources or data.manifest is None,
        "data.manifest and data.sources are both given: name one dataset, or a mixture",
    )
    require(
        not (data.sources and data.stream),
        "data.sources and data.stream are both given: a stream is not mixed",
    )
    require(
        not data.stream or data.manifest is not None,
        "data.stream is given without data.manifest: "
        "the manifest says what the samples are, and holds the validation split",
    )
    if data.stream_format == "shards":
        for key in ("stream_lanes", "stream_field", "stream_filters"):
            require(
                not getattr(data, key),
                f"data.{key} is given with data.stream_format shards: only raw text has it; "
                "use data.stream_format=text, or leave the key out",
            )
    require(
        not data.mask_document_starts or config.state.kind == "vocabulary",
        "data.mask_document_starts is true: only text has documents",
    )
    require(
        not data.mask_documents or config.state.kind == "vocabulary",
        "data.mask_documents is true: only text has documents",
    )
    require(
        not data.mask_documents or config.model.conditioning != "time_embed",
        "data.mask_documents is true with model.conditioning time_embed: its token stands in front "
        "of the first document alone; use default, adaln, adaln_zero or predicted_only",
    )


def _check_training(config: Config, require: Require) -> None:
    train = config.train
    require(
        train.max_steps * train.global_batch_size < 2**62,
        f"train.max_steps {train.max_steps} x train.global_batch_size {train.global_batch_size}: "
        "more samples than 64 bits count",
    )
    if train.micro_batch_size is not None:
        require(
            train.global_batch_size % train.micro_batch_size == 0,
            f"train.global_batch_size {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}",
        )
    warmup = config.schedule.warmup_steps
    decay = decay_steps(config.schedule)
    require(
        warmup <= decay or warmup >= train.max_steps,
        f"schedule.warmup_steps is {warmup}: must be at most schedule.decay_steps {decay}, "
        "or the learning rate falls to its end at once after the warm-up",
    )
    offload = config.deepspeed.offload
    stage = config.deepspeed.zero_stage
    require(
        offload == "none" or stage > 0,
        f"deepspeed.offload is {offload} with deepspeed.zero_stage 0: "
        "offloading needs stage 1, 2 or 3",
    )
    require(
        offload != "parameters" or stage == 3,
        f"deepspeed.offload is parameters with deepspeed.zero_stage {stage}: "
        "parameters need stage 3",
    )


def batch_arithmetic(
    train: TrainConfig, world_size: int, *, paired: bool = False
) -> tuple[int, int]:
    """(micro batch per rank, accumulation steps) for a world size.

    paired: samples come in pairs that must stay on one rank (refinement.replay), so the micro
    batch must be even. Raises ConfigError when the global batch does not divide.
    """
    if train.global_batch_size % world_size:
        multiple = math.ceil(train.global_batch_size / world_size) * world_size
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} does not divide over {world_size} "
            f"processes; use a multiple of {world_size}, for example {multiple}"
        )
    per_rank = train.global_batch_size // world_size
    micro = train.micro_batch_size or per_rank
    if per_rank % micro:
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        raise ConfigError(
            f"train.micro_batch_size {micro} does not divide the {per_rank} samples per process "
            f"(train.global_batch_size {train.global_batch_size} over {world_size} processes); "
            f"allowed: {divisors}"
        )
    if paired and micro % 2:
        raise ConfigError(
            f"{micro} samples per process and forward pass: "
            "refinement.replay pairs samples, so it must be even; "
            f"raise train.global_batch_size {train.global_batch_size} "
            f"or use fewer than {world_size} processes"
        )
    return micro, per_rank // micro
