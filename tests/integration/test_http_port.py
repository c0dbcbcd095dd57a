"""The HTTP port itself: health, readiness, metrics, keys, and what is no HTTP."""

from tests.integration.http_house import http_house


async def test_health_and_readiness_follow_the_fleet_and_the_drain() -> None:
    """/ready needs workers that a request could be placed on, /health does not; both end with the drain."""
    async with http_house(0, 0) as here:
        assert (await here.client.get("/health")).status_code == 200
        assert (await here.client.get("/ready")).status_code == 503
        await here.house.add_decode()
        assert (await here.client.get("/ready")).json() == {"status": "ok"}
        await here.house.app.drain(1.0)
        for path in ("/health", "/ready"):
            # Those that were idle are closed.
            async with here.another_client() as client:
                answer = await client.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "draining"})
            assert answer.headers["connection"] == "close"


async def test_metrics_are_those_of_the_metrics_port() -> None:
    async with http_house(1, 1) as here:
        await here.house.generate(1)
        answer = await here.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        assert 'baton_requests_total{outcome="ok"} 1.0' in answer.text
        openmetrics = await here.client.get(
            "/metrics", headers={"accept": "application/openmetrics-text"}
        )
        assert openmetrics.text.endswith("# EOF\n")


async def test_every_answer_carries_the_request_id() -> None:
    """The client's where it is one, and a new one where it gives none."""
    async with http_house(0, 0) as here:
        given = await here.client.get("/health", headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        for headers in ({}, {"x-request-id": "not one"}):
            answer = await here.client.get("/nowhere", headers=headers)
            assert len(answer.headers["x-request-id"]) == 32


async def test_what_is_not_there_is_said_in_openais_form() -> None:
    async with http_house(0, 0) as here:
        answer = await here.client.get("/nowhere")
        assert (answer.status_code, answer.json()) == (
            404,
            {
                "error": {
                    "message": "there is nothing at this path",
                    "type": "not_found_error",
                    "param": None,
                    "code": "unknown_path",
                }
            },
        )
        answer = await here.client.post("/health")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
        assert answer.json()["error"]["code"] == "method_not_allowed"
