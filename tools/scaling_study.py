"""Scaling studies: energy models beside Transformer++ at several sizes (or durations, batches,
depths, widths) and seeds, and what follows from them.

    python tools/scaling_study.py start configs/studies/scaling_text.yaml
        --run-dir runs/scaling_text --set data.manifest=...
        launches what is missing; repeat to go on
    python tools/scaling_study.py status runs/scaling_text
    python tools/scaling_study.py collect configs/studies/scaling_text.yaml runs/scaling_text
        --output results/scaling/text.json
    python tools/scaling_study.py page results/scaling/*.json --output scaling.html
        from data alone, in seconds
    python tools/scaling_study.py tables results/scaling/text.json
        what docs/scaling.md shows of it, in Markdown

A study is a file: title, unit (of the loss), config, set (overrides of every run), axis (what
varies: size, data, batch, depth or width) and sweep, the axes as in
--sweep-file of python -m ebwm_scale.launch; among them `form`, with transformer++ as the reference,
  and `seed`. Runs go through the launcher: what follows -- is passed on to it (-- --cluster slurm
  --nodes 1 --gpus-per-node 1); the default is this machine, two at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ebwm_scale import launch
from ebwm_scale.cluster.status import status_of, table
from ebwm_scale.config.shipped import find_config
from ebwm_scale.config.strict_yaml import dump_yaml, read_yaml
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.errors import EXIT_BAD_INPUT, EXIT_FINISHED, ConfigError, UserError
from ebwm_scale.core.plain_text import shown
from ebwm_scale.core.provenance import provenance
from ebwm_scale.core.run_location import check_folder
from ebwm_scale.evaluation.scaling_laws import QUANTITIES, collect

KEYS = {"title": str, "unit": str, "config": str, "set": list, "axis": str, "sweep": dict}


@command
def main() -> int:
    arguments, passed_on = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, passed_on = arguments[:at], arguments[at + 1 :]
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser(
        "start", help="launch the runs that are not there, and the failed ones again"
    )
    start.add_argument("study", type=Path)
    start.add_argument("--run-dir", type=Path, required=True, metavar="DIR")
    start.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="for every run, such as data.manifest",
    )
    commands.add_parser(
        "status", help="one line per run; exit code 1 until all have finished"
    ).add_argument("run_dir", type=Path)
    gather = commands.add_parser("collect", help="the finished runs as one result file")
    gather.add_argument("study", type=Path)
    gather.add_argument("run_dir", type=Path)
    gather.add_argument("--output", type=Path, required=True)
    page = commands.add_parser("page", help="tables and plots of result files")
    page.add_argument("results", type=Path, nargs="+")
    page.add_argument("--output", type=Path, required=True)
    tables = commands.add_parser("tables", help="losses, differences and exponents, in Markdown")
    tables.add_argument("result", type=Path)
    options = parser.parse_args(arguments)
    return {
        "start": begin,
        "status": show,
        "collect": write_result,
        "page": write_page,
        "tables": print_tables,
    }[options.command](options, passed_on)


def read_study(path: Path) -> dict:
    """A study file. Raises ConfigError for what is missing or of the wrong kind."""
    study = read_yaml(find_config(path))
    wrong = (
        [
            f"{key} is {shown(study.get(key))}: must be a {kind.__name__}"
            for key, kind in KEYS.items()
            if not isinstance(study.get(key), kind)
        ]
        if isinstance(study, dict)
        else ["it is no mapping"]
    )
    if not wrong:
        axes = {axis for _, axes in QUANTITIES.values() for axis in axes}
        if study["axis"] not in axes:
            wrong.append(
                f"axis is {shown(study['axis'])}: must be one of {', '.join(sorted(axes))}"
            )
        wrong += [
            f"sweep has no axis {needed}"
            for needed in ("form", "seed", study["axis"])
            if needed not in study["sweep"]
        ]
        if "transformer++" not in study["sweep"].get("form", {}):
            wrong.append("sweep: form has no transformer++, which the others are compared with")
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}")
    return study


def begin(options: argparse.Namespace, passed_on: list[str]) -> int:
    if (options.run_dir / "sweep.json").exists():
        return launch.main(["--resubmit", str(options.run_dir)])
    study = read_study(options.study)
    check_folder(options.run_dir, resume=True)
    was_there = options.run_dir.exists()
    options.run_dir.mkdir(parents=True, exist_ok=True)
    axes = options.run_dir / "axes.yaml"
    axes.write_text(dump_yaml(study["sweep"]), encoding="utf-8")
    code = launch.main(
        [
            "--config",
            study["config"],
            "--sweep-file",
            str(axes),
            "--run-dir",
            str(options.run_dir),
            "--set",
            *study["set"],
            *options.overrides,
            *(passed_on or ["--cluster", "local", "--parallel", "2"]),
        ]
    )
    if code == EXIT_BAD_INPUT and not was_there:  # refused: nothing was begun, nothing is left
        axes.unlink()
        options.run_dir.rmdir()
    return code


def show(options: argparse.Namespace, _: list[str]) -> int:
    runs = status_of(options.run_dir)
    print(table(runs))
    return EXIT_FINISHED if all(run.state == "finished" for run in runs) else 1


def write_result(options: argparse.Namespace, _: list[str]) -> int:
    study = read_study(options.study)
    result = (
        {"title": study["title"], "unit": study["unit"]}
        | provenance()
        | {"study": study}
        | collect(options.run_dir, study["axis"])
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(
        f"{options.output}: {len(result['runs'])} runs"
        + (f"; not finished: {', '.join(result['missing'])}" if result["missing"] else "")
    )
    return EXIT_FINISHED


def write_page(options: argparse.Namespace, _: list[str]) -> int:
    from ebwm_scale.reporting.plain import bounded, page_text
    from ebwm_scale.reporting.scaling_page import analyse, render

    studies = []
    for path in options.results:
        try:
            study = json.loads(path.read_text(encoding="utf-8"))
            study = bounded(study, items=10**5, nodes=2 * 10**6)
            studies.append(study | analyse(study))
            page = render(studies)
        except (
            OSError,
            ValueError,
            RecursionError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise UserError(
                f"{path}: not a result of scaling_study.py collect: {page_text(repr(error), 160)}"
            ) from None
    options.output.write_text(page, encoding="utf-8", errors="replace")
    print(options.output)
    return EXIT_FINISHED


def print_tables(options: argparse.Namespace, _: list[str]) -> int:
    from ebwm_scale.evaluation.scaling_tables import difference_table, exponent_table, loss_table

    try:
        study = json.loads(options.result.read_text(encoding="utf-8"))
        tables = [make(study) for make in (loss_table, difference_table, exponent_table)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{options.result}: not a result of scaling_study.py collect: {shown(repr(error))}"
        ) from None
    print("\n\n".join("\n".join(table) for table in tables))
    return EXIT_FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
