"""Work that is watched: it can be stopped, and it stops when nobody listens."""

import threading
import time

import pytest

from mole_diffusers.app.jobs import RunningJobs, run_job


def counting(seen, steps=200):
    def work(tell):
        for i in range(steps):
            seen.append(i)
            tell(i)
            time.sleep(0.005)

    return work


def test_what_is_told_comes_out_in_order():
    assert [event for event in run_job(counting([], 5), lambda: False) if event is not None] == [0, 1, 2, 3, 4]


def test_an_error_in_the_work_comes_out():
    def work(tell):
        tell(1)
        raise ValueError("bad")

    heard = run_job(work, lambda: False)
    assert next(heard) == 1
    with pytest.raises(ValueError, match="bad"):
        list(heard)


def test_a_stop_ends_the_work_of_one_session():
    stops, seen = RunningJobs(), []
    assert not stops.stop("me")
    with stops.job("me") as stopped, stops.job("you") as other:
        for event in run_job(counting(seen), stopped):
            if event == 3:
                assert stops.stop("me")
        assert not other()
    assert 3 < len(seen) < 200


def test_work_that_nobody_listens_to_stops():
    seen, before = [], threading.active_count()
    heard = run_job(counting(seen), lambda: False)
    next(heard)
    heard.close()  # the visitor has left
    until = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert len(seen) < 200
