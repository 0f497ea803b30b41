"""A safetensors file is what the format says, or one CheckpointError: nothing is guessed, nothing
is allocated.
"""

import hashlib
import json
import random
import resource
import struct
import time

import pytest
import torch
from safetensors.torch import save_file

from ebwm_scale.checkpoint.model_folder import ModelFolder
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.core.tensor_files import TensorFile


def write(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(**changes):
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


def refused(path):
    with pytest.raises(CheckpointError) as error:
        file = TensorFile(path)
        for name in file.names():
            file.read(name)
    message = str(error.value)
    assert "\n" not in message and len(message) < len(str(path)) + 250
    return message


TWO = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}
MALFORMED = {
    "negative shape": tensor(shape=[-2, -2]),
    "zero times a lot": tensor(shape=[0, 2**70]),
    "shape of fractions": tensor(shape=[4.0]),
    "shape of truths": tensor(shape=[True, 4]),
    "shape of texts": tensor(shape=["4"]),
    "shape is a number": tensor(shape=4),
    "shape is a text": tensor(shape="4"),
    "shape with a list": tensor(shape=[[4]]),
    "shape beyond 64 bits": tensor(shape=[2**80]),
    "a thousand dimensions": tensor(shape=[4] + [1] * 1000),
    "offsets are fractions": tensor(data_offsets=[0.0, 16.0]),
    "one offset": tensor(data_offsets=[16]),
    "three offsets": tensor(data_offsets=[0, 8, 16]),
    "offsets are truths": tensor(data_offsets=[False, 16]),
    "offsets are texts": tensor(data_offsets=["0", "16"]),
    "offsets below zero": tensor(data_offsets=[-8, 8]),
    "offsets the other way": tensor(data_offsets=[16, 0]),
    "offsets are null": tensor(data_offsets=None),
    "offsets beyond the file": tensor(data_offsets=[2**62, 2**62 + 16]),
    "unknown dtype": tensor(dtype="F31"),
    "dtype is a list": tensor(dtype=["F32"]),
    "dtype with a line break": tensor(dtype="F\n32"),
    "another key": tensor(colour=1),
    "an entry is a list": {"a": [1]},
    "an entry is null": {"a": None},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "overlap": {"a": tensor()["a"], "b": tensor()["a"]},
    "half an overlap": {**TWO, "b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}},
    "a gap": {"a": TWO["a"], "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}},
    "the start is left out": {"b": TWO["b"]},
    "the end is left out": {"a": TWO["a"]},
    "header is a list": [tensor()],
    "header is a number": 12345,
    "metadata is a list": {"__metadata__": ["x"], **tensor()},
    "metadata holds numbers": {"__metadata__": {"x": 1}, **tensor()},
    "not JSON": b"{ nope",
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": json.dumps(tensor()).encode("utf-16"),
    "nested": b'{"a":' + b"[" * 10**5,
    "a name twice": b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": 1}',
    "not a number": b'{"a": NaN}',
    "a long number": b'{"a": ' + b"9" * 10**4 + b"}",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_header_is_one_line(tmp_path, name):
    refused(write(tmp_path / "x.safetensors", MALFORMED[name]))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"],
)
def test_a_file_without_a_header_is_one_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path)


def test_files_of_the_library_are_read(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "ids": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"} and set(file.names()) == set(tensors)
    assert all(torch.equal(file.read(name), value) for name, value in tensors.items())


def test_random_changes_are_read_or_refused_and_nothing_else(tmp_path):
    path, draw = tmp_path / "x.safetensors", random.Random(0)
    whole = write(path, {**TWO, "__metadata__": {"format": "pt"}}).read_bytes()
    header = len(whole) - 16
    for bit in range(8 * header):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            for name in (file := TensorFile(path)).names():
                file.read(name)
        except CheckpointError as error:
            assert "\n" not in str(error)
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(header)] = draw.choice(b'0123456789-.e[]{}",:tn \xff')
        path.write_bytes(content)
        try:
            for name in (file := TensorFile(path)).names():
                file.read(name)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_a_large_header_costs_bounded_time_and_memory(tmp_path):
    path, start = tmp_path / "x.safetensors", time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(write(path, b'{"a": [' + b"[]," * (5 * 10**6) + b"1]}"))  # 15 MB
    refused(write(path, b" " * (30 * 2**20)))
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1000 * 1024  # KiB


@pytest.mark.parametrize(
    "facts",
    [
        b"[" * 10**5,
        b'{"files": NaN}',
        b'{"files": [1]}',
        b'{"files": {"model.safetensors": 3}}',
        b'{"files": {"model.safetensors": {"size": "1", "sha256": "0"}}}',
        b'{"files": {"../x": {"size": 1, "sha256": "0"}}}',
        b'{"files": {"a": {"size": 1, "sha256": 3}}}',
    ],
)
def test_a_converted_folder_with_malformed_facts_is_one_line(tmp_path, facts):
    (tmp_path / "conversion.json").write_bytes(facts)
    with pytest.raises(CheckpointError, match="no complete converted model") as error:
        ModelFolder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "index, said",
    [
        (b"[]", "no list of weight files"),
        (b"{", "no list of weight files"),
        (b'{"weight_map": [1]}', "no list of weight files"),
        (b'{"weight_map": {"a": 3}}', "no list of weight files"),
        (b'{"weight_map": {"a": "/x"}}', "names a file outside of it"),
    ],
)
def test_a_converted_folder_with_a_malformed_list_of_weights_is_one_line(tmp_path, index, said):
    name = "model.safetensors.index.json"
    (tmp_path / name).write_bytes(index)
    listed = {name: {"size": len(index), "sha256": hashlib.sha256(index).hexdigest()}}
    facts = {"files": listed, "dtype": "float32"}
    (tmp_path / "conversion.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=said) as error:
        ModelFolder(tmp_path)
    assert "\n" not in str(error.value)
