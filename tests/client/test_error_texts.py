"""What a site tells the server about an error: what went wrong, and no word of where its files lie."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedcore.client.torch import TorchSite
from fedcore.site.error_text import error_text

SECRETS = ("jane", "john", "smith", "ward", "clinic", "secret")


def assert_private(text: str) -> None:
    assert not [word for word in SECRETS if word in text.lower()], text


@pytest.mark.parametrize(
    "name",
    [
        "john smith.csv",
        "jane/ward 3/john smith.csv",
        "john smith",
        'o\'john "smith".csv',
        "clinic: jane (copy), smith",
        "john",
    ],
)
def test_the_files_of_an_operating_system_error_are_left_out(name: str, tmp_path: Path) -> None:
    for path in (name, str(tmp_path / "clinic" / name)):
        with pytest.raises(FileNotFoundError) as raised:
            Path(path).read_text()
        assert_private(error_text(raised.value))
        assert "FileNotFoundError: [Errno 2] No such file or directory: <path>" in error_text(
            raised.value
        )
        with pytest.raises(FileNotFoundError) as raised:
            Path(path).rename(path + " old")
        text = error_text(raised.value)
        assert_private(text)
        assert text.endswith("<path> -> <path>")


def test_a_file_named_by_a_cause_is_left_out() -> None:
    def read() -> None:
        try:
            Path("john smith").read_text()
        except OSError as error:
            raise RuntimeError(f"no data in john smith, {error}") from error

    with pytest.raises(RuntimeError) as raised:
        read()
    text = error_text(raised.value)
    assert_private(text)
    assert text.startswith("RuntimeError: no data in <path>, [Errno 2]")


def test_the_home_and_the_working_folder_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "jane smith", tmp_path / "the clinic"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for folder in (home, work, home / "x", work / "x"):
        assert_private(error_text(ValueError(f"nothing in {folder}")))
        assert_private(error_text(ValueError(f"nothing in <{folder}/x/john> here")))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("bad row in 'john smith.csv' at 3", "bad row in <path> at 3"),
        ('bad row in "/data/ward 3/john" at 3', "bad row in <path> at 3"),
        ("bad row in `~/ward 3/john`", "bad row in <path>"),
        ("can't open '/home/jane/a b/c' for writing", "can't open <path> for writing"),
        (r"can't open 'C:\\Users\\Jane Smith\\x.csv'", "can't open <path>"),
        (
            "cannot open /home/jane/my ward/john smith.csv for reading",
            "cannot open <path> for reading",
        ),
        ("cannot open /home/jane/john.csv for reading", "cannot open <path> for reading"),
        ("cannot open /home/jane/John Smith: not a folder", "cannot open <path>: not a folder"),
        (r"cannot open C:\Users\Jane Smith\x.csv", "cannot open <path>"),
        (r"cannot open \\clinic\share\jane smith.csv", "cannot open <path>"),
        ("cannot open ~/john smith.csv", "cannot open <path>"),
        ("cannot open ../ward/john.csv", "cannot open <path>"),
        ("cannot open ward/john.csv", "cannot open <path>"),
        ("cannot open john.csv", "cannot open <path>"),
        ("cannot open john smith.csv", "cannot open <path>"),
        ("cannot open jane ward 3/john smith.csv", "cannot open <path>"),
        (
            "the file smith clinic/secret: 3 rows, john smith.csv: none",
            "the file <path>: 3 rows, <path>: none",
        ),
        ("no rows in secret jane smith/ward", "no rows in <path>"),
        ("cannot open file:///home/jane/a%20b.csv", "cannot open file:<path>"),
        ("PosixPath('/home/jane/john smith')", "PosixPath(<path>)"),
        ("/home/o'jane/smith", "<path>"),
        ("first /home/jane\nthen /home/john", "first <path>\nthen <path>"),
    ],
)
def test_paths_in_a_message_are_left_out(message: str, expected: str) -> None:
    text = error_text(ValueError(message))
    assert_private(text)
    assert text == f"ValueError: {expected}"


@pytest.mark.parametrize(
    "message",
    [
        "tensor 'net.0.lora_A.weight' has shape (3, 4); the global model has (4, 3)",
        "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 15.78 GiB total capacity)",
        "mat1 and mat2 shapes cannot be multiplied (8x4 and 5x1)",
        "the model's key 'labels' isn't there: got ['input_ids', 'mask']",
        "expected a loss < 1e-3, got 5 / 4 = 1.25",
    ],
)
def test_the_rest_of_a_message_stays(message: str) -> None:
    assert error_text(ValueError(message)) == f"ValueError: {message}"


def test_a_key_error_and_a_json_error_are_told() -> None:
    assert error_text(KeyError("/home/jane/x y")) == "KeyError: <path>"
    assert error_text(KeyError("labels")) == "KeyError: 'labels'"
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads("{")
    assert error_text(raised.value).startswith("JSONDecodeError: Expecting property name")


def test_without_a_working_folder_an_error_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert error_text(ValueError("no data in /home/jane")) == "ValueError: no data in <path>"


def test_a_long_message_is_cut_after_its_paths_are_left_out() -> None:
    text = error_text(ValueError("x " * 240 + "'" + "/home/jane smith" * 50 + "'"))
    assert_private(text)
    assert len(text) <= 520


def test_a_site_reports_an_error_without_paths_and_lets_it_pass() -> None:
    told: list[str] = []
    site = TorchSite(SimpleNamespace(problem=told.append))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError), site.reporting():
        Path("john smith").read_text()
    assert told == ["FileNotFoundError: [Errno 2] No such file or directory: <path>"]
