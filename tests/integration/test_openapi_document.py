"""The served OpenAPI document is truthful: schemathesis makes requests by it, right ones and wrong ones, and looks whether the answers
are what it says.
"""

import asyncio
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from baton.engine.sim import SimConfig
from tests.integration.http_house import http_house

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
EXAMPLES = 25


async def test_answers_are_what_the_openapi_document_says() -> None:
    """For every path and method, whatever is asked: no 5xx, and status, content type and body as they are described."""
    sim = SimConfig(max_context_tokens=64, num_blocks=64, step_s=0.0005)
    async with http_house(1, 1, sim=sim) as here:
        asked = await asyncio.to_thread(fuzz, f"http://127.0.0.1:{here.port}/openapi.json")
        assert asked >= 4 * EXAMPLES
        assert await here.house.app.table.idle(5)


def fuzz(url: str) -> int:
    """Returns how many requests were made."""
    schema = schemathesis.openapi.from_url(url)
    asked = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                # A path has no wrong forms.
                continue

            @settings(
                max_examples=EXAMPLES if operation.method == "post" else 5,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
                database=None,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal asked
                asked += 1
                if mode is GenerationMode.POSITIVE:  # noqa: B023 - called in this turn
                    # However short, it would be kept, with 504.
                    case.headers.pop("x-request-timeout-s", None)
                case.call_and_validate(checks=CHECKS)

            ask()
    return asked
