"""Nested matrices and stores through Python, against a float64 reading of the format."""

import os

import numpy as np
import pytest

from pyruntime import errors
from pyruntime.moe import ExpertStore, NestedMatrix, StoreExperts, StoreWriter

LAYOUTS = [[2, 4, 6, 8], [4, 6, 8], [4, 8], [8], [2], [2, 4, 8], [4, 4, 6, 8]]
SHAPES = [(1, 1), (5, 31), (16, 32), (17, 33), (33, 257), (40, 512), (48, 300)]


def weights(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)


def reference(m, level):
    """The weights at a level in float64, decoded from docs/mxs.md alone."""
    rows, columns, bits = m.rows, m.columns, m.bits
    added = [b - (bits[i - 1] if i else 0) for i, b in enumerate(bits)]
    last = max(i for i in range(level + 1) if added[i])
    tiles, supers = -(-rows // 16), -(-columns // 256)
    out = np.zeros((tiles * 16, supers * 256))
    at = [0] * len(bits)
    for tile in range(tiles):
        for sup in range(supers):
            groups = -(-min(256, columns - sup * 256) // 32)
            codes = np.zeros((16, groups * 32), np.int64)
            for i in range(level + 1):
                if not added[i]:
                    continue
                plane = m.planes[i]
                if i == 0:
                    meta = plane[at[0] : at[0] + 256].reshape(8, 2, 16).astype(float)
                    at[0] += 256
                pair = plane[at[i] : at[i] + 64].copy().view("<f2").reshape(2, 16).astype(float)
                at[i] += 64
                if i == last:
                    d, lower = pair
                b = added[i]
                size = groups * 64 * b
                raw = plane[at[i] : at[i] + size].reshape(groups, b, 16, 4)
                at[i] += size
                for f in range(8 // b):
                    field = (raw >> (f * b)) & ((1 << b) - 1)
                    for v in range(b):
                        first = (v * (8 // b) + f) * 4
                        for g in range(groups):
                            column = g * 32 + first
                            part = codes[:, column : column + 4]
                            part[...] = part << b | field[g, v]
            for g in range(groups):
                w = d[:, None] * meta[g, 0][:, None] * (codes[:, g * 32 : g * 32 + 32] + 0.5)
                column = sup * 256 + g * 32
                out[tile * 16 : tile * 16 + 16, column : column + 32] = (
                    w - (lower * meta[g, 1])[:, None]
                )
    return out[:rows, :columns] * m.unit


@pytest.mark.parametrize("bits", LAYOUTS, ids=str)
def test_every_width_is_the_reference_and_close_to_the_weights(bits):
    for rows, columns in SHAPES:
        w = weights(rows, columns)
        m = NestedMatrix.quantize(w, bits)
        for level, width in enumerate(bits):
            expected = reference(m, level)
            got = m.dequantize(level)
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)
            # A cell of a group's range, doubled for the rounding of the metadata.
            assert np.abs(expected - w).max() <= 2 * 0.5 / 2**width + 1e-3
            if rows * columns > 500:
                error = ((expected - w) ** 2).sum() / (w**2).sum()
                assert error < {2: 0.16, 4: 1.2e-2, 6: 8e-4, 8: 6e-5}[width]
                assert error == pytest.approx(m.error[level] / m.energy, rel=1e-2)


@pytest.mark.parametrize("bits", LAYOUTS, ids=str)
def test_linear_is_the_reference_times_quantized_activations(bits):
    rng = np.random.default_rng(1)
    for rows, columns in SHAPES:
        m = NestedMatrix.quantize(weights(rows, columns), bits)
        x = rng.standard_normal((9, columns)).astype(np.float32)
        groups = -(-columns // 32)
        padded = np.zeros((9, groups * 32), np.float32)
        padded[:, :columns] = x
        split = padded.reshape(9, groups, 32)
        largest = np.abs(split).max(axis=2, keepdims=True)
        inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
        coded = np.rint(split * inverse).astype(np.float64) * (largest / np.float32(127))
        coded = coded.reshape(9, -1)[:, :columns]
        for level in range(len(bits)):
            y = m.linear(x, level)
            w = reference(m, level)
            scale = np.abs(coded) @ np.abs(w).T
            assert np.all(np.abs(y - coded @ w.T) <= 2e-5 * scale + 1e-12)
            one_by_one = np.concatenate([m.linear(x[i : i + 1], level) for i in range(9)])
            np.testing.assert_array_equal(y, one_by_one)


@pytest.mark.parametrize(("shape", "bits"), [((33, 512), [2, 4, 6, 8]), ((5, 40), [4, 8])])
def test_a_search_finds_better_ranges(shape, bits):
    w = weights(*shape)
    found = [NestedMatrix.quantize(w, bits, search=n) for n in (1, 4, 8, 16)]
    error = np.array(
        [[((m.dequantize(level) - w) ** 2).sum() for level in range(len(bits))] for m in found]
    )
    assert np.all(
        error[1:, bits.index(4)] < (0.92 if shape[0] > 9 else 1) * error[0, bits.index(4)]
    )
    assert np.all(error[1:] < 1.1 * error[0])
    flat = NestedMatrix.quantize(np.full(shape, 0.25, np.float32), bits, search=8)
    assert np.abs(flat.dequantize() - 0.25).max() < 1e-3
    unseen = NestedMatrix.quantize(w, bits, search=8, importance=np.zeros(shape[1], np.float32))
    assert np.isfinite(unseen.dequantize()).all()


def test_weights_that_cannot_be_quantized():
    w = weights(4, 40)
    w[2, 33] = np.inf
    with pytest.raises(errors.InvalidArgumentError, match=r"\[2, 33\]"):
        NestedMatrix.quantize(w, [8])
    with pytest.raises(errors.InvalidArgumentError, match="widths"):
        NestedMatrix.quantize(weights(4, 40), [3])
    with pytest.raises(errors.InvalidArgumentError, match="search"):
        NestedMatrix.quantize(weights(4, 40), [8], search=0)
    with pytest.raises(errors.InvalidArgumentError, match="importance"):
        NestedMatrix.quantize(weights(4, 40), [8], importance=np.full(40, -1, np.float32))


D, F, EXPERTS = 70, 50, 4
BITS = [[2, 4, 6, 8], [2, 4, 6, 8], [4, 4, 6, 8]]


def make_store(path, layers=(0, 2), model_hash=bytes(32)):
    parts = {}
    with StoreWriter(
        path, num_layers=3, num_experts=EXPERTS, hidden=D, ffn=F, bits=BITS, model_hash=model_hash
    ) as writer:
        for layer in layers:
            shapes = ((F, D), (F, D), (D, F))
            parts[layer] = [
                [
                    NestedMatrix.quantize(weights(*shape, seed=layer * 100 + e * 3 + i), BITS[i])
                    for i, shape in enumerate(shapes)
                ]
                for e in range(EXPERTS)
            ]
            writer.add_layer(layer, parts[layer])
        writer.add_dense(1, 3, NestedMatrix.quantize(weights(9, 77, seed=5), [4, 8]))
        writer.commit()
    return parts


def test_a_store_comes_back_and_its_experts_are_the_references(tmp_path):
    parts = make_store(tmp_path / "a.mxs", model_hash=bytes(range(32)))
    store = ExpertStore(tmp_path / "a.mxs")
    assert store.model_hash == bytes(range(32))
    assert (store.layers, store.bits, store.num_experts) == ([0, 2], BITS, EXPERTS)
    assert os.listdir(tmp_path) == ["a.mxs"]
    store.verify()
    dense = store.read_dense(1, 3)
    np.testing.assert_array_equal(
        dense.dequantize(), NestedMatrix.quantize(weights(9, 77, seed=5), [4, 8]).dequantize()
    )
    assert store.read_dense(1, 4) is None
    with pytest.raises(errors.NotFoundError):
        store.extent(1, 0, 0)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((7, D)).astype(np.float32)
    ids = rng.integers(-1, EXPERTS, (7, 2)).astype(np.int32)
    shares = rng.random((7, 2)).astype(np.float32)
    before = 0
    for bits in (2, 4, 6, 8):
        experts = StoreExperts(store, bits)
        assert experts.stats()["bytes_read"] > before  # planes past the width are not read
        before = experts.stats()["bytes_read"]
        assert experts.expert_bytes(0) * EXPERTS * 2 == before
        for layer in (0, 2):
            out = np.empty_like(x)
            assert not experts.ffn(layer, x, ids, shares, out).any()
            expected = np.zeros((7, D))
            for token in range(7):
                for slot in range(2):
                    if ids[token, slot] < 0:
                        continue
                    gate, up, down = (
                        reference(part, store.level_of(bits))
                        for part in parts[layer][ids[token, slot]]
                    )
                    g = gate @ x[token]
                    hidden = g / (1 + np.exp(-g)) * (up @ x[token])
                    expected[token] += shares[token, slot] * (down @ hidden)
            assert np.abs(out - expected).max() < 0.03 * np.abs(expected).max()
    with pytest.raises(errors.InvalidArgumentError, match="5 bits"):
        StoreExperts(store, 5)


def test_slots_at_their_own_levels_are_the_fixed_widths(tmp_path):
    make_store(tmp_path / "a.mxs")
    store = ExpertStore(tmp_path / "a.mxs")
    experts = StoreExperts(store)
    x = np.random.default_rng(3).standard_normal((6, D)).astype(np.float32)
    ids = np.full((6, 1), 2, np.int32)
    shares = np.ones((6, 1), np.float32)
    mixed, fixed = np.empty_like(x), np.empty_like(x)
    levels = np.array([[0], [1], [2], [3], [255], [0]], np.uint8)
    experts.ffn(0, x, ids, shares, mixed, levels)
    for level, bits in enumerate((2, 4, 6, 8)):
        StoreExperts(store, bits).ffn(0, x, ids, shares, fixed)
        rows = np.flatnonzero(levels[:, 0] == level)
        np.testing.assert_array_equal(mixed[rows], fixed[rows])
    assert not mixed[4].any()


def test_damaged_stores_are_refused_with_a_reason(tmp_path):
    path = tmp_path / "a.mxs"
    make_store(path)
    whole = path.read_bytes()

    def opened(data):
        path.write_bytes(data)
        return ExpertStore(path)

    for size in (0, 100, 4096, len(whole) // 2, len(whole) - 1):
        with pytest.raises(errors.CorruptDataError, match=r"a\.mxs"):
            opened(whole[:size])
    with pytest.raises(errors.VersionError, match="version 9"):
        opened(whole[:8] + b"\x09" + whole[9:])
    with pytest.raises(errors.CorruptDataError, match="commit mark"):
        opened(whole[:-8] + bytes(8))
    store = opened(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(errors.CorruptDataError, match="layer 0, expert 0, level 0"):
        StoreExperts(store)
    with pytest.raises(errors.NotFoundError):
        ExpertStore(tmp_path / "b.mxs")


def test_an_unfinished_store_leaves_nothing(tmp_path):
    writer = StoreWriter(
        tmp_path / "a.mxs", num_layers=3, num_experts=EXPERTS, hidden=D, ffn=F, bits=BITS
    )
    with pytest.raises(errors.InvalidArgumentError):
        writer.add_plane(5, 0, 0, [NestedMatrix.quantize(weights(F, D), BITS[0])] * 3)
    writer.close()
    assert os.listdir(tmp_path) == []
