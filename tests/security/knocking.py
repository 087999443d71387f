"""Strangers that knock on a server's port with keys that it does not know, until standard input ends.

``python knocking.py HOST PORT SERVER_KEY COUNT``: each of them dials, makes the handshake, is refused or left to
wait, and dials again a second later. A line "on" or "off" on standard input starts or stops them all.
"""

from __future__ import annotations

import os
import sys

import zmq


def strangers(address: str, server_key: bytes, count: int) -> tuple[zmq.Context, list[zmq.Socket]]:
    context: zmq.Context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, count + 10)
    found = []
    for _ in range(count):
        public, secret = zmq.curve_keypair()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 1000)
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.connect(address)
        found.append(socket)
    return context, found


def main() -> None:
    os.nice(19)  # what an attacker computes, it computes elsewhere
    host, port, server_key, count = sys.argv[1:]
    for line in sys.stdin:
        if line == "on\n":
            context, sockets = strangers(f"tcp://{host}:{port}", server_key.encode(), int(count))
            print("on", flush=True)
        elif line == "off\n":
            context.destroy(linger=0)
            del sockets
            print("off", flush=True)


if __name__ == "__main__":
    main()
