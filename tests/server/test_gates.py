"""Gates are asked before each round of training: what one refuses does not begin."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore.clock import ManualClock
from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.gates import RoundRequest
from fedcore.model_file import create_model
from fedcore.monitor.ask import StatusClient
from fedcore.server import gates as module
from fedcore.server.gates import Gates
from fedcore.server.service import Server
from fedcore.server.storage.store import Store

from ..support.arriving import Arriving, says
from ..support.raw_site import DEADLINE, RawSite
from ..support.run_folders import LAYOUT, SETTINGS, run_of, values
from ..support.runs import run, run_config, site

NAME = "fedcore.server.gates:test_gate"


def config(tmp_path: Path, **more: Any) -> RunConfig:
    plain: RunConfig = run_config(tmp_path, sites=["a"], **more)
    server = plain.server.model_copy(update={"gates": [NAME]})
    return plain.model_copy(update={"server": server})


class Asked(Gates):
    """Gates whose answer is waited for."""

    def __init__(self, run_file: RunConfig, store: Store) -> None:
        self.came = threading.Event()
        super().__init__(run_file, store, self.came.set)

    def may_begin(self, round_: int) -> bool | None:
        if self.allow(round_):
            return True
        assert self.came.wait(DEADLINE)
        return self.answer()


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Set what the gate does; returns the rounds that it is asked for."""

    def to(act: Callable[[RoundRequest], object]) -> list[int]:
        asked: list[int] = []

        def gate(request: RoundRequest) -> object:
            asked.append(request.round)
            return act(request)

        monkeypatch.setattr(module, "test_gate", gate, raising=False)
        return asked

    return to


def test_a_gate_is_asked_once_for_each_round_and_not_for_the_evaluation(
    tmp_path: Path, answer: Callable[..., list[int]]
) -> None:
    asked = answer(lambda _: None)
    server = Server(config(tmp_path, rounds=3))
    result, trained = run(server, lambda: site(server.endpoint, "a", 1))
    assert (result.ok, trained, asked) == (True, [3], [1, 2, 3])


def test_a_refused_round_begins_once_the_run_is_resumed_and_the_gate_allows_it(
    tmp_path: Path, answer: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_, refused = threading.Event(), threading.Event()
    asked = answer(lambda request: None if request.round < 2 or open_.is_set() else "no budget")
    take = Gates.answer

    def answered(gates: Gates) -> bool | None:
        found = take(gates)
        if found is False:
            refused.set()
        return found

    monkeypatch.setattr(Gates, "answer", answered)
    server = Server(config(tmp_path, rounds=2))

    def operator() -> int:
        assert refused.wait(DEADLINE)
        with StatusClient(server.endpoint) as client:
            reply = client.command("resume", DEADLINE)
            assert not reply.ok
            assert "no budget" in reply.message
            status = client.ask(DEADLINE)
            assert (status.phase, [v.version for v in status.versions]) == ("paused", [0, 1])
            assert "no budget" in status.message
            open_.set()
            assert client.command("resume", DEADLINE).ok
        return 0

    result, trained = run(server, lambda: site(server.endpoint, "a", 1), operator)
    assert (result.ok, trained[0], asked) == (True, 2, [1, 2, 2, 2])


def raises(_: RoundRequest) -> None:
    raise RuntimeError("the ledger is away")


def ends(_: RoundRequest) -> None:
    raise SystemExit(3)


class Wordless(Exception):
    def __str__(self) -> str:
        raise ValueError


def raises_wordless(_: RoundRequest) -> None:
    raise Wordless


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda _: "too much", "refuses it: too much"),
        (lambda _: "\x1b[2Jtoo\n\udcff", r"refuses it: \x1b[2Jtoo \udcff"),
        (ends, "fails: SystemExit: 3"),
        (raises_wordless, "fails: Wordless"),
        (lambda _: True, "answers bool"),
        (raises, "fails: RuntimeError: the ledger is away"),
    ],
)
def test_what_is_not_none_refuses(
    act: Callable[[RoundRequest], object],
    text: str,
    tmp_path: Path,
    answer: Callable[..., list[int]],
) -> None:
    answer(act)
    store = Store(tmp_path / "run", SETTINGS)
    gates = Asked(config(tmp_path), store)
    assert not gates.may_begin(1)
    assert text in gates.refusal
    assert store.allowed_round == 0
    store.close()


