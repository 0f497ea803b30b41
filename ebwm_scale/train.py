"""Train an energy-based world model or the Transformer++ baseline.

    deepspeed ebwm_scale/train.py --config configs/quickstart.yaml [--set section.key=value ...]
        [--run-dir DIR] [--resume [--strict] [--accept-new-rate]] [--extend RUN] [--dry-run]

The same file runs under python, torchrun and srun, and as `ebwm train`. Exit codes: 0 finished; 2
bad configuration or data, nothing started; 75 saved after a signal or time limit, run again with
--resume; 76 stopped because gradients were not finite several steps in a row; 77 a process hung or
died; 1 anything else. A run may be resumed by any number of processes and at any ZeRO stage.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Started as a file: Python put this folder on the path, where `data`, `model` and `config`
    # would hide other people's modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ebwm_scale.config import resolved
from ebwm_scale.config.load import load_config
from ebwm_scale.config.permissions import add_permissions, refuse_unpermitted
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, add_config, add_overrides, command
from ebwm_scale.core.console import leave_quietly, say
from ebwm_scale.core.errors import EXIT_FINISHED, EXIT_RUN_AGAIN, ConfigError, UserError
from ebwm_scale.core.plain_text import one_line, shorten
from ebwm_scale.core.processes import find_place
from ebwm_scale.core.run_location import check_folder
from ebwm_scale.training.preemption import StopFlag

if TYPE_CHECKING:
    from ebwm_scale.core.world import World


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add_config(parser, required=True)
    add_overrides(parser)
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="default: runs/<name of the configuration file>",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest good checkpoint of the run folder, if there is one",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="with --resume: refuse, if the newest checkpoint is damaged, to take the one before "
        "it",
    )
    parser.add_argument(
        "--accept-new-rate",
        action="store_true",
        help="with --resume: go on although the learning rate is now higher than it was to be",
    )
    parser.add_argument(
        "--extend",
        type=Path,
        default=None,
        metavar="RUN",
        help="begin from the checkpoint of RUN from which the learning rate does not jump, such as "
        "the last one before the decay of wsd; with --resume: unless there is one in --run-dir",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would run and what it costs; train nothing",
    )
    add_permissions(parser)
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    at_once = "the dry run is given up; nothing was started" if options.dry_run else None
    stop = StopFlag(at_once)  # before the imports, which take seconds
    try:
        several = find_place().size > 1 and not options.dry_run
        if not several:
            return run(read_options(options), options, stop)
        config = None
        problem = None
        try:
            config = read_options(options)
        except UserError as error:
            problem = error
        return run(config, options, stop, problem=problem)
    finally:
        stop.ignore()


def read_options(options: argparse.Namespace) -> Config:
    """The configuration, and where the run is written.

    UserError for what is seen before the imports that take seconds.
    """
    config = load_config(options.config, options.overrides)
    refuse_unpermitted(config, allow_pipe=options.allow_pipe)
    if options.run_dir is None:
        options.run_dir = Path("runs") / Path(options.config).stem
    one_line("the run folder", options.run_dir)
    check_folder(options.run_dir, resume=options.resume)
    if options.extend is not None and options.extend.resolve() == options.run_dir.resolve():
        raise ConfigError(
            f"--extend {options.extend} is the run folder itself: "
            "name a new one with --run-dir, the run to extend stays as it is"
        )
    return config


def run(
    config: Config | None,
    options: argparse.Namespace,
    stop: StopFlag,
    *,
    problem: UserError | None = None,
) -> int:
    """Everything between the options and the exit code.

    problem: why this one of several processes has no configuration. Another machine may lack a file
    or see a full disk; then all of them are refused, and none waits for one that has left.
    """
    import torch

    from ebwm_scale.checkpoint.reader import CheckpointInfo, find_latest, published
    from ebwm_scale.checkpoint.writer import put_back_replaced
    from ebwm_scale.core.faults import Faults
    from ebwm_scale.core.numerics import flush_denormals
    from ebwm_scale.core.ownership import Ownership
    from ebwm_scale.core.world import is_connection_error
    from ebwm_scale.planning.dry_run import describe
    from ebwm_scale.refinement.tiling import tile_bytes
    from ebwm_scale.training.deepspeed.engine import Engine
    from ebwm_scale.training.distributed import init_distributed
    from ebwm_scale.training.dry_run import dry_run
    from ebwm_scale.training.extending import begin_from
    from ebwm_scale.training.preflight import check_run
    from ebwm_scale.training.resuming import load_newest
    from ebwm_scale.training.run_folder import RunFolder
    from ebwm_scale.training.sequence_groups import sequence_group
    from ebwm_scale.training.trainer import Trainer
    from ebwm_scale.training.watchdog import Watchdog
    from ebwm_scale.world_model import WorldModel

    flush_denormals()
    place = find_place()

    def warn(text: str) -> None:
        say(f"warning: {text}", error=True)

    world = None
    if place.size > 1 and not options.dry_run:
        world = init_distributed()  # rank 0 reads the data's lists for all
        refuse_together(problem, config, world)
    assert config is not None, "a process without a configuration has been refused"
    path = options.run_dir
    if options.resume and config.checkpoint.remote is not None and not options.dry_run:
        fetch_to_empty_machine(config.checkpoint.remote, path, world)
    faults = Faults(os.environ.get("EBWM_FAULTS"), place.rank)
    ownership = Ownership(path, faults)
    extend = options.extend
    has_begun = options.resume and bool(published(path / "checkpoints"))
    if has_begun if world is None else world.broadcast_object(has_begun):
        extend = None
    check = check_run(
        config,
        world_size=place.size,
        run_dir=path,
        resume=options.resume,
        strict=options.strict,
        accept_new_rate=options.accept_new_rate,
        extend=extend,
        report=lambda text: say(text, error=True),
        group=world,
        ownership=None if options.dry_run else ownership,
    )
    check.refuse()  # before anything is written
    config, splits, paths = check.config, check.splits, dict(check.attention)
    pointwise = paths.pop("pointwise", "reference")
    torch.manual_seed(config.train.seed)
    if options.dry_run:
        dry_run(check, data_summary(config, splits), say)
        return EXIT_FINISHED

    extended = check.saved if extend is not None else None
    if extended is not None:
        check.saved = begin_from(extended, path, world)
        options.resume = True

    def newest() -> CheckpointInfo | None:
        """What there is to go on from now; rank 0's choice is what counts (load_newest)."""
        if not options.resume:
            return None
        if place.rank == 0:
            put_back_replaced(path / "checkpoints")
        return find_latest(path / "checkpoints", warn, strict=options.strict)

    world = replace(world or init_distributed(), sequence=config.parallel.sequence)
    stop.max_minutes = config.train.max_minutes
    faults.at("start")
    if stopped_before_training(stop, world, "before the model was built"):
        return EXIT_RUN_AGAIN
    model = WorldModel(config)
    model.sequence = sequence_group(world)
    if world.is_main and check.saved is None:
        say(
            describe(
                config,
                model,
                world_size=world.size,
                data_summary=data_summary(config, splits),
                seconds_per_step=None,
            )
        )
    if stopped_before_training(stop, world, "before the engine was built"):
        return EXIT_RUN_AGAIN
    engine = Engine(
        config, model, world, micro_batch=check.micro_batch, accumulation=check.accumulation
    )
    folder = RunFolder(path, config, world, faults, ownership)
    watchdog = Watchdog(
        path,
        rank=world.rank,
        world_size=world.size,
        limit_s=60 * config.train.hang_minutes,
        faults=faults,
    )
    if config.train.hang_minutes:
        world.leave_hangs_to_the_watchdog()
    trainer = Trainer(
        config,
        engine,
        world,
        folder,
        stop,
        splits["train"],
        splits["validation"],
        micro_batch=check.micro_batch,
        watchdog=watchdog,
        faults=faults,
        allow_pipe=options.allow_pipe,
        text_stream=check.text_stream,
        sets=check.sets,
    )
    saved = load_newest(trainer, check.saved, newest, world, say)
    folder.take()
    trainer.truncate_later_metrics()
    if saved is not None:
        if extended is not None:
            folder.event("extend", step=trainer.step, of=str(extended.folder))
        folder.event("resume", step=trainer.step, folder=saved.folder.name, changes=check.changes)
        source = saved.folder if extended is None else extended.folder
        resumed = f"resumed at step {trainer.step} of {config.train.max_steps} from {source}"
        folder.say("\n".join([resumed, *check.changes]))
    else:
        folder.event("start", world_size=world.size, command=sys.argv, attention=paths)
    for _, text in check.warnings:
        folder.warn(text)
    if check.text_stream is not None:
        folder.say(check.text_stream.describe())
    elif config.data.stream:
        folder.say(
            "data.stream: shards are streamed; batches then depend on the number of processes, "
            "and a resume goes on with the next shards"
        )
    if world.sequence > 1:
        positions = resolved.context_length(config)
        folder.say(
            f"{world.sequence} processes share each sample of {positions} positions: "
            f"{positions // world.sequence} each"
        )
    streams = ", ".join(f"the {stream} stream: {path}" for stream, path in paths.items())
    folder.say(f"attention of {streams}")
    model.graphs.say = folder.say
    if world.device.type == "cuda":
        in_tiles = tile_bytes(world.device) / 2**30
        folder.say(f"pointwise operations: {pointwise}; states in tiles of {in_tiles:.1f} GiB")
    try:
        code = trainer.run()
    except RuntimeError as error:
        if world.size > 1 and is_connection_error(error):
            watchdog.lost(f"a collective failed ({str(error).splitlines()[0]})")
        raise
    if code == EXIT_FINISHED:
        finish(config, folder, engine.module, splits, world)
    folder.close(unsaved=trainer.unsaved)
    # A launcher ends those that stay long after the first one has left; closing may take a while.
    world.barrier()
    return code


