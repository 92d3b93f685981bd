import os
import subprocess
import sys

import pytest

import pyruntime
from pyruntime import errors
from pyruntime._ext import _native


def test_every_status_maps_to_a_typed_error():
    classes = {type(errors.from_status(status, "text")) for status in range(-15, 0)}
    assert len(classes) == 15
    assert all(issubclass(cls, errors.Error) for cls in classes)
    assert isinstance(errors.from_status(-1, ""), ValueError)
    assert isinstance(errors.from_status(-99, ""), errors.InternalError)
    assert str(errors.from_status(-4, "no file 'a'")) == "no file 'a'"


def test_abi_versions_agree():
    assert _native.abi_version() == _native.ABI_VERSION


@pytest.mark.parametrize("size", [0, -1, 1025])
def test_thread_pool_refuses_sizes_out_of_range(size):
    before = _native.threads_size()
    with pytest.raises(errors.InvalidArgumentError, match=r"1\.\.1024"):
        pyruntime.set_num_threads(size)
    assert _native.threads_size() == before


def test_thread_pool_size_comes_from_the_environment():
    code = "from pyruntime._ext import _native; print(_native.threads_size())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYRUNTIME_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "3"
