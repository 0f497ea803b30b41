"""Configurations: which come with the package, what one means in full, and every key there is.

ebwm config list                              the shipped ones, each usable as --config NAME
ebwm config show FILE [--set KEY=VALUE ...]   with every default filled in, as YAML
ebwm config schema                            the JSON schema of all keys, for editors
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ebwm_scale.config.load import load_config
from ebwm_scale.config.schema import Config
from ebwm_scale.config.shipped import first_line, shipped_folder, shipped_names
from ebwm_scale.core.arguments import ArgumentParser, add_overrides, command
from ebwm_scale.core.console import say
from ebwm_scale.core.errors import EXIT_FINISHED


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="the configurations that come with the package")
    actions.add_parser("schema", help="print the JSON schema of a configuration")
    show = actions.add_parser("show", help="check a configuration and print it in full")
    show.add_argument("config", metavar="FILE", help="YAML: a file, or a shipped one")
    add_overrides(show)
    options = parser.parse_args(arguments)
    if options.action == "list":
        say(list_configs())
    elif options.action == "schema":
        say(json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False))
    else:
        say(load_config(options.config, options.overrides).to_yaml().rstrip("\n"))
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
