"""Train an energy-based world model or the Transformer++ baseline.

    deepspeed ebwm_scale/train.py --config configs/quickstart.yaml [--set section.key=value ...] [--run-dir DIR] [--resume [--strict]] [--dry-run]

The same file runs under python, torchrun and srun. Exit codes: 0 finished; 2 bad configuration or data, nothing started; 75 saved after a
signal or time limit, run again with --resume; 76 stopped because gradients were not finite several steps in a row; 77 a process hung or
died; 1 anything else. A run may be resumed by any number of processes and at any ZeRO stage.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Started as a file: Python put this folder on the path, where `data`, `model` and `config` would hide other people's modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import time

from ebwm_scale.arguments import ArgumentParser
from ebwm_scale.config import Config, batch_arithmetic, load_config
from ebwm_scale.errors import EXIT_FINISHED, EXIT_RUN_AGAIN, CheckpointError, ConfigError, UserError
from ebwm_scale.training.stop import StopFlag


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="YAML: a file, or a shipped one: python -m ebwm_scale configs",
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="wins over the file",
    )
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
        help="with --resume: refuse, if the newest checkpoint is damaged, to take the one before it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would run and what it costs; train nothing",
    )
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    stop = StopFlag()  # before the imports, which take seconds
    try:
        config = load_config(options.config, options.overrides)
        return run(config, options, stop)
    except UserError as error:
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
            print(error, file=sys.stderr)
        return error.exit_code
    finally:
        stop.ignore()


def run(config: Config, options: argparse.Namespace, stop: StopFlag) -> int:
    """Everything between the parsed command line and the exit code."""
    import torch

    from ebwm_scale.accounting import describe
    from ebwm_scale.data.mixing import open_sources
    from ebwm_scale.denormals import flush_denormals
    from ebwm_scale.model.blocks import attention_paths
    from ebwm_scale.world_model import WorldModel
    from ebwm_scale.training.checkpoint import check_same_run, find_latest, saved_config
    from ebwm_scale.training.distributed import is_connection_error, join_world
    from ebwm_scale.training.engine import Engine
    from ebwm_scale.training.faults import Faults
    from ebwm_scale.training.run_folder import RunFolder
    from ebwm_scale.training.trainer import Trainer
    from ebwm_scale.training.watchdog import Watchdog

    sources = [(source.manifest, source.weight) for source in config.data.sources] or [
        (config.data.manifest, 1.0)
    ]
    if sources[0][0] is None:
        raise ConfigError(
            "data.manifest is absent: make a dataset with tools/make_text_shards.py or make_video_shards.py and name its manifest.json"
        )
    flush_denormals()
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS") or "1"))
    batch_arithmetic(
        config.train, world_size, paired=config.refinement.replay
    )  # before anything is started or read

    say = (
        print
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
        else (lambda *_, **__: None)
    )
    splits = {
        name: open_sources(sources, name, verify=config.data.verify, report=say)
        for name in ("train", "validation")
    }
    config = fill_from_data(config, splits["train"].manifest)
    torch.manual_seed(config.train.seed)
    if options.dry_run:
        model = WorldModel(config)
        seconds = measure_step(config, model, world_size)
        say(config.to_yaml())
        say(
            describe(
                config,
                model,
                world_size=world_size,
                data_summary=data_summary(config, splits),
                seconds_per_step=seconds,
            )
        )
        return EXIT_FINISHED

    path = options.run_dir or Path("runs") / Path(options.config).stem
    checkpoints = path / "checkpoints"
    saved = (
        find_latest(
            checkpoints,
            lambda text: say(f"warning: {text}", file=sys.stderr),
            strict=options.strict,
        )
        if options.resume
        else None
    )
    if saved is None and (path / "metrics.jsonl").exists() and not options.resume:
        raise CheckpointError(
            f"{path} already holds a run: continue it with --resume, or name another folder with --run-dir"
        )
    changes = []
    if saved is not None:
        changes = check_same_run(saved_config(saved.folder), config)
        if saved.trainer["world_size"] != world_size:
            changes.append(
                f"the number of processes was {saved.trainer['world_size']}, is {world_size}"
            )

    faults = Faults(
        os.environ.get("EBWM_FAULTS"),
        int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))),
    )
    world = join_world()
    stop.max_minutes = config.train.max_minutes
    faults.at("start")
    if stopped_before_training(stop, world, "before the model was built"):
        return EXIT_RUN_AGAIN
    model = WorldModel(config)
    micro_batch, accumulation = batch_arithmetic(
        config.train, world.size, paired=config.refinement.replay
    )
    if world.is_main and saved is None:
        say(
            describe(
                config,
                model,
                world_size=world.size,
                data_summary=data_summary(config, splits),
                seconds_per_step=None,
            ),
            flush=True,
        )
    try:
        paths = attention_paths(
            config.model,
            world.device,
            torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if stopped_before_training(stop, world, "before the engine was built"):
        return EXIT_RUN_AGAIN
    engine = Engine(config, model, world, micro_batch=micro_batch, accumulation=accumulation)
    folder = RunFolder(path, config, is_main=world.is_main)
    watchdog = Watchdog(
        path, rank=world.rank, world_size=world.size, limit_s=60 * config.train.hang_minutes
    )
    trainer = Trainer(
        config,
        engine,
        world,
        folder,
        stop,
        splits["train"],
        splits["validation"],
        micro_batch=micro_batch,
        watchdog=watchdog,
        faults=faults,
    )
    if saved is not None:
        trainer.resume(saved)
        folder.event("resume", step=trainer.step, folder=saved.folder.name, changes=changes)
        folder.say(
            "\n".join(
                [
                    f"resumed at step {trainer.step} of {config.train.max_steps} from {saved.folder}",
                    *changes,
                ]
            )
        )
    else:
        folder.forget_after(0)
        folder.event("start", world_size=world.size, command=sys.argv, attention=paths)
    if config.data.stream:
        folder.say(
            "data.stream: shards are streamed; batches then depend on the number of processes, and a resume goes on with the next shards"
        )
    folder.say(
        "attention of "
        + ", ".join(f"the {stream} stream: {path}" for stream, path in paths.items())
    )
    try:
        code = trainer.fit()
    except RuntimeError as error:
        if world.size > 1 and is_connection_error(error):
            watchdog.lost(f"a collective failed ({str(error).splitlines()[0]})")
        raise
    if code == EXIT_FINISHED:
        finish(config, folder, engine.module, splits, world)
    folder.close()
    world.barrier()  # a launcher ends those that stay long after the first one has left; closing may take rank 0 a while
    return code


def stopped_before_training(stop: StopFlag, world, where: str) -> bool:
    """Whether a signal came during start-up, on any rank: there is nothing to save, what is there is as it was."""
    reason = stop.wanted(world, time_limit=False)
    if reason is not None and world.is_main:
        print(
            f"stopped {where} ({reason}); run the same command with --resume to go on", flush=True
        )
    return reason is not None


def finish(config: Config, folder, model, splits, world) -> None:
    """After the last step: samples to read, the summary, and the report."""
    from ebwm_scale.accounting import count_parameters
    from ebwm_scale.inference.generation import samples_to_look_at
    from ebwm_scale.loading import load_checkpoint
    from ebwm_scale.report import write_report

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
        folder.say(f"finished; report: {write_report(folder.path)}")
    world.barrier()


def fill_from_data(config: Config, manifest) -> Config:
    """The configuration with sizes and context length taken from the data where they are absent; ConfigError if they clash."""
    kind = {"text": "vocabulary", "video": "embedding"}[manifest.modality]
    if config.state.kind != kind:
        raise ConfigError(
            f"state.kind is {config.state.kind}, but {manifest.path} holds {manifest.modality}; use state.kind={kind}"
        )
    section, key = ("model", "vocabulary_size") if kind == "vocabulary" else ("state", "dimension")
    given, size = getattr(getattr(config, section), key), manifest.content.size
    if given not in (None, size):
        raise ConfigError(
            f"{section}.{key} is {given}, the dataset {manifest.path} has {size}; leave the key out"
        )
    context_length = config.data.context_length or manifest.block_length - 1
    return config.replace(
        **{section: getattr(config, section).replace(**{key: size})},
        data=config.data.replace(context_length=context_length),
    )


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


def measure_step(config: Config, model, world_size: int) -> float:
    """Seconds of one optimizer step of this rank on random data: forward and backward of one micro-batch, times the accumulation."""
    import torch

    from ebwm_scale.refinement.noise import NoiseSource

    micro_batch, accumulation = batch_arithmetic(
        config.train, world_size, paired=config.refinement.replay
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    shape = (micro_batch, config.data.context_length + 1)
    if config.state.kind == "vocabulary":
        states = torch.randint(config.model.vocabulary_size, shape, device=device)
    else:
        states = torch.randn(*shape, config.state.dimension, device=device)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        output = model(
            states[:, :-1],
            states[:, 1:],
            sample_ids=torch.arange(micro_batch),
            source=NoiseSource(0, 0),
        )
        output.loss.backward()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds * accumulation


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
