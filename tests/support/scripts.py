"""Training scripts that a test writes into its folder."""

from __future__ import annotations

ADD_ONE = """
    import numpy as np
    import fedcore.client as fl

    fl.init({"w": np.zeros(1000, np.float32)})
    while fl.is_running():
        values = fl.receive()
        fl.send({"w": values["w"] + 1}, weight=1, metrics={"loss": float(values["w"][0])})
"""
