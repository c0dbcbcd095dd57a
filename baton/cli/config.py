"""What `baton serve` runs: the resolved form of its command line. Torch-free and Ray-free."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import baton
from baton.cli.ports import bind
from baton.engine.config import EngineConfig
from baton.engine.sim import SimConfig
from baton.errors import FieldViolation, InvalidRequestError
from baton.kv.spec import WeightFormat
from baton.service.settings import LogFormat, LogLevel, PlacementPolicy, WorkerSettings
from baton.types import Role

LOOPBACK = "127.0.0.1"


class Device(Enum):
    """What an engine computes on."""

    CPU = "cpu"
    CUDA = "cuda"


class Kernels(Enum):
    """What computes on a CPU."""

    NATIVE = "native"
    AVX512 = "avx512"
    TORCH = "torch"


class Transport(Enum):
    """How KV goes from prefill to decode."""

    RAY = "ray"
    """Workers are Ray actors, each in a process of its own; KV crosses through the object store."""
    MEMORY = "memory"
    """Router and workers share this process; KV is copied from pool to pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One machine's whole deployment."""

    engine: EngineConfig | SimConfig
    """Which engine each worker builds, but for its weights' format."""
    prefill_weights: WeightFormat | None = None
    """Of prefill workers; None is the dtype's own."""
    decode_weights: WeightFormat | None = None
    """Of decode workers; None is the dtype's own."""
    tokenizer: str
    """Directory or hub id of the checkpoint whose tokenizer and chat template are served."""
    prefill: int = 1
    """Prefill workers; 0 lets the decode workers compute prompts themselves."""
    decode: int = 1
    """Decode workers."""
    transport: Transport = Transport.RAY
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int = 9464
    """The router's; workers take free ports."""
    http: str = ""
    """host:port of the router's OpenAI API; empty: none."""
    fleet_port: int = 0
    """Where workers join the router, on the loopback, so that nobody else can; 0 takes a free one."""
    object_store_bytes: int | None = None
    """Size of Ray's object store; None is sized from the machine."""
    local_prefill_tokens: int | None = None
    """Prompts of which decode lacks at most so many tokens skip prefill workers; None is the router's default."""
    placement: PlacementPolicy | None = None
    """How the router chooses workers; None is its default."""
    drain_grace_s: float = 30.0
    """How long running requests may go on after a stop signal."""
    log_format: LogFormat = LogFormat.PLAIN
    log_level: LogLevel = LogLevel.WARNING
    drawn_port: bool = False
    """The port was not asked for: another run has another."""

    @property
    def address(self) -> str:
        """Where clients on this machine find the router."""
        host = "127.0.0.1" if self.host in {"0.0.0.0", "::", ""} else self.host  # noqa: S104 - compared
        return f"{host}:{self.port}"

    @property
    def fleet_address(self) -> str:
        """Where this machine's workers find the router."""
        return f"{LOOPBACK}:{self.fleet_port}"

    @property
    def one_format(self) -> bool:
        """Whether any worker could compute what any other does."""
        return not self.prefill or self.prefill_weights is self.decode_weights

    def engine_of(self, role: Role) -> EngineConfig | SimConfig:
        """What a worker of that role builds."""
        if role is Role.PREFILL:
            return replace(self.engine, weights=self.prefill_weights)
        return replace(
            self.engine,
            weights=self.decode_weights,
            imports_prompts=self.prefill > 0,
            prompt_weights=self.prefill_weights,
        )

    def workers(self, environ: Mapping[str, str]) -> tuple[tuple[Role, WorkerSettings], ...]:
        """Role and settings of each worker, prefill first. What has no option here comes from `BATON_*` variables."""
        slots = [(Role.PREFILL, i) for i in range(self.prefill)]
        slots += [(Role.DECODE, i) for i in range(self.decode)]
        return tuple((role, self._worker(f"{role.value}-{i}", environ)) for role, i in slots)

    def _worker(self, name: str, environ: Mapping[str, str]) -> WorkerSettings:
        return WorkerSettings.from_env(
            environ,
            host=LOOPBACK,
            port=0,
            metrics_port=0,
            worker_id=name,
            transfer_address=name,
            routers=(self.fleet_address,),
            drain_grace_s=self.drain_grace_s,
            log_format=self.log_format,
            log_level=self.log_level,
            # The router speaks for all.
            status_line_s=0.0,
        )


def shipped_model() -> Path:
    """The small trained model in the package."""
    return Path(baton.__file__).parent / "models" / "tales"


def with_ports(config: ServeConfig) -> ServeConfig:
    """Replaces port 0 by free ones, so that a restarted router comes back at its old address. Raises `UnavailableError` where a port is
    taken, `InvalidRequestError` where the HTTP address is none.
    """
    with ExitStack() as held:
        ports = [bind(config.host, port, held) for port in (config.port, config.metrics_port)]
        fleet_port = bind(LOOPBACK, config.fleet_port, held)
        http = _bound(config.http, held) if config.http else ""
    return replace(
        config,
        port=ports[0],
        metrics_port=ports[1],
        fleet_port=fleet_port,
        http=http,
        drawn_port=not config.port,
    )


def _bound(listen: str, held: ExitStack) -> str:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequestError(FieldViolation("--http", "must be HOST:PORT"))
    return f"{host}:{bind(host, int(port), held)}"
