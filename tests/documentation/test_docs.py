"""The documentation says what is there: links lead somewhere, commands and their options exist,
figures are those of the result files, and the pages build.
"""

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import world_tables

from ebwm_scale.config.load import load_config
from ebwm_scale.evaluation.seed_interval import seed_interval
from ebwm_scale.evaluation.width_transfer import (
    best_loss_table,
    loss_table,
    read_rows,
    transfer_table,
)

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


def losses_of(study):
    """Of a study of text: recipe -> the losses of seeds 33, 1 and 2 after the trained step."""
    rows = json.loads((ROOT / "results" / study).read_text())["rows"]
    losses = {}
    for row in rows:
        losses.setdefault(row["recipe"], []).append(row["losses"][row["trained_steps"]]["mean"])
    return losses


def test_the_page_on_recipes_quotes_the_study_of_heads():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for study in ("worth_text.json", "context_alone.json"):
        for recipe, losses in losses_of(study).items():
            figures = [*losses, sum(losses) / len(losses)]
            assert " | ".join(f"{loss:.3f}" for loss in figures) in text, (study, recipe)
    cost = json.loads((ROOT / "results" / "worth_step_cost.json").read_text())
    ratio = cost["cpu_ratio_to_transformer++"]["linear, bilinear"]
    low, high = min(ratio["runs"]), max(ratio["runs"])
    assert f"costs {ratio['median']:.2f} Transformer++ steps ({low:.2f} to {high:.2f}" in text


def test_the_pages_quote_what_the_quick_starts_form_is_worth_and_costs():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    losses = losses_of("context_alone.json")
    ours, plain = losses["alone-direct"], losses["transformer++"]
    differences = [a - b for a, b in zip(ours, plain)]
    mean = statistics.mean(differences)
    half = 4.3027 * statistics.stdev(differences) / len(differences) ** 0.5  # Student's t, 2
    assert f"{mean:.3f} higher, with an interval of {mean - half:.3f} to {mean + half:.3f}" in text
    deeper = statistics.mean(ours) - statistics.mean(losses["transformer++-3"])
    assert f"ends {deeper:.3f} lower" in text
    forms = json.loads((ROOT / "results" / "text_forms_cost.json").read_text())["forms"]
    form = forms["linear, direct; the context alone"]
    low, high = min(form["cpu_ratios"]), max(form["cpu_ratios"])
    memory = form["peak_memory_gib"] / forms["transformer++"]["peak_memory_gib"]
    quoted_cost = f"{form['cpu_ratio']:.2f} Transformer++ steps ({low:.2f} to {high:.2f}"
    before = forms["two steps through both layers"]["cpu_ratio"]
    assert f"Two steps through both layers cost {before:.2f}." in text
    assert quoted_cost in text and f"{memory:.2f} times its memory" in text
    judge = json.loads((ROOT / "results/evaluation/direct/evaluation.json").read_text())
    rank = judge["energy"]["rank_correlation_with_error"]
    assert f"{rank['mean']:.3f} [{rank['low']:.3f}, {rank['high']:.3f}]" in text
    assert f"in {judge['out_of_distribution']['auroc']['mean']:.3f} of pairs" in text


