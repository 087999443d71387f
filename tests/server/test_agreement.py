"""What all sites must have alike, and how one that does not is turned away."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore.client.session import Session
from fedcore.client.settings import SiteSettings
from fedcore.config import parse_run
from fedcore.errors import ClosedError, RefusedError
from fedcore.server.agreement import Agreement
from fedcore.server.service import Server

CONFIG = {"peft_type": "LORA", "r": 8, "target_modules": ["q", "v"], "base_model_name_or_path": "x"}


def declared(tokenizer: str = "", **config: Any) -> protocol.Declare:
    return protocol.Declare(
        tensors=[("w", "F32", [1])],
        files={"adapter_config.json": json.dumps({**CONFIG, **config})} if config else {},
        fingerprints={"tokenizer": tokenizer * 64} if tokenizer else {},
    )


def test_a_peft_config_that_differs_names_both_sites_and_the_entry() -> None:
    agreement = Agreement(dict)
    assert agreement.difference("a", declared(r=8)) is None
    said = agreement.difference("b", declared(r=16))
    assert said is not None
    assert "site 'b' differs from that of site 'a' in 'r': 16 at site 'b', 8 at site 'a'" in said
    assert agreement.difference("b", declared(r=8)) is None, "once it is put right"


@pytest.mark.parametrize(
    "free",
    [
        {"base_model_name_or_path": "y"},
        {"target_modules": ["v", "q"]},
        {"a_later_entry": 3},
        {"peft_version": "9"},
    ],
    ids=str,
)
def test_what_says_nothing_of_the_tensors_may_differ(free: dict[str, Any]) -> None:
    agreement = Agreement(dict)
    assert agreement.difference("a", declared(r=8)) is None
    assert agreement.difference("b", declared(**free)) is None


def test_a_tokenizer_that_differs_names_both_sites() -> None:
    agreement = Agreement(dict)
    assert agreement.difference("a", declared("1")) is None
    assert agreement.difference("c", declared()) is None, "a site may have none to show"
    said = agreement.difference("b", declared("2"))
    assert said is not None
    assert "tokenizer of site 'b' (sha256 222222222222) is not that of site 'a'" in said


def test_a_site_may_come_again_with_another_config_while_no_other_differs() -> None:
    agreement = Agreement(dict)
    assert agreement.difference("a", declared("1", r=8)) is None
    assert agreement.difference("a", declared("2", r=4)) is None
    assert agreement.difference("b", declared("2", r=4)) is None


def test_a_site_that_is_forgotten_is_compared_with_nobody() -> None:
    agreement = Agreement(dict)
    assert agreement.difference("a", declared("1", r=8)) is None
    assert agreement.difference("b", declared("2", r=4)) is not None
    agreement.forget("a")
    assert agreement.difference("b", declared("2", r=4)) is None


def test_the_config_of_the_initial_model_counts_too() -> None:
    agreement = Agreement(lambda: {"adapter_config.json": json.dumps(CONFIG)})
    said = agreement.difference("a", declared(r=2))
    assert said is not None
    assert "differs from that of the run's initial model in 'r'" in said


def test_of_two_sites_with_unlike_tokenizers_one_is_refused_with_both_names(tmp_path: Path) -> None:
    config = parse_run(
        {
            "run": {"name": "t", "rounds": 1},
            "participants": {"sites": ["north", "south"], "round_deadline": "60s"},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
        },
        folder=tmp_path,
    )
    server = Server(config)
    sessions = [Session(SiteSettings(server.endpoint, site)) for site in ("north", "south")]

    def take_part(session: Session, digit: str) -> str:
        try:
            session.is_running()
            session.begin(
                [("w", "F32", [1])], {}, lambda _: memoryview(bytes(4)), {"tokenizer": digit * 64}
            )
        except RefusedError as error:
            for other in sessions:
                other.close()
            return str(error)
        except ClosedError:
            pass
        return ""

    with ThreadPoolExecutor(3) as pool:
        serving = pool.submit(server.run)
        found = list(pool.map(take_part, sessions, "12"))
        server.stop()
        serving.result(30)
    refused = [text for text in found if text]
    assert len(refused) == 1, found
    assert "tokenizer" in refused[0]
    assert "'north'" in refused[0]
    assert "'south'" in refused[0]
