"""Videos that can be predicted, in any number: balls that bounce in a box, kicked at random now and
then. For studies and tests of scale.

    python tools/make_synthetic_videos.py data/balls [--count 200] [--seconds 12]

Each is OUTPUT/000000.mp4 and so on: 48 x 48 pixels, 12 frames per second, two or three balls of
random size, shade and velocity on a shaded background. A ball keeps its velocity but for the walls,
and with --kicks (default 0.02 per frame and ball) changes direction unforeseeably. The same
arguments give the same frames. Needs the extra `video`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ebwm_scale.core.arguments import ArgumentParser

SIZE, RATE, FINER = 48, 12, 2  # pixels, frames per second, samples per pixel and direction


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder; it must not exist")
    parser.add_argument(
        "--count", type=int, default=200, metavar="N", help="videos (default %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=12,
        metavar="S",
        help="length of each (default %(default)s)",
    )
    parser.add_argument(
        "--kicks",
        type=float,
        default=0.02,
        metavar="P",
        help="probability per frame and ball of a new direction (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args()
    if options.count < 1 or options.seconds <= 0 or not 0 <= options.kicks <= 1:
        print(
            "--count must be at least 1, --seconds above 0 and --kicks between 0 and 1",
            file=sys.stderr,
        )
        return 2
    if options.output.exists():
        print(f"{options.output} exists; name a new folder", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True)
    for number in range(options.count):
        generator = np.random.Generator(np.random.Philox(key=options.seed, counter=number << 128))
        write(
            options.output / f"{number:06d}.mp4",
            frames(generator, round(options.seconds * RATE), options.kicks),
        )
    print(f"{options.output}: {options.count} videos of {options.seconds:g} s")
    return 0


def frames(generator: np.random.Generator, count: int, kicks: float) -> np.ndarray:
    """(count, SIZE, SIZE, 3) uint8."""
    balls = int(generator.integers(2, 4))
    radius = generator.uniform(0.08, 0.17, balls)
    place = generator.uniform(radius[:, None], 1 - radius[:, None], (balls, 2))
    speed, angle = generator.uniform(0.015, 0.05, balls), generator.uniform(0, 2 * np.pi, balls)
    velocity = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    shades = generator.uniform(120, 255, (balls, 3))
    axis = (np.arange(SIZE * FINER) + 0.5) / (SIZE * FINER)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    slope = generator.uniform(-40, 40, 2)
    background = (60 + slope[0] * x + slope[1] * y)[..., None] * generator.uniform(0.5, 1, 3)
    shown = []
    for _ in range(count):
        picture = background.copy()
        for i in range(balls):
            picture[(x - place[i, 0]) ** 2 + (y - place[i, 1]) ** 2 < radius[i] ** 2] = shades[i]
        shown.append(picture.reshape(SIZE, FINER, SIZE, FINER, 3).mean((1, 3)))
        turned = generator.random(balls) < kicks
        angle = generator.uniform(0, 2 * np.pi, balls)
        velocity = np.where(
            turned[:, None], speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1), velocity
        )
        place = place + velocity
        low, high = radius[:, None], 1 - radius[:, None]
        velocity = np.where(
            (place < low) & (velocity < 0) | (place > high) & (velocity > 0), -velocity, velocity
        )
        place = np.where(
            place < low, 2 * low - place, np.where(place > high, 2 * high - place, place)
        )
    return np.stack(shown).round().clip(0, 255).astype(np.uint8)


def write(path: Path, pictures: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = (
            SIZE,
            SIZE,
            "yuv420p",
            2_000_000,
        )
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


if __name__ == "__main__":
    raise SystemExit(main())