def test_a_round_that_was_allowed_is_asked_for_again_only_after_a_rollback(
    tmp_path: Path, answer: Callable[..., list[int]]
) -> None:
    asked = answer(lambda _: None)
    folder = run_of(tmp_path / "run", 3.0, 2.0)
    for _ in range(2):  # another server
        store = Store(folder, SETTINGS)
        assert Asked(config(tmp_path), store).may_begin(2)
        store.close()
    assert asked == [2]
    store = Store(folder, None)
    store.roll_back(0)
    assert Asked(config(tmp_path), store).may_begin(2)
    store.close()
    assert asked == [2, 2]


def test_an_update_of_a_refused_round_does_not_count(
    tmp_path: Path, answer: Callable[..., list[int]]
) -> None:
    """A run whose round is under way gets a gate, and the server is started again."""
    answer(lambda _: None)
    first = Server(config(tmp_path, rounds=1))
    run(first, lambda: site(first.endpoint, "a", 1))
    answer(lambda _: "closed")
    server = Server(config(tmp_path, rounds=2))

    def deliver() -> int:
        raw = RawSite(server.endpoint, "a")
        update = protocol.NamedSet(id="0" * 32, layout=server.runs[0].versions.layout_hash)
        raw.link.send(protocol.Ready(round=2, sets=[update], weight=1))
        dropped = raw.await_message(protocol.Dropped)
        raw.link.close()
        server.stop()
        assert "refused" in dropped.message
        return 0

    result, _ = run(server, deliver)
    assert (result.ending, result.version) == ("stopped", 1)


