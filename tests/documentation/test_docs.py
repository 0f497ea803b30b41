"""The documentation says what is there: links lead somewhere, commands and their options exist,
figures are those of the result files, and the pages build.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "kernels" / "README.md"])


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in set(
        re.findall(
            r"`((?:ebwm_scale|kernels|configs|slurm|tools|tests|docs|results)/[\w./-]*\w\.\w+)`",
            text,
        )
    ):
        assert (ROOT / name).exists(), name


PACKAGES = sorted(path.parent.name for path in ROOT.glob("ebwm_scale/*/__init__.py"))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_modules_that_are_named_by_their_package_exist(page):
    text = page.read_text(encoding="utf-8")
    names = re.findall(rf"(?<![\w/.-])((?:{'|'.join(PACKAGES)})/[\w/]+\.(?:py|j2))", text)
    for name in set(names):
        assert (ROOT / "ebwm_scale" / name).exists(), name


def test_every_package_is_in_the_reference():
    shown = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        shown |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M))
    packages = {f"ebwm_scale.{name}" for name in PACKAGES}
    assert packages and packages <= shown, packages - shown
    assert "ebwm_kernels" in shown
    for name in shown:
        path = (
            ROOT / ("kernels" if name.startswith("ebwm_kernels") else "") / name.replace(".", "/")
        )
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_the_pages_build(tmp_path):
    pytest.importorskip(
        "mkdocstrings", reason="the extra docs is not installed: `make docs` builds"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "refinement.html").read_text(encoding="utf-8")
    assert 'id="ebwm_scale.refinement.loop.refine"' in page
    for built in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)", built.read_text("utf-8")
        )
        assert not loaded, (built.name, loaded)


def commands():
    """(page, command) of every indented line that runs something of ours, continuation lines
    joined, comments and prose behind two spaces cut.
    """
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(
            r"^ {4,}((?:python|deepspeed|torchrun|sbatch|srun|slurm/)[^\n]*)", text, re.M
        ):
            yield page.name, re.split(r"\s{3,}|\s#", line.strip())[0]


def targets(command):
    """(module or script, options) of a command."""
    words = shlex.split(command.replace("[", " ").replace("]", " ").replace("...", " "))
    for i, word in enumerate(words):
        if word == "-m" and words[i + 1].startswith("ebwm_scale"):
            return words[i + 1], words[i + 2 :]
        if word.endswith((".py", ".sh")):
            return word, words[i + 1 :]
    return None, []


COMMANDS = sorted({(page, command) for page, command in commands() if targets(command)[0]})
HELP = {}


def help_of(target):
    if target not in HELP:
        start = ["-m", target] if target.startswith("ebwm_scale.") else [str(ROOT / target)]
        done = subprocess.run(
            [sys.executable, *start, "--help"],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        HELP[target] = done.stdout
        choice = re.search(r"\{([a-z,-]+)\} \.\.\.", done.stdout)
        for part in choice[1].split(",") if choice else []:
            HELP[target] += subprocess.run(
                [sys.executable, *start, part, "--help"],
                capture_output=True,
                text=True,
                timeout=120,
                cwd=ROOT,
            ).stdout
    return HELP[target]


def test_there_are_commands():
    assert len(COMMANDS) > 40 and {"README.md", "cluster.md", "conversion.md", "thinking.md"} <= {
        page for page, _ in COMMANDS
    }


@pytest.mark.parametrize("target", sorted({targets(command)[0] for _, command in COMMANDS}))
def test_every_command_of_the_documentation_is_there_with_its_options(target):
    for page, command in COMMANDS:
        found, rest = targets(command)
        if found != target:
            continue
        assert target.startswith("ebwm_scale.") or (ROOT / target).exists(), f"{page}: {command}"
        if target.endswith(".sh"):
            continue
        if "--" in rest:
            rest = rest[: rest.index("--")]
        options = {
            word.partition("=")[0]
            for word in rest
            if re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", word)
        }
        missing = [
            option
            for option in options
            if not re.search(re.escape(option) + r"(?![\w-])", help_of(target))
        ]
        assert not missing, f"{page}: {command}: {target} --help does not know {missing}"


def test_the_page_on_thinking_quotes_its_result_files():
    text, folder = (ROOT / "docs" / "thinking.md").read_text(encoding="utf-8"), ROOT / "results"

    def quoted(value, digits=3):
        return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"

    for name in ("quickstart", "long", "long_noise"):
        result = json.loads((folder / "evaluation" / name / "evaluation.json").read_text())
        for value in (
            result["gain_of_later_steps"],
            result["energy"]["rank_correlation_with_error"],
            result["allocation"]["rank_correlation_of_steps_with_error"],
        ):
            assert quoted(value) in text, (name, value)
        assert (
            ", ".join(
                f"**{point['mean']:.3f}**"
                if point["num_steps"] == result["trained_steps"]
                else f"{point['mean']:.3f}"
                for point in result["steps"]
            )
            in text
        ), name
    for row in json.loads((folder / "uncertainty.json").read_text())["rows"]:
        for value in row["rank_correlation_with_truth"].values():
            assert quoted(value, 2) in text, (row["world"], row["form"], value)


def rows_of(name):
    lines = (ROOT / "results" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def readme_row(start):
    """The two figures of a row of the README's table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    _, _, baseline, energy, _, _ = row.split("|")
    return baseline.strip(), energy.strip()


