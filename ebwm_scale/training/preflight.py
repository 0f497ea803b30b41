"""What a run is refused for, found before anything is written: the one check of train.py, of its
--dry-run and of the doctor.

    check = check_run(config, world_size=8, run_dir=Path("runs/mine"), resume=True)
    check.problems      (subject, one line) for each reason to refuse it; check.refuse() raises them
    check.warnings      the same for what runs, but is hardly meant
    check.config        with the sizes of its data; check.splits, check.saved: opened and verified

Nothing is written, and no process group is started; several processes of a run have joined theirs
before, and share what is found. What can only be known by doing it (memory, a network, a full
disk) is not here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ebwm_scale.checkpoint.reader import CheckpointInfo, check_same_run, find_latest, saved_config
from ebwm_scale.checkpoint.remote import check_remote
from ebwm_scale.checkpoint.writer import put_back_replaced
from ebwm_scale.config import resolved
from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.checks import batch_arithmetic, filled_problems
from ebwm_scale.config.rate_schedule import is_known
from ebwm_scale.config.schema import ConditionConfig, Config
from ebwm_scale.config.sequence_checks import num_readers
from ebwm_scale.core.errors import ConfigError, UserError
from ebwm_scale.core.ownership import Ownership
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.core.run_location import check_folder
from ebwm_scale.core.world import World
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.format.side_files import refuse_another_tokenizer
from ebwm_scale.data.loading.batches import DataState, check_context
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.opening import open_splits
from ebwm_scale.data.loading.streaming import check_stream
from ebwm_scale.data.text_stream.loader import cursors_of
from ebwm_scale.data.text_stream.strands import TextStream, open_text_stream
from ebwm_scale.model.attention_paths import attention_paths
from ebwm_scale.model.reach import reach_of
from ebwm_scale.training.downstream import check_downstream
from ebwm_scale.training.extending import last_without_a_jump
from ebwm_scale.training.schedule import RateChange, describe_schedule_changes, unusual_schedule
from ebwm_scale.training.tracking import check_trackers

MANY_EPOCHS = 100
SPLITS = ("train", "validation")


@dataclass
class RunCheck:
    """What check_run found.

    config: with the sizes of its data, where they could be read; world_size: processes.
    """

    config: Config
    world_size: int
    micro_batch: int = 0
    accumulation: int = 0
    splits: dict[str, ShardedSplit | MixedSplit] = field(default_factory=dict)
    sets: dict[str, ShardedSplit | MixedSplit] = field(default_factory=dict)  # evaluation.sets
    text_stream: TextStream | None = None  # where the run reads raw text
    attention: dict[str, str] = field(default_factory=dict)  # stream -> what computes it
    saved: CheckpointInfo | None = None
    changes: list[str] = field(default_factory=list)  # since the checkpoint, one line each
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)

    def attempt(self, subject: str, function: Callable, *arguments, **options):
        """The function's result, or None where it raises a UserError, which is added to the
        problems.
        """
        try:
            return function(*arguments, **options)
        except UserError as error:
            self.problems.append((subject, str(error)))
            return None

    def share_problems(self, group: World | None) -> bool:
        """Take over the problems of all ranks; whether there are any. Every rank must call it."""
        if group is not None:
            everywhere = []
            for problems in group.all_gather_object(self.problems):
                everywhere += [problem for problem in problems if problem not in everywhere]
            self.problems = everywhere
        return bool(self.problems)

    def refuse(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self.problems:
            raise ConfigError("\n".join(dict.fromkeys(text for _, text in self.problems)))


def check_run(
    config: Config,
    *,
    world_size: int,
    run_dir: Path,
    resume: bool = False,
    strict: bool = False,
    accept_new_rate: bool = False,
    extend: Path | None = None,
    report: Callable[[str], None] = print,
    group: World | None = None,
    ownership: Ownership | None = None,
) -> RunCheck:
    """Everything that train.py refuses, in one place.

    extend: the run folder whose checkpoint is gone on from, without a jump of the learning rate.

    report: told what is skipped (hashes of large datasets, damaged checkpoints). group: the
    processes of the run, which must all call this: rank 0 reads the data's lists for them.
    ownership: of the run folder, where this process is going to write to it.
    """
    check = RunCheck(config, world_size)
    is_main = group is None or group.is_main
    check.attempt("run folder", check_folder, run_dir, resume=resume)
    if ownership is not None and not check.problems:
        check.attempt("run folder", ownership.refuse_if_in_use, watch_aloud=is_main)
    if check.share_problems(group):
        return check  # said at once: hashing a dataset takes minutes
    if ownership is not None and resume and is_main:
        put_back_replaced(run_dir / "checkpoints")
    batch = check.attempt("batch", batch_of, config, world_size)
    check.micro_batch, check.accumulation = batch or (0, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check.attention = check.attempt("kernels", check_attention, config, device) or {}
    check.attempt("tracking", check_trackers, config)
    if config.checkpoint.remote is not None and is_main:
        check.attempt("checkpoint", check_remote, config.checkpoint.remote, resume=resume)
    check.attempt("evaluation", check_downstream, config)
    if config.deepspeed.raw and batch is not None:
        check.attempt("deepspeed", check_deepspeed, config, *batch)
    check_data(check, report, group)
    if check.config.data.mask_documents and not config.data.mask_documents:
        check.attention = check.attempt("kernels", check_attention, check.config, device) or {}
    if extend is not None:
        check_extended(check, extend, report=report)
    elif resume:
        check_saved(check, run_dir, strict=strict, accept_new_rate=accept_new_rate, report=report)
    if is_known(check.config):
        check.warnings += [("schedule", text) for text in unusual_schedule(check.config)]
    check.share_problems(group)
    return check


def batch_of(config: Config, world_size: int) -> tuple[int, int]:
    """(micro batch, accumulation steps) of each process; ConfigError where they do not divide."""
    readers = num_readers(config, world_size)
    return batch_arithmetic(config.train, readers, paired=config.refinement.replay)


def check_attention(config: Config, device: torch.device) -> dict[str, str]:
    """What computes the attention of each stream; ConfigError if the backend asked for cannot."""
    precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    try:
        return attention_paths(
            config.model,
            device,
            precision,
            has_groups=resolved.context_group(config) > 1,
            has_documents=bool(config.data.mask_documents),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_deepspeed(config: Config, micro_batch: int, accumulation: int) -> None:
    """ConfigError if DeepSpeed does not take the configuration with deepspeed.raw in it."""
    from ebwm_scale.training.deepspeed.engine import deepspeed_config

    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        if key in config.deepspeed.raw:
            raise ConfigError(
                f"deepspeed.raw holds {key}: the batch follows from train.global_batch_size and "
                "train.micro_batch_size; leave it out"
            )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = deepspeed_config(
        config, micro_batch=micro_batch, accumulation=accumulation, num_parameters=1
    )
    try:
        DeepSpeedConfig(settings)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"deepspeed.raw: DeepSpeed refuses it: {shorten(error, 200)}") from None


def check_data(check: RunCheck, report: Callable[[str], None], group: World | None) -> None:
    """Open the splits, take the sizes from them, and hold context and stream against them."""
    config = check.config
    sources = [(source.manifest, source.weight) for source in config.data.sources]
    if not sources:
        sources = [(config.data.manifest, 1.0)]
    if sources[0][0] is None:
        problem = (
            "data.manifest is absent: make a dataset with one of "
            "tools/make_*_shards.py and name its manifest.json"
        )
        check.problems.append(("data", problem))
        return
    splits = check.attempt(
        "data",
        open_splits,
        sources,
        SPLITS,
        verify=config.data.verify,
        report=report,
        group=group,
    )
    if splits is None:
        return
    check.splits = splits
    train = check.splits["train"]
    filled = check.attempt("data", fill_from_data, config, train.manifest)
    if filled is None:
        return
    if config.data.mask_documents is None:
        warn_of_documents(check, filled, train.manifest)
    check.config = config = filled
    check.attempt("data", check_filled, config)
    check.attempt("data", check_context, train.manifest, config.data.context_length)
    check_sets(check, report, group)
    check.attempt("data", limit_sources, config, train)
    if config.data.stream and config.data.stream_format == "text":
        check.text_stream = check.attempt(
            "data",
            open_text_stream,
            config,
            train.manifest,
            world_size=check.world_size,
            group=group,
        )
    elif config.data.stream:
        check.attempt("data", check_stream, config.data.stream, check.world_size)
    needed = BatchRamp.of(config.train).samples_before(config.train.max_steps)
    epochs = needed / len(train)
    if epochs > MANY_EPOCHS and check.text_stream is None:
        warning = (
            f"train.max_steps {config.train.max_steps} x train.global_batch_size "
            f"{config.train.global_batch_size} are {epochs:,.0f} epochs of "
            f"{len(train):,} samples: lower train.max_steps, or name a larger dataset"
        )
        check.warnings.append(("data", warning))
    few, size = config.refinement.candidates, resolved.state_size(config)
    if few is not None and few >= size:
        warning = (
            f"refinement.candidates is {few}, the vocabulary has {size} tokens: all of them move "
            "in every step; give fewer, or leave the key out"
        )
        check.warnings.append(("refinement", warning))


def check_sets(check: RunCheck, report: Callable[[str], None], group: World | None) -> None:
    """Open evaluation.sets, and hold each against the run's sizes, tokenizer and context."""
    for held_out in check.config.evaluation.sets:
        opened = check.attempt(
            f"evaluation.sets {held_out.name}",
            open_splits,
            [(held_out.manifest, 1.0)],
            ["validation"],
            verify=check.config.data.verify,
            report=report,
            group=group,
        )
        if opened is not None:
            split = opened["validation"]
            check.sets[held_out.name] = split
            check.attempt("evaluation", check_set, check.config, held_out.name, split.manifest)


