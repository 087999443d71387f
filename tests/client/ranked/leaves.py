"""Prints how many threads of gloo there are while ranks talk, and when the interpreter is about to end."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def threads() -> int:
    names = ((task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
    return sum(name.startswith("pt_gloo") for name in names)


atexit.register(lambda: print("at the end", threads(), flush=True))  # runs after what follows

from fedcore.client.ranks import Ranks  # noqa: E402

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
ranks = Ranks()
assert ranks.together(lambda: 7) == 7
dist.broadcast(torch.tensor([1]), 0)
print("at work", threads() > 0, flush=True)
if len(sys.argv) > 2:
    dist.destroy_process_group()
