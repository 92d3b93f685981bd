"""Export keys from Python, against hashlib."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime import errors, kv


def oracle(secret, namespace, tokens, block_size):
    framed = [len(part).to_bytes(8, "little") + part for part in (secret, namespace)]
    names = hashlib.sha256(b"pyruntime-kv-1\0" + b"".join(framed)).digest()
    stream = hashlib.sha256(names + block_size.to_bytes(8, "little") + bytes(24))
    keys = []
    for begin in range(0, len(tokens) - block_size + 1, block_size):
        stream.update(np.asarray(tokens[begin : begin + block_size], "<i4").tobytes())
        keys.append(stream.digest())
    return keys


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    secret=st.binary(max_size=80),
    namespace=st.binary(max_size=80),
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=120),
    block_size=st.sampled_from([1, 5, 16, 17, 32]),
)
def test_are_those_of_hashlib(secret, namespace, tokens, block_size):
    found = kv.export_keys(secret, namespace, tokens, block_size=block_size)
    assert found.shape == (len(tokens) // block_size, 32)
    assert [key.tobytes() for key in found] == oracle(secret, namespace, tokens, block_size)


def test_same_without_sha_instructions():
    tokens = np.arange(512, dtype=np.int32) * 7
    program = (
        "import numpy as np; from pyruntime import kv;"
        "print(kv.export_keys(b's', b'n', np.arange(512, dtype=np.int32) * 7).tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYRUNTIME_SIMD": "scalar"},
    )
    assert done.stdout.strip() == kv.export_keys(b"s", b"n", tokens).tobytes().hex()


@pytest.mark.parametrize(
    "tokens", [[1.5] * 16, [[1, 2], [3, 4]], [2**31] * 16, ["a"] * 16, np.zeros((), np.int32)]
)
def test_refuses_what_are_no_tokens(tokens):
    with pytest.raises(errors.InvalidArgumentError, match="tokens"):
        kv.export_keys(b"", b"", tokens)


@pytest.mark.parametrize("size", [0, -1, 2**20 + 1])
def test_refuses_block_sizes(size):
    with pytest.raises(errors.InvalidArgumentError, match="block_size"):
        kv.export_keys(b"", b"", [1], block_size=size)
