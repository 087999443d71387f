"""The PEFT experiment: sentiment at four sites, for each site alone, federated and with all texts in one place."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fedcore.errors import ConfigError
from fedcore.files.partition import by_source, dirichlet

if TYPE_CHECKING:
    from .classifier import Encoder, Rows
    from .sentiment import Pool, Text

__all__ = [
    "SKEWED",
    "STEADY",
    "Cell",
    "Lab",
    "Settings",
    "Source",
    "Steadier",
    "Trainee",
    "cells",
    "keep",
    "read_kept",
    "run_cell",
    "run_cells",
    "site_of",
]

_SITES: Final = 4
#: The skew at which plain averaging swings.
SKEWED: Final = "0.3"
#: The skew at which all methods are tried.
_MILD: Final = "1"


@dataclass(frozen=True)
class Settings:
    """What all cells of one run of the experiment share."""

    layers: int = 6
    frozen: int = 5
    max_tokens: int = 32
    train_rows: int = 32
    test_rows: int = 150
    rounds: int = 6
    steps: int = 10
    batch_size: int = 8
    learning_rate: tuple[tuple[str, float], ...] = (
        ("lora", 2e-3),
        ("p-tuning", 1e-2),
        ("ia3", 1e-2),
    )


@dataclass(frozen=True)
class Source:
    """Where the model and the texts come from.

    Attributes:
        model: a folder, or a name at the Hub.
        texts: all labelled texts.
        name: what the report calls them.
    """

    model: Path | str
    texts: Sequence[Text]
    name: str


@dataclass(frozen=True)
class Steadier:
    """What is done against swings.

    Attributes:
        rate: factor on the sites' learning rate.
        steps: factor on the steps of a round; there are as many more rounds.
        prox: weight of the squared distance to the global model in each site's loss (FedProx: Li et al. 2020).
        momentum: share of the server's last step that is carried into its next one (FedAvgM: Hsu et al. 2019);
            the new mean counts for the rest.
    """

    rate: float = 1.0
    steps: float = 1.0
    prox: float = 0.0
    momentum: float = 0.0


STEADY: Final[Mapping[str, Steadier]] = MappingProxyType(
    {
        "plain": Steadier(),
        "rate/4": Steadier(rate=0.25),
        "short rounds": Steadier(steps=0.2),
        "proximal": Steadier(prox=1.0),
        "momentum": Steadier(momentum=0.5),
    }
)


@dataclass(frozen=True)
class Cell:
    """One split of the data, trained with one method from one seed.

    Attributes:
        split: ``natural``, a Dirichlet alpha, or ``pooled``: all texts in one place.
        steady: a key of `STEADY`.
    """

    method: str
    split: str
    seed: int
    steady: str = "plain"

    @property
    def name(self) -> str:
        """The stem of its files."""
        return "-".join(
            (
                self.method,
                self.split,
                self.steady.replace("/", "by").replace(" ", "_"),
                str(self.seed),
            )
        )


def cells(
    methods: Sequence[str], alphas: Sequence[float], seeds: Sequence[int], *, steady: bool
) -> list[Cell]:
    """Return the cells of an experiment, the first method's before the others'.

    The first method is trained on every split, the others on the natural one and at alpha 1 (the last alpha, if
    that is none of them); what steadies is tried with the first method at alpha 0.3.
    """
    first, *others = methods
    skews = [f"{alpha:g}" for alpha in alphas]
    mild = [_MILD] if _MILD in skews else skews[-1:]
    found = [Cell(first, split, seed) for seed in seeds for split in ("pooled", "natural", *skews)]
    found += [
        Cell(m, split, seed)
        for m in others
        for seed in seeds
        for split in ("pooled", "natural", *mild)
    ]
    if steady and SKEWED in skews:
        found += [
            Cell(first, SKEWED, seed, name) for seed in seeds for name in STEADY if name != "plain"
        ]
    return found


def shares(pool: Pool, split: str, seed: int, min_size: int) -> dict[str, tuple[int, ...]]:
    """Return the rows of the pool that each site holds, by the site's name."""
    if split == "pooled":
        return {"centralised": tuple(range(len(pool.train)))}
    if split == "natural":
        found = by_source([text.source for text in pool.train])
        return dict(zip(pool.sources, found.sites, strict=True))
    found = dirichlet(
        [text.label for text in pool.train],
        _SITES,
        alpha=float(split),
        min_size=min_size,
        seed=seed,
    )
    return {f"site-{number}": rows for number, rows in enumerate(found.sites, start=1)}


