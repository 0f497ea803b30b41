"""The run report: it judges from the numbers, survives damaged and partial run folders, and depends
on nothing outside itself.
"""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from ebwm_scale import report
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.rows import MAX_LINE, Rows
from ebwm_scale.report import main, write_report
from ebwm_scale.reporting import report_page
from ebwm_scale.reporting.curves import POINTS, read_metrics
from ebwm_scale.reporting.plots import (
    Plot,
    draw_profile,
    draw_training_loss,
    draw_validation,
)
from ebwm_scale.reporting.read_run import read_run
from ebwm_scale.reporting.style import PALETTE
from ebwm_scale.train import report_in_words

UNIGRAM = 6.5


def training_row(step, losses, **more):
    return {
        "step": step,
        "tokens_seen": step * 2048,
        "loss": sum(losses) / len(losses),
        "loss_per_step": losses,
        "energy_per_step": [-0.1 * i for i in range(len(losses))],
        "grad_norm": 0.5 + 1 / step,
        "learning_rate": 0.004,
        "step_size": 30.0,
        "step_time_s": 0.4,
        "tokens_per_s": 5000.0,
        "model_tflops": 0.1,
        "mfu": None,
        "peak_memory_gib": 1.5,
        "eta_s": 1.0,
        **more,
    }


def validation_row(step, losses, **more):
    return {
        "split": "validation",
        "step": step,
        "loss": losses[-1],
        "loss_per_step": losses,
        "initial_loss": 8.9,
        "perplexity": math.exp(min(losses[-1], 50)),
        "unigram_entropy": UNIGRAM,
        "num_tokens": 4096,
        **more,
    }


def baseline_rows(losses):
    return [
        row
        for step, loss in losses.items()
        for row in (
            training_row(step, [loss], energy_per_step=None, step_size=None, step_time_s=0.1),
            validation_row(step, [loss], initial_loss=None),
        )
    ]


LEARNED = [
    training_row(10, [7.0, 6.8]),
    training_row(20, [5.0, 4.6]),
    validation_row(10, [6.8, 6.6]),
    validation_row(20, [5.0, 4.5]),
]


def run_folder(
    folder, rows=LEARNED, *, kind="energy", max_steps=20, complete=True, samples=None, tail=""
):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if complete:
        (folder / "config.yaml").write_text(
            yaml.safe_dump(
                {
                    "model": {
                        "kind": kind,
                        "size": "4xs",
                        "num_layers": 2,
                        "width": 128,
                        "conditioning": "default",
                    },
                    "state": {"kind": "vocabulary"},
                    "refinement": {"num_steps": 2, "learnable": True, "landscapes": "per_step"},
                    "optimizer": {"learning_rate": 0.004, "gradient_clipping": 1.0},
                    "train": {"max_steps": max_steps, "global_batch_size": 16},
                    "data": {"context_length": 128},
                }
            )
        )
        (folder / "events.jsonl").write_text(
            '{"time": "2026-01-01T00:00:00Z", "event": "start", "step": 0, "world_size": 1}\n'
        )
        (folder / "summary.json").write_text(
            '{"parameters": {"blocks": 230912, "energy_head": 128}, "data": {"documents": 812}}'
        )
        (folder / "samples.json").write_text(
            json.dumps(samples or {"step": 20, "continuations": [continuation()]})
        )
    return folder


def continuation(**more):
    return {
        "prompt": "Once upon",
        "continuation": " a midnight",
        "reference": " a time",
        "positions": [
            {
                "context": "Once upon",
                "truth": " a",
                "truth_energy": -2.25,
                "candidates": [
                    {"token": " the", "probability": 0.4, "energy": -3.5},
                    {"token": " a", "probability": 0.3, "energy": -2.25},
                ],
            }
        ],
        **more,
    }


