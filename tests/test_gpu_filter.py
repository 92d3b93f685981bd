"""The cuckoo filter on a GPU, with cupy arrays; skipped where there is none."""

import numpy as np
import pytest

from pyruntime import errors, gpu
from pyruntime.filter import OK, CuckooFilter, DeviceFilter


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.skipif(not gpu.available(), reason="no CUDA device, or built without CUDA")
@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("bits", [8, 16])
def test_device_and_host_agree(cp, bits, slots):
    n = 500_000
    keys = np.random.default_rng(1).integers(0, 2**63, 2 * n, dtype=np.uint64)
    host = CuckooFilter(n, bits=bits, slots=slots, seed=2)
    host.insert(keys[: n // 2])
    device = DeviceFilter(host)
    status = device.insert(cp.asarray(keys[n // 2 : n]))
    assert int((status == OK).sum()) == n - n // 2
    answers = cp.asnumpy(device.contains(cp.asarray(keys)))
    assert answers[:n].all()
    back = device.to_host()
    np.testing.assert_array_equal(back.contains(keys), answers)
    assert len(back) == n
    back.verify()
    assert not cp.asnumpy(device.delete(cp.asarray(keys[:n]))).any()
    assert len(device.to_host()) == 0


def test_without_a_device_it_says_so():
    if gpu.available():
        pytest.skip("there is one")
    with pytest.raises(errors.DeviceUnavailableError):
        DeviceFilter(CuckooFilter(100))


def test_strings_stay_on_the_cpu():
    filter = CuckooFilter(100)
    filter.insert(["a"])
    with pytest.raises(errors.InvalidArgumentError, match="strings"):
        DeviceFilter(filter)


def test_grown_filters_stay_on_the_cpu():
    filter = CuckooFilter(100)
    filter.grow()
    with pytest.raises(errors.UnsupportedError, match="2 generations"):
        DeviceFilter(filter)


def test_words_go_out_and_in():
    filter = CuckooFilter(1000, seed=3)
    filter.insert(np.arange(900))
    words = np.empty(filter.core.device().sizes()[0], np.uint8)
    filter.core.read_words(words)
    assert words.tobytes() == filter.to_bytes()[128:]
    other = CuckooFilter(1000, seed=3)
    other.core.write_words(words)
    assert len(other) == 900 and other.contains(np.arange(900)).all()
    with pytest.raises(errors.InvalidArgumentError):
        other.core.write_words(words[:8])
