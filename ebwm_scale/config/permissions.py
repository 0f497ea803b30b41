"""What a configuration may ask for only with a word on the command line, because it would run
somebody's text as a command.

A configuration may come from somebody else, in a converted folder or a run folder. So `pipe:`
shards, which a shell runs, need --allow-pipe on the command line of whatever would open them; no
file can give that permission.
"""

from __future__ import annotations

import argparse

from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import shown

PIPE = "pipe:"


def add_permissions(parser: argparse.ArgumentParser) -> None:
    """The options of a command that trains, or prepares a training."""
    parser.add_argument(
        "--allow-pipe",
        action="store_true",
        help="let data.stream run its pipe: commands in a shell; read them first",
    )


def refuse_unpermitted(config: Config, *, allow_pipe: bool) -> None:
    """ConfigError if the configuration would run commands that the command line does not allow."""
    refuse_pipes(config.data.stream, allow_pipe=allow_pipe)


def refuse_pipes(shards, *, allow_pipe: bool) -> None:
    """The same for the shards of a stream, a sequence of text."""
    commands = [shard for shard in shards if shard.startswith(PIPE)]
    if commands and not allow_pipe:
        raise ConfigError(
            f"data.stream would run {len(commands)} commands in a shell, the first is "
            f"{shown(commands[0])}: not allowed by a configuration alone; read them, and give "
            "--allow-pipe if they are yours, or name the shards by paths or URLs"
        )
