"""What the pages of results have in common: NAME.json with NAME.html beside it, and one line for
what is no such result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.reporting.plain import page_text


def write_result(
    folder: Path, name: str, result: dict[str, Any], render: Callable[[dict[str, Any]], str]
) -> Path:
    """The path of the page. The numbers are on disk before it is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    page = folder / f"{name}.html"
    page.write_text(render(result), encoding="utf-8", errors="replace")
    return page


@contextmanager
def refuses_other_results(command: str) -> Iterator[None]:
    """DataError, in one line, where a value is missing or of another kind.

    command: the one whose results the page shows.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"not a result of {command}: {page_text(repr(error), 160)}; evaluate again"
        ) from None
