"""What a sweep of rates over widths says: best rates, the lowest point between them, what it costs
to take a rate to another width.
"""

import json
import math

import pytest

from ebwm_scale.core.errors import UserError
from ebwm_scale.evaluation.width_transfer import (
    best_loss_table,
    best_rates,
    cost_of_transfer,
    loss_table,
    read_rows,
    transfer_table,
    vertex,
)

RATES = (0.005, 0.01, 0.02, 0.04)


def rows(shift: float) -> list[dict]:
    """Parabolas over log2 of the rate, lowest at 0.01 at the base, `shift` octaves lower at 64."""
    found = []
    for kind in ("baseline", "energy"):
        for parametrization, width, lowest in (
            ("standard", 32, 0.0),
            ("standard", 64, -shift),
            ("width_scaled", 64, 0.0),
        ):
            for rate in RATES:
                loss = 4 + (math.log2(rate / 0.01) - lowest) ** 2
                run = {"kind": kind, "parametrization": parametrization, "width": width}
                found.append(run | {"rate": rate, "seed": 33, "loss": loss})
    return found


def test_the_vertex_of_a_parabola_is_found_between_the_rates():
    losses = {rate: math.log2(rate / 0.012) ** 2 for rate in RATES}
    assert vertex(losses) == pytest.approx(0.012)
    assert vertex({rate: rate for rate in RATES}) is None


def test_a_rate_that_moves_costs_and_one_that_stays_does_not():
    sweep = rows(shift=0.75)
    assert best_rates(sweep)["energy", "standard", 64] == 0.005
    assert best_rates(sweep)["energy", "width_scaled", 64] == 0.01
    assert cost_of_transfer(sweep, "energy", "standard", 64, 33) == pytest.approx(0.75**2 - 0.25**2)
    assert cost_of_transfer(sweep, "energy", "width_scaled", 64, 33) == 0
    assert transfer_table(sweep, 33)[-2:] == [
        "| energy model | `standard` | 0.500 |",
        "| energy model | `width_scaled` | 0.000 |",
    ]
    assert best_loss_table(sweep, 33)[-1] == "| energy model | -0.062 |"


def test_a_table_says_what_diverged_and_what_is_best(tmp_path):
    sweep = rows(shift=0.0)
    sweep[-1]["loss"] = None
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in [{"what": "rates"}, *sweep]]
    file.write_text("\n".join(lines) + "\n")
    line = loss_table(read_rows(file), "energy", 33)[-1]
    assert line == "| `width_scaled` | 64 | 5.000 | **4.000** | 5.000 | diverged | 0.0100 |"
    file.write_text("no rows\nnone\n")
    with pytest.raises(UserError, match=r"rows.jsonl: no result of tools/study_width.py"):
        read_rows(file)