def test_the_pages_quote_what_one_term_alone_is_worth_and_costs():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    new = json.loads((ROOT / "results" / "muon.json").read_text())
    old = json.loads((ROOT / "results" / "muon_with_linear.json").read_text())["energy"]
    titles = {"muon, two rates": "Muon, two rates", "muon": "Muon", "adamw": "AdamW"}
    gaps = {}
    for name, title in titles.items():
        plain = new["baseline"][name]
        cells = [f"{plain['mean']:.3f}"]
        for form in (new["energy"], old):
            seeds = form[name]["seeds"]
            gap = seed_interval([seeds[seed] - plain["seeds"][seed] for seed in seeds])
            gaps.setdefault(name, gap)
            cells.append(f"{form[name]['mean']:.3f}")
            cells.append("{mean:.3f} [{low:.3f}, {high:.3f}]".format(**gap))
        assert f"| {title} | {' | '.join(cells)} |" in text, (title, cells)
    best = gaps["muon, two rates"]
    assert best["low"] < 0 < best["high"] and gaps["muon"]["low"] < 0 < gaps["muon"]["high"]
    ours, plain = (new[kind]["muon, two rates"]["seeds"] for kind in ("energy", "baseline"))
    assert all(ours[seed] < plain[seed] for seed in plain)
    forms = json.loads((ROOT / "results" / "text_forms_cost.json").read_text())["forms"]
    form = forms["direct; the context alone"]
    low, high = min(form["cpu_ratios"]), max(form["cpu_ratios"])
    memory = form["peak_memory_gib"] / forms["transformer++"]["peak_memory_gib"]
    assert f"{form['cpu_ratio']:.2f} Transformer++ steps** ({low:.2f} to {high:.2f}" in text
    assert f"{memory:.2f} times its memory, on one CPU thread; its FLOPs are" in text
    assert f"FLOPs are {form['flops_ratio']:.2f} times" in text
    assert form["cpu_ratio"] <= 1.8 and memory <= 1.2  # what was asked for
    results = (ROOT / "docs" / "results.md").read_text()
    assert f"at {form['cpu_ratio']:.2f} of its time" in results
    assert f"with AdamW {gaps['adamw']['mean']:.3f} above it" in results
    readme = (ROOT / "README.md").read_text()
    assert f"a step of it costs {form['cpu_ratio']:.2f} of Transformer++'s" in readme
    assert "by {mean:.3f} [{low:.3f}, {high:.3f}]".format(**gaps["adamw"]) in readme
    tries = rows_of("text_tries.jsonl")[1:]
    assert len({row["without"] for row in tries}) == 1
    assert f"where the quick start has {tries[0]['without']:.3f}" in text
    for row in tries:
        assert f"{row['tried']} {row['validation_loss']:.3f}" in text, row
    assert f"ends at {tries[-1]['validation_loss_per_step'][0]:.3f}" in text


def test_the_page_on_recipes_quotes_the_energies_of_several_starts():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in ("direct_noise", "direct_noise_two", "direct_noise_langevin"):
        path = ROOT / "results" / "evaluation" / name / "evaluation.json"
        result = json.loads(path.read_text())
        one, *several = (f"{point['mean']:.3f}" for point in result["starts"])
        rank = result["energy"]["rank_correlation_with_error"]
        interval = f"{rank['mean']:.3f} [{rank['low']:.3f}, {rank['high']:.3f}]"
        assert f"| {one} | {interval} | {', '.join(several)} |" in text, name
        assert [point["num_starts"] for point in result["starts"]] == [1, 2, 4, 8]


def test_the_page_on_recipes_quotes_the_energies_that_know_their_level():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in ("one_term_noise", "one_term_noise_two", "one_term_noise_level", "one_term"):
        path = ROOT / "results" / "evaluation" / name / "evaluation.json"
        result = json.loads(path.read_text())
        losses = {point["num_steps"]: f"{point['mean']:.3f}" for point in result["steps"]}
        rank = with_its_interval(result["energy"]["rank_correlation_with_error"], 3)
        told = with_its_interval(result["out_of_distribution"]["auroc"], 3)
        starts = ", ".join(f"{point['mean']:.3f}" for point in (result["starts"] or [])[1:])
        cells = [losses[result["trained_steps"]], losses[4], rank, told, starts, f"`{name}/`"]
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in text, cells


def test_the_page_on_recipes_quotes_the_seeds_of_the_studies_base():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    seeds = {}
    for row in rows_of("quickstart_seeds.jsonl")[1:]:
        if row["learning_rate"] == 0.006:
            seeds[row["model"], row["seed"]] = row["validation_loss_per_step"][-1]
    for model in ("baseline", "energy"):
        assert " / ".join(f"{seeds[model, seed]:.3f}" for seed in (33, 1, 2)) in text, model


