"""An error's text as a site may tell it: what went wrong, without the paths of its machine."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["error_text", "report_uncaught"]

# What ends the name of a file that holds data, a model or a program.
_ENDING: Final = (
    r"\.(?:arrow|bam|bin|bz2|ckpt|conf|csv|db|dcm|docx?|feather|gguf|gz|h5|hdf5|html?|ini|ipynb|jpe?g|jsonl?|log|"
    r"md|mp3|mp4|nii|npy|npz|orc|parquet|pdf|pickle|pkl|png|pth?|py|rtf|safetensors|sqlite3?|tar|tgz|tiff?|toml|"
    r"tsv|txt|vcf|wav|xlsx?|xml|ya?ml|zip|zst)(?!\w)"
)
# A path without quotes may hold spaces: one that starts at a root may go on up to the end of its clause.
_CLAUSE: Final = r"""(?:[^\n:;,"`'()<>|\[\]{}]|(?<=\w)'(?=\w))*"""
_ROOTED: Final = re.compile(
    r"(?<![\w.~/\\-])(?:~[\w.-]*[/\\]|\.{1,2}[/\\]|/(?=\S)|[A-Za-z]:[/\\]|\\\\(?=\w))" + _CLAUSE
)
_QUOTED: Final = re.compile(r"""(?<!\w)(['"`])([^\n]*?)\1(?!\w)""")
_WORDS: Final = re.compile(
    rf"(?<![\w.~-])(?:[\w.~-]*(?:[/\\][\w.~-]+)+(?:{_CLAUSE}{_ENDING})?|[\w.~-]*\w{_ENDING})",
    re.IGNORECASE,
)
_WORD_BEFORE: Final = re.compile(r"""([^\s:;,"'`()<>|\[\]{}=]+)[ ]$""")
_LEADING: Final = re.compile(
    r"an?|and|are|as|at|bad|be|but|by|called|can(?:no|')t|couldn't|could|data|decode|directory|errors?|exists?|"
    r"failed|files?|find|folder|for|found|from|got|has|in|input|into|invalid|is|it|line|load|loading|missing|named|"
    r"no|not|nothing|of|on|open|opening|or|pars(?:e|ing)|path|read|reading|rows?|save|such|than|that|the|this|to|"
    r"unable|was|while|with|writ(?:e|ing)",
    re.IGNORECASE,
)
_PART: Final = re.compile(rf"[/\\]|{_ENDING}", re.IGNORECASE)
_LAST_ENDING: Final = re.compile(rf".*{_ENDING}", re.IGNORECASE | re.DOTALL)
_SHOWN_CHARACTERS: Final = 500
_READ_CHARACTERS: Final = 4000


def error_text(error: BaseException) -> str:
    """Return an error's type and text, with ``<path>`` in place of all that may be a path of this machine.

    Where a path in the text ends can't be told for sure, so rather more than a path is left out than less.
    """
    text = str(error)[:_READ_CHARACTERS]
    for name in sorted(_file_names(error), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<path>", text)
    for folder in _known_folders():
        text = text.replace(folder, "/~")
    text = _QUOTED.sub(lambda m: "<path>" if _PART.search(m[2]) else m[0], text)
    text = _ROOTED.sub(_leave_out_rooted, text)
    text = _leave_out_relative(text)
    return f"{type(error).__name__}: {text[:_SHOWN_CHARACTERS]}"


def _leave_out_relative(text: str) -> str:
    """Leave out what has a separator or a file's ending, and the words before it that may be its beginning.

    A name without quotes may hold spaces, so all goes up to a sign or to a word that leads to a name.
    """
    done, at = "", 0
    for match in _WORDS.finditer(text):
        if not re.search(r"[^\W\d]", match[0]):
            continue
        before = text[at : match.start()]
        while word := _WORD_BEFORE.search(before):
            if _LEADING.fullmatch(word[1]):
                break
            before = before[: word.start()]
        done, at = done + before + "<path>", match.end()
    return done + text[at:]


def _file_names(error: BaseException) -> set[str]:
    """Return the files that an error and its causes name, as they may stand in a text."""
    names: set[str] = set()
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        for attribute in ("filename", "filename2", "path"):
            value = getattr(link, attribute, None)
            if isinstance(value, str | bytes | os.PathLike) and value:
                path = os.fsdecode(value)
                names |= {repr(value), repr(path), path, str(value)}
                names |= {part for part in [Path(path).name] if len(part) > 2}
        link = link.__cause__ or link.__context__
    return names


def _known_folders() -> list[str]:
    """Return the folders below which a site's files mostly lie, the deepest first."""
    found: set[str] = set()
    for find in (Path.home, Path.cwd, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):  # no home, or a folder that was removed
            folder = find()
            found |= {str(path) for path in (folder, folder.resolve()) if path != path.parent}
    return sorted(found, key=len, reverse=True)


def _leave_out_rooted(match: re.Match[str]) -> str:
    """Keep what follows a file's ending in a clause, where no other path follows."""
    found = match[0]
    ended = _LAST_ENDING.match(found)
    rest = found[ended.end() :] if ended else ""
    if not ended or re.search(r"[/\\]", rest):
        rest = found[len(found.rstrip()) :]
    return "<path>" + rest


def report_uncaught(tell: Callable[[str], None]) -> None:
    """Have the text of an error that ends the script told, before it is shown as ever; once per process."""
    shown = sys.excepthook
    if getattr(shown, "fedcore", False):
        return

    def hook(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        if isinstance(error, Exception):
            tell(error_text(error))
        shown(kind, error, at)

    hook.fedcore = True  # type: ignore[attr-defined]
    sys.excepthook = hook
