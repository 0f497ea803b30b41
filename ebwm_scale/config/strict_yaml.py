"""YAML for people who type it: one reader for configuration files, --set, sweeps and studies, and
the writer that fits it.

    values = read_yaml("configs/quickstart.yaml")        # a file
    value = parse_yaml("[[0, 1.0], [1, 1e-1]]", "--set ...")

PyYAML's scanner, parser and composer do the reading. On top of them stands what a configuration
needs and YAML 1.1 does not give:

* every key once: a second `train:` is refused, it does not erase the first
* no aliases: a value is written where it is used, and nothing grows beyond the size of its text
* the core schema of YAML 1.2: 0100 is 100, 1e-4 is a number, 1:30, on, off, yes, no and dates are
  texts, `<<` is a key
* whole numbers of at most 64 bits, at most MAX_DEPTH levels, UTF-8, MAX_BYTES

Whatever is wrong is one ConfigError of one line. This file knows nothing of what the values mean.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import BaseConstructor, ConstructorError
from yaml.events import AliasEvent
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import cut, shorten, shown

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 32
LARGEST_INT = 2**63 - 1

_TAG = "tag:yaml.org,2002:"
# The core schema, https://yaml.org/spec/1.2.2/#1032-tag-resolution: (tag, pattern, possible first
# characters).
_CORE_SCHEMA = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (
        "int",
        re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
        list("-+0123456789"),
    ),
    (
        "float",
        re.compile(
            r"""^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?
                 |[-+]?\.(?:inf|Inf|INF)
                 |\.(?:nan|NaN|NAN))$""",
            re.VERBOSE,
        ),
        list("-+.0123456789"),
    ),
)


def read_yaml(path: str | Path) -> Any:
    """The value of a file; None for an empty one.

    Raises ConfigError, one line, for whatever keeps it from being read.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{cut(path, 300)}: cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"{cut(path, 300)}: has more than {MAX_BYTES // 2**20} MiB: no configuration is that "
            "long"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{cut(path, 300)}: not UTF-8: byte 0x{content[error.start]:02x} at position "
            f"{error.start}; save it as UTF-8"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; None for an empty one.

    Raises ConfigError, one line that begins with `where`.
    """
    try:
        return _StrictLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{cut(where, 300)}: not valid YAML: {_reason(error)}") from None
    except (ValueError, OverflowError):  # PyYAML on "\Uffffffff"
        raise ConfigError(
            f"{cut(where, 300)}: not valid YAML: an escape that is no character"
        ) from None


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that parse_yaml, and a reader of YAML 1.1, take for the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _StrictLoader(Reader, Scanner, Parser, Composer, BaseConstructor, BaseResolver):
    """PyYAML's stages with the core schema, and with a composer that counts levels and takes no
    alias.
    """

    def __init__(self, text: str):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseConstructor.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def compose_node(self, parent, index):
        mark = self.peek_event().start_mark
        if self.check_event(AliasEvent):
            name = cut(self.peek_event().anchor, 20)
            raise ConstructorError(None, None, f"*{name} is an alias: write the value out", mark)
        if self.depth == MAX_DEPTH:
            raise ConstructorError(None, None, f"more than {MAX_DEPTH} levels deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def number(self, node: yaml.Node) -> int:
        text = self.plain(node, "int")
        digits = text.lstrip("+-0oxX")
        # Python refuses to read very long ones at all, and nothing here takes more than 64 bits.
        value = None
        if len(digits) <= 22:
            value = int(text, 0 if text[:2] in ("0o", "0x") else 10)
        if value is None or not -LARGEST_INT <= value <= LARGEST_INT:
            raise ConstructorError(
                None, None, f"{cut(text, 40)} is no whole number of 64 bits", node.start_mark
            )
        return value

    def real(self, node: yaml.Node) -> float:
        text = self.plain(node, "float")
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def boolean(self, node: yaml.Node) -> bool:
        return self.plain(node, "bool") == "true"

    def text(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise ConstructorError(None, None, "!!str stands before no text", node.start_mark)
        value = self.construct_scalar(node)
        if "\0" in value or not is_utf8(value):
            raise ConstructorError(
                None, None, "a text with a character that no file can hold", node.start_mark
            )
        return value

    def nothing(self, node: yaml.Node) -> None:
        self.plain(node, "null")

    def plain(self, node: yaml.Node, kind: str) -> str:
        """The text of a scalar that its tag says is of this kind; a tag written out may say so of
        any text.
        """
        pattern = next(pattern for name, pattern, _ in _CORE_SCHEMA if name == kind)
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        if not pattern.match(text) and not (kind == "float" and _is_core_int(text)):
            raise ConstructorError(None, None, f"{shown(text)} is no {kind}", node.start_mark)
        return text.lower() if kind in ("bool", "float") else text

    def sequence(self, node: yaml.Node) -> list:
        if not isinstance(node, yaml.SequenceNode):
            raise ConstructorError(None, None, "!!seq stands before no list", node.start_mark)
        return self.construct_sequence(node, deep=True)

    def mapping(self, node: yaml.Node) -> dict:
        result: dict = {}
        first_of: dict[str, int] = {}
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, "!!map stands before no mapping", node.start_mark)
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConstructorError(
                    None, None, "a key is a list or a mapping", key_node.start_mark
                )
            key, text = self.construct_object(key_node, deep=True), key_node.value
            line = key_node.start_mark.line + 1
            if text in first_of or key in result:
                before = first_of.get(text, first_of.get(str(key), line))
                raise ConstructorError(
                    None,
                    None,
                    f"the key {cut(text)} is there twice, first in line {before}",
                    key_node.start_mark,
                )
            first_of[text] = line
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def unknown(self, node: yaml.Node):
        raise ConstructorError(
            None, None, f"the tag {cut(node.tag)} is not allowed", node.start_mark
        )


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: a lone surrogate, which stands for a byte, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_core_int(text: str) -> bool:
    return re.fullmatch(r"[-+]?[0-9]+", text) is not None


def _reason(error: yaml.YAMLError) -> str:
    """What PyYAML says, in one line: the problem, and its line and column."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "context", None) or str(error)
    place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    return f"{shorten(problem, 160)}{place}"


for _name, _pattern, _first in _CORE_SCHEMA:
    _StrictLoader.add_implicit_resolver(_TAG + _name, _pattern, _first)
_StrictLoader.yaml_constructors = {
    _TAG + "null": _StrictLoader.nothing,
    _TAG + "bool": _StrictLoader.boolean,
    _TAG + "int": _StrictLoader.number,
    _TAG + "float": _StrictLoader.real,
    _TAG + "str": _StrictLoader.text,
    _TAG + "seq": _StrictLoader.sequence,
    _TAG + "map": _StrictLoader.mapping,
    None: _StrictLoader.unknown,
}


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text, and writes no aliases."""

    def ignore_aliases(self, data) -> bool:
        return True


for _name, _pattern, _first in _CORE_SCHEMA:
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)
