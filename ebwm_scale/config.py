"""Configuration: YAML -> frozen typed objects. Every key that exists is listed here, with what it means.

    config = load_config("configs/quickstart.yaml", ["train.max_steps=100", "model.size=xs"])

An unknown key, a wrong type and an impossible combination are all found before anything is built, and all are
reported at once, in one ConfigError. `Config.to_yaml()` writes the fully resolved configuration that every run
folder and checkpoint carries. This file knows nothing of torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError, cut, shown
from .shipped import find_config
from .strict_yaml import MAX_DEPTH, dump_yaml, is_utf8, parse_yaml, read_yaml

# (layers, width, heads), feed-forward width = width, and the published peak learning rate: EBT, arXiv 2507.02092.
SIZES: dict[str, tuple[int, int, int]] = {
    "4xs": (2, 128, 2),
    "3xs": (4, 256, 4),
    "xxs": (6, 384, 6),
    "xs": (12, 384, 6),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (24, 1536, 16),
    "xl": (24, 2048, 32),
}
PEAK_LEARNING_RATES: dict[str, float] = {
    "4xs": 0.0024,
    "3xs": 0.0018,
    "xxs": 0.0012,
    "xs": 0.0009,
    "small": 0.0006,
    "medium": 0.0003,
    "large": 0.00025,
    "xl": 0.0002,
}

# Whole numbers above these are mistakes; below them no size, product or position of a run overflows 64 bits.
MANY = 10**12
LARGEST = {
    "model.num_layers": 10**4,
    "model.width": 10**6,
    "model.num_heads": 10**6,
    "model.num_kv_heads": 10**6,
    "model.feed_forward_width": 10**7,
    "model.vocabulary_size": 10**8,
    "state.dimension": 10**7,
    "refinement.num_steps": 10**4,
    "data.context_length": 10**8,
    "data.num_workers": 10**4,
    "train.seed": 2**63 - 1,
}
MAX_PROBLEMS = 40  # that one message lists

# (progress in [0, 1], value) points, joined by straight lines and flat outside; see ebwm_scale/training/schedule.py.
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ModelConfig:
    kind: Literal["energy", "baseline"] = "energy"
    size: Literal["4xs", "3xs", "xxs", "xs", "small", "medium", "large", "xl"] = "xxs"
    num_layers: int | None = None  # overrides the size's
    width: int | None = None  # overrides the size's
    num_heads: int | None = None  # overrides the size's
    num_kv_heads: int | None = None  # grouped-query attention; default: num_heads
    feed_forward_width: int | None = None  # default: width, as in the published sizes
    conditioning: Literal["default", "time_embed", "adaln", "adaln_zero", "predicted_only"] = (
        "default"
    )
    predicted_input: Literal["state", "anchored"] = (
        "state"  # anchored: + the embedding of the last observed token
    )
    vocabulary_size: int | None = None  # default: the data's
    norm_epsilon: float = 1e-5
    rope_theta: float = 1e4
    attention_backend: Literal["auto", "triton", "reference"] = "auto"  # of the predicted stream
    observed_backend: Literal["auto", "flash_attn", "sdpa"] = (
        "auto"  # of the observed stream, and of the baseline
    )


@dataclass(frozen=True)
class StateConfig:
    kind: Literal["vocabulary", "embedding"] = "vocabulary"
    dimension: int | None = (
        None  # embedding: size of a frame embedding; default: the data's; vocabulary: must be absent
    )
    tie_embedding: bool = (
        False  # vocabulary: map states with the token embedding instead of an own matrix
    )
    map_scale: float = 1.0  # vocabulary: constant factor on the map, so that the network sees the state (docs/recipes.md)
    initial: Literal["random_noise", "zeros", "most_recent"] = "random_noise"


@dataclass(frozen=True)
class RefinementScheduleConfig:
    """Each is a list of [progress, value] points, progress running from 0 to 1 over the training."""

    step_size: Points = ()  # factor on refinement.step_size
    num_steps: Points = ()  # replaces refinement.num_steps (rounded); never above it
    noise: Points = ()  # factor on refinement.noise


@dataclass(frozen=True)
class RefinementConfig:
    num_steps: int = 2  # the largest number of steps; always used in evaluation
    min_num_steps: int | None = (
        None  # draw the number of steps per batch from min_num_steps..num_steps
    )
    step_size: float = 500.0  # alpha
    learnable: bool = True  # learn alpha
    learning_rate_multiplier: float | None = (
        None  # alpha's learning rate / the model's; default 3 * step_size
    )
    step_size_random_factor: float = (
        1.0  # r > 1: alpha of each position uniform in [alpha / r, alpha * r] in training
    )
    landscapes: Literal["one", "per_step"] = (
        "per_step"  # what conditionings distinguish; `default` has one anyway
    )
    graph: Literal["detach", "truncate", "full"] = "detach"
    loss: Literal["every", "last"] = "every"
    update: Literal["probabilities", "logits", "mirror"] = (
        "probabilities"  # vocabulary states only: kernels/vocabulary.py
    )
    change_clamp: float | None = (
        None  # bound on |alpha dE/dx| of each number of the state and step (released: clamp_futures_grad)
    )
    state_clamp: float | None = (
        None  # bound on |x| of each number of the state after a step (released: absolute_clamp)
    )
    noise: float = 0.0  # Langevin: + noise * N(0, 1) before each step in training
    replay: bool = False  # half of a batch restarts from stored final states
    replay_capacity: int = 256  # samples kept in all, over all ranks
    tile_rows: int | None = (
        None  # (sample, position) rows refined at a time; changes memory and speed only, see refinement.py
    )
    checkpoint: Literal["none", "step", "block"] = "none"  # activation checkpointing
    compile: bool = False  # TorchInductor for the network's part of a step: minutes at the start, see docs/performance.md
    schedule: RefinementScheduleConfig = field(default_factory=RefinementScheduleConfig)


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mixture."""

    manifest: str = ""
    weight: float = 1.0  # its share of the samples, relative to the other weights


