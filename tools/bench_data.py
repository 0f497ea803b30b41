"""Samples and megabytes per second of reading shards: by the index, and by plain webdataset
streaming of the same files, in the same run.

    python tools/bench_data.py data/text/manifest.json data/frames/manifest.json
        data/embeddings/manifest.json [--seconds 3] [--repeats 3]
    python tools/bench_data.py --synthetic DIR
        makes text blocks, jpeg frames and embeddings first
    python tools/bench_data.py --raw-text DIR [--megabytes 24]
        raw text, tokenised while it is read, beside the same text as prepared shards

One JSON line per dataset. Both readers give decoded samples as NumPy arrays; ours also checks every
sample's CRC-32. Readings alternate, files are in the page cache (each is read once before), and
figures are medians over the repeats. `random` is ours in training order over the whole split;
`workers` the loader with 0 and 2 workers, batches of 16.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
from bench.raw_text import measure_raw_text

from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.writer import ShardWriter, write_manifest
from ebwm_scale.data.loading.batches import BatchLoader


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("manifests", nargs="*", type=Path, metavar="MANIFEST")
    parser.add_argument(
        "--synthetic", type=Path, metavar="DIR", help="make and measure three datasets there"
    )
    parser.add_argument(
        "--raw-text", type=Path, metavar="DIR", help="make and measure raw text there"
    )
    parser.add_argument(
        "--megabytes", type=float, default=24.0, help="of raw text (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each reading (default %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="readings of each kind (default %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="FILE", help="also write a result file"
    )
    arguments = parser.parse_args()
    manifests = arguments.manifests + (
        synthetic(arguments.synthetic) if arguments.synthetic else []
    )
    if not manifests and not arguments.raw_text:
        parser.error("give manifests, --synthetic DIR or --raw-text DIR")
    rows = [measure(manifest, arguments.seconds, arguments.repeats) for manifest in manifests]
    if arguments.raw_text:
        row = measure_raw_text(
            arguments.raw_text,
            megabytes=arguments.megabytes,
            seconds=arguments.seconds,
            repeats=arguments.repeats,
        )
        rows.append(row)
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.output:
        arguments.output.write_text(
            json.dumps(provenance("webdataset", "numpy", "pillow") | {"rows": rows}, indent=1)
            + "\n"
        )
    return 0


def measure(path: Path, seconds: float, repeats: int) -> dict:
    split = open_split(path, "train", verify="sizes")
    content, length = split.manifest.content, split.manifest.block_length
    kind = "text" if split.manifest.modality == "text" else content.stored
    size = sum(shard.size for shard in split.info.shards) / len(
        split
    )  # bytes of a shard per sample
    order = split.order(seed=0, window_shards=4)
    positions = iter(range(10**12))

    def indexed():
        split.read(next(positions) % len(split))

    def shuffled():
        split.read(order.sample(next(positions)))

    streams = {"stream": None}

    def streamed():
        while True:
            if streams["stream"] is None:
                streams["stream"] = webdataset_reader(split, content, length)
            sample = next(streams["stream"], None)
            if sample is not None:
                return
            streams["stream"] = None

    for i in range(min(len(split), 2000)):
        split.read(i)
    kinds = {"indexed": indexed, "random": shuffled, "webdataset": streamed}
    rates = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, read in kinds.items():
            rates[name].append(rate(read, seconds / repeats))
    row = {
        "dataset": kind,
        "samples": len(split),
        "bytes_per_sample": round(size),
        "block_length": length,
    }
    for name in kinds:
        value = statistics.median(rates[name])
        row[name] = {"samples_per_s": round(value, 1), "mb_per_s": round(value * size / 1e6, 2)}
    row["indexed_over_webdataset"] = round(
        statistics.median(a / b for a, b in zip(rates["indexed"], rates["webdataset"])), 2
    )
    row["random_over_webdataset"] = round(
        statistics.median(a / b for a, b in zip(rates["random"], rates["webdataset"])), 2
    )
    row["loader"] = {}
    for workers in (0, 2):
        loader = BatchLoader(
            split,
            context_length=length - 1,
            global_batch_size=16,
            micro_batch_size=16,
            rank=0,
            world_size=1,
            seed=0,
            window_shards=4,
            num_workers=workers,
        )
        list(islice(loader, 8))
        value = 16 * rate(lambda: next(loader), seconds / repeats)
        loader.close()
        row["loader"][f"{workers} workers"] = {
            "samples_per_s": round(value, 1),
            "mb_per_s": round(value * size / 1e6, 2),
        }
    return row


def rate(read, seconds: float) -> float:
    """Calls per second."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        read()
        count += 1
    return count / passed


