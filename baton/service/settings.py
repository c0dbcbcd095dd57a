"""What an operator can set: frozen groups, one per kind of process, with every default in one place.

`from_env` reads `BATON_<FIELD>` (upper case) for any field and is called by the `__main__`s only; a value given on the command
line wins. Lists are comma-separated, booleans are `true` or `false`. Some fields have a standard variable too, which counts where
Baton's own is not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Self, get_type_hints

from baton.errors import FieldViolation, InvalidRequestError

ENV_PREFIX = "BATON_"


class LogFormat(Enum):
    """How log lines look."""

    PLAIN = "plain"
    JSON = "json"


class LogLevel(Enum):
    """The least severe lines that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class PlacementPolicy(Enum):
    """How a router chooses workers."""

    ROUND_ROBIN = "round-robin"
    """Each in turn."""
    LEAST_LOADED = "least-loaded"
    """The least busy, whatever their prefix caches hold."""
    PREFIX_AWARE = "prefix-aware"
    """The least delay, with load, cached prefixes, free blocks and nearness weighed."""


def standard_endpoint(environ: Mapping[str, str]) -> str:
    """OpenTelemetry's variable for where spans go; none where others turn traces off, or ask for what is not OTLP over gRPC."""
    traces, every = "OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"
    protocol = environ.get(f"{traces}PROTOCOL") or environ.get(f"{every}PROTOCOL") or "grpc"
    disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if disabled or exporter != "otlp" or protocol != "grpc":
        return ""
    named = (f"{traces}ENDPOINT", f"{every}ENDPOINT")
    return next((name for name in named if environ.get(name)), "")


def standard_sampler(environ: Mapping[str, str]) -> str:
    """OpenTelemetry's variable for what is sampled."""
    return "OTEL_TRACES_SAMPLER" if environ.get("OTEL_TRACES_SAMPLER") else ""


def standard_ratio(environ: Mapping[str, str]) -> str:
    """The variable beside it, where it is a ratio."""
    ratio = environ.get("OTEL_TRACES_SAMPLER", "").endswith("traceidratio")
    return "OTEL_TRACES_SAMPLER_ARG" if ratio and environ.get("OTEL_TRACES_SAMPLER_ARG") else ""


