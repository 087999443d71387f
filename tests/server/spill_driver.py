"""Collects through a spill file again and again, each time with another call that changes a file dying or failing.

Run with ``failing_calls`` preloaded, as journal_driver.py, whose frame this uses. Prints a line of JSON per call.
After each attempt another one goes on with its files, as a server that is started again does; a model whose bytes
are not those of an undisturbed collection ends the program with a traceback that names the call.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parent))

from journal_driver import attempt

from fedcore._core import CollectorDone, Exchange, Layout, NoRoom, OutputBroken
from fedcore.errors import StorageError
from fedcore.model_file import create_model
from fedcore.server.collection import Collection, CollectionSetting, open_spill
from fedcore.server.rounds.actions import Participant
from fedcore.server.storage.scratch import Scratch

CHUNK = 4096
CHUNKS = 12
LAYOUT = Layout([("w", "F32", [CHUNKS * CHUNK // 4])], CHUNK)
SITES = {"a": 1, "b": 3}
WINDOW = 2


def values(site: str) -> bytes:
    return array("f", [SITES[site] * 0.5 + i for i in range(CHUNKS * CHUNK // 4)]).tobytes()


EXPECTED = array("f", [(1 * 0.5 + 3 * 1.5) / 4 + i for i in range(CHUNKS * CHUNK // 4)]).tobytes()


def collect(folder: Path) -> None:
    """Collect both updates, all of a's chunks that are asked for before the first of b's."""
    config: Any = SimpleNamespace(spill_folder=folder, server=SimpleNamespace(spill=True))
    server, sites = Exchange(), {}
    for name in SITES:
        update = create_model(None, LAYOUT)
        update.view("w")[:] = values(name)
        exchange = sites[name.encode()] = Exchange()
        exchange.publish(
            name.encode() * 16, update.file, update.data_offset, LAYOUT.total_bytes, CHUNK
        )
    setting = CollectionSetting(
        server,
        LAYOUT,
        Scratch(folder / "model", folder / "record", {}, {}),
        memory=WINDOW * len(SITES) * CHUNK,
        spill=open_spill(config, "t", LAYOUT),
    )
    participants = tuple(
        Participant(name, name.encode().hex() * 16, w) for name, w in SITES.items()
    )
    running = Collection.of(setting, participants, {name: name.encode() for name in SITES})
    waiting: list[tuple[bytes, bytes, bytes]] = []
    for now in range(0, 100_000, 50):
        server.tick(now)
        while (request := server.next_out(now)) is not None:
            sites[request[0]].deliver(now, b"", request[1], None)
        for name, site in sites.items():
            while (reply := site.next_out(now)) is not None:
                if reply[2] is not None:
                    waiting.append((name, reply[1], bytes(reply[2])))
        while (event := server.next_event()) is not None:
            if isinstance(event, OutputBroken):
                raise StorageError(event.message)
            assert isinstance(event, CollectorDone | NoRoom), event
        ready = [w for w in waiting if w[0] == b"a"] or (waiting if now > 2000 else [])
        if ready:
            first = ready[0]
            waiting.remove(first)
            server.deliver(now, *first)
        if running.collector.done:
            break
    model, checksums = running.finish()
    assert checksums == model.checksums()
    assert bytes(model.view("w")) == EXPECTED


def main(work: Path, mode: str) -> None:
    n = 0
    while True:
        n += 1
        folder = work / "run"
        folder.mkdir()
        read, write = os.pipe()
        code = attempt(lambda: collect(folder), n, mode, write)  # noqa: B023 - called at once
        os.close(write)
        with os.fdopen(read) as pipe:
            call, _, said = pipe.read().partition("|")
        if not call:
            assert code == 0, said
            return
        try:
            if code:
                collect(folder)
            assert (folder / "model").read_bytes().endswith(EXPECTED)
            left = {path.name for path in folder.iterdir()} - {"model", "record"}
            # The next server removes what this one could not.
            assert call == "unlink" or not left, left
        except BaseException as error:
            error.add_note(f"call {n} ({call}) in mode {mode!r}, which ended with {code}: {said}")
            raise
        print(json.dumps({"n": n, "call": call, "code": code, "said": said}), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
