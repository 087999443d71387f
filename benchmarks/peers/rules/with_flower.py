"""``with_flower.py FOLDER RULE``, in Flower's environment: one call of a strategy's aggregate_train.

The replies are in memory before the clock starts, as they are when a server app has received them.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy
from flwr.supercore.task_identity import TaskIdentity

STRATEGIES = {
    "median": strategy.FedMedian,
    "trimmed-mean": lambda: strategy.FedTrimmedAvg(beta=0.25),
    "krum": lambda: strategy.Krum(num_malicious_nodes=1),
    "adam": lambda: strategy.FedAdam(eta=0.01, beta_1=0.9, beta_2=0.99, tau=0.001),
}


def record(path, tensors):
    parts = np.split(np.fromfile(path, np.float32), tensors)
    return ArrayRecord({f"t{i:02d}": Array(part) for i, part in enumerate(parts)})


def reply(path, tensors):
    sent = Message(RecordDict(), dst_node_id=1, message_type="train")
    content = RecordDict(
        {"arrays": record(path, tensors), "metrics": MetricRecord({"num-examples": 1})}
    )
    return Message(content, reply_to=sent)


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def main():
    folder, rule = Path(sys.argv[1]), sys.argv[2]
    plan = json.loads((folder / "plan.json").read_text())
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # a message has them
    made = STRATEGIES[rule]()
    if rule == "adam":
        base = np.split(np.fromfile(folder / "base.f32", np.float32), plan["tensors"])
        made.current_arrays = {f"t{i:02d}": part for i, part in enumerate(base)}
    replies = [reply(folder / f"{name}.f32", plan["tensors"]) for name in plan["updates"]]
    begin = time.perf_counter()
    arrays, _ = made.aggregate_train(1, replies)
    seconds = time.perf_counter() - begin
    most = peak()
    out = np.concatenate([array.numpy() for array in arrays.values()])
    out.tofile(folder / "out.raw")
    print(json.dumps({"seconds": [seconds], "peak": most, "dtype": str(out.dtype)}))


main()