def test_the_page_on_recipes_quotes_the_study_of_optimizers():
    """Its table, made from the rows; that all had the same rates to choose from, and that the quick
    start has those of the lowest loss.
    """
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    sys.path.insert(0, str(ROOT / "tools"))
    from study_optimizers import CONFIGS, NAMES, RATES, TWO_RATES, summary, table

    rows = rows_of("muon.jsonl")
    found = summary(rows)
    stored = json.loads((ROOT / "results" / "muon.json").read_text())
    assert {kind: stored[kind] for kind in found} == found and found.keys() == CONFIGS.keys()
    for line in table(found)[2:]:
        assert line in text, line
    for kind, of_kind in found.items():
        assert of_kind.keys() - {"cost"} == set(NAMES)
        for name in NAMES:
            tuning = {float(rate): loss for rate, loss in of_kind[name]["tuning"].items()}
            assert name == TWO_RATES or set(RATES) <= set(tuning)
            assert len(of_kind[name]["seeds"]) == 3
            assert min(tuning) < of_kind[name]["learning_rate"] < max(tuning)
        best = min((of_kind[name] for name in NAMES), key=lambda found: found["mean"])
        assert best is of_kind[TWO_RATES]
        sizes = ["model.vocabulary_size=2048", "data.context_length=64"]
        optimizer = load_config(ROOT / "configs" / CONFIGS[kind], sizes).optimizer
        assert optimizer.name == "muon"
        for key in ("learning_rate", "muon_learning_rate"):
            assert getattr(optimizer, key) == best[key], (kind, key)
    for name in ("adamw", TWO_RATES):
        ours, plain = (found[kind][name]["seeds"] for kind in ("energy", "baseline"))
        gap = seed_interval([ours[seed] - plain[seed] for seed in ours])
        assert "{mean:.3f} [{low:.3f}, {high:.3f}] higher".format(**gap) in text, name
    costs = [found[kind]["cost"]["cpu_ratio"] for kind in ("energy", "baseline")]
    ratios = [f"{cost:.2f} times" for cost in costs]
    assert all(ratio in text for ratio in ratios), ratios


def test_the_page_on_training_quotes_what_waiting_threads_cost():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "results" / "waiting_threads_world.json").read_text())
    for place, start in (("alone", "| alone on two cores |"), ("beside", "| beside two processes")):
        (row,) = [line for line in text.splitlines() if line.startswith(start)]
        for policy in ("passive", "sleeping", "active"):
            seconds = result[place][policy]
            assert f" {seconds['wall_s']:.1f}, {seconds['cpu_s']:.1f} |" in row, (place, policy)
    alone, beside = result["alone"], result["beside"]["active_over_passive"]
    assert f"({alone['active_over_passive']['wall_s']:.2f} times as long)" in text
    assert alone["active_over_passive"]["wall_s"] > 0.97  # nothing is lost
    assert f"takes {beside['wall_s']:.2f} times as long and {beside['cpu_s']:.2f} times" in text
    assert f"takes {alone['sleeping_over_passive']['wall_s']:.1f} times as long" in text
    other = json.loads((ROOT / "results" / "waiting_threads.json").read_text())["alone"]
    # there, `passive` slept at once
    took = [f"{other[policy]['wall_s']:.1f}" for policy in ("passive", "active")]
    assert f"it took {took[0]} s where spinning took {took[1]}" in text


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


def test_the_page_on_width_quotes_its_sweep():
    text = (ROOT / "docs" / "width.md").read_text(encoding="utf-8")
    rows = read_rows(ROOT / "results" / "width_transfer.jsonl")
    seed = rows[0]["seed"]
    tables = [loss_table(rows, kind, seed) for kind in ("baseline", "energy")]
    tables += [transfer_table(rows, seed), best_loss_table(rows, seed)]
    for line in [line for table in tables for line in table]:
        assert line in text, line


def test_the_table_of_the_readme_quotes_its_result_files():
    folder = ROOT / "results"
    optimizers = json.loads((folder / "muon.json").read_text())
    for start, name in (("text, quick start", "muon, two rates"), ("the same with", "adamw")):
        seeds = [optimizers[kind][name]["seeds"].values() for kind in ("baseline", "energy")]
        expected = [", ".join(f"{loss:.3f}" for loss in losses) for losses in seeds]
        assert list(readme_row(start)) == expected, start
    costs = json.loads((folder / "text_forms_cost.json").read_text())["forms"]
    ratio = costs["direct; the context alone"]["cpu_ratio"]
    assert readme_row("CPU time") == ("1", f"{ratio:.2f}")

    long = json.loads((folder / "evaluation/long/evaluation.json").read_text())
    (trained,) = [p for p in long["steps"] if p["num_steps"] == long["trained_steps"]]
    baseline = json.loads((folder / "evaluation/long_baseline/evaluation.json").read_text())
    assert readme_row("text, two steps through") == (
        f"{baseline['loss']['mean']:.3f}",
        f"{trained['mean']:.3f}",
    )

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

    runs = json.loads((folder / "bench_step_xxs.json").read_text())["runs"]
    plain = "python tools/bench_step.py --compare baseline --threads 2 --steps 7"
    (step,) = [run["result"] for run in runs if run["command"] == plain]
    assert readme_row("the same of two steps") == ("1", f"{step['cpu_ratio']:.2f}")

    (generation,) = json.loads((folder / "bench_generation.json").read_text())["rows"]
    assert readme_row("tokens per second") == (
        f"{generation['baseline']['cached_tokens_per_s']:.1f}",
        f"{generation['energy']['cached_tokens_per_s']:.2f}",
    )


