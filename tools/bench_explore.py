"""How long a person waits for the explorer: seconds from a request to its page.

    python tools/bench_explore.py runs/quickstart --against runs/quickstart_baseline
        --output results/explore_first_answer.json [--again results/explore_first_answer.json]
        [--prompt TEXT] [--processes 5] [--nice N]

Each process is an `ebwm explore RUN` of its own. Of it are measured: the start until the address is
printed, the first answer, and one more. Of a run on text an answer is the page to a prompt; of
others, which begin with an answer, it is the first page, and the same asked for again.

Wall seconds depend on what else the machine does, so the load average is kept beside them, and the
processor seconds of the server, of all its threads. --nice -20, which a superuser can ask for, has
both processes go before the machine's other work: what a person waits for where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import say
from ebwm_scale.core.disk import replace_text
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.provenance import provenance

TIMEOUT_S = 600


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="RUN")
    parser.add_argument("--against", default=None, metavar="RUN")
    parser.add_argument("--prompt", default=None, metavar="TEXT", help="a run on text: the prompt")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="of both processes")
    parser.add_argument("--processes", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--again", type=Path, default=None, metavar="FILE", help="a result to add this one to"
    )
    options = parser.parse_args()
    if options.processes < 1:
        raise UserError(f"--processes is {options.processes}: must be at least 1")
    try:
        os.nice(options.nice)
    except PermissionError:
        raise UserError(f"--nice {options.nice}: only a superuser can; leave it out") from None
    rows = []
    for _ in range(options.processes):
        rows.append(measured(options))
        say(json.dumps(rows[-1]))
    result: dict[str, Any] = {"runs": []}
    if options.again is not None:
        result = json.loads(options.again.read_text())
    result["runs"].append(
        {
            "run": Path(options.checkpoint).name,
            "against": None if options.against is None else Path(options.against).name,
            "prompt": options.prompt,
            "nice": options.nice,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set: a thread a core"),
            "processes": rows,
            "median": {
                key: statistics.median(row[key] for row in rows)
                for key in rows[0]
                if key != "load_average"
            },
            **provenance("starlette", "uvicorn"),
        }
    )
    replace_text(options.output, json.dumps(result, indent=1) + "\n")
    say(str(options.output))
    return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Of one process."""
    words = [sys.executable, "-m", "ebwm_scale.explore", options.checkpoint]
    if options.against is not None:
        words += ["--against", options.against]
    load = [round(value, 2) for value in os.getloadavg()]
    started = time.monotonic()
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        if not address.startswith("http://"):
            raise UserError(f"{options.checkpoint}: ebwm explore printed no address")
        start_s = time.monotonic() - started
        if options.prompt is not None:
            fetch(address)  # the form, which a person has seen before
        first = timed(server.pid, address, options.prompt)
        again = timed(server.pid, address, options.prompt)
    finally:
        server.terminate()
        server.wait(60)
    return {
        "load_average": load,
        "start_s": round(start_s, 3),
        "first_wall_s": first[0],
        "first_processor_s": first[1],
        "next_wall_s": again[0],
        "next_processor_s": again[1],
        "page_bytes": first[2],
    }


def timed(pid: int, address: str, prompt: str | None) -> tuple[float, float, int]:
    """(wall seconds, processor seconds of the server, bytes of the page)."""
    before, started = processor_seconds(pid), time.monotonic()
    content = fetch(address, None if prompt is None else {"prompt": prompt})
    wall = time.monotonic() - started
    return round(wall, 3), round(processor_seconds(pid) - before, 3), len(content)


def fetch(address: str, fields: dict[str, str] | None = None) -> bytes:
    """A page; with fields, the answer to a form."""
    data = None if fields is None else urllib.parse.urlencode(fields).encode()
    with urllib.request.urlopen(address, data, timeout=TIMEOUT_S) as answer:
        return answer.read()


def processor_seconds(pid: int) -> float:
    """User and system time of a process, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
