"""Mapped and served files that change or become shorter while they are in use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcore import _core
from fedcore._core import (
    Codec,
    Collector,
    CollectorDone,
    CollectorOptions,
    Exchange,
    Layout,
    MappedFile,
    SetDamaged,
    SourceRejected,
)
from fedcore.encoding import can_pack
from fedcore.errors import StorageError
from fedcore.files.average import aggregate_files
from fedcore.model_file import ModelFile, create_model, open_model

CHUNK = 4096
LAYOUT = Layout([("w", "F32", [8 * CHUNK // 4])], CHUNK)
SET = b"s" * 16
READS = """
import os, sys
from fedcore._core import MappedFile
file = MappedFile.open(sys.argv[1])
os.truncate(sys.argv[1], 5000)
data = bytes(file.view())
assert data == b"x" * 5000 + bytes(95_000), data[:10]
try:
    file.check_whole()
except OSError as error:
    print(error)
"""


def test_a_mapped_file_that_becomes_shorter_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * 100_000)
    for extra in ([], ["-X", "faulthandler"]):
        path.write_bytes(b"x" * 100_000)
        command = [sys.executable, "-P", *extra, "-c", READS, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"{path} became shorter" in done.stdout


ENCODES = """
import os, sys
from fedcore._core import Codec, Layout, MappedFile, encode_update
layout = Layout([("w", "F32", [1 << 20])], 1 << 16)
files = [MappedFile.open(path) for path in sys.argv[1:]]
os.truncate(sys.argv[1], 5000)
out, lost = (MappedFile.anonymous(layout.total_bytes) for _ in range(2))
try:
    encode_update(Codec(layout, "int8"), files[0], 0, files[1], 0, out, None, lost, 4)
except OSError as error:
    print(error)
"""


def test_an_update_that_becomes_shorter_while_threads_encode_it_is_an_error(tmp_path: Path) -> None:
    paths = [tmp_path / "values", tmp_path / "base"]
    for path in paths:
        path.write_bytes(bytes(4 << 20))
    command = [sys.executable, "-P", "-c", ENCODES, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{paths[0]} became shorter" in done.stdout


LATE = """
import faulthandler, os, signal, sys
from fedcore._core import MappedFile
first = MappedFile.open(sys.argv[1])
for _ in range(100):
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    file = MappedFile.open(sys.argv[1])
    faulthandler.disable()
    faulthandler.enable()  # its handler takes the place of the guard's
    file = MappedFile.open(sys.argv[1])
os.truncate(sys.argv[1], 5000)
assert bytes(file.view()) == b"x" * 5000 + bytes(95_000)
print("read", flush=True)
os.kill(os.getpid(), 7)  # not the guard's: it goes to the handler before, and ends the process
"""


def test_a_handler_that_another_library_sets_later_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * 100_000)
    command = [sys.executable, "-P", "-c", LATE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout == "read\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == 1


ARMED = """
import faulthandler, os, sys
from fedcore._core import MappedFile
file = MappedFile.open(sys.argv[1])
faulthandler.enable()
os.truncate(sys.argv[1], 5000)
assert bytes(file.view(0, 100_000)) == b"x" * 5000 + bytes(95_000)
"""


def test_a_handler_that_is_set_after_the_last_mapping_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * 100_000)
    command = [sys.executable, "-P", "-c", ARMED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mapping_that_was_grown_or_made_anew_is_guarded_as_well(tmp_path: Path) -> None:
    file = MappedFile.create(str(tmp_path / "a"), 3 * CHUNK)
    del file
    for name in "bc":
        path = tmp_path / name
        path.write_bytes(bytes(3 * CHUNK))
        again = MappedFile.open(str(path))
        again.check_whole()
        os.truncate(path, 1)
        assert bytes(again.view())[2 * CHUNK :] == bytes(CHUNK)
        with pytest.raises(StorageError, match=f"{name} became shorter"):
            again.check_whole()


def test_an_input_that_shrinks_while_it_is_averaged_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout([(f"w{i}", "F32", [1 << 19]) for i in range(8)])
    inputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in inputs:
        create_model(path, layout)

    def cut(*work: Any) -> Any:  # all files are mapped
        os.truncate(inputs[1], 1 << 20)
        return _core.reduce_files(*work)

    monkeypatch.setattr("fedcore.files.average.reduce_files", cut)
    with pytest.raises(StorageError, match=r"b\.safetensors became shorter"):
        aggregate_files(inputs, None, tmp_path / "mean.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


# --- what is served ---


def served(path: Path, *, packed: bool) -> tuple[Exchange, ModelFile]:
    """A server that offers a model, whose chunks' checksums were recorded."""
    create_model(path, LAYOUT).fill(lambda _: bytes(LAYOUT.total_bytes))
    model = open_model(path, CHUNK)
    exchange = Exchange()
    place = (model.file, model.data_offset)
    if packed:
        room = MappedFile.create(str(path.with_name("packed")), LAYOUT.total_bytes)
        exchange.publish_packed(SET, *place, Codec(LAYOUT, "raw", True), room, model.checksums())
    else:
        exchange.publish(SET, *place, LAYOUT.total_bytes, CHUNK, model.checksums())
    return exchange, model


