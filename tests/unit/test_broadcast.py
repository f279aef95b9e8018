"""Weights by broadcast: bit for bit and in place, or refused; nobody waits for ever, and the next circle is a sound one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_flex.broadcast import Broken, Circle, Member

NONE: dict[str, Tensor] = {}


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "second": torch.randn(300, 70, generator=generator),
        "first": torch.randn(40, 8, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
        "nothing": torch.zeros(0, 3),
        "strided": torch.randn(6, 5, generator=generator).t(),
    }


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Mortal(Member):
    """One whose process dies, as far as others see, when it has got so many tensors."""

    left = 2

    def _pass_on(self, tensor: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise SystemExit
        super()._pass_on(tensor)


@pytest.fixture
def sender() -> Member:
    return Member()


def circle(sender: Member, name: str, size: int, timeout_s: float = 60.0) -> Circle:
    return Circle(address=f"127.0.0.1:{sender.listen()}", name=name, size=size, timeout_s=timeout_s)


def outcomes(*calls: Callable[[], None]) -> list[Any]:
    """What calls that are made at once raised, or None."""

    def outcome(call: Callable[[], None]) -> BaseException | None:
        try:
            return call()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def exchange(meeting: Circle, sent: dict[str, Tensor], sender: Member, *receivers: tuple[Member, Any]) -> list[Any]:
    calls = [lambda m=m, w=w, i=i: m.receive(meeting, i, w) for i, (m, w) in enumerate(receivers, 1)]
    return outcomes(lambda: sender.send(meeting, sent, sent.items()), *calls)


def test_what_is_sent_is_held_bit_for_bit_in_the_same_memory(sender: Member) -> None:
    one, two, held = Member(), Member(), [weights(1), dict(reversed(weights(2).items()))]
    places = [{name: t.data_ptr() for name, t in h.items()} for h in held]
    meeting = circle(sender, "a", 3)
    for seed in (3, 4):  # the second time in the group of the first
        assert exchange(meeting, weights(seed), sender, (one, held[0]), (two, held[1])) == [None] * 3
        assert all(same(h, weights(seed)) for h in held)
    assert exchange(circle(sender, "b", 2), weights(5), sender, (two, held[1])) == [None] * 2
    assert same(held[1], weights(5)) and same(held[0], weights(4))
    assert places == [{name: t.data_ptr() for name, t in h.items()} for h in held]


@pytest.mark.parametrize(
    "wrong", [{"first": torch.zeros(40, 9).bfloat16()}, {"first": torch.zeros(40, 8)}, {"more": torch.zeros(1)}]
)
def test_other_weights_are_refused_on_all_sides_and_left_as_they_are(sender: Member, wrong: dict[str, Tensor]) -> None:
    held = [weights(1), weights(2) | wrong]
    found = exchange(circle(sender, "a", 3), weights(3), sender, (Member(), held[0]), (Member(), held[1]))
    assert all(isinstance(error, ValueError) for error in found)
    assert all(
        "do not fit receiver 2 of 2: 1 tensors differ, first" in str(e) and next(iter(wrong)) in str(e) for e in found
    )
    assert same(held[0], weights(1)) and same(held[1], weights(2) | wrong)


def test_one_that_never_comes_is_not_waited_for_longer_than_agreed(sender: Member) -> None:
    meeting = circle(sender, "a", 3, timeout_s=1.0)
    found = exchange(meeting, weights(3), sender, (Member(), weights(1)))
    assert [type(error) for error in found] == [Broken, Broken]
    assert all("rank 2 of 3 did not come within 1 s" in str(error) for error in found)
    (nobody_sends,) = outcomes(lambda: Member().receive(replace(meeting, name="b"), 1, weights(1)))
    assert isinstance(nobody_sends, Broken) and "rank 0 of 3 did not come" in str(nobody_sends)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_when_one_dies_on_the_way_the_others_end_and_may_meet_again(sender: Member, victim: int) -> None:
    members = [sender, Member(), Member()]
    members[victim] = mortal = Mortal()
    if victim == 0:
        sender = mortal
    held = [weights(1), weights(2)]
    found = exchange(circle(sender, "a", 3), weights(3), members[0], *zip(members[1:], held, strict=True))
    assert type(found.pop(victim)) is SystemExit
    assert any(isinstance(error, Broken) for error in found)
    mortal.left = 99
    assert exchange(circle(sender, "b", 3), weights(4), members[0], *zip(members[1:], held, strict=True)) == [None] * 3
    assert all(same(h, weights(4)) for h in held)
