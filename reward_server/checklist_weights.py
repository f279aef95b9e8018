"""VisionReward's linear weights (arXiv 2412.21059): logistic regression on preferences by differences of answers.

With x = (answers of the first candidate) − (answers of the second), a 1 for each "yes" that counts,
P(first is better) = σ(w·x). There is no intercept, so the weights cannot tell the first from the second. A weight is in
log-odds: how much a single "yes" more speaks for a candidate. Ridge keeps weights finite where the answers
separate the preferences, and 0 where a question never differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from reward_server.benchmark import completion
from reward_server.families.vision_reward import Question, VisionReward, held, parse
from reward_server.preferences import Preference

FOLDS = 5
FEWEST = 10
"""Pairs: with fewer a fold would be a pair or two."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A checklist with learned weights, and how well they order pairs that they were not learned from."""

    questions: tuple[Question, ...]
    pairs: int
    left_out: int
    """Labelled pairs without readable answers for both candidates."""
    accuracy: float
    """Share of held-out pairs ordered as people did, by cross-validation; equal sums count one half."""
    accuracy_before: float
    """The same of the checklist's old weights."""
    accuracy_equal: float
    """The same of equal weights."""


def fit(
    preferences: Sequence[Preference],
    records: Iterable[Mapping[str, Any]],
    family: VisionReward,
    ridge: float = 1.0,
    nonnegative: bool = False,
) -> Fitted:
    """Learns the weights of the family's checklist.

    Args:
        preferences: Those with a label count.
        records: Replies about single candidates, as ``benchmark.collect`` gives them.
        family: Whose checklist the judge was asked.
        ridge: Weight of ½‖w‖² beside the summed log loss.
        nonnegative: No "yes" may speak against a candidate.

    Raises:
        ValueError: fewer than ``FEWEST`` pairs, or two media, which have checklists of their own.
    """
    labelled = [p for p in preferences if p.label is not None]
    media = {p.medium for p in labelled}
    if len(media) > 1:
        raise ValueError("images and videos have checklists of their own: fit them one after the other")
    family = replace(family, medium=media.pop()) if media else family
    questions = family.checklist()
    differences_NQ, labels_N = differences(labelled, records, questions)
    if len(labels_N) < FEWEST:
        raise ValueError(f"{len(labels_N)} labelled pairs have readable answers; at least {FEWEST} are needed")
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; it needs to be above 0, or separable answers have no finite weights")
    weights_Q = regress(differences_NQ, labels_N, ridge, nonnegative)
    old_Q = np.array([q.weight for q in questions])
    return Fitted(
        questions=tuple(replace(q, weight=round(float(w), 6)) for q, w in zip(questions, weights_Q, strict=True)),
        pairs=len(labels_N),
        left_out=len(labelled) - len(labels_N),
        accuracy=_cross_validated(differences_NQ, labels_N, ridge, nonnegative),
        accuracy_before=_ordered(differences_NQ, labels_N, old_Q),
        accuracy_equal=_ordered(differences_NQ, labels_N, np.ones_like(old_Q)),
    )


def differences(
    labelled: Sequence[Preference], records: Iterable[Mapping[str, Any]], questions: Sequence[Question]
) -> tuple[np.ndarray, np.ndarray]:
    """x of every pair with readable answers, [N, Q] in −1, 0, 1, and labels [N]: 1 where the first is better."""
    answers: dict[tuple[str, int], np.ndarray] = {}
    for record in records:
        given, _ = parse(completion(record).text, len(questions))
        if given is not None and len(record["shown"]) == 1:
            answers[record["id"], record["shown"][0]] = np.array(held(questions, given), dtype=float)
    known = [p for p in labelled if (p.id, 0) in answers and (p.id, 1) in answers]
    rows = [answers[p.id, 0] - answers[p.id, 1] for p in known]
    return np.array(rows).reshape(len(known), len(questions)), np.array([float(p.label == 0) for p in known])


def regress(differences_NQ: np.ndarray, labels_N: np.ndarray, ridge: float, nonnegative: bool = False) -> np.ndarray:
    """Weights [Q] that minimise Σ log(1 + e^(−s·w·x)) + ridge/2 ‖w‖², s = ±1 by label; convex, so the only minimum."""
    signed_NQ = differences_NQ * (2 * labels_N - 1)[:, None]

    def loss(weights_Q: np.ndarray) -> tuple[float, np.ndarray]:
        margins_N = signed_NQ @ weights_Q
        doubt_N = np.exp(-np.logaddexp(0, margins_N))  # σ(−margin)
        value = np.logaddexp(0, -margins_N).sum() + ridge / 2 * weights_Q @ weights_Q
        return float(value), ridge * weights_Q - doubt_N @ signed_NQ

    bounds = [(0.0, None)] * signed_NQ.shape[1] if nonnegative else None
    found = minimize(loss, np.zeros(signed_NQ.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds)
    return found.x


def _cross_validated(differences_NQ: np.ndarray, labels_N: np.ndarray, ridge: float, nonnegative: bool) -> float:
    fold_N = np.random.default_rng(0).permutation(len(labels_N)) % FOLDS
    right = 0.0
    for fold in range(FOLDS):
        out = fold_N == fold
        weights_Q = regress(differences_NQ[~out], labels_N[~out], ridge, nonnegative)
        right += _ordered(differences_NQ[out], labels_N[out], weights_Q) * out.sum()
    return right / len(labels_N)


def _ordered(differences_NQ: np.ndarray, labels_N: np.ndarray, weights_Q: np.ndarray) -> float:
    """Share of pairs that the weights order as labelled; equal sums count one half."""
    sums_N = differences_NQ @ weights_Q
    return float(np.where(np.abs(sums_N) < 1e-9, 0.5, (sums_N > 0) == (labels_N > 0.5)).mean())


def write(path: Path, fitted: Fitted) -> None:
    """Writes the checklist as ``VisionReward(checklist_file=…)`` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({k: v for k, v in asdict(q).items() if v != ""}, ensure_ascii=False) for q in fitted.questions]
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n", encoding="utf-8")


def report(fitted: Fitted) -> str:
    """What came of it, for the terminal."""
    width = max(len(q.id) for q in fitted.questions)
    lines = [f"{q.id:<{width}}  {q.weight:+.3f}" for q in fitted.questions]
    lines.append(
        f"{fitted.pairs} pairs ({fitted.left_out} without readable answers); held-out pairs in order "
        f"{fitted.accuracy:.3f} ({FOLDS} folds), by the old weights {fitted.accuracy_before:.3f}, by equal ones "
        f"{fitted.accuracy_equal:.3f}"
    )
    return "\n".join(lines)
