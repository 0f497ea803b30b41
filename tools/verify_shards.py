"""Check a dataset: sizes, hashes, indexes and every sample.

Exit code 0: sound, 1: problems (one line each), 2: no readable manifest.

python tools/verify_shards.py data/corpus/manifest.json
"""

import sys
import time

from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.verify import verify_dataset


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "manifest", metavar="MANIFEST", help="a manifest.json, or the folder it is in"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        problems, num_samples = verify_dataset(arguments.manifest)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for problem in problems:
        print(problem)
    print(
        f"{arguments.manifest}: {num_samples} samples checked, {len(problems)} problems, "
        f"{time.monotonic() - start:.1f} s"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
