"""What a router adds to the latency of one request at a time."""

import random
import time
from itertools import pairwise
from typing import Any

import grpc

from baton import codec
from baton.types import AttemptKey, RequestId, RequestRecord, SamplingParams
from baton.types import Sequence as TokenSequence
from baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc, inference_pb2, inference_pb2_grpc
from benchmarks.router_load import Measured, generate_request, quantile


async def run_latency(
    router: Measured, *, requests: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """In turn through the router and to the decode worker itself."""
    rng = random.Random(2)
    ttft: dict[str, list[float]] = {"router": [], "direct": []}
    itl: dict[str, list[float]] = {"router": [], "direct": []}
    async with grpc.aio.insecure_channel(router.address) as front:
        inference = inference_pb2_grpc.InferenceServiceStub(front)
        model = await inference.GetModel(inference_pb2.GetModelRequest())
        worker = next(w for w in model.workers if w.role == common_pb2.WORKER_ROLE_DECODE)
        async with grpc.aio.insecure_channel(worker.address) as back:
            decode = decode_pb2_grpc.DecodeServiceStub(back)
            for turn in range(requests + 5):
                request = generate_request(rng, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
                direct = _decode_request(request, worker.kv_spec.digest, turn)
                calls = {
                    "router": lambda r=request: inference.Generate(r, timeout=60),
                    "direct": lambda r=direct: decode.Decode(r, timeout=60),
                }
                for name in sorted(calls, reverse=bool(turn % 2)):
                    first_s, gaps = await _time_tokens(calls[name], name)
                    if turn >= 5:
                        ttft[name].append(first_s)
                        itl[name] += gaps
    summary: dict[str, Any] = {}
    for share in (0.5, 0.99):
        label = f"p{share * 100:.0f}"
        for kind, samples in (("ttft", ttft), ("itl", itl)):
            through, straight = (quantile(samples[n], share) * 1e3 for n in ("router", "direct"))
            summary[f"{kind}_{label}_ms"] = round(through, 3)
            summary[f"direct_{kind}_{label}_ms"] = round(straight, 3)
            summary[f"added_{kind}_{label}_ms"] = round(through - straight, 3)
    summary["requests"] = requests
    return summary


def _decode_request(
    request: inference_pb2.GenerateRequest, digest: str, turn: int
) -> decode_pb2.DecodeRequest:
    sampling = SamplingParams(
        max_tokens=request.sampling.max_tokens, temperature=0.0, seed=1, ignore_eos=True
    )
    # Another prompt of the same length: what the router's request left in the prefix cache must not help.
    sequence = TokenSequence(tuple(255 - t or 1 for t in request.tokens.ids), (), sampling)
    name = f"direct-{turn}"
    return decode_pb2.DecodeRequest(
        key=codec.key_to_proto(AttemptKey(RequestId(name))),
        sequence=codec.sequence_to_proto(sequence),
        kv_digest=digest,
        record=codec.record_to_proto(
            RequestRecord(request_id=RequestId(name), tenant="", stop=(), n=1, deadline_unix_s=0.0)
        ),
    )


async def _time_tokens(start: Any, name: str) -> tuple[float, list[float]]:
    """Seconds to the first token, and between messages with tokens, per token."""
    started_s = time.perf_counter()
    arrivals: list[float] = []
    async for response in start():
        tokens = response.chunk.tokens if name == "router" else response.tokens
        arrivals += [time.perf_counter()] * len(tokens.token_ids)
    gaps = [after - before for before, after in pairwise(arrivals)]
    return arrivals[0] - started_s, gaps
