"""Clients in a process of their own, who ask any front for a text's continuation, streamed, and time what they get.

Jobs come as JSON lines on standard input, and results go as JSON lines to standard output; ends with its input. A job names fronts,
each with the addresses that it is reached at, and says whether so many streams ask one front for so long, or one stream asks all in turn.

    http      OpenAI's completions: server-sent events
    grpc      Baton's InferenceService
    direct    the workers themselves, by vLLM's engine API: the prefill leg, then the decode leg

The clients are as cheap as they can be: of a stream's messages only the last ones are parsed. Every prompt is new to every cache.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
import tokenizers
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc

MAX_SAMPLES = 20_000
CHANNEL_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
_WORDS = (
    "dog",
    "sea",
    "house",
    "small",
    "red",
    "bird",
    "ran",
    "they",
    "with",
    "sun",
    "tree",
    "saw",
)

Told = int | None
"""A message that carried output: None; the last word: how many tokens there were."""


@dataclass(slots=True)
class Figures:
    """What some streams saw."""

    requests: int = 0
    errors: int = 0
    tokens: int = 0
    messages: int = 0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between messages."""


class Front:
    """One stream's way to a front; used for one request at a time."""

    def ask(self, prompt: str, new_tokens: int) -> AsyncGenerator[Told, None]:
        """Raises anything where the front does not serve the request."""
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing to close."""


class HttpFront(Front):
    """One connection, kept alive."""

    def __init__(self, address: str, model: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._model = model
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, prompt: str, new_tokens: int) -> AsyncGenerator[Told, None]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        asked = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(asked).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            self._streams = None
            writer.close()
            raise OSError(head.partition(b"\r\n")[0].decode())
        tokens = 0
        async with aclosing(_events(reader)) as events:
            async for event in events:
                if b'"usage":{' in event or b'"usage": {' in event:
                    tokens = json.loads(event)["usage"]["completion_tokens"]
                if b'"text":""' not in event and b'"choices":[]' not in event:
                    yield None
        yield tokens

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def _events(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event of a chunked response, read to its end."""
    held = b""
    while True:
        size = int(await reader.readline(), 16)
        held += (await reader.readexactly(size + 2))[:-2]
        *events, held = held.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                yield event[6:]
        if not size:
            return


