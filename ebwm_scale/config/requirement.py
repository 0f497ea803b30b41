"""How the checks of a configuration say what is wrong."""

from __future__ import annotations

from collections.abc import Callable

Require = Callable[[bool, str], None]
"""Given whether something holds, and the sentence for where it does not."""
