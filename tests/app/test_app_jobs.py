"""Jobs: they can be stopped, and they stop when nobody iterates any more."""

import threading
import time

import pytest

from mole_diffusers.app.jobs import RunningJobs, run_job


def counting(seen, steps=200):
    def work(report):
        for i in range(steps):
            seen.append(i)
            report(i)
            time.sleep(0.005)

    return work


def test_reports_come_out_in_order():
    assert [event for event in run_job(counting([], 5), lambda: False) if event is not None] == [0, 1, 2, 3, 4]


def test_an_error_in_a_job_comes_out():
    def work(report):
        report(1)
        raise ValueError("bad")

    events = run_job(work, lambda: False)
    assert next(events) == 1
    with pytest.raises(ValueError, match="bad"):
        list(events)


def test_a_stop_ends_the_job_of_one_session():
    jobs, seen = RunningJobs(), []
    assert not jobs.stop("me")
    with jobs.job("me") as stopped, jobs.job("you") as other:
        for event in run_job(counting(seen), stopped):
            if event == 3:
                assert jobs.stop("me")
        assert not other()
    assert 3 < len(seen) < 200


def test_a_job_that_nobody_listens_to_stops():
    seen, before = [], threading.active_count()
    events = run_job(counting(seen), lambda: False)
    next(events)
    events.close()  # the visitor has left
    until = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert len(seen) < 200
