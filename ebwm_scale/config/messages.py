"""What pydantic found, in sentences: the key, the value, what is allowed."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ebwm_scale.config.schema import Config
from ebwm_scale.core.plain_text import cut, shown

LARGE = 10**4  # bounds above it keep out mistakes: no model or run comes near them

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a finite number",
    "float_parsing": "a finite number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "dict_type": "a mapping",
}
POINTS = "a list of [progress, value] points, for example [[0, 1.0], [1, 0.1]]"


def problems_of(error: ValidationError) -> list[str]:
    """One sentence per problem; of a key with several kinds of values one for all of them."""
    problems = []
    for found in error.errors(include_url=False):
        problem = _sentence(found)
        if problem is not None and problem not in problems:
            problems.append(problem)
    return problems


def _sentence(found: ErrorDetails) -> str | None:
    """None where another problem of the same key says it."""
    location = [part for part in found["loc"] if part != "nullable"]
    kind = found["type"]
    value = found["input"]
    context = found.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind in ("model_type", "model_attributes_type") and len(location) <= 2:
        section = _section_at(location)
        if section is not None:
            keys = ", ".join(section.model_fields)
            return f"{_key(location)}: expected a section with keys {keys}; got {shown(value)}"
    field = _field_of(location)
    kinds = _kinds_of(_hint_at(field))
    if len(kinds) > 1:
        expected = ", or ".join(_described(one) for one in kinds)
        if any(isinstance(part, int) for part in location):
            return None  # the other kinds' problems show the whole list
        return f"{_key(field)} is {shown(value)}: expected {expected}"
    key = _key(location)
    listed = _key_of_a_list(location)
    if kind == "greater_than":
        return f"{key} is {shown(value)}: must be above {context['gt']:g}"
    if kind == "greater_than_equal":
        return f"{key} is {shown(value)}: must be {context['ge']:g} or more"
    if kind == "less_than":
        return f"{key} is {shown(value)}: must be below {context['lt']:g}"
    if kind == "less_than_equal":
        if context["le"] >= LARGE:
            return f"{key} is {shown(value)}: too large for anything"
        return f"{key} is {shown(value)}: must be at most {context['le']:g}"
    if kind == "literal_error":
        expected = f"one of {_choices(location)}"
    elif kind == "value_error":
        expected = str(context["error"])
    elif listed is not None:
        return f"{listed} is {shown(value)}: expected {_expected_list(listed)}"
    else:
        expected = EXPECTED.get(kind) or found["msg"]
    if _may_be_null(location):
        expected += ", or null"
    return f"{key} is {shown(value)}: expected {expected}"


def _key(location: list) -> str:
    """section.key, with [i] for places in lists."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{cut(part)}" if text else cut(part)
    return text


def _unknown_key(location: list) -> str:
    parent = location[:-1]
    section = _section_at(parent)
    names = list(section.model_fields) if section is not None else []
    key = cut(str(location[-1]))
    prefix = f"{_key(parent)}." if parent else ""
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(names)}"
    return f"{prefix}{key}: unknown key; {hint}"


def _section_at(location: list) -> type[BaseModel] | None:
    """The section that a location stands in, or None."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        section = _section_of(section.model_fields[part].annotation)
    return section


def _section_of(hint: Any) -> type[BaseModel] | None:
    """The section that a type is, or is a tuple of."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint
    for argument in typing.get_args(hint):
        found = _section_of(argument)
        if found is not None:
            return found
    return None


def _field_of(location: list) -> list:
    """The names down to a key itself: pydantic adds which of its kinds of values it tried."""
    section: type[BaseModel] | None = Config
    for index, part in enumerate(location):
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return location[:index]
        section = _section_of(section.model_fields[part].annotation)
    return location


def _kinds_of(hint: Any) -> list:
    """The types of values that a key may have, null aside."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return [hint]
    return [one for one in typing.get_args(hint) if one is not type(None)]


def _described(hint: Any) -> str:
    """A type in words."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _described(typing.get_args(hint)[0])
    if origin is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(hint))
    if origin is tuple:
        return "a list of numbers that are not negative"
    return "a whole number of 1 or more"


def _hint_at(location: list) -> Any:
    names = [part for part in location if not isinstance(part, int)]
    section = _section_at(names[:-1])
    if section is None or names[-1] not in section.model_fields:
        return None
    return section.model_fields[names[-1]].annotation


def _may_be_null(location: list) -> bool:
    hint = _hint_at(location)
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return is_union and type(None) in typing.get_args(hint)


def _choices(location: list) -> str:
    hint = _hint_at(location)
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return ", ".join(str(choice) for choice in typing.get_args(hint))


def _key_of_a_list(location: list) -> str | None:
    """The key of the list that a location is in or is, or None."""
    names = []
    for part in location:
        if isinstance(part, int):
            return _key(names)
        names.append(part)
    hint = _kinds_of(_hint_at(location))[0] if location else None
    return _key(names) if typing.get_origin(hint) is tuple else None


def _expected_list(key: str) -> str:
    (hint,) = _kinds_of(_hint_at(key.split(".")))
    section = _section_of(hint)
    if section is not None:
        return f"a list of mappings with the keys {', '.join(section.model_fields)}"
    element = typing.get_args(hint)[0]
    if element is str:
        return "a list of texts"
    if element is int:
        return f"a list of {len(typing.get_args(hint))} whole numbers"
    if typing.get_origin(element) is Literal:
        return f"a list of {', '.join(typing.get_args(element))}"
    return POINTS