def check_set(config: Config, name: str, manifest: Manifest) -> None:
    """ConfigError or DataError for a held-out set that is not of the run's kind."""
    try:
        filled = fill_from_data(config, manifest)
        check_context(manifest, resolved.context_length(config))
    except UserError as error:
        raise ConfigError(f"evaluation.sets {name}: {error}") from None
    for key in ("group_size", "grid", "conditions"):
        of_run, of_set = getattr(config.data, key), getattr(filled.data, key)
        if of_run != of_set:
            raise ConfigError(
                f"evaluation.sets {name}: data.{key} is {of_run} in this run, and {of_set} in "
                f"{manifest.path}: name a dataset that was made alike"
            )


def warn_of_documents(check: RunCheck, filled: Config, manifest: Manifest) -> None:
    """Say where a recipe keeps a dataset's default from being followed."""
    if getattr(manifest.content, "mask_documents", False) and not filled.data.mask_documents:
        warning = (
            f"{manifest.path} asks for data.mask_documents, which model.conditioning time_embed "
            "cannot: attention crosses documents; set data.mask_documents=false to say so"
        )
        check.warnings.append(("data", warning))


def check_filled(config: Config) -> None:
    """ConfigError for a configuration that does not fit its data."""
    problems = filled_problems(config)
    try:
        reach_of(config.model.reach, resolved.grid(config))
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def check_saved(
    check: RunCheck,
    run_dir: Path,
    *,
    strict: bool,
    accept_new_rate: bool,
    report: Callable[[str], None],
) -> None:
    """Find the checkpoint to go on from, and hold the configuration, the data and the learning rate
    against it.
    """
    saved = check.attempt(
        "checkpoint",
        find_latest,
        run_dir / "checkpoints",
        lambda text: report(f"warning: {text}"),
        strict=strict,
    )
    if saved is not None:
        compare_with_saved(check, saved, accept_new_rate=accept_new_rate)


