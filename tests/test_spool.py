"""The spool: what was appended comes out again, in order, whatever happened in between."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from router_ml import spool as spool_module
from router_ml.errors import InputError
from router_ml.spool import Reader, Spool, abandoned, segments
from tests.live_service import wait_for


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 1000)


def records(count: int, start: int = 0) -> list[bytes]:
    return [f"record {i} ".encode() * (1 + i % 7) for i in range(start, start + count)]


def drained(reader: Reader, *, final: bool = False, limit: int = 7) -> list[bytes]:
    found: list[bytes] = []
    while taken := reader.take(limit, final=final):
        assert reader.take(limit, final=final) == taken  # until it is done with them, they come again
        reader.done()
        found += taken
    return found


def test_records_come_out_in_order_and_full_segments_go(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    reader = Reader(spool.folder)
    assert drained(reader) == []
    for part in range(5):
        for record in records(40, part * 40):
            assert spool.append(record) is not None
        assert drained(reader) == records(40, part * 40)
        assert len(segments(spool.folder)) == 1  # the one that is being written
    assert reader.position == spool.counters.appended == 200
    spool.close()
    assert spool.append(b"too late") is None and spool.counters.dropped == 1
    assert drained(reader, final=True) == [] and segments(spool.folder) == []
    spool.release()
    assert list((tmp_path / "spool").iterdir()) == []


def test_what_a_dead_process_left_is_found_once_its_lock_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from router_ml.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1])); [spool.append(b'left %d' % i) for i in range(100)]\n"
        "print(spool.folder, flush=True); sys.stdin.read(); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        folder = Path(process.stdout.readline().strip())
        own = Spool(tmp_path)
        own.append(b"mine")
        assert list(abandoned(tmp_path)) == []  # both owners are alive
        process.stdin.close()
    assert process.returncode == -9
    for found in abandoned(tmp_path):
        assert found == folder
        assert drained(Reader(found), final=True) == [b"left %d" % i for i in range(100)]
    assert not folder.exists() and own.folder.exists()


@pytest.mark.parametrize("damage", ["cut", "zeros", "flipped"])
def test_a_torn_record_costs_the_rest_of_its_segment_alone(tmp_path: Path, damage: str) -> None:
    spool = Spool(tmp_path)
    for record in records(100):
        spool.append(record)
    spool.close()
    (first, path, size), *rest = segments(spool.folder)
    data = bytearray(path.read_bytes())
    at = size // 2
    if damage == "cut":
        del data[at:]
    elif damage == "zeros":
        data[at:] = bytes(size - at)
    else:
        data[at] ^= 1
    path.write_bytes(data)
    reader = Reader(spool.folder)
    found = drained(reader, final=True)
    whole = records(100)
    before = [r for r in found if r in whole[: rest[0][0]]]
    assert first == 0 and 0 < len(before) < rest[0][0] and before == whole[: len(before)]
    assert found[len(before) :] == whole[rest[0][0] :] and reader.torn == 1


def test_half_a_record_is_waited_for_while_its_owner_lives(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(b"whole")
    ((_, path, size),) = segments(spool.folder)
    whole = path.read_bytes()
    reader = Reader(spool.folder)
    path.write_bytes(whole + whole[: size // 2])
    assert drained(reader) == [b"whole"] and reader.take(10) == []
    path.write_bytes(whole * 2)
    assert drained(reader) == [b"whole"] and reader.torn == 0


def test_a_full_spool_drops_and_counts_until_there_is_room(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=3000, interval=0.01)
    taken = [spool.append(b"x" * 100) is not None for _ in range(40)]
    kept = sum(taken)
    assert taken == [True] * kept + [False] * (40 - kept) and kept == 3000 // 108
    assert spool.counters.dropped == 40 - kept
    assert len(drained(Reader(spool.folder))) == kept
    for _ in range(300):
        if spool.append(b"y" * 100) is not None:
            break
        spool_module.time.sleep(0.02)
    else:
        raise AssertionError("there was room, and it was not seen")


REFUSED = """
import resource, sys, time
from pathlib import Path
from router_ml import spool as module
from router_ml.spool import Reader, Spool
module.HELD_BYTES, module.RETRY_SECONDS = 20_000, 0.05
spool = Spool(Path(sys.argv[1]), interval=0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_050, resource.RLIM_INFINITY))
taken = [spool.append(b"%04d" % i + b"z" * 496) is not None for i in range(100)]
kept = sum(taken)
assert taken == [True] * kept + [False] * (100 - kept) and 45 < kept < 55, kept
assert spool.failing and spool.full and spool.held == kept - spool.counters.appended, spool.counters
assert spool.counters.failures and spool.counters.dropped == 100 - kept
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
deadline = time.monotonic() + 10
while spool.failing:
    assert time.monotonic() < deadline
    time.sleep(0.01)
reader, found = Reader(spool.folder), []
while records := reader.take(500):
    reader.done()
    found += records
assert [int(r[:4]) for r in found] == list(range(kept)) and not spool.full and not reader.torn
"""


def test_what_the_disk_refuses_waits_in_memory_and_is_tried_again(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ran = subprocess.run([sys.executable, "-c", REFUSED, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("refuses a record: File too large") < 20  # it is not told for every record


def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--spool"):
        Spool(tmp_path / "file" / "spool")


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(b"a prompt")
    for _, path, _ in segments(spool.folder):
        assert path.stat().st_mode & 0o077 == 0


def test_no_lack_of_descriptors_ends_what_makes_it_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, interval=0.01)

    def none_left(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as lacking:
        lacking.setattr(spool_module.os, "dup", none_left)
        lacking.setattr(spool_module.os, "scandir", none_left)
        assert spool.append(b"one") == 0
        wait_for(lambda: spool.failing)
    assert spool.append(b"two") == 1
    wait_for(lambda: not spool.failing)
    assert drained(Reader(spool.folder)) == [b"one", b"two"]
    spool.close()
