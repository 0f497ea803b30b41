"""The report of a run: everything a run folder has -> one self-contained page that first answers
"did it learn?".

    ebwm report RUN [--baseline RUN]        writes RUN/report.html and RUN/report_plot.png
    ebwm report RUN --watch                 again and again, until the run is over or Ctrl-C

The page needs no network and no script. What the folder lacks is named in the page instead of
guessed; every mark is computed from the numbers beside it. reporting/read_run.py reads,
reporting/run_data.py judges, reporting/plots.py draws the curves, reporting/report_page.py writes
the page.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import say
from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.reporting.following import LiveRun
from ebwm_scale.reporting.plots import headline_png
from ebwm_scale.reporting.read_run import read_run
from ebwm_scale.reporting.report_page import render

EVERY_S = 30.0  # between two looks of --watch


def write_report(
    run_dir: Path, *, baseline_dir: Path | None = None, reload_s: float | None = None
) -> Path:
    """Write report.html and report_plot.png into the run folder and return the page's path;
    UserError when there is nothing to report.

    reload_s: a browser loads the page again after so many seconds; None: it stays.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    baseline = read_run(Path(baseline_dir)) if baseline_dir is not None else None
    page = render(run, baseline, reload_s=reload_s)
    _replace(run_dir / "report_plot.png", headline_png(run, baseline))
    return _replace(run_dir / "report.html", page.encode("utf-8", errors="replace"))


def _replace(path: Path, content: bytes) -> Path:
    try:
        with replacement(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}; make the run folder writable"
        ) from None
    return path


def watch(run_dir: Path, *, baseline_dir: Path | None = None, every_s: float = EVERY_S) -> Path:
    """The report whenever the run has something new, until no process trains there any more; then
    once more, without loading itself again. Waits for the first row.
    """
    run = LiveRun(run_dir)
    has_news = True
    while not run.is_over:
        has_news = run.look() or has_news
        if has_news and (run.training or run.validation):
            path = write_report(run_dir, baseline_dir=baseline_dir, reload_s=every_s)
            say(f"{path}: step {run.training.get('step', run.validation.get('step'))}")
            has_news = False
        time.sleep(every_s)
    return write_report(run_dir, baseline_dir=baseline_dir)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="run folder to compare with, usually of model.kind baseline",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="write it again as the run goes on; an open page loads itself again",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=EVERY_S,
        metavar="SECONDS",
        help="with --watch: between two looks (default %(default)g)",
    )
    options = parser.parse_args(arguments)
    if options.every <= 0:
        raise UserError(f"--every is {options.every:g}: must be above 0")
    if not options.watch:
        say(str(write_report(options.run, baseline_dir=options.baseline)))
        return EXIT_FINISHED
    try:
        say(str(watch(options.run, baseline_dir=options.baseline, every_s=options.every)))
    except KeyboardInterrupt:
        pass  # how it is left
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
