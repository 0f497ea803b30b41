"""Raw text trained on as it is, beside the same text as prepared shards: blocks per second of each
loader, and the time that preparing takes.
"""

from __future__ import annotations

import json
import statistics
import sysconfig
import time
from itertools import islice
from pathlib import Path
from typing import Any

from ebwm_scale.config.schema import Config
from ebwm_scale.data.format.manifest import Manifest, load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.batches import BatchLoader
from ebwm_scale.data.loading.streaming import StreamLoader
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.prepare.tokenizer import train_tokenizer
from ebwm_scale.data.text_stream.loader import TextStreamLoader
from ebwm_scale.data.text_stream.strands import open_text_stream

BATCH = 16
CONTEXT_LENGTH = 256
VOCABULARY_SIZE = 4096
FILES = 8


def measure_raw_text(folder: Path, *, megabytes: float, seconds: float, repeats: int) -> dict:
    """Medians over the repeats, loaders in turns; every reading starts a loader anew."""
    corpus = write_corpus(folder / "corpus", megabytes)
    tokenizer = folder / "tokenizer.model"
    train_tokenizer([corpus[0]], tokenizer, VOCABULARY_SIZE)
    start = time.perf_counter()
    manifest = load_manifest(
        make_text_dataset(
            corpus,
            folder / "prepared",
            tokenizer=tokenizer,
            context_length=CONTEXT_LENGTH,
            report=lambda line: None,
        )
    )
    prepared_s = time.perf_counter() - start
    kinds = {
        "prepared, 0 workers": lambda: prepared_loader(manifest, 0),
        "prepared, 2 workers": lambda: prepared_loader(manifest, 2),
        "streamed shards": lambda: shard_stream(manifest),
        "raw text, 0 workers": lambda: raw_text(manifest, corpus, 0),
        "raw text, 2 workers": lambda: raw_text(manifest, corpus, 2),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, make in kinds.items():
            rates[name].append(measured(make(), seconds / repeats))
    size = sum(path.stat().st_size for path in corpus)
    split = manifest.splits["train"]
    bytes_per_token = split.facts["num_text_bytes"] / split.num_targets
    row: dict[str, Any] = {
        "dataset": "raw text",
        "input_mb": round(size / 1e6, 2),
        "context_length": CONTEXT_LENGTH,
        "vocabulary_size": VOCABULARY_SIZE,
        "bytes_per_token": round(bytes_per_token, 3),
        "preparing_s": round(prepared_s, 2),
    }
    for name, values in rates.items():
        blocks = statistics.median(wall for wall, _ in values)
        row[name] = {
            "blocks_per_s": round(blocks, 1),
            "tokens_per_s": round(blocks * CONTEXT_LENGTH),
            "text_mb_per_s": round(blocks * CONTEXT_LENGTH * bytes_per_token / 1e6, 2),
        }
        if "2 workers" not in name:  # whose time is not this process's
            row[name]["blocks_per_cpu_s"] = round(statistics.median(cpu for _, cpu in values), 1)
    return row


def write_corpus(folder: Path, megabytes: float) -> list[Path]:
    """This environment's Python sources, a file's text a record, in files of lines."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.jsonl" for number in range(FILES)]
    files = [path.open("w", encoding="utf-8") for path in paths]
    size = 0
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    for number, source in enumerate(sources):
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        files[number % FILES].write(json.dumps({"text": text}) + "\n")
        size += len(text)
        if size > megabytes * 1e6:
            break
    for file in files:
        file.close()
    return paths


def common() -> dict[str, Any]:
    return {
        "context_length": CONTEXT_LENGTH,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH,
        "rank": 0,
        "world_size": 1,
    }


def prepared_loader(manifest: Manifest, workers: int) -> BatchLoader:
    split = open_split(manifest.path, "train", verify="sizes")
    return BatchLoader(split, seed=0, window_shards=4, num_workers=workers, **common())


def shard_stream(manifest: Manifest) -> StreamLoader:
    shards = [str(manifest.folder / shard.path) for shard in manifest.splits["train"].shards]
    return StreamLoader(shards, manifest, seed=0, buffer=1000, **common())


def raw_text(manifest: Manifest, corpus: list[Path], workers: int) -> TextStreamLoader:
    config = Config()
    # Short windows: what the first batches tokenise ahead must not be what is measured.
    data = config.data.replace(
        stream=tuple(map(str, corpus)), stream_format="text", stream_buffer=BATCH
    )
    train = config.train.replace(global_batch_size=BATCH)
    stream = open_text_stream(config.replace(data=data, train=train), manifest, world_size=1)
    return TextStreamLoader(stream, manifest, num_workers=workers, **common())


def measured(loader: Any, seconds: float) -> tuple[float, float]:
    """Blocks per second that passed, and per second of this process's time on a core.

    From the second batch on: the first waits for what a loader opens.
    """
    list(islice(loader, 2))
    start, used = time.perf_counter(), time.process_time()
    count = 0
    while (passed := time.perf_counter() - start) < seconds:
        next(loader)
        count += 1
    used = time.process_time() - used
    loader.close()
    return BATCH * count / passed, BATCH * count / max(used, 1e-9)
