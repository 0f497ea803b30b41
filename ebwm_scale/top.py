"""A run as it trains, in the terminal: loss, rate, speed, time left, checkpoints, refinement.

    ebwm top RUN [--every SECONDS] [--once]

On a terminal one screen that is drawn again; elsewhere one line for each look at which a step was
new. It ends when the run has, or with Ctrl-C. Nothing is written into the run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import say
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.reporting.following import LiveRun
from ebwm_scale.reporting.live_view import facts, line

EVERY_S = 2.0


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument(
        "--every",
        type=float,
        default=EVERY_S,
        metavar="SECONDS",
        help="between two looks (default %(default)g)",
    )
    parser.add_argument("--once", action="store_true", help="what there is now, and no more")
    options = parser.parse_args(arguments)
    if options.every <= 0:
        raise UserError(f"--every is {options.every:g}: must be above 0")
    run = LiveRun(options.run)
    run.look()
    try:
        if options.once:
            for name, text in facts(run):
                say(f"{name:<16}{text}")
        elif sys.stdout.isatty():
            draw_until_over(run, options.every)
        else:
            print_until_over(run, options.every)
    except KeyboardInterrupt:
        pass  # how it is left
    return EXIT_FINISHED


def print_until_over(run: LiveRun, every_s: float) -> None:
    """A line now, one whenever a step is new, and one for the end."""
    say(line(run))
    while not run.is_over:
        step = run.training.get("step")
        time.sleep(every_s)
        run.look()
        if run.training.get("step") != step:
            say(line(run))
    run.look()  # what was written between the last look and the end
    say(run.state())


def draw_until_over(run: LiveRun, every_s: float) -> None:
    """The screen, on a terminal."""
    from rich.live import Live

    with Live(_screen(run), auto_refresh=False) as live:
        while not run.is_over:
            time.sleep(every_s)
            run.look()
            live.update(_screen(run), refresh=True)
        run.look()
        live.update(_screen(run), refresh=True)


def _screen(run: LiveRun):
    """A table of rich; texts of the run are shown as they are, never read as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in facts(run):
        table.add_row(Text(name, style="bold"), Text(text))
    return table


if __name__ == "__main__":
    sys.exit(main())