def test_the_pages_quote_the_scaling_of_text():
    study = json.loads((ROOT / "results" / "scaling" / "text.json").read_text())
    losses = {(run["form"], run["point"], run["seed"]): run["loss"] for run in study["runs"]}
    flops = {(run["form"], run["point"]): run["flops"] for run in study["runs"]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    seeds = ("33", "1", "2")
    pairs = [[losses[form, "w128", seed] for seed in seeds] for form in ("transformer++", "energy")]
    assert readme_row("text, width 128") == tuple(f"{statistics.fmean(u):.3f}" for u in pairs)
    gap = seed_interval([a - b for a, b in zip(*pairs)])
    shown = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**gap)
    assert f"ends {shown} below it" in readme and f"by {shown};" in page and gap["low"] > 0
    assert f"{gap['mean']:.3f} below it at 128" in (ROOT / "docs" / "results.md").read_text()
    points = ("w32", "w64", "w96", "w128")
    shares = {
        other: [flops["energy", point] / flops[other, point] for point in points]
        for other in ("transformer++", "looped-2x2")
    }
    least, most = min(shares["transformer++"]), max(shares["transformer++"])
    assert f"costs {least:.2f} to {most:.2f} times the FLOPs" in page
    above = {
        (other, point): seed_interval(
            [losses[other, point, seed] - losses["energy", point, seed] for seed in seeds]
        )
        for other in ("looped-2x2", "transformer++-4")
        for point in points
    }
    assert signs(above.values()) == "0000" + "00+-"
    for point, sign, word in (("w96", 1, "above"), ("w128", -1, "below")):
        gap = above["transformer++-4", point]
        low, high = sorted((sign * gap["low"], sign * gap["high"]))
        assert f"{sign * gap['mean']:.3f} [{low:.3f}, {high:.3f}] {word} it" in page, point
    least, most = min(shares["looped-2x2"]), max(shares["looped-2x2"])
    assert f"at {least:.2f} to {most:.2f} of their FLOPs" in page


