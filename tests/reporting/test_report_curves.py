"""The curves of a report, from logs of every length and with numbers of every kind."""

import functools
import json
import math
import re

import numpy as np
import pytest
import yaml
from run_folders import (
    Reader,
    answer_of,
    baseline_rows,
    check,
    checks_of,
    continuation,
    drawn,
    page_of,
    run_folder,
    training_row,
    validation_row,
)

from ebwm_scale.core.rows import Rows
from ebwm_scale.reporting.curves import MAX_PARTS, POINTS, read_metrics
from ebwm_scale.reporting.norm_plots import draw_norms
from ebwm_scale.reporting.plots import (
    draw_profile,
    draw_training_loss,
    draw_validation,
)
from ebwm_scale.reporting.read_run import read_run


def test_baseline_curve_is_drawn(tmp_path, without_plots):
    run = run_folder(tmp_path / "run")
    base = run_folder(
        tmp_path / "base", baseline_rows({10: 5.0, 20: 4.0, 90: 3.0}), kind="baseline"
    )
    assert "no run to compare with" in check(page_of(run), "Transformer++")[2]
    assert drawn(draw_validation, run)[1] == [
        "after step 1",
        "after step 2",
        "unigram entropy",
        "initial state",
    ]
    caption, names = drawn(draw_validation, run, base)
    assert "Transformer++" in names and "Transformer++ goes on to step 90" in caption


def test_report_of_a_baseline_run_makes_no_claims_about_refinement(tmp_path):
    page = page_of(run_folder(tmp_path, baseline_rows({10: 5.0, 20: 4.0}), kind="baseline"))
    assert answer_of(page) == "Yes"
    assert not [claim for claim in checks_of(page) if "efine" in claim or "Thinking" in claim]
    assert "there is nothing to refine" in page


