"""Jobs: one after the other, found again by their owner, stopped at any time."""

import threading
import time
import weakref

import pytest
import torch

from mole_app.web.jobs import MAX_OWN, MAX_WAITING, Jobs

WAIT = 20  # seconds


@pytest.fixture
def jobs():
    return Jobs()


def counting(seen, steps=400):
    def work(report):
        for i in range(steps):
            seen.append(i)
            report(i)
            time.sleep(0.005)
        return "all"

    return work


def over(jobs, job):
    """The job once nothing changes any more."""
    *_, last = jobs.follow(job)
    return last


def until(true):
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_jobs_run_one_after_the_other_and_give_what_they_made(jobs):
    seen, other = [], []
    first, second = jobs.submit("me", "a", counting(seen, 5)), jobs.submit("you", "a", counting(other, 5))
    assert (over(jobs, second).state, second.event) == ("done", "all")
    assert (first.state, first.event, seen, other) == ("done", "all", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])


def test_an_error_is_kept_and_the_next_job_runs(jobs):
    def work(report):
        report(1)
        raise ValueError("bad")

    failed = over(jobs, jobs.submit("me", "a", work))
    assert (failed.state, failed.event, str(failed.error)) == ("failed", 1, "bad")
    assert over(jobs, jobs.submit("me", "a", counting([], 1))).state == "done"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to allocate 2 GiB"), RuntimeError("bug")])
def test_a_job_that_failed_holds_nothing_and_a_full_gpu_is_said(jobs, error):
    held = []

    def work(report):
        picture = torch.zeros(9)
        held.append(weakref.ref(picture))
        raise error

    failed = over(jobs, jobs.submit("me", "a", work))
    assert (failed.state, held[0]()) == ("failed", None)
    is_full = isinstance(error, torch.OutOfMemoryError)
    assert str(failed.error).startswith("the GPU's memory is full: take a smaller picture" if is_full else "bug")


def test_a_running_job_stops_at_its_next_report_and_a_waiting_one_at_once(jobs):
    seen = []
    running, waiting, last = (jobs.submit("me", kind, counting(seen)) for kind in "abc")
    until(lambda: len(seen) > 3)
    assert (jobs.ahead(running), jobs.ahead(waiting), jobs.ahead(last)) == (0, 1, 2)
    assert jobs.stop(waiting)
    assert (waiting.state, waiting.event, jobs.ahead(last)) == ("stopped", None, 1)
    assert jobs.stop(running)
    assert over(jobs, running).state == "stopped"
    assert 3 < len(seen) < 400
    assert not jobs.stop(running)
    jobs.stop(last)
    assert over(jobs, last).state == "stopped"


def test_a_job_that_waits_changes_places_with_the_one_before_it_of_its_owner(jobs):
    seen = []
    running, one, others, two = (jobs.submit(owner, "a", counting(seen)) for owner in ("me", "me", "you", "me"))
    until(lambda: running.state == "running")
    assert not jobs.advance(running)
    assert not jobs.advance(one)
    assert not jobs.advance(others)
    assert jobs.advance(two)
    assert jobs.of("me", "a") == [running, two, one]
    assert [jobs.ahead(job) for job in (two, others, one)] == [1, 2, 3]  # nobody else has moved
    assert len({job.number for job in (running, one, others, two)}) == 4
    for job in (one, others, two, running):
        jobs.stop(job)


def test_the_newest_of_several_that_are_stopped_is_the_one_that_ran_and_old_ones_are_forgotten(jobs, monkeypatch):
    monkeypatch.setattr("mole_app.web.jobs.KEPT", 2)
    seen = []
    first = over(jobs, jobs.submit("me", "first", counting([], 1)))
    running, waiting = (jobs.submit("me", "a", counting(seen)) for _ in range(2))
    assert jobs.latest("me", "a") is waiting
    until(lambda: seen)
    assert jobs.stop_all("me", "a")
    assert (over(jobs, running).state, waiting.state) == ("stopped", "stopped")
    assert not jobs.stop_all("me", "a")
    assert jobs.latest("me", "a") is running  # which may have made something
    assert (first.state, jobs.latest("me", "first")) == ("done", None)


def test_an_owner_finds_the_newest_job_of_a_kind(jobs):
    old = jobs.submit("me", "a", counting([], 1))
    over(jobs, old)
    assert jobs.latest("me", "a") is old
    new, other = jobs.submit("me", "a", counting([], 1)), jobs.submit("me", "b", counting([], 1))
    assert (jobs.latest("me", "a"), jobs.latest("me", "b")) == (new, other)
    assert jobs.latest("you", "a") is None


def test_an_owner_gives_all_jobs_to_another(jobs):
    seen = []
    before, others = jobs.submit("page", "a", counting(seen)), jobs.submit("you", "a", counting([], 1))
    jobs.hand_over("page", "me")
    after = jobs.submit("page", "a", counting([], 1))
    assert jobs.of("me", "a") == jobs.of("page", "a") == [before, after]
    assert jobs.of("you", "a") == [others]
    assert jobs.stop_all("page", "a")
    over(jobs, others)


def test_nobody_has_to_listen_and_the_thread_ends(jobs):
    seen, before = [], threading.active_count()
    job = jobs.submit("me", "a", counting(seen, 50))
    events = jobs.follow(job)
    next(events)
    events.close()  # the page was closed
    until(lambda: threading.active_count() <= before)
    until(lambda: job.is_over)
    assert (job.state, len(seen)) == ("done", 50)


def test_a_full_queue_refuses_and_no_visitor_fills_it_alone(jobs):
    seen = []
    running = jobs.submit("me", "a", counting(seen))
    until(lambda: running.state == "running")
    waiting = [jobs.submit("me", "a", counting([])) for _ in range(MAX_OWN)]
    with pytest.raises(ValueError, match=f"{MAX_OWN} of your jobs are waiting"):
        jobs.submit("me", "b", counting([]))
    waiting += [jobs.submit(f"visitor {i}", "a", counting([])) for i in range(MAX_WAITING - MAX_OWN)]
    with pytest.raises(ValueError, match=f"{MAX_WAITING} jobs are waiting"):
        jobs.submit("you", "a", counting([]))
    for job in (*waiting, running):
        jobs.stop(job)