def fetch_to_empty_machine(url: str, run_dir: Path, world: World | None) -> None:
    """Bring the run folder from checkpoint.remote where there is none; rank 0 does it for all.

    Raises on every rank what went wrong.
    """
    from ebwm_scale.checkpoint.remote import fetch_run

    problem: UserError | None = None
    if (world is None or world.is_main) and not run_dir.exists():
        try:
            fetch_run(url, run_dir, lambda text: say(text, error=True))
        except UserError as error:
            problem = error
    if world is not None:
        problem = world.broadcast_object(problem)
    if problem is not None:
        raise problem


def refuse_together(problem: UserError | None, config: Config | None, world: World) -> None:
    """UserError on every rank where one has a problem, or has read another configuration."""
    found = world.all_gather_object((problem, None if config is None else config.to_dict()))
    for rank, (of_rank, _) in enumerate(found):
        if of_rank is not None:
            raise type(of_rank)(f"rank {rank}: {of_rank}" if rank else str(of_rank))
    for rank, (_, values) in enumerate(found):
        if values != found[0][1]:
            raise ConfigError(
                f"rank {rank} has read another configuration than rank 0 from the same name: copy "
                "the file to every machine, or keep it where all of them see it"
            )


def stopped_before_training(stop: StopFlag, world: World, where: str) -> bool:
    """Whether a signal came during start-up, on any rank: there is nothing to save, what is there
    is as it was.
    """
    reason = stop.stop_requested(world, time_limit=False)
    if reason is not None and world.is_main:
        say(f"stopped {where} ({reason}); run the same command with --resume to go on")
    return reason is not None


