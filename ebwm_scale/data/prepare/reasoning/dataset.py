"""Instances of a family -> dataset folders.

    OUTPUT              train, validation, and harder where there is a limit of difficulty
    OUTPUT-larger-N     a validation split of size N, which training never sees: one folder each

A sample is one instance (data/format/scored.py says what lies beside its tokens):

    grid    puzzle, solution                  two groups of rows * columns tokens
    text    </s> puzzle solution </s> </s> .. one token a group, filled up to the longest instance

Which split an instance belongs to is decided by the hash of its identity, and each identity is
there once. So no instance is in two splits. The same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.progress import Progress, no_progress
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    already_there,
)
from ebwm_scale.data.format.scored import MEMBERS
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.format.writer import (
    DATASET_FILES,
    ShardWriter,
    refuse_foreign_files,
    staged_folder,
    write_manifest,
)
from ebwm_scale.data.prepare.reasoning.families import FAMILIES
from ebwm_scale.data.prepare.reasoning.family_checks import check_family, check_instance
from ebwm_scale.data.prepare.reasoning.instance import Draws, Family, Instance
from ebwm_scale.data.prepare.reasoning.surroundings import inside as standing_inside
from ebwm_scale.data.tokenizer import Tokenizer
from ebwm_scale.data.tokenizers.sentence_piece import (
    EOS,
    SentencePieceTokenizer,
    load_sentencepiece,
)
from ebwm_scale.data.walking import Report

HARDER = "harder"
_OURS = (*DATASET_FILES, "tokenizer.model", f"{HARDER}-*.tar", f"{HARDER}-*.index.json")
_VERSION = 1  # of what is drawn for the same arguments
MAX_SIDE = 64  # cells of a square that grids stand in
_FRUITLESS = 5000  # instances drawn one after the other without a new one before giving up
_FIRST_SYMBOL = 2  # token ids: unknown, end, then the symbols, then the space


@dataclass(frozen=True)
class Request:
    """What is to be drawn.

    sizes: drawn evenly; of a family of grids only one, or several inside a common square. counts:
    instances per split. harder_from: instances of this difficulty or more are for the split
    `harder` alone. inside: cells a side of the square that grids stand in.
    """

    family: Family
    sizes: tuple[int, ...]
    counts: dict[str, int]
    harder_from: int | None
    seed: int
    samples_per_shard: int
    inside: int | None = None

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "family": self.family.name,
            "sizes": list(self.sizes),
            "counts": self.counts,
            "harder_from": self.harder_from,
            "seed": self.seed,
            "samples_per_shard": self.samples_per_shard,
        }
        if self.inside is not None:
            settings["inside"] = self.inside
        return settings


def make_reasoning_dataset(
    family: str | Family,
    output: str | Path,
    *,
    sizes: Sequence[int],
    larger: Sequence[int] = (),
    num_train: int,
    num_validation: int,
    harder_from: int | None = None,
    seed: int = 0,
    samples_per_shard: int = 4096,
    inside: int | None = None,
    report: Report = print,
    progress: Progress = no_progress,
) -> list[Path]:
    """The manifests of a dataset and of one more per larger size. DataError for what cannot be.

    family: the name of one of ours, or one of your own. Complete datasets of the same arguments are
    kept, as by make_text_dataset: after a change of your own family name another folder.
    inside: cells a side of a square that every grid stands in, those of larger sizes too.
    """
    if isinstance(family, Family):
        chosen = family
    elif family in FAMILIES:
        chosen = FAMILIES[family]
    else:
        raise DataError(f"family is {family}: must be one of {', '.join(FAMILIES)}")
    check_family(chosen)
    _check(chosen, sizes, larger, inside)
    if inside is not None:
        chosen = standing_inside(chosen, inside)
    for name, value, lowest in (
        ("the number of training instances", num_train, 1),
        ("the number of validation instances", num_validation, 1),
        ("the number of samples per shard", samples_per_shard, 1),
        ("the difficulty that training never sees", harder_from or 1, 1),
        ("the seed", seed, 0),
    ):
        if value < lowest:
            raise DataError(f"{name} is {value}: must be at least {lowest}")
    output = Path(output).resolve()
    counts = {"train": num_train, "validation": num_validation}
    if harder_from is not None:
        counts[HARDER] = num_validation
    request = Request(chosen, tuple(sizes), counts, harder_from, seed, samples_per_shard, inside)
    manifests = [_make(request, output, report, progress)]
    for size in larger:
        counts = {"validation": num_validation}
        request = Request(chosen, (size,), counts, None, seed, samples_per_shard, inside)
        folder = output.with_name(f"{output.name}-larger-{size}")
        manifests.append(_make(request, folder, report, progress))
    return manifests


def _check(family: Family, sizes: Sequence[int], larger: Sequence[int], inside: int | None) -> None:
    allowed = family.sizes
    for size in (*sizes, *larger):
        if size not in allowed:
            if isinstance(allowed, range):
                expected = f"{allowed[0]} to {allowed[-1]}"
            else:
                expected = ", ".join(map(str, allowed))
            raise DataError(
                f"size {size} of {family.name}: must be {expected} ({family.size_word})"
            )
    if not sizes or len({*sizes, *larger}) < len(sizes) + len(larger):
        raise DataError(
            f"sizes are {list(sizes)}, larger ones {list(larger)}: name at least one size, and "
            "each once"
        )
    if family.grid is not None and len(sizes) > 1 and inside is None:
        raise DataError(
            f"sizes are {list(sizes)}: all grids of a dataset have one size; name one, and others "
            "as larger ones, in datasets of their own, or all inside a square (inside)"
        )
    largest = max((*sizes, *larger))
    if inside is not None and not largest <= inside <= MAX_SIDE:
        raise DataError(
            f"inside is {inside}: must be {largest}, the largest size, to {MAX_SIDE} cells a side"
        )


def _make(request: Request, output: Path, report: Report, progress: Progress) -> Path:
    """One dataset folder; its manifest."""
    refuse_foreign_files(output, ours=_OURS)
    family, size = request.family, max(request.sizes)
    settings = request.settings()
    recipe = hashlib.sha256(canonical_json([_VERSION, settings])).hexdigest()
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "modality": "text",
        "members": list(MEMBERS),
        "source": {"generator": family.name, "version": _VERSION, "recipe_sha256": recipe},
        "settings": settings,
    }
    if family.grid is not None:
        rows, columns = family.grid(size)
        values |= {"grid": [rows, columns], "group_size": rows * columns}
        values["block_length"] = 2 * rows * columns
    else:
        assert family.longest is not None, "a family has grids, or texts of a bounded length"
        values["block_length"] = family.longest(size) + 2
    with staged_folder(output) as staging:
        if already_there(output, values, digest="recipe_sha256"):
            shutil.rmtree(staging)
            report(f"already there: {output / MANIFEST_NAME}")
        else:
            tokenizer = _write_tokenizer(staging / "tokenizer.model", family)
            values |= {
                "vocabulary_size": tokenizer.vocabulary_size,
                "eos_id": tokenizer.eos_id,
                "tokenizer": {"path": tokenizer.path.name, "sha256": file_sha256(tokenizer.path)},
            }
            sample = _SampleMaker(family, values["block_length"], tokenizer)
            values["splits"] = _write_splits(staging, request, sample, progress)
            write_manifest(staging, values)
    manifest = open_manifest(output)
    for name, split in manifest.splits.items():
        mean = split.num_targets / split.num_samples
        report(
            f"{output.name}: {name}: {split.num_samples} instances, {mean:.1f} scored tokens each, "
            f"unigram entropy {split.facts['unigram_entropy']:.4f} nats"
        )
    return manifest.path


def _write_splits(
    folder: Path, request: Request, sample: _SampleMaker, progress: Progress
) -> dict[str, Any]:
    """The manifest's entries of all splits."""
    splits = {
        name: _Split(folder, name, request.samples_per_shard, sample.vocabulary_size)
        for name in request.counts
    }
    total = sum(request.counts.values())
    try:
        for number, (name, instance) in enumerate(drawn(request), start=1):
            splits[name].add(sample(instance))
            progress(f"{request.family.name}: instances", number, total)
        return {name: split.close() for name, split in splits.items()}
    finally:
        for split in splits.values():
            split.writer.abandon()


