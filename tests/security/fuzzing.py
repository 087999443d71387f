"""Hostile input for an encrypted server, without a key and with one, until standard input ends.

``python fuzzing.py ADDRESS KIT SEED``: raw bytes and half-made handshakes from strangers, and mutated frames from
the owner of the kit. A line "on" or "off" on standard input starts or stops them; "off" is answered by how much
was sent.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import zmq

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed package

from fedcore.security.keys import Credentials, load_kit
from tests.support.fuzzer import Fuzzer

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)


class Member(Fuzzer):
    """A fuzzer that has a key."""

    def __init__(self, address: str, name: str, seed: int, credentials: Credentials) -> None:
        self._credentials = credentials
        super().__init__(address, name, seed)

    def _prepare(self, dealer: zmq.Socket[bytes]) -> None:
        dealer.setsockopt(zmq.CURVE_SERVERKEY, self._credentials.server_key.encode())
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, self._credentials.pair.public.encode())
        dealer.setsockopt(zmq.CURVE_SECRETKEY, self._credentials.pair.secret.encode())


class Stranger:
    """Raw bytes on the port: noise, greetings cut short or changed, commands of any length, and long silences."""

    def __init__(self, address: str, seed: int) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._where = (host, int(port))
        self._dice = random.Random(seed)
        self._silent: list[socket.socket] = []
        self.sent = 0

    def one(self) -> None:
        dice = self._dice
        greeting = bytearray(GREETING)
        for _ in range(dice.choice([0, 0, 1, 4])):
            greeting[dice.randrange(len(greeting))] = dice.randrange(256)
        size = dice.choice([0, 1, 200, 257, 5000, 1 << 20, 1 << 31, (1 << 63) - 1])
        command = dice.choice([b"\x06", b"\x04", b"\x02", b"\xff"])
        data = dice.choice(
            [
                dice.randbytes(dice.randrange(1, 2000)),
                bytes(greeting[: dice.randrange(1, 65)]),
                bytes(greeting) + command + size.to_bytes(8, "big") + dice.randbytes(300),
                bytes(greeting) + b"\x04\xc8\x05HELLO\x01\x00" + dice.randbytes(192),
            ]
        )
        with contextlib.suppress(OSError):
            connection = socket.create_connection(self._where, timeout=2)
            connection.sendall(data)
            self.sent += 1
            self._silent.append(connection)
            if len(self._silent) > 50:
                self._silent.pop(dice.randrange(50)).close()

    def close(self) -> None:
        for connection in self._silent:
            connection.close()


def main() -> None:
    os.nice(19)  # what an attacker computes, it computes elsewhere
    address, kit, seed = sys.argv[1], load_kit(Path(sys.argv[2])), int(sys.argv[3])
    over = threading.Event()
    threads: list[threading.Thread] = []
    fuzzers: list[Any] = []

    def harass(fuzzer: Any) -> None:
        while not over.is_set():
            fuzzer.one()
        fuzzer.close()

    for line in sys.stdin:
        seed += 1
        if line == "on\n":
            over.clear()
            fuzzers = [
                Stranger(address, seed),
                Member(address, kit.name, seed, kit.credentials),
                Member(address, kit.name, -seed, kit.credentials),
            ]
            threads = [threading.Thread(target=harass, args=(f,), daemon=True) for f in fuzzers]
            for thread in threads:
                thread.start()
            print("on", flush=True)
        elif line == "off\n":
            over.set()
            for thread in threads:
                thread.join()
            print(sum(fuzzer.sent for fuzzer in fuzzers), flush=True)


if __name__ == "__main__":
    main()
