"""The configurations that come with the package, and what --config may be: a file, or the name of
one of these.

    find_config("mine.yaml")             a file that is there
    find_config("nlp/anchored.yaml")     from anywhere: also nlp/anchored, configs/nlp/anchored.yaml
    find_config("quickstart")            the file name alone, where only one has it

In a checkout they are the folder configs/; in an installed package they lie beside this file
(setup.py).
"""

from __future__ import annotations

import difflib
from pathlib import Path

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import cut

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder() -> Path:
    """The folder that holds them."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def shipped_names() -> list[str]:
    """Of all shipped configurations, relative to their folder: nlp/anchored.yaml.

    Studies are no configurations.
    """
    return [name for name in _files() if not name.startswith("studies/")]


def find_config(name: str | Path) -> Path:
    """The file that a name means; a file that is there comes first.

    Raises ConfigError with the names that are near.
    """
    given = Path(name)
    try:
        if given.exists() and not given.is_dir():
            return given
    except (OSError, ValueError):  # a name that no file can have, or a folder that may not be read
        pass
    if given.is_absolute():
        return given  # whoever reads it says what is the matter
    wanted = given.as_posix().removeprefix("configs/")
    if not wanted.endswith(".yaml"):
        wanted += ".yaml"
    names = _files()
    found = [n for n in names if n == wanted]
    if not found:
        found = [n for n in shipped_names() if n.endswith(f"/{wanted}")]
    if len(found) == 1:
        return shipped_folder() / found[0]
    if found:
        raise ConfigError(
            f"{cut(name, 300)}: several shipped ones have that name: {', '.join(found)}"
        )
    near = difflib.get_close_matches(wanted[:200], names, n=3, cutoff=0.5)
    hint = f"is it {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"{cut(name, 300)}: neither a file here nor a shipped configuration; "
        f"{hint}python -m ebwm_scale configs lists those"
    )


def _files() -> list[str]:
    folder = shipped_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))


def first_line(path: Path) -> str:
    """What a configuration says of itself: the comment that it begins with, up to its first
    sentence's end.
    """
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""
