"""What a step's verdicts say of the judge: parse rate, order consistency, position bias, agreement among dimensions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from grpo_flex.rewards import anchor_answers as answers_of_anchor
from grpo_flex.rewards import overall_answers, win_rates
from grpo_flex.types import Verdict, VerdictStatus


def judged_share(verdicts: Sequence[Verdict]) -> float:
    """Share of a group's questions that were answered; compare it with ``judge.min_judged``.

    A verdict on two that names no winner is none. Where both pairs and single siblings are asked about, the smaller share
    of the two.
    """
    kinds = [[answered(v) for v in verdicts if len(v.members) == count] for count in {len(v.members) for v in verdicts}]
    return min((sum(kind) / len(kind) for kind in kinds), default=0.0)


def answered(verdict: Verdict) -> bool:
    """Whether the question was answered: the reply was read, and tells the better one of two."""
    return verdict.status == "ok" and not _without_winner(verdict)


def _without_winner(verdict: Verdict) -> bool:
    """A reply on two that was read and leaves open which is better, as where a score of three is no number."""
    return verdict.status == "ok" and len(verdict.members) == 2 and verdict.winner is None


def judge_metrics(groups: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """``judge/…`` figures of a step from each group's verdicts.

    ``parse_rate`` counts replies that were read among those that came; ``masked_share`` everything that is not
    "ok"; ``order_consistency`` the pairs asked in both orders whose answers agree; latencies are
    seconds on the wire, all tries together; ``kendall_w`` is the mean over groups of the agreement between overall and anchor ranks.
    """
    verdicts = [v for group in groups for v in group]
    if not verdicts:
        return {}
    statuses = Counter[VerdictStatus](v.status for v in verdicts)
    came = statuses["ok"] + statuses["unparsed"]
    found = {
        "judge/verdicts": float(len(verdicts)),
        "judge/masked_share": 1 - statuses["ok"] / len(verdicts),
        **{f"judge/{s}": float(statuses[s]) for s in ("ok", "unparsed", "timeout", "failed")},
        "judge/without_winner": float(sum(map(_without_winner, verdicts))),
    }
    if waited := [v.seconds for v in verdicts if v.seconds > 0]:  # the others were never sent
        found |= {f"judge/latency_p{share}": float(np.percentile(waited, share)) for share in (50, 95)}
    if came:
        found["judge/parse_rate"] = statuses["ok"] / came
        found["judge/tokens_per_verdict"] = sum(v.tokens for v in verdicts) / came
    problems = Counter(v.problem for v in verdicts if v.problem)
    found |= {f"judge/problem/{name.replace(' ', '_')}": float(n) for name, n in sorted(problems.items())}
    return found | _pair_metrics(groups)


def _pair_metrics(groups: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    answers = [overall_answers(group) for group in groups]
    flat = [winner for group in answers for _, _, winner in group]
    found: dict[str, float] = {}
    if flat:
        found["judge/tie_rate"] = float(np.mean([w == 0.5 for w in flat]))
    decided = [w for w in flat if w != 0.5]
    if decided:
        found["judge/first_position_win_rate"] = float(np.mean([w == 0.0 for w in decided]))
    agreed = [a for group in answers for a in order_agreements(group)]
    if agreed:
        found["judge/order_consistency"] = float(np.mean(agreed))
    concordances = [w for group in groups if (w := group_concordance(group)) is not None]
    if concordances:
        found["judge/kendall_w"] = float(np.mean(concordances))
    return found


def order_agreements(answers: Sequence[tuple[int, int, float]]) -> list[bool]:
    """For each pair answered in both orders, whether the two answers name the same sibling (or both a tie)."""
    given = {(i, j): winner for i, j, winner in answers}
    return [given[i, j] == 1 - given[j, i] for i, j in given if i < j and (j, i) in given]


def group_concordance(verdicts: Sequence[Verdict]) -> float | None:
    """Kendall's W between the group's rankings by overall and by anchor win rate; None where undefined.

    1: overall verdict and anchors rank the siblings alike; about 1/m for m unrelated rankings.
    """
    size = 1 + max((m for v in verdicts for m in v.members), default=-1)
    anchors = sorted({name for v in verdicts if len(v.members) == 2 for name in v.dimensions})
    sources = [overall_answers(verdicts), *(answers_of_anchor(verdicts, a) for a in anchors)]
    rates = [win_rates(answers, size) for answers in sources if answers]
    whole = [r for r in rates if not np.isnan(r).any()]
    return kendall_w(np.stack(whole)) if len(whole) >= 2 else None


def kendall_w(ratings_MG: np.ndarray) -> float | None:
    """Kendall's coefficient of concordance of M raters over G items, with the correction for ties.

    W = (12 S) / (M²(G³ - G) - M·ΣT), S the sum of squared deviations of the items' rank sums and
    T = Σ(t³ - t) over a rater's tied runs (Kendall & Gibbons, Rank Correlation Methods). None if all are tied.
    """
    raters, items = ratings_MG.shape
    ranks = _midranks(ratings_MG.round(12))
    spread = float(((ranks.sum(0) - raters * (items + 1) / 2) ** 2).sum())
    runs = [np.unique(r, return_counts=True)[1] for r in ranks]
    ties = sum(float((t**3 - t).sum()) for t in runs)
    whole = raters**2 * (items**3 - items) - raters * ties
    return 12 * spread / whole if whole > 0 else None


def _midranks(ratings_MG: np.ndarray) -> np.ndarray:
    """Each rater's ranks from 1, tied items sharing their mean; scipy.stats has them too, after a second of imports."""
    below = (ratings_MG[:, None, :] < ratings_MG[:, :, None]).sum(2)
    level = (ratings_MG[:, None, :] == ratings_MG[:, :, None]).sum(2)
    return below + (level + 1) / 2


