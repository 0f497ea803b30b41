"""Continue a text or a clip with a trained model, thinking as long as asked.

    ebwm think RUN --prompt "The queryset" [--prompt ...] [--max-new 64]
                   [--temperature 0.8 --top-p 0.95]
    ebwm think RUN --prompts FILE            one prompt per line
    ebwm think RUN --video FILE [--start 0.0] [--max-new 8] --output continuation.gif
    ebwm think RUN --episode E [--actions true|hold|random|FILE] [--max-new 8] [--num-starts 3]

RUN is a run folder or a checkpoint folder; energy models and the Transformer++ baseline alike.
Thinking: --num-steps, --step-size, --noise (Langevin),
--num-starts (the lowest energy is kept), --accept-only-if-lower, --tolerance (a position stops when
  its energy stops falling). The observed stream is computed once; a prompt longer than the context
  is cut to its end; an empty one starts after an end of sequence. One prompt is printed as it is
  written, several when they are done. A clip's continuation is written as .gif, .mp4, or .png (a
  contact sheet). A held-out episode of a world (its name or number) is imagined under its own or
other actions, beside the truth: a contact sheet and a video, each start a future of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, add_weights, command
from ebwm_scale.core.errors import EXIT_FINISHED, DataError, UserError
from ebwm_scale.data.format.content import TextContent, VideoContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.side_files import open_manifest, refuse_another_tokenizer
from ebwm_scale.data.tokenizer import Tokenizer, check_text, open_tokenizer
from ebwm_scale.inference.generation import Sampling, Session, continue_texts
from ebwm_scale.inference.thinking import ThinkingConfig


@command
def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    model, config = load_checkpoint(
        options.checkpoint,
        device="cuda" if torch.cuda.is_available() else "cpu",
        weights=options.weights,
    )
    rules = rules_of(options, config)
    say_if_untrained(options.num_steps, config)
    manifest = manifest_of(options, config)
    check_modality(options, config)
    if config.state.kind == "vocabulary":
        continue_prompts(model, manifest, options, rules)
    elif options.episode is not None:
        imagine_episode(model, manifest, options, rules)
    else:
        continue_video(model, manifest, options, rules)
    return EXIT_FINISHED


def parser() -> argparse.ArgumentParser:
    result = ArgumentParser(description=__doc__)
    result.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint folder")
    add_weights(result)
    prompts = result.add_argument_group("what to continue")
    prompts.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt per line")
    prompts.add_argument("--video", type=Path, metavar="FILE", help="a video model continues this")
    prompts.add_argument(
        "--episode",
        metavar="E",
        help="a world model imagines this held-out episode of its dataset: its name, or its number",
    )
    prompts.add_argument(
        "--actions",
        default=None,
        metavar="A",
        help="episode: true (its own; default), hold (the last one), random (some of its own), or "
        "a .npy or .csv with a row for each step",
    )
    prompts.add_argument(
        "--start",
        type=float,
        default=0.0,
        metavar="S",
        help="where the context begins: video: a second; episode: a frame (default %(default)s)",
    )
    prompts.add_argument(
        "--data", metavar="MANIFEST", help="the dataset's manifest, if it has moved since training"
    )
    result.add_argument(
        "--max-new",
        type=int,
        default=None,
        metavar="N",
        help="tokens or frames (default 64 tokens, 8 frames)",
    )
    add_thinking_options(result)
    sampling = result.add_argument_group("choosing tokens")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the most probable token (default)",
    )
    sampling.add_argument(
        "--top-k", type=int, default=None, metavar="K", help="only the K most probable"
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=None,
        metavar="P",
        help="only the fewest that hold probability P",
    )
    result.add_argument(
        "--energies",
        action="store_true",
        help="text: the mean final energy too, which costs one more pass per token",
    )
    result.add_argument(
        "--seed",
        type=int,
        default=None,
        metavar="N",
        help="of sampling, noise and initial states (default: the run's)",
    )
    result.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FILE",
        help="video: .gif, .mp4 or .png (default continuation.png); episode: a name without "
        "ending is written as .png and as .mp4 (default imagination)",
    )
    return result


def add_thinking_options(parser: argparse.ArgumentParser) -> None:
    thinking = parser.add_argument_group("thinking")
    thinking.add_argument(
        "--num-steps",
        type=int,
        default=None,
        metavar="N",
        help="refinement steps (default: as trained)",
    )
    thinking.add_argument(
        "--step-size", type=float, default=None, metavar="ALPHA", help="instead of the trained one"
    )
    thinking.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="SIGMA",
        help="Langevin noise before each step (default 0)",
    )
    thinking.add_argument(
        "--num-starts",
        type=int,
        default=1,
        metavar="K",
        help="initial states; the lowest final energy is kept (default 1)",
    )
    thinking.add_argument(
        "--accept-only-if-lower",
        action="store_true",
        help="undo a step that does not lower the energy, and halve the next one",
    )
    thinking.add_argument(
        "--tolerance",
        type=float,
        default=None,
        metavar="E",
        help="stop a position when a step lowers its energy by no more than this",
    )
    thinking.add_argument(
        "--settled",
        type=float,
        default=None,
        metavar="P",
        help="stop a position when a step changes no probability by more than this",
    )


def rules_of(options: argparse.Namespace, config: Config) -> ThinkingConfig:
    if config.model.kind == "baseline":
        asked = [
            name
            for name, default in (
                ("num_steps", None),
                ("step_size", None),
                ("noise", 0.0),
                ("num_starts", 1),
                ("accept_only_if_lower", False),
                ("tolerance", None),
                ("settled", None),
            )
            if getattr(options, name) != default
        ]
        if asked:
            raise UserError(
                f"--{asked[0].replace('_', '-')}: a Transformer++ does not think; leave the "
                "option out, or take an energy model"
            )
    return ThinkingConfig(
        num_steps=options.num_steps,
        step_size=options.step_size,
        noise=options.noise,
        num_starts=options.num_starts,
        accept_only_if_lower=options.accept_only_if_lower,
        tolerance=options.tolerance,
        settled=options.settled,
        seed=config.train.seed if options.seed is None else options.seed,
    )


def say_if_untrained(num_steps: int | None, config: Config) -> None:
    """More steps than were trained are allowed, and often no better: said, once."""
    trained = config.refinement.num_steps
    if num_steps is None or num_steps <= trained:
        return
    print(
        f"--num-steps {num_steps}: trained were {trained}, and further ones may make predictions "
        "worse; `ebwm evaluate RUN` says whether they do",
        file=sys.stderr,
    )


def manifest_of(options: argparse.Namespace, config: Config) -> Manifest:
    """The manifest of the data a model was trained on, for its tokenizer or encoder."""
    own = Path(options.checkpoint) / "data" / "manifest.json"  # a converted model carries it
    path = (
        options.data
        or (own if own.exists() else None)
        or config.data.manifest
        or (config.data.sources[0].manifest if config.data.sources else None)
    )
    try:
        if path is None:
            raise DataError(f"{options.checkpoint}: names no dataset")
        manifest = open_manifest(path)
    except DataError as error:
        raise DataError(
            f"{error}; the tokenizer or encoder is needed: name the dataset with --data"
        ) from None
    expected = (
        config.model.vocabulary_size
        if config.state.kind == "vocabulary"
        else config.state.dimension
    )
    if manifest.content.size != expected:
        raise DataError(
            f"{manifest.path}: {manifest.content.size_name} is {manifest.content.size}, the model "
            f"has {expected}: not the data it was trained on"
        )
    refuse_another_tokenizer(config, manifest)
    return manifest


def tokenizer_of(manifest: Manifest) -> Tokenizer:
    """The tokenizer of a dataset of text; DataError for another dataset."""
    if not isinstance(manifest.content, TextContent):
        raise DataError(f"{manifest.path}: holds {manifest.modality}, and this model reads text")
    return open_tokenizer(manifest.content.tokenizer_path, eos_id=manifest.content.eos_id)


def check_modality(options: argparse.Namespace, config: Config) -> None:
    if config.state.kind == "vocabulary" and options.video is not None:
        raise UserError("--video: this is a model of text; give --prompt or --prompts")
    if config.state.kind == "vocabulary" and options.episode is not None:
        raise UserError("--episode: this is a model of text; give --prompt or --prompts")
    if options.episode is not None and options.video is not None:
        raise UserError("--episode and --video are both given: give one of them")
    if options.actions is not None and options.episode is None:
        raise UserError(f"--actions {options.actions}: only an episode is imagined under actions")
    if config.state.kind == "embedding" and (options.prompt or options.prompts is not None):
        raise UserError("--prompt: this is a model of video; give --video")
    if options.max_new is not None and options.max_new < 1:
        raise UserError(f"--max-new is {options.max_new}: must be at least 1")


def continue_prompts(
    model, manifest: Manifest, options: argparse.Namespace, config: ThinkingConfig
) -> None:
    tokenizer = tokenizer_of(manifest)
    texts = texts_to_continue(options)
    prompts = [torch.tensor(tokenizer.encode(text) or [tokenizer.eos_id]) for text in texts]
    length = model.config.data.context_length
    for text, prompt in zip(texts, prompts):
        if len(prompt) > length:
            print(
                f"a prompt of {len(prompt)} tokens is cut to its last {length}, the context: "
                f"{text[:40]!r} ...",
                file=sys.stderr,
            )
    sampling = Sampling(options.temperature, options.top_k, options.top_p, config.seed)
    tokens, energies, steps, start = [], [], [], time.perf_counter()
    written = ""
    if len(texts) == 1:
        print(texts[0], end="", flush=True)
    for chosen, prediction in continue_texts(
        model,
        prompts,
        options.max_new or 64,
        config=config,
        sampling=sampling,
        end=tokenizer.eos_id,
        energies=options.energies,
    ):
        tokens.append(chosen)
        if prediction.energy is not None:
            energies.append(prediction.energy.mean().item())
        if prediction.thought is not None:
            steps.append(prediction.thought.steps.double().mean().item())
        if len(texts) == 1 and int(chosen) != tokenizer.eos_id:
            whole = tokenizer.decode([int(t) for t in tokens])
            if not whole.endswith(
                "\ufffd"
            ):  # a character of several pieces is printed when it is whole
                print(whole[len(written) :], end="", flush=True)
                written = whole
    seconds = time.perf_counter() - start
    if len(texts) == 1:
        print()
    else:
        for row, text in enumerate(texts):
            ids = [int(t[row]) for t in tokens]
            ids = ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids
            print(f"{text}{tokenizer.decode(ids)}\n")
    about = f"{len(tokens) * len(texts) / seconds:,.1f} tokens/s"
    if steps:
        about += f"; {sum(steps) / len(steps):.2f} steps per token"
    if energies:
        about += f", mean energy {sum(energies) / len(energies):.3f}"
    print(about, file=sys.stderr)


def texts_to_continue(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line and of the file; UserError for none, or for one not UTF-8."""
    texts = list(options.prompt)
    for number, text in enumerate(texts, start=1):
        check_text(text, f"--prompt {number}")
    if options.prompts is not None:
        try:
            content = options.prompts.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{options.prompts}: cannot be read as UTF-8 text: {error}") from None
        lines = content.split("\n")
        texts += lines[:-1] if lines[-1] == "" else lines
    if not texts:
        raise UserError("nothing to continue: give --prompt TEXT or --prompts FILE")
    return texts


