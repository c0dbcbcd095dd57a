"""Between the client's types and the messages of `baton.v1`: requests out, answers in. No I/O; the sync and the async client
share it.
"""

import uuid
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import grpc

from baton.client.types import (
    Attempt,
    ChatMessage,
    Chunk,
    Completion,
    ConnectionOptions,
    ModelInfo,
    Prompt,
    Result,
    SamplingOptions,
    Session,
    SessionTurn,
    Timings,
    Usage,
)
from baton.codec import chunk_from_proto, finish_reason_from_proto, worker_info_from_proto
from baton.errors import FieldViolation, InternalError, InvalidRequestError
from baton.service.access import HEADER
from baton.service.channel import NO_RETRIES
from baton.service.tls import TlsFiles, channel_credentials
from baton.types import PositionLogprobs, TokenChunk
from baton.v1 import common_pb2
from baton.v1 import inference_pb2 as pb


def channel_options(options: ConnectionOptions) -> list[tuple[str, int]]:
    """As gRPC names them."""
    chosen = [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        # A server that has just come up is found within a second, whatever other clients of this process saw.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        NO_RETRIES,
    ]
    if options.keepalive_s is not None:
        chosen.append(("grpc.keepalive_time_ms", round(options.keepalive_s * 1000)))
        timeout_ms = round(options.keepalive_timeout_s * 1000)
        chosen.append(("grpc.keepalive_timeout_ms", timeout_ms))
        # A ping that gRPC sent to measure the network holds the others back, and has a timeout of its own: a minute.
        chosen.append(("grpc.http2.ping_timeout_ms", timeout_ms))
        # Someone who only reads may ping as often as they like.
        chosen.append(("grpc.http2.max_pings_without_data", 0))
    return chosen


def credentials(options: ConnectionOptions) -> grpc.ChannelCredentials | None:
    """None for plaintext. Raises `InvalidRequestError` naming an unusable file."""
    files = TlsFiles(cert=options.tls_cert_file, key=options.tls_key_file, ca=options.tls_ca_file)
    return channel_credentials(files) if options.tls or files != TlsFiles() else None


def call_metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    """What goes with every call; nothing without a key. Raises `InvalidRequestError` for what no header can carry."""
    if not api_key:
        return ()
    if not (api_key.isascii() and api_key.isprintable()):
        raise InvalidRequestError(FieldViolation("api_key", "must be printable ASCII"))
    return ((HEADER, f"Bearer {api_key}"),)


def new_request_id() -> str:
    """Made here rather than by the router, so that a request can be cancelled before its first answer."""
    return f"c-{uuid.uuid4().hex}"


def generate_request(
    prompt: Prompt,
    *,
    request_id: str,
    model: str,
    sampling: SamplingOptions | None,
    cache_salt: str = "",
    session: Session | str | None = None,
    priority: int = 0,
    ttft_slo_s: float | None = None,
) -> pb.GenerateRequest:
    """Raises `InvalidRequestError` for values that a message cannot carry; the router judges the rest."""
    request = pb.GenerateRequest()
    _assign("request_id", partial(setattr, request, "request_id", request_id))
    _assign("model", partial(setattr, request, "model", model))
    _assign("cache_salt", partial(setattr, request, "cache_salt", cache_salt))
    if session is not None:
        _assign("session_id", partial(setattr, request, "session_id", session_id(session)))
    _assign("priority", partial(setattr, request, "priority", priority))
    if ttft_slo_s is not None:
        _assign("ttft_slo_seconds", partial(setattr, request, "ttft_slo_seconds", ttft_slo_s))
    if isinstance(prompt, str):
        _assign("text", partial(setattr, request, "text", prompt))
    elif isinstance(prompt, bytes | bytearray | memoryview):
        raise InvalidRequestError(FieldViolation("text", "must be str, not bytes"))
    elif any(isinstance(item, ChatMessage) for item in prompt):
        _assign("chat", lambda: request.chat.messages.extend(map(_message, prompt)))
    else:
        request.tokens.SetInParent()
        _assign("tokens", lambda: request.tokens.ids.extend(prompt))  # type: ignore[arg-type]
    if sampling is not None:
        _fill_sampling(request.sampling, sampling)
    return request


