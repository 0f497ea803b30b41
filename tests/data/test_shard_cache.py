"""Streamed shards are kept on a local disk: whole ones, checked, within the limit, for any number
of processes, whenever one of them is killed.
"""

import contextlib
import errno
import functools
import hashlib
import http.server
import io
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_streaming import rows, shards_of, stream, take

from ebwm_scale.config.load import load_config
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shard_table import ShardInfo
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.shard_cache import ShardCache, _lock

ROOT = Path(__file__).resolve().parents[2]
SIZE = 300_000


def content_of(url):
    return hashlib.sha256(url.encode()).digest() * (SIZE // 32) + bytes(SIZE % 32)


def shard_of(url, digest=None):
    digest = digest or hashlib.sha256(content_of(url)).hexdigest()
    return ShardInfo("a.tar", 1, 1, SIZE, digest, "a.index.json", "")


class Store:
    """A store that counts in a file what is brought from it, over all processes."""

    def __init__(self, folder, slow_s=0.0):
        self.log, self.slow_s = folder / "brought", slow_s
        self.log.touch()

    @contextlib.contextmanager
    def open(self, url):
        with self.log.open("a") as log:
            log.write(f"{url}\n")
        time.sleep(self.slow_s)
        yield io.BytesIO(content_of(url))

    @property
    def brought(self):
        return self.log.read_text().split()


def cache_of(folder, store, limit=10 * SIZE, said=None):
    return ShardCache(folder, limit, store.open, (said if said is not None else []).append)


def read(cache, url, shard=None):
    with cache.open(url, shard or shard_of(url)) as file:
        return file.read()


def urls(count):
    return [f"s3://bucket/{number}.tar" for number in range(count)]


def bytes_in(folder):
    """At a moment at which no other process makes room or takes it; a shard that is renamed
    meanwhile counts once.
    """
    sizes = {}
    with _lock(folder / ".lock", keep=True):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


@pytest.fixture(params=["memory", "http"])
def addresses(request, dataset):
    """Addresses of the shards of a dataset, and what to call to take the store away."""
    import fsspec

    shards = shards_of(dataset)
    names = [os.path.basename(shard) for shard in shards]
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        for shard, name in zip(shards, names):
            memory.pipe(f"/cached/{name}", Path(shard).read_bytes())
        away = functools.partial(memory.rm, "/cached", recursive=True)
        yield [f"memory://cached/{name}" for name in names], away
        return
    pytest.importorskip("aiohttp", reason="fsspec's http:// needs the package aiohttp")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(dataset.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def away():
        server.shutdown()
        server.server_close()

    try:
        yield [f"http://127.0.0.1:{server.server_port}/{name}" for name in names], away
    finally:
        away()


def test_a_second_pass_reads_the_same_samples_without_the_store(addresses, dataset, tmp_path):
    shards, take_away = addresses
    split = open_split(dataset, "train", verify="sizes")
    options = {"cache_folder": str(tmp_path / "cache"), "cache_bytes": 2**30, "buffer": 1}
    expected = rows(take(stream(dataset, shards, buffer=1), len(split)))
    first = stream(dataset, shards, **options)
    assert rows(take(first, len(split))) == expected
    kept = sorted(path.name for path in (tmp_path / "cache").glob("*.tar"))
    hashes = {name.removesuffix(".tar").partition("-")[2] for name in kept}
    assert hashes == {shard.sha256 for shard in load_manifest(dataset).splits["train"].shards}
    assert not list((tmp_path / "cache").glob("*.part"))
    take_away()
    again = stream(dataset, shards, **options)
    assert rows(take(again, len(split))) == expected and again.found == []


def test_the_shards_that_were_not_used_for_longest_leave_first(tmp_path):
    folder, store = tmp_path / "cache", Store(tmp_path)
    cache = cache_of(folder, store, limit=2 * SIZE + 100)
    a, b, c = urls(3)
    for url in (a, b, a, c, a):
        assert read(cache, url) == content_of(url)
        assert bytes_in(folder) <= 2 * SIZE + 100
    assert store.brought == [a, b, c]
    read(cache, b)
    assert store.brought == [a, b, c, b]


def test_a_shard_is_checked_before_it_is_used_and_a_damaged_one_is_brought_again(tmp_path):
    folder, store, said = tmp_path / "cache", Store(tmp_path), []
    cache = cache_of(folder, store, said=said)
    (url,) = urls(1)
    read(cache, url)
    (kept,) = folder.glob("*.tar")
    for damage in (
        lambda content: content[:100] + b"X" + content[101:],
        lambda content: content[:9],
    ):
        kept.write_bytes(damage(kept.read_bytes()))
        assert read(cache, url) == content_of(url)
    assert store.brought == [url] * 3
    (line,) = said
    assert "a shard in it was damaged, and is brought again" in line


def test_what_the_manifest_does_not_name_is_not_kept(tmp_path):
    folder, store, said = tmp_path / "cache", Store(tmp_path), []
    cache = cache_of(folder, store, said=said)
    (url,) = urls(1)
    assert read(cache, url, shard_of(url, digest="0" * 64)) == content_of(url)
    assert not list(folder.glob("*.*")) or [p.name for p in folder.iterdir()] == [".lock"]
    assert said == [f"{url} is not the shard that the manifest names: it is not kept"]


def test_another_content_behind_an_address_is_another_shard(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    url = "memory://versions/a.tar"
    said = []
    cache = ShardCache(tmp_path, 2**30, lambda url: fsspec.open(url, "rb").__enter__(), said.append)
    for content in (b"one", b"two"):
        memory.pipe("/versions/a.tar", content)
        for _ in range(2):
            with cache.open(url, None) as file:
                assert file.read() == content
    assert said == [] and len(list(tmp_path.glob("*.tar"))) == 2


def test_a_shard_larger_than_the_limit_is_streamed_and_that_is_said_once(tmp_path):
    folder, store, said = tmp_path / "cache", Store(tmp_path), []
    cache = cache_of(folder, store, limit=SIZE - 1, said=said)
    for url in urls(3):
        assert read(cache, url) == content_of(url)
    (line,) = said
    assert "a shard of 0.3 MiB does not fit into data.cache.limit_gib" in line
    assert bytes_in(folder) == 0


@pytest.mark.parametrize("where", ["posix_fallocate", "replace"])
def test_a_full_disk_is_said_and_shards_are_streamed(tmp_path, monkeypatch, where):
    folder, store, said = tmp_path / "cache", Store(tmp_path), []
    cache = cache_of(folder, store, said=said)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    for url in urls(3):
        assert read(cache, url) == content_of(url)
    (line,) = said
    assert "its disk is full (No space left on device): shards are streamed" in line
    assert bytes_in(folder) == 0
    monkeypatch.undo()
    read(cache, urls(1)[0])
    assert bytes_in(folder) == SIZE


def in_processes(count, function, *arguments):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def read_all(folder, store, limit):
    cache = cache_of(folder, store, limit=limit)
    for _ in range(3):
        for url in urls(4):
            assert read(cache, url) == content_of(url)
            assert bytes_in(folder) <= limit


@pytest.mark.multiprocess
def test_processes_share_a_folder_and_bring_each_shard_once(tmp_path):
    folder, store = tmp_path / "cache", Store(tmp_path, slow_s=0.1)
    assert in_processes(5, read_all, folder, store, 4 * SIZE) == [0] * 5
    assert sorted(store.brought) == urls(4)
    assert {path.suffix for path in folder.iterdir()} <= {".tar", ""}


@pytest.mark.multiprocess
def test_processes_that_push_each_others_shards_out_read_them_all_and_stay_below_the_limit(
    tmp_path,
):
    folder, store = tmp_path / "cache", Store(tmp_path)
    assert in_processes(4, read_all, folder, store, 2 * SIZE) == [0] * 4


@pytest.mark.multiprocess
@pytest.mark.parametrize("bytes_before", [0, SIZE // 2])
def test_a_kill_leaves_nothing_that_is_taken_for_a_shard_and_no_space_taken(tmp_path, bytes_before):
    folder, store = tmp_path / "cache", Store(tmp_path)
    a, b, _ = urls(3)

    class Deadly(io.BytesIO):
        def read(self, size=-1):
            if self.tell() >= bytes_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(bytes_before or 1)

    def killed():
        opened = contextlib.nullcontext(Deadly(content_of(a)))
        read(ShardCache(folder, 2 * SIZE, lambda url: opened, print), a)

    assert in_processes(1, killed) == [-signal.SIGKILL]
    assert [path.stat().st_size for path in folder.glob("*.part")] == [SIZE]
    cache = cache_of(folder, store, limit=2 * SIZE)
    assert read(cache, b) == content_of(b)
    assert not list(folder.glob("*.part"))  # its space was given back
    assert read(cache, a) == content_of(a) and bytes_in(folder) == 2 * SIZE


def test_what_is_no_address_is_not_kept(dataset, tmp_path):
    said = []
    shards = shards_of(dataset)
    piped = [f"pipe:cat {shard}" for shard in shards]
    for given in (shards, [f"file://{shard}" for shard in shards], piped):
        folder = tmp_path / "cache"
        options = {"cache_folder": str(folder), "cache_bytes": 2**30, "report": said.append}
        take(stream(dataset, given, **options), 1)
    assert said == ["data.cache: what pipe: commands give is not kept"]
    assert bytes_in(folder) == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"data.cache.folder is .*/file/cache: cannot be written"):
        cache_of(tmp_path / "file" / "cache", Store(tmp_path))


def test_a_cache_without_a_stream_of_shards_is_refused():
    assignments = ["data.manifest=m.json", "data.cache.folder=c"]
    for more in ([], ["data.stream=[a]", "data.stream_format=text"]):
        with pytest.raises(ConfigError, match="data.cache.folder is given, and no shards are str"):
            load_config(ROOT / "configs" / "quickstart.yaml", [*assignments, *more])
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*assignments, "data.stream=[a]"])
    assert config.data.cache.folder == "c" and config.data.cache.limit_gib == 100
