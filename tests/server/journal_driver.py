"""Commits a round again and again, each time with another call that changes a file dying or failing.

Run with ``failing_calls`` preloaded. Prints one line of JSON per call: its number and name, how the attempt ended,
and what a server that is started on the folder afterwards finds. A folder that is not as it must be ends the
program with a traceback that names the call.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedcore._core import CollectorDone, Exchange, Finisher, Layout
from fedcore.errors import StorageError
from fedcore.model_file import create_model, open_model
from fedcore.server.collection import Collection, CollectionSetting
from fedcore.server.rounds.actions import Participant
from fedcore.server.rounds.selection import SiteScore
from fedcore.server.storage.scratch import Scratch
from fedcore.server.storage.store import StateRow, Store, VersionRow
from fedcore.server.versions import checksum_of

LAYOUT = Layout([("w", "F32", [6000])], 4096)
OPTIONS = {"learning_rate": 1.0, "momentum": 0.0}
SITES = {"a": 1, "b": 3}
SETTINGS = {"run": {"rounds": 1, "task": "train"}}
DIED, REFUSED, RAISED = 99, 98, 97


def values(seed: int) -> bytes:
    return array("f", [seed * 0.5 + i for i in range(6000)]).tobytes()


def first_version(folder: Path) -> None:
    """A run folder with version 0, scored and exported."""
    store = Store(folder, SETTINGS, chunk_bytes=LAYOUT.chunk_bytes)
    store.announce(0, LAYOUT.total_bytes)
    model = create_model(store.scratch(0), LAYOUT)
    model.view("w")[:] = values(0)
    model.file.sync()
    row = VersionRow(0, checksum_of(model.checksums()), "", LAYOUT.total_bytes, 1.0, {})
    store.commit(row, {}, {"config.json": "{}"})
    store.add_score(0, SiteScore("a", 1, {"loss": 2.0}))
    for name in ("best", "final"):
        store.export(name, 0)
    store.write_summary({"version": 0})
    for site in SITES:
        store.add_member(site)
    store.close()


def round_one(folder: Path) -> None:
    """Open the folder as a server does, collect and commit version 1 unless it is there, and end the run."""
    store = Store(folder, SETTINGS, chunk_bytes=LAYOUT.chunk_bytes)
    if store.last_version == 0:
        commit_one(store)
    store.add_score(1, SiteScore("a", 1, {"loss": 1.0}))
    store.add_sha256(1, "f" * 64)
    for name in ("final", "best"):
        store.export(name, 1)
    store.write_summary({"version": 1})
    store.end(finished=True)
    store.close()


def commit_one(store: Store) -> None:
    server, base = Exchange(), open_model(store.path(0))
    participants = tuple(
        Participant(site, site.encode().hex() * 16, w) for site, w in SITES.items()
    )
    setting = CollectionSetting(
        server,
        LAYOUT,
        Scratch(
            store.scratch(1),
            store.record(1),
            {},
            {"fedcore.version": "1"},
            {"momentum": (store.state_scratch(1, "momentum"), LAYOUT)},
        ),
        memory=1 << 20,
        base=base,
        finisher=Finisher(LAYOUT, "momentum", OPTIONS),
    )
    store.announce(1, LAYOUT.total_bytes, {"momentum": LAYOUT.total_bytes})
    running = Collection.of(setting, participants, {site: site.encode() for site in SITES})
    sites = {}
    for site, weight in SITES.items():
        update = create_model(None, LAYOUT)
        update.view("w")[:] = values(weight)
        exchange = sites[site.encode()] = Exchange()
        exchange.publish(
            site.encode() * 16, update.file, update.data_offset, LAYOUT.total_bytes, 4096
        )
    server.tick(0)  # goes on with what is here already
    while (request := server.next_out(0)) is not None:
        sites[request[0]].deliver(0, b"", request[1], None)
        while (reply := sites[request[0]].next_out(0)) is not None:
            assert reply[2] is not None
            server.deliver(0, request[0], reply[1], bytes(reply[2]))
    event = server.next_event()
    if not isinstance(event, CollectorDone):
        raise StorageError(f"{event}")  # as the server, which ends the run with the core's words
    model, checksums = running.finish()
    row = VersionRow(1, checksum_of(checksums), "", model.layout.total_bytes, 1.0, SITES)
    state = running.scratch.states["momentum"]
    kept = StateRow(checksum_of(state.checksums()), LAYOUT.total_bytes)
    store.commit(row, {"a": {"loss": 1.0}}, states={"momentum": kept})


def check(folder: Path) -> dict[str, Any]:
    """What a server finds on the folder: all of it must be whole, whichever version it is of."""
    store = Store(folder, SETTINGS, chunk_bytes=LAYOUT.chunk_bytes)
    rows = {row.version: row for row in store.versions()}
    assert list(rows) in ([0], [0, 1]), rows
    for row in rows.values():
        model = open_model(store.path(row.version), LAYOUT.chunk_bytes)
        assert checksum_of(model.checksums()) == row.checksum
        assert dict(row.participants) == (SITES if row.version else {})
    assert bytes(open_model(store.path(0)).view("w")) == values(0)
    names = {path.name for path in store.models.iterdir()}
    states = store.states(max(rows))
    assert states.keys() == ({"momentum"} if 1 in rows else set())
    store.verify_states(max(rows))
    whole = {*map(store.path, rows), *(store.state_path(1, state) for state in states)}
    left = names - {path.name for path in whole}
    under_way = {
        store.scratch(1).name,
        store.state_scratch(1, "momentum").name,
        store.record(1).name,
    }
    assert len(names) - len(left) == len(whole)
    assert left in (set(), under_way if rows.keys() == {0} else set()), left
    hidden = [path.name for path in folder.glob(".*")]
    assert hidden == [".lock"], hidden
    exports = {}
    for name in ("best", "final"):
        of = json.loads((folder / name / "fedcore.json").read_text())["version"]
        model = folder / name / "model.safetensors"
        assert model.read_bytes() == store.path(of).read_bytes()
        assert (folder / name / "config.json").read_text() == "{}"
        exports[name] = of
    if store.finished:
        assert exports == {"best": 1, "final": 1}, "a finished run is not opened again"
    if states:
        v = open_model(store.state_path(1, "momentum"), LAYOUT.chunk_bytes).view("w")
        assert bytes(v) == array("f", [1.25] * 6000).tobytes()
    summary = json.loads((folder / "summary.json").read_text())["version"]
    store.close()
    return {"version": max(rows), "exports": exports, "summary": summary}


def attempt(work: Callable[[], None], n: int, mode: str, trace: int) -> int:
    """Do something in a forked process whose n-th call goes wrong; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 0
    try:
        ctypes.CDLL(None).fail_at(ctypes.c_long(n), ctypes.c_char(mode.encode()), trace)
        work()
    except StorageError as error:
        code = REFUSED
        os.write(trace, f"|{error}".encode())
    except BaseException:
        code = RAISED
        os.write(trace, f"|{traceback.format_exc()}".encode())
    finally:
        os._exit(code)


def main(work: Path, mode: str) -> None:
    template = work / "template"
    first_version(template)
    n = 0
    while True:
        n += 1
        folder = work / "run"
        shutil.copytree(template, folder)
        read, write = os.pipe()
        code = attempt(lambda: round_one(folder), n, mode, write)  # noqa: B023 - called at once
        os.close(write)
        with os.fdopen(read) as pipe:
            call, _, said = pipe.read().partition("|")
        if not call:
            assert code == 0, said
            return
        try:
            found = check(folder)
            round_one(folder)
            assert check(folder)["version"] == 1
            model = open_model(folder / "final" / "model.safetensors")
            expected = array("f", [(1 * (0.5 + i) + 3 * (1.5 + i)) / 4 for i in range(6000)])
            assert bytes(model.view("w")) == expected.tobytes()
        except BaseException as error:
            error.add_note(f"call {n} ({call}) in mode {mode!r}, which ended with {code}: {said}")
            raise
        print(json.dumps({"n": n, "call": call, "code": code, "said": said, **found}), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
