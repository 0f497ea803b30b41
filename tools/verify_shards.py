"""Check a dataset: sizes, hashes, indexes and every sample.

Exit code 0: sound, 1: problems (one line each), 2: no readable manifest.

python tools/verify_shards.py data/corpus/manifest.json
python tools/verify_shards.py data/corpus/manifest.json --repair data/sound

With --repair the sound samples are written into a new folder, and what is left out is said. Exit
code 0: written, 2: it cannot be.
"""

import sys
import time

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.repair import repair_dataset
from ebwm_scale.data.format.verify import verify_dataset


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "manifest", metavar="MANIFEST", help="a manifest.json, or the folder it is in"
    )
    parser.add_argument(
        "--repair",
        metavar="OUTPUT",
        help="write a dataset without the damaged samples into this new folder",
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.repair is not None:
        return repair(arguments.manifest, arguments.repair)
    with progress_on_console() as progress:
        problems, num_samples = verify_dataset(arguments.manifest, progress=progress)
    for problem in problems:
        print(problem)
    print(
        f"{arguments.manifest}: {num_samples} samples checked, {len(problems)} problems, "
        f"{time.monotonic() - start:.1f} s"
    )
    return 1 if problems else 0


def repair(manifest: str, output: str) -> int:
    with progress_on_console() as progress:
        path = repair_dataset(manifest, output, progress=progress)
    repaired = load_manifest(path)
    left_out = repaired.values["repaired"]["left_out"]
    for name, split in repaired.splits.items():
        print(f"{path}: {name}: {split.num_samples} samples kept, {left_out[name]} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