def losses_of_heads():
    """results/worth_text.json: recipe -> the losses of seeds 33, 1 and 2 after the trained step."""
    rows = json.loads((ROOT / "results" / "worth_text.json").read_text())["rows"]
    losses = {}
    for row in rows:
        losses.setdefault(row["recipe"], []).append(row["losses"][row["trained_steps"]]["mean"])
    return losses


def test_the_page_on_recipes_quotes_the_study_of_heads():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for recipe, losses in losses_of_heads().items():
        figures = [*losses, sum(losses) / len(losses)]
        assert " | ".join(f"{loss:.3f}" for loss in figures) in text, recipe
    cost = json.loads((ROOT / "results" / "worth_step_cost.json").read_text())
    ratio = cost["cpu_ratio_to_transformer++"]["linear, bilinear"]
    low, high = min(ratio["runs"]), max(ratio["runs"])
    assert f"costs {ratio['median']:.2f} Transformer++ steps ({low:.2f} to {high:.2f}" in text


def test_the_page_on_recipes_quotes_the_study_of_candidates():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "results" / "candidates.json").read_text())
    assert f"`{result['command']}`" in text
    for form in result["forms"]:
        ratios = [f"{form[key]:.2f}".replace("1.00", "1") for key in ("cpu_ratio", "flops_ratio")]
        losses = " → ".join(f"{loss['mean']:.3f}" for loss in form["losses"])
        gain = form.get("gain")
        gained = ""
        if gain is not None:
            gained = f"{gain['mean']:.3f} ({gain['low']:.3f} to {gain['high']:.3f}) "
        name = form["form"].replace("transformer", "Transformer")
        assert f"| {name} | {' | '.join(ratios)} | {losses} | {gained}|" in text, form["form"]


def test_the_pages_quote_the_cost_of_candidates():
    result = json.loads((ROOT / "results" / "candidates_cost.json").read_text())
    pages = {
        name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("performance", "recipes")
    }
    ratios = {form["form"]: f"{form['cpu_ratio']:.2f}" for form in result["forms"]}
    for form in result["forms"][1:]:
        name, ratio = form["form"], ratios[form["form"]]
        shown = f"**{ratio}**" if name == "two steps, 64 candidates" else ratio
        assert f"| {name} | {shown} | {form['flops_ratio']:.2f} |" in pages["performance"], name
    few, dense = ratios["two steps, 64 candidates"], ratios["two steps, all tokens"]
    assert f"cost {few} Transformer++ steps, of all tokens {dense}" in pages["recipes"]
    row = f"cost {few} Transformer++ steps in place of {dense} at vocabulary 32000"
    assert row in (ROOT / "docs" / "results.md").read_text()


