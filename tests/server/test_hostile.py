"""A site that breaks the rules harms its own part in the run and nothing else."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import zmq
from safetensors.numpy import load_file, save_file

from fedcore import __version__, protocol
from fedcore.config import ModelSection
from fedcore.errors import LayoutError
from fedcore.monitor.ask import ask_status
from fedcore.protocol import control_frames, read_header
from fedcore.server.service import Server
from fedcore.server.timing import Timing
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import SiteLink

from ..support.raw_site import DEADLINE, RawSite
from ..support.runs import SPECS, run, run_config, site, writer


@pytest.mark.parametrize(
    "tensors",
    [
        [("w", "F31", [4])],
        [("w", "F32", [4]), ("w", "F32", [4])],
        [("w", "F32", [0])],
        [("w", "F32", [1 << 46])],
        [("w", "F32", [1 << 47, 1 << 47])],
        [("w", "F32", [4]), ("w" * 5000, "F32", [4])],
    ],
    ids=[
        "unknown dtype",
        "one name twice",
        "no bytes",
        "larger than the disk",
        "beyond 64 bits",
        "name too long",
    ],
)
def test_tensors_that_cannot_be_are_refused_and_the_run_goes_on(
    tmp_path: Path, tensors: list[tuple[str, str, list[int]]]
) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1))

    def hostile() -> int:
        raw = RawSite(server.endpoint, "b")
        raw.link.send(protocol.Declare.model_construct(type="declare", tensors=tensors, files={}))
        refused = raw.await_message(protocol.Refused)
        raw.link.close()
        assert refused.code in ("layout", "message")
        return site(server.endpoint, "a", 1)

    result, _ = run(server, hostile)
    assert result.ok


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (("w", "BF16", [5000]), "tensor 'w': site b has BF16 [5000], the global model has F32"),
        (("w", "I32", [5000]), "tensor 'w': site b has I32 [5000], the global model has F32"),
        (("w", "F32", [2500, 2]), "tensor 'w': site b has F32 [2500, 2], the global model has F32"),
        (("w", "F32", [4999]), "tensor 'w': site b has F32 [4999], the global model has F32"),
        (("W", "F32", [5000]), "tensor 'w': site b does not have it, the global model has F32"),
        (None, "tensor 'w': site b does not have it, the global model has F32"),
    ],
    ids=["dtype", "dtype of the same size", "shape of the same size", "shape", "name", "missing"],
)
def test_a_site_whose_tensors_differ_is_refused_by_the_tensors_name_and_the_round_goes_on(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    declared: tuple[str, str, list[int]] | None,
    said: str,
) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1))
    tensors = [SPECS[1]] if declared is None else [declared, SPECS[1]]

    def right_one() -> int:
        with closing(Session(SiteSettings(server=server.endpoint, site="a"))) as session:
            assert session.is_running()
            session.begin(SPECS, {}, writer(0))
            other = closing(Session(SiteSettings(server=server.endpoint, site="b")))
            with other as wrong:
                assert wrong.is_running()
                with pytest.raises(LayoutError) as refused:
                    wrong.begin(tensors, {}, writer(0))
            session.submit(writer(1), 1)
            while session.is_running():
                session.begin(SPECS, {}, writer(0))
                session.end_task()
        assert said + " [5000]" in str(refused.value)
        return 1

    result, _ = run(server, right_one)
    assert (result.ok, result.version) == (True, 1)
    (logged,) = [r.getMessage() for r in caplog.records if "refused b" in r.getMessage()]
    assert said in logged


@pytest.mark.parametrize("version", [1, 3])
def test_a_site_of_another_version_reads_both_versions_and_what_to_do(
    tmp_path: Path, version: int
) -> None:
    join = protocol.Join(version="test", site="b", instance=uuid4().hex)
    server = Server(run_config(tmp_path, sites=["a"], rounds=1))

    def other() -> int:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(server.endpoint)
            socket.send_multipart(control_frames(join, version))
            assert socket.poll(1000 * DEADLINE)
            head, body = socket.recv_multipart()
        assert head[4] == version
        # Of every version: nothing but these three fields, so that each can read it.
        assert json.loads(body) == {
            "type": "refused",
            "code": "version",
            "message": f"this site speaks protocol {version}, the server 2 (fedcore {__version__}); install the "
            "same version of fedcore on both sides",
        }
        return site(server.endpoint, "a", 1)

    result, _ = run(server, other)
    assert (result.ok, result.version) == (True, 1)


def test_a_site_whose_join_has_what_this_version_does_not_know_is_told_both_versions(
    tmp_path: Path,
) -> None:
    class Newer(protocol.Join):
        protocol: int = 9
        colour: str = "blue"

    server = Server(run_config(tmp_path, sites=["a"], rounds=1))

    def newer() -> int:
        link = SiteLink(server.endpoint, uuid4().bytes)
        link.send(Newer(version="9.9", site="b", instance=uuid4().hex))
        raw = RawSite.__new__(RawSite)
        raw.link = link
        refused = raw.await_message(protocol.Refused)
        link.close()
        assert refused.code == "version"
        assert "site 'b' speaks protocol 9 (fedcore 9.9), the server 2" in refused.message
        return site(server.endpoint, "a", 1)

    result, _ = run(server, newer)
    assert result.ok


def test_a_message_of_another_run_changes_nothing_and_is_answered_with_rejoin(
    tmp_path: Path,
) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1))

    def mistaken() -> int:
        raw = RawSite(server.endpoint, "b")
        raw.link.send(protocol.Leave(reason="another run", run_id="0" * 32))
        raw.await_message(protocol.Rejoin)
        assert [known.site for _, known in server.runs[0].peers] == ["b"]
        raw.link.send(protocol.Leave(reason="this one", run_id=server.runs[0].store.run_id))
        raw.link.close()
        return site(server.endpoint, "a", 1)

    result, _ = run(server, mistaken)
    assert result.ok


def test_an_update_of_more_sets_than_the_run_takes_is_refused_by_their_names(
    tmp_path: Path,
) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1))

    def more() -> int:
        raw = RawSite(server.endpoint, "b")
        sets = [protocol.NamedSet(name=n, id="0" * 32, layout="0" * 64) for n in ("model", "more")]
        raw.link.send(protocol.Ready(round=0, sets=sets, weight=1))
        refused = raw.await_message(protocol.Refused)
        raw.link.close()
        assert refused.code == "sets"
        assert "of the sets model, more; this run takes one, model" in refused.message
        return site(server.endpoint, "a", 1)

    result, _ = run(server, more)
    assert result.ok


def test_a_score_of_a_model_that_does_not_exist_counts_for_nothing(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=2, min_results=1))

    def hostile() -> int:
        raw = RawSite(server.endpoint, "b")
        raw.link.send(protocol.Score(version=999, metrics={"loss": -1.0}, examples=1))
        raw.link.send(protocol.Leave(reason="done"))
        raw.link.close()
        return site(server.endpoint, "a", 2)

    result, _ = run(server, hostile)
    assert (result.ok, result.best_version) == (True, 2)


def test_a_status_too_long_for_a_message_is_cut_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(run_config(tmp_path, sites=["a"], rounds=12))
    monkeypatch.setattr(protocol, "MAX_CONTROL_BYTES", 1300)
    asked: list[protocol.StatusReply] = []

    def watch() -> int:
        while not asked or asked[-1].phase not in protocol.ENDED:
            asked.append(ask_status(server.endpoint, DEADLINE))
        return len(asked)

    result, _ = run(server, watch, lambda: site(server.endpoint, "a", 1))
    assert result.ok
    assert len(asked[-1].versions) == 1


def silent_site(address: str, name: str, over: threading.Event) -> None:
    """Join, declare, and offer an update of which no chunk ever comes; answer pings all the while."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, uuid4().bytes)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)

    def say(message: Any) -> None:
        socket.send_multipart(control_frames(message))

    say(protocol.Join(version="test", site=name, instance=uuid4().hex))
    offered = False
    while not over.is_set():
        if not socket.poll(200):
            say(protocol.Alive())
            continue
        header, *body = socket.recv_multipart()
        if read_header(header).kind != protocol.Kind.CONTROL or not body:
            continue
        message = protocol.decode_from_server(body[0])
        if isinstance(message, protocol.Welcome):
            say(protocol.Declare(tensors=[("w", "F32", [5000]), ("n", "I64", [2])]))
        elif isinstance(message, protocol.Task) and message.kind == "train" and not offered:
            offered = True
            assert message.model is not None
            say(
                protocol.Ready(
                    round=message.round,
                    sets=[protocol.NamedSet(id=uuid4().hex, layout=message.model.layout)],
                    weight=1,
                    metrics={},
                )
            )
    socket.close()
    context.term()