def check_extended(check: RunCheck, run: Path, *, report: Callable[[str], None]) -> None:
    """Find the checkpoint of another run from which the learning rate does not jump, and hold the
    rest against it.
    """
    if check.problems:  # without its data, a schedule in tokens does not say where it stands
        return
    saved = check.attempt(
        "checkpoint",
        last_without_a_jump,
        run,
        check.config,
        lambda text: report(f"warning: {text}"),
    )
    if saved is not None:
        compare_with_saved(check, saved, accept_new_rate=False)


def compare_with_saved(check: RunCheck, saved: CheckpointInfo, *, accept_new_rate: bool) -> None:
    """Hold the configuration, the data and the learning rate against a checkpoint."""
    check.saved = saved
    before = check.attempt("checkpoint", saved_config, saved.folder)
    if before is None:
        return
    changes = check.attempt("checkpoint", check_same_run, before, check.config)
    check.changes = changes or []
    if saved.trainer["world_size"] != check.world_size:
        check.changes.append(
            f"the number of processes was {saved.trainer['world_size']}, is {check.world_size}"
        )
    if "data" not in saved.trainer:  # weights alone: the run starts at step 0
        return
    if "train" in check.splits:
        check.attempt(
            "checkpoint",
            DataState.load_state_dict,
            saved.trainer["data"],
            fingerprint=check.splits["train"].fingerprint,
            seed=check.config.train.seed,
        )
    if check.text_stream is not None:
        check.attempt("checkpoint", cursors_of, saved.trainer.get("text_stream"), check.text_stream)
    check.changes += describe_schedule_changes(before, check.config, saved.step)
    if not (is_known(before) and is_known(check.config)):
        return  # the data's problems are said already
    rate = RateChange.of(before, check.config, saved.step)
    if rate.changed:
        check.changes.append(rate.describe())
    if rate.raised and not accept_new_rate:
        check.problems.append(("schedule", rate.refusal(before, check.config)))


