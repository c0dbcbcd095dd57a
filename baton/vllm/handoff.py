"""What a prefill leg tells the decode leg through a foreign router, which passes it on without a look: where the KV is, and the first
token. Typed here; JSON only on the wire (`to_json`, `from_json`). Pure.
"""

import hashlib
import json
import math
from array import array
from dataclasses import asdict, dataclass, replace
from typing import Any

from baton.types import (
    AttemptKey,
    PositionLogprobs,
    RequestId,
    SamplingParams,
    Sequence,
    TokenChunk,
    TokenLogprob,
)

CONNECTOR = "BatonConnector"
"""What workers call their way of handing KV over."""
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """KV that a prefill worker holds, and what it chose after it."""

    address: str
    """Where the transfer layer finds the worker."""
    key: AttemptKey
    """What the KV is held under; the attempt tells calls of one request id apart."""
    digest: str
    """Of the KV spec."""
    fingerprint: str
    """Of the prompt, and of all that the first token depends on; see `fingerprint_of`."""
    num_tokens: int
    """Of the prompt: KV of tokens [0, num_tokens) is held."""
    kv_bytes: int
    cached_tokens: int
    """Prompt tokens that prefill's prefix cache held."""
    first: TokenChunk
    """One token, chosen as if no token could end the output."""
    done_unix_s: float
    """When, by prefill's wall clock."""


def fingerprint_of(sequence: Sequence) -> str:
    """Equal for requests whose first tokens are equal, what may end an output apart. Routers change that between the legs."""
    params = replace(
        sequence.sampling,
        max_tokens=1,
        min_tokens=0,
        n=1,
        stop=(),
        stop_token_ids=(),
        ignore_eos=True,
    )
    digest = hashlib.blake2b(array("Q", sequence.prompt).tobytes(), digest_size=16)
    digest.update(repr(params).encode())
    return digest.hexdigest()


def stands(first_token: int, params: SamplingParams, eos_token_ids: tuple[int, ...]) -> bool:
    """Whether a token that was chosen among all is what these parameters choose first: the ends of an output, which `min_tokens` forbids at
    its begin, change a draw even where none of them is drawn.
    """
    if not params.min_tokens:
        return True
    return params.temperature == 0 and first_token not in {*eos_token_ids, *params.stop_token_ids}


def to_json(handed: HandedOver) -> str:
    """For `kv_transfer_params_json`. The first two fields are what other engines' parameters have."""
    logprobs = handed.first.logprobs
    return json.dumps(
        {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "connector": CONNECTOR,
            "version": VERSION,
            "address": handed.address,
            "request_id": handed.key.request_id,
            "epoch": handed.key.attempt,
            "digest": handed.digest,
            "fingerprint": handed.fingerprint,
            "num_tokens": handed.num_tokens,
            "kv_bytes": handed.kv_bytes,
            "cached_tokens": handed.cached_tokens,
            "done_unix_s": handed.done_unix_s,
            "first_token": handed.first.token_ids[0],
            "logprobs": asdict(logprobs[0]) if logprobs else None,
        },
        separators=(",", ":"),
    )


def from_json(text: str) -> HandedOver | None:
    """None where it is not what `to_json` makes: a hint, or another engine's parameters."""
    try:
        told = json.loads(text)
        if (told["connector"], told["version"]) != (CONNECTOR, VERSION):
            return None
        return _handed(told)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _handed(told: dict[str, Any]) -> HandedOver:
    logprobs = told["logprobs"]
    first = TokenChunk(
        0, (int(told["first_token"]),), () if logprobs is None else (_logprobs(logprobs),)
    )
    return HandedOver(
        address=str(told["address"]),
        key=AttemptKey(RequestId(str(told["request_id"])), int(told["epoch"])),
        digest=str(told["digest"]),
        fingerprint=str(told["fingerprint"]),
        num_tokens=int(told["num_tokens"]),
        kv_bytes=int(told["kv_bytes"]),
        cached_tokens=int(told["cached_tokens"]),
        first=first,
        done_unix_s=_finite(told["done_unix_s"]),
    )


def _finite(told: Any) -> float:
    number = float(told)
    if not math.isfinite(number):
        raise ValueError("is no finite number")
    return number


def _logprobs(told: dict[str, Any]) -> PositionLogprobs:
    chosen, *top = (
        TokenLogprob(int(each["token_id"]), float(each["logprob"]))
        for each in (told["chosen"], *told["top"])
    )
    return PositionLogprobs(chosen, tuple(top))


def wants_prefill(text: str) -> bool:
    """Whether the parameters ask for a prefill leg, as routers that know an engine's connector do."""
    try:
        told = json.loads(text)
        return isinstance(told, dict) and told.get("do_remote_decode") is True
    except (ValueError, RecursionError):
        return False
