"""Convert checkpoints: a run into one folder and back, the released EBT layout into it and out of
it. Every result is compared with its source.

    ebwm convert export runs/mine converted/ [--dtype bfloat16] [--max-shard-gb 5] [--training]
                 [--weights ema]
    ebwm convert to-run converted/ runs/again --set data.manifest=data/mine/manifest.json
                 [--zero-stage 2] [--world-size 8]
        then: train.py --config runs/again/config.yaml --run-dir runs/again --resume
    ebwm convert import-released released.ckpt converted/ [--hparams hparams.json]
                 [--data data/mine/manifest.json]
    ebwm convert export-released converted/ released.ckpt

`converted/` holds safetensors, config.yaml, config.json and the tokenizer or encoder;
ebwm_scale.load_checkpoint, think, evaluate and (with transformers installed)
ebwm_scale.integrations.transformers read it. --training adds the optimizer's moments and the data
position, so that `to-run` resumes bit for bit at any ZeRO stage and number of processes. One tensor
is in memory at a time, but for export-released and .ckpt files, which are read and written whole.
Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ebwm_scale.checkpoint import convert as conversion
from ebwm_scale.checkpoint import convert_released
from ebwm_scale.checkpoint.comparison import DTYPES
from ebwm_scale.core.arguments import ArgumentParser, add_overrides, add_weights, command
from ebwm_scale.core.console import progress_on_console, say
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.core.progress import Progress


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def subcommand(
        name: str, source: str, target: str, *, writes_model: bool
    ) -> argparse.ArgumentParser:
        part = commands.add_parser(name)
        part.add_argument("source", type=Path, metavar=source)
        part.add_argument("target", type=Path, metavar=target)
        if writes_model:
            part.add_argument(
                "--dtype",
                choices=list(DTYPES),
                default="float32",
                help="of the weights (default %(default)s)",
            )
            part.add_argument(
                "--max-shard-gb",
                type=float,
                default=5.0,
                metavar="GB",
                help="size of a weight file at most (default %(default)s)",
            )
            part.add_argument(
                "--data",
                type=Path,
                default=None,
                metavar="MANIFEST",
                help="dataset whose tokenizer or encoder is included (a run: its own)",
            )
        return part

    from_run = subcommand("export", "RUN", "FOLDER", writes_model=True)
    from_run.add_argument("--training", action="store_true", help="with what a resumed run needs")
    add_weights(from_run)
    into_run = subcommand("to-run", "FOLDER", "RUN", writes_model=False)
    into_run.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=None)
    into_run.add_argument(
        "--world-size",
        type=int,
        default=None,
        metavar="N",
        help="processes that will resume it (any other number works too)",
    )
    add_overrides(
        into_run,
        "your own settings in place of those that are dropped: data.manifest=.../manifest.json",
    )
    subcommand("import-released", "FILE", "FOLDER", writes_model=True).add_argument(
        "--hparams", type=Path, default=None, metavar="JSON", help="of a bare state dict"
    )
    subcommand("export-released", "FOLDER", "FILE", writes_model=False)
    options = parser.parse_args(arguments)
    if getattr(options, "max_shard_gb", 1) <= 0 or (getattr(options, "world_size", None) or 1) < 1:
        raise UserError("--max-shard-gb must be above 0 and --world-size at least 1")
    with progress_on_console() as progress:
        summary = CONVERSIONS[options.command](options, progress)
    say(f"{options.target}: {summary}")
    return EXIT_FINISHED


def export(options: argparse.Namespace, progress: Progress) -> str:
    return conversion.export_run(
        options.source,
        options.target,
        dtype=options.dtype,
        max_shard_bytes=int(options.max_shard_gb * 1e9),
        training=options.training,
        weights=options.weights,
        data=options.data,
        say=say,
        progress=progress,
    )


def to_run(options: argparse.Namespace, progress: Progress) -> str:
    return conversion.import_run(
        options.source,
        options.target,
        zero_stage=options.zero_stage,
        world_size=options.world_size,
        overrides=options.overrides,
        say=say,
        progress=progress,
    )


def import_released(options: argparse.Namespace, progress: Progress) -> str:
    return convert_released.import_released(
        options.source,
        options.target,
        hparams=options.hparams,
        dtype=options.dtype,
        max_shard_bytes=int(options.max_shard_gb * 1e9),
        data=options.data,
        say=say,
        progress=progress,
    )


def export_released(options: argparse.Namespace, progress: Progress) -> str:
    return convert_released.export_released(options.source, options.target, say=say)


CONVERSIONS = {
    "export": export,
    "to-run": to_run,
    "import-released": import_released,
    "export-released": export_released,
}


if __name__ == "__main__":
    sys.exit(main())
