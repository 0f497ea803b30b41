"""What has to hold between keys, beyond the type and the bounds of each."""

from __future__ import annotations

import math
import re

from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.evaluation_checks import check_evaluation
from ebwm_scale.config.rate_schedule import schedule_problems
from ebwm_scale.config.refinement_checks import check_refinement
from ebwm_scale.config.requirement import Require
from ebwm_scale.config.resolved import (
    context_group,
    group_size,
    model_sizes,
)
from ebwm_scale.config.schema import Config, TrainConfig
from ebwm_scale.config.sequence_checks import sequence_problems
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import shown


def check(config: Config) -> list[str]:
    """Every problem of a resolved configuration that shows without data and devices.

    One sentence each.
    """
    problems: list[str] = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    _check_model(config, require)
    _check_parametrization(config, require)
    _check_state(config, require)
    check_refinement(config, require)
    _check_data(config, require)
    _check_training(config, require)
    check_evaluation(config, require)
    return problems + filled_problems(config)


def filled_problems(config: Config) -> list[str]:
    """Every problem that may show only when the data has filled its keys, one sentence each."""
    return group_problems(config) + schedule_problems(config) + sequence_problems(config)


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
        "give one term or more of linear, quadratic, bilinear, direct, context, each once",
    )
    require(
        terms != ["context"],
        "model.energy_head is [context]: nothing reads the predicted stream; "
        "add linear, quadratic, bilinear or direct",
    )
    require(
        "direct" not in terms or model.conditioning != "adaln_zero",
        "model.energy_head has direct, whose energy has no weights to start at 0, as adaln_zero's "
        "does; take bilinear, or model.conditioning adaln",
    )
    _check_reach(config, require)
    require(
        model.loop_loss == "last" or model.loops > 1,
        f"model.loop_loss is {model.loop_loss} with model.loops {model.loops}: there is one loss; "
        "leave the key out",
    )
    require(
        model.loop_loss == "last" or model.kind == "baseline",
        f"model.loop_loss is {model.loop_loss}: only a baseline is scored after each pass, an "
        "energy model by refinement.loss; leave the key out",
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


def _check_reach(config: Config, require: Require) -> None:
    """That the data has a grid is asked when the data is known: model.reach.reach_of."""
    model = config.model
    if model.reach is None:
        return
    given = f"model.reach is {model.reach}"
    require(
        model.attention_backend != "triton",
        f"{given} with model.attention_backend triton: kernels know no grid, attention within "
        "reach is plain PyTorch; use auto, which keeps all other kernels",
    )
    require(
        model.observed_backend == "auto",
        f"{given} with model.observed_backend {model.observed_backend}: attention within reach is "
        "plain PyTorch; use auto",
    )
    require(
        not config.refinement.compile,
        f"{given} with refinement.compile: a compiled step knows no grid; use compile false",
    )


def _check_parametrization(config: Config, require: Require) -> None:
    model = config.model
    base_keys = (("base_width", model.base_width), ("base_num_heads", model.base_num_heads))
    if model.parametrization == "standard":
        for key, value in base_keys:
            require(
                value is None,
                f"model.{key} is {value} with model.parametrization standard, which has no base: "
                "use width_scaled, or leave the key out",
            )
        return
    for key, value in base_keys:
        require(
            value is not None,
            f"model.{key} is absent with model.parametrization width_scaled: give the value of the "
            "model whose learning rate is to be used",
        )
    require(
        config.optimizer.learning_rate is not None,
        "optimizer.learning_rate is absent with model.parametrization width_scaled: published "
        "rates are those of sizes; give the best rate of model.base_width",
    )
    if model.base_width is not None and model.base_num_heads is not None:
        require(
            model.base_width % model.base_num_heads == 0,
            f"model.base_width {model.base_width} over model.base_num_heads "
            f"{model.base_num_heads}: a head needs a whole number of dimensions",
        )
        head = model_sizes(model).head_dimension
        base_head = model.base_width // model.base_num_heads
        require(
            config.optimizer.name != "muon" or model.qk_norm or head == base_head,
            f"optimizer.name is muon with heads of {head} numbers, {base_head} at the base: all "
            "matrices of Muon have one rate; use heads of one size, model.qk_norm, or adamw",
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
    learns_exits = config.model.kind == "energy" and config.refinement.loss_weights == "exits"
    require(
        config.train.z_loss == 0 or not learns_exits,
        f"train.z_loss is {config.train.z_loss} with refinement.loss_weights exits: learned exits "
        "weigh the cross-entropy alone; use 0, or other weights",
    )
    if state.kind == "embedding":
        for key, value, off in (
            ("model.logit_softcap", config.model.logit_softcap, None),
            ("train.z_loss", config.train.z_loss, 0),
        ):
            require(
                value == off,
                f"{key} is {value}: embedding states are no logits, leave the key out",
            )
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
        data.cache.folder is None or (bool(data.stream) and data.stream_format == "shards"),
        "data.cache.folder is given, and no shards are streamed: it keeps those of data.stream "
        "with data.stream_format=shards; leave it out",
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
    replay = config.refinement.replay
    require(
        train.max_steps * train.global_batch_size < 2**62,
        f"train.max_steps {train.max_steps} x train.global_batch_size {train.global_batch_size}: "
        "more samples than 64 bits count",
    )
    sizes = BatchRamp.of(train).sizes
    ramp = [list(piece) for piece in train.batch_ramp]
    require(
        sizes == sorted(sizes),
        f"train.batch_ramp is {shown(ramp)} with train.global_batch_size "
        f"{train.global_batch_size}: batches must grow, piece by piece, up to that",
    )
    for key, given in (("data.stream", config.data.stream), ("refinement.replay", replay)):
        require(
            not (ramp and given),
            f"train.batch_ramp is given with {key}, which needs batches of one size: "
            "leave one of them out",
        )
    if train.micro_batch_size is not None:
        require(
            train.global_batch_size % train.micro_batch_size == 0,
            f"train.global_batch_size {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}",
        )
    require(
        train.spike_deviations is None or not config.data.stream,
        f"train.spike_deviations is {train.spike_deviations} with data.stream: a stream cannot "
        "leave samples out that it has given; leave the key out, or name the shards in a manifest",
    )
    samples = config.evaluation.curvature_samples
    has_curvature = config.model.kind == "energy" and config.state.workspace is None
    require(
        samples == 0 or has_curvature,
        f"evaluation.curvature_samples is {samples}: it is known of energy models without a "
        "workspace; use 0",
    )
    is_schedule_free = config.optimizer.name == "schedule_free"
    require(
        not is_schedule_free or config.schedule.kind == "constant",
        f"optimizer.name is schedule_free with schedule.kind {config.schedule.kind}: an average "
        "takes the place of the decay; use schedule.kind constant",
    )
    require(
        not is_schedule_free or train.ema is None,
        f"optimizer.name is schedule_free with train.ema {train.ema}: it keeps an average of its "
        "own; leave train.ema out",
    )
    has_average = train.ema is not None or is_schedule_free
    require(
        config.evaluation.weights == "trained" or has_average,
        "evaluation.weights is ema without train.ema: there is no average; give its decay, or "
        "leave the key out",
    )
    logging = config.logging
    require(
        logging.norms_every_steps % logging.every_steps == 0,
        f"logging.norms_every_steps is {logging.norms_every_steps}: must be a multiple of "
        f"logging.every_steps {logging.every_steps}, whose rows hold the norms",
    )
    offload = config.deepspeed.offload
    stage = config.deepspeed.zero_stage
    optimizer = config.optimizer
    for number, rule in enumerate(optimizer.rules):
        problem = None
        try:
            re.compile(rule.parameters)
        except re.error as error:
            problem = f"{error}"
        if rule.parameters == "":
            problem = "it is absent"
        require(
            problem is None,
            f"optimizer.rules[{number}].parameters is {shown(rule.parameters)} ({problem}): give a "
            "regular expression that fits names of parameters, for example .*embedding.*",
        )
    for key, default in (("muon_learning_rate", None), ("momentum", 0.95)):
        value = getattr(optimizer, key)
        require(
            optimizer.name == "muon" or value == default,
            f"optimizer.{key} is {value} with optimizer.name {optimizer.name}, "
            "which does not read it: leave it out, or use muon",
        )
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
    """(micro batch per rank, accumulation steps) for a world size; where several processes share
    each sample, for the number of such groups (sequence_checks.num_readers).

    paired: samples come in pairs that must stay on one rank (refinement.replay), so the micro
    batch must be even. Of a ramp the micro batch divides every batch, and the steps are those of
    the last one. Raises ConfigError when a global batch does not divide.
    """
    sizes = BatchRamp.of(train).sizes
    for size in sizes[:-1]:
        if size % world_size:
            raise ConfigError(
                f"train.batch_ramp has batches of {size}, which do not divide over {world_size} "
                f"processes; use multiples of {world_size}"
            )
    if train.global_batch_size % world_size:
        multiple = math.ceil(train.global_batch_size / world_size) * world_size
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} does not divide over {world_size} "
            f"processes; use a multiple of {world_size}, for example {multiple}"
        )
    per_rank = train.global_batch_size // world_size
    micro = train.micro_batch_size or math.gcd(*(size // world_size for size in sizes))
    for size in sizes[:-1]:
        if size // world_size % micro:
            raise ConfigError(
                f"train.micro_batch_size {micro} does not divide the {size // world_size} samples "
                f"per process of train.batch_ramp's batches of {size}"
            )
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
