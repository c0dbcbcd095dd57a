"""Flexible workers under a foreign router: which leg a call is, before and after a change of role."""

from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from baton.types import Role
from tests.foreign_router import answer_of, foreign_router, generate_request
from tests.integration.flex_house import FlexHouse, flex_house

PROMPT = tuple(range(1, 60))
SAMPLING: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "ignore_eos": True}


async def native(house: FlexHouse) -> list[int]:
    return (await house.generate(PROMPT, max_tokens=12, seed=5)).tokens


def handed_bytes(house: FlexHouse, name: str) -> float:
    metric = house.workers[name].host.metrics.registry.get_sample_value
    return metric("baton_worker_handoff_bytes_total", {"role": "decode"}) or 0.0


async def test_the_role_tells_the_leg_and_a_change_of_it_breaks_no_router() -> None:
    """Promise: a router that was told the old roles is served all the same, with the same tokens."""
    async with flex_house({"a": Role.PREFILL, "b": Role.DECODE}, foreign_kv_ttl_s=1.0) as house:
        a, b = (house.workers[name].host.info.address for name in ("a", "b"))
        async with foreign_router(a, b) as router:
            server = await router.prefill.GetServerInfo(pb.GetServerInfoRequest())
            assert server.kv_role == "kv_both"
            answer = await router.generate("x", PROMPT, **SAMPLING)
            assert handed_bytes(house, "b") == len(PROMPT) * 16
            assert answer.tokens == await native(house)
            await house.set_role("a", Role.DECODE)
            await house.set_role("b", Role.PREFILL)
            assert (await router.generate("y", PROMPT, **SAMPLING)).tokens == await native(house)


async def test_parameters_that_ask_for_a_leg_win_over_the_role() -> None:
    """Promise: one worker may be sent both legs, of which it pulls the KV from itself."""
    async with flex_house({"a": Role.DECODE, "b": Role.PREFILL}) as house:
        address = house.workers["a"].host.info.address
        async with foreign_router(address, address) as router:
            request = generate_request("x", PROMPT, **(SAMPLING | {"max_tokens": 1}))
            request.kv_transfer_params_json = '{"do_remote_decode": true}'
            first = (await answer_of(router.prefill.Generate(request))).complete
            request.sampling_params.max_tokens = 12
            request.kv_transfer_params_json = first.kv_transfer_params_json
            answer = await answer_of(router.decode.Generate(request))
            assert handed_bytes(house, "a") > 0
            assert answer.tokens == await native(house)