@pytest.fixture
def without_plots(monkeypatch):
    """Drawing takes seconds; promises about the words on the page do not need it."""
    empty = Plot("plot", "caption", None)
    monkeypatch.setattr(report_page, "report_plots", lambda run, baseline: (empty, [empty]))
    monkeypatch.setattr(report, "headline_png", lambda run, baseline: b"")


def page_of(folder, baseline=None):
    path = write_report(folder, baseline_dir=baseline)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def answer_of(page):
    return re.search(r"Did it learn\?</span><strong>(.*?)</strong>", page).group(1)


def checks_of(page):
    """{first words of the claim: (mark, figure, detail)} as a reader sees them."""
    line = (
        r'<li class="(\w+)">.*?class="claim">(.*?)</span>'
        r'<span class="figure">(.*?)</span><span class="detail">(.*?)</span>'
    )
    return {claim: (mark, figure, detail) for mark, claim, figure, detail in re.findall(line, page)}


def check(page, words):
    return next(value for claim, value in checks_of(page).items() if words in claim)


class Reader(HTMLParser):
    """Collects tags, ids and references; fails on tags that do not nest."""

    VOID = {"meta", "path", "use", "rect", "br", "img", "line", "circle"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.references, self.open = [], [], [], []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += re.findall(
            r"url\(#([^)]+)\)", " ".join(str(v) for v in attributes.values())
        )
        self.references += (
            [attributes["href"][1:]] if attributes.get("href", "").startswith("#") else []
        )
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_page_is_self_contained_and_well_formed(tmp_path):
    page = page_of(
        run_folder(tmp_path / "run"),
        run_folder(tmp_path / "base", baseline_rows({20: 4.2}), kind="baseline"),
    )
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags}.isdisjoint(
        {"script", "link", "iframe", "img", "object", "image"}
    )
    assert not any(
        key in ("src", "srcset") or key.startswith("on")
        for _, attributes in reader.tags
        for key in attributes
    )
    assert all(
        attributes[key].startswith("#")
        for _, attributes in reader.tags
        for key in ("href", "xlink:href")
        if key in attributes
    )
    assert "http" not in page and "@import" not in page
    assert len(reader.ids) == len(set(reader.ids)) > 0, "ids of different plots clash"
    assert set(reader.references) <= set(reader.ids) and reader.references, (
        "a plot refers to an id that is not there"
    )
    drawings = [attributes for tag, attributes in reader.tags if tag == "svg"]
    assert len(drawings) == 9 and all(d["role"] == "img" and d["aria-label"] for d in drawings)
    assert page.count(">Transformer++</text>") == 2, "the headline, in its two shapes"
    assert "<text" in page and "var(--curve5)" in page and "prefers-color-scheme:dark" in page
    assert not [role for role, colours in PALETTE.items() if f"stroke: {colours[0]}" in page], (
        "a colour that cannot follow the page"
    )
    assert (tmp_path / "run" / "report_plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob(".report*")), "temporary files stay behind"


def test_page_shows_what_the_run_folder_holds(tmp_path, without_plots):
    page = page_of(run_folder(tmp_path / "run"))
    for text in (
        "231,040",
        "Data, documents",
        "812",
        "world_size: 1",
        "num_layers: 2",
        "a midnight",
        "40.0%",
        "−3.500",
        "After 20 training steps",
    ):
        assert text in page, text
    assert 'class="prompt">Once upon</span><span class="continuation"> a midnight<' in page
    assert "␣a ✓ true" in page
    assert "Not in this report" not in page


@pytest.mark.parametrize(
    "losses, answer, mark, figure",
    [
        ([5.0, 4.5], "Yes", "yes", "−2.000 nats"),
        ([5.7, 5.5], "Yes", "yes", "−1.000 nats"),
        ([6.0, 5.8], "Not enough yet", "no", "−0.7 nats"),
        ([7.0, 6.75], "No", "no", "+0.25 nats"),
        ([5.0, math.nan], "No", "no", "not finite"),
    ],
)
def test_verdict_follows_the_unigram_entropy(tmp_path, losses, answer, mark, figure, without_plots):
    page = page_of(run_folder(tmp_path, [training_row(10, [7.0, 6.8]), validation_row(20, losses)]))
    assert answer_of(page) == answer
    assert check(page, "uses the context")[:2] == (mark, figure)


@pytest.mark.parametrize(
    "row, words, mark, figure",
    [
        (validation_row(20, [5.0, 4.5]), "turns noise", "yes", "−4.400 nats"),
        (validation_row(20, [9.2, 9.1]), "turns noise", "no", "+0.2 nats"),
        (validation_row(20, [5.0, 4.5], initial_loss=None), "turns noise", "unknown", "–"),
        (validation_row(20, [5.0, 4.5]), "Thinking longer", "unknown", "−0.5 nats"),
        (validation_row(20, [4.5, 4.51]), "Thinking longer", "unknown", "+0.01 nats"),
        (validation_row(20, [4.5]), "Thinking longer", "unknown", "–"),
        (validation_row(20, [5.0, 4.5]), "planned end", "yes", "100%"),
        (validation_row(15, [5.0, 4.5]), "planned end", "no", "75%"),
        (validation_row(20, [math.inf, 4.5]), "stayed finite", "no", "1 not finite"),
        (validation_row(20, [None, 4.5]), "stayed finite", "no", "1 not finite"),
    ],
)
def test_each_line_of_the_verdict_is_computed(tmp_path, row, words, mark, figure, without_plots):
    page = page_of(run_folder(tmp_path, [training_row(10, [7.0, 6.8]), row]))
    assert check(page, words)[0] == mark
    assert float_text(check(page, words)[1]) == float_text(figure)


def float_text(figure):
    """A figure without the rounding noise of a binary difference."""
    text = re.match(r"[+−]?[\d.]+", figure)
    return (
        figure
        if not text
        else (round(float(text.group().replace("−", "-")), 6), figure[text.end() :])
    )


@pytest.mark.parametrize(
    "baseline, mark, figure, step",
    [
        ({10: 5.0, 20: 4.0}, "no", "+12.5%", 20),
        ({10: 5.0, 20: 5.0}, "yes", "−10.0%", 20),
        ({20: 4.0, 30: 3.0}, "no", "+12.5%", 20),
        ({10: 6.0}, "no", "+10.0%", 10),
        ({20: math.nan, 10: 6.0}, "no", "+10.0%", 10),
        ({30: 3.0}, "unknown", "–", None),
    ],
)
def test_comparison_is_made_at_the_same_step(tmp_path, baseline, mark, figure, step, without_plots):
    page = page_of(
        run_folder(tmp_path / "run"),
        run_folder(tmp_path / "base", baseline_rows(baseline), kind="baseline"),
    )
    found = check(page, "Transformer++")
    assert found[:2] == (mark, figure)
    assert mark == "unknown" or (f"at step {step}:" in found[2] and "4 × as long" in found[2])


def test_comparison_is_refused_on_other_validation_data_and_names_other_settings(
    tmp_path, without_plots
):
    other = [validation_row(20, [4.0], initial_loss=None, unigram_entropy=7.1)]
    page = page_of(
        run_folder(tmp_path / "run"), run_folder(tmp_path / "base", other, kind="baseline")
    )
    assert check(page, "Transformer++")[0] == "unknown" and "different validation data" in page
    same = run_folder(tmp_path / "same", baseline_rows({20: 4.0}), kind="baseline")
    settings = yaml.safe_load((same / "config.yaml").read_text())
    settings["optimizer"]["learning_rate"] = 0.008
    (same / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "optimizer.learning_rate 0.004 / 0.008" in page_of(run_folder(tmp_path / "run"), same)


def drawn(draw, folder, baseline=None):
    """(caption, curve names) of one plot."""
    figure = Figure()
    caption = draw(figure.add_subplot(), read_run(folder), baseline and read_run(baseline))
    return caption, [line.get_label() for line in figure.axes[0].get_lines()]


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
        "initial random state",
    ]
    caption, names = drawn(draw_validation, run, base)
    assert "Transformer++" in names and "Transformer++ goes on to step 90" in caption


def test_report_of_a_baseline_run_makes_no_claims_about_refinement(tmp_path):
    page = page_of(run_folder(tmp_path, baseline_rows({10: 5.0, 20: 4.0}), kind="baseline"))
    assert answer_of(page) == "Yes"
    assert not [claim for claim in checks_of(page) if "efine" in claim or "Thinking" in claim]
    assert "there is nothing to refine" in page


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


def test_missing_optional_files_are_named(tmp_path, without_plots):
    page = page_of(run_folder(tmp_path, complete=False))
    for name in (
        "config.yaml is missing",
        "events.jsonl is missing",
        "samples.json is missing",
        "summary.json is missing",
    ):
        assert name in page, name
    assert answer_of(page) == "Yes" and check(page, "planned end")[0] == "unknown"


def test_damaged_optional_files_are_named_and_do_no_harm(tmp_path, without_plots):
    run_folder(tmp_path)
    (tmp_path / "config.yaml").write_text("model: [unclosed")
    (tmp_path / "samples.json").write_text('{"continuations": [{"prompt": nul')
    (tmp_path / "summary.json").write_text("[1, 2]")
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "start"}\n\xff\xfe torn')
    page = page_of(tmp_path)
    for text in (
        "config.yaml cannot be read",
        "samples.json cannot be read",
        "summary.json holds a list",
        "events.jsonl: 1 unreadable line",
    ):
        assert text in page, text
    odd = [{"positions": [{"candidates": [{}]}]}, None, {"positions": {"a": 1}}]
    (tmp_path / "samples.json").write_text(json.dumps({"continuations": odd}))
    Reader(page_of(tmp_path))


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


