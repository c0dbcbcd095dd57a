"""The checksum that KV travels with. Pure functions, used by whoever copies KV out of a pool or into one: bytes are cheapest to
read while the copy has them in the cache.
"""

import xxhash

from baton.errors import CorruptKVError
from baton.kv.spec import SealedKV, WireKV


def sealed(kv: WireKV) -> SealedKV:
    """A contiguous wire buffer with its checksum."""
    return SealedKV(kv, xxhash.xxh3_64_intdigest(kv.data))


class RunningChecksum:
    """The checksum of a wire buffer that is read part by part, in wire order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, part: WireKV) -> None:
        """The next bytes, contiguous."""
        self._hash.update(part.data)

    @property
    def value(self) -> int:
        """XXH3-64 of all parts so far."""
        return self._hash.intdigest()

    def compare(self, kv: SealedKV) -> None:
        """Raises `CorruptKVError` where what was read is not what was sealed."""
        if self.value != kv.checksum:
            raise CorruptKVError(
                f"KV checksum is {self.value:#018x}, sealed as {kv.checksum:#018x}"
            )