def drawn(request: Request) -> Iterator[tuple[str, Instance]]:
    """(split, instance) until each split has its number; DataError if there are too few."""
    missing = dict(request.counts)
    seen: set[bytes] = set()
    fruitless = 0
    for number in itertools.count():
        draws = Draws(request.family.name, request.sizes, request.seed, number)
        size = draws.pick(request.sizes)
        instance = request.family.draw(draws, size)
        check_instance(request.family, size, instance)
        digest = hashlib.sha256(f"{request.seed}/{instance.identity}".encode()).digest()[:16]
        name = _split_of(instance, digest, request)
        if digest in seen or not missing.get(name):
            fruitless += 1
            if fruitless == _FRUITLESS:
                raise DataError(
                    f"{request.family.name} of {request.family.size_word} "
                    f"{', '.join(map(str, request.sizes))}: still missing {missing} after "
                    f"{_FRUITLESS} draws without a new one; ask for fewer instances, or for other "
                    "sizes or another limit of difficulty"
                )
            continue
        fruitless = 0
        seen.add(digest)
        missing[name] -= 1
        yield name, instance
        if not any(missing.values()):
            return


def _split_of(instance: Instance, digest: bytes, request: Request) -> str:
    if request.harder_from is not None and instance.difficulty >= request.harder_from:
        return HARDER
    num_train = request.counts.get("train", 0)
    num_both = num_train + request.counts["validation"]
    is_train = int.from_bytes(digest[:8], "big") * num_both < num_train * 2**64
    return "train" if is_train else "validation"


