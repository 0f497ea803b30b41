"""Cut videos into clips of frames and pack them into a dataset: WebDataset shards with an index,
and a manifest.json for data.manifest.

    python tools/make_video_shards.py my_videos --output data/videos
        pca embeddings, fitted on the training frames
    python tools/make_video_shards.py my_videos --output data/videos --encoder sd-vae
        --encoder-path ~/sd-vae-ft-ema
    python tools/make_video_shards.py my_videos --output data/videos --store jpeg
        --encoder transformers --encoder-path ~/dinov2-base

What a player shows is stored: turned, mirrored, with square pixels. Videos are decoded in parallel;
a killed run goes on with those that are not done. A video that cannot be decoded is reported and
left out, and so is what is damaged in others. A video goes to training or validation as a whole; a
single one is cut in time, with a gap. The formats are described in docs/data.md.
"""

import sys
import time

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.data.encoders import ENCODERS
from ebwm_scale.data.prepare.video import VideoDatasetConfig, make_video_dataset
from ebwm_scale.data.prepare.workers import LIMIT_S, STILL_S


@command
def main() -> int:
    default = VideoDatasetConfig()
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="videos, animations, .tar and .zip of them, and folders of these or of images",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset folder")
    parser.add_argument(
        "--context-length",
        type=int,
        default=default.context_length,
        metavar="N",
        help="observed frames per clip; a clip has one more (default %(default)s)",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=default.interval_s,
        metavar="S",
        help="seconds between frames (default %(default)s)",
    )
    parser.add_argument(
        "--stride",
        type=float,
        default=None,
        metavar="S",
        help="seconds between the starts of clips (default: clips share one frame)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[default.height],
        metavar="N",
        help="of a frame in pixels: side, or height and width (default %(default)s)",
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=default.crops,
        metavar="N",
        help="windows along the longer side (default %(default)s, the middle)",
    )
    parser.add_argument(
        "--zooms",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="also cut windows of 1/N of the size, N times as many along each side (default 1)",
    )
    parser.add_argument(
        "--store",
        choices=("embedding", "jpeg", "webp"),
        default=default.stored,
        help="what the shards hold (default %(default)s)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=default.quality,
        metavar="Q",
        help="of jpeg or webp, 1 to 100 (default %(default)s)",
    )
    parser.add_argument(
        "--encoder",
        choices=ENCODERS,
        default=default.encoder,
        help="frozen encoder of frames (default %(default)s); see docs/video.md",
    )
    parser.add_argument(
        "--patches",
        action="store_true",
        help="a frame becomes the patches of its encoder, not one vector",
    )
    parser.add_argument(
        "--encoder-path",
        default=None,
        metavar="PATH",
        help="local weights: sd-vae and transformers a folder, timm a file",
    )
    parser.add_argument(
        "--encoder-model", default=None, metavar="NAME", help="timm: the model's name"
    )
    parser.add_argument(
        "--encoder-grid",
        type=int,
        default=None,
        metavar="N",
        help="efficientnet: cells along each side (default 1)",
    )
    parser.add_argument(
        "--pca-patch",
        type=int,
        default=None,
        metavar="N",
        help="side of a patch in pixels: pca (default 16), raw (default 8); sd-vae with --patches: "
        "in numbers of its latent (default 2)",
    )
    parser.add_argument(
        "--pca-components",
        type=int,
        default=None,
        metavar="N",
        help="pca: numbers per patch (default 16)",
    )
    parser.add_argument(
        "--split",
        choices=("auto", "video", "time"),
        default=default.split,
        help="whole videos, or the end of each (default: videos, if there are several)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=default.validation_fraction,
        metavar="X",
        help="held out (default %(default)s)",
    )
    parser.add_argument(
        "--validation-videos", nargs="+", default=[], metavar="NAME", help="hold out these instead"
    )
    parser.add_argument(
        "--gap",
        type=float,
        default=None,
        metavar="S",
        help="split by time: seconds left out before validation (default: a clip's length)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        metavar="N",
        help="of the split (default %(default)s)",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=default.samples_per_shard,
        metavar="N",
        help="clips per shard (default %(default)s)",
    )
    parser.add_argument(
        "--like",
        default=None,
        metavar="MANIFEST",
        help="use the encoder, statistics and frame size of this dataset, to mix with it",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="videos decoded at a time (default: one per core)",
    )
    parser.add_argument(
        "--stall-limit",
        type=float,
        default=STILL_S,
        metavar="S",
        help="end the decoding of a video that does not move for this long, and leave it out "
        "(default %(default)g)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=LIMIT_S,
        metavar="S",
        help="end the decoding of a video after this long, and leave it out (default %(default)g)",
    )
    parser.add_argument(
        "--stream",
        type=int,
        default=None,
        metavar="N",
        help="of files with several video streams, from 0 (default: the one that players show)",
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="folders of images are videos also where there are others",
    )
    parser.add_argument(
        "--image-rate",
        type=float,
        default=default.image_rate,
        metavar="HZ",
        help="images a second, of folders of images (default %(default)g)",
    )
    parser.add_argument(
        "--no-captions",
        action="store_true",
        help="do not keep the .txt and .json beside a video with its clips",
    )
    arguments = parser.parse_args()
    if not arguments.stall_limit > 0:
        parser.error(f"--stall-limit is {arguments.stall_limit}: must be above 0 seconds")
    if not arguments.time_limit > 0:
        parser.error(f"--time-limit is {arguments.time_limit}: must be above 0 seconds")
    if len(arguments.size) > 2:
        parser.error("--size takes a side, or height and width")
    settings = {
        "path": arguments.encoder_path,
        "model": arguments.encoder_model,
        "grid": arguments.encoder_grid,
        "patch": arguments.pca_patch,
        "components": arguments.pca_components,
    }
    start = time.monotonic()
    config = VideoDatasetConfig(
        context_length=arguments.context_length,
        interval_s=arguments.interval,
        stride_s=arguments.stride,
        height=arguments.size[0],
        width=arguments.size[-1],
        crops=arguments.crops,
        zooms=tuple(arguments.zooms),
        stored=arguments.store,
        quality=arguments.quality,
        encoder=arguments.encoder,
        encoder_settings={key: value for key, value in settings.items() if value is not None},
        patches=arguments.patches,
        split=arguments.split,
        validation_fraction=arguments.validation_fraction,
        validation_videos=tuple(arguments.validation_videos),
        gap_s=arguments.gap,
        seed=arguments.seed,
        samples_per_shard=arguments.samples_per_shard,
        stream=arguments.stream,
        image_rate=arguments.image_rate,
    )
    with progress_on_console() as progress:
        manifest = make_video_dataset(
            arguments.inputs,
            arguments.output,
            config,
            like=arguments.like,
            workers=arguments.workers,
            still_s=arguments.stall_limit,
            limit_s=arguments.time_limit,
            images=arguments.images,
            captions=not arguments.no_captions,
            progress=progress,
        )
    print(f"{manifest}: {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
