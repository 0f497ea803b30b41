"""Record episodes of a world, or import them, and pack them into a dataset of clips with their
actions: WebDataset shards with an index, and a manifest.json for data.manifest.

    python tools/make_world_shards.py record --env CartPole-v1 --episodes 200 --output data/pole
        frames that the environment draws, random actions
    python tools/make_world_shards.py record --env ALE/Pong-v5 --policy sticky --steps 2000
        --output data/pong
    python tools/make_world_shards.py import lerobot:pusht --conditions action
        proprio=observation.state --output data/pusht
    python tools/make_world_shards.py import minari:d4rl/maze --camera observation/pixels
        --output data/maze

import reads Minari datasets, LeRobot folders (v2.x and v3), and episodes in HDF5 or .npz files; the
word before the path may be left out. A clip lies inside one episode, and an episode is in training
or in validation as a whole. Anything wrong with an episode ends the preparation with one line, or
leaves that episode out (--drop-bad). A killed run goes on; the same arguments give the same bytes.
The formats are described in docs/worlds.md.
"""

import sys
import time

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.core.errors import DataError
from ebwm_scale.data.encoders import ENCODERS
from ebwm_scale.data.prepare.workers import STILL_S
from ebwm_scale.data.prepare.worlds.columns import ColumnConfig
from ebwm_scale.data.prepare.worlds.config import WorldDatasetConfig
from ebwm_scale.data.prepare.worlds.dataset import make_world_dataset
from ebwm_scale.data.prepare.worlds.environments import name_value_pairs, option_values
from ebwm_scale.data.prepare.worlds.opening import open_source
from ebwm_scale.data.prepare.worlds.recording import RecordConfig, RecordedSource
from ebwm_scale.data.prepare.worlds.source import FRAMES, Source, Wanted

_DEFAULT = WorldDatasetConfig()


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="episodes of a Gymnasium environment")
    _add_recording(record)
    _add_common(record)
    reading = commands.add_parser("import", help="episodes of Minari, LeRobot, HDF5 or .npz")
    reading.add_argument(
        "source", metavar="SOURCE", help="minari:PATH, lerobot:PATH, hdf5:PATH, npz:PATH, or PATH"
    )
    _add_common(reading)
    arguments = parser.parse_args()
    if not arguments.stall_limit > 0:
        parser.error(f"--stall-limit is {arguments.stall_limit}: must be above 0 seconds")
    if len(arguments.size) > 2:
        parser.error("--size takes a side, or height and width")
    start = time.monotonic()
    config, wanted = _config(arguments)
    source: Source
    if arguments.command == "import":
        source = open_source(arguments.source, wanted)
    else:
        recording = RecordConfig(
            env=arguments.env,
            policy=arguments.policy,
            stickiness=arguments.stickiness,
            episodes=arguments.episodes,
            steps=arguments.steps,
            seed=arguments.seed,
            options=option_values(arguments.env_option),
        )
        source = RecordedSource(recording, wanted, (config.height, config.width))
    with progress_on_console() as progress:
        manifest = make_world_dataset(
            source,
            wanted,
            arguments.output,
            config,
            like=arguments.like,
            workers=arguments.workers,
            still_s=arguments.stall_limit,
            progress=progress,
        )
    print(f"{manifest}: {time.monotonic() - start:.1f} s")
    return 0


def _config(arguments) -> tuple[WorldDatasetConfig, Wanted]:
    """What the options say a dataset holds."""
    keys = dict(name_value_pairs(arguments.map, "--map", "frames=pixels"))
    if arguments.camera is not None:
        keys[FRAMES] = arguments.camera
    conditions = []
    for text in arguments.conditions:
        name, separator, key = text.partition("=")
        conditions.append(name)
        if separator:
            keys[name] = key
    wanted = Wanted(tuple(conditions), keys)
    unknown = sorted(keys.keys() - set(wanted.names))
    if unknown:
        raise DataError(
            f"--map {unknown[0]}: names a column that is not taken; taken are "
            f"{', '.join(wanted.names)} (--conditions)"
        )
    settings = {
        "path": arguments.encoder_path,
        "model": arguments.encoder_model,
        "grid": arguments.encoder_grid,
        "patch": arguments.patch,
        "components": arguments.pca_components,
    }
    if arguments.encoder == "pca":
        settings["patch"] = arguments.patch or 8
    for option in ("shifted", "continuous", "dense"):
        for name in getattr(arguments, option) or ():
            if name not in wanted.names:
                raise DataError(
                    f"--{option} {name}: is no column that is taken; those are "
                    f"{', '.join(wanted.names)}"
                )
    dense = ("action",) if arguments.dense is None else tuple(arguments.dense)
    config = WorldDatasetConfig(
        context_length=arguments.context_length,
        stride=arguments.stride,
        frame_skip=arguments.frame_skip,
        height=arguments.size[0],
        width=arguments.size[-1],
        fps=arguments.fps,
        columns=ColumnConfig(
            conditions=tuple(conditions),
            shifted=tuple(arguments.shifted),
            continuous=tuple(arguments.continuous),
        ),
        dense=tuple(name for name in dense if name in conditions),
        stored=arguments.store,
        quality=arguments.quality,
        encoder=arguments.encoder,
        encoder_settings={key: value for key, value in settings.items() if value is not None},
        patches=not arguments.whole_frames,
        drop_bad=arguments.drop_bad,
        validation_fraction=arguments.validation_fraction,
        seed=arguments.split_seed,
        samples_per_shard=arguments.samples_per_shard,
    )
    return config, wanted


