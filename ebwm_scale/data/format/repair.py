"""A dataset without its damaged samples: every sound one, and a word for each that is left out.

    shard as the manifest says      copied
    shard with damage               written anew from its sound samples, keys and order kept
    shard without its index         the same, if its own hash says that it is whole; else left out
    shard that is there twice       left out the second time

What gives the numbers their meaning (tokenizer, encoder, statistics) cannot be mended: with damage
there nothing is written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.data.format import tar
from ebwm_scale.data.format.content import (
    CLIP_FIELD,
    Sample,
    TextContent,
    decode_conditions,
    decode_sample,
)
from ebwm_scale.data.format.episodes import episodes_of, read_episode
from ebwm_scale.data.format.index import REMAKE, load_index
from ebwm_scale.data.format.manifest import MANIFEST_NAME, Manifest, load_manifest
from ebwm_scale.data.format.scored import num_scored
from ebwm_scale.data.format.shard_table import ShardInfo
from ebwm_scale.data.format.shards import SampleError, ShardedSplit
from ebwm_scale.data.format.side_files import side_file_problems
from ebwm_scale.data.format.verify import ShardPlaces, vocabulary_problems
from ebwm_scale.data.format.writer import ShardWriter, staged_folder, write_manifest


@dataclass
class _Tally:
    """What is kept, for the manifest. counts: of text, how often each token is a target."""

    counts: np.ndarray | None = None
    videos: set[str] = field(default_factory=set)
    num_samples: int = 0

    def add(self, sample: Sample, fields: Mapping[str, bytes], manifest: Manifest) -> None:
        self.num_samples += 1
        content = manifest.content
        if isinstance(content, TextContent):
            targets = sample.states[content.group_size :].astype(np.int64)
            counts = np.bincount(targets[targets >= 0], minlength=content.vocabulary_size)
            self.counts = counts if self.counts is None else self.counts + counts
        else:
            self.videos.add(_video_of(fields))

    def join(self, other: _Tally) -> None:
        if other.counts is not None:
            self.counts = other.counts if self.counts is None else self.counts + other.counts
        self.videos |= other.videos
        self.num_samples += other.num_samples


def repair_dataset(
    manifest_path: str | Path,
    output: str | Path,
    *,
    report: Callable[[str], None] = print,
    progress: Progress = no_progress,
) -> Path:
    """Write the sound samples of a dataset into a new folder; the path of its manifest.

    report: is told of each sample that is left out, or of each shard where all of it is. Raises
    DataError, and writes nothing, for a manifest that cannot be read, a damaged tokenizer or
    encoder, a split of which nothing is left, and an output that is there.
    """
    manifest = load_manifest(manifest_path)
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: is there already; name a new folder for the repaired dataset")
    problems = side_file_problems(manifest)
    problems = problems or vocabulary_problems(manifest, tokenizer_is_sound=True)
    if problems:
        raise DataError(
            f"{problems[0]}; this cannot be repaired by leaving samples out: bring back the file "
            "the dataset was made with, or make the dataset again"
        )
    values: dict[str, Any] = {**manifest.values, "splits": {}}
    left_out = {}
    with staged_folder(output) as staging:
        places = ShardPlaces(manifest)
        for name, split in manifest.splits.items():
            entry = _Repair(manifest, name, staging, report).run(places, progress)
            values["splits"][name] = entry
            left_out[name] = split.num_samples - entry["num_samples"]
        if "episodes" in manifest.values:
            entries = _sound_episodes(manifest, staging, report)
            values["episodes"] = {**manifest.values["episodes"], "validation": entries}
        for path in manifest.content.files():
            shutil.copyfile(path, staging / path.name)
        values["repaired"] = {"fingerprint": manifest.fingerprint, "left_out": left_out}
        write_manifest(staging, values)
    return output / MANIFEST_NAME


class _Repair:
    """Of one split: its sound samples are written into `staging`."""

    def __init__(
        self, manifest: Manifest, split: str, staging: Path, report: Callable[[str], None]
    ):
        self.manifest, self.split, self.staging, self.report = manifest, split, staging, report
        self.reader = ShardedSplit(manifest, split)
        self.kept = _Tally()
        self.shards: list[dict[str, Any]] = []

    def run(self, places: ShardPlaces, progress: Progress) -> dict[str, Any]:
        """The split's entry in the manifest; DataError if nothing is left."""
        first_id = 0
        listed = self.manifest.splits[self.split].shards
        for number, shard in enumerate(tracked(listed, f"{self.split}: shards", progress)):
            twice = places.problems(self.split, number, shard)
            if twice:
                self.report(f"{twice[0]}; left out")
            else:
                self._shard(number, shard, first_id)
            first_id += shard.num_samples
        self.reader.close()
        if not self.shards:
            raise DataError(
                f"{self.manifest.path}: nothing of the {self.split} split is sound; make the "
                "dataset again"
            )
        return self._entry()

    def _shard(self, number: int, shard: ShardInfo, first_id: int) -> None:
        path = self.manifest.folder / shard.path
        is_whole = _is_whole(path, shard)
        problems: list[str] = []
        tally = _Tally()
        for _, fields, sample in self._sound(shard, first_id, is_whole, problems.append):
            tally.add(sample, fields, self.manifest)
        if is_whole and not problems and self._has_index(shard):
            self.kept.join(tally)
            self.shards.append(self._copied(shard))
            return
        writer = ShardWriter(
            self.staging, *self._name(number, shard), samples_per_shard=shard.num_samples + 1
        )
        written = _Tally()
        try:
            for key, fields, sample in self._sound(shard, first_id, is_whole, self.report):
                written.add(sample, fields, self.manifest)
                writer.add(fields, num_targets=self._num_targets(sample), key=key)
            self.shards += writer.close()
        finally:
            writer.abandon()
        self.kept.join(written)
        if not problems:
            self.report(f"{path}: damaged outside of its samples: written anew, all are kept")

    def _sound(
        self, shard: ShardInfo, first_id: int, is_whole: bool, say: Callable[[str], None]
    ) -> Iterator[tuple[str, dict[str, bytes], Sample]]:
        """(key, fields, decoded) of each sound sample of a shard; a line for each other one."""
        path = self.manifest.folder / shard.path
        content, length = self.manifest.content, self.manifest.block_length
        keys: set[str] = set()
        try:
            for key, fields in self._read(shard, first_id, is_whole, say):
                try:
                    states = decode_sample(content, fields, length)
                    sample = Sample(states, decode_conditions(content, fields, length))
                    problem = content.problem(states)
                except (KeyError, ValueError) as error:
                    problem = f"has no {error.args[0]}" if isinstance(error, KeyError) else error
                if problem is None and key in keys:
                    problem = "its name is there a second time"
                if problem is not None:
                    say(f"{path}: sample {key}: {problem}; left out")
                    continue
                keys.add(key)
                yield key, fields, sample
        except (DataError, OSError) as error:
            say(f"{error}; its {shard.num_samples - len(keys)} other samples are left out")

    def _read(
        self, shard: ShardInfo, first_id: int, is_whole: bool, say: Callable[[str], None]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, fields) of each sample with its checksum; a line for each other one.

        By the index. Where that is damaged, by the shard itself, if its own hash is right; else
        DataError.
        """
        try:
            index = load_index(self.manifest, shard)
        except DataError:
            if not is_whole:
                raise
            with (self.manifest.folder / shard.path).open("rb") as file:
                for key, members in tar.samples(file, str(self.manifest.folder / shard.path)):
                    yield key, {name: member.content for name, member in members.items()}
            return
        for row, key in enumerate(index.keys):
            try:
                fields = self.reader.read_fields(first_id + row)
            except SampleError as error:
                say(f"{str(error).partition(f'; {REMAKE}')[0]}; left out")
                continue
            yield key, fields

    def _num_targets(self, sample: Sample) -> int:
        content = self.manifest.content
        if content.is_marked:
            return num_scored(sample.states, content.group_size)
        return self.manifest.context_length

    def _has_index(self, shard: ShardInfo) -> bool:
        try:
            load_index(self.manifest, shard)
        except DataError:
            return False
        return True

    def _name(self, number: int, shard: ShardInfo) -> tuple[str, int]:
        """(prefix, number) of a shard that is written anew: its own, or such as nobody has."""
        match = re.fullmatch(r"(.+)-(\d{6,})\.tar", Path(shard.path).name)
        if match is None or (self.staging / Path(shard.path).name).exists():
            return f"{self.split}-repaired", number
        return match[1], int(match[2])

    def _copied(self, shard: ShardInfo) -> dict[str, Any]:
        """The manifest's entry of a sound shard, copied; DataError if the copy is another."""
        for name, expected in ((shard.path, shard.sha256), (shard.index_path, shard.index_sha256)):
            target = self.staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.manifest.folder / name, target)
            if file_sha256(target) != expected:
                raise DataError(f"{target}: the copy is not what was read; check both disks")
        return asdict(shard)

    def _entry(self) -> dict[str, Any]:
        info = self.manifest.splits[self.split]
        num_targets = sum(shard["num_targets"] for shard in self.shards)
        entry: dict[str, Any] = {
            **self.manifest.values["splits"][self.split],
            "shards": self.shards,
            "num_samples": self.kept.num_samples,
            "num_targets": num_targets,
        }
        if self.kept.num_samples == info.num_samples:
            return entry
        if self.kept.counts is None:
            entry["num_videos"] = len(self.kept.videos)
            return entry
        # bytes of text per token stay those of the whole split
        entry["num_dropped_tokens"] += info.num_targets - num_targets
        shares = self.kept.counts[self.kept.counts > 0] / self.kept.counts.sum()
        entry["unigram_entropy"] = float(-(shares * np.log(shares)).sum())
        return entry


def _video_of(fields: Mapping[str, bytes]) -> str:
    """The name of a clip's video; nothing where it does not say."""
    try:
        return str(json.loads(fields[CLIP_FIELD])["video"])
    except (KeyError, TypeError, ValueError):
        return ""


def _is_whole(path: Path, shard: ShardInfo) -> bool:
    """Whether a shard has the bytes that the manifest says."""
    try:
        return file_sha256(path) == shard.sha256
    except OSError:
        return False


def _sound_episodes(
    manifest: Manifest, staging: Path, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The manifest's entries of the held-out episodes that are sound, copied."""
    entries = []
    for info, entry in zip(episodes_of(manifest), manifest.values["episodes"]["validation"]):
        try:
            read_episode(manifest, info)
        except DataError as error:
            report(f"{error}; left out")
            continue
        (staging / info.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(manifest.folder / info.path, staging / info.path)
        entries.append(entry)
    return entries
