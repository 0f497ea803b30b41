"""Fetch a small corpus of English prose to try things with: the documentation of django 5.2.8 (6.1
MB, BSD-3-Clause).

    python tools/fetch_sample_corpus.py --output corpus
    python tools/fetch_sample_corpus.py --output corpus --archive ~/downloads      # without a network

Downloads with the running interpreter's pip, checks a pinned hash, executes nothing of the archive,
and does nothing if the corpus is already there. Any other folder of text serves as well: see
docs/data.md.
"""

import sys

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.data.prepare.sample_corpus import fetch_sample_corpus


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the corpus; made if need be"
    )
    parser.add_argument(
        "--archive",
        metavar="FILE_OR_FOLDER",
        help="a copy of django-5.2.8.tar.gz, or the folder it is in; default: download it",
    )
    arguments = parser.parse_args()
    with progress_on_console() as progress:
        progress("fetching", 0, None)
        fetch_sample_corpus(arguments.output, archive=arguments.archive)
    return 0


if __name__ == "__main__":
    sys.exit(main())
