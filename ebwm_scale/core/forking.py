"""Starting forked processes from a process that has garbage.

A forked process inherits the parent's objects, and none of its threads. Its garbage collector would
destroy what the parent had left to its own. For a decoded video frame that means waiting for the
threads of a converter, which do not exist there: the process stands still for ever.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def parents_objects_kept() -> Iterator[None]:
    """Within it, start forked processes: their garbage collectors leave the parent's objects alone.

    The parent's garbage is collected first, so little is kept that nobody needs.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
