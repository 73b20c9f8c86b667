"""The characters with which byte-level vocabularies spell bytes: printable ones as they are, others from U+0100."""


def _alphabet() -> dict[str, int]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _alphabet()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


def spell_bytes(token: bytes) -> str:
    """The bytes as a vocabulary spells them."""
    return "".join(map(_CHARACTERS.__getitem__, token))


def bytes_of(spelled: str) -> bytes:
    """The bytes that a vocabulary spells so; of a text that is not so spelled, its UTF-8."""
    if all(character in _BYTES for character in spelled):
        return bytes(_BYTES[character] for character in spelled)
    return spelled.encode()
