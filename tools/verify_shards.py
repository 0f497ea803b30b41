"""Check a dataset: sizes, hashes, indexes and every sample.

Exit code 0: sound, 1: problems (one line each), 2: no readable manifest.

python tools/verify_shards.py data/corpus/manifest.json
"""

import sys
import time

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.data.format.verify import verify_dataset


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "manifest", metavar="MANIFEST", help="a manifest.json, or the folder it is in"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    with progress_on_console() as progress:
        problems, num_samples = verify_dataset(arguments.manifest, progress=progress)
    for problem in problems:
        print(problem)
    print(
        f"{arguments.manifest}: {num_samples} samples checked, {len(problems)} problems, "
        f"{time.monotonic() - start:.1f} s"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
