"""Pack text files and folders into a dataset: WebDataset shards with an index, and a manifest.json
for data.manifest.

    python tools/make_text_shards.py corpus --output data/corpus --tokenizer tokenizer.model
        --context-length 256

Files of other kinds are listed and left out. Documents go to training or validation as a whole. The
dataset folder appears when it is complete. A killed build goes on where it was; running the same
command again keeps a complete dataset. The formats are described in docs/data.md.
"""

import sys
import time
from argparse import BooleanOptionalAction

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.data.format.manifest import PACKINGS, load_manifest
from ebwm_scale.data.prepare.reading.options import add_selection_options, selection_of
from ebwm_scale.data.prepare.reading.source import patterns
from ebwm_scale.data.prepare.reading.token_files import TYPES
from ebwm_scale.data.prepare.text import make_text_dataset


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
    parser.add_argument("--output", required=True, metavar="DIR", help="the dataset folder")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="a model of tools/train_tokenizer.py, a tokenizer.json, ranks of tiktoken, or the "
        "word bytes",
    )
    parser.add_argument(
        "--tokens",
        choices=TYPES,
        help="the inputs hold token ids that this tokenizer made elsewhere (nanoGPT, Megatron, "
        "litgpt, llm.c, .npy): their type, where the files do not say it",
    )
    parser.add_argument(
        "--context-length",
        required=True,
        type=int,
        metavar="N",
        help="observed tokens per block; a block has one more",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="X",
        help="share of documents held out (default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the split and of the packing order (default %(default)s)",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=4096,
        metavar="N",
        help="blocks per shard (default %(default)s)",
    )
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="keep one of exact copies of a document, over all inputs",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="INPUT",
        help="leave out the documents that are also in this: another source of a mixture, or the "
        "texts of a test; may be given several times",
    )
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default="consecutive",
        help="best_fit: training documents stay whole where they fit into a block; what is left of "
        "a block is padding (default %(default)s)",
    )
    parser.add_argument(
        "--mask-documents",
        action=BooleanOptionalAction,
        default=True,
        help="whether runs of this dataset keep attention inside documents, unless their "
        "configuration has data.mask_documents (default: they do)",
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    with progress_on_console() as progress:
        manifest = make_text_dataset(
            arguments.inputs,
            arguments.output,
            tokenizer=arguments.tokenizer,
            context_length=arguments.context_length,
            validation_fraction=arguments.validation_fraction,
            seed=arguments.seed,
            samples_per_shard=arguments.samples_per_shard,
            selection=selection_of(arguments),
            tokens=arguments.tokens,
            deduplicate=arguments.deduplicate,
            without=arguments.without,
            packing=arguments.packing,
            mask_documents=arguments.mask_documents,
            progress=progress,
        )
    seconds = time.monotonic() - start
    splits = load_manifest(manifest).splits.values()
    megabytes = sum(split.facts["num_text_bytes"] for split in splits) / 10**6
    print(f"{manifest}: {seconds:.1f} s, {megabytes / seconds:.2f} MB of text a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