class GrpcFront(Front):
    """A channel that several streams share."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def ask(self, prompt: str, new_tokens: int) -> AsyncGenerator[Told, None]:
        request = inference_pb2.GenerateRequest(
            text=prompt,
            sampling=common_pb2.SamplingParams(
                max_tokens=new_tokens, temperature=0, ignore_eos=True
            ),
        )
        async for response in self._stub.Generate(request, timeout=60):
            if response.HasField("finished"):
                yield response.finished.usage.completion_tokens
            elif response.HasField("chunk"):
                yield None


class DirectFront(Front):
    """Channels that several streams share."""

    def __init__(
        self,
        prefill: grpc.aio.Channel,
        decode: grpc.aio.Channel,
        encode: Callable[[str], list[int]],
    ) -> None:
        self._prefill = vllm_engine_pb2_grpc.VllmEngineStub(prefill)
        self._decode = vllm_engine_pb2_grpc.VllmEngineStub(decode)
        self._encode = encode

    async def ask(self, prompt: str, new_tokens: int) -> AsyncGenerator[Told, None]:
        request = pb.GenerateRequest(
            request_id=f"bench-{random.getrandbits(64):x}",
            sampling_params=pb.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
        )
        request.tokenized.input_ids.extend(self._encode(prompt))
        async for response in self._prefill.Generate(request, timeout=60):
            request.kv_transfer_params_json = response.complete.kv_transfer_params_json
        request.sampling_params.max_tokens, request.stream = new_tokens, True
        async for response in self._decode.Generate(request, timeout=60):
            if response.HasField("complete"):
                yield response.complete.completion_tokens
            else:
                yield None


class Load:
    """The fronts of one job, and what their streams saw."""

    def __init__(self, job: dict[str, Any], encode: Callable[[str], list[int]]) -> None:
        self._job = job
        self._encode = encode
        self._channels: list[grpc.aio.Channel] = []
        self._random = random.Random()

    async def run(self) -> dict[str, Any]:
        """The job's result, by the names of its fronts."""
        fronts = self._job["fronts"]
        figures = {name: Figures() for name in fronts}
        began_s = time.perf_counter()
        try:
            if self._job["kind"] == "latency":
                await self._in_turn(fronts, figures)
            else:
                ((name, front),) = fronts.items()
                share = self._shared(front, 4)
                end_s = began_s + self._job["seconds"]
                streams = (
                    self._stream(share(turn), figures[name], end_s)
                    for turn in range(self._job["concurrency"])
                )
                await asyncio.gather(*streams)
            wall_s = time.perf_counter() - began_s
        finally:
            await asyncio.gather(*(channel.close(None) for channel in self._channels))
        return {name: _result(told, wall_s) for name, told in figures.items()}

    async def _in_turn(self, fronts: dict[str, Any], figures: dict[str, Figures]) -> None:
        opened = {name: self._shared(front, 1)(0) for name, front in fronts.items()}
        warm_up = 3
        for turn in range(self._job["requests"] + warm_up):
            names = sorted(opened)
            self._random.shuffle(names)
            for name in names:
                told = figures[name] if turn >= warm_up else Figures()
                await self._one(opened[name], told)
        for front in opened.values():
            await front.close()

    async def _stream(self, front: Front, figures: Figures, end_s: float) -> None:
        while time.perf_counter() < end_s:
            try:
                await self._one(front, figures)
            except (OSError, grpc.RpcError, EOFError, ValueError) as error:
                if not figures.errors:
                    print(f"first error: {error}", file=sys.stderr, flush=True)
                figures.errors += 1
        await front.close()

    async def _one(self, front: Front, figures: Figures) -> None:
        words = self._random.choices(_WORDS, k=self._job["prompt_words"])
        prompt = f"{self._random.getrandbits(40)} {' '.join(words)}"
        began_s = time.perf_counter()
        arrivals: list[float] = []
        async with aclosing(front.ask(prompt, self._job["new_tokens"])) as told:
            async for tokens in told:
                if tokens is None:
                    arrivals.append(time.perf_counter())
                else:
                    figures.tokens += tokens
        figures.requests += 1
        figures.messages += len(arrivals)
        if arrivals:
            figures.ttft_s.append(arrivals[0] - began_s)
            figures.gaps_s += [after - before for before, after in pairwise(arrivals)]

    def _shared(self, front: dict[str, Any], connections: int) -> Callable[[int], Front]:
        """Makes a stream's front; gRPC's streams share so many connections."""
        match front["kind"]:
            case "http":
                return lambda _: HttpFront(front["address"], front["model"])
            case "grpc":
                channels = [self._open(front["address"]) for _ in range(connections)]
                return lambda turn: GrpcFront(channels[turn % connections])
            case _:
                prefills = [self._open(address) for address in front["prefill"]]
                decodes = [self._open(address) for address in front["decode"]]
                return lambda turn: DirectFront(
                    prefills[turn % len(prefills)], decodes[turn % len(decodes)], self._encode
                )

    def _open(self, address: str) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._channels.append(channel)
        return channel


def _result(figures: Figures, wall_s: float) -> dict[str, Any]:
    return {
        "requests": figures.requests,
        "errors": figures.errors,
        "tokens": figures.tokens,
        "messages": figures.messages,
        "wall_s": wall_s,
        "ttft_s": _sample(figures.ttft_s),
        "gaps_s": _sample(figures.gaps_s),
    }


def _sample(values: list[float]) -> list[float]:
    return values if len(values) <= MAX_SAMPLES else random.sample(values, MAX_SAMPLES)


def main() -> None:
    """Takes the tokenizer's file as its argument. Runs until standard input ends."""
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    for line in sys.stdin:
        result = asyncio.run(Load(json.loads(line), encode).run())
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
