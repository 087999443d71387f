"""A site's work folder: what a process leaves behind is used only where it is whole and meant for the task."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedcore import protocol
from fedcore._core import Layout, crc32c
from fedcore.encoding import EncodedUpdate, UpdateEncoder
from fedcore.errors import StorageError
from fedcore.layout import layout_hash, table
from fedcore.site.encoded import Outgoing
from fedcore.site.settings import SiteSettings
from fedcore.site.work import WorkFolder

CHUNK = 4096
LAYOUT = Layout([("w", "F32", [5000])], CHUNK)
OTHER = Layout([("w", "F32", [5001])], CHUNK)
RUN = uuid.uuid4().hex
VALUES = np.arange(5000, dtype=np.float32)


def task(round_: int = 1, layout: Layout = LAYOUT, kind: str = "train") -> protocol.Task:
    model = {"id": "0" * 32, "layout": layout_hash(layout), "tensors": table(layout)}
    return protocol.Task.model_validate(
        {"kind": kind, "round": round_, "rounds": 3, "version": round_ - 1, "sets": [model]},
        strict=False,
    )


def trained(
    root: Path, round_: int = 1, layout: Layout = LAYOUT, clip: float | None = None
) -> WorkFolder:
    """Let a process train in ``round_``."""
    work = WorkFolder(root, "a", RUN)
    file = work.update(layout)
    file.fill(lambda _: np.resize(VALUES, layout.total_bytes // 4).tobytes())
    ready = protocol.Ready(
        round=round_,
        sets=[protocol.NamedSet(id=uuid.uuid4().hex, layout=layout_hash(layout))],
        weight=5,
    )
    score = protocol.Score(version=round_ - 1, metrics={"loss": 0.5}, examples=3)
    work.record(ready, EncodedUpdate.raw(file), score, clip=clip)
    return work


def killed(work: WorkFolder) -> None:
    """Leave everything as a killed process does."""
    work.close(keep=True)


def files(root: Path) -> set[str]:
    return {path.name for path in root.rglob("*") if path.is_file()} - {"lock"}


def test_a_process_that_is_started_again_finds_what_was_trained(tmp_path: Path) -> None:
    killed(trained(tmp_path))
    work = WorkFolder(tmp_path, "a", RUN)
    kept = work.kept(task(), CHUNK)
    assert kept is not None
    update = kept.update
    data = update.file.view(update.offsets[0], update.nbytes)
    assert np.array_equal(np.frombuffer(data, np.float32), VALUES)
    assert update.checksums == [crc32c(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
    assert not any(update.encodings)
    assert (kept.record.ready.round, kept.record.ready.weight) == (1, 5)
    assert kept.record.score is not None
    assert kept.record.score.metrics == {"loss": 0.5}
    assert (work.folder.stat().st_mode & 0o777) == 0o700
    work.close(keep=False)


def test_an_update_that_was_trained_from_another_model_of_that_number_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = trained(tmp_path)
    kept = work.kept(task(), CHUNK)
    assert kept is not None
    work.record(kept.record.ready, kept.update, None, base="0000aaaa")
    killed(work)
    again = WorkFolder(tmp_path, "a", RUN)
    same = task().model_copy(update={"checksum": "0000aaaa"})
    assert again.kept(same, CHUNK) is not None
    other = task().model_copy(update={"checksum": "0000bbbb"})
    assert again.kept(other, CHUNK) is None
    assert "another model of round 0 by now" in caplog.text
    again.close(keep=False)


def trained_and_encoded(root: Path) -> tuple[WorkFolder, EncodedUpdate]:
    """The same with chunks that are encoded."""
    work = WorkFolder(root, "a", RUN)
    file, base = work.update(LAYOUT), work.received(LAYOUT)
    file.fill(lambda _: VALUES.tobytes())
    encoder = UpdateEncoder(LAYOUT, "int8", make_file=work.flat)
    update = encoder.encode(1, file.file, file.data_offset, base.file, base.data_offset)
    ready = protocol.Ready(
        round=1, sets=[protocol.NamedSet(id="ab" * 16, layout=layout_hash(LAYOUT))], weight=5
    )
    work.record(ready, update, None)
    return work, update


def test_chunks_that_were_encoded_are_kept_as_they_were_offered(tmp_path: Path) -> None:
    work, update = trained_and_encoded(tmp_path)
    assert set(update.encodings) == {3}
    killed(work)
    again = WorkFolder(tmp_path, "a", RUN)
    kept = again.kept(task(), CHUNK)
    assert kept is not None
    assert kept.record.ready.model.id == "ab" * 16
    assert bytes(kept.update.file.view(0, kept.update.nbytes)) == bytes(
        update.file.view(0, update.nbytes)
    )
    for name in ("offsets", "encodings", "checksums"):
        assert getattr(kept.update, name) == getattr(update, name)
    again.close(keep=False)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"encodings": "03"}, "too short"),
        ({"lengths": [1 << 20] * 5}, "too short"),
        ({"lengths": [0, 5]}, "record is damaged"),
        ({"encodings": "0g"}, "record is damaged"),
        (None, "the checksum differs"),
    ],
)
def test_encoded_chunks_that_are_damaged_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: dict[str, object] | None, said: str
) -> None:
    work, update = trained_and_encoded(tmp_path)
    killed(work)
    if damage is None:
        data = bytearray((work.folder / "encoded").read_bytes())
        data[update.nbytes // 2] ^= 1
        (work.folder / "encoded").write_bytes(data)
    else:
        edit(**damage)(work.folder)
    again = WorkFolder(tmp_path, "a", RUN)
    assert again.kept(task(), CHUNK) is None
    assert said in caplog.text
    assert files(tmp_path) == {"residual-0", "residual-1"}
    again.close(keep=False)


def encoded_rounds(root: Path, *, killed_after: int, damage: bool = False) -> list[bytes]:
    """Encode in three rounds, by another process after some of them; every second update is not counted."""
    work = WorkFolder(root, "a", RUN)
    bodies = []
    outgoing = Outgoing(LAYOUT, protocol.Transfer(update="int8"), work)
    for round_ in (1, 2, 3, 4, 5):
        file, base = work.update(LAYOUT), work.received(LAYOUT)
        checksums = file.fill(lambda _: np.sin(VALUES).tobytes())
        included = {1: None, 2: 1, 3: 1, 4: 3, 5: 4}[round_]
        update = outgoing.encode(round_, file, checksums, base, included)
        bodies.append(bytes(update.file.view(0, update.nbytes)))
        if round_ == killed_after:
            killed(work)
            if damage:
                for path in work.folder.glob("residual-*"):
                    path.write_bytes(b"\1" * path.stat().st_size)
            work = WorkFolder(root, "a", RUN)
            outgoing = Outgoing(LAYOUT, protocol.Transfer(update="int8"), work)
    work.close(keep=False)
    return bodies


def test_a_process_that_is_started_again_goes_on_with_what_its_encoding_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = encoded_rounds(tmp_path, killed_after=0)
    assert len(set(undisturbed)) > 3
    for round_ in (1, 2, 3, 4):
        assert encoded_rounds(tmp_path, killed_after=round_) == undisturbed
    assert not caplog.text
    torn = encoded_rounds(tmp_path, killed_after=3, damage=True)
    assert torn[:3] == undisturbed[:3]
    assert torn[3] == undisturbed[0]  # it begins without a residual
    assert "what earlier updates lost" in caplog.text


def flip(folder: Path) -> None:
    path = folder / "update.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def tear(folder: Path) -> None:
    path = folder / "update.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4096] + bytes(4096))


def shorten(folder: Path) -> None:
    with (folder / "update.safetensors").open("r+b") as file:
        file.truncate(9000)


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "update.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "the checksum differs"),
        (tear, "the checksum differs"),
        (shorten, "the tensors end"),
        (lambda folder: (folder / "update.safetensors").write_bytes(b""), "too few"),
        (lambda folder: (folder / "update.safetensors").unlink(), "cannot open"),
        (lambda folder: (folder / "update.json").write_text('{"format": 2'), "record is damaged"),
        (lambda folder: (folder / "update.json").write_bytes(b""), "record is damaged"),
        (edit(format=1), "record is damaged"),
        (edit(site="b"), "site b"),
        (edit(run_id="0" * 32), "run 000"),
        (edit(checksum="00000000"), "the checksum differs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_torn_or_foreign_is_removed_and_never_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    killed(trained(tmp_path))
    work = WorkFolder(tmp_path, "a", RUN)
    damage(work.folder)
    assert work.kept(task(), CHUNK) is None
    assert said in caplog.text
    assert files(tmp_path) == set()
    work.close(keep=True)


@pytest.mark.parametrize(
    "wanted", [task(2), task(1, OTHER), task(1, kind="evaluate")], ids=["round", "layout", "score"]
)
def test_what_was_trained_for_another_task_is_removed(
    tmp_path: Path, wanted: protocol.Task
) -> None:
    killed(trained(tmp_path))
    work = WorkFolder(tmp_path, "a", RUN)
    assert work.kept(wanted, CHUNK) is None
    assert files(tmp_path) == set()
    work.close(keep=True)


def test_a_file_that_is_written_over_has_no_record(tmp_path: Path) -> None:
    work = trained(tmp_path)
    assert files(tmp_path) == {"update.json", "update.safetensors"}
    work.update(LAYOUT)
    assert files(tmp_path) == {"update.safetensors"}
    killed(work)
    assert files(tmp_path) == set()


def test_only_the_set_whose_fate_is_known_is_forgotten(tmp_path: Path) -> None:
    work = trained(tmp_path)
    set_id = json.loads((work.folder / "update.json").read_text())["ready"]["sets"][0]["id"]
    work.forget("0" * 32)
    assert "update.json" in files(tmp_path)
    work.forget(set_id)
    assert "update.json" not in files(tmp_path)
    work.close(keep=True)


def test_rounds_take_the_room_of_one_model_and_one_update(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path, "a", RUN)
    places = {work.received(LAYOUT).file.path for _ in range(3)} | {
        work.update(LAYOUT).file.path for _ in range(3)
    }
    assert len(places) == 2
    assert files(tmp_path) == {"update.safetensors"}
    work.close(keep=False)
    assert list(tmp_path.iterdir()) == [], "the folders go where they are empty"


HOLD = """
import os, sys
from pathlib import Path
from fedcore.site.work import WorkFolder
work = WorkFolder(Path(sys.argv[1]), "a", sys.argv[2])
if os.fork() == 0:
    os.close(1)
    sys.stdin.read()  # a child that outlives its parent
    os._exit(0)
