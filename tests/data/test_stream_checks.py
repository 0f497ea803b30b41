"""No damaged sample of a stream is trained on where it has an index, and none ends a run."""

import json
import random
import shutil
from dataclasses import asdict

import pytest
from test_streaming import rows, shards_of, stream, take

from ebwm_scale.config.schema import Config
from ebwm_scale.data.format.content import decode_sample
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.quarantine import Quarantine
from ebwm_scale.data.loading.stream_checks import shard_name

SHARD = "train-000001.tar"
HEADER_BYTES, ROW = 128, 5


def place(dataset):
    """(offset, size) of a sample of the second shard."""
    index = json.loads((dataset.parent / "train-000001.index.json").read_text())
    field = index["fields"]["tokens.npy"]
    return field["offsets"][ROW], field["sizes"][ROW]


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def foreign(dataset, folder, *, indexes):
    """The same shards under names that the manifest does not know, with or without their indexes
    beside them.
    """
    folder.mkdir()
    urls = []
    for number, shard in enumerate(shards_of(dataset)):
        target = folder / f"other-{number}.tar"
        shutil.copy(shard, target)
        urls.append(str(target))
        if indexes:
            values = json.loads((dataset.parent / f"train-{number:06d}.index.json").read_text())
            text = json.dumps(values | {"shard": target.name})
            target.with_suffix(".index.json").write_text(text)
    return urls


def test_every_flipped_bit_of_a_header_is_one_line_and_nothing_else(pristine):
    manifest, split = load_manifest(pristine), open_split(pristine, "train", verify="sizes")
    whole = split.read_fields(0)["tokens.npy"]
    for bit in range(8 * HEADER_BYTES):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError) as error:
            decode_sample(manifest.content, {"tokens.npy": bytes(content)}, manifest.block_length)
        assert "\n" not in str(error.value), bit


def test_random_headers_are_one_line_and_nothing_else(pristine):
    manifest, draw = load_manifest(pristine), random.Random(0)
    letters = b"{}()[]'\",.:<>|=+-*/ 0123456789ufiOSVMtrueFalsedescrshape\0\n\xff"
    hostile = [b"(" * 117, b"-" * 117, b"[" * 117, b"", b"__import__('os').getcwd()", b"\0" * 110]
    dtypes = ["|O", "<U0", "|V0", "zzz", ">u2", "<M8[ns]", "<u2" * 30, "u2,u2"]
    shapes = ["-1,", f"{2**70},", "True,", "17L,", "0,", "017,", "17", "9" * 60, "-1, -17"]
    described = [(dtype, "17,") for dtype in dtypes] + [("<u2", shape) for shape in shapes]
    hostile += [
        f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}".encode()
        for dtype, shape in described
    ]
    hostile += [bytes(draw.choices(letters, k=draw.randint(0, 200))) for _ in range(2000)]
    for text in hostile:
        header = text.ljust(117) + b"\n"
        for start in (b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little"), b"\x93NUMPY", b""):
            content = {"tokens.npy": start + header + bytes(34)}
            with pytest.raises(ValueError) as error:
                decode_sample(manifest.content, content, manifest.block_length)
            assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_decoder_that_fails_in_any_way_is_a_bad_sample(pristine):
    class Failing:
        def decode(self, fields, block_length):
            raise fields["error"]

    for error in (OverflowError("a\nb"), MemoryError(), IndexError(3), RecursionError("deep")):
        with pytest.raises(ValueError, match=type(error).__name__) as raised:
            decode_sample(Failing(), {"error": error}, 17)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["listed", "listed, by a command", "an index beside it"])
@pytest.mark.multiprocess
def test_no_flipped_bit_of_a_sample_is_trained_on_where_there_is_an_index(dataset, tmp_path, kind):
    split, draw = open_split(dataset, "train", verify="sizes"), random.Random(0)
    sound = {tuple(split.read(i).tolist()) for i in range(len(split))}
    urls = shards_of(dataset)
    if kind == "an index beside it":
        urls = foreign(dataset, tmp_path / "foreign", indexes=True)
    damaged = (
        split.manifest.folder / SHARD if "listed" in kind else tmp_path / "foreign/other-1.tar"
    )
    offset, size = place(dataset)
    whole = damaged.read_bytes()
    for byte in [*draw.sample(range(HEADER_BYTES), 6), *draw.sample(range(HEADER_BYTES, size), 6)]:
        flip(damaged, 8 * (offset + byte) + draw.randrange(8))
        loader = stream(
            dataset, [f"pipe:cat {u}" if "command" in kind else u for u in urls], buffer=1
        )
        assert set(rows(take(loader, len(split)))) <= sound
        assert [(bad.key, bad.offset) for bad in loader.found][:1] == [("train-000000025", offset)]
        assert "the index says" in loader.found[0].reason and "damaged" in loader.found[0].reason
        damaged.write_bytes(whole)


def test_a_damaged_header_is_found_also_where_there_is_no_index_and_that_is_said_once(
    dataset, tmp_path
):
    urls, said = foreign(dataset, tmp_path / "foreign", indexes=False), []
    offset, _ = place(dataset)
    flip(tmp_path / "foreign/other-1.tar", 8 * (offset + 30))
    loader = stream(dataset, urls, buffer=1, report=said.append)
    take(loader, 2 * len(open_split(dataset, "train", verify="sizes")) - 2)
    assert {bad.key for bad in loader.found} == {"train-000000025"}
    assert len(said) == 1 and "its samples have no checksums" in said[0]


def test_a_damaged_index_is_a_damaged_shard_not_one_without_checksums(dataset):
    flip(dataset.parent / "train-000001.index.json", 800)
    loader = stream(dataset, buffer=1)
    take(loader, len(open_split(dataset, "train", verify="sizes")))
    assert loader.found and all("sha256 of the index" in bad.reason for bad in loader.found)


@pytest.mark.multiprocess
def test_addresses_are_written_down_without_their_secrets(dataset, tmp_path, open_run_folder):
    command = "pipe:false 's3://me:hunter2@bucket/a.tar?sig=hunter2'"
    loader = stream(dataset, [command, *shards_of(dataset)], buffer=1)
    take(loader, len(open_split(dataset, "train", verify="sizes")))
    assert loader.found and "hunter2" not in json.dumps([asdict(bad) for bad in loader.found])
    folder = open_run_folder(tmp_path, Config())
    Quarantine(tmp_path, limit=9, write=folder.quarantine).add(loader.found)
    text = (tmp_path / "quarantine.jsonl").read_text()
    assert "hunter2" not in text and "s3://***@bucket/a.tar?sig=***" in text


@pytest.mark.parametrize(
    "url, name",
    [
        ("/data/train-000000.tar", "train-000000.tar"),
        ("s3://me:x@b/train-000000.tar?sig=1", "train-000000.tar"),
        ("pipe:aws s3 cp s3://b/train-000003.tar -", "train-000003.tar"),
        ("pipe:zstd -dc 'a/train-000003.tar.zst'", "train-000003.tar"),
        ("pipe:cat a.tar b.tar", None),
        ("pipe:true", None),
        ("https://host/download?id=3", None),
    ],
)
def test_the_shard_that_an_address_names(url, name):
    assert shard_name(url) == name
