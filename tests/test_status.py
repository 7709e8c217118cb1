"""The state machine, whatever happens in whatever order."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchboard.happyrobot.payloads import platform_status
from switchboard.runs.status import Standing, advance, execution_status, timed_out
from switchboard.tables import FINAL, ExecutionStatus, RunStatus

P, R, C, F, X = RunStatus.PENDING, RunStatus.RUNNING, RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELED
RANK = {P: 0, R: 1, C: 2, F: 2, X: 2}

standings = st.builds(Standing, st.sampled_from(RunStatus)) | st.just(Standing(F, timed_out=True))
words = st.none() | st.sampled_from(RunStatus)
# None is our own timeout.
happenings = st.lists(words.map(lambda word: ("word", word)) | st.just(("timeout", None)))


Course = list[tuple[str, RunStatus | None]]


def live(start: Standing, what: Course) -> list[Standing]:
    course = [start]
    for kind, word in what:
        course.append(timed_out(course[-1]) if kind == "timeout" else advance(course[-1], word))
    return course


@given(standings, happenings)
def test_a_run_never_goes_backwards_unless_its_end_was_our_guess(start: Standing, what: Course):
    course = live(start, what)
    for before, after in pairwise(course):
        assert RANK[after.status] >= RANK[before.status] or before.timed_out


@given(standings, happenings)
def test_nothing_moves_a_run_that_is_over_by_happyrobots_word(start: Standing, what: Course):
    course = live(start, what)
    for before, after in pairwise(course):
        if before.over and not before.timed_out:
            assert after == before


@given(standings, happenings)
def test_a_guess_is_always_a_failure(start: Standing, what: Course):
    assert all(standing.status is F for standing in live(start, what) if standing.timed_out)


@given(standings, words)
def test_the_same_word_twice_is_the_same_word_once(start: Standing, word: RunStatus | None):
    once = advance(start, word)
    assert advance(once, word) == once


@given(standings, happenings, st.sampled_from(sorted(FINAL)))
def test_the_first_final_word_decides(start: Standing, what: Course, word: RunStatus):
    before = live(start, what)[-1]
    if not before.over or before.timed_out:
        assert advance(before, word) == Standing(word)


@pytest.mark.parametrize(
    ("before", "word", "after"),
    [
        (Standing(P), R, Standing(R)),
        (Standing(P), X, Standing(X)),
        (Standing(R), P, Standing(R)),
        (Standing(R), None, Standing(R)),
        (Standing(R), C, Standing(C)),
        (Standing(C), F, Standing(C)),
        (Standing(F), C, Standing(F)),
        (Standing(F, timed_out=True), C, Standing(C)),
        (Standing(F, timed_out=True), F, Standing(F)),
        (Standing(F, timed_out=True), R, Standing(R)),
        (Standing(F, timed_out=True), P, Standing(R)),
        (Standing(F, timed_out=True), None, Standing(F, timed_out=True)),
    ],
)
def test_each_step(before: Standing, word: RunStatus | None, after: Standing):
    assert advance(before, word) == after


@pytest.mark.parametrize("status", [P, R])
def test_silence_fails_a_run_that_is_under_way(status: RunStatus):
    assert timed_out(Standing(status)) == Standing(F, timed_out=True)


@pytest.mark.parametrize("status", sorted(FINAL))
def test_silence_does_not_touch_a_run_that_is_over(status: RunStatus):
    assert timed_out(Standing(status)) == Standing(status)


@pytest.mark.parametrize(
    ("runs", "status"),
    [
        ([R], ExecutionStatus.RUNNING),
        ([P, C], ExecutionStatus.RUNNING),
        ([F, R], ExecutionStatus.RUNNING),
        ([C], ExecutionStatus.COMPLETED),
        ([C, X], ExecutionStatus.COMPLETED),
        ([C, F], ExecutionStatus.FAILED),
        ([X, X], ExecutionStatus.CANCELLED),
    ],
)
def test_an_execution_is_what_its_runs_make_of_it(runs: list[RunStatus], status: ExecutionStatus):
    assert execution_status(runs) is status


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("pending", P),
        ("scheduled", P),
        ("not_started", P),
        ("queued", P),
        ("running", R),
        ("completed", C),
        ("succeeded", C),
        ("failed", F),
        ("canceled", X),
        ("cancelled", X),
        ("skipped", X),
        ("COMPLETED", None),
        ("no such word", None),
        (None, None),
        (5, None),
        ([], None),
    ],
)
def test_the_platforms_words(word: object, status: RunStatus | None):
    assert platform_status(word) is status
