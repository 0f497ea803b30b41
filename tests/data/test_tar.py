import io
import random
import tarfile
import time

import pytest

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format import tar as tar_module
from ebwm_scale.data.format.tar import samples, walk


def archive(members, *, format=tarfile.USTAR_FORMAT):
    """members: (name, content) or a TarInfo with content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


SAMPLES = [
    (f"{i:03d}.{field}", bytes([i]) * (700 + i)) for i in range(4) for field in ("a.npy", "b.json")
]


def read(content):
    """([complete samples], error or None)."""
    got = []
    try:
        for key, fields in samples(io.BytesIO(content), "shard.tar"):
            got.append((key, {name: member.content for name, member in fields.items()}))
    except DataError as error:
        assert "\n" not in str(error) and "shard.tar" in str(error)
        return got, str(error)
    return got, None


def test_a_sound_archive_gives_its_samples_and_their_offsets():
    content = archive(SAMPLES)
    got, error = read(content)
    assert error is None and [key for key, _ in got] == ["000", "001", "002", "003"]
    assert got[2][1] == {"a.npy": bytes([2]) * 702, "b.json": bytes([2]) * 702}
    for member in walk(io.BytesIO(content), "x"):
        assert content[member.offset : member.offset + len(member.content)] == member.content


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_as_tarfile_reads_them(format):
    name = "folder/" + "ä" * 120 + ".npy"
    info = tarfile.TarInfo(name)
    info.mtime = 1.5  # PAX writes a record for it
    got = list(walk(io.BytesIO(archive([(info, b"x"), ("plain.npy", b"y")], format=format)), "x"))
    assert [f"{m.key}.{m.field}" for m in got] == [name, "plain.npy"]


def test_an_archive_cut_anywhere_is_an_error_and_gives_no_sample_by_half():
    content = archive(SAMPLES)
    whole, _ = read(content)
    sound_end = 4 * 2 * (512 + 1024)
    for length in [*range(0, sound_end, 256), sound_end, sound_end + 512]:
        got, error = read(content[:length])
        assert error is not None and "cut off" in error and got == whole[: len(got)], length
    assert (
        len(read(content[:sound_end])[0]) == 3
    )  # without an end mark, the last sample is not known to be whole


@pytest.mark.parametrize("member", range(8))
def test_a_corrupt_header_is_an_error(member):
    content = bytearray(archive(SAMPLES))
    content[member * 1536 + 10] ^= 1
    got, error = read(bytes(content))
    assert "no tar header" in error and got == read(archive(SAMPLES))[0][: len(got)]
    assert len(got) == max(0, (member - 1) // 2 if member % 2 == 0 else member // 2)


HOSTILE = {
    "absolute path": ([("/etc/passwd.npy", b"x")], "leads out of the archive"),
    "path upwards": ([("a/../../x.npy", b"x")], "leads out of the archive"),
    "symbolic link": (
        [(special("x.npy", tarfile.SYMTYPE, "/etc/passwd"), b"")],
        "link or a device",
    ),
    "hard link": (
        [("y.npy", b"1"), (special("x.npy", tarfile.LNKTYPE, "y.npy"), b"")],
        "link or a device",
    ),
    "device": ([(special("x.npy", tarfile.CHRTYPE), b"")], "link or a device"),
    "named twice": ([("x.npy", b"1"), ("x.npy", b"2")], "is there twice"),
    "same sample again": ([("x.a", b"1"), ("y.a", b"1"), ("x.b", b"2")], "appears a second time"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_with_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members, expected = HOSTILE[name]
    got, error = read(archive(members))
    assert expected in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [10 * 2**30, 2**29])
def test_a_claimed_size_beyond_the_archive_allocates_nothing(size):
    import resource

    info = tarfile.TarInfo("x.npy")
    info.size = size
    content = info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got, error = read(content)
    assert got == [] and ("claims" in error or "cut off" in error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_a_pipe_that_hands_out_little_at_a_time_is_read_whole():
    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 100))

    assert [key for key, _ in samples(Slow(archive(SAMPLES)), "x")] == ["000", "001", "002", "003"]


def extended(kind, content, after=b""):
    """A header of its own (pax, a long name) with this content, then a member."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(content)
    padding = b"\0" * (-len(content) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + content + padding + (after or archive([("m.a", b"1")]))


def record(key, value):
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


PAX = tarfile.XHDTYPE
HOSTILE_HEADERS = {
    "a length that is no number": extended(PAX, b"1x path=a.b\n"),
    "a length with underscores": extended(PAX, b"1_2 path=ab\n"),
    "a length with a sign": extended(PAX, b"+12 path=ab\n"),
    "a length of nothing": extended(PAX, b"0 path=a.b\n"),
    "a length beyond the header": extended(PAX, b"99 path=a.b\n"),
    "a length of ten thousand digits": extended(PAX, b"9" * 10**4 + b" path=a.b\n"),
    "no space at all": extended(PAX, b"12path=a.b\n"),
    "no key": extended(PAX, b"6 =ab\n"),
    "no value": extended(PAX, b"7 path\n"),
    "no line end": extended(PAX, b"12 path=a.bc"),
    "bytes that are no text": extended(PAX, b"9 \xff\xfe=ab\n"),
    "a negative size": extended(PAX, record("size", "-1")),
    "a size with a point": extended(PAX, record("size", "1.0")),
    "a size beyond all": extended(PAX, record("size", str(2**62))),
    "a size of many digits": extended(PAX, record("size", "9" * 5000)),
    "a file with holes": extended(PAX, record("GNU.sparse.major", "1")),
    "a path upwards": extended(PAX, record("path", "../../m.a")),
    "a path with a line break": extended(PAX, record("path", "m\nquarantined: nothing.a")),
    "a long path upwards": extended(tarfile.GNUTYPE_LONGNAME, b"/" + b"x" * 10**5 + b"\0"),
    "a long link": extended(tarfile.GNUTYPE_LONGLINK, b"x" * 200 + b"\0"),
    "a name with escapes": archive([("m\x1b[31m.a", b"1")]),
    "many records": extended(PAX, record("k", "v") * (24 * 2**20 // 7)),
    "a long name of megabytes": extended(tarfile.GNUTYPE_LONGNAME, b"x" * (30 * 2**20)),
    "global records of megabytes": extended(tarfile.XGLTYPE, record("k", "v") * 2**20),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_a_hostile_header_is_one_short_line_in_bounded_time(name):
    start = time.monotonic()
    got, error = read(HOSTILE_HEADERS[name])
    assert got == [] and error is not None and len(error) < 300
    assert all(letter.isprintable() for letter in error)
    assert time.monotonic() - start < 5


def test_a_large_header_of_many_records_is_read_in_linear_time():
    content = extended(PAX, record("k", "v") * (2**20 // 7 - 10) + record("path", "n.b"))
    start = time.monotonic()
    assert read(content) == ([("n", {"b": b"1"})], None)
    assert time.monotonic() - start < 5


def test_the_members_of_a_sample_have_a_common_limit(monkeypatch):
    monkeypatch.setattr(tar_module, "MAX_MEMBER_BYTES", 1000)
    got, error = read(archive([("a.x", b"1" * 900), ("b.x", b"1" * 900), ("b.y", b"1" * 900)]))
    assert [key for key, _ in got] == ["a"] and "has more than 1000 bytes" in error


def test_random_changes_of_headers_are_whole_samples_or_one_line():
    draw = random.Random(0)
    long_name = tarfile.TarInfo("d/" + "n" * 120 + ".npy")
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        content = archive([("a.npy", b"1"), (long_name, b"2"), ("b.npy", b"3")], format=format)
        for _ in range(1500):
            changed = bytearray(content)
            for _ in range(draw.randint(1, 5)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            for at in range(0, len(changed), 512) if draw.random() < 0.7 else ():
                block = changed[at : at + 512]
                if block[257:262] == b"ustar":  # so that what is after the checksum is reached
                    total = 256 + sum(block[:148]) + sum(block[156:])
                    changed[at + 148 : at + 156] = b"%06o\0 " % total
            read(bytes(changed))
