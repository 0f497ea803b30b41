#!/usr/bin/env python3
"""Count the instructions of the attention kernels' loops, on a machine without a GPU.

    python tools/count_loops.py [--architecture sm_80 sm_90] [--head-dimension 64 128]
        [--kernel _second_key ...] [--use energy causal] [--part after --output FILE.json]

Compiles what tools/compile_kernels.py compiles, in bfloat16, and reads the machine code: its
loops that multiply on tensor cores, in their order, each with the instructions that a warp issues
for a tile. Nothing is timed. With --output the counts become a part of that file, which keeps its
other parts: what was counted before a change, and after it.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import compile_kernels
from compile_kernels import USES, Work, compile_use

from ebwm_kernels.attention.tuning import KERNELS
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.provenance import provenance

# Before and after loops without masks; with the ordinary backward in them (joint.py).
PARTS = ("before", "after", "joint")
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w[\w.]*)(.*);")
TARGET = re.compile(r"\(?(\.L_x_\d+)\)?")
# What is counted of a loop beside all instructions, by the instructions' names up to the first dot.
KINDS = {
    "tensor_core": ("HGMMA", "HMMA"),
    "compares_and_selects": ("ISETP", "FSEL", "SEL"),
    "conversions": ("F2F",),
}


def loops_of(code: str) -> list[dict[str, int]]:
    """The innermost loops with tensor-core instructions, of the machine code of a program."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[dict[str, int]] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        if not (instruction := INSTRUCTION.search(line)):
            continue
        names.append(instruction[1])
        target = TARGET.search(instruction[2])
        if not names[-1].startswith("BRA") or target is None or target[1] not in labels:
            continue
        start = labels.pop(target[1])  # a jump back: the loop ends here
        body = names[start:]
        if any(loop["start"] >= start for loop in loops):
            continue  # around one that is already there
        counts = {
            kind: sum(name.split(".")[0] in of_kind for name in body)
            for kind, of_kind in KINDS.items()
        }
        if counts["tensor_core"]:
            loops.append({"start": start, "instructions": len(body), **counts})
    return [{kind: count for kind, count in loop.items() if kind != "start"} for loop in loops]


def with_loops(usage_of):
    """usage_of that looks at the loops as well."""

    def usage(compiled) -> dict:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            code = compile_kernels.output_of("nvdisasm", "-c", file.name)
        return usage_of(compiled) | {"loops": loops_of(code)}

    return usage


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--head-dimension", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--use", nargs="+", default=list(USES), choices=USES)
    parser.add_argument("--part", choices=PARTS, default="after", help="of the file")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the counts, as a file")
    arguments = parser.parse_args()
    compile_kernels.usage_of = with_loops(compile_kernels.usage_of)
    programs = []
    for architecture in arguments.architecture:
        for head_dimension in arguments.head_dimension:
            for kernel in arguments.kernel:
                for use in arguments.use:
                    plain = (True, False, False, False)  # causal; groups, first keys, shared keys
                    work = Work(kernel, architecture, head_dimension, "bfloat16", use, *plain, None)
                    for row in compile_use(work):
                        programs.append(row_of(row))
                        print(json.dumps(programs[-1]), flush=True)
    if arguments.output is not None:
        found = {}
        if arguments.output.exists():
            found = json.loads(arguments.output.read_text(encoding="utf-8"))
        found[arguments.part] = provenance("triton") | {"programs": programs}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def row_of(row: dict) -> dict:
    """What the file holds of a program."""
    kept = ("kernel", "architecture", "head_dimension", "use", "tile", "register_limit", "second")
    kept += ("joint",)
    kept += ("registers", "spilled_bytes", "shared_kib", "loops")
    return {name: row[name] for name in kept if name in row}


if __name__ == "__main__":
    sys.exit(main())
