"""Scaling studies: known laws are found again, intervals say what they know, and runs become a
page.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from training_runs import TINY, dataset  # noqa: F401

from ebwm_scale.core.errors import UserError
from ebwm_scale.evaluation.scaling_laws import collect, compare, iso_flop
from ebwm_scale.evaluation.scaling_tables import difference_table, rate_table
from ebwm_scale.reporting.scaling_page import analyse, render, sentences

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "scaling_study.py"
SIZES = (1e3, 4e3, 16e3, 64e3)


def rows(laws, noise=0.0, seeds=(1, 2, 3), paired=0.0):
    """Runs of forms whose loss is a x^-b; noise: per run; paired: a deviation that all forms of a
    seed share.
    """
    generator = np.random.Generator(np.random.Philox(0))
    shared = {(x, seed): generator.normal() * paired for x in SIZES for seed in seeds}
    found = []
    for form, (a, b) in laws.items():
        for x in SIZES:
            for seed in seeds:
                loss = a * x**-b * np.exp(shared[x, seed] + noise * generator.normal())
                found.append(
                    {
                        "form": form,
                        "point": f"{x:g}",
                        "seed": str(seed),
                        "parameters": x,
                        "flops": 6 * x * 1e3,
                        "flops_per_step": 6 * x,
                        "loss": loss,
                        "loss_per_step": [loss],
                        "curve": [[10, 2 * loss], [1000, loss]],
                    }
                )
    return found


def test_a_known_power_law_is_found_again():
    fit = compare(rows({"transformer++": (9.0, 0.10), "energy": (12.0, 0.13)}), "parameters")
    assert fit["forms"]["energy"]["exponent"]["mean"] == pytest.approx(0.13) and fit["forms"][
        "transformer++"
    ]["factor"] == pytest.approx(9.0)
    against = fit["against_reference"]["energy"]
    assert against["exponent_difference"]["mean"] == pytest.approx(0.03) and against[
        "relative_rate"
    ]["mean"] == pytest.approx(0.3)
    # 12 x^-.13 = 9 x^-.1 at x = (12 / 9)^(1 / .03)
    assert compare(rows({"transformer++": (9.0, 0.10), "energy": (20.0, 0.13)}), "parameters")[
        "against_reference"
    ]["energy"]["crossover"]["median"] == pytest.approx((20 / 9) ** (1 / 0.03), rel=1e-6)


def test_a_difference_in_the_noise_is_said_to_be_none():
    fit = compare(
        rows({"transformer++": (9.0, 0.10), "energy": (10.0, 0.101)}, noise=0.03), "parameters"
    )
    difference = fit["against_reference"]["energy"]["exponent_difference"]
    assert difference["low"] < 0 < difference["high"]
    text = " ".join(sentences(fit, "nats"))
    assert "no differently, as far as these runs show" in text and (
        "No crossover is established" in text or "do not cross" in text
    )


def test_what_all_forms_of_a_seed_share_does_not_blur_their_difference():
    laws = {"transformer++": (9.0, 0.10), "energy": (10.0, 0.11)}
    width = lambda **how: (lambda i: i["high"] - i["low"])(
        compare(rows(laws, **how), "parameters")["against_reference"]["energy"][
            "exponent_difference"
        ]
    )
    assert width(paired=0.05) < 1e-9 < 0.001 < width(noise=0.05)


def test_lines_that_do_not_meet_have_no_crossover():
    against = compare(rows({"transformer++": (9.0, 0.10), "energy": (10.0, 0.08)}), "parameters")[
        "against_reference"
    ]["energy"]
    assert against["crossover"] is None and against["loss_difference_at_largest"]["low"] > 0


def test_equal_flops_compare_the_best_that_was_reached_within_a_budget():
    runs = rows({"transformer++": (9.0, 0.10), "energy": (12.0, 0.10)})
    result = iso_flop(runs)
    assert result["budgets"][0] >= 6e3 * 10 / 1e3 and all(
        d > 0 for d in result["forms"]["energy"]["difference"]["mean"]
    )
    largest = result["budgets"][-1]
    expected = min(
        loss
        for run in runs
        if run["form"] == "energy" and run["seed"] == "1"
        for step, loss in run["curve"]
        if step * run["flops_per_step"] <= largest * 1.0001
    )
    assert result["forms"]["energy"]["mean"][-1] == pytest.approx(expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: [row for row in r if row["form"] != "transformer++"], "no form transformer"),
        (lambda r: [row for row in r if row["parameters"] < 1e4], "needs 3 or more"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        compare(change(rows({"transformer++": (9.0, 0.1), "energy": (9.0, 0.1)})), "parameters")


def test_the_page_shows_fits_tables_and_what_is_missing():
    study = {
        "title": "A <study>",
        "unit": "nats",
        "axis": "size",
        "command": "python",
        "missing": ["seed=9"],
        "runs": rows({"transformer++": (9.0, 0.10), "energy": (12.0, 0.13)}),
    }
    page = render([study | analyse(study)])
    for words in (
        "A &lt;study&gt;",
        "Not finished, and left out",
        "seed=9",
        "scales faster than",
        "FLOPs of the whole training",
        "Lowest loss within a budget",
    ):
        assert words in page, words
    assert "<script" not in page


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\x00\ud800"


def test_the_page_runs_nothing_that_a_result_holds():
    runs = [
        run | {"form": run["form"].replace("energy", HOSTILE), "point": HOSTILE + str(run["point"])}
        for run in rows({"transformer++": (9.0, 0.10), "energy": (12.0, 0.13)})
    ]
    study = {
        "title": HOSTILE,
        "unit": HOSTILE,
        "axis": "size",
        "command": HOSTILE,
        "missing": [HOSTILE],
        "runs": runs,
    }
    page = render([study | analyse(study)])
    assert "<script" not in page and "<img" not in page and "&lt;script" in page


def tool(*arguments, expect=0):
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == expect, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (ROOT / "configs" / "studies").glob("scaling_*.yaml"))
)
def test_every_study_of_the_repository_resolves(name):
    sys.path.insert(0, str(TOOL.parent))
    from scaling_study import read_study

    from ebwm_scale.config.load import load_config

    study = read_study(ROOT / "configs" / "studies" / name)
    for names in study["sweep"].values():
        for overrides in names.values():
            load_config(ROOT / study["config"], [*study["set"], *overrides])


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "no mapping"),
        ("title: a", "config is None"),
        (None, "cannot be read"),
        (
            "{title: a, unit: b, config: c, set: [], axis: colour, sweep: {form: {}}}",
            "axis is 'colour'",
        ),
    ],
)
def test_a_study_that_means_nothing_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "s.yaml").write_text(content)
    assert message in tool("start", tmp_path / "s.yaml", "--run-dir", tmp_path / "r", expect=2)


@pytest.mark.soak
def test_results_are_rebuilt_into_a_page_from_data_alone(tmp_path):
    content = {
        "title": "t",
        "unit": "nats",
        "axis": "size",
        "command": "c",
        "missing": [],
        "runs": rows({"transformer++": (9.0, 0.10), "energy": (12.0, 0.13)}),
    }
    (tmp_path / "r.json").write_text(json.dumps(content))
    tool("page", tmp_path / "r.json", "--output", tmp_path / "page.html")
    assert "Scaling studies" in (tmp_path / "page.html").read_text()
    for bad in ("{}", "[]", json.dumps(content | {"runs": [1]}), "[" * 10**5):
        (tmp_path / "bad.json").write_text(bad)
        said = tool("page", tmp_path / "bad.json", "--output", tmp_path / "page.html", expect=2)
        assert "not a result of" in said and len(said) < 400


def test_the_committed_studies_say_what_the_documentation_says(tmp_path):
    """The page is rebuilt from the repository's data within a minute, and docs/scaling.md quotes
    its losses and exponents.
    """
    results = sorted((ROOT / "results" / "scaling").glob("*.json"))
    start = time.perf_counter()
    tool("page", *results, "--output", tmp_path / "page.html")
    assert time.perf_counter() - start < 60
    document = (ROOT / "docs" / "scaling.md").read_text()
    for path in results:
        study = json.loads(path.read_text())
        forms, points, seeds = (
            {run[key] for run in study["runs"]} for key in ("form", "point", "seed")
        )
        assert (
            not study["missing"]
            and len(study["runs"]) == len(forms) * len(points) * len(seeds)
            and len(points) >= 4
            and len(seeds) >= 3
        )
        losses = defaultdict(list)
        for run in study["runs"]:
            losses[run["form"], run["point"]].append(run["loss"])
        assert losses.keys() == set(itertools.product(forms, points))
        for cell, values in losses.items():
            assert f"{np.mean(values):.3f}" in document, (path.name, *cell)
        for fit in analyse(study)["fits"]:
            for form in fit["forms"].keys() - {"released"}:  # whose slope means nothing in text
                exponent = fit["forms"][form]["exponent"]
                assert (
                    f"{exponent['mean']:.4g} [{exponent['low']:.4g}, {exponent['high']:.4g}]"
                    in document
                ), (path.name, fit["what"], form)


@pytest.mark.parametrize("name", ["text", "text_adamw"])
def test_the_documentation_has_the_tables_of_the_studies_of_text(name):
    """As `scaling_study.py tables` prints them; and every run had the best rate that was found."""
    document = (ROOT / "docs" / "scaling.md").read_text()
    result = ROOT / "results" / "scaling" / f"{name}.json"
    study = json.loads(result.read_text())
    printed = tool("tables", result)
    for line in printed.splitlines():
        assert line in document, line
    files = sorted((ROOT / "results").glob(f"scaling_{name}_rates*.json"))
    rates = [json.loads(file.read_text()) for file in files]
    for line in rate_table(rates):
        assert line in document, line
    tried = [run for rate in rates for run in rate["runs"]]
    for run in study["runs"]:
        of_cell = [t for t in tried if (t["form"], t["point"]) == (run["form"], run["point"])]
        best = min(of_cell, key=lambda tried: tried["loss"])
        assert run["learning_rate"] == best["learning_rate"]
        others = [other["learning_rate"] for other in of_cell]
        assert min(others) < best["learning_rate"] < max(others)


def test_tables_of_what_is_no_study_are_one_line(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    said = tool("tables", tmp_path / "r.json", expect=2)
    assert "not a result of" in said and said.count("\n") == 1


def test_a_table_of_differences_is_paired_by_seed():
    """Seeds that share what they deviate by have no interval to speak of."""
    laws = {"transformer++": (9.0, 0.10), "energy": (9.9, 0.10)}
    study = {"runs": rows(laws, paired=0.2)}
    for run in study["runs"]:
        if run["form"] == "energy":
            run["loss"] += 0.5 - run["loss"] + reference_of(study, run)
    lines = difference_table(study)
    assert lines[0] == "|  | energy |" and len(lines) == 2 + len(SIZES)
    assert all("+0.500 [+0.500, +0.500]" in line for line in lines[2:])


def reference_of(study, run):
    (loss,) = [
        other["loss"]
        for other in study["runs"]
        if other["form"] == "transformer++"
        and (other["point"], other["seed"]) == (run["point"], run["seed"])
    ]
    return loss


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="no sweep"):
        collect(tmp_path, "size")


@pytest.mark.soak
def test_a_study_runs_is_killed_goes_on_and_becomes_a_page(tmp_path, dataset):
    """Twelve real runs through the launcher; stopped in the middle, started again, none is trained
    twice.
    """
    pytest.importorskip("submitit", reason="the extra `cluster` is not installed")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"data": {"manifest": str(dataset)}}))
    study = {
        "title": "Tiny",
        "unit": "nats per token",
        "config": str(tmp_path / "tiny.yaml"),
        "axis": "size",
        "set": ["model.num_heads=1"],
        "sweep": {
            "seed": {"1": ["train.seed=1"], "2": ["train.seed=2"]},
            "size": {f"w{w}": [f"model.width={w}"] for w in (8, 16, 32)},
            "form": {"transformer++": ["model.kind=baseline"], "anchored": []},
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    folder, deadline = tmp_path / "runs", time.monotonic() + 500
    finished = lambda: list(folder.rglob("summary.json"))
    pattern = f"submitit.core._submit {folder}"
    try:
        tool("start", tmp_path / "study.yaml", "--run-dir", folder)
        while len(finished()) < 3 and time.monotonic() < deadline:
            time.sleep(0.5)
        subprocess.run(["pkill", "-TERM", "-f", pattern], check=True)
        while (
            subprocess.run(["pgrep", "-f", pattern], stdout=subprocess.DEVNULL).returncode == 0
            and time.monotonic() < deadline
        ):
            time.sleep(0.5)
        before = {
            path.with_name("metrics.jsonl"): path.with_name("metrics.jsonl").read_bytes()
            for path in finished()
        }
        assert 3 <= len(before) < 12
        tool("collect", tmp_path / "study.yaml", folder, "--output", tmp_path / "part.json")
        assert json.loads((tmp_path / "part.json").read_text())["missing"]
        tool("start", tmp_path / "study.yaml", "--run-dir", folder)
        while (
            subprocess.run(
                [sys.executable, str(TOOL), "status", str(folder)], stdout=subprocess.DEVNULL
            ).returncode
            and time.monotonic() < deadline
        ):
            time.sleep(2)
    finally:
        subprocess.run(["pkill", "-KILL", "-f", pattern])
    assert all(path.read_bytes() == content for path, content in before.items())
    tool("collect", tmp_path / "study.yaml", folder, "--output", tmp_path / "whole.json")
    result = json.loads((tmp_path / "whole.json").read_text())
    assert len(result["runs"]) == 12 and not result["missing"]
    tool("page", tmp_path / "whole.json", "--output", tmp_path / "page.html")
    assert "Tiny" in (tmp_path / "page.html").read_text()
