"""What a trained model knows, and what thinking adds: losses with intervals, thinking curves, and
how far its energies can be trusted.

    ebwm evaluate RUN [--max-samples 256] [--steps 1 2 3 4 8] [--starts 1 2 4]
                      [--out-of-distribution FILE ..] [--split NAME] [--output DIR]
                      [--against RUN] [--examples 4] [--horizons 1 2 4 8 16] [--films 4]

Writes evaluation.json and evaluation.html into RUN (or DIR). On a dataset of a world
(docs/imagination.md) also imagination.json and imagination.html: how far it imagines its held-out
episodes, what its actions are worth, how well its energy tells real next frames from wrong ones,
and some episodes that move beside what is imagined of them. On a dataset of tasks with one right
answer (docs/reasoning.md): solving.json and solving.html, with the share of solved instances by
difficulty and number of steps, and some instances shown step by step; --against compares with
another run on the same instances. Losses are means per target over the validation split (text: nats
per token, perplexity is the exponential of the mean; video: SmoothL1), with 95 % intervals from a
bootstrap over samples. For an energy model:

    curves       loss against the number of refinement steps, and against the number of starts of
                 which the lowest energy is kept
    energy       rank correlation of final energy and actual error over positions; mean error in
                 deciles of energy
    allocation   with early stopping: steps used against error, in deciles of it; what the saved
                 steps cost in loss
    spectrum     what one more refinement step does to a small change of the state, after the
                 trained steps and four times as many: eigenvalues of the step and of alpha H
    uncertainty  rank correlation of the spread of energy over starts with the error
    distribution (text) energies of shuffled tokens against real ones, as AUROC: the share of pairs
                 in which the real text has the lower energy; the same for each file of
                 --out-of-distribution, another language or program code, beside what the loss (of
                 Transformer++ too) would say
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, OldOption, add_weights, command
from ebwm_scale.core.console import progress_on_console, say
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.episodes import episodes_of
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.side_files import refuse_another_tokenizer
from ebwm_scale.data.loading.mixture import MixedSplit, open_sources
from ebwm_scale.evaluation.solving import Other, evaluate_solving, is_task
from ebwm_scale.evaluation.thinking_curves import (
    context_length_of,
    evaluate,
)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run folder or checkpoint folder"
    )
    add_weights(parser)
    parser.add_argument(
        "--data",
        metavar="MANIFEST",
        help="evaluate on the validation split of this dataset instead of the run's",
    )
    parser.add_argument(
        "--split",
        default="validation",
        metavar="NAME",
        help="the split to evaluate on (default %(default)s)",
    )
    parser.add_argument(
        "--max-samples",
        type=int,
        default=256,
        metavar="N",
        help="validation samples (default %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="samples at a time (default %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4, 8],
        metavar="N",
        help="numbers of refinement steps, or of a looped baseline's loops (default 1 2 3 4 8)",
    )
    parser.add_argument(
        "--starts",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        metavar="K",
        help="numbers of starts (default 1 2 4)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=None,
        metavar="E",
        help="of early stopping (default: a hundredth of the mean fall of the first step)",
    )
    parser.add_argument(
        "--settled",
        type=float,
        default=0.1,
        metavar="P",
        help="tasks: thinking stops when a step changes no scored probability by more than this "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--out-of-distribution",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts (UTF-8) of another kind, to be told from the validation split",
    )
    parser.add_argument(
        "--foreign",
        action=OldOption,
        const="--out-of-distribution",
        dest="out_of_distribution",
        type=Path,
        nargs="+",
    )
    parser.add_argument(
        "--horizons",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        metavar="H",
        help="worlds: numbers of imagined steps (default 1 2 4 8 16)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        default=None,
        metavar="RUN",
        help="tasks and worlds: another run or checkpoint folder, such as Transformer++, compared "
        "on the same instances or episodes",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=4,
        metavar="N",
        help="tasks: instances that are shown step by step (default %(default)s)",
    )
    parser.add_argument(
        "--films",
        type=int,
        default=4,
        metavar="N",
        help="worlds: held-out episodes that move on the page (default %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="default: the run folder"
    )
    options = parser.parse_args(arguments)
    counts = (*options.steps, *options.starts, *options.horizons)
    if min(options.max_samples, options.batch_size, *counts) < 1:
        raise UserError(
            "--max-samples, --batch-size, --steps, --starts and --horizons must be at least 1"
        )
    for name in ("examples", "films"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} is {getattr(options, name)}: must be at least 0")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = load_checkpoint(options.checkpoint, device=device, weights=options.weights)
    sources = sources_of(options.data, config)
    split = open_sources(sources, options.split, verify="sizes")
    refuse_another_tokenizer(config, split.manifest)
    about = {
        "checkpoint": str(options.checkpoint),
        "weights": options.weights,
        "data": [str(manifest) for manifest, _ in sources],
    }
    about |= provenance(arguments=list(arguments) if arguments else None)
    folder = options.output or options.checkpoint
    if is_task(split.manifest):
        from ebwm_scale.reporting.solving_page import write_solving

        other = None
        if options.against is not None:
            other_model, other_config = load_checkpoint(options.against, device=device)
            refuse_another_tokenizer(other_config, split.manifest)
            other = Other(other_model, other_config, str(options.against))
        with progress_on_console() as progress:
            solving = evaluate_solving(
                model,
                config,
                split,
                max_samples=options.max_samples,
                batch_size=options.batch_size,
                steps=options.steps,
                tolerance=options.tolerance,
                settled=options.settled,
                other=other,
                num_examples=options.examples,
                progress=progress,
            )
        say(str(write_solving(folder, about | solving)))
        return EXIT_FINISHED
    if options.against is not None and not is_world(split.manifest):
        raise UserError(
            f"--against {options.against}: only tasks with one right answer and worlds are "
            "compared between runs, and this dataset has none; leave it out"
        )
    texts = out_of_distribution_texts(
        options.out_of_distribution,
        split.manifest,
        context_length_of(config),
        options.max_samples,
    )
    with progress_on_console() as progress:
        result = evaluate(
            model,
            config,
            split,
            max_samples=options.max_samples,
            batch_size=options.batch_size,
            steps=options.steps,
            starts=options.starts,
            tolerance=options.tolerance,
            texts=texts,
            say=say,
            progress=progress,
        )
    say(str(write_evaluation(folder, about | result)))
    if is_world(split.manifest):
        from ebwm_scale.reporting.imagination_page import write_imagination

        imagination, futures = imagined(model, config, split, options)
        say(str(write_imagination(folder, about | imagination, futures)))
    return EXIT_FINISHED


def is_world(manifest: Manifest) -> bool:
    """Whether a dataset is of frames in patches, of conditioned frames, or of whole episodes."""
    content = manifest.content
    if not isinstance(content, VideoContent):
        return False
    return bool(content.conditions or content.grid or episodes_of(manifest))


def imagined(model, config: Config, split, options) -> tuple[dict[str, Any], list]:
    """The content of imagination.json but for where it comes from, and futures to be shown."""
    from ebwm_scale.evaluation.imagination import evaluate_imagination
    from ebwm_scale.evaluation.shown_futures import shown_futures

    against = None
    if options.against is not None:
        against, _ = load_checkpoint(options.against, device=str(next(model.parameters()).device))
    if isinstance(split, MixedSplit):
        split = split.parts[0]
    with progress_on_console() as progress:
        result = evaluate_imagination(
            model,
            split,
            horizons=options.horizons,
            max_windows=options.max_samples,
            batch_size=options.batch_size,
            seed=config.train.seed,
            against=against,
            say=say,
            progress=progress,
        )
    futures = []
    if options.films and importlib.util.find_spec("PIL") is None:
        say("no films: pillow is not installed (pip install pillow)")
    elif options.films:
        models = {"model": model} if against is None else {"model": model, "against": against}
        num_steps = result["horizons"][-1]
        seed = config.train.seed
        futures = shown_futures(models, split, count=options.films, num_steps=num_steps, seed=seed)
    return {"against": None if options.against is None else str(options.against), **result}, futures


def sources_of(manifest: str | None, config: Config) -> list[tuple[str, float]]:
    """(manifest, weight) of what is evaluated: the one that is named, or what the run was trained
    on.
    """
    if manifest:
        return [(manifest, 1.0)]
    if config.data.sources:
        return [(source.manifest, source.weight) for source in config.data.sources]
    if config.data.manifest is None:
        raise UserError("the run names no dataset: name one with --data")
    return [(config.data.manifest, 1.0)]


def write_evaluation(folder: Path, result: dict[str, Any]) -> Path:
    """evaluation.json and the page beside it, whose path is returned."""
    from ebwm_scale.reporting.evaluation_page import render
    from ebwm_scale.reporting.result_pages import write_result

    return write_result(folder, "evaluation", result, render)


def out_of_distribution_texts(
    paths: Sequence[Path], manifest, length: int, most: int
) -> dict[str, Tensor]:
    """{path: token ids (n, length + 1)}, n at most `most` sequences spread over the file.

    Raises UserError for a file that cannot be read or is too short.
    """
    if paths and manifest.modality != "text":
        raise UserError(
            f"--out-of-distribution takes texts, and this is a model of {manifest.modality}: "
            "leave it out"
        )
    from ebwm_scale.data.tokenizer import open_tokenizer

    texts: dict[str, Tensor] = {}
    if not paths:
        return texts
    content = manifest.content
    tokenizer = open_tokenizer(content.tokenizer_path, eos_id=content.eos_id)
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            ids = torch.tensor(tokenizer.encode(text))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--out-of-distribution {path}: cannot be read as UTF-8 text: {error}"
            ) from None
        if len(ids) <= length:
            raise UserError(
                f"--out-of-distribution {path}: {len(ids)} tokens, and one sequence of this model "
                f"takes {length + 1}: give a longer text"
            )
        sequences = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
        texts[str(path)] = sequences[
            torch.linspace(0, len(sequences) - 1, min(most, len(sequences))).round().long()
        ]
    return texts


if __name__ == "__main__":
    sys.exit(main())