def test_the_table_of_the_readme_quotes_its_result_files():
    folder = ROOT / "results"
    seeds = {}
    for row in rows_of("quickstart_seeds.jsonl")[1:]:
        if row["learning_rate"] == 0.006:
            loss = row["validation_loss_per_step"][-1]
            seeds[row["model"], row["seed"]] = f"{loss:.3f}"
    expected = [", ".join(seeds[model, s] for s in (33, 1, 2)) for model in ("baseline", "energy")]
    assert list(readme_row("text, quick start")) == expected

    long = json.loads((folder / "evaluation/long/evaluation.json").read_text())
    (trained,) = [p for p in long["steps"] if p["num_steps"] == long["trained_steps"]]
    baseline = json.loads((folder / "evaluation/long_baseline/evaluation.json").read_text())
    assert readme_row("text, five") == (f"{baseline['loss']['mean']:.3f}", f"{trained['mean']:.3f}")

    video = {}
    for row in json.loads((folder / "quickstart_video/held_out.json").read_text())["rows"]:
        if row["held_out"] == "bikes.mp4":
            video[row["configuration"]] = f"{row['loss_per_step'][-1]:.3f}"
            assert f"last frame: {row['copy_last_loss']:.3f}" in (ROOT / "README.md").read_text()
    assert readme_row("video, one") == (
        video["quickstart_video_baseline"],
        video["quickstart_video"],
    )

    right = {}
    for row in json.loads((folder / "hops.json").read_text())["rows"]:
        if row["hops"] == [1, 2] and row["steps"] == 2000:
            after = row["after"][max(0, row["trained_steps"] - 1)]
            share = after["by_hops"]["2"]["accuracy"]
            right[row["form"], row["seed"]] = f"{share:.2f}"
    forms = ("transformer++, 2 layers", "1 step")
    expected = [", ".join(right[form, seed] for seed in (33, 1, 2)) for form in forms]
    assert list(readme_row("two look-ups")) == expected

    shallow = losses_of_heads()
    forms = ("transformer++", "shallow-bilinear")
    expected = [", ".join(f"{loss:.3f}" for loss in shallow[form]) for form in forms]
    assert list(readme_row("the same text, one step")) == expected
    cost = json.loads((folder / "worth_step_cost.json").read_text())
    ratio = cost["cpu_ratio_to_transformer++"]["linear, bilinear"]["median"]
    assert readme_row("the same of one step") == ("1", f"{ratio:.2f}")

    runs = json.loads((folder / "bench_step_xxs.json").read_text())["runs"]
    plain = "python tools/bench_step.py --compare baseline --threads 2 --steps 7"
    (step,) = [run["result"] for run in runs if run["command"] == plain]
    assert readme_row("CPU time") == ("1", f"{step['cpu_ratio']:.2f}")

    (generation,) = json.loads((folder / "bench_generation.json").read_text())["rows"]
    assert readme_row("tokens per second") == (
        f"{generation['baseline']['cached_tokens_per_s']:.1f}",
        f"{generation['energy']['cached_tokens_per_s']:.2f}",
    )


def test_the_page_on_recipes_quotes_the_study_of_further_steps():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "results" / "stability.json").read_text())["rows"]
    for form in ("4 steps", "4 steps, damping 1"):
        of_form = {row["seed"]: row for row in rows if row["form"] == form}
        runs = [of_form[seed] for seed in (33, 1, 2)]
        rises = []
        for run in runs:
            fall = run["after"][-1]["fall_of_loss_from_trained"]
            rises.append(f"{-fall['mean']:.3f} [{-fall['high']:.3f}, {-fall['low']:.3f}]")
        assert len(rises) == 3 and ", ".join(rises) in text, form
        for number in (1, 2, 4, 8, 16):
            points = [p for run in runs for p in run["after"] if p["num_steps"] == number]
            cells = [f"{p['loss']['mean']:.3f} ({p['solved']['mean']:.2f})" for p in points]
            assert f"| {'; '.join(cells)} |" in text, (form, number)


def with_its_interval(value: dict, digits: int) -> str:
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def after_its_trained_steps(recipe: dict) -> dict:
    (point,) = [p for p in recipe["steps"] if p["num_steps"] == recipe["trained_steps"]]
    return point


REASONING = ("reachability", "sudoku", "shortest_path")


