"""Text -> a dataset folder: read and tokenised once on all cores, sorted on disk, packed.

    inputs -> scanning.py -> runs of tokens -> packing.py -> shards -> NAME/

Everything on the way lies in `.NAME.work`, so a killed build goes on where it was, and memory does
not depend on the size of the input. The dataset's bytes depend on neither: they follow from the
texts, the settings and the tokenizer.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.core.progress import Progress, no_progress
from ebwm_scale.core.redaction import redacted
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PACKINGS,
    SplitInfo,
    already_there,
    load_manifest,
)
from ebwm_scale.data.format.writer import (
    DATASET_FILES,
    refuse_foreign_files,
    staged_folder,
    write_manifest,
)
from ebwm_scale.data.prepare.best_fit import BEST_FIT, BestFitSplit
from ebwm_scale.data.prepare.packing import PackedSplit, token_dtype, write_split
from ebwm_scale.data.prepare.reading.readers import TextInput
from ebwm_scale.data.prepare.reading.selection import EVERYTHING, Selection
from ebwm_scale.data.prepare.reading.taking import Document
from ebwm_scale.data.prepare.reading.token_input import TokenDocument, TokenInput
from ebwm_scale.data.prepare.runs import Runs
from ebwm_scale.data.prepare.scanning import Input, Maker, Scan, scan, work_folder
from ebwm_scale.data.prepare.splitting import SPLITS, Place, SplitRule, threshold_of
from ebwm_scale.data.tokenizer import Tokenizer, open_tokenizer
from ebwm_scale.data.walking import Report

_OURS = (*DATASET_FILES, "tokenizer.*")
_BATCH_CHARACTERS = 2**20  # text tokenised at a time
_CHECKED_DOCUMENTS = 8  # of each task, whether they come back from their tokens
_CHECKED_CHARACTERS = 2**14
CONSECUTIVE = "consecutive"
_VERSION = 1  # of what the work folder holds


def make_text_dataset(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path,
    context_length: int,
    validation_fraction: float = 0.05,
    seed: int = 0,
    samples_per_shard: int = 4096,
    selection: Selection = EVERYTHING,
    tokens: str | None = None,
    deduplicate: bool = False,
    without: Sequence[str | Path] = (),
    packing: str = CONSECUTIVE,
    mask_documents: bool | None = None,
    report: Report = print,
    progress: Progress = no_progress,
) -> Path:
    """Split, tokenise, pack and write a dataset folder; returns the path of its manifest.

    A complete dataset of the same documents and settings is kept ("already there"). A half-made or
    damaged one is replaced. A complete one of other documents or settings is refused: nothing is
    deleted behind the user's back. selection: what is taken of records. tokens: the inputs hold ids
    of this tokenizer, "uint16" or "uint32" where their files do not say it. deduplicate: of exact
    copies of a document one is kept. without: inputs whose documents are left out wherever they
    are, such as another source of a mixture, or the texts of a test. packing: consecutive,
    or best_fit, which keeps documents whole where they fit (best_fit.py). mask_documents: runs of
    the dataset mask documents, or do not, unless their configuration says otherwise; None: the
    manifest does not say, and they do not. Raises DataError.
    """
    for name, value in (
        ("context length", context_length),
        ("samples per shard", samples_per_shard),
    ):
        if value < 1:
            raise DataError(f"{name} is {value}: must be at least 1")
    if packing not in PACKINGS:
        raise DataError(f"packing is {packing}: must be one of {', '.join(PACKINGS)}")
    threshold_of(validation_fraction)
    output = Path(output).resolve()
    model = open_tokenizer(tokenizer)
    refuse_foreign_files(output, ours=_OURS)
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "modality": "text",
        "block_length": context_length + 1,
        "vocabulary_size": model.vocabulary_size,
        "eos_id": model.eos_id,
        "tokenizer": _described(model),
        "settings": {
            "validation_fraction": validation_fraction,
            "seed": seed,
            "samples_per_shard": samples_per_shard,
        },
    }
    if packing != CONSECUTIVE:
        values["packing"] = packing
    if mask_documents is not None:
        values["mask_documents"] = mask_documents
    how = TextInput(selection) if tokens is None else TokenInput(model, tokens)
    reading = _Reading(inputs, how, seed, report, progress, deduplicate, without)
    if deduplicate:
        values["settings"]["deduplicate"] = True
    if without:
        values["settings"]["without"] = [Path(i).resolve().name for i in map(str, without)]
    with staged_folder(output) as staging, work_folder(output) as work:
        if (output / MANIFEST_NAME).exists():
            values["source"] = reading.source(reading.digests_only(work))
            if already_there(output, _as_then(output, values), digest="documents_sha256"):
                shutil.rmtree(staging)
                report(f"already there: {output / MANIFEST_NAME}")
                return _summarised(output, context_length, report)
            reading.report = _silent  # what was left out has been said
        found = reading.tokens(work, model)
        values["source"] = reading.source(found)
        lowest, highest = reading.places(found)
        rule = SplitRule.of(validation_fraction, lowest, highest)
        _report_losses(found, model, report)
        (staging / model.file_name).write_bytes(model.file_content())
        values["splits"] = _write_splits(staging, work, values, found.runs, rule, progress)
        write_manifest(staging, values)
    return _summarised(output, context_length, report)


class _Reading:
    """The inputs and how they are read."""

    def __init__(
        self,
        inputs: Sequence[str | Path],
        how: Input,
        seed: int,
        report: Report,
        progress: Progress,
        distinct: bool,
        without: Sequence[str | Path],
    ):
        self.distinct, self.without = distinct, without
        self.inputs, self.how, self.seed = inputs, how, seed
        self.report, self.progress = report, progress
        self.say = report  # of what is left out of the dataset that is written

    def tokens(self, work: Path, model: Tokenizer) -> Scan:
        identity = f"tokens {_VERSION} {model.kind} {model.sha256} {model.eos_id}"
        dtype = token_dtype(model.vocabulary_size)
        return self._scan(work, lambda n: TokenMaker(model, dtype, n), identity, dtype)

    def digests_only(self, work: Path) -> Scan:
        dtype = np.dtype("u1")
        return self._scan(work / "digests", lambda n: NothingMaker(), f"nothing {_VERSION}", dtype)

    def source(self, found: Scan) -> dict[str, Any]:
        """What the manifest says of the inputs."""
        digest = hashlib.sha256()
        num_documents = 0
        for one in found.runs.digests():
            digest.update(b"\n" * bool(num_documents) + one.encode())
            num_documents += 1
        return {
            "inputs": [Path(i).resolve().name for i in map(str, self.inputs)],
            "num_documents": num_documents,
            "documents_sha256": digest.hexdigest(),
        }

    def places(self, found: Scan) -> tuple[Place, Place]:
        """The contents with the extreme draws, of the documents that are given.

        Says how many are not; DataError where none is left.
        """
        if not found.runs.is_selective:
            return found.places()
        given = found.runs.given()
        if given.num_copies:
            self.say(f"ignored: {given.num_copies} further copies of documents")
        if given.num_elsewhere:
            names = ", ".join(printable(redacted(str(i))) for i in self.without)
            self.say(f"ignored: {given.num_elsewhere} documents that are also in {names}")
        if not given.num_documents:
            raise DataError(
                f"all {found.num_documents} documents are left out by --without; give other inputs"
            )
        return given.extremes[0], given.extremes[1]

    def _scan(
        self, work: Path, make: Callable[[int], Maker], identity: str, dtype: np.dtype
    ) -> Scan:
        found = scan(
            self.inputs,
            self.how,
            make,
            work,
            seed=self.seed,
            identity=identity,
            dtype=dtype,
            report=self.report,
            progress=self.progress,
        )
        found.runs.distinct = self.distinct
        if self.without:
            found.runs.without = scan(
                self.without,
                self.how,
                lambda n: NothingMaker(),
                work / "without",
                seed=self.seed,
                identity=f"nothing {_VERSION}",
                dtype=NothingMaker.dtype,
                report=lambda line: self.report(f"--without: {line}"),
                progress=self.progress,
            ).runs
        return found


class TokenMaker:
    """Tokens of each document with the end of sequence behind them; encoded many at a time."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, num_threads: int):
        self.tokenizer, self.dtype, self.num_threads = tokenizer, dtype, num_threads
        self._num_checked = 0
        self._lossy: list[str] = []

    def __call__(self, documents: Iterator[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        waiting: list[tuple[Document, int]] = []  # with the number of its parts
        parts: list[str] = []
        num_characters = 0
        for document in documents:
            if isinstance(document, TokenDocument):
                ids = np.append(document.ids, self.tokenizer.eos_id)
                yield document, ids.astype(self.dtype)
                continue
            own = list(self.tokenizer.parts(document.text))
            waiting.append((document, len(own)))
            parts += own
            num_characters += len(document.text)
            if num_characters >= _BATCH_CHARACTERS:
                yield from self._encoded(waiting, parts)
                waiting, parts, num_characters = [], [], 0
        yield from self._encoded(waiting, parts)

    def facts(self) -> dict[str, Any]:
        return {"num_checked": self._num_checked, "lossy": self._lossy}

    def _encoded(
        self, documents: Iterable[tuple[Document, int]], parts: Sequence[str]
    ) -> Iterator[tuple[Document, np.ndarray]]:
        ids_of_parts = iter(self._ids(parts))
        for document, num_parts in documents:
            ids = [next(ids_of_parts) for _ in range(num_parts)]
            ids.append(np.array([self.tokenizer.eos_id], dtype=self.dtype))
            tokens = np.concatenate(ids)
            self._check(document, tokens)
            yield document, tokens

    def _ids(self, parts: Sequence[str]) -> Iterator[np.ndarray]:
        """The tokens of each part, as small arrays; a batch of parts is encoded at a time."""
        batch: list[str] = []
        num_characters = 0
        for part in parts:
            batch.append(part)
            num_characters += len(part)
            if num_characters >= _BATCH_CHARACTERS:
                yield from self._ids_of_batch(batch)
                batch, num_characters = [], 0
        yield from self._ids_of_batch(batch)

    def _ids_of_batch(self, batch: Sequence[str]) -> Iterator[np.ndarray]:
        for ids in self.tokenizer.encode_many(batch, num_threads=self.num_threads):
            yield np.array(ids, dtype=self.dtype)

    def _check(self, document: Document, tokens: np.ndarray) -> None:
        """Whether a sample of the documents comes back from its tokens."""
        if self._num_checked >= _CHECKED_DOCUMENTS or len(document.text) > _CHECKED_CHARACTERS:
            return
        self._num_checked += 1
        if self.tokenizer.decode(tokens[:-1].tolist()) != document.text:
            self._lossy.append(document.name)


class NothingMaker:
    """No payload: only the documents' digests are wanted."""

    dtype = np.dtype("u1")

    def __call__(self, documents: Iterator[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        nothing = np.empty(0, dtype=self.dtype)
        for document in documents:
            yield document, nothing

    def facts(self) -> dict[str, Any]:
        return {}


def _described(model: Tokenizer) -> dict[str, Any]:
    """The manifest's entry; of SentencePiece models it is what it has always been."""
    entry = {"path": model.file_name, "sha256": model.sha256}
    if model.kind == "sentencepiece":
        return entry
    return {**entry, "kind": model.kind, "lossless": model.is_lossless()}


def _report_losses(found: Scan, model: Tokenizer, report: Report) -> None:
    """Say of a tokenizer that it does not give the texts back."""
    num_checked = sum(facts["num_checked"] for facts in found.facts)
    lossy = [name for facts in found.facts for name in facts["lossy"]]
    if lossy:
        report(
            f"warning: the tokenizer is lossy: {len(lossy)} of {num_checked} documents that were "
            f"tried do not come back from their tokens, the first is {printable(lossy[0])}; bytes "
            "per token and losses per byte are of the texts as they were"
        )
    elif not model.is_lossless():
        report(
            f"note: the tokenizer gave back the {num_checked} documents that were tried, and does "
            "not give back every text (some characters, or runs of spaces)"
        )


def _write_splits(
    staging: Path,
    work: Path,
    values: dict[str, Any],
    runs: Runs,
    rule: SplitRule,
    progress: Progress,
) -> dict[str, Any]:
    """The manifest's entries of both splits, their shards in `staging`."""
    key = hashlib.sha256(canonical_json(values)).hexdigest()[:32]
    shards = work / "shards" / key
    for other in (work / "shards").iterdir() if (work / "shards").is_dir() else ():
        if other.name != key:
            shutil.rmtree(other)
    totals = runs.totals(rule, SPLITS)
    entries = {}
    for name in SPLITS:
        split: PackedSplit = PackedSplit(
            name=name,
            runs=runs,
            rule=rule,
            totals=totals[name],
            context_length=values["block_length"] - 1,
            samples_per_shard=values["settings"]["samples_per_shard"],
            vocabulary_size=values["vocabulary_size"],
        )
        if name == "train" and values.get("packing") == BEST_FIT:
            split = BestFitSplit(
                **vars(split), eos_id=values["eos_id"], seed=values["settings"]["seed"]
            )
        entries[name] = write_split(split, staging, shards, progress=progress)
    return entries


def _as_then(output: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values with which a dataset that is there is compared, absent ones included.

    One from before the manifest said whether documents are masked is kept as it is.
    """
    compared = {**values, "packing": values.get("packing")}
    try:
        known = load_manifest(output).values
    except DataError:
        return compared  # it is made again
    compared.pop("mask_documents", None)
    if "mask_documents" in known:
        compared["mask_documents"] = values.get("mask_documents")
    return compared


def _silent(line: str) -> None:
    """Of a second reading of the same inputs."""


def _summarised(output: Path, context_length: int, report: Report) -> Path:
    manifest = load_manifest(output)
    for name, split in manifest.splits.items():
        report(_summary(name, split, context_length))
    return manifest.path


def _summary(name: str, split: SplitInfo, context_length: int) -> str:
    facts = split.facts
    all_tokens = split.num_targets + facts["num_dropped_tokens"] + 1
    return (
        f"{name}: {facts['num_documents']} documents, {split.num_samples} blocks of "
        f"{context_length} + 1, {split.num_targets} tokens in {len(split.shards)} shards, "
        f"{facts['num_dropped_tokens']} dropped ({facts['num_dropped_tokens'] / all_tokens:.3%}), "
        f"{facts['num_text_bytes'] / all_tokens:.3f} bytes/token, unigram entropy "
        f"{facts['unigram_entropy']:.4f} nats{_waste(split, context_length)}"
    )


def _waste(split: SplitInfo, context_length: int) -> str:
    """Of best-fit packing, in words; nothing of another."""
    num_places = split.num_samples * context_length
    if split.num_targets == num_places:
        return ""
    padding = num_places - split.num_targets
    return f"; best fit: {padding} places of padding ({padding / num_places:.3%})"