def fill_from_data(config: Config, manifest: Manifest) -> Config:
    """The configuration with sizes, context length and tokenizer hash of the data where absent.

    ConfigError where sizes clash, DataError for another tokenizer than the run's.
    """
    kind = {"text": "vocabulary", "video": "embedding"}[manifest.modality]
    if config.state.kind != kind:
        raise ConfigError(
            f"state.kind is {config.state.kind}, but {manifest.path} holds {manifest.modality}; "
            f"use state.kind={kind}"
        )
    section, key = ("model", "vocabulary_size") if kind == "vocabulary" else ("state", "dimension")
    given, size = getattr(getattr(config, section), key), manifest.content.size
    if given not in (None, size):
        raise ConfigError(
            f"{section}.{key} is {given}, the dataset {manifest.path} has {size}; leave the key out"
        )
    context_length = config.data.context_length or manifest.context_length
    groups = _groups_of(config, manifest)
    refuse_another_tokenizer(config, manifest)
    tokenizer_sha256 = getattr(manifest.content, "tokenizer_sha256", None)
    eos_id = config.data.eos_id
    is_raw_text = bool(config.data.stream) and config.data.stream_format == "text"
    mask_documents = masks_documents(config, manifest)
    if mask_documents:
        eos_id = _eos_id(eos_id, manifest)
    return config.replace(
        **{section: getattr(config, section).replace(**{key: size})},
        data=config.data.replace(
            context_length=context_length,
            tokenizer_sha256=tokenizer_sha256,
            eos_id=eos_id,
            mask_documents=mask_documents,
            scored_share=None if is_raw_text else manifest.scored_share,
            conditions=_conditions_of(config, manifest),
            **groups,
        ),
    )


def limit_sources(config: Config, train: ShardedSplit | MixedSplit) -> None:
    """Hold each source of a mixture to its epochs and tokens.

    ConfigError where all of them together do not last for the run.
    """
    sources = config.data.sources
    if all(source.epochs is None and source.tokens is None for source in sources):
        return
    parts = train.parts if isinstance(train, MixedSplit) else [train]
    length = resolved.context_length(config)
    limits: list[int | None] = []
    for source, part in zip(sources, parts):
        limit = None if source.epochs is None else int(source.epochs * len(part))
        if source.tokens is not None:
            of_tokens = source.tokens // length
            limit = of_tokens if limit is None else min(limit, of_tokens)
        limits.append(limit)
    total = train.limit(limits) if isinstance(train, MixedSplit) else limits[0]
    needed = BatchRamp.of(config.train).samples_before(config.train.max_steps)
    if total is not None and total < needed:
        raise ConfigError(
            f"data.sources last for {total:,} samples with their epochs and tokens, and "
            f"train.max_steps {config.train.max_steps} x train.global_batch_size "
            f"{config.train.global_batch_size} takes {needed:,}: lower train.max_steps to "
            f"{total // config.train.global_batch_size}, raise the budgets, or leave one source "
            "without"
        )


def masks_documents(config: Config, manifest: Manifest) -> bool:
    """data.mask_documents, or what the dataset says; a recipe that cannot mask does not by default.

    Of a mixture, manifest is that of its first source.
    """
    if config.data.mask_documents is not None:
        return config.data.mask_documents
    asked = getattr(manifest.content, "mask_documents", False)
    return asked and config.model.conditioning != "time_embed"


def _groups_of(config: Config, manifest: Manifest) -> dict[str, Any]:
    """The keys of `data` that say how tokens are grouped; None where they are not.

    ConfigError where the configuration gives others.
    """
    content = manifest.content
    found: dict[str, Any] = {"group_size": None, "grid": content.grid}
    if content.group_size > 1:
        found["group_size"] = content.group_size
    for key, value in found.items():
        given = getattr(config.data, key)
        if given not in (None, value):
            raise ConfigError(
                f"data.{key} is {given}, the dataset {manifest.path} has {value or 'none'}; leave "
                "the key out"
            )
    return found


def _conditions_of(config: Config, manifest: Manifest) -> tuple[ConditionConfig, ...]:
    """What the dataset's frames are conditioned on; ConfigError where the configuration says
    otherwise.
    """
    found = tuple(
        ConditionConfig(
            name=condition.name,
            kind="discrete" if condition.is_discrete else "continuous",
            width=condition.width,
            num_values=condition.num_values or None,
        )
        for condition in manifest.content.conditions
    )
    given = config.data.conditions
    if given not in ((), found):
        raise ConfigError(
            f"data.conditions are {_named(given)}, the dataset {manifest.path} has "
            f"{_named(found)}; leave the key out"
        )
    return found


def _named(conditions: tuple[ConditionConfig, ...]) -> str:
    """A few words on conditions."""
    words = []
    for condition in conditions:
        values = f" of {condition.num_values} values" if condition.num_values else ""
        words.append(f"{condition.name} ({condition.kind}, width {condition.width}{values})")
    return ", ".join(words) or "none"


def _eos_id(given: int | None, manifest: Manifest) -> int | None:
    """The token between the dataset's documents; ConfigError if the run's is another."""
    found = getattr(manifest.content, "eos_id", None)
    if given not in (None, found):
        raise ConfigError(
            f"data.eos_id is {given}, the dataset {manifest.path} has {found}; leave the key out"
        )
    return found
