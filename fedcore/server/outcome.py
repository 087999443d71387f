"""How a run ends: the best model so far, the folders ``best/`` and ``final/``, and the summary file."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from fedcore import __version__, protocol
from fedcore.config import RunConfig
from fedcore.errors import IntegrityError
from fedcore.server.rounds.participation import Roster, SiteState
from fedcore.server.rounds.selection import Pooling, SiteScore, pooled_metrics
from fedcore.server.storage.history import VersionRow, version_status
from fedcore.server.storage.store import AVERAGE, Store
from fedcore.words import plural

from .ranking import early_end, ranked, worse_sites

__all__ = ["Ending", "Outcome", "RunResult"]

logger = logging.getLogger("fedcore.server")

_WAY_ON: Final = (
    "put it back from a backup; or remove it, and once the server is started again the best of the other models "
    "is taken"
)


Ending = Literal["complete", "stopped", "failed"]


@dataclass(frozen=True)
class RunResult:
    """How a run ended, or why the server's process did before the run.

    Attributes:
        ending: ``"complete"``: all rounds were committed and the last model was scored; ``"stopped"``: an operator
            ended the run; ``"failed"``: it was given up; ``"interrupted"``: the process ended, and the run goes on
            once the server is started again.
        best_version: the selected version, or None if nothing was committed.
        message: why it ended, if not as planned.
    """

    ending: Ending | Literal["interrupted"]
    version: int | None
    best_version: int | None
    best: Path | None
    final: Path | None
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the run is complete."""
        return self.ending == "complete"


def _judged(row: VersionRow) -> dict[str, Any]:
    """Return what a rule of several passes made of the updates of a version's round; nothing of other rules."""
    if row.verdict is None:
        return {}
    status = version_status(row, {}, 0)
    updates = {of.site: {"weight": of.weight, "score": of.score} for of in status.updates}
    return {"updates": updates, "measure": status.measure, "base": row.verdict.decision.base}


