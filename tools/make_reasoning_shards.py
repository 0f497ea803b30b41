"""Generate reasoning tasks as a dataset: WebDataset shards with an index, and a manifest.json for
data.manifest.

    python tools/make_reasoning_shards.py multiplication --output data/products --sizes 1 2
        --larger 3
    python tools/make_reasoning_shards.py sudoku --output data/sudoku --sizes 6 --harder-from 8

Families: reachability and shortest-path (mazes), sudoku, colouring (of graphs), multiplication,
hops (look-ups of several hops). Everything is drawn from the seed: the same arguments give the same
bytes, and running the same command again keeps what is there. No instance is in two splits.
--larger writes one more folder per size, OUTPUT-larger-N, with a validation split that training
never sees. The families and the format are described in docs/reasoning.md.
"""

import sys
import time

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset
from ebwm_scale.data.prepare.reasoning.families import FAMILIES


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=list(FAMILIES), metavar="FAMILY", help="of tasks")
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset folder")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        required=True,
        metavar="N",
        help="cells a side, nodes, digits or hops; grids take one, or several with --inside",
    )
    parser.add_argument(
        "--larger",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="sizes that are held out, in folders of their own",
    )
    parser.add_argument(
        "--inside",
        type=int,
        default=None,
        metavar="N",
        help="mazes: each stands at a random place in a square of so many cells a side, walls "
        "around it, also the larger ones",
    )
    parser.add_argument(
        "--train",
        type=int,
        default=20_000,
        metavar="N",
        help="training instances (default %(default)s)",
    )
    parser.add_argument(
        "--validation",
        type=int,
        default=1000,
        metavar="N",
        help="instances of each held-out split (default %(default)s)",
    )
    parser.add_argument(
        "--harder-from",
        type=int,
        default=None,
        metavar="D",
        help="hold out instances of this difficulty or more, as the split harder",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of all draws (default %(default)s)"
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=4096,
        metavar="N",
        help="instances per shard (default %(default)s)",
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    with progress_on_console() as progress:
        manifests = make_reasoning_dataset(
            arguments.family,
            arguments.output,
            sizes=arguments.sizes,
            larger=arguments.larger,
            num_train=arguments.train,
            num_validation=arguments.validation,
            harder_from=arguments.harder_from,
            seed=arguments.seed,
            samples_per_shard=arguments.samples_per_shard,
            inside=arguments.inside,
            progress=progress,
        )
    for manifest in manifests:
        print(manifest)
    print(f"{time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
