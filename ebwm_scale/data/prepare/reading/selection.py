"""Which text of a record is a document, and which records are taken at all.

--field content.text   the text is record["content"]["text"], or record["content.text"]
--id-field url         how the document is called in messages
--filter 'lang == en'  records for which it does not hold are left out, and counted
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import cut, shown

DEFAULT_FIELD = "text"
_SHOWN_FIELDS = 12
_FILTER = re.compile(r"\s*(\S+?)\s*(==|!=|<=|>=|<|>|\s(?:not )?in\s|\scontains\s)\s*(.+?)\s*", re.S)
_ABSENT = object()


def _is_in(value: Any, wanted: Any) -> bool:
    return any(type(value) is type(item) and value == item for item in wanted)


_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    **_ORDERS,
    "==": operator.eq,
    "!=": operator.ne,
    "in": _is_in,
    "not in": lambda value, wanted: not _is_in(value, wanted),
    "contains": lambda value, wanted: wanted in value,
}


class NoSuchField(ValueError):
    """A record without the field; `fields` are those that it has."""

    def __init__(self, name: str, fields: Sequence[str]):
        super().__init__(f'no field "{cut(name)}"; {fields_there_are(fields)}')
        self.fields = tuple(fields)


@dataclass(frozen=True)
class Filter:
    """`field operation value`; a record in which the field is absent or null does not pass."""

    field: str
    operation: str
    value: Any
    text: str  # as it was given

    def holds(self, record: Mapping[str, Any]) -> bool | None:
        """None where the record has no such value; DataError for values that do not compare."""
        found = look_up(record, self.field)
        if found is _ABSENT or found is None:
            return None
        return _TESTS[self.operation](self._comparable(found), self.value)

    def _comparable(self, found: Any) -> Any:
        """The record's value as one of the filter's type: tables of text hold numbers as text."""
        if self.operation in ("in", "not in"):
            return found
        wanted: tuple[type, ...] = (type(self.value),)
        if isinstance(self.value, (int, float)) and not isinstance(self.value, bool):
            wanted = (int, float)
            if isinstance(found, str):
                try:
                    return float(found)
                except ValueError:
                    pass
        is_flag = isinstance(found, bool) != isinstance(self.value, bool)
        if self.operation == "contains":
            if isinstance(found, list) or (isinstance(found, str) and isinstance(self.value, str)):
                return found
        elif isinstance(found, wanted) and not is_flag:
            return found
        raise DataError(
            f"filter {shown(self.text)}: a record has {self.field} = {shown(found)}, "
            f"{_kind(found)}, which does not compare with {shown(self.value)}: mend the filter"
        )


def parse_filter(text: str) -> Filter:
    """The filter of an option; DataError for what is none."""
    match = _FILTER.fullmatch(text)
    if match is None:
        raise DataError(
            f"filter {shown(text)}: must be FIELD OPERATION VALUE with one of "
            f"{', '.join(_TESTS)}, for example 'language == en' or 'score >= 0.5'"
        )
    field, operation, value = match[1], match[2].strip(), match[3]
    try:
        wanted = json.loads(value)
    except ValueError:
        wanted = value
    if operation in ("in", "not in") and not isinstance(wanted, list):
        raise DataError(
            f"filter {shown(text)}: {operation} takes a JSON list, for example "
            f'\'{field} {operation} ["en", "de"]\''
        )
    if operation in _ORDERS and (
        isinstance(wanted, bool) or not isinstance(wanted, (int, float, str))
    ):
        raise DataError(
            f"filter {shown(text)}: {operation} compares numbers or texts, not {_kind(wanted)}"
        )
    return Filter(field, operation, wanted, text)


@dataclass(frozen=True)
class Selection:
    """What is taken of records; prose has none, and is taken as it is.

    field_given: whether the user named the field, or it is the default.
    """

    field: str = DEFAULT_FIELD
    id_field: str | None = None
    filters: tuple[Filter, ...] = ()
    field_given: bool = False

    def passes(self, record: Mapping[str, Any]) -> bool | None:
        """Whether all filters hold; None where one of them found no value."""
        verdict: bool | None = True
        for one in self.filters:
            holds = one.holds(record)
            if holds is False:
                return False
            if holds is None:
                verdict = None
        return verdict

    def text_of(self, record: Any) -> str:
        """The text of a record; ValueError says what is there instead."""
        if not isinstance(record, dict):
            raise ValueError(f"not an object with fields but {_kind(record)}")
        return text_value(look_up(record, self.field), self.field, record.keys())

    def name_of(self, record: Mapping[str, Any]) -> str | None:
        """What the record is called, if there is a field for it."""
        if self.id_field is None:
            return None
        found = look_up(record, self.id_field)
        return None if found is _ABSENT or found is None else cut(found)

    @property
    def columns(self) -> tuple[str, ...]:
        """All fields that are looked at, the text first."""
        named = [self.field, *(one.field for one in self.filters)]
        if self.id_field is not None:
            named.append(self.id_field)
        return tuple(dict.fromkeys(named))


EVERYTHING = Selection()


def text_value(found: Any, field: str, fields: Sequence[str] | Any) -> str:
    """What was found under the field's name, if it is a text; else ValueError."""
    if isinstance(found, str):
        return found
    if found is _ABSENT:
        raise NoSuchField(field, [str(name) for name in fields])
    if found is None:
        raise ValueError(f'its field "{cut(field)}" is null')
    raise ValueError(f'its field "{cut(field)}" is {_kind(found)}, not a text')


def look_up(record: Mapping[str, Any], field: str) -> Any:
    """The value under a name: of the record itself, or with dots of the objects in it."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def fields_there_are(fields: Sequence[str]) -> str:
    """For messages: "it has title, body; name the one with the text with --field"."""
    if not fields:
        return "it has no fields at all"
    named = [cut(name, 40) for name in fields[:_SHOWN_FIELDS]]
    if len(fields) > _SHOWN_FIELDS:
        named.append(f"and {len(fields) - _SHOWN_FIELDS} more")
    return f"it has {', '.join(named)}: name the one with the text with --field"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, Mapping):
        return "an object with fields of its own"
    return f"a {type(value).__name__}"
