"""The noise that sampling draws: a counter-based generator, so that a draw depends on its key and on nothing drawn before.

Torch-free, so that every engine draws the same numbers. Pure; called from the engine thread.
"""

import hashlib
import struct

_PERSON = b"baton.sampling"
"""Separates these draws from any other use of the hash; changing it changes every sampled token."""


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1), one of 2**53 evenly spaced ones, for output position `position` of completion `choice`.

    `seed` and `position` are unsigned 64-bit numbers, `choice` is an unsigned 32-bit one.
    """
    key = struct.pack("<QIQ", seed, choice, position)
    digest = hashlib.blake2b(key, digest_size=8, person=_PERSON).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