print(work.keeps, flush=True)
sys.stdin.read()
"""


def holder(root: Path, run: str) -> subprocess.Popen[str]:
    """Start another process that has the folder, and a child of its own."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(root), run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_second_process_of_a_site_leaves_the_first_ones_files_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(trained(tmp_path))
    first = holder(tmp_path, RUN)
    try:
        second = WorkFolder(tmp_path, "a", RUN)
        assert not second.keeps
        assert "another process uses" in caplog.text
        assert second.kept(task(), CHUNK) is None
        second.update(LAYOUT)
        second.close(keep=True)
        assert files(tmp_path) == {"update.json", "update.safetensors"}
        first.kill()
        first.wait()
        third = WorkFolder(tmp_path, "a", RUN)
        assert third.kept(task(), CHUNK) is not None, "its child must not hold the lock"
        third.close(keep=False)
    finally:
        first.kill()
        first.communicate()


def test_a_second_session_in_one_process_leaves_the_first_ones_files_alone(tmp_path: Path) -> None:
    first = trained(tmp_path)
    second = WorkFolder(tmp_path, "a", RUN)
    assert not second.keeps
    second.close(keep=False)
    another = WorkFolder(tmp_path, "a", "2" * 32)
    assert files(tmp_path) == {"update.json", "update.safetensors"}
    another.close(keep=False)
    killed(first)
    third = WorkFolder(tmp_path, "a", RUN)
    assert third.kept(task(), CHUNK) is not None
    third.close(keep=False)


