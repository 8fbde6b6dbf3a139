"""Exactly once, through crashes of either side and any link; and the model notices if it is not so."""

from __future__ import annotations

import pytest
from edgedaq.delivery import StreamTable, Verdict
from edgedaq.frame import Frame
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.delivery_model import Delivery, DeliveryAfterRestore

FEW = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
UNTIL_SEEN = settings(FEW, max_examples=400, phases=[Phase.generate], derandomize=True)


class _Forgetful(StreamTable):
    """A table that takes what it has already."""

    def judge(self, frame: Frame) -> Verdict:
        verdict = super().judge(frame)
        return Verdict.ACCEPT if verdict is Verdict.DUPLICATE else verdict


class WithoutDeduplication(Delivery):
    table_type = _Forgetful


class WithAckBeforeDurable(Delivery):
    acks_before_durable = True


def test_every_frame_is_delivered_exactly_once_through_crashes_of_either_side_and_any_link():
    run_state_machine_as_test(Delivery, settings=FEW)


def test_a_journal_that_was_put_back_in_time_gets_gaps_for_what_it_lost_and_goes_on():
    run_state_machine_as_test(DeliveryAfterRestore, settings=FEW)


def test_the_model_notices_when_deduplication_is_removed():
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(WithoutDeduplication, settings=UNTIL_SEEN)


def test_the_model_notices_an_acknowledgement_before_the_journal_is_durable():
    with pytest.raises(AssertionError, match="lost"):
        run_state_machine_as_test(WithAckBeforeDurable, settings=UNTIL_SEEN)
