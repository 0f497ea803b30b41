"""What has to hold where several processes share each sample (parallel.sequence)."""

from __future__ import annotations

from ebwm_scale.config.requirement import Require
from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import ConfigError


def sequence_problems(config: Config) -> list[str]:
    """Every reason why a configuration's samples cannot be cut over processes; none without.

    One sentence each. Some keys come from the data alone, so this is asked again when it is known.
    """
    problems: list[str] = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    if config.parallel.sequence > 1:
        _check_shape(config, require)
        _check_options(config, require)
    return problems


def _check_shape(config: Config, require: Require) -> None:
    size = config.parallel.sequence
    given = f"parallel.sequence is {size}"
    heads = model_sizes(config.model).num_kv_heads
    key = "num_heads" if heads == model_sizes(config.model).num_heads else "num_kv_heads"
    require(
        heads % size == 0,
        f"{given} with model.{key} {heads}: each process attends with its share of the heads; "
        f"allowed: {_divisors(heads)}",
    )
    length = config.data.context_length
    require(
        length is None or length % size == 0,
        f"{given} with data.context_length {length}: each process has as many positions; use a "
        f"multiple of {size}, or another number of processes",
    )


def _check_options(config: Config, require: Require) -> None:
    given = f"parallel.sequence is {config.parallel.sequence}"
    require(
        config.state.kind == "vocabulary",
        f"{given} with state.kind {config.state.kind}: only text is cut over processes; use 1",
    )
    require(
        config.data.group_size is None and not config.data.conditions,
        f"{given} with tokens that are predicted in groups: only text that is predicted one token "
        "at a time is cut over processes; use 1",
    )
    require(
        not config.data.stream,
        f"{given} with data.stream: two processes may read a stream differently; use 1, or name a "
        "prepared dataset in data.manifest",
    )
    require(
        not config.refinement.replay,
        f"{given} with refinement.replay: the buffer holds whole samples; use 1, or replay false",
    )
    require(
        not config.refinement.compile,
        f"{given} with refinement.compile: a compiled step exchanges nothing; use 1, or compile "
        "false",
    )


def num_readers(config: Config, world_size: int) -> int:
    """How many processes, or groups that share each sample, read samples of their own.

    ConfigError where the groups are not whole.
    """
    size = config.parallel.sequence
    if world_size % size:
        more = -(-world_size // size) * size
        raise ConfigError(
            f"parallel.sequence is {size} with {world_size} "
            f"process{'' if world_size == 1 else 'es'}: so many share each sample, start a "
            f"multiple of {size}, for example {more}, or use parallel.sequence=1"
        )
    return world_size // size


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