def session_id(session: Session | str) -> str:
    """Raises `InvalidRequestError` for an empty one, which would make a turn of no session."""
    named = session.session_id if isinstance(session, Session) else session
    if named == "":
        raise InvalidRequestError(FieldViolation("session_id", "is empty"))
    return named


def _message(message: object) -> pb.ChatMessage:
    if not isinstance(message, ChatMessage):
        raise TypeError(f"expected ChatMessage, got {type(message).__name__}")
    return pb.ChatMessage(role=message.role, content=message.content)


def _fill_sampling(target: common_pb2.SamplingParams, sampling: SamplingOptions) -> None:
    scalars = {
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "n": sampling.n,
    }
    target.SetInParent()
    for name, value in scalars.items():
        if value is not None:
            _assign(f"sampling.{name}", partial(setattr, target, name, value))
    _assign("sampling.logit_bias", lambda: target.logit_bias.update(sampling.logit_bias))
    if isinstance(sampling.stop, str):
        raise InvalidRequestError(FieldViolation("sampling.stop", "must be a list of strings"))
    _assign("sampling.stop", lambda: target.stop.extend(sampling.stop))
    _assign(
        "sampling.stop_token_ids", lambda: target.stop_token_ids.extend(sampling.stop_token_ids)
    )


def _assign(field: str, act: Callable[[], None]) -> None:
    """Protobuf refuses wrong types, numbers out of a field's range and text that is not Unicode; callers get one error for all."""
    try:
        act()
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(FieldViolation(field, str(error))) from error


