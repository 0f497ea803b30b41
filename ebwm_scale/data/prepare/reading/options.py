"""The options of the tools that read text."""

from __future__ import annotations

import argparse

from ebwm_scale.data.prepare.reading.selection import DEFAULT_FIELD, Selection, parse_filter


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """--field, --id-field and --filter."""
    parser.add_argument(
        "--field",
        metavar="NAME",
        help=f"of records: the field with the text, a.b for one in another (default "
        f"{DEFAULT_FIELD})",
    )
    parser.add_argument(
        "--id-field", metavar="NAME", help="of records: the field that names them in messages"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="'FIELD OPERATION VALUE'",
        help="of records: take those only for which it holds, such as 'score >= 0.5'; may be given "
        "several times",
    )


def selection_of(arguments: argparse.Namespace) -> Selection:
    """What the options say; DataError for a filter that is none."""
    return Selection(
        field=arguments.field or DEFAULT_FIELD,
        id_field=arguments.id_field,
        filters=tuple(parse_filter(text) for text in arguments.filter),
        field_given=arguments.field is not None,
    )