def test_a_gate_is_asked_aside_and_once_and_named_where_it_is_slow(
    tmp_path: Path, answer: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    free = threading.Event()
    asked = answer(lambda _: free.wait(DEADLINE) and None)
    store, clock = Store(tmp_path / "run", SETTINGS), ManualClock()
    came = threading.Event()
    gates = Gates(config(tmp_path), store, came.set, clock.monotonic)
    for _ in range(2):  # the second time it is not asked once more
        assert not gates.allow(1)
    assert (gates.answer(), gates.refusal) == (None, "")
    assert gates.state == f"gate {NAME} is asked for round 1"
    clock.advance(11.0)
    assert gates.answer() is None
    assert [f"waits for gate {NAME}" in text for text in caplog.messages] == [True]
    assert store.allowed_round == 0
    free.set()
    assert came.wait(DEADLINE)
    assert (gates.answer(), gates.answer()) == (True, None)
    assert (store.allowed_round, gates.allow(1), asked) == (1, True, [1])
    store.close()


def test_a_run_that_is_paused_while_its_gate_is_asked_stays_paused(
    tmp_path: Path, answer: Callable[..., list[int]]
) -> None:
    begun, free = threading.Event(), threading.Event()

    def slow(request: RoundRequest) -> None:
        if request.round == 2:
            begun.set()
            assert free.wait(DEADLINE)

    asked = answer(slow)
    server = Server(config(tmp_path, rounds=2))

    def operator() -> int:
        assert begun.wait(DEADLINE)
        with StatusClient(server.endpoint) as client:
            assert "is asked for round 2" in client.ask(DEADLINE).message
            assert client.command("pause", DEADLINE).ok
            assert client.command("pause", DEADLINE).ok
            free.set()
            while (status := client.ask(DEADLINE)).message != "paused: no other round begins":
                assert status.phase == "paused"
            assert client.command("resume", DEADLINE).ok
        return 0

    result, trained = run(server, lambda: site(server.endpoint, "a", 1), operator)
    assert (result.ok, trained[0], asked) == (True, 2, [1, 2])


def test_an_operator_is_answered_once_the_gates_have_answered(
    tmp_path: Path, answer: Callable[..., list[int]]
) -> None:
    begun, free = threading.Event(), threading.Event()

    def slow(request: RoundRequest) -> None:
        if request.round == 2:
            begun.set()
            assert free.wait(DEADLINE)

    answer(slow)
    server = Server(config(tmp_path, rounds=2))

    def operator() -> int:
        assert begun.wait(DEADLINE)
        with StatusClient(server.endpoint) as client, StatusClient(server.endpoint) as other:
            assert client.command("pause", DEADLINE).ok
            with ThreadPoolExecutor(1) as pool:
                resumed = pool.submit(client.command, "resume", DEADLINE)
                while "asked" not in other.ask(DEADLINE).message:
                    assert not resumed.done()
                free.set()
                assert resumed.result(DEADLINE).message == "the rounds go on"
        return 0

    result, _ = run(server, lambda: site(server.endpoint, "a", 1), operator)
    assert result.ok


@contextlib.contextmanager
def asking(
    tmp_path: Path, answer: Callable[..., list[int]], says_no: str = ""
) -> Iterator[tuple[Server, Arriving, threading.Event]]:
    """Serve a run whose gate is being asked for round 1, and answers once the event is set."""
    free = threading.Event()
    answer(lambda _: says_no if free.wait(DEADLINE) and says_no else None)
    model = create_model(tmp_path / "model.safetensors", LAYOUT, {"fedcore.version": "0"})
    model.fill(lambda _: values(0))
    plain, link = config(tmp_path), Arriving()
    named = plain.model_copy(
        update={"model": plain.model.model_copy(update={"initial": "model.safetensors"})}
    )
    server = Server(named, link=link)  # type: ignore[arg-type]
    with contextlib.closing(server):
        try:
            server.start()
            link.recv = lambda _: link.waiting.pop(0) if link.waiting else None
            yield server, link, free
        finally:
            free.set()


@pytest.mark.parametrize(
    ("how", "text"), [("stop", "the run is over"), ("interrupt", "ended by SIGTERM")]
)
def test_an_operator_is_answered_also_where_the_run_ends_before_its_gates_answer(
    tmp_path: Path, answer: Callable[..., list[int]], how: str, text: str
) -> None:
    with asking(tmp_path, answer) as (server, link, _):
        link.waiting = [says("v", protocol.Command(action="resume"))]
        server.step()
        assert link.sent == []
        server.stop() if how == "stop" else server.interrupt("SIGTERM")
        server.end_what_is_asked()
        server.step()
        replies = [m for _, m in link.sent if isinstance(m, protocol.CommandReply)]
        assert [(reply.ok, text in reply.message) for reply in replies] == [(False, True)]


def test_an_update_that_comes_while_its_gate_is_asked_does_not_count_if_that_refuses(
    tmp_path: Path, answer: Callable[..., list[int]]
) -> None:
    with asking(tmp_path, answer, says_no="closed") as (server, link, free):
        run = server.runs[0]
        join = protocol.Join(version="0", site="a", run="t", instance="0" * 32)
        update = protocol.NamedSet(id="0" * 32, layout=run.versions.layout_hash)
        ready = protocol.Ready(round=1, sets=[update], weight=1, run_id=run.store.run_id)
        link.waiting = [says("a", join), says("a", ready)]
        server.step()
        assert run.rounds.roster.get("a").delivery is not None  # type: ignore[union-attr]
        came = threading.Event()
        link.wake = came.set
        free.set()
        assert came.wait(DEADLINE)
        server.step()
        (dropped,) = [m for _, m in link.sent if isinstance(m, protocol.Dropped)]
        assert "refused" in dropped.message
        assert run.rounds.roster.get("a").delivery is None  # type: ignore[union-attr]


def test_a_run_file_whose_gate_cannot_be_loaded_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.gates: .*has no function"):
        Server(config(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_the_gate_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/listeners.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# quota.*?)```", page, re.DOTALL)
    (tmp_path / "quota.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import quota

    monkeypatch.setattr(module, "test_gate", quota.gate, raising=False)
    store = Store(tmp_path / "run", SETTINGS)
    gates = Asked(config(tmp_path, rounds=20), store)
    assert gates.may_begin(10)
    assert not gates.may_begin(11)
    assert "the contract covers 10 rounds" in gates.refusal
    store.close()