class _Text:
    """One completion's output so far."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.characters = 0
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.repeated_characters = 0
        """To come, of those that are here already."""

    def add(self, message: pb.Chunk) -> Chunk | None:
        """What is new in a chunk, where anything is."""
        text = message.text[self.repeated_characters :]
        self.repeated_characters -= len(message.text) - len(text)
        tokens = self._fresh(chunk_from_proto(message.tokens))
        self.text.append(text)
        self.characters += len(text)
        self.token_ids.extend(tokens.token_ids)
        self.logprobs.extend(tokens.logprobs)
        if not (text or tokens.token_ids):
            return None
        return Chunk(text, tokens.first_index, tokens.token_ids, tokens.logprobs, message.choice)

    def _fresh(self, tokens: TokenChunk) -> TokenChunk:
        """Without the tokens that are here already. Raises `InternalError` where they differ, or one is missing."""
        have = len(self.token_ids)
        if not tokens.token_ids:
            return tokens
        if tokens.first_index > have:
            raise InternalError(
                f"got tokens from position {tokens.first_index} on, expected {have}"
            )
        known = have - tokens.first_index
        repeated = tokens.token_ids[:known]
        if list(repeated) != self.token_ids[tokens.first_index : tokens.end_index]:
            raise InternalError("the server repeated the answer with other tokens")
        return TokenChunk(have, tokens.token_ids[known:], tokens.logprobs[known:])

    def completion(self, end: pb.ChoiceEnd) -> Completion:
        reason = finish_reason_from_proto(end.reason)
        if reason is None:
            raise InternalError("the server finished a request without saying why")
        stop = end.WhichOneof("stop_match")
        return Completion(
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=reason,
            stop_string=end.stop_string if stop == "stop_string" else None,
            stop_token_id=end.stop_token_id if stop == "stop_token_id" else None,
        )


class Collector:
    """Folds the events of a request's calls, one after another, into chunks and, at the end, the result. Used by one thread or task
    at a time.
    """

    def __init__(self) -> None:
        self._accepted: pb.Accepted | None = None
        self._outputs: defaultdict[int, _Text] = defaultdict(_Text)
        self.result: Result | None = None

    @property
    def seed(self) -> int | None:
        """None until the router has accepted the request."""
        return None if self._accepted is None else self._accepted.seed

    def add(self, response: pb.GenerateResponse) -> Chunk | None:
        """The chunk that the event brings, if it brings one."""
        match response.WhichOneof("event"):
            case "accepted":
                self._accepted = self._accepted or response.accepted
            case "chunk":
                return self._outputs[response.chunk.choice].add(response.chunk)
            case "finished":
                self.result = self._finish(response.finished)
            case None:
                pass  # An event of a newer server.
        return None

    def check_ended(self) -> None:
        """Called where the call ended with OK."""
        if self.result is None:
            raise InternalError("the server ended the call without finishing the request")

    def positions(self) -> list[pb.OutputPosition]:
        """What is here of each completion, for `Attach`."""
        return [
            pb.OutputPosition(next_index=len(output.token_ids), text_characters=output.characters)
            for output in (
                self._outputs[choice] for choice in range(max(self._outputs, default=-1) + 1)
            )
        ]

    def expect_all_again(self) -> None:
        """The next call repeats the answer from its beginning: what is here already is left out."""
        for output in self._outputs.values():
            output.repeated_characters = output.characters

    def expect_the_rest(self) -> None:
        """The next call goes on from `positions`."""
        for output in self._outputs.values():
            output.repeated_characters = 0

    def _finish(self, message: pb.Finished) -> Result:
        if self._accepted is None or not message.choices:
            raise InternalError("the server finished a request that it had not accepted")
        completions = tuple(self._outputs[end.choice].completion(end) for end in message.choices)
        first = completions[0]
        return Result(
            request_id=self._accepted.request_id,
            model=self._accepted.model,
            text=first.text,
            token_ids=first.token_ids,
            logprobs=first.logprobs,
            finish_reason=first.finish_reason,
            stop_string=first.stop_string,
            stop_token_id=first.stop_token_id,
            completions=completions,
            seed=self._accepted.seed,
            usage=usage(message.usage),
            timings=timings(message.timings),
            attempts=tuple(_attempt(report) for report in message.attempts),
            session=SessionTurn(message.session.session_id, message.session.turn)
            if message.HasField("session")
            else None,
        )


def usage(message: pb.Usage) -> Usage:
    """Of an answer or a session."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
    )


def timings(message: pb.Timings) -> Timings:
    """Of an answer."""
    # Zero on the wire is "did not happen".
    return Timings(
        admitted_at_s=message.admitted_at_seconds or None,
        placed_at_s=message.placed_at_seconds or None,
        reserved_at_s=message.reserved_at_seconds or None,
        prefill_started_at_s=message.prefill_started_at_seconds or None,
        first_token_at_s=message.first_token_at_seconds or None,
        kv_received_at_s=message.kv_received_at_seconds or None,
        last_token_at_s=message.last_token_at_seconds or None,
        finished_at_s=message.finished_at_seconds or None,
        prefill_queue_s=message.prefill_queue_seconds,
        prefill_s=message.prefill_seconds,
        handoff_s=message.handoff_seconds,
        handoff_bytes=message.handoff_bytes,
        preemptions=message.preemptions,
    )


def _attempt(report: pb.AttemptReport) -> Attempt:
    return Attempt(
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        failure=report.failure,
        resumed_tokens=report.resumed_tokens,
    )


def model_info(response: pb.GetModelResponse) -> ModelInfo:
    """Of the answer to GetModel."""
    return ModelInfo(
        model=response.model,
        fingerprint=response.fingerprint,
        dtype=response.dtype,
        vocab_size=response.vocab_size,
        max_context_tokens=response.max_context_tokens,
        eos_token_ids=tuple(response.eos_token_ids),
        has_chat_template=response.has_chat_template,
        workers=tuple(worker_info_from_proto(worker) for worker in response.workers),
    )
