"""How the sites' scores rank the versions of a run, and when they end it before its last round.

All of it follows from the scores in the journal and from ``[selection]``: after a restart it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedcore.config import RunConfig
from fedcore.server.rounds import selection
from fedcore.server.rounds.selection import EarlyEnd, Pooling, SiteScore, ranked_versions
from fedcore.server.storage.store import Store

__all__ = ["early_end", "ranked", "worse_sites"]

_Scores = Mapping[int, Sequence[SiteScore]]


def ranked(config: RunConfig, scores: _Scores) -> list[tuple[int, float]]:
    """Return the versions that the run's metric ranks, with their values, the best one first."""
    chosen = config.selection
    if chosen.metric is None or chosen.mode is None:
        return []
    pooling = Pooling.of_settings(chosen.average, chosen.max_share)
    return ranked_versions(scores, chosen.metric, chosen.mode, config.participants.quorum, pooling)


def early_end(config: RunConfig, store: Store, version: int) -> str:
    """Return why no round follows the one that made a version; an empty text if one does.

    It goes by the scores of the versions before, which the sites give as the round after each begins. A score that
    came after the version was committed counts from the next one on: what was decided stays so after a restart.
    """
    chosen = config.selection
    if chosen.mode is None or (chosen.patience is None and chosen.target is None):
        return ""
    scores = store.scores_before(version)
    limits = EarlyEnd(chosen.mode, chosen.patience, chosen.target)
    return limits.reason(ranked(config, scores), version - 1)


def worse_sites(config: RunConfig, scores: _Scores) -> dict[int, list[str]]:
    """Return, of each version that is better than all before it, where it is worse than the best of them."""
    chosen = config.selection
    if chosen.metric is None or chosen.mode is None:
        return {}
    values = dict(ranked(config, scores))
    return selection.worse_sites(scores, values, chosen.metric, chosen.mode)