@pytest.mark.parametrize(
    "loss, words",
    [
        ("last", "only the last step is scored, so the first is not trained to predict"),
        ("every", "each step is scored"),
    ],
)
def test_steps_of_one_model_are_no_proof_that_thinking_helps(tmp_path, loss, words, without_plots):
    folder = run_folder(tmp_path)
    set_config(folder, "refinement", loss=loss)
    mark, figure, detail = check(page_of(folder), "Thinking longer")
    assert (mark, figure) == ("unknown", "−0.5 nats") and words in detail
    assert "refinement.num_steps=1" in detail


@pytest.mark.parametrize(
    "one_step_loss, mark", [(5.0, "yes"), (4.5, "no"), (4.5001, "no"), (4.0, "no")]
)
def test_thinking_helps_where_a_run_with_one_step_is_beaten(
    tmp_path, one_step_loss, mark, without_plots
):
    other = run_folder(tmp_path / "one", [validation_row(20, [one_step_loss])])
    set_config(other, "refinement", num_steps=1)
    found = check(page_of(run_folder(tmp_path / "run"), other), "Thinking longer")
    assert found[0] == mark and "at step 20: 4.500 here" in found[2]
    strange = [validation_row(20, [5.0], unigram_entropy=7.1)]
    other = run_folder(tmp_path / "strange", strange)
    set_config(other, "refinement", num_steps=1)
    found = check(page_of(tmp_path / "run", other), "Thinking longer")
    assert found[0] == "unknown" and "different validation data" in found[2]