class _SampleMaker:
    """Turns an instance into the fields of a sample."""

    def __init__(self, family: Family, block_length: int, tokenizer: Tokenizer):
        self.is_grid, self.block_length = family.grid is not None, block_length
        self.vocabulary_size, self.eos_id = tokenizer.vocabulary_size, tokenizer.eos_id
        self.ids = {symbol: i for i, symbol in enumerate(family.symbols, start=_FIRST_SYMBOL)}
        self.ids[" "] = _FIRST_SYMBOL + len(family.symbols)
        for symbol, token in self.ids.items():
            assert tokenizer.encode(symbol) == [token], "the tokenizer was made of these symbols"

    def __call__(self, instance: Instance) -> dict[str, np.ndarray]:
        tokens = [self.ids[symbol] for symbol in instance.puzzle + instance.solution]
        scored = [int(mark) for mark in instance.scored]
        if not self.is_grid:
            scored = [0] * len(instance.puzzle) + scored
            tokens = [self.eos_id, *tokens]
            tokens += [self.eos_id] * (self.block_length - len(tokens))
            scored += [0] * (self.block_length - 1 - len(scored))
        return {
            "tokens.npy": np.array(tokens, dtype="<u2"),
            "difficulty.npy": np.array([instance.difficulty], dtype="<u4"),
            "scored.npy": np.array(scored, dtype=np.uint8),
        }


class _Split:
    """One split that is being written, and the sums its manifest entry needs."""

    def __init__(self, folder: Path, name: str, samples_per_shard: int, vocabulary_size: int):
        self.writer = ShardWriter(folder, name, samples_per_shard=samples_per_shard)
        self.counts = np.zeros(vocabulary_size, dtype=np.int64)  # of scored targets
        self.num_tokens = 0

    def add(self, fields: dict[str, np.ndarray]) -> None:
        scored = fields["scored.npy"]
        tokens = fields["tokens.npy"]
        targets = tokens[len(tokens) - len(scored) :][scored == 1]
        self.counts += np.bincount(targets, minlength=len(self.counts))
        self.num_tokens += len(tokens)
        self.writer.add(fields, num_targets=len(targets))

    def close(self) -> dict[str, Any]:
        shards = self.writer.close()
        p = self.counts[self.counts > 0] / self.counts.sum()
        return {
            "shards": shards,
            "num_documents": self.writer.num_samples,
            "num_samples": self.writer.num_samples,
            "num_targets": int(self.counts.sum()),
            "num_dropped_tokens": 0,
            "num_text_bytes": self.num_tokens,  # a symbol is a byte
            "unigram_entropy": float(-(p * np.log(p)).sum()),
        }


def _write_tokenizer(path: Path, family: Family) -> Tokenizer:
    """A tokenizer whose pieces are the family's symbols and the space, one character each."""
    model = io.BytesIO()
    load_sentencepiece().SentencePieceTrainer.train(
        sentence_iterator=iter([" "]),  # SentencePiece wants to learn something
        model_writer=model,
        model_type="char",
        vocab_size=_FIRST_SYMBOL + len(family.symbols) + 1,
        user_defined_symbols=list(family.symbols),
        unk_id=0,
        eos_id=1,
        eos_piece=EOS,
        bos_id=-1,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )  # the file records num_threads
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)
