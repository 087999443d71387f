"""What every message may carry, and what of it a side that does not know it makes of it."""

from __future__ import annotations

import json

import pytest

from fedcore import protocol
from fedcore.errors import ProtocolError

READY = {"type": "ready", "round": 1, "weight": 5}
SET = {"id": "0" * 32, "layout": "1" * 64}


def site(**values: object) -> protocol.FromSite:
    return protocol.decode_from_site(json.dumps(values).encode())


def test_an_extension_that_is_not_known_is_ignored() -> None:
    message = site(type="alive", ext={"later": {"deep": [1]}, "must": []})
    assert isinstance(message, protocol.Alive)


def test_an_extension_that_must_be_known_is_refused_by_its_name() -> None:
    said = "bad control message: alive: ext.must names later, other, which this version of fedcore does not know"
    with pytest.raises(ProtocolError, match=said):
        site(type="alive", ext={"later": 1, "must": ["later", "other"]})
    with pytest.raises(ProtocolError, match="rejoin: ext.must names later"):
        protocol.decode_from_server(b'{"type":"rejoin","ext":{"must":["later"]}}')


def test_a_large_declaration_may_have_an_extension() -> None:
    tensors = [[f"layer.{i}.weight", "F32", [8, 8]] for i in range(5000)]
    assert len(json.dumps(tensors)) > protocol.SMALL_BYTES
    message = site(type="declare", ext={"later": 1}, run_id="0" * 32, tensors=tensors)
    assert isinstance(message, protocol.Declare)
    assert protocol.decode_from_site(protocol.encode(message)) == message


def test_a_message_without_run_or_extension_has_neither_field() -> None:
    assert protocol.encode(protocol.Alive()) == b'{"type":"alive"}'
    refused = protocol.Refused(code="version", message="no")
    assert json.loads(protocol.encode(refused)).keys() == {"type", "code", "message"}


def test_features_are_numbers_by_name_and_new_ones_mean_nothing() -> None:
    join = {"type": "join", "protocol": 2, "version": "9", "site": "a", "instance": "0" * 32}
    message = site(**join, features={"lossless": 3, "telepathy": 1})
    assert isinstance(message, protocol.Join)
    assert message.features == {"lossless": 3, "telepathy": 1}
    with pytest.raises(ProtocolError, match=r"join\.features"):
        site(**join, features={"lossless": True})


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ([], "no set is named model"),
        ([{**SET, "name": "control"}], "no set is named model"),
        ([SET, SET], "two sets have one name"),
        ([{**SET, "name": f"s{i}"} for i in range(17)], "at most 16 items"),
    ],
)
def test_an_update_has_one_set_of_each_name_and_a_model(sets: list[object], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        site(**READY, sets=sets)


def test_the_model_of_an_update_is_found_among_its_sets() -> None:
    other = {**SET, "name": "control", "id": "2" * 32}
    message = site(**READY, sets=[other, SET])
    assert isinstance(message, protocol.Ready)
    assert message.model.id == "0" * 32


def test_what_names_a_run_is_acted_on_in_that_run_alone() -> None:
    run = "0" * 32
    assert protocol.is_of_run(protocol.Alive(), run)
    assert protocol.is_of_run(protocol.Alive(run_id=run), run)
    assert not protocol.is_of_run(protocol.Alive(run_id="1" * 32), run)
    assert protocol.is_of_run(protocol.Rejoin(), run)