def test_what_other_runs_have_left_is_removed_unless_they_still_run(tmp_path: Path) -> None:
    killed(trained(tmp_path))
    other = holder(tmp_path, "1" * 32)
    try:
        assert {path.name for path in (tmp_path / "a").iterdir()} == {"1" * 32}
        mine = WorkFolder(tmp_path, "a", "2" * 32)
        assert {path.name for path in (tmp_path / "a").iterdir()} == {"1" * 32, "2" * 32}
        mine.close(keep=False)
    finally:
        other.kill()
        other.communicate()


def test_a_folder_that_cannot_be_made_says_which_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="FEDCORE_WORK"):
        WorkFolder(tmp_path / "file", "a", RUN)


@contextlib.contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("encoding", ["raw", "int8"])
def test_an_update_that_its_folder_has_no_room_for_waits_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str
) -> None:
    work = WorkFolder(tmp_path, "a", RUN)
    outgoing = Outgoing(LAYOUT, protocol.Transfer.model_validate({"update": encoding}), work)
    base = work.received(LAYOUT)
    with files_of_at_most(CHUNK):
        work.reserve(LAYOUT)
        outgoing.prepare(None)
    assert "it is kept in memory" in caplog.text
    assert "FEDCORE_WORK" in caplog.text
    file = work.update(LAYOUT)
    checksums = file.fill(lambda _: VALUES.tobytes())
    update = outgoing.encode(1, file, checksums, base, None)
    work.record(
        protocol.Ready(
            round=1, sets=[protocol.NamedSet(id=RUN, layout=layout_hash(LAYOUT))], weight=5
        ),
        update,
        None,
    )
    assert update.nbytes > 0
    assert files(tmp_path) == set(), "a record of what is in memory would name no file"
    work.close(keep=True)