@pytest.mark.parametrize("family", REASONING)
def test_the_page_on_reasoning_quotes_its_studies(family):
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / f"reasoning_{family}.json").read_text())
    unit = study["recipes"]["transformer++-4"]["training_flops"]
    for recipe in study["recipes"].values():
        trained = after_its_trained_steps(recipe)
        row = (
            f"| {len(recipe['seeds'])} | {recipe['parameters']:,} "
            f"| {recipe['training_flops'] / unit:.1f} | {with_its_interval(trained['loss'], 3)} "
            f"| {with_its_interval(trained['solved'], 2)} |"
        )
        assert row in text, row
    energy = study["recipes"]["energy"]
    for point in energy["steps"]:
        row = (
            f"| {point['num_steps']} | {with_its_interval(point['loss'], 3)} "
            f"| {with_its_interval(point['solved'], 2)} |"
        )
        if "gain_over_previous" in point:
            row += f" {with_its_interval(point['gain_over_previous']['fall_of_loss'], 3)} |"
        assert row in text, row
    for other in study["against"]["energy"].values():
        assert with_its_interval(other["rise_of_solved"], 2) in text
        assert with_its_interval(other["fall_of_loss"], 3) in text


def test_the_page_on_reasoning_quotes_the_studies_of_one_layer():
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    for family in ("reachability", "sudoku"):
        study = json.loads((ROOT / "results" / f"reasoning_one_layer_{family}.json").read_text())
        for name in ("energy", "transformer++"):
            trained = after_its_trained_steps(study["recipes"][name])
            assert with_its_interval(trained["solved"], 2) in text, (family, name)
    tries = json.loads((ROOT / "results" / "reasoning_tries.json").read_text())
    for row in tries["rows"]:
        if row["answered"].startswith(("mazes of 6", "Sudokus")):
            shown = ", ".join(
                f"{point['loss']:.3f} ({point['solved']:.2f})"
                for point in row["after"]
                if point["num_steps"] in (1, 2, 4, 8, 16, 32)
            )
            assert shown in text, shown


def test_the_readme_quotes_what_is_solved_of_mazes_and_sudokus():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for family in ("reachability", "sudoku"):
        study = json.loads((ROOT / "results" / f"reasoning_{family}.json").read_text())
        cells = []
        for name in ("transformer++-4", "energy"):
            trained = after_its_trained_steps(study["recipes"][name])
            cells.append(", ".join(f"{share:.2f}" for share in trained["solved"]["seeds"]))
        assert f"| {cells[0]} | {cells[1]} | `results/reasoning_{family}.json` |" in text


def test_the_page_on_imagination_quotes_the_study_of_two_rooms():
    text = (ROOT / "docs" / "imagination.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "world_rooms.json").read_text())

    def shown(value: dict) -> str:
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    energy, baseline = study["recipes"]["energy"], study["recipes"]["transformer++"]
    assert f"{study['num_windows']} windows of {study['num_episodes']} held-out episodes" in text
    for ours, theirs in zip(energy["errors"], baseline["errors"], strict=True):
        cells = [ours["model"], theirs["model"], ours["persistence"], ours["shuffled_actions"]]
        row = f"| {ours['horizon']} | {' | '.join(map(shown, cells))} |"
        assert row in text, row
    for row in study["against"]["energy"]["transformer++"]:
        if row["horizon"] in (1, 4, 8):
            assert shown(row["gain"]) in text
    for step in energy["steps"][1:]:
        assert shown(step["gain_over_previous"]) in text
    for recipe, judge in (
        (energy, "energy"),
        (energy, "prediction_error"),
        (baseline, "prediction_error"),
    ):
        for kind in ("another_action", "another_time"):
            of_seeds = [each[judge][kind]["auroc"]["mean"] for each in recipe["judge"]]
            assert ", ".join(f"{value:.2f}" for value in of_seeds) in text
    plan = json.loads((ROOT / "results" / "world_plan.json").read_text())

    def short(value: dict) -> str:
        return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"

    for actor in plan["actors"].values():
        assert f"| {short(actor['success'])} | {short(actor['nearest_distance'])} |" in text
    for who, key in (
        ("random", "nearest_distance"),
        ("persistence", "nearest_distance"),
        ("random", "success"),
        ("against", "success"),
    ):
        assert short(plan["gains"][who][key]) in text
    far = json.loads((ROOT / "results" / "world_plan_far.json").read_text())["actors"]
    assert f"{far['against']['success']['mean']:.2f} of {len(far['model']['episodes'])}" in text
    assert f"the energy model {far['model']['success']['mean']:.2f}" in text