def test_data_that_may_differ_is_no_comparison(tmp_path, without_plots):
    """Without a reference loss nobody knows that both runs were validated on the same data."""
    row = validation_row(20, [5.0])
    del row["unigram_entropy"]
    other = run_folder(tmp_path / "one", [row])
    set_config(other, "refinement", num_steps=1)
    found = check(page_of(run_folder(tmp_path / "run"), other), "Thinking longer")
    assert found[:2] == ("unknown", "–") and "same is not known: no unigram entropy" in found[2]


def set_config(folder, section, **values):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config.setdefault(section, {}).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_blanks_are_shown_as_what_they_are_and_no_truth_as_none(tmp_path, without_plots):
    candidates = [{"token": " the", "probability": 0.4, "energy": -3.5}]
    position = {"context": "Once", "truth_energy": -2.25, "candidates": candidates}
    shown = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "&lt;U+000D&gt;", "\u00a0": "&lt;U+00A0&gt;"}
    shown |= {"\u200b": "&lt;U+200B&gt;", "  ": "␣␣", "": "(no text)"}
    for truth, words in shown.items():
        listed = [continuation(positions=[position | {"truth": truth}])]
        page = page_of(run_folder(tmp_path, samples={"continuations": listed}))
        assert f">{words} ✓ true<" in page and f"<b>{words}</b>" in page, repr(truth)
    for missing in (position, position | {"truth": None}):
        listed = [continuation(positions=[missing])]
        page = page_of(run_folder(tmp_path, samples={"continuations": listed}))
        assert "✓ true" not in page and "no true token here" in page


