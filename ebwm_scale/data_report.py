"""The report of a dataset of text, one self-contained page: documents, lengths, scripts, copies,
tokens per byte, and documents to look at.

    ebwm data-report data/corpus/manifest.json [--output page.html] [--documents 20000]

Documents are read back from the shards, so the page shows what a model is trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console, say
from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.format.survey import survey
from ebwm_scale.reporting.dataset_page import render


def write_data_report(manifest: str | Path, output: str | Path, *, documents: int) -> Path:
    """Write the page, and return its path; DataError for what is no sound dataset of text.

    documents: of each split that are looked at, at most.
    """
    if documents < 1:
        raise UserError(f"--documents is {documents}: must be at least 1")
    loaded = open_manifest(manifest)
    with progress_on_console() as progress:
        surveys = {
            split: survey(loaded, split, max_documents=documents, progress=progress)
            for split in loaded.splits
        }
    page = render(loaded, surveys).encode("utf-8", errors="replace")
    path = Path(output)
    try:
        with replacement(path) as temporary:
            temporary.write_bytes(page)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}; name another file with --output"
        ) from None
    return path


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "manifest", metavar="MANIFEST", help="a manifest.json, or the folder it is in"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dataset.html"),
        metavar="FILE",
        help="the page (default %(default)s)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=20_000,
        metavar="N",
        help="documents of each split to look at (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    say(str(write_data_report(options.manifest, options.output, documents=options.documents)))
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