def finish(config: Config, folder, model, splits, world) -> None:
    """After the last step: samples to read, the summary, and the report."""
    from ebwm_scale.checkpoint.load import load_checkpoint
    from ebwm_scale.inference.samples import samples_to_look_at
    from ebwm_scale.planning.parameters import count_parameters

    if world.is_main:
        if config.deepspeed.zero_stage == 3:  # no process has the whole model
            model, _ = load_checkpoint(folder.path, device=world.device)
        folder.write(
            "summary.json",
            {"parameters": count_parameters(model), "data": data_summary(config, splits)},
        )
        folder.write(
            "samples.json",
            {
                "step": config.train.max_steps,
                **samples_to_look_at(model, splits["validation"], seed=config.train.seed),
            },
        )
        folder.event("finish", step=config.train.max_steps)
        folder.say(f"finished{report_in_words(folder)}")
    world.barrier()


def report_in_words(folder) -> str:
    """Write the report; where it is, or in one line why it is not there: the run has finished
    either way.
    """
    from ebwm_scale.report import write_report

    try:
        return f"; report: {write_report(folder.path)}"
    except Exception as error:  # noqa: BLE001  no trained model is worth less for a page's defect
        reason = shorten(error, 300)
        folder.warn(
            f"the report was not written: {type(error).__name__}: {reason}; "
            f"once that is mended: python -m ebwm_scale.report {folder.path}"
        )
        return ", without a report"


def data_summary(config: Config, splits: dict) -> dict:
    train, validation = splits["train"], splits["validation"]
    content = train.manifest.content
    sources = ", ".join(source.manifest for source in config.data.sources)
    return {
        "manifest": config.data.manifest or sources,
        "fingerprint": train.fingerprint,
        "train_samples": len(train),
        f"train_{content.unit}": train.num_targets,
        "validation_samples": len(validation),
        f"validation_{content.unit}": validation.num_targets,
        content.size_name: content.size,
        "context_length": config.data.context_length,
    }


if __name__ == "__main__":
    code = main()
    leave_quietly()
    sys.exit(code)