HOSTILE = "</span></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\ud800"


IMAGE = "data:image/png;base64,AAAA"
SAMPLES = {
    "step": 20,
    "continuations": [continuation()],
    "clips": [
        {
            "video": "a.mp4",
            "start_s": 1.0,
            "context": [IMAGE, IMAGE],
            "candidates": [{"step": 1, "loss": 0.5, "energy": -1.0, "image": IMAGE}],
            "truth": IMAGE,
            "truth_energy": -2.0,
            "persistence_loss": 0.3,
            "first": 2,
            "continuation": [IMAGE],
            "continuation_truth": [IMAGE],
            "continuation_loss": [0.1],
            "continuation_persistence_loss": [0.2],
        }
    ],
}


def each_leaf(value, instead):
    """Copies of a nested value, each with one of its leaves (or keys) replaced."""
    if isinstance(value, dict):
        for key, item in value.items():
            for copy in each_leaf(item, instead):
                yield {**value, key: copy}
            yield {instead: item} if isinstance(instead, str) else {**value, key: instead}
    elif isinstance(value, list):
        for number, item in enumerate(value):
            for copy in each_leaf(item, instead):
                yield [*value[:number], copy, *value[number + 1 :]]
        yield instead
    else:
        yield instead


def refuse_live_content(page):
    """No element that runs or fetches something: pictures only from inside the page."""
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "iframe", "object", "link"})
    for tag, attributes in reader.tags:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/"), (tag, attributes)
        assert "HOSTILE" not in str(attributes.get("style", "")), (tag, attributes)


HOSTILE_URI = 'data:image/png;base64,AA"><script>alert(1)</script>'


@pytest.mark.parametrize("instead", [HOSTILE, HOSTILE_URI], ids=["markup", "picture"])
def test_hostile_text_anywhere_is_shown_and_not_run(tmp_path, instead, without_plots):
    folder = run_folder(tmp_path / "run", samples=SAMPLES)
    page = page_of(folder)
    refuse_live_content(page)
    assert "from 1.00 s" in page and page.count('class="frame') == 6
    clean = instead.replace("\x00", "").replace("\ud800", "")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    originals = {
        "samples.json": (SAMPLES, json.dumps, instead),
        "summary.json": (json.loads((folder / "summary.json").read_text()), json.dumps, instead),
        "config.yaml": ({"logging": {"run_name": "a"}, **config}, yaml.safe_dump, clean),
        "events.jsonl": ({"time": "t", "event": "start", "more": {"a": 1}}, json.dumps, instead),
    }
    for name, (value, dump, text) in originals.items():
        before = (folder / name).read_text()
        for changed in each_leaf(value, text):
            (folder / name).write_text(dump(changed))
            refuse_live_content(page_of(folder))
        (folder / name).write_text(before)
    for row in each_leaf(validation_row(20, [5.0, 4.5]), instead):
        run_folder(tmp_path / "row", [LEARNED[0], row, LEARNED[3]], samples=SAMPLES)
        refuse_live_content(page_of(tmp_path / "row"))


