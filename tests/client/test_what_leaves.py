"""Every byte that a site sends in a run is a layout, an update, a named metric or a count."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcore.client.hf as fl
from fedcore import protocol
from fedcore.model_file import open_model
from fedcore.server.outcome import RunResult

HOME = "/home/a-private-name/models"
GREETING_BYTES = 64


class Tap:
    """Passes on one connection and keeps what goes from the site to the server."""

    def __init__(self, server: str) -> None:
        host, port = server.removeprefix("tcp://").split(":")
        self.sent = bytearray()
        self._far = socket.create_connection((host, int(port)))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._up)]
        self._threads[0].start()

    def _up(self) -> None:
        near, _ = self._listener.accept()
        self._listener.close()
        down = threading.Thread(target=self._down, args=(near,))
        down.start()
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 16):
                self.sent += data
                self._far.sendall(data)
            self._far.shutdown(socket.SHUT_WR)
        down.join()

    def _down(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self._far.recv(1 << 16):
                near.sendall(data)
            near.shutdown(socket.SHUT_WR)

    def messages(self) -> list[list[bytes]]:
        """Wait for the connection's end; return the ZMTP messages, which must be all that was sent."""
        self._threads[0].join(200)
        assert not self._threads[0].is_alive()
        stream, at, found = bytes(self.sent), GREETING_BYTES, []
        parts: list[bytes] = []
        while at < len(stream):
            flags = stream[at]
            length = 8 if flags & 2 else 1
            size = int.from_bytes(stream[at + 1 : at + 1 + length], "big")
            at += 1 + length
            body, at = stream[at : at + size], at + size
            assert len(body) == size
            if flags & 4:  # a command of ZMTP itself
                assert body.startswith(b"\x05READY"), body
                continue
            parts.append(body)
            if not flags & 1:
                found.append(parts)
                parts = []
        assert not parts
        return found


def adapter_model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64))
    base.config._name_or_path = base.name_or_path = f"{HOME}/base"
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    config.base_model_name_or_path = f"{HOME}/base"
    return get_peft_model(base, config)


def test_nothing_but_layout_update_metrics_and_counts_leaves_a_site(
    run: Future[RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer, TrainingArguments

    tap = Tap(os.environ["FEDCORE_SERVER"])
    monkeypatch.setenv("FEDCORE_SERVER", tap.address)
    model = adapter_model()
    ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True),
        train_dataset=rows,
        eval_dataset=rows[:4],
    )
    fl.patch(trainer)
    while fl.is_running():
        fl.log({"seen": 3.0}, step=7)
        trainer.evaluate()
        trainer.train()
    assert run.result(200).ok

    said: list[protocol.FromSite] = []
    chunks: dict[bytes, dict[int, bytes]] = {}
    for header, *rest in tap.messages():
        fields = protocol.read_header(header)
        kind, set_id = protocol.Kind(fields.kind), fields.set_id
        assert sum(map(len, rest)) == fields.length
        if kind is protocol.Kind.CHUNK:
            assert fields.encoding == 0
            chunks.setdefault(set_id, {})[fields.index] = rest[0]  # it may be asked for twice
        elif kind is protocol.Kind.CONTROL:
            said.append(protocol.decode_from_site(rest[0]))
        else:
            assert kind in (protocol.Kind.GET, protocol.Kind.PING)
            assert not rest

    # The updates: each chunk that left is of a set that was announced, and holds the adapter and no more.
    ready = {bytes.fromhex(m.model.id): m for m in said if isinstance(m, protocol.Ready)}
    assert set(chunks) == set(ready)
    assert sorted(m.round for m in ready.values()) == [0, 1, 2, 3]
    for set_id, message in ready.items():
        committed = open_model(tmp_path / f"runs/t/models/round-{message.round:04d}.safetensors")
        views = committed.views()
        flat = b"".join(bytes(views[name]) for name, *_ in committed.layout.tensors)
        assert b"".join(body for _, body in sorted(chunks[set_id].items())) == flat

    # The words: named metrics, counts, the layout and the adapter's card, from which paths are cut.
    allowed = {"join", "declare", "ready", "score", "log", "alive", "leave"}
    assert {message.type for message in said} <= allowed
    declare = next(m for m in said if isinstance(m, protocol.Declare))
    assert {name.rpartition(".lora_")[0] for name, *_ in declare.tensors} == {
        "base_model.model.transformer.h.0.attn.c_attn"
    }
    assert list(declare.files) == ["adapter_config.json"]
    assert json.loads(declare.files["adapter_config.json"])["base_model_name_or_path"] == "base"
    times = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
    names = {name for message in said for name in getattr(message, "metrics", {})}
    assert names == {"seen", "eval_loss", "train_loss", "epoch"} | times
    counts = {m.examples for m in said if isinstance(m, protocol.Score)}
    assert counts == {4}

    # And nothing of what must stay.
    sent = bytes(tap.sent)
    assert HOME.encode() not in sent
    assert str(tmp_path).encode() not in sent
    assert ids[0].numpy().tobytes() not in sent
    base = model.base_model.model.transformer.wte.weight.detach()[0]
    assert base.numpy().tobytes()[:16] not in sent
