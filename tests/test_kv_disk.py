"""Blocks in a file: beside a model, with damage and faults, and with killed writers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime import errors
from pyruntime.kv import DiskTier, SwapEngine, export_keys
from pyruntime.kv.disk import CORRUPT, HIT, MISS
from pyruntime.kv.swap import runs_of

ITEM = 600
PAGE = 4096
FAIL_IO, FAIL_SPACE, FAIL_STOP, FAIL_READ = range(4)


def key_of(i):
    return np.frombuffer(random.Random(i).randbytes(32), np.uint8)


def keys_of(numbers):
    return np.array([key_of(i) for i in numbers], np.uint8).reshape(-1, 32)


def item_of(i, size=ITEM):
    return np.frombuffer(random.Random(-1 - i).randbytes(size), np.uint8)


def items_of(numbers, size=ITEM):
    return np.array([item_of(i, size) for i in numbers], np.uint8).reshape(-1, size)


def file_bytes(slots, size=ITEM):
    return PAGE * (1 + -(-slots * 64 // PAGE) + slots * -(-size // PAGE))


def opened(path, slots=12, fingerprint=b"model"):
    return DiskTier(
        path, item_bytes=ITEM, capacity_bytes=file_bytes(slots), fingerprint=fingerprint
    )


def there(disk, numbers):
    """Return which numbers are there; their content must be right, and all else zero."""
    numbers = list(numbers)
    found, data = disk.get(keys_of(numbers))
    for i, state, item in zip(numbers, found, data, strict=True):
        np.testing.assert_array_equal(item, item_of(i) if state == HIT else 0)
    return {i for i, state in zip(numbers, found, strict=True) if state == HIT}


class Model:
    """What a tier of `capacity` items is to hold; the last is the most recent."""

    def __init__(self, capacity):
        self.capacity, self.items = capacity, OrderedDict()

    def use(self, numbers):
        for i in reversed(numbers):
            if i in self.items:
                self.items.move_to_end(i)

    def put(self, numbers):
        numbers = numbers[: self.capacity]
        new = len(set(numbers) - set(self.items))
        self.items.update(dict.fromkeys(numbers))
        self.use(numbers)
        while len(self.items) > self.capacity:
            self.items.popitem(last=False)
        return new

    def match(self, numbers):
        n = next((n for n, i in enumerate(numbers) if i not in self.items), len(numbers))
        self.use(numbers[:n])
        return n


NUMBERS = st.lists(st.integers(0, 19), max_size=14)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["put", "get", "match", "reopen"]), NUMBERS)))
def test_does_what_a_model_does(tmp_path_factory, program):
    path = tmp_path_factory.mktemp("disk") / "kv"
    disk = opened(path)
    model = Model(disk.stats()["capacity"])
    for action, numbers in program:
        if action == "put":
            assert disk.put(keys_of(numbers), items_of(numbers)) == model.put(numbers)
        elif action == "get":
            assert there(disk, numbers) == set(numbers) & set(model.items)
            model.use(numbers)
        elif action == "match":
            assert disk.match(keys_of(numbers)) == model.match(numbers)
        else:
            disk.close()
            disk = opened(path)
            assert there(disk, range(20)) == set(model.items)
            model.use(range(20))
        disk.verify()
        assert disk.stats()["items"] == len(model.items)
    disk.close()


def test_keys_of_tokens_and_arrays_of_any_type(tmp_path):
    tokens = np.arange(64, dtype=np.int32)
    blocks = np.random.default_rng(0).standard_normal((4, 2, 75)).astype(np.float32)
    keys = export_keys(b"secret", b"a", tokens)
    with opened(tmp_path / "kv") as disk:
        assert disk.put(keys, blocks) == 4
        assert disk.put(keys[2:], blocks[2:]) == 0
        longer = export_keys(b"secret", b"a", np.append(tokens, tokens))
        assert disk.match(longer) == 4
        assert disk.match(export_keys(b"secret", b"b", tokens)) == 0
        assert disk.match(export_keys(b"other", b"a", tokens)) == 0
        out = np.full((4, 150), 7, np.float32)
        found, same = disk.get(longer[2:6], out)
        assert same is out and found.tolist() == [HIT, HIT, MISS, MISS]
        np.testing.assert_array_equal(out[:2], blocks[2:].reshape(2, 150))
        assert not out[2:].any()
        stats = disk.stats()
        assert (stats["hits"], stats["misses"], stats["stored"]) == (2, 2, 4)
        assert stats["bytes_read"] == 2 * ITEM and stats["bytes_written"] == 4 * ITEM
        assert stats["file_bytes"] == os.path.getsize(tmp_path / "kv")
        assert "kv" in repr(disk)


def test_what_is_refused(tmp_path):
    path = tmp_path / "kv"
    disk = opened(path)
    with pytest.raises(errors.StateError, match="in use"):
        opened(path)
    keys, items = keys_of([1, 2]), items_of([1, 2])
    for bad in (keys[:, :31], keys.astype(np.int8), keys[0]):
        with pytest.raises(errors.InvalidArgumentError, match="keys"):
            disk.match(bad)
    with pytest.raises(errors.InvalidArgumentError, match="data"):
        disk.put(keys, items[:1])
    with pytest.raises(errors.InvalidArgumentError, match="data"):
        disk.put(keys, np.asfortranarray(items))
    with pytest.raises(errors.InvalidArgumentError, match="out"):
        disk.get(keys, items[:1])
    with pytest.raises(errors.InvalidArgumentError, match="writable"):
        disk.get(keys[:1], item_of(1))
    disk.close()
    disk.close()
    with pytest.raises(errors.ClosedError):
        disk.stats()
    with pytest.raises(errors.InvalidArgumentError, match="blocks of 'model'"):
        opened(path, fingerprint=b"other")
    with pytest.raises(errors.InvalidArgumentError, match="slots"):
        opened(path, slots=13)
    with pytest.raises(errors.InvalidArgumentError, match="two items"):
        DiskTier(path, item_bytes=ITEM, capacity_bytes=100)
    with pytest.raises(errors.InvalidArgumentError, match="item_bytes"):
        DiskTier(path, item_bytes=-1, capacity_bytes=100)
    with pytest.raises(errors.NotFoundError):
        opened(tmp_path / "none" / "kv")
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    with pytest.raises(errors.VersionError, match="version 9"):
        opened(path)
    path.write_bytes(b"text" * 5000)
    with pytest.raises(errors.CorruptDataError, match="begin"):
        opened(path)


def test_flipped_bytes_and_truncation_never_give_wrong_data(tmp_path):
    path = tmp_path / "kv"
    with opened(path) as disk:
        disk.put(keys_of(range(11)), items_of(range(11)))
    whole = path.read_bytes()
    rng = random.Random(3)
    dropped = 0
    places = [*range(0, 1080, 41), *rng.sample(range(PAGE, PAGE + 12 * 64), 80)]
    places += [2 * PAGE + PAGE * slot + rng.randrange(ITEM) for slot in range(12) for _ in range(6)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            disk = opened(path)
        except (errors.CorruptDataError, errors.VersionError):
            assert place < 1080
            continue
        with disk:
            assert len(there(disk, range(12))) >= 10
            dropped += disk.stats()["corrupt"]
            disk.verify()
            disk.put(keys_of(range(11)), items_of(range(11)))
            assert len(there(disk, range(12))) == 11
    assert dropped >= 60
    for size in [*rng.sample(range(1080, len(whole)), 20), 1, 1079]:
        path.write_bytes(whole[:size])
        if size < 1080:
            with pytest.raises(errors.CorruptDataError):
                opened(path)
            continue
        with opened(path) as disk:
            there(disk, range(12))
            assert disk.stats()["corrupt"] == 0


def test_a_corrupt_item_is_dropped_once(tmp_path):
    path = tmp_path / "kv"
    with opened(path) as disk:
        disk.put(keys_of([1, 2]), items_of([1, 2]))
        at = path.read_bytes().find(item_of(2).tobytes())
        with open(path, "r+b") as file:
            file.seek(at + 100)
            file.write(b"damage")
        assert disk.get(keys_of([1, 2]))[0].tolist() == [HIT, CORRUPT]
        assert disk.get(keys_of([1, 2]))[0].tolist() == [HIT, MISS]
        assert disk.stats()["corrupt"] == 1
    with opened(path) as disk:
        assert there(disk, [1, 2]) == {1}


@pytest.mark.parametrize("fault", [FAIL_IO, FAIL_SPACE, FAIL_STOP])
def test_faults_and_crashes_at_every_write_and_sync(tmp_path, fault):
    expected = {FAIL_IO: errors.StorageError, FAIL_SPACE: errors.CapacityError}
    n, failed = 0, True
    while failed:
        n += 1
        path = tmp_path / f"kv{n}"
        disk = opened(path)
        disk.put(keys_of(range(11)), items_of(range(11)))
        disk._open.fail_io(n, fault)
        failed = False
        try:
            disk.put(keys_of([20, 21, 22]), items_of([20, 21, 22]))
        except expected.get(fault, errors.StorageError):
            failed = True
        disk.verify()
        now = there(disk, range(25))
        assert len(now) == 11  # what was not replaced is still there
        if fault == FAIL_STOP and failed:
            with pytest.raises(errors.StorageError):
                disk.put(keys_of([30]), items_of([30]))
        elif failed:
            disk._open.fail_io(0, fault)
            assert disk.put(keys_of([30]), items_of([30])) == 1
            now = there(disk, range(31))
        disk.close()
        with opened(path) as disk:
            found = there(disk, range(31))
            assert disk.stats()["corrupt"] == 0
            # Half a write of records: the new one and the one that it replaces, either may be lost.
            assert len(now ^ found) <= (2 if fault == FAIL_STOP and failed else 0)
    assert n > 12


def test_a_failed_read_is_an_error_and_drops_nothing(tmp_path):
    with opened(tmp_path / "kv") as disk:
        disk.put(keys_of([1, 2, 3]), items_of([1, 2, 3]))
        disk._open.fail_io(2, FAIL_READ)
        with pytest.raises(errors.StorageError):
            disk.get(keys_of([1, 2, 3]))
        assert there(disk, [1, 2, 3]) == {1, 2, 3}


def put_for_ever(path, report):
    disk = opened(path, slots=24)
    rng = random.Random(os.getpid())
    while True:
        first = rng.randrange(60)
        numbers = list(range(first, first + rng.randrange(1, 6)))
        disk.put(keys_of(numbers), items_of(numbers))
        report(numbers)


def swap_out_and_put_for_ever(path, report):
    disk = opened(path, slots=24)
    rng = random.Random(os.getpid())
    engine = SwapEngine()
    device = [np.zeros((8, ITEM // 8), np.float32) for _ in range(2)]
    host = np.zeros((8, 2, ITEM // 8), np.float32)
    near, far = engine.add_space(device), engine.add_space([host[:, 0], host[:, 1]])
    while True:
        first = rng.randrange(60)
        numbers = list(range(first, first + rng.randrange(1, 6)))
        blocks = rng.sample(range(8), len(numbers))
        for i, block in zip(numbers, blocks, strict=True):
            device[0][block], device[1][block] = item_of(i).view(np.float32).reshape(2, -1)
        engine.copy(near, far, runs_of(blocks, range(len(numbers))))
        engine.wait()
        assert set(engine.collect().values()) == {0}
        disk.put(keys_of(numbers), host[: len(numbers)])
        report(numbers)


def kill_writers(path, work, rounds):
    """Kill a writer at some moment, look at what it left, and begin again with that."""
    rng = random.Random(rounds)
    written = 0
    for _ in range(rounds):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                work(path, lambda numbers, to=writing: os.write(to, f"{numbers}\n".encode()))
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading) as reports:
            first = reports.readline()
            assert first.endswith("\n"), "the writer failed"
            time.sleep(rng.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            lines = [line for line in (first, *reports) if line.endswith("\n")]
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        written += len(lines)
        with opened(path, slots=24) as disk:
            found = there(disk, range(70))
            assert found.issuperset(json.loads(lines[-1]))
            assert disk.stats()["corrupt"] == 0
            disk.verify()
    print(written)


@pytest.mark.parametrize(
    ("work", "rounds"), [("put_for_ever", 32), ("swap_out_and_put_for_ever", 16)]
)
def test_killed_writers_leave_only_whole_items(tmp_path, work, rounds):
    """In a process of its own, which has no threads and may fork."""
    program = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_kv_disk as t; "
        f"t.kill_writers({str(tmp_path / 'kv')!r}, t.{work}, {rounds})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > rounds