def test_hostile_names_in_drawings_are_text(tmp_path):
    name = "<script>alert(1)</script>" + "x" * 5_000
    run, other = run_folder(tmp_path / "run"), run_folder(tmp_path / "other")
    for folder in (run, other):
        set_config(folder, "logging", run_name=name)
    page = page_of(run, other)
    refuse_live_content(page)
    assert len(page) < 400_000


@pytest.mark.parametrize(
    "junk",
    [
        None,
        *(pytest.param(junk, marks=pytest.mark.soak) for junk in (True, 10**40, [[]])),
        math.nan,
        {"a": {"b": [None]}},
    ],
    ids=lambda junk: repr(junk)[:9],
)
def test_junk_in_any_place_does_not_break_the_page(tmp_path, junk, without_plots):
    folder = run_folder(tmp_path / "run", samples=SAMPLES)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    for name, value, dump in (
        ("samples.json", SAMPLES, json.dumps),
        ("summary.json", summary, json.dumps),
        ("config.yaml", config, yaml.safe_dump),
    ):
        before = (folder / name).read_text()
        for changed in each_leaf(value, junk):
            (folder / name).write_text(dump(changed))
            Reader(page_of(folder))
        (folder / name).write_text(before)
    for row in each_leaf(validation_row(20, [5.0, 4.5]), junk):
        Reader(page_of(run_folder(tmp_path / "row", [LEARNED[0], row, LEARNED[3]])))


ALIAS_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
# The peak of this program alone: getrusage's also counts what its parent had when it was started.
MEASURE = """
import sys
from pathlib import Path
from ebwm_scale.report import write_report
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10
write_report(Path(sys.argv[1]))
before = peak()
print(len(write_report(Path(sys.argv[2])).read_text()), peak() - before)
"""


