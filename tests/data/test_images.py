"""Images of samples are jpeg, webp or png of the manifest's size; others are never decoded."""

import io
import os
import resource
import stat
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="the package pillow is not installed")

from ebwm_scale.data.format.content import (  # noqa: E402 (the whole file needs pillow)
    MAX_IMAGE_PIXELS,
    VideoContent,
    decode_image,
    encode_image,
)

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n/x 1 def showpage\n%%EOF\n"
)


def png_of(width, height):
    """A valid black png; takes a few KB whatever its size."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def saved(kind, size=(16, 16)):
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 40, 10)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_jpeg_webp_and_png_are_read(kind):
    frame = decode_image(saved(kind), (16, 16))
    assert frame.shape == (16, 16, 3) and frame.dtype == np.uint8
    assert np.abs(frame.mean((0, 1)) - (200, 40, 10)).max() < 5


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "TGA", "EPS", "PDF", "JPEG2000"])
@pytest.mark.parametrize("size", [None, (16, 16)])
def test_no_other_kind_is_opened(kind, size):
    with pytest.raises(ValueError, match="not a jpeg, webp or png that can be opened"):
        decode_image(saved(kind), size)


def test_an_eps_with_the_name_of_a_frame_starts_no_program(tmp_path):
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    script = (
        "import sys\nfrom ebwm_scale.data.format.content import decode_image\n"
        "try:\n    decode_image(sys.stdin.buffer.read())\n"
        "except ValueError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", script], input=EPS, env=environment, capture_output=True, timeout=60
    )
    assert b"no readable image" in done.stdout and not started.exists()


@pytest.mark.parametrize("size", [None, (16, 16), (13000, 13000)])
def test_a_small_file_of_a_large_image_is_refused_before_it_is_decoded(size):
    content = png_of(13000, 13000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="13000 x 13000"):
        decode_image(content, size)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_a_decompression_bomb_is_one_line():
    with pytest.raises(ValueError, match="no readable image.*decompression bomb"):
        decode_image(png_of(30000, 30000))
    assert decode_image(png_of(64, 4096)).shape == (4096, 64, 3) and MAX_IMAGE_PIXELS >= 64 * 4096


@pytest.mark.parametrize("height, width", [(16, 17), (17, 16), (1, 1), (160, 160)])
def test_a_frame_of_another_size_than_the_manifest_gives_is_named(height, width):
    content = VideoContent("webp", 16, 16, 0.25, 4, "pca", {}, None, None, np.zeros(4), np.ones(4))
    right = encode_image(np.zeros((16, 16, 3), np.uint8), "webp", 90)
    wrong = encode_image(np.zeros((height, width, 3), np.uint8), "webp", 90)
    assert content.decode({"000.webp": right, "001.webp": right}, 2).shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match=f"is {height} x {width}: expected 16 x 16"):
        content.decode({"000.webp": right, "001.webp": wrong}, 2)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_any_damage_is_an_image_or_a_value_error(kind):
    whole = saved(kind, (24, 24))
    generator = np.random.default_rng(0)
    for trial in range(400):
        content = bytearray(whole)
        for at in generator.integers(0, len(content), 1 + trial % 6):
            content[at] = generator.integers(256)
        if trial % 5 == 0:
            del content[int(generator.integers(len(content))) :]
        try:
            assert decode_image(bytes(content), (24, 24)).shape == (24, 24, 3)
        except ValueError as error:
            assert "no readable image" in str(error) and "\n" not in str(error)