def test_a_site_that_answers_but_sends_no_data_is_lost_and_the_round_closes(
    tmp_path: Path,
) -> None:
    start = {"w": np.zeros(5000, np.float32), "n": np.array([1, 2])}
    save_file(start, tmp_path / "start.safetensors")
    config = run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1)
    config = config.model_copy(update={"model": ModelSection(initial="start.safetensors")})
    server = Server(config, timing=Timing(data_silence=2.0))
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        silent = pool.submit(silent_site, server.endpoint, "b", over)
        try:
            result, _ = run(server, lambda: site(server.endpoint, "a", 3))
        finally:
            over.set()
        silent.result(DEADLINE)
    assert result.ok
    assert load_file(tmp_path / "runs/t/final/model.safetensors")["w"][0] == 3


def test_a_site_that_floods_the_server_is_named_and_loses_its_part_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=2, min_results=1))
    reply, exchange = server.runs[0].ending.reply_status, server.link.exchange

    def reply_slowly(peer: bytes) -> None:
        """How fast a machine answers must not decide whether more comes than is answered."""
        until = time.monotonic() + DEADLINE
        while not exchange.stats()["dropped"] and time.monotonic() < until:
            time.sleep(0.01)
        reply(peer)

    monkeypatch.setattr(server.runs[0].ending, "reply_status", reply_slowly)

    def hostile() -> int:
        raw = RawSite(server.endpoint, "b")
        frames = [b"S", b"", *control_frames(protocol.StatusRequest())]
        for _ in range(20_000):
            raw.link.command(frames)
        assert raw.await_message(protocol.Refused).code == "flood"
        raw.link.close()
        return site(server.endpoint, "a", 2)

    result, _ = run(server, hostile)
    assert (result.ok, result.best_version) == (True, 2)
    assert "b floods the server: 1024 control messages" in caplog.text