def test_the_page_on_exploring_quotes_how_long_a_first_answer_took():
    text = (ROOT / "docs" / "exploring.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "results" / "explore_first_answer.json").read_text())["runs"]
    text_shared, text_alone, world = (
        max(row["first_wall_s"] for row in run["processes"]) for run in runs
    )
    assert [run["OMP_NUM_THREADS"] == "1" for run in runs] == [False, True, False]
    assert f"took at most {text_shared:.2f} s with a thread for each of two cores" in text
    assert f"and {text_alone:.2f} s with one thread" in text
    assert f"the world quick start's took at most {world:.2f} s" in text


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


@pytest.mark.parametrize("family", [*REASONING, "muon_sudoku"])
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


@pytest.mark.parametrize("family", ["sudoku", "shortest_path"])
def test_the_page_on_reasoning_quotes_the_looped_runs(family):
    """One run each, beside the same layers passed once, on the same instances."""
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    name = f"results/reasoning_looped_{family}.json"
    recipes = json.loads((ROOT / name).read_text())["recipes"]
    (line,) = [line for line in text.splitlines() if f"`{name}`" in line]
    looped = {step["num_steps"]: step["solved"]["mean"] for step in recipes["looped-4x4"]["steps"]}
    (once,) = (step["solved"]["mean"] for step in recipes["transformer++-4"]["steps"])
    assert f"{looped[4]:.2f} in one run" in line and f"{once:.2f}" in line
    if family == "sudoku":
        assert f"{looped[6]:.2f} when passed six times" in line
    assert all(recipe["seeds"] == ["seed-33"] for recipe in recipes.values())


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


def test_the_page_on_reasoning_says_only_what_the_study_with_muon_says():
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_sudoku.json").read_text())
    energy, against = study["recipes"]["energy"], study["against"]["energy"]
    assert all(len(recipe["seeds"]) == 3 for recipe in study["recipes"].values())
    for other, signs_of_both in (("transformer++-4", "++"), ("looped-4x4", "00")):
        gained = against[other]
        assert signs([gained["fall_of_loss"], gained["rise_of_solved"]]) == signs_of_both
    assert signs([against["transformer++-16"]["fall_of_loss"]]) == "0"
    assert against["transformer++-16"]["rise_of_solved"]["low"] >= 0
    steps = [point["gain_over_previous"]["fall_of_loss"] for point in energy["steps"][1:4]]
    assert signs(steps) == "++0"
    beyond = energy["beyond_trained"]["16"]
    rise = {key: -beyond["fall_of_loss"][key] for key in ("mean", "low", "high")}
    assert f"loss is {rise['mean']:.3f} [{rise['high']:.3f}, {rise['low']:.3f}] higher" in text
    assert with_its_interval(beyond["rise_of_solved"], 3) in text
    assert signs([beyond["rise_of_solved"]]) == "0"
    stopped = energy["settling"]
    taken = ", ".join(f"{seed['mean_steps']['mean']:.1f}" for seed in stopped)
    ranks = [seed["rank_correlation_of_steps_with_difficulty"]["mean"] for seed in stopped]
    assert f"takes {taken} steps" in text
    assert f"rank correlations {', '.join(f'{rank:.2f}' for rank in ranks)}" in text


def test_the_readme_quotes_what_is_solved_of_mazes_and_sudokus():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [
        ("reachability", "transformer++-4"),
        ("muon_sudoku", "transformer++-4"),
        ("muon_sudoku", "looped-4x4"),
    ]
    for family, other in rows:
        study = json.loads((ROOT / "results" / f"reasoning_{family}.json").read_text())
        cells = []
        for name in (other, "energy"):
            trained = after_its_trained_steps(study["recipes"][name])
            cells.append(", ".join(f"{share:.2f}" for share in trained["solved"]["seeds"]))
        assert f"| {cells[0]} | {cells[1]} | `results/reasoning_{family}.json` |" in text


def test_the_page_on_imagination_quotes_the_studies_of_worlds():
    text = (ROOT / "docs" / "imagination.md").read_text(encoding="utf-8")
    shown = world_tables.shown
    rows = world_tables.error_rows() + world_tables.judge_rows() + world_tables.step_rows()
    rows += world_tables.noise_rows()
    assert len(rows) > 10
    for row in rows:
        assert row in text, row
    study = world_tables.read("two-rooms.json")
    assert f"{study['num_windows']} windows of {study['num_episodes']} held-out episodes" in text
    for name, words in (("minigrid", "{} of {} in MiniGrid"), ("breakout", "{} of {} in Breakout")):
        other = world_tables.read(f"{name}.json")
        assert words.format(other["num_windows"], other["num_episodes"]) in text
        for place in (0, -1):
            gain = other["recipes"]["energy"]["errors"][place]["gain_over_persistence"]
            assert shown(gain) in text, (name, place)
    for row in study["against"]["energy"]["transformer++"][1:]:
        assert shown(row["gain"]) in text
    for name in ("two-rooms", "minigrid", "breakout"):
        recipes = world_tables.read(f"{name}.json")["recipes"]
        assert shown(recipes["energy"]["errors"][0]["gain_over_shuffled_actions"]) in text
        times = [min(recipes[recipe]["step_time_s"]) for recipe in ("energy", "transformer++")]
        assert 4 < times[0] / times[1] < 8, name  # "about six times"
    for recipe in ("energy", *world_tables.BASELINES):
        assert f"{study['recipes'][recipe]['parameters']:,}" in text
    energy = study["recipes"]["energy"]
    for place in (0, -1):
        assert shown(energy["errors"][place]["gain_over_persistence"]) in text
    assert len(energy["seeds"]) == 3
    for judge in ("energy", "energy_above_prediction"):
        gained = study["judge_against"]["energy"]["transformer++"][judge]["another_action"]
        assert f"differs by {shown(gained['auroc'], 2)}" in text
    other = world_tables.read("minigrid.json")["judge_against"]["energy"]["transformer++"]
    for told in other["energy"].values():
        assert shown(told["auroc"], 2) in text


def signs(values):
    """Of intervals: +, - or 0 where it is on both sides."""
    return "".join("+" if v["low"] > 0 else "-" if v["high"] < 0 else "0" for v in values)


def test_the_page_on_imagination_says_only_what_the_studies_intervals_say():
    """Each sentence that is no figure, against the figures that it is about."""
    for name, two_layers, four_layers, judges, further_steps in (
        ("two-rooms", "0+++", "-000", "-00 000 +00", "+--"),
        ("minigrid", "0000", "0000", "--- --- 000", "+-0"),
        ("breakout", "0000", "0000", "000 000 000", "+-0"),
    ):
        study = world_tables.read(f"{name}.json")
        energy, against = study["recipes"]["energy"], study["against"]["energy"]
        assert len(energy["seeds"]) == 3
        assert signs(row["gain_over_persistence"] for row in energy["errors"]) == "++++"
        assert signs(row["gain_over_shuffled_actions"] for row in energy["errors"]) == "++++"
        assert signs(row["gain"] for row in against["transformer++"]) == two_layers
        assert signs(row["gain"] for row in against["transformer++-4"]) == four_layers
        gained = study["judge_against"]["energy"]["transformer++"]
        found = [
            signs(gained[judge][kind]["auroc"] for kind in world_tables.WRONG)
            for judge in ("energy", "energy_above_prediction", "prediction_error")
        ]
        assert " ".join(found) == judges, name
        steps = [step["gain_over_previous"] for step in energy["steps"][1:]]
        assert signs(steps) == further_steps, name


def test_the_page_on_imagination_quotes_the_study_of_the_first_form():
    text = (ROOT / "docs" / "imagination.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "world_rooms.json").read_text())
    energy = study["recipes"]["energy"]
    for row in study["against"]["energy"]["transformer++"]:
        if row["horizon"] in (1, 4, 8):
            assert world_tables.shown(row["gain"]) in text
    for step in energy["steps"][1:]:
        assert world_tables.shown(step["gain_over_previous"]) in text
    for judge in ("energy", "prediction_error"):
        for kind in ("another_action", "another_time"):
            of_seeds = [each[judge][kind]["auroc"]["mean"] for each in energy["judge"]]
            assert ", ".join(f"{value:.2f}" for value in of_seeds) in text


def test_the_readme_quotes_the_studies_of_worlds():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipes = world_tables.read("two-rooms.json")["recipes"]
    seeds = {
        name: ", ".join(f"{value:.3f}" for value in recipe["errors"][-1]["model"]["seeds"])
        for name, recipe in recipes.items()
    }
    for other in world_tables.BASELINES:
        assert f"| {seeds[other]} | {seeds['energy']} | `results/worlds/two-rooms.json` |" in text
    actors = world_tables.read("plan-minigrid.json")["actors"]
    reached = [
        ", ".join(f"{value:.2f}" for value in actors[actor]["success"]["seeds"])
        for actor in ("transformer++, cem", "energy, cem")
    ]
    assert f"(random actions: {actors['random']['success']['mean']:.2f}) | " in text
    assert f"| {reached[0]} | {reached[1]} | `results/worlds/plan-minigrid.json` |" in text
    for name in world_tables.WORLDS:
        recipes = world_tables.read(f"{name}.json")["recipes"]
        assert recipes["energy"]["steps"][1]["gain_over_previous"]["low"] > 0, name  # a step pays


def test_the_page_on_planning_actions_quotes_its_studies():
    text = (ROOT / "docs" / "planning-actions.md").read_text(encoding="utf-8")
    rows = world_tables.plan_rows()
    assert len(rows) >= 6
    for row in rows:
        assert row in text, row
    ours, others = "energy, cem", ("transformer++, cem", "transformer++-4, cem")
    studies = [world_tables.read(f"plan-{name}.json") for name in ("two-rooms", "minigrid")]
    for study, compared in zip(studies, ("00", "+0"), strict=True):
        gains = study["gains"][ours]
        for other in ("random", "persistence"):  # better than chance
            for measure in ("success", "nearest_distance"):
                assert gains[other][measure]["low"] > 0
                assert world_tables.shown(gains[other][measure], 2) in text, (other, measure)
        assert signs(gains[other]["success"] for other in others) == compared
        for other in (*others, "energy, gradient"):
            assert world_tables.shown(gains[other]["success"], 2) in text, other
        assert signs(gains["energy, gradient"].values()) == "++"
        chance = study["gains"]["energy, gradient"]["random"]["success"]
        assert signs([chance]) == "0" and world_tables.shown(chance, 2) in text
        seconds = {name: actor["cpu_seconds_per_plan"] for name, actor in study["actors"].items()}
        assert 0.8 < seconds["energy, gradient"] / seconds[ours] < 1.2  # equal times
        for other in others:
            assert f"{seconds[ours] / seconds[other]:.1f}" in text
    far = json.loads((ROOT / "results" / "world_plan_far.json").read_text())["actors"]
    assert f"{far['against']['success']['mean']:.2f} of {len(far['model']['episodes'])}" in text
    assert f"the energy model {far['model']['success']['mean']:.2f}" in text