def test_a_report_says_how_often_an_energy_model_reads(tmp_path):
    run_folder(tmp_path, [training_row(10, [5.0])])
    assert not re.search(r"Loops</t[hd]>", page_of(tmp_path))
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    settings["model"]["loops"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert re.search(r"Loops</t[hd]>\s*<td>3</td>", page_of(tmp_path))


def test_the_curves_of_a_looped_baseline_are_named_by_their_loop(tmp_path):
    rows = [training_row(10, [5.0], energy_per_step=None), validation_row(20, [4.5, 4.0, 3.9])]
    run_folder(tmp_path, rows, kind="baseline")
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    settings["model"]["loops"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    loops = [f"after loop {i}" for i in (1, 2, 3)]
    names = drawn(draw_validation, tmp_path)[1]
    assert [name for name in names if name.startswith("after")] == loops
    assert "looped Transformer++" in drawn(draw_training_loss, tmp_path)[1]  # the last one alone
    page = page_of(tmp_path)
    assert "Looped Transformer++ (baseline)" in page and "after loop 3" in page


@pytest.mark.parametrize("key", ["persistence_loss", "copy_last_loss"])
def test_video_runs_are_held_against_persistence(tmp_path, without_plots, key):
    """Under today's name of the key, and under the one of before."""
    for loss, answer in ((0.2, "Yes"), (0.4, "No")):
        row = validation_row(20, [0.5, loss], unigram_entropy=None, perplexity=None, **{key: 0.3})
        run_folder(tmp_path, [training_row(10, [0.5, 0.4]), row])
        settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump({**settings, "state": {"kind": "embedding"}})
        )
        page = page_of(tmp_path)
        assert answer_of(page) == answer and "nats" not in page and "copying the last frame" in page


def test_training_without_validation_is_unknown_not_a_guess(tmp_path, without_plots):
    page = page_of(run_folder(tmp_path, [training_row(10, [7.0, 6.8])]))
    assert answer_of(page) == "Cannot say yet" and "No validation row" in page
    assert check(page, "uses the context")[0] == check(page, "Thinking longer")[0] == "unknown"


def test_torn_last_line_is_left_out(tmp_path, without_plots):
    page = page_of(run_folder(tmp_path, tail='{"step": 30, "loss": 1.0, "loss_per'))
    assert (
        answer_of(page) == "Yes"
        and "1 unreadable line left out" in page
        and "step 20 of 20" in page
    )


def test_steps_logged_again_after_a_resume_count_once_and_the_last_wins(tmp_path, without_plots):
    rows = [training_row(s, [7.0, 6.0]) for s in (10, 20, 30)] + [validation_row(30, [9.0, 9.0])]
    rows += [training_row(s, [5.0, 4.0]) for s in (20, 30)] + [validation_row(30, [5.0, 4.5])]
    run = read_run(run_folder(tmp_path, rows, max_steps=30))
    curve = run.training.of_list("loss_per_step")[1]
    assert list(zip(curve.x, curve.mean)) == [(10, 6.0), (20, 4.0), (30, 4.0)]
    assert "3 logged steps" in drawn(draw_training_loss, tmp_path)[0]
    page = page_of(tmp_path)
    assert check(page, "uses the context")[1] == "−2.000 nats"


def test_non_finite_values_and_varying_numbers_of_steps_draw(tmp_path):
    bad = [math.nan, math.inf, -math.inf, None, 1e308, "NaN", 0.0, -1.0, 2.0, 3.0]
    keys = ("loss", "grad_norm", "step_size", "learning_rate", "tokens_per_s", "step_time_s")
    rows = []
    for s in range(1, 900):
        value, per_step = bad[s % 10], [6.0, bad[s % 10], 5.0][: 1 + s % 3]
        rows.append(
            training_row(
                s,
                [1.0],
                loss_per_step=per_step,
                energy_per_step=[value] * (s % 3),
                **dict.fromkeys(keys, value),
            )
        )
        rows += (
            [
                validation_row(
                    s, [1.0], loss_per_step=per_step, loss=per_step[-1], initial_loss=value
                )
            ]
            if s < 40
            else []
        )
    page = page_of(run_folder(tmp_path, rows))
    assert len(re.findall("<svg", page)) == 9
    assert not re.search(r'\bd="[^"]*(nan|inf)', page)
    assert ">after step 3</text>" in page


def test_run_without_any_finite_value_has_a_page(tmp_path):
    rows = [
        training_row(1, [math.nan], grad_norm=None, energy_per_step=[math.nan]),
        validation_row(1, [math.nan], initial_loss=math.nan),
    ]
    assert answer_of(page_of(run_folder(tmp_path, rows))) == "No"


def test_huge_first_losses_do_not_flatten_the_curves(tmp_path):
    rows = [training_row(s, [12_000.0 if s < 4 else 5.0, 4.6]) for s in range(1, 200)]
    rows += [validation_row(200, [5.0, 4.5], initial_loss=12_000.0)]
    run_folder(tmp_path, rows)
    assert "Values up to 12,000 are cut off" in drawn(draw_training_loss, tmp_path)[0]
    for draw in (draw_validation, draw_profile):
        assert "off the scale, at 12,000" in drawn(draw, tmp_path)[0]


def test_a_run_without_training_rows_has_a_page(tmp_path):
    """Fewer steps than logging.every_steps: the last evaluation is the only row."""
    page = page_of(run_folder(tmp_path, [validation_row(5, [6.8, 6.6])], max_steps=5))
    Reader(page)
    assert "shorter than logging.every_steps" in page and "After 5 training steps" in page
    assert check(page, "planned end")[:2] == ("yes", "100%")
    assert (tmp_path / "report_plot.png").read_bytes().startswith(b"\x89PNG")


def test_skipped_steps_are_counted(tmp_path, without_plots):
    folder = run_folder(tmp_path)
    events = [{"event": "start"}, *[{"event": "skipped", "step": step} for step in (3, 4)]]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert "2 skipped steps in the events" in check(page_of(folder), "stayed finite")[2]


def test_thinning_bounds_the_points_and_keeps_the_extremes(tmp_path):
    values = np.ones(10_000)
    values[5_000], values[9_000], values[100:200] = 50.0, -3.0, np.nan
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": value}) for step, value in enumerate(values)]
    path.write_text("\n".join(lines) + "\n")
    curve = read_metrics(Rows(path))[0].of_list("loss_per_step")[0]
    assert len(curve.x) == len(curve.mean) == POINTS == 300
    assert np.nanmax(curve.high) == 50.0 and np.nanmin(curve.low) == -3.0
    assert 0 < np.isnan(curve.mean).sum() <= 4, (
        "a stretch without finite values is a gap, and only that"
    )
    assert np.all(np.diff(curve.x) > 0) and curve.num_finite == 9_900
    path.write_text("\n".join(lines[98:102]) + "\n")
    few = read_metrics(Rows(path))[0].of_list("loss_per_step")[0]
    assert few.x.tolist() == [98, 99, 100, 101], "few points are drawn as they are"
    assert few.mean[:2].tolist() == [1.0, 1.0] and np.isnan(few.mean[2:]).all()


def test_page_stays_small_with_many_rows(tmp_path):
    rows = [validation_row(s, [6.0, 5.0, 4.0 + math.sin(s)]) for s in range(50, 100_001, 50)]
    noise = [training_row(s, [6.0 + math.sin(s), 5.0 + math.cos(s)]) for s in range(1, 1000)]
    noise = [json.dumps(row).split(",", 1)[1] for row in noise]
    tail = "".join(f'{{"step": {s},{noise[s % 999]}\n' for s in range(1, 100_001))
    samples = {"step": 1, "continuations": [continuation(continuation="word " * 5000)] * 200}
    run_folder(tmp_path, rows, samples=samples, tail=tail)
    (tmp_path / "events.jsonl").write_text(
        '{"time": "2026-01-01", "event": "save", "step": 1}\n' * 20_000
    )
    page = page_of(tmp_path)
    assert len(page.encode()) < 1_500_000
    assert "100,000 logged steps" in page and "20,000 save" in page


def norms_at(step: int, num_layers: int = 3) -> dict:
    """Smaller from layer to layer, and from step to step."""
    layers = {f"layer_{n}": 2.0 / (n + 1) / step for n in range(num_layers)}
    parts = {**layers, "attention": 0.5, "embeddings": 0.25}
    return {
        part: {"gradient": norm, "weight": 10 * norm, "update": norm / 100}
        for part, norm in parts.items()
    }


def test_norms_are_drawn_by_layer_where_they_were_measured(tmp_path):
    """Of the rows that have them, with what is in no layer in the sentence below."""
    rows = [training_row(step, [5.0, 4.5]) for step in range(1, 9)]
    for row in rows[1::2]:
        row["norms"] = norms_at(row["step"])
    rows.append(validation_row(8, [5.0, 4.5]))
    page = page_of(run_folder(tmp_path, rows, max_steps=8))
    Reader(page)
    for title in ("Gradient norms by layer", "Weight norms by layer", "Update norms by layer"):
        assert title in page
    run = read_run(tmp_path)
    curve = run.training.norms["layer_1", "gradient"]
    assert curve.x.tolist() == [2, 4, 6, 8]
    assert curve.mean == pytest.approx([1 / 2, 1 / 4, 1 / 6, 1 / 8])
    caption, names = drawn(functools.partial(draw_norms, kind="gradient"), tmp_path)
    assert names == ["layer 0", "layer 1", "layer 2"]
    assert "0.08333 in layer 2, which is the smallest of 3, and 0.25 in layer 0" in caption
    assert "attention 0.5, embeddings 0.25" in caption
    assert "Before the step" in drawn(functools.partial(draw_norms, kind="weight"), tmp_path)[0]


def test_a_page_without_norms_has_no_plots_of_them_and_junk_in_their_place_draws(tmp_path):
    assert "norms by layer" not in page_of(run_folder(tmp_path / "without"))
    many = {f"layer_{n}": {"gradient": 1.0} for n in range(5000)}
    junk = [7, [], {"layer_0": 3}, {"layer_x": {"gradient": 1}, "<b>": {"gradient": 1}}, many]
    junk.append({"layer_0": {"gradient": math.nan, "weight": 0.0, "update": "1e999"}})
    rows = [training_row(n + 1, [5.0, 4.5], norms=norms) for n, norms in enumerate(junk)]
    page = page_of(run_folder(tmp_path / "junk", rows))
    assert "Gradient norms by layer" in page and "layer_x" not in page
    assert "Weight norms by layer" not in page
    assert not re.search(r'\bd="[^"]*(nan|inf)', page)
    assert len(read_run(tmp_path / "junk").training.norms) <= MAX_PARTS * 3