class Lab:
    """The pool of one seed, after the lower layers, and the models that are trained on it."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        from .classifier import Encoder

        self.settings, self.seed = settings, seed
        self.pool = self.draw(settings, source, seed)
        self.encoder: Encoder = Encoder(
            source.model, settings.layers, settings.frozen, settings.max_tokens
        )
        self._rows: dict[str, Rows] = {}

    @staticmethod
    def draw(settings: Settings, source: Source, seed: int) -> Pool:
        """Draw the rows of a seed."""
        from .sentiment import make_pool

        return make_pool(source.texts, settings.train_rows, settings.test_rows, seed)

    def rows(self, side: str) -> Rows:
        """All training or all test rows."""
        if side not in self._rows:
            texts = self.pool.train if side == "train" else self.pool.test
            self._rows[side] = self.encoder.rows(texts, self.pool.labels)
        return self._rows[side]

    def model(self, method: str) -> Any:
        """The start of every arm."""
        return self.encoder.adapter(method, len(self.pool.labels), self.seed)


class Trainee:
    """One site's rows, its order of batches and its optimiser, which live on from round to round."""

    def __init__(
        self, model: Any, rows: Rows, *, rate: float, prox: float, size: int, key: str
    ) -> None:
        import torch

        from fedcore.demo.tasks import batch_order

        self._model, self._rows, self._prox = model, rows, prox
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=rate, weight_decay=0.0)
        self._order: Iterator[list[int]] = batch_order(len(rows), size, key)

    @property
    def weight(self) -> int:
        """Its number of rows."""
        return len(self._rows)

    def train(self, steps: int) -> None:
        """Take some steps from where the model is."""
        start = [p.detach().clone() for p in self._trained] if self._prox else []
        self._model.train()
        for _ in range(steps):
            loss = self._model(**self._rows.batch(next(self._order))).loss
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for parameter, origin in zip(self._trained, start, strict=bool(start)):
                parameter.grad.add_(parameter.detach() - origin, alpha=self._prox)
            self._optimizer.step()


def site_of(settings: Settings, cell: Cell, name: str, model: Any, rows: Rows) -> Trainee:
    """Return a cell's site of that name, which trains ``model`` on its own ``rows``."""
    how = STEADY[cell.steady]
    return Trainee(
        model,
        rows,
        rate=dict(settings.learning_rate)[cell.method] * how.rate,
        prox=how.prox,
        # All texts in one place: as many rows a step as all sites have together.
        size=settings.batch_size * (_SITES if cell.split == "pooled" else 1),
        key=f"{cell.seed}/{name}",
    )