def continue_video(
    model, manifest: Manifest, options: argparse.Namespace, config: ThinkingConfig
) -> None:
    from ebwm_scale.data.encoders.space import FrameSpace
    from ebwm_scale.reporting.frames import write_continuation

    if options.video is None:
        raise UserError("nothing to continue: give --video FILE, or --episode E of a world")
    if manifest.content.conditions:
        raise UserError(
            "--video: this model is conditioned on actions, which a video does not tell; "
            "give --episode E"
        )
    if not options.video.is_file():
        raise UserError(f"{options.video}: no such file; give a video")
    output = options.output or Path("continuation.png")
    device = next(model.parameters()).device
    content = manifest.content
    if not isinstance(content, VideoContent):
        raise DataError(f"{manifest.path}: holds {manifest.modality}, and this model sees video")
    space = FrameSpace(content, device)
    frames = context_frames(options.video, content, options.start, model.config.data.context_length)
    states = space.states(torch.from_numpy(frames)[None])[0]
    session, new, energies, start = Session(model, [states], config), [], [], time.perf_counter()
    for _index in range(options.max_new or 8):
        prediction = session.predict()
        new.append(prediction.state)
        if prediction.energy is not None:
            energies.append(prediction.energy.item())
        session.accept(prediction.state)
    seconds = time.perf_counter() - start
    shown = space.frames(torch.stack(new, 1))
    if shown is None:
        raise UserError(
            f"the encoder {content.encoder_name} cannot go back to frames, so there is nothing to "
            f"show; energies: {energies}"
        )
    write_continuation(output, frames, shown[0].cpu().numpy(), interval_s=content.interval_s)
    about = (
        f"{output}: {len(frames)} frames of context, {len(new)} predicted, "
        f"{len(new) / seconds:,.1f} frames/s"
    )
    print(about + (f"; energies {', '.join(f'{e:.3f}' for e in energies)}" if energies else ""))


