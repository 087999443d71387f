"""What every message may carry, and what of it a side that does not know it makes of it."""

from __future__ import annotations

import base64
import json
import resource
import zlib

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


def table(count: int) -> list[tuple[str, str, list[int]]]:
    return [
        (f"layers.{i // 128}.experts.{i % 128}.lora_A.weight", "F32", [8, 64]) for i in range(count)
    ]


def declared(packed: str) -> bytes:
    return json.dumps({"type": "declare", "packed": packed}).encode()


def squeezed(text: bytes) -> str:
    return base64.b64encode(zlib.compress(text)).decode()


def test_a_table_of_many_tensors_travels_packed_and_comes_out_the_same() -> None:
    tensors = table(138_240)
    message = protocol.Declare(tensors=tensors, packed=protocol.pack_table(tensors))
    body = protocol.encode(message)
    assert len(body) < 1 << 20
    found = protocol.decode_from_site(body, 138_240)
    assert isinstance(found, protocol.Declare)
    assert found.tensors == tensors
    opened = protocol.OpenSet.model_construct(
        id="0" * 32, layout="1" * 64, tensors=[], packed=message.packed
    )
    task = protocol.Task(kind="train", round=1, rounds=1, version=0).model_copy(
        update={"sets": [opened]}
    )
    told = protocol.decode_from_server(protocol.encode(task))
    assert isinstance(told, protocol.Task)
    assert told.model is not None
    assert told.model.tensors == tensors


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (squeezed(json.dumps(table(1001)).encode()), "more than 1,000 tensors"),
        (squeezed(b"[" * 100_000), "more than 1,000 tensors"),
        (squeezed(b"[" + b"0," * 100_000 + b"0]"), "more than 1,000 tensors"),
        (squeezed(b" " * (200 << 20)), "more than 2,048,000 bytes of text"),
        (squeezed(b'[["w","F32",[1]]]')[:-8], "expected a packed table of tensors"),
        (base64.b64encode(b"no zlib").decode(), "expected a packed table of tensors"),
        ("no base64!", "expected a packed table of tensors"),
        (squeezed(b'[["w","F32",[-1]]]'), r"0\.2\.0: Input should be greater"),
        (squeezed(b'[["w\\u202e","F32",[1]]]'), r"0\.0: Value error, expected printable"),
        (squeezed(b"[]"), "at least 1 item"),
    ],
)  # fmt: skip
def test_a_packed_table_that_is_none_or_too_large_is_refused(packed: str, said: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProtocolError, match=said):
        protocol.decode_from_site(declared(packed), 1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_a_declaration_has_its_tensors_once() -> None:
    packed = protocol.pack_table([("w", "F32", [1])])
    with pytest.raises(ProtocolError, match="given twice"):
        site(type="declare", tensors=[["w", "F32", [1]]], packed=packed)
    with pytest.raises(ProtocolError, match="expected at least one"):
        site(type="declare")
