"""Who calls: the one place where an API key becomes a `Caller`.

`GrpcServer` asks `check` before any handler runs, so that a service which nobody thought of is closed, and servicers ask `caller_of`
for the tenant in whose name they act; other protocols hand `Access.find` the same header. Health and reflection are open. Used on the
server's event loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.errors import BatonError, UnauthenticatedError
from baton.service.calls import Context
from baton.service.keys import KeyRing, TenantLimits, load_keys
from baton.service.reload import Reloaded

HEADER = "authorization"
SCHEME = "bearer"

OPEN_METHODS = (
    "/grpc.health.v1.",
    "/grpc.reflection.",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
"""What the names of methods begin with that are answered without a key: they tell what runs and whether it is well, to load balancers
and tools that have none.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """In whose name a call acts. Nothing of one tenant's is visible to another: it is as if it were not there."""

    tenant: str = ""
    """Empty where no keys are configured."""
    limits: TenantLimits = field(default_factory=TenantLimits)
    is_admin: bool = False
    private_cache: bool = False
    """Prompts without a salt of their own share KV within the tenant only."""

    def salted(self, salt: str) -> str:
        """The prefix cache's salt for a request that asked for `salt`. No salt of one tenant is another's: a tenant's name has no slash."""
        return f"{self.tenant}/{salt}" if salt or self.private_cache else ""


LOCAL = Caller(is_admin=True)
"""Everybody, where no keys are configured."""


class Access(Protocol):
    """Tells callers apart."""

    def find(self, authorization: str | None) -> Caller:
        """By the value of the call's `authorization` header. Raises `UnauthenticatedError`."""
        ...

    def limits_of(self, tenant: str) -> TenantLimits:
        """What a tenant may use now."""
        ...


class OpenAccess:
    """Everybody is the same caller, whatever key a call carries."""

    def __init__(self, caller: Caller = LOCAL) -> None:
        self._caller = caller

    def find(self, authorization: str | None) -> Caller:  # noqa: ARG002
        return self._caller

    def limits_of(self, tenant: str) -> TenantLimits:  # noqa: ARG002
        return self._caller.limits


class KeyAccess:
    """Callers by the keys of a file, which is read again when it changes: a revoked key fails from its next call on."""

    def __init__(self, path: str, *, private_caches: bool = False) -> None:
        """Raises `InvalidRequestError` where the file is unusable. `private_caches` counts for every tenant."""
        self._keys: Reloaded[KeyRing] = Reloaded([path], lambda: load_keys(path))
        self._private_caches = private_caches

    def find(self, authorization: str | None) -> Caller:
        ring = self._keys.value
        key = ring.find(_presented(authorization))
        if key is None:
            raise UnauthenticatedError("the API key is not valid")
        return Caller(
            tenant=key.tenant,
            limits=ring.limits_of(key.tenant),
            is_admin=key.is_admin,
            private_cache=key.private_cache or self._private_caches,
        )

    def limits_of(self, tenant: str) -> TenantLimits:
        return self._keys.value.limits_of(tenant)


class WatchedAccess:
    """Tells of every caller that another `Access` refuses."""

    def __init__(self, access: Access, on_refused: Callable[[BatonError], None]) -> None:
        self._access = access
        self._on_refused = on_refused

    def find(self, authorization: str | None) -> Caller:
        try:
            return self._access.find(authorization)
        except UnauthenticatedError as error:
            self._on_refused(error)
            raise

    def limits_of(self, tenant: str) -> TenantLimits:
        return self._access.limits_of(tenant)


def check(access: Access, method: str, context: Context) -> None:
    """Raises `UnauthenticatedError` where a call of this method needs a key and has none that is valid."""
    if not method.startswith(OPEN_METHODS):
        caller_of(access, context)


def caller_of(access: Access, context: Context) -> Caller:
    """Who makes a gRPC call. Raises `UnauthenticatedError`."""
    metadata: Any = context.invocation_metadata() or ()
    given = [str(value) for key, value in metadata if key == HEADER]
    return access.find(given[0] if len(given) == 1 else None)


def _presented(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != SCHEME:
        raise UnauthenticatedError(f"an API key is needed, as `{HEADER}: Bearer KEY`")
    return key.strip()