@dataclass(frozen=True)
class DataConfig:
    manifest: str | None = (
        None  # path of a manifest.json written by tools/make_text_shards.py or make_video_shards.py
    )
    sources: tuple[
        SourceConfig, ...
    ] = ()  # instead of manifest: a mixture, a list of {manifest, weight}
    stream: tuple[
        str, ...
    ] = ()  # training shards to stream instead: pipe: commands, URLs; a weaker promise, see docs/data.md
    stream_buffer: int = 1000  # samples that a stream is shuffled in
    mask_document_starts: bool = False  # text: the first token of a document is no target
    max_quarantined: int = 16  # damaged samples that are replaced before the run stops
    context_length: int | None = (
        None  # observed positions per sample; default: what the shards were packed for
    )
    num_workers: int = 0  # loader processes per rank; never changes a batch
    window_shards: int = 4  # samples are permuted inside windows of this many shards
    verify: Literal["sizes", "hashes"] = (
        "hashes"  # what is checked before the start; every sample read is checked anyway
    )


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float | None = (
        None  # peak; default: the published one of the size (a third for embeddings)
    )
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01  # on everything but alpha, as released
    gradient_clipping: float = 1.0  # global norm over all gradients; 0: off


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: int = 10_000
    decay_steps: int | None = None  # the cosine ends here; default train.max_steps
    final_ratio: float = 0.1  # final / peak learning rate


@dataclass(frozen=True)
class TrainConfig:
    global_batch_size: int = 128  # sequences per optimizer step over all ranks and accumulation
    micro_batch_size: int | None = (
        None  # sequences per rank and forward pass; default: what makes accumulation 1
    )
    max_steps: int = 100_000
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 33
    max_minutes: float | None = None  # save and leave with exit code 75 after this long
    max_skipped_steps: int = (
        3  # stop with exit code 76 after this many steps in a row whose gradients are not finite
    )
    hang_minutes: float = 30  # a step, save or evaluation that takes longer is a hang: exit code 77, with all stacks; 0: off


@dataclass(frozen=True)
class DeepSpeedConfig:
    zero_stage: Literal[0, 1, 2, 3] = (
        0  # 3: parameters are partitioned too; an energy model then needs refinement.checkpoint block
    )
    offload: Literal["none", "optimizer", "parameters"] = (
        "none"  # to the host; parameters (stage 3): with the optimizer state
    )
    raw: dict = field(
        default_factory=dict
    )  # merged into the DeepSpeed configuration last, as it is


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000  # 0: only at the end
    keep_last: int = 2
    keep_best: bool = True  # also keep the one with the lowest validation loss
    milestone_every_steps: int = 0  # also keep those at multiples of this; 0: none


