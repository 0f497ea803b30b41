"""What the package can be asked for itself.

python -m ebwm_scale configs        the configurations that come with it, each usable as --config NAME
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ebwm_scale.config.shipped import first_line, shipped_folder, shipped_names
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.errors import EXIT_FINISHED


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m ebwm_scale", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("configs", help="list the configurations that come with the package")
    parser.parse_args(arguments)
    print(list_configs())
    return EXIT_FINISHED


def list_configs() -> str:
    """A line per shipped configuration: its name, and what it says of itself."""
    names = shipped_names()
    width = max(len(name) for name in names)
    folder = shipped_folder()
    lines = [f"{name.ljust(width)}  {first_line(folder / name)}".rstrip() for name in names]
    return "\n".join([*lines, f"in {folder}; use one as --config {names[0]}, or copy and edit it"])


if __name__ == "__main__":
    sys.exit(main())