def webdataset_reader(split, content, length: int):
    """Plain webdataset over the same shards, decoded by the same functions, so that only the
    reading differs.
    """
    import webdataset

    urls = [str(split.manifest.folder / shard.path) for shard in split.info.shards]
    names = content.fields(length)
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        yield content.decode({name: sample[name] for name in names}, length)


def synthetic(folder: Path) -> list[Path]:
    """Three datasets: text blocks of 256 + 1 tokens, 16 + 1 jpeg frames of 224 x 224, and 16 + 1
    embeddings of 3136 numbers.
    """
    from ebwm_scale.data.format.content import encode_image, field_names

    generator, paths = np.random.default_rng(0), []
    smooth = np.kron(generator.integers(0, 255, (32, 14, 14, 3)), np.ones((1, 16, 16, 1))).astype(
        np.uint8
    )
    jpegs = [encode_image(frame, "jpeg", 90) for frame in smooth]
    clip = json.dumps({"video": "synthetic", "start_s": 0.0, "crop": 0}).encode()
    kinds = {
        "text": (
            8192,
            4096,
            257,
            lambda i: {"tokens.npy": generator.integers(0, 32000, 257).astype("<u2")},
        ),
        "jpeg": (
            256,
            64,
            17,
            lambda i: {
                **dict(zip(field_names("jpeg", 17), (jpegs[(i + k) % 32] for k in range(17)))),
                "clip.json": clip,
            },
        ),
        "embedding": (
            1024,
            256,
            17,
            lambda i: {
                "frames.npy": generator.standard_normal((17, 3136)).astype(np.float16),
                "clip.json": clip,
            },
        ),
    }
    for kind, (count, per_shard, length, make) in kinds.items():
        target = folder / kind
        paths.append(target / "manifest.json")
        if paths[-1].exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(target, "train", samples_per_shard=per_shard)
        for i in range(count):
            writer.add(make(i), num_targets=length - 1)
        split = {
            "shards": writer.close(),
            "num_samples": count,
            "num_targets": count * (length - 1),
        }
        common = {"format_version": 2, "block_length": length, "source": {"inputs": ["synthetic"]}}
        if kind == "text":
            (target / "tokenizer.model").write_bytes(b"no tokenizer: the tokens are drawn")
            values = {
                "modality": "text",
                "vocabulary_size": 32000,
                "eos_id": 0,
                "tokenizer": {
                    "path": "tokenizer.model",
                    "sha256": file_sha256(target / "tokenizer.model"),
                },
                "splits": {
                    "train": split
                    | {
                        "num_documents": 1,
                        "num_dropped_tokens": 0,
                        "num_text_bytes": 0,
                        "unigram_entropy": 0.0,
                    }
                },
            }
        else:
            values = {
                "modality": "video",
                "dimension": 3136,
                "encoder": {"name": "pca", "settings": {}},
                "frames": {"stored": kind, "height": 224, "width": 224, "interval_s": 0.25},
                "statistics": {"mean": [0.0] * 3136, "std": [1.0] * 3136},
                "splits": {"train": split | {"num_videos": 1}},
            }
        write_manifest(target, common | values)
        load_manifest(target)
    return paths


if __name__ == "__main__":
    sys.exit(main())
