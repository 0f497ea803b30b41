"""Hold the model against golden cases: float64 numbers of the authors' released EBT code.

    python tools/check_parity.py tests/golden/*.safetensors [--tolerance 1e-10]

One JSON line per case with the largest relative error of loss, energies, predictions and gradients
(and of the training trajectory, where the case has one). Exit 1 if any is above the tolerance, 2 if
a file is not a golden case. The format: docs/parity.md.
"""

from __future__ import annotations

import json
import sys

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.errors import UserError
from ebwm_scale.evaluation.parity import check_case


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", metavar="CASE.safetensors")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-10,
        help="largest relative error allowed (default 1e-10)",
    )
    arguments = parser.parse_args()
    status = 0
    for path in arguments.cases:
        try:
            errors = check_case(path)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        passed = max(errors.values()) <= arguments.tolerance  # NaN compares false, so it fails
        print(json.dumps({"case": path, "passed": passed, **errors}))
        status = status if passed else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
