"""Every record that crosses a process boundary, with shapes and units.

Dimension legend, used as a suffix on tensors and lists: P prompts, G siblings of one prompt, K trained
denoising steps, N latent tokens, C latent channels, F frames, H height, W width, B = P·G flattened.

Records are frozen, slotted and keyword-only. A failed verdict is a *value* (``Verdict.status``): masked and
counted, never silently 0.0 or ½. A reward that nobody gave is NaN for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

VerdictStatus = Literal["ok", "unparsed", "timeout", "failed"]
Role = Literal["sampling", "evaluation", "base"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One line of a prompts file.

    >>> Prompt(id="shapes-17", text="a red circle on a white background").tags
    ()
    """

    id: str
    """Unique within its file; seeds and pictures are named after it."""
    text: str
    reference: Mapping[str, Any] = field(default_factory=dict)
    """Whatever an oracle or a verifier needs to know what is right. The core never reads it."""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """The trained denoising steps of one group, as the sampler took them.

    Both ends of a step are stored, because a random selection of steps is not contiguous. Precision is that
    in which the log-probabilities were taken, so that the ratio before the first update is exactly 1.
    """

    latents_GKNC: torch.Tensor
    """x_σ, before each trained step."""
    next_latents_GKNC: torch.Tensor
    """x_σ', as sampled by each trained step."""
    steps_K: tuple[int, ...]
    """Index of each trained step in the schedule; equal for the whole group."""
    sigmas: tuple[float, ...]
    """The whole schedule, from 1 (noise) to 0: one more entry than there are denoising steps."""
    logprobs_GK: torch.Tensor
    """Mean over N·C of the Gaussian log-density of each step, nats, float32."""
    means_GKNC: torch.Tensor | None = None
    """μ_old of each step; only for objectives that need it (GRPO-Guard)."""
    final_GNC: torch.Tensor | None = None
    """x_0 of every sibling; only for objectives that re-noise the result (NFT, AWM, DPO)."""
    group_size: int = 0
    """In a ``part`` of a group: G of the whole one, for which noise is drawn; 0: this is whole."""
    first: int = 0
    """In a ``part`` of a group: the place of its first sibling."""

    def part(self, siblings: slice) -> Trajectories:
        """Some of the siblings, without copying anything."""
        size, cut = len(self.logprobs_GK), {name: t[siblings] for name, t in self._tensors().items()}
        return replace(self, **cut, group_size=size, first=siblings.indices(size)[0])

    def finite(self) -> torch.Tensor:
        """bool [G]: who has neither NaN nor infinity anywhere."""
        import torch

        return torch.stack([t.isfinite().flatten(1).all(dim=1) for t in self._tensors().values()]).all(dim=0)

    def blanked(self, masked_G: torch.Tensor) -> Trajectories:
        """The same with zeros throughout for some siblings, bool [G]; itself for none."""
        if not masked_G.any():
            return self
        rows = masked_G.nonzero()[:, 0]
        return replace(self, **{name: t.index_fill(0, rows, 0) for name, t in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("latents_GKNC", "next_latents_GKNC", "logprobs_GK", "means_GKNC", "final_GNC")
        return {name: t for name in names if (t := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMedia:
    """What judge and scorers are given of a group."""

    step: int
    """The training step that asked for it."""
    prompt: Prompt
    media_G: tuple[np.ndarray, ...]
    """uint8 [F, H, W, 3] each; an image has F = 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup(GroupMedia):
    """G siblings of one prompt, sampled by one policy version. Where learners are given it, ``media_G`` is empty."""

    conditioning: Mapping[str, torch.Tensor]
    """The prompt's encoding, batch dimension 1, shared by the siblings."""
    trajectories: Trajectories
    seeds_G: tuple[int, ...]
    policy_version: int
    worker: str = ""
    seconds: float = 0.0
    diversity: Mapping[str, float] = field(default_factory=dict)
    """Mean distance between two siblings, root mean square over elements: "latent", and "pixel" (white − black = 1)."""

    def parted(self) -> tuple[GroupMedia, RolloutGroup]:
        """For the judge, and for the learners, who are given no media: each travels only to whom it is for."""
        return GroupMedia(step=self.step, prompt=self.prompt, media_G=self.media_G), replace(self, media_G=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judge, or a scorer, said of one sibling, ``members=(i,)``, or of an ordered pair, ``members=(i, j)``.

    ``winner`` and every value of ``dimensions`` name a *position*: 0 for the first member shown, 1 for the
    second, ½ for a declared tie. They are None whenever ``status`` is not "ok".

    >>> Verdict(members=(2, 0), status="ok", winner=0.0).winner  # sibling 2 beat sibling 0
    0.0
    """

    members: tuple[int, ...]
    status: VerdictStatus
    winner: float | None = None
    dimensions: Mapping[str, float] = field(default_factory=dict)
    """Anchor -> winner's position as above (pairs), by the anchor's canonical name."""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Criterion -> one number for each member, in the family's own unit (pointwise and scoring families)."""
    rationale: str = ""
    """The judge's reply as it came; for a scorer that raised, what it raised."""
    problem: str = ""
    """Why there is no verdict, in a word or two: the parser's or the client's named failure."""
    endpoint: str = ""
    scorer: str = ""
    """The in-process scorer that gave it; empty: the judge did."""
    seconds: float = 0.0
    tokens: int = 0
    """Completion tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardedGroup:
    """Rewards of one group. NaN means *not judged*, which is neither good nor bad."""

    prompt_id: str
    rewards_G: np.ndarray
    """The reward that is reported, float64 [G]."""
    breakdown_G: Mapping[str, np.ndarray]
    """Named parts, float64 [G] each: "overall" and "dim" win rates, anchors, single scorers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateBatch:
    """What the learner needs for one policy update: references to groups, and their advantages."""

    groups: tuple[Any, ...]
    """Ray object references to RolloutGroup, or the groups themselves outside Ray."""
    advantages: tuple[np.ndarray, ...]
    """float64 [G] for each group; NaN members carry no loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """The learner's answer to an UpdateBatch."""

    policy_version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A published LoRA adapter: the tensors and the version that they belong to."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    """peft state-dict keys, CPU tensors in the adapter's own precision. None where the receiver has them already."""
    role: Role = "sampling"
    """Adapters of one version: what rollouts sample with; what is evaluated, shown and exported; zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One held-out picture or clip with what the scorers said of it."""

    prompt: Prompt
    media: np.ndarray
    """uint8 [F, H, W, 3]."""
    scores: Mapping[str, float]
