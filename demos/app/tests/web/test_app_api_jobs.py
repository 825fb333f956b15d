"""Calls of the API are jobs: they stop once their client is gone or asks, and others wait their turn."""

import json
import time

import httpx
import pytest
from app_client import PROMPT, RECIPE

pytest.importorskip("gradio")

LONG = {"steps": 150, "count": 16, "seed": 9}


def is_drawing(client, seconds=30):
    """Whether another call has to wait so long."""
    quick = client.submit(RECIPE, api_name="/redraw")
    try:
        quick.result(timeout=seconds)
    except TimeoutError:
        quick.cancel()
        return True
    return False


def begun(client):
    job, deadline = client.submit(PROMPT, **LONG, api_name="/compose"), time.monotonic() + 30
    while not is_drawing(client, seconds=2):  # it is not in the queue yet
        assert time.monotonic() < deadline
    return job


@pytest.mark.thorough  # the export below could not end either, if a job that is cancelled went on
def test_a_job_stops_once_its_client_asks(client):
    begun(client).cancel()
    assert not is_drawing(client)


@pytest.mark.thorough
def test_a_job_stops_once_its_client_is_gone(client):
    address = f"{client.src.rstrip('/')}/gradio_api"
    asked_for = {"prompt": PROMPT, **LONG}
    endpoint = client.view_api(return_format="dict")["named_endpoints"]["/compose"]
    values = [  # all of them: a raw call has no defaults
        asked_for.get(one["parameter_name"], one["parameter_default"]) for one in endpoint["parameters"]
    ]
    asked = httpx.post(f"{address}/call/compose", json={"data": values}).json()
    with httpx.stream("GET", f"{address}/call/compose/{asked['event_id']}", timeout=30) as answer:
        time.sleep(1)
        assert is_drawing(client, seconds=2)
        assert answer.status_code == 200
    deadline = time.monotonic() + 30
    while is_drawing(client, seconds=5):
        assert time.monotonic() < deadline


def test_one_call_waits_for_the_other(client):
    first, second = client.submit(PROMPT, seed=1, steps=20, api_name="/compose"), client.submit(RECIPE, api_name="/redraw")
    assert len(first.result(timeout=60)[0]) == 1
    assert second.result(timeout=60)


def test_what_needs_no_model_waits_for_no_job(client):
    job = begun(client)
    export = client.submit(RECIPE, api_name="/export")
    time.sleep(0.5)
    assert client.submit(api_name="/gallery").result(timeout=30)
    assert client.submit(api_name="/loras").result(timeout=30)
    assert not export.done()
    job.cancel()
    assert export.result(timeout=60)[1] == 0


def test_the_request_is_no_argument_of_an_endpoint(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    named = [one["parameter_name"] for one in endpoints["/redraw"]["parameters"]]
    assert named == ["recipe", "image", "mask", "control", "reference"]
    assert "request" not in json.dumps(endpoints)