@pytest.mark.parametrize(("at_training", "now", "used"), [(None, None, True), (1.0, None, True),
                                                         (1.0, 2.0, True), (None, 1.0, False),
                                                         (2.0, 1.0, False)])  # fmt: skip
def test_a_kept_update_is_delivered_only_within_the_bound_of_now(
    tmp_path: Path, at_training: float | None, now: float | None, used: bool
) -> None:
    killed(trained(tmp_path, clip=at_training))
    work = WorkFolder(tmp_path, "a", RUN)
    assert (work.kept(task(), CHUNK, now) is not None) == used
    work.close(keep=False)


def test_room_for_an_update_is_looked_for_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkFolder(tmp_path, "a", RUN)
    monkeypatch.setattr("fedcore.site.work.available_memory", lambda: 10_000)
    with (
        files_of_at_most(CHUNK),
        pytest.raises(StorageError, match=r"20,000 bytes are needed, and memory has no room"),
    ):
        work.reserve(LAYOUT)
    work.reserve(LAYOUT)
    work.close(keep=False)


def test_a_system_without_any_folder_to_write_keeps_files_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_folder(**_: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("fedcore.site.work.tempfile.mkdtemp", no_folder)
    work = WorkFolder(None, "a", RUN)
    file = work.update(LAYOUT)
    file.fill(lambda _: VALUES.tobytes())
    assert np.array_equal(
        np.frombuffer(file.file.view(file.data_offset, 20_000), np.float32), VALUES
    )
    assert work.flat("encoded", 100).size == 100
    work.close(keep=True)


def test_a_user_without_a_home_is_told_that_updates_are_not_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = {"FEDCORE_SERVER": "tcp://[::1]:1", "FEDCORE_SITE": "a", "FEDCORE_INSECURE": "1"}
    SiteSettings.from_environment(site)
    assert "set FEDCORE_WORK to a folder that stays" in caplog.text


def test_a_folder_that_was_named_stays_and_what_was_made_in_it_goes(tmp_path: Path) -> None:
    root = tmp_path / "named"
    root.mkdir(mode=0o750)
    first, second = WorkFolder(root, "a", RUN), WorkFolder(root, "b", RUN)
    first.close(keep=False)
    assert [path.name for path in root.iterdir()] == ["b"]
    second.close(keep=False)
    assert list(root.iterdir()) == []


def test_the_folder_outlives_the_process_unless_there_is_no_place_for_it(tmp_path: Path) -> None:
    site = {"FEDCORE_SERVER": "tcp://[::1]:1", "FEDCORE_SITE": "a", "FEDCORE_INSECURE": "1"}

    def work(**env: str) -> Path | None:
        return SiteSettings.from_environment({**site, **env}).work

    assert work(HOME=str(tmp_path)) == tmp_path / ".local" / "state" / "fedcore"
    assert work(XDG_STATE_HOME=str(tmp_path)) == tmp_path / "fedcore"
    assert work(HOME=str(tmp_path), FEDCORE_WORK="here") == Path("here")
    assert work() is None
    if os.getuid() != 0:
        assert work(HOME="/proc") is None
