"""Surveys and combines updates again and again, each time with another call that changes a file dying or failing.

Run with ``failing_calls`` preloaded, as journal_driver.py, whose frame this uses. Prints a line of JSON per call.
After each attempt another one goes on with its journal and files, as a server that is started again does. A model
whose bytes are not those of an undisturbed round ends the program with a traceback that names the call.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parent))

from journal_driver import attempt

from fedcore._core import CollectorDone, Exchange, Layout, NoRoom, OutputBroken
from fedcore.errors import StorageError
from fedcore.model_file import create_model
from fedcore.rules.python import load_rule
from fedcore.server.collection import Collection, CollectionSetting, open_spill
from fedcore.server.rounds.actions import Participant
from fedcore.server.rounds.verdicts import decide
from fedcore.server.storage.scratch import Scratch
from fedcore.server.storage.store import Store

CHUNK, CHUNKS = 4096, 5
COUNT = CHUNKS * CHUNK // 4
LAYOUT = Layout([("w", "F32", [COUNT])], CHUNK)
SETTINGS = {"run": {"rounds": 1, "task": "train"}}
PLACES = {"a": 1.0, "b": 1.5, "c": 2.0, "d": 9.0}
RULE = load_rule("multi-krum", {"f": 0, "m": 2})
EXPECTED = array("f", [1.25] * COUNT).tobytes()  # of the nearest two, a and b


def first_journal(folder: Path) -> None:
    store = Store(folder, SETTINGS, chunk_bytes=CHUNK)
    store.announce(0, LAYOUT.total_bytes)
    store.close()


def round_one(folder: Path) -> None:
    """Survey, decide and combine, or go on from what is decided."""
    store = Store(folder, SETTINGS, chunk_bytes=CHUNK)
    config: Any = SimpleNamespace(spill_folder=folder, server=SimpleNamespace(spill=True))
    server, sites = Exchange(), {}
    for name, place in PLACES.items():
        update = create_model(None, LAYOUT)
        update.view("w")[:] = array("f", [place] * COUNT).tobytes()
        sites[name.encode()] = exchange = Exchange()
        set_id = name.encode() * 16
        exchange.publish(set_id, update.file, update.data_offset, LAYOUT.total_bytes, CHUNK)
    setting = CollectionSetting(
        server,
        LAYOUT,
        Scratch(folder / "model", folder / "record", {}, {}),
        memory=1 << 20,
        base=create_model(None, LAYOUT),
        spill=open_spill(config, "t", LAYOUT),
        survey=True,
        keep_surveyed=True,
        digest_key=os.urandom(1032),
    )
    participants = tuple(Participant(name, name.encode().hex() * 16, 1) for name in PLACES)
    peers = {name: name.encode() for name in PLACES}
    verdict = store.verdict(1)
    if verdict is None:
        running = Collection(setting, len(participants))
        running.close(participants, peers)
        carry(server, sites, running)
        verdict = replace(
            decide(RULE, running.participants, running.collector.distances),
            key=running.digest_key,
            digests=running.digests,
        )
        store.keep_verdict(1, verdict)
        running.combine(verdict.kept, verdict.decision.base)
    else:
        kept = replace(setting, digest_key=verdict.key, digests=verdict.kept_digests)
        running = Collection.of(kept, verdict.kept, peers)
    carry(server, sites, running)
    model, checksums = running.finish()
    assert checksums == model.checksums()
    assert bytes(model.view("w")) == EXPECTED
    store.close()


def carry(server: Exchange, sites: dict[bytes, Exchange], running: Collection) -> None:
    """Let chunks come until all are measured, or reduced."""
    while not running.collector.done:
        server.tick(0)
        while (request := server.next_out(0)) is not None:
            sites[request[0]].deliver(0, b"", request[1], None)
            while (reply := sites[request[0]].next_out(0)) is not None:
                server.deliver(0, request[0], reply[1], bytes(reply[2] or b""))
        while (event := server.next_event()) is not None:
            if isinstance(event, OutputBroken):
                raise StorageError(event.message)
            assert isinstance(event, CollectorDone | NoRoom), event


def main(work: Path, mode: str) -> None:
    template, n = work / "template", 0
    first_journal(template)
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
            store = Store(folder, SETTINGS, chunk_bytes=CHUNK)
            decided = store.verdict(1) is not None
            store.close()
            if code:
                round_one(folder)
            assert (folder / "model").read_bytes().endswith(EXPECTED)
        except BaseException as error:
            error.add_note(f"call {n} ({call}) in mode {mode!r}, which ended with {code}: {said}")
            raise
        found = {"n": n, "call": call, "code": code, "said": said, "decided": decided}
        print(json.dumps(found), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