def imagine_episode(
    model, manifest: Manifest, options: argparse.Namespace, config: ThinkingConfig
) -> None:
    from ebwm_scale.data.format.episodes import find_episode, read_episode
    from ebwm_scale.data.loading.observation import Observation
    from ebwm_scale.evaluation.rollouts import roll_out
    from ebwm_scale.reporting.rollouts import shown_rollout

    if options.start != int(options.start):
        raise UserError(f"--start {options.start}: of an episode it is a whole number of frames")
    episode = read_episode(manifest, find_episode(manifest, options.episode))
    observe = Observation(manifest, next(model.parameters()).device)
    started = time.perf_counter()
    rollout = roll_out(
        model,
        episode,
        observe,
        start=int(options.start),
        num_steps=options.max_new or 8,
        actions=options.actions or "true",
        config=config,
    )
    seconds = time.perf_counter() - started
    for line in shown_rollout(rollout, observe, options.output or Path("imagination")):
        print(line)
    num_frames = len(rollout.futures) * rollout.num_steps
    print(
        f"episode {episode.name}: {rollout.num_context} frames observed, "
        f"{num_frames / seconds:,.1f} imagined frames/s"
    )


def context_frames(path: Path, content, start_s: float, count: int):
    """Up to `count` frames (n, height, width, 3) of a video from start_s on, an interval apart,
    windowed as the dataset's are.

    Decoded in a process of its own, as the dataset's are: a decoder that crashes or stands still is
    an error in one line.
    """
    from ebwm_scale.data.prepare.clips import frames_from
    from ebwm_scale.data.prepare.findings import Findings
    from ebwm_scale.data.prepare.workers import each_in_a_process

    def decode(path: Path, moved):
        findings = Findings()
        frames = frames_from(
            path,
            start_s,
            content.interval_s,
            count,
            content.height,
            content.width,
            findings,
            moved,
        )
        return frames, findings.phrases()

    (outcome,) = each_in_a_process([path], decode)
    if outcome.problem is not None:
        raise DataError(f"{path}: {outcome.problem.removeprefix(f'{path}: ')}")
    frames, phrases = outcome.result
    if phrases:
        print(f"warning: {path}: {'; '.join(phrases)}", file=sys.stderr)
    if len(frames) == 0:
        raise UserError(f"{path}: has no frame at {start_s} s; --start must lie inside the video")
    return frames


if __name__ == "__main__":
    sys.exit(main())