def run_cell(lab: Lab, cell: Cell, notice: Callable[[str], None]) -> tuple[dict[str, Any], Any]:
    """Train the arms of a cell; return their accuracy over the rounds, and the last federated or pooled state."""
    from .classifier import accuracy
    from .federation import Stride, load_state, mean, state_of

    settings, how = lab.settings, STEADY[cell.steady]
    steps = max(1, round(settings.steps * how.steps))
    rounds = round(settings.rounds * settings.steps / steps)
    held = shares(lab.pool, cell.split, cell.seed, settings.batch_size)
    train, test = lab.rows("train"), lab.rows("test")
    model = lab.model(cell.method)
    begin = state_of(model)

    def trainee(name: str) -> Trainee:
        return site_of(settings, cell, name, model, train.pick(held[name]))

    def scored() -> dict[str, Any]:
        loss, right = accuracy(model, test)
        return {
            "accuracy": float(right.double().mean()),
            "loss": loss,
            "right": right.int().tolist(),
        }

    first = scored()
    curves: dict[str, list[dict[str, Any]]] = {}
    if cell.steady == "plain":
        for name in held:
            load_state(model, begin)
            alone = trainee(name)
            curves[name] = [first]
            for _ in range(rounds):
                alone.train(steps)
                curves[name].append(scored())
            notice(f"{cell.name}: {name} {curves[name][-1]['accuracy']:.3f}")
    last = state_of(model)
    if cell.split != "pooled":
        load_state(model, begin)
        sites = [trainee(name) for name in sorted(held)]
        last, stride = begin, Stride(how.momentum)
        curves["federated"] = [first]
        for _ in range(rounds):
            states = []
            for site in sites:
                load_state(model, last)
                site.train(steps)
                states.append(state_of(model))
            last = stride.take(last, mean(states, [site.weight for site in sites]))
            load_state(model, last)
            curves["federated"].append(scored())
        notice(f"{cell.name}: federated {curves['federated'][-1]['accuracy']:.3f}")
    labels = [text.label for text in lab.pool.train]
    return {
        "cell": asdict(cell),
        "steps_per_round": steps,
        "sites": {
            name: {label: sum(labels[row] == label for row in rows) for label in lab.pool.labels}
            for name, rows in held.items()
        },
        "curves": {
            name: {key: [point[key] for point in points] for key in ("accuracy", "loss")}
            for name, points in curves.items()
        },
        "right": {name: points[-1]["right"] for name, points in curves.items()},
    }, last


def run_cells(
    folder: Path,
    settings: Settings,
    source: Source,
    wanted: Sequence[Cell],
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Train what is not in the folder yet, and return all cells by name.

    A cell is kept with the settings that it was made with; one of other settings is named, not mixed in.
    """
    from safetensors.torch import save_file

    kept = folder / "cells"
    kept.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    labs: dict[int, Lab] = {}
    for number, cell in enumerate(wanted):
        path, mark = kept / f"{cell.name}.json", fingerprint(settings, source, cell)
        earlier = read_kept(path, mark)
        if earlier is not None:
            found[cell.name] = earlier
            continue
        begun, cpu = time.monotonic(), time.process_time()
        if cell.seed not in labs:
            labs[cell.seed] = Lab(settings, source, cell.seed)
        lab = labs[cell.seed]
        result, state = run_cell(lab, cell, notice)
        result |= {
            "settings": mark,
            "seconds": time.monotonic() - begun,
            "cpu_seconds": time.process_time() - cpu,
        }
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            path.with_suffix(".safetensors"),
        )
        keep(path, result)
        found[cell.name] = result
        notice(f"{number + 1} of {len(wanted)}: {cell.name}, {result['seconds']:.0f} s")
    return found


def read_kept(path: Path, mark: str) -> dict[str, Any] | None:
    """Return what is kept of an earlier run.

    Raises:
        ConfigError: it was made with other settings.
    """
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != mark:
        raise ConfigError(
            f"{path} was made with other settings; remove it or choose another folder with --out"
        )
    return found


def keep(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    part.replace(path)


def fingerprint(settings: Settings, source: Source, cell: Cell) -> str:
    """Return a hash of everything that a cell depends on."""
    plain = {
        "settings": {
            **asdict(settings),
            "learning_rate": dict(settings.learning_rate)[cell.method],
        },
        "cell": asdict(cell),
        "steady": asdict(STEADY[cell.steady]),
        "model": Path(str(source.model)).name,
        "texts": [asdict(text) for text in source.texts],
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
