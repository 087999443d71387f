"""The commands: complete help, a quick start, one clear line per error, and the right exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore import __version__
from fedcore.cli.app import app, main, status_of_all

Command = Callable[..., "subprocess.CompletedProcess[str]"]
COMMANDS = (
    "server",
    "simulate",
    "status",
    "aggregate",
    "demo",
    "provision",
    "keygen",
    "admit",
    "revoke",
    "pause",
    "resume",
    "stop",
    "rollback",
    "evaluate",
)


def test_the_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for name in COMMANDS:
        assert f"  {name} " in text


def test_the_summary_of_each_command_fits_into_80_columns() -> None:
    lines = CliRunner().invoke(app, ["--help"], terminal_width=80).output.splitlines()
    commands = lines[lines.index("Commands:") + 1 :]
    assert len(commands) >= len(COMMANDS)
    assert [line for line in commands if line.endswith("...")] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_explains_every_option_and_gives_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"fedcore {name}" in result.output.partition("Examples:")[2]
    options = result.output.partition("\nOptions:\n")[2].splitlines()
    for position, line in enumerate(options):
        if line.startswith("  -") and not line.strip().partition("  ")[2]:
            assert options[position + 1].startswith("      "), f"{line} has no help"


def test_the_help_comes_without_what_takes_long_to_import() -> None:
    heavy = ("numpy", "pydantic", "rich", "safetensors", "torch", "transformers", "zmq")
    done = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", "-m", "fedcore", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert [name for name in [*heavy, "fedcore._core"] if name in imported] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["server", "--help"]])
def test_an_output_that_cannot_be_written_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fedcore", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the output: No space left on device\n"


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"fedcore {__version__}\n"


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; returns its exit status, its output and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        assert isinstance(left.value.code, int)
        return left.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run file whose script is missing."""
    (tmp_path / "run.toml").write_text(
        '[run]\nname = "t"\nrounds = 1\n[participants]\ncount = 1\n[simulate]\nscript = "train.py"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nonsense"], 2, "No such command"),
        (["simulate"], 2, "Missing argument"),
        (["simulate", "missing.toml"], 2, "error: cannot read run file missing.toml"),
        (["server", "missing.toml"], 2, "error: cannot read run file missing.toml"),
        (["simulate", "run.toml", "--set", "rounds=3"], 2, "expected section.key=value"),
        (["simulate", "run.toml", "--set", "run.rounds=0"], 2, "run.rounds"),
        (["simulate", "run.toml"], 2, "train.py does not exist"),
        (["aggregate", "a.st", "-o", "b.st", "--weights", "x"], 2, "expected integers"),
        (["aggregate", "a.st", "-o", "b.st", "--weights", "0"], 2, "weight 0 of a.st"),
        (["aggregate", "a.st", "-o", "b.st", "--rule", "mode"], 2, "expected one of mean, median"),
        (["aggregate", "a.st", "-o", "b.st"], 1, "cannot open model file a.st"),
        (["aggregate", "a.st", "-o", "no/b.st"], 1, "there is no folder no"),
    ],
)
def test_an_error_is_one_clear_line(
    arguments: list[str],
    status: int,
    said: str,
    ended: Callable[..., tuple[int, str, str]],
    folder: Path,
) -> None:
    code, out, err = ended(*arguments)
    assert code == status, err
    assert said in err
    assert "Traceback" not in err
    assert not out


def test_an_error_of_a_command_is_one_line_without_a_traceback(
    fedcore: Command, folder: Path
) -> None:
    done = fedcore("simulate", "run.toml")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "train.py does not exist" in done.stderr
    assert not done.stdout


def test_debugging_shows_the_traceback(tmp_path: Path, fedcore: Command) -> None:
    done = fedcore("simulate", tmp_path / "missing.toml", FEDCORE_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


def test_ctrl_c_gives_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedcore.files.average.aggregate_files", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["aggregate", "a.st", "-o", str(tmp_path / "out.st")])
    assert ended.value.code == 130


def test_the_demo_names_the_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "peft" else real(name, *rest),
    )
    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    assert ended.value.code == 2
    assert "pip install 'fedcore-fl[demo]'" in capsys.readouterr().err


def test_an_override_wins_over_the_run_file(
    run_file: Callable[..., Path], fedcore: Command
) -> None:
    path = run_file()
    done = fedcore("simulate", path, "--set", "run.rounds=1", "--set", "run.name=other")
    assert done.returncode == 0, done.stderr
    models = path.parent / "runs" / "other" / "models"
    assert len(list(models.iterdir())) == 2
    assert "round 1 of 1 committed" in done.stdout
    assert f"best model: {path.parent / 'runs' / 'other' / 'best'}" in done.stdout


@pytest.mark.skipif(
    not Path(sys.executable).with_name("fedcore-server").exists(), reason="not installed"
)
def test_the_server_has_a_command_of_its_own() -> None:
    command = Path(sys.executable).with_name("fedcore-server")
    done = subprocess.run(
        [command, "--help"], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert "Serve one run" in done.stdout


@pytest.mark.parametrize("command", ["status", "stop"])
@pytest.mark.parametrize("seconds", ["nan", "-1", "0", "1e400"])
def test_a_timeout_that_is_none_is_wrong_use(
    ended: Callable[..., tuple[int, str, str]], command: str, seconds: str
) -> None:
    code, _, err = ended(command, "tcp://127.0.0.1:9", "--insecure", f"--timeout={seconds}")
    assert code == 2
    assert "expected a number of seconds above 0" in " ".join(err.replace("│", "").split())


@pytest.mark.parametrize("port", ["99999", "0"])
def test_a_port_that_is_none_is_wrong_use(
    ended: Callable[..., tuple[int, str, str]], port: str
) -> None:
    code, _, err = ended("status", f"tcp://127.0.0.1:{port}", "--insecure")
    assert code == 2
    assert "a port from 1 to 65535" in err


@pytest.mark.parametrize(
    ("statuses", "status"), [([130, 143], 143), ([143, 1], 1), ([130, 130], 130), ([129, 130], 129)]
)
def test_a_server_of_several_runs_has_one_exit_status(statuses: list[int], status: int) -> None:
    assert status_of_all(statuses) == status
