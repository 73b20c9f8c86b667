"""The compressors' figures are those of the commands gzip -9 and xz -9."""

import random
import shutil
import subprocess

import pytest

from fathom.eval.compression import compressed_bits_per_byte


def words(count: int) -> bytes:
    chosen = random.Random(0).choices(["fathom", "the", "deep", "latent", "expert", "of", "a", "token"], k=count)
    return " ".join(chosen).encode()


def test_noise_does_not_compress_and_repetition_does() -> None:
    noise = random.Random(0).randbytes(20_000)
    assert compressed_bits_per_byte(noise).gzip == pytest.approx(8, abs=0.05)
    assert compressed_bits_per_byte(noise).xz == pytest.approx(8, abs=0.05)
    # The same noise again, farther back than gzip looks but not farther than xz does.
    twice = compressed_bits_per_byte(noise + bytes(40_000) + noise)
    assert twice.xz < 2.2 < 4 < twice.gzip * 1.01
    # Eight equally likely words of 4.4 letters and a blank on average: 3 bits each and not less.
    text = compressed_bits_per_byte(words(20_000))
    assert 3 / 5.4 < text.xz < text.gzip < 1.5


@pytest.mark.parametrize("command", ["gzip", "xz"])
def test_sizes_are_the_commands_own(command: str) -> None:
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    data = words(5_000)
    size = len(subprocess.run([command, "-9", "-c"], input=data, capture_output=True, check=True).stdout)
    # Headers may differ by a few bytes: time stamp, check sum.
    found = getattr(compressed_bits_per_byte(data), command)
    assert found == pytest.approx(8 * size / len(data), abs=8 * 16 / len(data))


def test_empty_data_is_refused() -> None:
    with pytest.raises(ValueError, match="data is empty"):
        compressed_bits_per_byte(b"")