class Outcome:
    """Selects the best version and writes what a run leaves behind.

    Attributes:
        best: the version that ``best/`` holds, as far as this process knows.
    """

    def __init__(self, config: RunConfig, store: Store, roster: Roster) -> None:
        self._config = config
        self._store = store
        self._roster = roster
        chosen = config.selection
        self._pooling = Pooling.of_settings(chosen.average, chosen.max_share)
        self.best: int | None = None
        self._without_metric: set[str] = set()
        self._damaged: int | None = None

    def export_best(self) -> int | None:
        """Write ``best/`` if another version leads now; returns the version that ``best/`` holds.

        A model that is not what was committed stays out of it: the run goes on, and its end depends on that model.
        """
        best = self._select()
        if best is None or best in (self.best, self._damaged):
            return self.best
        try:
            self._store.export("best", best)
        except IntegrityError as error:
            self._damaged = best
            logger.error("%s; %s", error, _WAY_ON)
            return self.best
        self.best = best
        return best

    def _pooled(self, scores: Iterable[SiteScore]) -> dict[str, float]:
        return pooled_metrics(scores, self._pooling)

    def _select(self) -> int | None:
        there = {v: s for v, s in self._store.scores().items() if self._store.path(v).is_file()}
        best = ranked(self._config, there)
        return best[0][0] if best else None

    @property
    def early_end(self) -> str:
        """Why the run ends before its last round; empty if it does not."""
        version = self._store.last_version
        if version is None or version >= self._config.run.rounds:
            return ""
        return early_end(self._config, self._store, version)

    def worse_at(self, version: int) -> list[str]:
        """Return the sites at which the best version is worse than the best one before it."""
        return worse_sites(self._config, self._store.scores()).get(version, [])

    def metric_problem(self, site: str, version: int, metrics: Collection[str]) -> str:
        """Return what is wrong with the names of a site's metrics, once for each site; else an empty text."""
        wanted = self._config.selection.metric
        if wanted is None or wanted in metrics or site in self._without_metric:
            return ""
        self._without_metric.add(site)
        if not metrics:
            return (
                f"reports no metric of model {version}, so {wanted} (selection.metric) is not known there: "
                "call trainer.validate or trainer.evaluate first in each pass of the loop, or give fl.send metrics"
            )
        names = sorted(
            metrics, key=lambda name: (not difflib.get_close_matches(wanted, [name]), name)
        )
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        return (
            f"reports {', '.join(names[:6])}{more} of model {version}, and not {wanted} (selection.metric), "
            "by which the best model is chosen; stop the run, and start one of another name (run.name) whose "
            "selection.metric all sites report"
        )

    def prune(self) -> None:
        """Remove the models that ``server.keep_versions`` does not keep: all but the best and the last ones."""
        last, count = self._store.last_version, self._config.server.keep_versions
        if last is None or count is None:
            return
        keep = {*range(last - count + 1, last + 1), *(() if self.best is None else (self.best,))}
        best = ranked(self._config, self._store.scores())
        keep.update(v for v, _ in best[: self._config.selection.keep_best])
        if self._config.run.task == "compare" and not self._store.finished:
            keep.add(0)  # a site that is asked again for its model trains from it
        for version in self._store.prune(keep):
            logger.debug("the model of round %d is removed", version)

    def _best_versions(self, scores: Mapping[int, Sequence[SiteScore]]) -> list[int]:
        """Return the best versions, of which ``selection.keep_best`` says how many are kept."""
        return [v for v, _ in ranked(self._config, scores)[: self._config.selection.keep_best]]

    def score(self, version: int | None) -> float | None:
        """Return a version's value of the metric that selects; None where there is none."""
        metric = self._config.selection.metric
        if metric is None or version is None:
            return None
        return self._pooled(self._store.scores().get(version, [])).get(metric)

    def conclude(self, ending: Ending, message: str) -> RunResult:
        """Write ``final/`` and ``best/`` from what is committed; returns the run's result.

        A run that was stopped or failed ends in order without a folder whose model is damaged.

        Raises:
            IntegrityError: the run is complete, and its last or best model is not what was committed.
        """
        version = self._store.last_version
        best = final = chosen = None
        task = self._config.run.task
        if version is not None and task == "train":
            final = self._export("final", version, ending)
            if AVERAGE in self._store.states(version):
                self._export(AVERAGE, version, ending)
        if version is not None and task in ("train", "compare"):
            chosen = self._select()
            if chosen is None:
                chosen = version
                if self._config.selection.metric is not None and ending != "stopped":
                    logger.warning(
                        "no model was scored with %r by %s: best/ is the last model; %s",
                        self._config.selection.metric, plural(self._config.participants.quorum, "site"),
                        self._reported(),
                    )  # fmt: skip
            best = self._export("best", chosen, ending)
        self.best = chosen
        return RunResult(ending, version, chosen, best, final, message)

    def _export(self, name: str, version: int, ending: Ending) -> Path | None:
        try:
            return self._store.export(name, version)
        except IntegrityError as error:
            if ending == "complete":
                raise IntegrityError(f"{error}; {_WAY_ON}") from None
            logger.error("%s; %s", error, _WAY_ON)
            return None

    def _reported(self) -> str:
        """Return what the sites reported in place of the metric that selects, and what to do."""
        scores = (score for found in self._store.scores().values() for score in found)
        names = sorted({name for score in scores for name in score.metrics})
        if not names:
            return (
                "the sites reported no metric: call trainer.validate or trainer.evaluate first in each pass of "
                "the loop, or give fl.send metrics"
            )
        metric = self._config.selection.metric
        if metric in names:
            return f"too few sites reported {metric} of the same model"
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        return (
            f"the sites reported {', '.join(names[:12])}{more}: set selection.metric to one of them"
        )

    def write_summary(self, result: RunResult, snapshot: protocol.StatusReply) -> None:
        """Write the run's summary file."""
        scores = self._store.scores()
        worse = worse_sites(self._config, scores)
        self._store.write_summary(
            {
                "run": self._config.run.name,
                "ok": result.ok,
                "outcome": result.ending,
                "message": result.message,
                "rounds": self._config.run.rounds,
                "best_version": result.best_version,
                "version": result.version,
                "best_versions": self._best_versions(scores),
                "metric": self._config.selection.metric,
                "mode": self._config.selection.mode,
                "bytes_in": snapshot.bytes_in,
                "bytes_out": snapshot.bytes_out,
                "seconds": snapshot.elapsed,
                "started": self._store.taken().started if self._store.taken else "",
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "fedcore": __version__,
                "settings": self._config.model_dump(mode="json", exclude={"folder", "simulate"}),
                "versions": [
                    {
                        "version": row.version,
                        "sha256": row.sha256,
                        "bytes": row.nbytes,
                        "seconds": row.seconds,
                        "participants": dict(row.participants),
                        **_judged(row),
                        **({} if row.factors is None else {"factors": row.factors.values()}),
                        "metrics": self._pooled(scores.get(row.version, [])),
                        "worse_at": worse.get(row.version, []),
                        "metrics_by_site": {
                            s.site: {**s.metrics, "examples": s.examples}
                            for s in scores.get(row.version, [])
                        },
                    }
                    for row in self._store.versions()
                ],
                "sites": self._site_states(),
                "training_metrics": self._store.logged.summary(),
            }
        )

    def write_results(self, result: RunResult) -> Path:
        """Write what the sites said of each model, for a run that does not average."""
        scores, answers = self._store.scores(), self._store.answers()
        models = []
        for row in self._store.versions():
            outputs = answers.get(row.version, {})
            models.append(
                {
                    "version": row.version,
                    "from": next(iter(row.participants), "initial"),
                    "metrics": self._pooled(scores.get(row.version, [])),
                    "sites": {
                        score.site: {
                            "examples": score.examples,
                            "metrics": dict(score.metrics),
                            **({"outputs": outputs[score.site]} if score.site in outputs else {}),
                        }
                        for score in scores.get(row.version, [])
                    },
                }
            )
        task = self._config.run.task
        return self._store.write_results(
            {
                "run": self._config.run.name,
                "task": task,
                "ok": result.ok,
                "outcome": result.ending,
                "message": result.message,
                "models": models,
            }
        )

    def _site_states(self) -> dict[str, Any]:
        return {
            m.name: {"state": str(SiteState(m.state)), "message": m.message} for m in self._roster
        }