def _add_recording(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--env", required=True, metavar="ID", help="of Gymnasium; MODULE:ID imports MODULE first"
    )
    parser.add_argument(
        "--env-option",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="for gymnasium.make",
    )
    parser.add_argument(
        "--policy",
        default="random",
        metavar="POLICY",
        help="random, sticky, or scripted:FILE.py:FUNCTION (default %(default)s)",
    )
    parser.add_argument(
        "--stickiness",
        type=float,
        default=0.9,
        metavar="P",
        help="sticky: how likely the action before is done again (default %(default)s)",
    )
    parser.add_argument(
        "--episodes", type=int, default=100, metavar="N", help="(default %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1000,
        metavar="N",
        help="of an episode at most (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first episode (default 0)"
    )


def _add_common(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="the dataset folder")
    add(
        "--camera",
        default=None,
        metavar="KEY",
        help="what the frames are: a camera, an observation, or render",
    )
    add(
        "--conditions",
        nargs="+",
        default=["action"],
        metavar="NAME[=KEY]",
        help="what a step is conditioned on, and where it stands in the source (default action)",
    )
    add(
        "--map",
        nargs="+",
        default=[],
        metavar="NAME=KEY",
        help="where frames, reward, terminated or a condition stand in the source",
    )
    add(
        "--shifted",
        nargs="+",
        default=[],
        metavar="NAME",
        help="columns whose row t + 1 belongs to step t; a first row of NaN says so by itself",
    )
    add(
        "--continuous",
        nargs="+",
        default=[],
        metavar="NAME",
        help="conditions of integers that are amounts, not ids",
    )
    add(
        "--context-length",
        type=int,
        default=_DEFAULT.context_length,
        metavar="N",
        help="observed frames per clip; a clip has one more (default %(default)s)",
    )
    add(
        "--stride",
        type=int,
        default=None,
        metavar="N",
        help="steps of the source between the starts of clips (default: clips share one frame)",
    )
    add(
        "--frame-skip",
        type=int,
        default=_DEFAULT.frame_skip,
        metavar="N",
        help="take each N-th frame; actions of the steps between stand side by side (default 1)",
    )
    add(
        "--dense",
        nargs="*",
        default=None,
        metavar="NAME",
        help="conditions that keep the steps between (default action)",
    )
    add(
        "--size",
        type=int,
        nargs="+",
        default=[_DEFAULT.height],
        metavar="N",
        help="of a frame in pixels: side, or height and width (default %(default)s)",
    )
    add(
        "--fps",
        type=float,
        default=None,
        metavar="N",
        help="frames a second of the source, where it does not say",
    )
    add(
        "--store",
        choices=("embedding", "jpeg", "webp"),
        default=_DEFAULT.stored,
        help="what the shards hold (default %(default)s)",
    )
    add("--quality", type=int, default=_DEFAULT.quality, metavar="Q", help="of jpeg or webp")
    add(
        "--encoder",
        choices=ENCODERS,
        default=_DEFAULT.encoder,
        help="frozen encoder of frames (default %(default)s); see docs/video.md",
    )
    add("--encoder-path", default=None, metavar="PATH", help="local weights, as for video")
    add("--encoder-model", default=None, metavar="NAME", help="timm: the model's name")
    add("--encoder-grid", type=int, default=None, metavar="N", help="efficientnet: cells a side")
    add(
        "--patch",
        type=int,
        default=None,
        metavar="N",
        help="side of a patch of pca and raw in pixels (default 8), of sd-vae in its latent",
    )
    add("--pca-components", type=int, default=None, metavar="N", help="numbers per patch of pca")
    add(
        "--whole-frames",
        action="store_true",
        help="a frame becomes one vector, not a grid of patches",
    )
    add(
        "--drop-bad",
        action="store_true",
        help="leave out episodes with something wrong, instead of ending",
    )
    add(
        "--validation-fraction",
        type=float,
        default=_DEFAULT.validation_fraction,
        metavar="X",
        help="of the episodes, held out (default %(default)s)",
    )
    add(
        "--split-seed",
        type=int,
        default=_DEFAULT.seed,
        metavar="N",
        help="of the split (default %(default)s)",
    )
    add(
        "--samples-per-shard",
        type=int,
        default=_DEFAULT.samples_per_shard,
        metavar="N",
        help="clips per shard (default %(default)s)",
    )
    add(
        "--like",
        default=None,
        metavar="MANIFEST",
        help="use the encoder, statistics and frame size of this dataset, to mix with it",
    )
    add(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="episodes read at a time (default: one per core)",
    )
    add(
        "--stall-limit",
        type=float,
        default=STILL_S,
        metavar="S",
        help="end the reading of an episode that does not move for this long (default %(default)g)",
    )


if __name__ == "__main__":
    sys.exit(main())
