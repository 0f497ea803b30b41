"""Documents -> blocks of tokens -> a dataset folder.

documents of a split      [ a a a ] [ b b ] [ c c c c c ] ...   in the split's shuffled order
stream                      a a a E   b b E   c c c c c E ...   E: end of sequence
blocks, context L = 4      [a a a E b]
                                   [b b E c c]
                                           [c c c c E] ...

E is a target like any other. Neighbouring blocks share one token, block i = stream[i L : i L + L +
1], so each token is a target exactly once. The tokens after the last full block are dropped and
counted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.data.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SplitInfo,
    already_there,
    load_manifest,
)
from ebwm_scale.data.format.writer import (
    DATASET_FILES,
    ShardWriter,
    refuse_foreign_files,
    staged_folder,
    write_manifest,
)
from ebwm_scale.data.prepare.documents import (
    Document,
    Report,
    digest_of,
    find_documents,
    split_documents,
)
from ebwm_scale.data.tokenizer import Tokenizer

_OURS = (*DATASET_FILES, "tokenizer.model")
_BATCH_CHARACTERS = 2**20  # text tokenised at a time


class Packer:
    """Cuts a stream of tokens into overlapping blocks of context_length + 1, and counts targets."""

    def __init__(self, *, context_length: int, vocabulary_size: int):
        self.context_length = context_length
        self.dtype = np.dtype("<u2" if vocabulary_size < 65536 else "<u4")
        self.counts = np.zeros(vocabulary_size, dtype=np.int64)  # of the targets in full blocks
        self.num_tokens = 0  # given in
        self._rest = np.empty(0, dtype=self.dtype)

    def blocks(self, pieces: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
        """Blocks (context_length + 1,) of the pieces' concatenation; the rest is left over."""
        length = self.context_length
        for piece in pieces:
            self.num_tokens += len(piece)
            stream = np.concatenate([self._rest, np.asarray(piece, dtype=self.dtype)])
            num_blocks = max(len(stream) - 1, 0) // length
            self.counts += np.bincount(
                stream[1 : num_blocks * length + 1], minlength=len(self.counts)
            )
            for i in range(num_blocks):
                yield stream[i * length : i * length + length + 1]
            self._rest = stream[num_blocks * length :]

    @property
    def num_dropped(self) -> int:
        """Tokens that are no target of any block, except the very first of the stream."""
        return max(len(self._rest) - 1, 0)

    def unigram_entropy(self) -> float:
        """Entropy of the targets under their own frequencies, in nats per token."""
        p = self.counts[self.counts > 0] / self.counts.sum()
        return float(-(p * np.log(p)).sum())


def make_text_dataset(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path,
    context_length: int,
    validation_fraction: float = 0.05,
    seed: int = 0,
    samples_per_shard: int = 4096,
    report: Report = print,
    progress: Progress = no_progress,
) -> Path:
    """Split, tokenise, pack and write a dataset folder; returns the path of its manifest.

    A complete dataset of the same documents and settings is kept ("already there"). A half-made or
    damaged one is replaced. A complete one of other documents or settings is refused: nothing is
    deleted behind the user's back. Raises DataError.
    """
    for name, value in (
        ("context length", context_length),
        ("samples per shard", samples_per_shard),
    ):
        if value < 1:
            raise DataError(f"{name} is {value}: must be at least 1")
    output = Path(output).resolve()
    model = Tokenizer(tokenizer)
    documents = find_documents(inputs, report=report)
    splits = split_documents(documents, validation_fraction=validation_fraction, seed=seed)
    refuse_foreign_files(output, ours=_OURS)
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "modality": "text",
        "block_length": context_length + 1,
        "vocabulary_size": model.vocabulary_size,
        "eos_id": model.eos_id,
        "tokenizer": {"path": "tokenizer.model", "sha256": file_sha256(model.path)},
        "source": {
            "inputs": [Path(i).resolve().name for i in inputs],
            "num_documents": len(documents),
            "documents_sha256": digest_of(documents),
        },
        "settings": {
            "validation_fraction": validation_fraction,
            "seed": seed,
            "samples_per_shard": samples_per_shard,
        },
    }
    with staged_folder(output) as staging:
        if already_there(output, values, digest="documents_sha256"):
            shutil.rmtree(staging)
            report(f"already there: {output / MANIFEST_NAME}")
        else:
            shutil.copyfile(model.path, staging / "tokenizer.model")
            values["splits"] = {
                name: _write_split(
                    staging, name, splits[name], model, context_length, samples_per_shard, progress
                )
                for name in splits
            }
            write_manifest(staging, values)
    manifest = load_manifest(output)
    for name, split in manifest.splits.items():
        report(_summary(name, split, context_length))
    return manifest.path


