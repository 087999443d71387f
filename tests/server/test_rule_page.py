"""What the page about rules says of a run, followed as it stands."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fedcore.model_file import open_model

from ..support.runs import site

PAGE = Path(__file__).parents[2] / "docs/write-your-own-rule.md"
RUN_FILE = """
[run]
name = "t"
rounds = 1

[participants]
count = 4

[server]
listen = "tcp://127.0.0.1:0"
insecure = true
"""


def test_a_run_by_the_rule_on_the_page_works_as_it_is_written(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (skeleton, *_) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    section = page.partition("### In a run\n")[2].partition("\n### ")[0]
    (setting,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    (line,) = re.findall(r"^    (.* fedcore server .*)$", section, re.MULTILINE)
    variable, program, *arguments = shlex.split(line)
    assert program == "fedcore"
    (tmp_path / "trimmed.py").write_text(skeleton, encoding="utf-8")
    (tmp_path / "run.toml").write_text(RUN_FILE + setting, encoding="utf-8")
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "fedcore", *arguments],
        cwd=tmp_path,
        env={**os.environ, **dict([variable.split("=", 1)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    try:
        assert server.stdout is not None
        for text in server.stdout:
            said.append(text)
            if found := re.search(r"listening on (tcp://[\d.:]+)", text):
                break
        else:
            raise AssertionError("".join(said))
        steps = {"a": 1.0, "b": 2.0, "c": 5.0, "d": -90.0}
        with ThreadPoolExecutor(len(steps)) as pool:
            done = [
                pool.submit(functools.partial(site, found[1], name, step))
                for name, step in steps.items()
            ]
            said.extend(server.stdout)
            assert server.wait(200) == 0, "".join(said)
            assert [trained.result(200) for trained in done] == [1] * len(steps)
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
    model = open_model(tmp_path / "runs/t/models/round-0001.safetensors")
    assert bytes(model.view("w")) == np.full(5000, 1.5, np.float32).tobytes()
    assert model.metadata["fedcore.rule"] == "trimmed:TrimmedMean 1"
