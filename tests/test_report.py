"""The run report: it judges from the numbers, survives damaged and partial run folders, and depends on nothing outside itself."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from ebwm_scale import report, report_page
from ebwm_scale.errors import UserError
from ebwm_scale.report import main, write_report
from ebwm_scale.report_plots import (
    MAX_POINTS,
    Plot,
    draw_profile,
    draw_training_loss,
    draw_validation,
    thin,
)
from ebwm_scale.report_run import read_run

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
    line = r'<li class="(\w+)">.*?class="claim">(.*?)</span><span class="figure">(.*?)</span><span class="detail">(.*?)</span>'
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
    assert not [
        role for role, colours in report_page.PALETTE.items() if f"stroke: {colours[0]}" in page
    ], "a colour that cannot follow the page"
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
        (validation_row(20, [5.0, 4.5]), "Thinking longer", "yes", "−0.5 nats"),
        (validation_row(20, [4.5, 4.51]), "Thinking longer", "no", "+0.01 nats"),
        (validation_row(20, [4.5, 4.499]), "Thinking longer", "no", "−0.001 nats"),
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
    assert mark == "unknown" or f"at step {step}:" in found[2] and "4 × as long" in found[2]


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


def test_video_runs_are_held_against_copying_the_last_frame(tmp_path, without_plots):
    for loss, answer in ((0.2, "Yes"), (0.4, "No")):
        row = validation_row(
            20, [0.5, loss], unigram_entropy=None, copy_last_loss=0.3, perplexity=None
        )
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
    assert [(row["step"], row["loss_per_step"][1]) for row in run.training] == [
        (10, 6.0),
        (20, 4.0),
        (30, 4.0),
    ]
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


HOSTILE = "</span></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\ud800"


def test_hostile_text_is_shown_and_not_run(tmp_path, without_plots):
    position = {
        "context": HOSTILE,
        "truth": HOSTILE,
        "truth_energy": HOSTILE,
        "candidates": [{"token": HOSTILE, "probability": HOSTILE, "energy": 1}],
    }
    folder = run_folder(
        tmp_path / "run",
        [{**row, "num_tokens": HOSTILE} for row in LEARNED],
        samples={
            "step": HOSTILE,
            "continuations": [
                continuation(
                    prompt=HOSTILE, continuation=HOSTILE, reference=HOSTILE, positions=[position]
                )
            ],
        },
    )
    (folder / "events.jsonl").write_text(
        json.dumps({"time": HOSTILE, "event": HOSTILE, "step": HOSTILE, HOSTILE: HOSTILE})
    )
    (folder / "summary.json").write_text(
        json.dumps({"parameters": {HOSTILE: 3}, "data": {HOSTILE: HOSTILE}})
    )
    text = HOSTILE.replace("\x00", "").replace("\ud800", "")
    settings = {
        "model": {"kind": "energy", "size": text},
        "logging": {"run_name": text},
        text: text,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    reader = Reader(page_of(folder))
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "img"})
    assert not any(key.startswith("on") for _, attributes in reader.tags for key in attributes)


def test_thinning_bounds_the_points_and_keeps_the_extremes():
    y = np.ones(10_000)
    y[5_000], y[9_000], y[100:200] = 50.0, -3.0, np.nan
    x, mean, low, high = thin(np.arange(10_000.0), y)
    assert (
        len(x) == len(mean) == MAX_POINTS == 300
        and np.nanmax(high) == 50.0
        and np.nanmin(low) == -3.0
    )
    assert 0 < np.isnan(mean).sum() <= 4, "a stretch without finite values is a gap, and only that"
    few = np.array([1.0, np.nan, 2.0])
    assert thin(few, few)[1] is few, "few points are drawn as they are"


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

    monkeypatch.setattr(report.os, "replace", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before and not list(
        folder.glob(".report*")
    )