def _write_split(
    folder: Path,
    name: str,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    context_length: int,
    samples_per_shard: int,
    progress: Progress,
) -> dict[str, Any]:
    packer = Packer(context_length=context_length, vocabulary_size=tokenizer.vocabulary_size)
    read = tracked(documents, f"{name}: documents", progress)
    tokens = _TokenStream(read, tokenizer)
    writer = ShardWriter(folder, name, samples_per_shard=samples_per_shard)
    try:
        for block in packer.blocks(tokens):
            writer.add({"tokens.npy": block}, num_targets=context_length)
        shards = writer.close()
    finally:
        writer.abandon()
    if not shards:
        raise DataError(
            f"the {name} split has {packer.num_tokens} tokens in {len(documents)} documents: one "
            f"block of context length {context_length} needs {context_length + 1}; give more text, "
            "a shorter context, or another validation fraction or seed"
        )
    return {
        "shards": shards,
        "num_documents": len(documents),
        "num_samples": writer.num_samples,
        "num_targets": writer.num_samples * context_length,
        "num_dropped_tokens": packer.num_dropped,
        "num_text_bytes": tokens.num_text_bytes,
        "unigram_entropy": packer.unigram_entropy(),
    }


class _TokenStream:
    """The tokens of each document, in parts, with the end-of-sequence id after the last one.

    num_text_bytes: UTF-8 bytes of the documents that were read so far.
    """

    def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer):
        self.documents, self.tokenizer = documents, tokenizer
        self.num_text_bytes = 0
        self._parts: list[str] = []
        self._ends: list[bool] = []  # whether a document ends with this part

    def __iter__(self) -> Iterator[list[int]]:
        num_characters = 0
        for document in self.documents:
            text = document.read()
            self.num_text_bytes += len(text.encode("utf-8"))
            for part in self.tokenizer.parts(text):
                if num_characters >= _BATCH_CHARACTERS:
                    yield from self._encoded()
                    num_characters = 0
                self._parts.append(part)
                self._ends.append(False)
                num_characters += len(part)
            self._ends[-1] = True
        yield from self._encoded()

    def _encoded(self) -> Iterator[list[int]]:
        """The tokens of the parts that wait."""
        ids_of_parts = self.tokenizer.encode_many(self._parts, num_threads=os.cpu_count() or 1)
        for ids, is_end in zip(ids_of_parts, self._ends):
            yield [*ids, self.tokenizer.eos_id] if is_end else ids
        self._parts.clear()
        self._ends.clear()


def _summary(name: str, split: SplitInfo, context_length: int) -> str:
    facts = split.facts
    all_tokens = split.num_targets + facts["num_dropped_tokens"] + 1
    return (
        f"{name}: {facts['num_documents']} documents, {split.num_samples} blocks of "
        f"{context_length} + 1, {split.num_targets} tokens in {len(split.shards)} shards, "
        f"{facts['num_dropped_tokens']} dropped ({facts['num_dropped_tokens'] / all_tokens:.3%}), "
        f"{facts['num_text_bytes'] / all_tokens:.3f} bytes/token, unigram entropy "
        f"{facts['unigram_entropy']:.4f} nats"
    )
