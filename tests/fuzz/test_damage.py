"""Every file of a checkpoint cut, emptied, removed and flipped at many places: noticed, and the one before taken.

Whether training then ends with the same bits is tested in tests/train/test_damage.py.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.checkpoint.digests import DIGESTS, verify_digests
from fathom.checkpoint.hf.model import CheckpointError
from fathom.checkpoint.training_state import newest_whole_checkpoint
from fathom.cli import main
from fathom.distributed.ranks import Ranks
from fathom.train.pretrain import train
from fathom.train.run import Run
from tests.fuzz.campaign import draws

PLACES = 20
QUICK_SECONDS = 1.0


def damaged(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Ways in which a file is not what it was; None for a file that is gone."""
    yield "removed", None
    yield "emptied", b""
    yield "longer", content + rng.randbytes(1)
    for _ in range(PLACES):
        yield "cut", content[: rng.randrange(len(content))]
        place = rng.randrange(len(content))
        flipped = content[place] ^ (1 << rng.randrange(8))
        yield "flipped", content[:place] + bytes([flipped]) + content[place + 1 :]
        start = rng.randrange(len(content))
        block = content[start : start + 512]
        other = bytes(len(block)) if rng.random() < 0.5 else rng.randbytes(len(block))
        if other != block:
            yield "block lost", content[:start] + other + content[start + len(block) :]


@pytest.mark.slow
def test_every_file_of_a_checkpoint(
    tiny_run: Run, one_rank: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(
        tiny_run,
        train=replace(tiny_run.train, steps=2, save_every=1, final_eval_sequences=2),
        optimizer=replace(tiny_run.optimizer, ema_decay=0.9),
    )
    train(run, tmp_path, one_rank)
    before, newest = (tmp_path / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    files = [file for file in sorted(newest.rglob("*")) if file.is_file()]
    assert len(files) > 8
    seen: Counter[str] = Counter()
    for seed, rng in draws("damage", QUICK_SECONDS):
        for file in files:
            content = file.read_bytes()
            for kind, other in damaged(content, rng):
                if other is None and file == newest / DIGESTS:
                    continue  # as in a checkpoint of a version without digests
                file.unlink() if other is None else file.write_bytes(other)
                repeat = f"{seed}: {file.name} {kind}"
                # A digest that is damaged itself condemns the file that it is of.
                named = newest.name if file == newest / DIGESTS else str(file)
                with pytest.raises(CheckpointError, match=named):
                    verify_digests(newest)
                reports: list[str] = []
                assert newest_whole_checkpoint(tmp_path, reports.append) == before, repeat
                assert len(reports) == 1 and named in reports[0], repeat
                assert (tmp_path / "model").resolve() == before.resolve(), repeat
                newest.with_name(f"{newest.name}.damaged").rename(newest)
                if rng.random() < 0.01:
                    with pytest.raises(SystemExit):
                        main(["info", str(newest), "--verify"])
                    assert len(capsys.readouterr().err.splitlines()) == 1, repeat
                file.write_bytes(content)
                seen[kind] += 1
        assert newest_whole_checkpoint(tmp_path, pytest.fail) == newest
    with capsys.disabled():
        print(f"{len(files)} files: {dict(seen)}, all noticed")
    assert seen["cut"] >= PLACES * len(files) and seen["flipped"] >= PLACES * len(files)