def pull(server: Exchange, *, until: int = 100) -> tuple[str, list[SetDamaged]]:
    """Download from a server; returns how it ended, and what the server's side reports."""
    site = Exchange()
    target = create_model(None, LAYOUT)
    codec = Codec(LAYOUT, "raw", True) if can_pack() else None
    collector = Collector(
        LAYOUT,
        [(b"", SET, 1)],
        target.file,
        target.data_offset,
        None,
        CollectorOptions(1 << 20, rule="copy", codec=codec),
    )
    site.start(collector)
    for _ in range(until):
        site.tick(0)
        while (request := site.next_out(0)) is not None:
            server.deliver(0, b"site", request[1], None)
        while (reply := server.next_out(0)) is not None:
            site.deliver(0, b"", reply[1], None if reply[2] is None else bytes(reply[2]))
    events = []
    while (event := server.next_event()) is not None:
        events.append(event)
    ended = site.next_event()
    assert ended is None or isinstance(ended, CollectorDone | SourceRejected)
    damaged = [event for event in events if isinstance(event, SetDamaged)]
    if isinstance(ended, SourceRejected):
        return ended.code, damaged
    return "" if ended is None else "done", damaged


@pytest.mark.parametrize("packed", [False, True])
def test_a_served_file_that_changes_is_named_and_served_no_more(
    tmp_path: Path, packed: bool
) -> None:
    if packed and not can_pack():
        pytest.skip("needs lz4")
    path = tmp_path / "model"
    server, model = served(path, packed=packed)
    with path.open("r+b") as file:
        file.seek(model.data_offset + 3 * CHUNK + 7)
        file.write(b"\x01")
    ended, damaged = pull(server)
    assert ended != "done"
    assert [event.set_id for event in damaged] == [SET]
    assert f"{path} has changed while it was served: chunk 3" in damaged[0].message
    assert server.published() == []


def test_a_served_file_that_becomes_shorter_is_named_and_served_no_more(tmp_path: Path) -> None:
    path = tmp_path / "model"
    server, model = served(path, packed=False)
    with path.open("r+b") as file:
        file.seek(model.data_offset)
        file.write(b"\x01" * LAYOUT.total_bytes)
    server.withdraw(SET)
    server.publish(SET, model.file, model.data_offset, LAYOUT.total_bytes, CHUNK, model.checksums())
    os.truncate(path, model.data_offset + 2 * CHUNK)
    ended, damaged = pull(server)
    assert ended != "done"
    assert "became shorter" in damaged[0].message


def test_a_chunk_that_is_asked_for_again_and_is_as_it_was_stays_published(tmp_path: Path) -> None:
    server, _ = served(tmp_path / "model", packed=False)
    for _ in range(3):
        assert pull(server) == ("done", [])
    assert server.published() == [SET]