class Settings:
    """What all groups can do."""

    __slots__ = ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **overrides: object) -> Self:
        """Settings from the environment; overrides that are not None win. Raises `InvalidRequestError` naming the variable."""
        assert is_dataclass(cls)
        values: dict[str, object] = {}
        hints = get_type_hints(cls)
        for each in fields(cls):
            given = overrides.pop(each.name, None)
            variable = ENV_PREFIX + each.name.upper()
            if variable not in environ and "standard" in each.metadata:
                variable = each.metadata["standard"](environ)
            if given is not None:
                values[each.name] = given
            elif variable in environ:
                values[each.name] = _parse(variable, environ[variable], hints[each.name])
        if overrides:
            raise TypeError(f"no such settings: {sorted(overrides)}")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(Settings):
    """What every process that serves gRPC has."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces."""
    port: int = 0
    """0 takes any free port."""
    metrics_port: int = 0
    """Prometheus HTTP port; 0 takes any free port."""
    max_message_bytes: int = 4 * 1024 * 1024
    """Largest gRPC message accepted, or HTTP body; larger ones get RESOURCE_EXHAUSTED, or 413. KV never travels in one."""
    max_metadata_bytes: int = 16 * 1024
    """Largest metadata of a call accepted, or head of an HTTP request; more gets RESOURCE_EXHAUSTED, or 431."""
    max_streams: int = 4096
    """Calls at once on one connection; further ones wait in the client."""
    fleet_cert_file: str = ""
    """PEM certificate that this process shows within the fleet: workers to routers and routers to workers. With it, every port
    between them takes only callers that show one of the fleet's CA.
    """
    fleet_key_file: str = ""
    """PEM key of the fleet certificate."""
    fleet_ca_file: str = ""
    """PEM certificates of the fleet's CA."""
    fleet_server_name: str = ""
    """A name for which every certificate of the fleet is valid; empty: each is for the host that is dialled."""
    health_listen: str = ""
    """host:port that answers nothing but health, in plaintext: for probes, which show no certificate. Empty: none."""
    keepalive_s: float = 20.0
    """A peer that answers no HTTP/2 ping sent this often is taken for dead, and its calls are cancelled."""
    min_client_ping_s: float = 5.0
    """Clients may ping this often, with or without a call, and are not turned away for it."""
    drain_grace_s: float = 30.0
    """How long running requests may go on after SIGTERM."""
    default_timeout_s: float = 600.0
    """Bounds calls that arrive without a deadline."""
    reflection: bool = True
    """Serve gRPC reflection."""
    log_format: LogFormat = LogFormat.PLAIN
    log_level: LogLevel = LogLevel.INFO
    status_line_s: float = 10.0
    """How often the log tells in a line what the process does, whatever the log level; 0 never. Nothing is told while it is idle."""
    otlp_endpoint: str = field(default="", metadata={"standard": standard_endpoint})
    """Where spans go, over OTLP/gRPC: http://host:4317, or https with TLS; empty: nothing is traced. Needs the extra `otel`."""
    trace_sampler: str = field(
        default="parentbased_traceidratio", metadata={"standard": standard_sampler}
    )
    """What is traced, as OTEL_TRACES_SAMPLER names it."""
    trace_sample_ratio: float = field(default=1.0, metadata={"standard": standard_ratio})
    """Share of the requests that are traced, of those whose caller has not decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(ServerSettings):
    """A prefill or decode worker."""

    routers: tuple[str, ...] = ()
    """host:port of every router to join."""
    discover_routers: bool = False
    """Each address of a name in `routers` is a router of its own; names are looked up again and again. Otherwise a name is one router."""
    worker_id: str = ""
    """Empty: made from the role, the host name and random letters."""
    advertise_host: str = ""
    """Host that routers reach this worker at; empty: `host`, or the machine's name where `host` is a wildcard."""
    transfer_address: str = ""
    """Where the transfer layer finds this worker; empty: the worker id."""
    handoff_timeout_s: float = 30.0
    """How long prefill holds finished KV for decode to pull, and decode waits for a pull."""
    kept_kv_bytes: int = 256 * 1024 * 1024
    """Most KV that prefill keeps copied out for pulls to come; what is beyond is copied when it is pulled."""
    max_pull_bytes: int = 128 * 1024 * 1024
    """KV is pulled in pieces of at most this size."""
    overlap_tokens: int = 1024
    """A prompt of which decode lacks more tokens is handed over piece by piece while it is computed. The same on all workers."""
    kv_credit_bytes: int = 256 * 1024 * 1024
    """KV bytes that a decode worker has in flight at most."""
    progress_limit_s: float = 0.75
    """Shortest time without progress that turns health to NOT_SERVING: two heartbeats, with what it takes to notice and to tell."""
    stall_limit_s: float = 10.0
    """Longest time that a step of the engine may take, whatever is known of steps of its size, before health turns NOT_SERVING."""
    hang_limit_s: float = 60.0
    """An engine whose step takes so long has failed: its requests go on elsewhere, and the worker ends."""
    foreign_kv_ttl_s: float = 10.0
    """How long prefill holds KV that it computed for a foreign router, which may never send a decode worker for it."""
    foreign_max_waiting: int = 1024
    """Calls of foreign routers that wait for KV blocks at once; one more gets RESOURCE_EXHAUSTED."""
    rejoin_backoff_s: float = 0.2
    """First pause before joining a lost router again; doubles up to 5 s, with jitter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings(ServerSettings):
    """The router."""

    model: str = ""
    """Checkpoint directory or hub id whose tokenizer and chat template are served; empty: tokens are bytes, for simulated engines."""
    model_name: str = ""
    """What clients call the model; workers of another are refused. Empty: what the first worker calls it."""
    port: int = 50051
    heartbeat_s: float = 1.0
    """How often workers are asked to report."""
    lease_s: float = 2.5
    """A worker that was silent for so long is out of the fleet. It is to be found dead, and its requests to go on elsewhere, within two
    heartbeats and a second; a report may be late by the lease less a heartbeat before a live worker is taken for dead.
    """
    max_running: int = 256
    """Requests served at once."""
    max_queued: int = 1024
    """Requests that wait for their turn; of one more, one gets RESOURCE_EXHAUSTED: the last of the tenant that has the most."""
    priority_ageing_s: float = 5.0
    """A request that has waited so long goes before a later one whose priority is higher by one."""
    default_ttft_slo_s: float = 0.0
    """For requests that name no TTFT objective; 0 is none but their deadline."""
    ttft_target_s: float = 0.0
    """What counts as in time for requests that name no TTFT objective, in metrics only: nothing is refused for it.
    0: `default_ttft_slo_s`.
    """
    tpot_target_s: float = 0.0
    """Time for each output token after the first that counts as in time, in metrics only; 0: any."""
    max_attempts: int = 4
    """Attempts in a row that may fail without a new token before the request fails."""
    worker_wait_s: float = 10.0
    """How long a request waits for a worker that can take it."""
    orphan_grace_s: float = 10.0
    """How long decode goes on with a request whose router is gone, and keeps an answer that has ended, for `Attach`."""
    write_stall_s: float = 30.0
    """A client that does not read for so long loses its request."""
    autoscale: bool = False
    """Let workers that can take both roles follow the load of the two phases. One router of a fleet only."""
    autoscale_window_s: float = 10.0
    """How long a load must have lasted to change a role."""
    autoscale_dwell_s: float = 60.0
    """A worker keeps a role for so long at least."""
    autoscale_cooldown_s: float = 20.0
    """Shortest time between two changes."""
    autoscale_backlog_s: float = 1.0
    """Prefill gets a worker where its queues hold work for so long."""
    autoscale_decode_requests: float = 32.0
    """Decode gets a worker where each of its workers has so many requests, or nine tenths of their blocks are used."""
    max_stream_requests: int = 256
    """Requests at once on one stream of the Open Inference Protocol; further ones wait unread."""
    max_unread_bytes: int = 1024 * 1024
    """A client that leaves more of its output unread loses its request."""
    client_messages_per_s: float = 2500.0
    """About how many messages with tokens the router sends a second, to all clients together. With so many streams that each token
    in a message of its own would be more, each stream's tokens are joined, for 0.1 s at most: a message costs more than a token.
    """
    placement: PlacementPolicy = PlacementPolicy.PREFIX_AWARE
    local_prefill_tokens: int = 32
    """Prompts of which decode lacks at most so many tokens are computed by decode itself; 0 never."""
    session_store: str = field(
        default="sqlite:///~/.local/state/baton/sessions-{port}.db", repr=False
    )
    """Where sessions are kept; see `router.sessions.location`. It may hold a password."""
    max_sessions: int = 50_000
    """Sessions in the store; one more gets RESOURCE_EXHAUSTED."""
    session_ttl_s: float = 86_400.0
    """Longest life of a session."""
    session_idle_s: float = 3_600.0
    """Longest pause between a session's turns."""
    session_max_turns: int = 1_000
    """Turns of one session. Its tokens are bounded by the model's context."""
    session_lease_s: float = 15.0
    """How long a session stays locked when the router that ran its turn died."""
    http_listen: str = ""
    """host:port of the OpenAI API, with /health, /ready and /metrics; port 0 takes a free one. Keys and TLS are those of the clients' gRPC
    port. Empty: no HTTP but the metrics port's.
    """
    http_max_connections: int = 4096
    """HTTP connections at once; one more gets 503."""
    http_read_timeout_s: float = 30.0
    """An HTTP request that takes so long to arrive gets 408."""
    share_port: bool = False
    """Let other router processes listen at `port` too: the system spreads the clients' connections over them. Needs `fleet_listen`, another
    one for each, since workers join every process.
    """
    fleet_listen: str = ""
    """host:port for workers, and for whoever administers without a key; empty: workers join at the clients' port, which is refused
    where clients need a key or TLS is on.
    """
    api_keys_file: str = ""
    """The clients' keys, as `baton keys` writes them; read again when it changes. Empty: no call needs a key."""
    private_caches: bool = False
    """No tenant's prompts share KV with another's, so that no timing tells what others ask."""
    tls_cert_file: str = ""
    """PEM certificate that the clients' port shows, with its chain; read again when it changes. Empty: no TLS."""
    tls_key_file: str = ""
    """PEM key of that certificate."""
    tls_client_ca_file: str = ""
    """PEM certificates of the CA whose certificate clients must show; empty: they need none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings(Settings):
    """A command that talks to a router."""

    api_key: str = ""
    """Sent with every call; empty: none."""
    client_tls: bool = False
    """Speak TLS; so it is where one of the files is given."""
    client_ca_file: str = ""
    """PEM certificates that the router's must chain to; empty: the system's."""
    client_cert_file: str = ""
    """PEM certificate to show to the router."""
    client_key_file: str = ""
    """PEM key of that certificate."""


def _parse(variable: str, text: str, kind: object) -> object:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        if kind in (int, float, str):
            assert isinstance(kind, type)
            return kind(text)
        if isinstance(kind, type) and issubclass(kind, Enum):
            return kind(text.strip().lower())
        return tuple(part.strip() for part in text.split(",") if part.strip())
    except (ValueError, KeyError):
        raise InvalidRequestError(
            FieldViolation(variable, f"{text!r} is not a valid value")
        ) from None