@dataclass(frozen=True)
class EvaluationConfig:
    every_steps: int = 500  # 0: only at the end
    max_samples: int = 1024  # validation samples used, the same ones each time


@dataclass(frozen=True)
class LoggingConfig:
    every_steps: int = 10
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "ebwm_scale"
    run_name: str | None = None  # default: the run folder's name


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    state: StateConfig = field(default_factory=StateConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def to_dict(self) -> dict[str, Any]:
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        return dump_yaml(self.to_dict())


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file (None: defaults), apply `section.key=value` overrides, check, resolve defaults.

    path: a file, or the name of a shipped configuration (shipped.py). Raises ConfigError that lists every problem found.
    """
    values: Any = {}
    if path is not None:
        values = read_yaml(find_config(path))
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(
                f"{cut(path, 300)}: expected sections ({', '.join(_names(Config))}), "
                f"got {type(values).__name__}"
            )
    problems: list[str] = []
    for override in overrides:
        _apply_override(values, override, problems)
    return config_from_dict(values, problems)


def config_from_dict(values: dict[str, Any], problems: list[str] | None = None) -> Config:
    """The typed, resolved and checked configuration of a nested dict; raises ConfigError with all problems."""
    problems = [] if problems is None else problems
    config = _build(Config, values, "", problems)
    if not problems:
        config = _resolve(config)
        problems += check(config)
    if problems:
        raise ConfigError(_report(problems))
    return config


def _report(problems: list[str]) -> str:
    """A line per problem, each once; of very many the first ones."""
    lines = list(dict.fromkeys(problems))
    more = len(lines) - MAX_PROBLEMS
    if more > 0:
        lines[MAX_PROBLEMS:] = [f"and {more} more problems"]
    return "\n".join(lines)


def check(config: Config) -> list[str]:
    """Every problem of a resolved configuration that shows without data and devices, one sentence each."""
    model, state, refinement, train = config.model, config.state, config.refinement, config.train
    problems = []

    def require(ok: bool, message: str) -> None:
        if not ok:
            problems.append(message)

    def positive(section: str, **values: float | None) -> None:
        for key, value in values.items():
            require(value is None or value > 0, f"{section}.{key} is {value}: must be above 0")

    positive(
        "model",
        num_layers=model.num_layers,
        width=model.width,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        feed_forward_width=model.feed_forward_width,
        vocabulary_size=model.vocabulary_size,
        norm_epsilon=model.norm_epsilon,
    )
    positive("state", dimension=state.dimension, map_scale=state.map_scale)
    positive(
        "refinement",
        num_steps=refinement.num_steps,
        min_num_steps=refinement.min_num_steps,
        step_size=refinement.step_size,
        learning_rate_multiplier=refinement.learning_rate_multiplier,
        replay_capacity=refinement.replay_capacity,
        tile_rows=refinement.tile_rows,
        change_clamp=refinement.change_clamp,
        state_clamp=refinement.state_clamp,
    )
    positive(
        "data",
        context_length=config.data.context_length,
        window_shards=config.data.window_shards,
        stream_buffer=config.data.stream_buffer,
    )
    positive(
        "optimizer", learning_rate=config.optimizer.learning_rate, epsilon=config.optimizer.epsilon
    )
    positive(
        "train",
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        max_steps=train.max_steps,
        max_minutes=train.max_minutes,
        max_skipped_steps=train.max_skipped_steps,
    )
    positive("schedule", decay_steps=config.schedule.decay_steps)
    positive("checkpoint", keep_last=config.checkpoint.keep_last)
    positive("evaluation", max_samples=config.evaluation.max_samples)
    positive("logging", every_steps=config.logging.every_steps)
    for section, key, value in (
        ("data", "num_workers", config.data.num_workers),
        ("data", "max_quarantined", config.data.max_quarantined),
        ("schedule", "warmup_steps", config.schedule.warmup_steps),
        ("optimizer", "weight_decay", config.optimizer.weight_decay),
        ("refinement", "noise", refinement.noise),
        ("optimizer", "gradient_clipping", config.optimizer.gradient_clipping),
        ("checkpoint", "every_steps", config.checkpoint.every_steps),
        ("train", "seed", train.seed),
        ("train", "hang_minutes", train.hang_minutes),
        ("checkpoint", "milestone_every_steps", config.checkpoint.milestone_every_steps),
        ("evaluation", "every_steps", config.evaluation.every_steps),
    ):
        require(value >= 0, f"{section}.{key} is {value}: must be 0 or more")
    for key, value in (("beta1", config.optimizer.beta1), ("beta2", config.optimizer.beta2)):
        require(0 <= value < 1, f"optimizer.{key} is {value}: must be in [0, 1)")
    for section in dataclasses.fields(config):
        for key, value in vars(getattr(config, section.name)).items():
            large = isinstance(value, int) and value > LARGEST.get(f"{section.name}.{key}", MANY)
            require(not large, f"{section.name}.{key} is {value}: too large for anything")
    require(
        train.max_steps * train.global_batch_size < 2**62,
        f"train.max_steps {train.max_steps} x train.global_batch_size {train.global_batch_size}: "
        "more samples than 64 bits count",
    )
    require(
        0 <= config.schedule.final_ratio <= 1,
        f"schedule.final_ratio is {config.schedule.final_ratio}: must be in [0, 1]",
    )
    if problems:
        return problems  # the sums below divide by these

    for number, source in enumerate(config.data.sources):
        require(
            source.manifest != "",
            f"data.sources[{number}].manifest is absent: each source needs a manifest",
        )
        require(
            source.weight > 0, f"data.sources[{number}].weight is {source.weight}: must be above 0"
        )
    require(
        not (config.data.sources and config.data.manifest is not None),
        "data.manifest and data.sources are both given: name one dataset, or a mixture",
    )
    require(
        not (config.data.sources and config.data.stream),
        "data.sources and data.stream are both given: a stream is not mixed",
    )
    require(
        not config.data.stream or config.data.manifest is not None,
        "data.stream is given without data.manifest: the manifest says what the samples are, and holds the validation split",
    )
    require(
        not config.data.mask_document_starts or state.kind == "vocabulary",
        "data.mask_document_starts is true: only text has documents",
    )
    require(
        model.width % model.num_heads == 0 and (model.width // model.num_heads) % 2 == 0,
        f"model.width {model.width} over model.num_heads {model.num_heads}: a head needs a whole and even number of dimensions",
    )
    require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_kv_heads is {model.num_kv_heads}: must divide model.num_heads {model.num_heads}",
    )
    if state.kind == "embedding":
        require(
            refinement.update == "probabilities",
            f"refinement.update is {refinement.update}: embedding states have one update, leave the key out",
        )
        require(
            state.map_scale == 1,
            f"state.map_scale is {state.map_scale}: embedding states are mapped by their projection, leave the key out",
        )
        require(
            not state.tie_embedding,
            "state.tie_embedding is true: only vocabulary states have a token embedding to tie to",
        )
    else:
        require(
            state.dimension is None,
            f"state.dimension is {state.dimension}: a vocabulary state takes model.vocabulary_size; leave the key out",
        )
        require(
            state.initial != "most_recent",
            "state.initial is most_recent: a vocabulary state has no most recent frame; allowed: random_noise, zeros",
        )
    offload, stage = config.deepspeed.offload, config.deepspeed.zero_stage
    require(
        offload == "none" or stage > 0,
        f"deepspeed.offload is {offload} with deepspeed.zero_stage 0: offloading needs stage 1, 2 or 3",
    )
    require(
        offload != "parameters" or stage == 3,
        f"deepspeed.offload is parameters with deepspeed.zero_stage {stage}: parameters need stage 3",
    )
    require(
        not (refinement.compile and refinement.checkpoint != "none"),
        f"refinement.compile is true with refinement.checkpoint {refinement.checkpoint}: a compiled step decides itself what it keeps; use none",
    )
    if refinement.min_num_steps is not None:
        require(
            refinement.min_num_steps <= refinement.num_steps,
            f"refinement.min_num_steps is {refinement.min_num_steps}: must be at most refinement.num_steps {refinement.num_steps}",
        )
    require(
        refinement.step_size_random_factor >= 1,
        f"refinement.step_size_random_factor is {refinement.step_size_random_factor}: must be 1 or more",
    )
    for name in ("step_size", "num_steps", "noise"):
        points = getattr(refinement.schedule, name)
        require(
            all(0 <= p <= 1 for p, _ in points)
            and list(points) == sorted(points, key=lambda point: point[0]),
            f"refinement.schedule.{name} is {shown([list(p) for p in points])}: progress must rise within [0, 1]",
        )
        low = 1 if name == "num_steps" else 0
        require(
            all(v >= low for _, v in points),
            f"refinement.schedule.{name} is {shown([list(p) for p in points])}: values must be {low} or more",
        )
    if train.micro_batch_size is not None:
        require(
            train.global_batch_size % train.micro_batch_size == 0,
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size {train.micro_batch_size}",
        )
        require(
            not refinement.replay or train.micro_batch_size % 2 == 0,
            f"train.micro_batch_size is {train.micro_batch_size}: refinement.replay pairs samples, so it must be even",
        )
    if refinement.replay:
        require(
            train.global_batch_size % 2 == 0,
            f"train.global_batch_size is {train.global_batch_size}: refinement.replay pairs samples, so it must be even",
        )
        require(
            refinement.replay_capacity >= train.global_batch_size // 2,
            f"refinement.replay_capacity is {refinement.replay_capacity}: must be at least half of train.global_batch_size ({train.global_batch_size // 2})",
        )
    return problems


def batch_arithmetic(
    train: TrainConfig, world_size: int, *, paired: bool = False
) -> tuple[int, int]:
    """(micro batch per rank, accumulation steps) for a world size; ConfigError when the global batch does not divide.

    paired: samples come in pairs that must stay on one rank (refinement.replay), so the micro batch must be even.
    """
    if train.global_batch_size % world_size:
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} does not divide over {world_size} processes; "
            f"use a multiple of {world_size}, for example {math.ceil(train.global_batch_size / world_size) * world_size}"
        )
    per_rank = train.global_batch_size // world_size
    micro = train.micro_batch_size or per_rank
    if per_rank % micro:
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        raise ConfigError(
            f"train.micro_batch_size {micro} does not divide the {per_rank} samples per process "
            f"(train.global_batch_size {train.global_batch_size} over {world_size} processes); allowed: {divisors}"
        )
    if paired and micro % 2:
        raise ConfigError(
            f"{micro} samples per process and forward pass: refinement.replay pairs samples, so it must be even; "
            f"raise train.global_batch_size {train.global_batch_size} or use fewer than {world_size} processes"
        )
    return micro, per_rank // micro


# ---------------------------------------------------------------------------------------------------------------- mechanism


def _resolve(config: Config) -> Config:
    """Fill the defaults that depend on other keys, so that the saved configuration says what ran."""
    model, state, refinement = config.model, config.state, config.refinement
    layers, width, heads = SIZES[model.size]
    model = dataclasses.replace(
        model,
        num_layers=_or(model.num_layers, layers),
        width=_or(model.width, width),
        num_heads=_or(model.num_heads, heads),
    )
    model = dataclasses.replace(
        model,
        num_kv_heads=_or(model.num_kv_heads, model.num_heads),
        feed_forward_width=_or(model.feed_forward_width, model.width),
    )
    refinement = dataclasses.replace(
        refinement,
        min_num_steps=_or(refinement.min_num_steps, refinement.num_steps),
        learning_rate_multiplier=_or(refinement.learning_rate_multiplier, 3 * refinement.step_size),
    )
    rate = PEAK_LEARNING_RATES[model.size] / (3 if state.kind == "embedding" else 1)
    return dataclasses.replace(
        config,
        model=model,
        refinement=refinement,
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=_or(config.optimizer.learning_rate, rate)
        ),
        schedule=dataclasses.replace(
            config.schedule, decay_steps=_or(config.schedule.decay_steps, config.train.max_steps)
        ),
    )


def _or(value, default):
    return default if value is None else value


def _names(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _unknown(key: str, prefix: str, names: list[str]) -> str:
    key = cut(key)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(names)}"
    return f"{prefix}{key}: unknown key; {hint}"


def _apply_override(values: dict, override: str, problems: list[str]) -> None:
    """Put `section.key=value` into the nested dict; what keeps it from that is added to the problems."""
    path, equals, text = override.partition("=")
    keys, name = path.strip().split("."), f"--set {cut(override)}"
    if not equals or len(keys) < 2 or not all(keys):
        problems.append(f"{name}: expected section.key=value")
        return
    if len(keys) > MAX_DEPTH:
        problems.append(f"{name}: more than {MAX_DEPTH} levels deep")
        return
    if not is_utf8(override):
        problems.append(f"{name}: not UTF-8")
        return
    try:
        value = parse_yaml(text, name)
    except ConfigError as error:
        if not _is_text(keys):
            problems.append(str(error))
            return
        value = text
    if _is_text(keys) and value is not None and text[:1] not in ("'", '"'):
        value = text  # as typed: a path or a name may hold what YAML would read otherwise
    for key in keys[:-1]:
        if values.get(key) is None:  # absent, or a section without keys
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            problems.append(f"{name}: {cut(key)} is not a section")
            return
    values[keys[-1]] = value


def _is_text(keys: list[str]) -> bool:
    """Whether section.key takes any text."""
    section = typing.get_type_hints(Config).get(keys[0])
    hint = (
        typing.get_type_hints(section).get(keys[1])
        if section is not None and len(keys) == 2
        else None
    )
    return hint is str or (
        typing.get_origin(hint) in (typing.Union, types.UnionType) and str in typing.get_args(hint)
    )


def _build(cls, values: Any, prefix: str, problems: list[str]):
    if values is None:
        values = {}
    if not isinstance(values, dict):
        problems.append(
            f"{prefix.rstrip('.')}: expected a section with keys {', '.join(_names(cls))}; got {shown(values)}"
        )
        return cls()
    hints, result = typing.get_type_hints(cls), {}
    for key, value in values.items():
        if key not in hints:
            problems.append(_unknown(str(key), prefix, _names(cls)))
        elif dataclasses.is_dataclass(hints[key]):
            result[key] = _build(hints[key], value, f"{prefix}{key}.", problems)
        else:
            try:
                result[key] = _convert(value, hints[key])
            except ValueError as error:
                problems.append(f"{prefix}{key} is {shown(value)}: expected {error}")
    return cls(**result)


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the hinted type, or ValueError(what was expected)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        try:
            return _convert(value, next(a for a in arguments if a is not type(None)))
        except ValueError as error:
            raise ValueError(f"{error}, or null") from None
    if origin is Literal:
        if isinstance(value, bool) and not any(isinstance(a, bool) for a in arguments):
            value = {True: "on", False: "off"}[value]  # `true` and `false` for the words on and off
        if value in arguments:
            return value
        raise ValueError(f"one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        if dataclasses.is_dataclass(arguments[0]):
            return _convert_list(value, arguments[0])
        if not isinstance(value, (list, tuple)):
            raise ValueError(
                "a list of texts"
                if arguments[0] is str
                else "a list of [progress, value] points, for example [[0, 1.0], [1, 0.1]]"
            )
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(item, arguments[0]) for item in value)
        if len(value) != len(arguments):
            raise ValueError("points of two numbers: [progress, value]")
        return tuple(_convert(item, argument) for item, argument in zip(value, arguments))
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ValueError("a whole number")
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError("a finite number")
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return number
    if hint is str:
        if isinstance(value, str):
            return value
        raise ValueError("text")
    if hint is dict:
        if not isinstance(value, dict):
            raise ValueError("a mapping")
        problem = _not_plain(value, MAX_DEPTH)
        if problem is not None:
            raise ValueError(f"a mapping of plain values, {problem}")
        return value
    raise TypeError(
        f"no conversion to {hint}"
    )  # a field type this loader does not know: a programming error


def _not_plain(value: Any, depth: int) -> str | None:
    """What keeps a value from being written as JSON and read back the same, or None."""
    if depth == 0:
        return f"at most {MAX_DEPTH} levels deep"
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"with texts as keys, not {shown(key)}"
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, float) and not math.isfinite(value):
        return f"with finite numbers, not {value}"
    elif value is None or isinstance(value, (str, bool, int, float)):
        return None
    else:
        return f"not {shown(value)}"
    for part in parts:
        problem = _not_plain(part, depth - 1)
        if problem is not None:
            return problem
    return None


def _convert_list(value: Any, cls) -> tuple:
    """A list of mappings as objects; ValueError(what was expected)."""
    names = ", ".join(_names(cls))
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"a list of mappings with the keys {names}")
    problems: list[str] = []
    result = tuple(_build(cls, item, f"[{number}].", problems) for number, item in enumerate(value))
    if problems:
        raise ValueError(f"a list of mappings with the keys {names}; {problems[0]}")
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
