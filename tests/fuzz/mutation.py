"""Files that are almost right: bytes changed, values of JSON replaced, headers and pickles changed inside."""

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

SPLICES = [
    *(b"\0", b"\xff\xfe", b"{", b"}", b'"', b"\\", b"\n", b",", b"\xed\xa0\x80", b"NaN", b"-Infinity", b"1e400"),
    *(b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b'"\\ud800"', b"null", b"true", b"-1", b"0", b"\0" * 5000),
]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**6, 10**30, -(10**9), 0.5, -0.5, 1e308, 1e-308),
    *(float("inf"), float("nan"), "", "x", "x" * 10_000, "\ud800", "../../etc/passwd", "/dev/zero", "0", "{{", "\n"),
    *([], {}, [1], [[]], {"a": 1}, [None] * 1000, [0] * 50, {"type": "Sequence"}, "bfloat16", "F8_E4M3", "ByteLevel"),
]


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, spliced, repeated or rearranged in one to three places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randint(0, len(data))
        end = min(len(data), start + rng.choice((1, 2, 8, 64, 4096)))
        kind = rng.randrange(7)
        if kind == 0:
            del data[start:]
        elif kind == 1 and data:
            data[start - 1] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[start:end] = rng.choice(SPLICES)
        elif kind == 3:
            data[start:start] = data[start:end]
        elif kind == 4:
            del data[start:end]
        elif kind == 5:
            data[start:end] = rng.randbytes(end - start)
        else:
            data[start:start] = rng.choice(SPLICES)
    return bytes(data)


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    """One to three of its values or keys replaced, removed or moved; sometimes its bytes changed."""
    if rng.random() < 0.25:
        return mutated_bytes(content, rng)
    root = [json.loads(content)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1:
            other, its = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[its]))
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "weight", str(key) + "x", str(key)[:-1], "\ud800"))] = holder.pop(key)
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] = rng.choice((-1, 1, 2, -2, 0.5, 10, 1000, 2**40)) * holder[key] + rng.choice((0, 1, -1))
        elif kind == 4 and isinstance(holder[key], list) and holder[key]:
            holder[key] = rng.choice((holder[key][:-1], holder[key] * 2, holder[key][::-1]))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(root[0]).encode()


def _places(holder: Any) -> Any:
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        yield holder, key
        if isinstance(holder[key], list | dict):
            yield from _places(holder[key])


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    """The header changed inside, with a length that is right again, or any bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(content, rng)
    length = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + content[8:]
    header = mutated_json(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def mutated_zip(content: bytes, rng: random.Random) -> bytes:
    """A member of torch's archive changed, with a checksum that is right again, or any bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickle = next(name for name in members if name.endswith("data.pkl"))
    name = pickle if rng.random() < 0.7 else rng.choice(list(members))
    members[name] = mutated_bytes(members[name], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return out.getvalue()


def mutate(name: str, content: bytes, rng: random.Random) -> bytes:
    """By the kind of file that has this name."""
    by_suffix: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "json": mutated_json,
        "safetensors": mutated_safetensors,
        "pt": mutated_zip,
    }
    return by_suffix.get(name.rpartition(".")[2], mutated_bytes)(content, rng)
