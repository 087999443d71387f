"""Too few files that a process may have open are named at the start, with how many it needs."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.transport.open_files import require_free_files

RUN = """
[run]
name = "t"
rounds = 1
[participants]
count = 30
[server]
listen = "tcp://127.0.0.1:0"
insecure = true
"""
SITE = """
import resource, sys, uuid
from fedcore.errors import ConfigError
from fedcore.transport.link import SiteLink, ServerLink

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
try:
    link = SiteLink("tcp://127.0.0.1:9", uuid.uuid4().bytes)
except ConfigError as error:
    print(error)
else:
    link.close()
    print("dials, with", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def few(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


@pytest.mark.parametrize("limit", [20, 48])
def test_a_server_with_too_few_files_for_its_sites_does_not_start(
    tmp_path: Path, limit: int
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fedcore", "server", "run.toml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: few(limit),
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2), said
    assert f"may have {limit} files open, and a server of 30 sites needs 99" in re.sub(
        r"\s+", " ", said
    )
    assert "ulimit -n 99" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("soft", "hard", "text"),
    [(10, 10, "a site's connection needs"), (10, 64, "dials, with 3"), (64, 64, "dials, with 64")],
)
def test_a_site_with_too_few_files_is_refused_unless_it_may_have_more(
    soft: int, hard: int, text: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SITE, str(soft), str(hard)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert text in done.stdout, done.stderr


def test_where_there_are_enough_files_the_limit_is_left_as_it_is() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    require_free_files(1, "a test")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
