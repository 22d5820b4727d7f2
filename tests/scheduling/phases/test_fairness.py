# SPDX-License-Identifier: Apache-2.0
"""Fairness between clients: nobody is served much more than others who wait; and decode before prefill."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.scheduling.phases.fairness import DecodePriority, VirtualTokenCounter


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(0, 40)), min_size=1, max_size=60))
@settings(max_examples=60)
def test_clients_who_wait_are_served_alike(requests: list[tuple[int, int, int]]) -> None:
    """The bound of the paper: counters of clients who all wait differ by one request's tokens at most."""
    counter = VirtualTokenCounter()
    waiting = [(client, prompt, (prompt, output)) for client, prompt, output in requests]
    for client, *_ in waiting:
        counter.add_waiting(client)
    largest = max(prompt + 2 * output for _, prompt, output in requests)
    while waiting:
        prompt, output = chosen = counter.order(waiting)[0]
        index = next(index for index, entry in enumerate(waiting) if entry[2] is chosen)
        client = waiting.pop(index)[0]
        served = {other for other, *_ in waiting}
        assert counter.measure(client) == min(counter.measure(one) for one in {*served, client})
        counter.admit(client, prompt)
        counter.charge_output(client, output)
        counters = [counter.measure(one) for one in served]
        assert not counters or max(counters) - min(counters) <= largest


def test_order_charges_what_it_takes() -> None:
    counter = VirtualTokenCounter()
    for client in ("a", "a", "a", "b"):
        counter.add_waiting(client)
    waiting = [("a", 10, "a1"), ("a", 10, "a2"), ("a", 10, "a3"), ("b", 25, "b1")]
    assert counter.order(waiting) == ["a1", "b1", "a2", "a3"]
    counter.charge_output("a", 20)
    assert counter.order(waiting) == ["b1", "a1", "a2", "a3"]


def test_order_of_those_who_begin_now() -> None:
    counter = VirtualTokenCounter()
    for client in ("a", "a", "b"):
        counter.add_waiting(client)
    waiting = [("a", 10, "a1"), ("a", 10, "a2"), ("b", 25, "b1")]
    assert counter.order(waiting, 2) == ["a1", "b1"]
    assert counter.order(waiting, 0) == []
    assert counter.count_clients() == 2


def test_who_was_away_is_owed_nothing() -> None:
    counter = VirtualTokenCounter()
    counter.add_waiting("busy")
    counter.admit("busy", 1000)
    counter.add_waiting("busy")
    counter.add_waiting("new")
    assert counter.measure("new") == 1000
    counter.drop_waiting("new")
    counter.drop_waiting("busy")
    counter.add_waiting("later")
    assert counter.measure("later") == 1000  # as the last who waited


def test_clients_are_forgotten_only_where_it_changes_nothing() -> None:
    counter = VirtualTokenCounter(max_clients=3)
    for client, tokens in (("a", 5), ("b", 50), ("c", 7)):
        counter.add_waiting(client)
        counter.admit(client, tokens)
    before = {client: counter.measure(client) for client in "abc"}
    counter.charge_output("d", 500)
    counter.add_waiting("d")
    for client in ("e", "f", "a", "b", "c"):
        counter.add_waiting(client)
        assert counter.measure(client) >= before.get(client, 0)
    assert counter.measure("b") >= 500
    assert counter.measure("d") == 1000


def test_a_request_that_does_not_wait() -> None:
    with pytest.raises(ValueError, match="client 'a' has no waiting request"):
        VirtualTokenCounter().admit("a", 1)
    with pytest.raises(ValueError, match="weights 0 and"):
        VirtualTokenCounter(prompt_weight=0)


def test_prefill_waits_while_decode_is_late() -> None:
    priority = DecodePriority(tpot=0.05, max_hold=0.5)
    assert priority.may_prefill(0.0)
    priority.observe_gap(0.12)
    assert not priority.may_prefill(0.0)
    priority.observe_gap(0.02)
    assert not priority.may_prefill(0.1)
    for _ in range(2):
        priority.observe_gap(0.02)
    assert priority.may_prefill(0.2)
    assert priority.num_holds == 1


def test_every_prompt_is_held_for_its_own_time() -> None:
    priority = DecodePriority(tpot=0.05, max_hold=0.5)
    priority.observe_gap(10.0)
    assert not priority.may_prefill(0.0)
    priority.stop_holding()  # aborted
    assert not priority.may_prefill(5.0)
    assert priority.may_prefill(5.6)
    assert priority.num_holds == 2


def test_prefill_is_not_starved() -> None:
    priority = DecodePriority(tpot=0.05, max_hold=0.5)
    began = []
    for step in range(100):
        priority.observe_gap(1.0)
        if priority.may_prefill(step / 10):
            began.append(step)
    assert 15 <= len(began) <= 20
    # A pause of the machine is paid back in a bounded number of steps.
    for _ in range(20):
        priority.observe_gap(0.025)
    assert priority.may_prefill(100.0)


def test_a_priority_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="tpot 0"):
        DecodePriority(0, 1)
