"""Digests of committed files, computed beside the run."""

from __future__ import annotations

import hashlib
import threading

import pytest

from fedcore._core import crc32c
from fedcore.layout import DEFAULT_CHUNK_BYTES as CHUNK
from fedcore.server.storage.hashing import Hasher
from fedcore.server.storage.integrity import checksum_of

HEADER = 24


@pytest.fixture
def hasher():
    made = Hasher()
    yield made
    made.stop()


def written(tmp_path, name, size):
    path = tmp_path / name
    data = (b"%09d " % len(name)) * (size // 10)
    path.write_bytes(bytes(HEADER) + data)
    return path, hashlib.sha256(data).hexdigest()


def add(hasher, version, path):
    """Have a file hashed that is what was committed."""
    data = path.read_bytes()[HEADER:] if path.exists() else b""
    chunks = [crc32c(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
    hasher.add(version, path, HEADER, checksum_of(chunks))


def test_every_file_is_hashed_from_its_offset_in_the_order_given(hasher, tmp_path):
    expected = []
    for version in range(4):
        path, digest = written(tmp_path, "x" * (version + 1), 3 << 20)
        add(hasher, version, path)
        expected.append((version, digest))
    hasher.finish()
    assert hasher.results() == expected
    assert hasher.results() == []


class StoppedAfterABlock(threading.Event):
    """Holds the thread that asks for the second time, after its first block, until it is set."""

    def __init__(self):
        super().__init__()
        self.asked = 0
        self.begun = threading.Event()

    def is_set(self):
        self.asked += 1
        if self.asked == 2:
            self.begun.set()
            self.wait(200)
        return super().is_set()


def test_what_was_begun_in_the_background_is_finished_with_the_right_digest(tmp_path):
    path, digest = written(tmp_path, "model", 5 << 20)
    stopped = StoppedAfterABlock()
    hasher = Hasher(stopped=stopped)
    add(hasher, 7, path)
    assert stopped.begun.wait(200)
    hasher.finish()
    assert hasher.results() == [(7, digest)]


def test_a_file_that_was_removed_does_not_keep_the_others_from_their_digest(hasher, tmp_path):
    gone, _ = written(tmp_path, "gone", 1 << 20)
    gone.unlink()
    path, digest = written(tmp_path, "there", 1 << 20)
    add(hasher, 1, gone)
    add(hasher, 2, path)
    hasher.finish()
    assert hasher.results() == [(2, digest)]


def test_a_file_that_does_not_hold_what_was_committed_gets_no_digest(hasher, tmp_path):
    path, _ = written(tmp_path, "changed", 2 << 20)
    hasher.add(3, path, HEADER, "00000000")
    hasher.finish()
    assert hasher.results() == [(3, None)]


class Traffic:
    """Bytes that move as fast as this is set to, by the look; notes when it was looked at twice."""

    def __init__(self, step):
        self.step = step
        self.moved = 0
        self.looks = 0
        self.looked_again = threading.Event()

    def __call__(self):
        self.looks += 1
        if self.looks > 2:
            self.looked_again.set()
        self.moved += self.step
        return self.moved


@pytest.fixture
def gated():
    made = []

    def make(traffic, behind):
        made.append(Hasher(traffic, behind))
        return made[-1]

    yield make
    for hasher in made:
        hasher.stop()


def test_nothing_is_hashed_while_chunks_move_fast_and_all_is_once_they_do_not(gated, tmp_path):
    traffic = Traffic(1 << 40)
    hasher = gated(traffic, 8)
    path, digest = written(tmp_path, "model", 3 << 20)
    add(hasher, 1, path)
    assert traffic.looked_again.wait(200)
    assert hasher.results() == []
    traffic.step = 0
    assert hasher.results(200) == [(1, digest)]


def test_no_more_files_wait_for_a_quiet_moment_than_may(gated, tmp_path):
    hasher = gated(Traffic(1 << 40), 2)
    files = [written(tmp_path, "x" * (version + 1), 1 << 20) for version in range(3)]
    for version, (path, _) in enumerate(files):
        add(hasher, version, path)
    assert hasher.results(200) == [(0, files[0][1])]
    assert hasher.results() == []
    hasher.finish()
    assert hasher.results() == [(1, files[1][1]), (2, files[2][1])]


def test_after_stop_nothing_is_hashed_any_more(hasher, tmp_path):
    hasher.stop()
    path, _ = written(tmp_path, "late", 1 << 20)
    add(hasher, 1, path)
    assert hasher.results() == []