# ---------------------------------------------------------------- for a person


def mostly(groups: Sequence[Sequence[Verdict]]) -> str:
    """The commonest reason why verdicts are missing, with the beginning of what a server said to it, for a message.

    >>> mostly([[Verdict(members=(0, 1), status="failed", problem="HTTP 400", rationale="the prompt is too long")]])
    ' (mostly: HTTP 400, "the prompt is too long")'
    """
    if (example := _commonest(groups)) is None:
        return ""
    said = " ".join(example.rationale.split()) if example.status == "failed" else ""
    quoted = f', "{said[:SAID_SHOWN]}"' if said else ""
    return f" (mostly: {example.problem}{quoted})"


def what_to_mend(groups: Sequence[Sequence[Verdict]]) -> str:
    """What to do about the commonest reason why verdicts are missing, if asking again would only meet it again; else empty."""
    if (example := _commonest(groups)) is None:
        return ""
    if example.problem in PERSISTENT:
        return PERSISTENT[example.problem]
    return OTHER_REPLIES if example.status in ("ok", "unparsed") else ""


def _commonest(groups: Sequence[Sequence[Verdict]]) -> Verdict | None:
    lacking = [v for group in groups for v in group if v.problem and not answered(v)]
    lacking = [v for v in lacking if v.seconds > 0] or lacking  # those that were sent say why the others were not
    counted = Counter(v.problem for v in lacking).most_common(1)
    return next(v for v in lacking if v.problem == counted[0][0]) if counted else None


SAID_SHOWN = 200
"""Characters of a server's refusal that a message shows."""
OTHER_REPLIES = (
    "see its replies with `python -m grpo_flex verdicts RUN --full`: is it the model that judge.family is for, "
    "and its instruction (judge.family.prompt_file) the one that it was trained on?"
)
PERSISTENT = {
    "cut off at max_tokens": "raise judge.max_tokens, or the server's --max-model-len",
    "HTTP 400": "it refuses the question: its context may be too short (--max-model-len), its limit of pictures or frames "
    "too low, or judge.family.structured too much for it",
    "HTTP 401": "set the variable that judge.api_key_env names to its API key",
    "HTTP 403": "set the variable that judge.api_key_env names to its API key",
    "HTTP 404": "give judge.model the name that it serves",
    "HTTP 422": "it refuses the form of the question: see judge.family",
}
"""What an answer that would be given again says of what to change."""
