"""The SFT experiment: a causal model is trained whole at three sites, each with other texts (imports torch).

Every arm lies in a folder of its own as a model that ``from_pretrained`` opens, beside its curve; both are
replaced after each round, so that a run goes on after the last round of each arm.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedcore.demo.causal import CausalTask, Exchange
from fedcore.demo.causal_model import tokenise
from fedcore.demo.tasks import batch_order
from fedcore.errors import ConfigError
from fedcore.files.average import aggregate_files

from .hub import load_columns

__all__ = ["Settings", "Sites", "load_exchanges", "share_out", "train_arms"]

_IGNORED: Final = -100
_WEIGHTS: Final = "model.safetensors"

#: Training and validation rows of each site.
Sites = Mapping[str, tuple[list[Exchange], list[Exchange]]]


@dataclass(frozen=True)
class Settings:
    """What all arms share."""

    seed: int = 0
    train_rows: int = 200
    val_rows: int = 16
    max_tokens: int = 96
    rounds: int = 5
    steps: int = 8
    batch_size: int = 4
    learning_rate: float = 1e-4
    mixed: bool = True


def load_exchanges(name: str, split: str, columns: Sequence[str]) -> list[Exchange]:
    """Read a data set by name: its columns with the prompt and the response; rows without either are left out."""
    rows = load_columns(name, split, columns)
    pairs = [(" ".join(prompt.split()), " ".join(response.split())) for prompt, response in rows]
    return [Exchange(*pair) for pair in pairs if all(pair)]


def share_out(sources: Mapping[str, Sequence[Exchange]], settings: Settings) -> Sites:
    """Draw every site's rows from its own source; no prompt is used twice.

    Raises:
        ConfigError: a source holds too few rows.
    """
    seen: set[str] = set()
    sites: dict[str, tuple[list[Exchange], list[Exchange]]] = {}
    for name, rows in sources.items():
        pool = []
        for row in rows:
            if row.prompt.casefold() not in seen:
                seen.add(row.prompt.casefold())
                pool.append(row)
        random.Random(f"{settings.seed}/{name}").shuffle(pool)
        wanted = settings.train_rows + settings.val_rows
        if len(pool) < wanted:
            raise ConfigError(f"{name}: {wanted} rows wanted, {len(pool)} found")
        sites[name] = (pool[settings.val_rows : wanted], pool[: settings.val_rows])
    return sites


class School:
    """The model and the rows, tokenised; one arm trains at a time."""

    def __init__(self, base: Path | str, sites: Sites, settings: Settings) -> None:
        self.settings = settings
        self.names = tuple(sites)
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        task = CausalTask(max_tokens=settings.max_tokens)
        rows = {
            name: tuple([tokenise(self._tokenizer, row, task) for row in part] for part in parts)
            for name, parts in sites.items()
        }
        self._train = {name: train for name, (train, _) in rows.items()}
        self.validation = {name: val for name, (_, val) in rows.items()}
        # Over rows this short, plain attention costs a processor less than the fused one's backward pass.
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, attn_implementation="eager"
        )
        self._base = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._base_loss: dict[str, float] | None = None

    def train(self, names: Sequence[str], key: str, done: int) -> None:
        """Take one round's steps on some sites' rows, with an optimiser that starts anew.

        Args:
            names: whose rows; the batch grows with their number.
            key: the name of the order of batches.
            done: how many rounds of that order came before.
        """
        settings = self.settings
        rows = [row for name in names for row in self._train[name]]
        size = settings.batch_size * len(names)
        order: Iterator[list[int]] = batch_order(len(rows), size, f"{settings.seed}/{key}")
        for _ in range(done * settings.steps):
            next(order)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True
        )
        self.model.train()
        for _ in range(settings.steps):
            batch = next(order)
            optimizer.zero_grad(set_to_none=True)
            for start in range(0, size, settings.batch_size):
                part = [rows[number] for number in batch[start : start + settings.batch_size]]
                loss = self.loss(part).mean() / len(names)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def base_score(self) -> dict[str, float]:
        """Return what `score` gives for the pretrained weights, computed once; they are in the model."""
        if self._base_loss is None:
            self._base_loss = self.score()
        return dict(self._base_loss)

    def score(self) -> dict[str, float]:
        """Return the validation loss on each site's rows: the mean over rows of a response's mean loss."""
        self.model.eval()
        size = self.settings.batch_size
        found = {}
        with torch.inference_mode():
            for name, rows in self.validation.items():
                parts = [self.loss(rows[at : at + size]) for at in range(0, len(rows), size)]
                found[name] = float(torch.cat(parts).mean())
        return found

    def loss(self, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        width = max(len(tokens) for tokens, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), _IGNORED)
        for index, (tokens, prompt) in enumerate(rows):
            ids[index, : len(tokens)] = torch.tensor(tokens)
            labels[index, prompt - 1 : len(tokens) - 1] = torch.tensor(tokens[prompt:])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.mixed):
            # Padding is on the right, which a causal model's earlier positions never see.
            logits = self.model(input_ids=ids, use_cache=False).logits
        each = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none"
        )
        total: Tensor = each.sum(dim=1) / (labels != _IGNORED).sum(dim=1)
        return total

    def begin(self) -> None:
        """Take the pretrained weights."""
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self._base, strict=True):
                parameter.copy_(value)

    def load(self, path: Path) -> None:
        """Take the weights of an arm."""
        found = load_file(path)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(found[name])

    def weights(self, path: Path) -> Path:
        """Write the model's weights alone, tied tensors once."""
        state = {n: p.detach() for n, p in self.model.named_parameters()}
        save_file(state, path, metadata={"format": "pt"})
        return path

    def keep(self, folder: Path, curve: Mapping[str, Any], weights: Path | None = None) -> None:
        """Replace an arm's folder by the model (or by a file of weights) and the curve so far."""
        part, old = folder.with_suffix(".part"), folder.with_suffix(".old")
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        self.model.config.save_pretrained(part)
        self._tokenizer.save_pretrained(part)
        if weights is None:
            self.weights(part / _WEIGHTS)
        else:
            weights.replace(part / _WEIGHTS)
        (part / "curve.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
        if folder.exists():
            folder.replace(old)
        part.replace(folder)
        shutil.rmtree(old, ignore_errors=True)


def curve_of(folder: Path) -> dict[str, Any] | None:
    for place in (
        folder,
        folder.with_suffix(".old"),
    ):  # the second: it was stopped between two renames
        path = place / "curve.json"
        if path.is_file():
            if place != folder:
                place.replace(folder)
            found: dict[str, Any] = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
            return found
    return None


def _mark(base: Path | str, sites: Sites, settings: Settings) -> dict[str, Any]:
    """Return all that an arm depends on, but for the number of rounds: the rows as a hash."""
    rows = json.dumps(
        {name: [asdict(row) for part in parts for row in part] for name, parts in sites.items()}
    )
    mark = {
        **asdict(settings),
        "sites": list(sites),
        "model": Path(base).name if Path(base).is_dir() else str(base),
        "rows": hashlib.sha256(rows.encode()).hexdigest()[:16],
    }
    del mark["rounds"]
    return mark


def train_arms(
    folder: Path, base: Path | str, sites: Sites, settings: Settings, notice: Callable[[str], None]
) -> dict[str, Any]:
    """Train each site alone, all texts together and federated, from where the folder stands; return the curves.

    All arms take a round before any takes the next one, and the number of rounds is no part of what an arm was
    made with: a run that was stopped early is whole with fewer rounds, and one that ended goes on with more.

    Raises:
        ConfigError: the folder holds arms of other settings, or of more rounds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = _mark(base, sites, settings)
    fresh = {"settings": mark, "points": [], "seconds": 0.0, "cpu_seconds": 0.0, "rounds": 0}
    curves: dict[str, Any] = {}
    for arm in ("federated", *sites, "centralised"):
        curves[arm] = curve_of(folder / arm) or {**fresh, "points": []}
        if curves[arm]["settings"] != mark:
            raise ConfigError(
                f"{folder / arm} was made with other settings; remove it or choose another folder with --out"
            )
        if curves[arm]["rounds"] > settings.rounds:
            raise ConfigError(
                f"{folder / arm} holds {curves[arm]['rounds']} rounds, more than {settings.rounds}: give --rounds"
            )
    school: School | None = None
    for done in range(settings.rounds):
        for arm, curve in curves.items():
            if curve["rounds"] != done:
                continue
            school = school or School(base, sites, settings)
            begun = time.monotonic()
            _one_round(school, folder, arm, curve)
            notice(
                f"{arm}: round {done + 1} of {settings.rounds}, {time.monotonic() - begun:.0f} s"
            )
    return curves


def _one_round(school: School, folder: Path, arm: str, curve: dict[str, Any]) -> None:
    begun, cpu, done = time.monotonic(), time.process_time(), curve["rounds"]
    step = (done + 1) * school.settings.steps
    weights: Path | None = None
    if done:
        school.load(folder / arm / _WEIGHTS)
    else:
        school.begin()
        curve["points"].append({"step": 0, "who": arm, "loss": school.base_score()})
    if arm == "federated":
        weights = _federated(school, folder, curve, step)
    else:
        names = school.names if arm == "centralised" else (arm,)
        school.train(names, arm, done)
    curve["points"].append({"step": step, "who": arm, "loss": school.score()})
    curve["rounds"] = done + 1
    curve["seconds"] += time.monotonic() - begun
    curve["cpu_seconds"] += time.process_time() - cpu
    school.keep(folder / arm, curve, weights)


def _federated(school: School, folder: Path, curve: dict[str, Any], step: int) -> Path:
    """Let every site train from the global model, and return the file of their mean, which is loaded too."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    start = school.weights(work / "global.safetensors")
    files = []
    for name in sorted(school.names):
        school.load(start)
        school.train((name,), name, curve["rounds"])
        curve["points"].append({"step": step, "who": name, "loss": school.score()})
        files.append(school.weights(work / f"{name}.safetensors"))
    rows = [school.settings.train_rows] * len(files)
    mean = aggregate_files(files, rows, work / _WEIGHTS, force=True).path
    school.load(mean)
    for file in (start, *files):
        file.unlink()
    return mean
