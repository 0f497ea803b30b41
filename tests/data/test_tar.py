import io
import tarfile

import pytest

from ebwm_scale.data.tar import samples, walk
from ebwm_scale.errors import DataError


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
    name = "ordner/" + "ä" * 120 + ".npy"
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
