"""Train a tokenizer (SentencePiece BPE with byte fallback) on text files and folders.

    python tools/train_tokenizer.py corpus --output tokenizer.model --vocabulary-size 2048

Only documents of the training split are used: pass the same --validation-fraction and --seed as to
make_text_shards.py (both have the same defaults).
"""

import sys
import time

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.data.prepare.reading.options import add_selection_options, selection_of
from ebwm_scale.data.prepare.reading.source import patterns
from ebwm_scale.data.prepare.tokenizer import train_tokenizer


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, globs or addresses (s3://, https://, ...) with text: " + patterns(),
    )
    add_selection_options(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="the model file to write")
    parser.add_argument(
        "--vocabulary-size",
        required=True,
        type=int,
        metavar="N",
        help="number of pieces, 256 bytes included",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="X",
        help="share of documents held out (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the split (default %(default)s)"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    with progress_on_console() as progress:
        tokenizer = train_tokenizer(
            arguments.inputs,
            arguments.output,
            arguments.vocabulary_size,
            validation_fraction=arguments.validation_fraction,
            seed=arguments.seed,
            selection=selection_of(arguments),
            progress=progress,
        )
    print(
        f"{arguments.output}: {tokenizer.vocabulary_size} pieces, end of sequence "
        f"{tokenizer.eos_id}, {time.monotonic() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
