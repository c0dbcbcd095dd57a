"""The bytes of single tokens, also of those that are no whole character. Pure."""

import re
from functools import cache

import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How a vocabulary with byte fallback writes a byte."""


@cache
def byte_symbols() -> dict[str, int]:
    """The byte-level alphabet: printable bytes are written as themselves, the others as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    symbols = {chr(byte): byte for byte in printable}
    symbols.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return symbols


def bytes_of(backend: tokenizers.Tokenizer, token_id: int) -> bytes:
    """What a token stands for in a text; of a special one, how it is written; nothing for one that is not in the vocabulary."""
    symbol = backend.id_to_token(token_id)
    if symbol is None:
        return b""
    text: str = backend.decode([token_id], skip_special_tokens=False)
    if _REPLACEMENT not in text:
        return text.encode()
    if (byte := _BYTE_TOKEN.fullmatch(symbol)) is not None:
        return bytes.fromhex(byte[1])
    symbols = byte_symbols()
    if all(character in symbols for character in symbol):
        return bytes(symbols[character] for character in symbol)
    return text.encode()