def measured(usual, folder):
    """(characters of the page, MiB above the report of a usual run), in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(usual), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    characters, mib = done.stdout.split()
    return int(characters), float(mib)


def test_lists_texts_and_aliases_of_any_size_fill_neither_memory_nor_page(tmp_path):
    many, text = 100_000, "word " * 200_000
    folder = run_folder(tmp_path / "run")
    samples = {
        "step": 10**30,
        "continuations": [continuation(continuation=text[:60], positions=[{}] * 50)] * 2_000,
        "clips": [{"video": text, "context": [IMAGE] * many, "candidates": [{"step": 1}] * many}],
        "nested": json.loads("[" * 400 + "]" * 400),
    }
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / "config.yaml").write_text(
        ALIAS_BOMB + "model: {kind: energy, size: *a9}\nlogging: {run_name: *a9}\nself: &s [*s]\n"
    )
    parameters = {f"part{i}": i for i in range(many)}
    (folder / "summary.json").write_text(
        json.dumps(
            {"parameters": parameters, "data": dict.fromkeys(map(str, range(many)), "x" * 9)}
        )
    )
    row = validation_row(20, [5.0] * many) | {"other": [1] * many}
    training = training_row(20, [5.0] * many)
    rows = [json.dumps(value) for value in (training, row)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n" + "[" * 10**6 + "\n")
    with (folder / "events.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"event": f"e{i}", "more": [1] * 90}) + "\n" for i in range(5_000)
        )
        file.write(json.dumps({"event": "big", "more": [["x" * 99] * 99] * 99}) + "\n")
    characters, mib = measured(run_folder(tmp_path / "usual"), folder)
    assert characters < 3_000_000 and mib < 150


@pytest.mark.parametrize(
    "num_rows, allowed_mib", [(60_000, 25), pytest.param(10**6, 150, marks=pytest.mark.soak)]
)
def test_memory_of_a_report_hardly_grows_with_the_rows(tmp_path, num_rows, allowed_mib):
    """Nine bytes a line and 300 bins a curve; kept as rows, 10^6 of them took 2.2 GiB."""
    folder = run_folder(tmp_path / "long", [])
    rest = json.dumps(training_row(1, [5.0, 4.5])).split(",", 1)[1]
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step},{rest}\n' for step in range(1, num_rows + 1))
        file.write(json.dumps(validation_row(num_rows, [5.0, 4.5])) + "\n")
    characters, mib = measured(run_folder(tmp_path / "usual"), folder)
    print(f"{num_rows:,} rows: {mib:.0f} MiB above the report of 4")
    assert characters < 1_500_000 and mib < allowed_mib


DAMAGED = {
    "not UTF-8": b"\xff\xfe\n",
    "zeros": b"\0" * 4096 + b"\n",
    "torn, and written on behind": b'{"step": 15, "los',
    "deep": b"[" * 100_000 + b"\n",
    "no object": b"[1, 2]\n3\nnull\n",
    "a long number": b'{"step": ' + b"9" * 5000 + b"}\n",
    "no step": b'{"loss": 1}\n{"step": "20"}\n',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_lines_are_left_out_of_every_reading_and_said_once(
    tmp_path, damage, capsys, without_plots, open_run_folder
):
    """The report, a resume, and whoever else reads a .jsonl file of a run go on with the other
    rows.
    """
    folder = run_folder(tmp_path)
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join([*lines[:1], DAMAGED[damage], *lines[1:]]))
    page = page_of(folder)
    assert answer_of(page) == "Yes"
    if damage != "zeros":
        assert len(re.findall(r"<li>metrics\.jsonl: \d unreadable line", page)) == 1
    written = open_run_folder(tmp_path, Config())
    assert written.truncate_metrics(20) == 20 and written.truncate_metrics(20) == 20
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (damage not in ("zeros", "no step")), said
    assert all("metrics.jsonl" in line and "unreadable" in line for line in said)
    again = (folder / "metrics.jsonl").read_bytes().splitlines()
    whole = [row for row in LEARNED if damage != "torn, and written on behind" or row != LEARNED[1]]
    assert [json.loads(line) for line in again] == whole


def test_a_line_without_an_end_takes_no_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n')
        file.seek(3 * MAX_LINE)
        file.write(b'\n{"step": 2}\n')
    rows = Rows(path)
    assert [row["step"] for row in rows] == [1, 2] and rows.unreadable == 1


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, capsys, open_run_folder):
    run = open_run_folder(run_folder(tmp_path), Config())

    def broken(folder):
        raise RuntimeError("no font\nfound")

    monkeypatch.setattr(report, "write_report", broken)
    assert report_in_words(run) == ", without a report"
    (line,) = capsys.readouterr().err.splitlines()
    assert "the report was not written: RuntimeError: no font found" in line
    assert "python -m ebwm_scale.report" in line


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


def test_command_line_exit_codes(tmp_path, capsys, without_plots):
    folder = run_folder(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    (tmp_path / "empty").mkdir()
    torn = run_folder(tmp_path / "torn", [], tail='{"step": 1')
    for arguments, words in (
        ([tmp_path / "absent"], "no such run folder"),
        ([tmp_path / "empty"], "no metrics.jsonl"),
        ([torn], "no complete row"),
        ([folder, "--baseline", tmp_path / "absent"], "no such run folder"),
    ):
        assert main([str(a) for a in arguments]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1 and "Traceback" not in message
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_failed_report_leaves_the_old_page(tmp_path, monkeypatch, without_plots):
    folder = run_folder(tmp_path)
    before = page_of(folder)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before and not list(
        folder.glob(".report*")
    )
