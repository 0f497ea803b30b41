"""The run report: it judges from the numbers, and depends on nothing outside itself."""

import math
import re

import pytest
import yaml
from run_folders import (
    Reader,
    answer_of,
    baseline_rows,
    check,
    continuation,
    page_of,
    run_folder,
    set_config,
    training_row,
    validation_row,
)

from ebwm_scale import report
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import UserError
from ebwm_scale.report import main, write_report
from ebwm_scale.reporting.style import PALETTE
from ebwm_scale.train import report_in_words


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


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, capsys, open_run_folder):
    run = open_run_folder(run_folder(tmp_path), Config())

    def broken(folder):
        raise RuntimeError("no font\nfound")

    monkeypatch.setattr(report, "write_report", broken)
    assert report_in_words(run) == ", without a report"
    (line,) = capsys.readouterr().err.splitlines()
    assert "the report was not written: RuntimeError: no font found" in line
    assert "python -m ebwm_scale.report" in line


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
