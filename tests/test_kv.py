"""The native block pool from Python: a plain model beside it, transactions, events, policies."""

import os
import pickle
import random

import numpy as np
import pytest

from pyruntime import errors
from pyruntime.kv import Admission, BlockPool, KvGroup, ServingPool, block_keys, export_keys
from tests.kv_model import Model

SCALE = float(os.environ.get("PYRUNTIME_TEST_SCALE", 1))


def prompt(*parts, size=4, cut=0):
    tokens = np.repeat(np.array(parts, np.int32), size)
    return tokens[: len(tokens) - cut]


def serve(pool, tokens, space=0):
    """Serve a prompt whole; return its handle and cached tokens."""
    outcome = pool.step(admissions=[Admission(tokens, space)])
    assert outcome.fitted
    [(seq, cached)] = outcome.admitted
    pool.commit(seq, len(tokens), ids=tokens)
    return seq, cached


def play(ops, seed, num_blocks, size, policy):
    """Play random operations on pool and model, which must agree after each."""
    rng = random.Random(seed)
    pool = BlockPool(
        num_blocks, block_size=size, run_blocks=1, max_seqs=32, policy=policy, seed=seed + 1
    )
    model = Model(num_blocks, size, policy)
    for op in range(ops):
        kind = rng.random()
        if kind < 0.35 and len(model.live) < 30:
            tokens = tuple(t for _ in range(rng.randint(1, 9)) for t in [rng.randint(0, 2)] * size)[
                : rng.randint(1, 9 * size)
            ]
            fits = model.need_to_admit(tokens) <= model.available()
            outcome = pool.step(admissions=[Admission(np.array(tokens, np.int32))])
            assert outcome.fitted == fits
            if fits:
                [(seq, cached)] = outcome.admitted
                assert cached == model.admit(seq, tokens)
                if rng.random() < 0.8:
                    pool.commit(seq, len(tokens), ids=np.array(tokens, np.int32))
                    model.commit(seq)
        elif kind < 0.7 and model.live:
            chosen = rng.sample(sorted(model.live), min(len(model.live), 3))
            grown = {
                seq: model.live[seq][0]
                + tuple(rng.randint(0, 1) for _ in range(rng.randint(1, size)))
                for seq in chosen
            }
            need = sum(
                model.blocks(len(tokens)) - len(model.live[seq][2]) for seq, tokens in grown.items()
            )
            outcome = pool.step(grows=[(seq, len(tokens)) for seq, tokens in grown.items()])
            assert outcome.fitted == (need <= model.available())
            grown = grown if outcome.fitted else {}
            for seq, tokens in grown.items():
                model.grow(seq, tokens)
            for seq, tokens in grown.items():
                if rng.random() < 0.9:
                    pool.commit(seq, len(tokens), ids=np.array(tokens, np.int32))
                    model.commit(seq)
        elif kind < 0.95 and model.live:
            seq = rng.choice(sorted(model.live))
            pool.free(seq)
            model.free(seq)
        elif kind < 0.955:
            pool.clear()
            model.clear()
        assert pool.available() == model.available(), op
        pool.check()
        if op % 16 == 0:
            for content in list(model.holders)[:5]:
                found = model.cached((*content, 0))
                tokens = np.array((*content, 0), np.int32)
                assert pool.match(tokens).tokens == len(found) * size
    pool.check()
    return pool.stats()


@pytest.mark.parametrize("policy", ["lru", "slru"])
@pytest.mark.parametrize(("num_blocks", "size"), [(12, 4), (40, 2), (90, 16)])
def test_a_plain_model_agrees(num_blocks, size, policy):
    """Victim for victim, because no room is kept behind sequences."""
    stats = play(int(8_400 * SCALE), 5, num_blocks, size, policy)
    assert stats["evicted"]["capacity"] > 100 and stats["duplicates"] > 100


def test_tables_show_shared_blocks_and_holes():
    pool = BlockPool(32, block_size=4)
    a, _ = serve(pool, prompt(1, 2, 3))
    b, cached = serve(pool, prompt(1, 2, 9))
    assert cached == 8
    rows = pool.tables([a, b])
    assert (rows[0, :2] == rows[1, :2]).all() and rows[0, 2] != rows[1, 2]
    out = np.empty((1, 6), np.int32)
    assert pool.step(grows=[(a, 17)], tables=[out]).fitted
    assert (out[0, :3] == rows[0]).all() and (out[0, :5] >= 0).all() and out[0, 5] == -1
    with pytest.raises(errors.InvalidArgumentError, match="stride"):
        pool.step(grows=[(a, 80)], tables=[out])
    assert pool.info(a)["held"] == 17


def test_refused_steps_leave_no_trace():
    pool = BlockPool(8, block_size=4)
    a, _ = serve(pool, prompt(1, 2, 3))
    before = pool.state_hash()
    outcome = pool.step(grows=[(a, 40)])
    assert not outcome.fitted and outcome.never_fits and outcome.left == [-2]
    outcome = pool.step(frees=[a], admissions=[Admission(prompt(*range(9)))])
    assert not outcome.fitted and outcome.left == [-1]
    assert pool.step(frees=[a], admissions=[Admission(prompt(*range(8)))], dry=True).fitted
    for n in range(4):
        pool.native.fail_at(n)
        with pytest.raises(errors.OutOfMemoryError):
            pool.step(frees=[a], admissions=[Admission(prompt(7, 8))])
    pool.native.fail_at(-1)
    assert pool.state_hash() == before
    outcome = pool.step(
        admissions=[Admission(prompt(*range(3))), Admission(prompt(5, 6, 7))], prefix=True
    )
    assert not outcome.fitted and len(outcome.admitted) == 1


def test_forks_copy_on_write_and_pins_hold():
    pool = BlockPool(16, block_size=4)
    a, _ = serve(pool, prompt(1, 2, 3, cut=2))
    b = pool.fork(a)
    [copy] = pool.step(grows=[(a, 11), (b, 11)]).copies
    assert copy.source == pool.tables([b])[0, 2] and copy.target == pool.tables([a])[0, 2]
    pin = pool.fork(a, published_only=True)
    pool.free(a, b)
    assert pool.available() == 14
    pool.free(pin)
    assert pool.available() == 16
    pool.check()


def test_masks_free_blocks_or_pack_slots():
    pool = BlockPool(32, block_size=4)
    a, _ = serve(pool, prompt(1, 2, 3, 4, cut=1))
    keep = np.ones(15, bool)
    keep[4:8] = keep[9] = False
    held, moves = pool.mask(a, keep)
    assert held == 15 and len(moves) == 0 and pool.tables([a])[0].tolist()[1] == -1
    b, _ = serve(pool, prompt(5, 6, 7, 8, cut=1))
    old = pool.tables([b])[0]
    held, moves = pool.mask(b, keep, pack=True)
    assert held == 10 and pool.info(b)["held"] == 10
    new = pool.tables([b])[0]
    cache = np.full(32 * 4, -1)
    slots = (old[:, None] * 4 + np.arange(4)).ravel()[:15]
    cache[slots] = np.arange(15)
    cache[moves[:, 2]] = cache[moves[:, 1]]  # numpy reads all before it writes
    packed = cache[(new[:, None] * 4 + np.arange(4)).ravel()[:held]]
    assert packed.tolist() == np.flatnonzero(keep).tolist()
    pool.check()


def test_events_add_up_and_keys_are_export_keys():
    pool = BlockPool(6, block_size=16, events=64, secret=b"deployment")
    tenant = pool.namespace(b"tenant")
    tokens = np.arange(64, dtype=np.int32)
    seq, _ = serve(pool, tokens, tenant)
    keys = export_keys(b"deployment", b"tenant", tokens)
    following, events = pool.events(0)
    assert [e.kind for e in events] == ["stored"] * 4 and following == 4
    assert [e.key for e in events] == [key.tobytes()[:16] for key in keys]
    assert [k.hex() for k in sorted(pool.snapshot()[1])] == sorted(
        block_keys(tokens, 16, b"tenant", b"deployment")
    )
    pool.free(seq)
    seq, _ = serve(pool, tokens + 7, tenant)  # evicts two, the end first
    following, events = pool.events(following)
    gone = [e for e in events if e.kind == "removed"]
    assert [e.key for e in gone] == [keys[3].tobytes()[:16], keys[2].tobytes()[:16]]
    assert {e.reason for e in gone} == {"capacity"}
    assert [e.seq for e in events] == list(range(4, following))


def test_events_that_nobody_read_are_dropped_and_still_right():
    """Keys of what came and went unread; an overflowing ring; a mirror built from both."""
    pool = BlockPool(8, block_size=4, events=16)
    rng = random.Random(3)
    mirror, at = set(), 0
    for round_ in range(300):
        parts = [rng.randint(0, 2) for _ in range(rng.randint(1, 5))]
        seq, _ = serve(pool, prompt(*parts))
        pool.free(seq)
        if round_ % rng.randint(1, 9):
            continue
        following, events = pool.events(at)
        if events and events[0].kind == "dropped":
            following, keys = pool.snapshot()
            mirror = set(keys)
        else:
            for event in events:
                (mirror.add if event.kind == "stored" else mirror.remove)(event.key)
        at = following
        assert mirror == set(pool.snapshot()[1]) and pool.snapshot()[0] == at
    assert pool.events(10**9)[1][0].kind == "dropped"  # of another life


def test_namespaces_never_meet_and_equal_ones_always_do():
    pool = BlockPool(64, block_size=4)
    a, b = pool.namespace(b"a"), pool.namespace(b"b")
    assert len({a, b, 0}) == 3 and pool.namespace(b"a") == a and pool.namespace(b"") == 0
    for space, found in ((a, 0), (b, 0), (0, 0), (a, 8), (b, 8), (0, 8)):
        seq, cached = serve(pool, prompt(1, 2, 3), space)
        assert cached == found
        pool.free(seq)


def test_windows_and_groups():
    groups = [KvGroup((0,), 0, 4), KvGroup((1,), 8, 4)]
    pool = BlockPool([32, 16], block_size=4, groups=groups, num_layers=2)
    a, _ = serve(pool, prompt(1, 2, 3, 4, 5, 6))
    full, window = (pool.tables([a], group=g)[0].tolist() for g in (0, 1))
    assert min(full) >= 0 and window[:4] == [-1] * 4 and min(window[4:]) >= 0
    b, cached = serve(pool, prompt(1, 2, 3, 4, 5, 9))
    assert cached == 20
    with pytest.raises(errors.UnsupportedError):
        pool.mask(b, np.zeros(24, bool), pack=True)


def test_partly_computed_layers_publish_nothing():
    pool = BlockPool(32, block_size=4, num_layers=3)
    [(seq, _)] = pool.step(admissions=[Admission(prompt(1, 2, 3))]).admitted
    pool.commit(seq, 12, layers=2, ids=prompt(1, 2, 3))
    assert pool.match(prompt(1, 2, 3, 4)).tokens == 0
    info = pool.info(seq)
    assert (info["partial_tokens"], info["partial_layers"], info["valid"]) == (12, 2, 0)
    pool.commit(seq, 12, ids=prompt(1, 2, 3))
    assert pool.match(prompt(1, 2, 3, 4)).tokens == 12


def test_a_compiled_score_function_chooses_victims():
    numba = pytest.importorskip("numba")
    from numba import types

    @numba.cfunc(
        types.void(types.voidptr, types.int64, types.CPointer(types.double), types.voidptr)
    )
    def newest_first(candidates, n, scores, user):
        for i in range(n):
            scores[i] = -i

    pool = BlockPool(8, block_size=4, run_blocks=1)
    pool.set_policy("score", newest_first)
    for i in range(8):
        seq, _ = serve(pool, prompt(i))
        pool.free(seq)
    serve(pool, prompt(50))
    assert pool.match(prompt(0, 9)).tokens == 4 and pool.match(prompt(7, 9)).tokens == 0
    with pytest.raises(errors.InvalidArgumentError):
        pool.set_policy("score")
    with pytest.raises(errors.InvalidArgumentError):
        pool.set_policy("random")


def test_plans_keep_content_for_their_uses():
    pool = BlockPool(4, block_size=4)
    seq, _ = serve(pool, prompt(1, 2))
    pool.plan(seq, 8, 1)
    pool.free(seq)
    assert pool.available() == 2
    seq, cached = serve(pool, prompt(1, 2, 3))
    assert cached == 8
    pool.free(seq)
    assert pool.available() == 4


def test_plans_hold_content_until_its_uses_are_over():
    """Beside a count of uses: what is planned from its beginning is always found."""
    rng = random.Random(4)
    pool = BlockPool(40, block_size=4, run_blocks=1, max_seqs=16, seed=1)
    live, uses, planned, found = {}, {}, set(), 0

    def end(seq):
        pool.free(seq)
        for content in live.pop(seq):
            uses[content] = uses.get(content, 1) - 1
            if not uses[content]:
                del uses[content]

    for _ in range(int(3000 * SCALE)):
        kind = rng.random()
        if kind < 0.5 and len(live) < 6:
            tokens = prompt(*[rng.randint(0, 2) for _ in range(rng.randint(1, 6))])
            outcome = pool.step(admissions=[Admission(tokens)])
            if outcome.fitted:
                [(seq, cached)] = outcome.admitted
                pool.commit(seq, len(tokens), ids=tokens)
                live[seq] = [tuple(tokens[:end].tolist()) for end in range(4, len(tokens) + 1, 4)]
                found += cached
        elif kind < 0.6 and len(uses) < 20 and set(live) - planned:
            seq, count = rng.choice(sorted(set(live) - planned)), rng.randint(1, 3)
            planned.add(seq)
            blocks = rng.randint(1, len(live[seq]))
            pool.plan(seq, 4 * blocks, count)
            for content in live[seq][:blocks]:
                uses[content] = uses.get(content, 0) + count + 1  # its own release counts
        elif live:
            end(rng.choice(sorted(live)))
        pool.check()
        for content in uses:
            if all(content[:end] in uses for end in range(4, len(content), 4)):
                assert pool.match(np.array((*content, 0), np.int32)).tokens == len(content)
        holding = {content for chain in live.values() for content in chain}
        assert pool.available() <= 40 - len(holding | set(uses))
    assert found > 1000 and pool.stats()["evicted"]["capacity"] > 100
    while live:
        end(next(iter(live)))
    pool.clear()
    assert 0 < len(uses) == 40 - pool.available()


def test_batches_write_tables_slots_and_lengths():
    pool = BlockPool(64, block_size=4)
    seqs = [serve(pool, prompt(i, i, cut=i))[0] for i in range(3)]
    tables, slots, lengths = (
        np.zeros((3, 8), np.int32),
        np.zeros(3, np.int32),
        np.zeros(3, np.int32),
    )
    batch = pool.batch(seqs, tables=[tables], slots=[slots], lengths=lengths)
    for step in range(9):
        assert len(batch.advance(np.full(3, step, np.int32))) == 0
        assert lengths.tolist() == [9 - i + step for i in range(3)]
        position = lengths - 1
        assert (slots == tables[range(3), position // 4] * 4 + position % 4).all()
    assert (tables == pool.tables(seqs, width=8)).all()
    pool.free(seqs[0])
    with pytest.raises(errors.StateError):
        batch.advance(np.zeros(3, np.int32))
    with pytest.raises(errors.InvalidArgumentError):
        batch.advance(np.zeros(2, np.int32))
    full = BlockPool(1, block_size=4)
    alone = full.batch([full.open()])
    for _ in range(4):
        alone.advance(np.zeros(1, np.int32))
    with pytest.raises(errors.CapacityError):
        alone.advance(np.zeros(1, np.int32))


def test_swapped_out_sequences_keep_their_lengths():
    pool = BlockPool(8, block_size=4)
    a, _ = serve(pool, prompt(1, 2, 3))
    pool.park(a)
    assert pool.available() == 8 and pool.info(a)["parked"] and pool.info(a)["held"] == 12
    with pytest.raises(errors.StateError, match="swapped out"):
        pool.step(grows=[(a, 13)])
    b, _ = serve(pool, prompt(*range(6)))
    with pytest.raises(errors.CapacityError):
        pool.unpark(a)
    pool.free(b)
    pool.unpark(a)
    assert min(pool.tables([a])[0]) >= 0
    pool.check()


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(4, np.float32), [1.5], ["a"], [2**31], [[1, 2]], None, np.zeros((2, 2), np.int32)],
)
def test_wrong_tokens_are_refused(tokens):
    pool = BlockPool(8, block_size=4)
    before = pool.state_hash()
    with pytest.raises(errors.InvalidArgumentError):
        pool.match(tokens)
    with pytest.raises(errors.InvalidArgumentError):
        pool.step(admissions=[Admission(tokens)])
    assert pool.state_hash() == before


def test_tokens_of_many_kinds_are_taken():
    pool = BlockPool(16, block_size=4)
    serve(pool, prompt(1, 2))
    wide = prompt(1, 2, 3).astype(np.int64)
    kinds = [
        wide,
        wide.tolist(),
        wide.astype(np.int32).tobytes(),
        memoryview(wide.astype(np.int32).tobytes()),
    ]
    assert [pool.match(kind).tokens for kind in kinds] == [8] * 4
    assert pool.match(np.repeat(wide, 2)[::2]).tokens == 8
    assert pool.match([]).tokens == 0


def test_handles_and_options_that_are_none():
    pool, other = BlockPool(8), BlockPool(8)
    seq = pool.open()
    pool.free(seq)
    for call in (
        lambda: pool.free(seq),
        lambda: pool.info(seq),
        lambda: pool.commit(seq, 0),
        lambda: pool.step(frees=[seq]),
        lambda: other.trim(seq, 0),
        lambda: pool.batch([seq]),
    ):
        with pytest.raises(errors.StateError):
            call()
    twice = pool.open()
    with pytest.raises(errors.StateError):
        pool.free(twice, twice)
    with pytest.raises(errors.NotFoundError):
        pool.open(9)
    for options in (
        {"num_blocks": 0},
        {"num_blocks": -1},
        {"num_blocks": [8, 8]},
        {"block_size": 0},
        {"max_seqs": 0},
        {"run_blocks": 1000},
        {"policy": "best"},
        {"groups": [KvGroup((0,), 0, 8)]},
    ):
        with pytest.raises(errors.InvalidArgumentError):
            BlockPool(**{"num_blocks": 8, **options})
    with pytest.raises(TypeError):
        pickle.dumps(pool.native)


def test_pictures_and_statistics():
    pool = BlockPool(64, block_size=4)
    a, _ = serve(pool, prompt(1, 2, 3))
    b, _ = serve(pool, prompt(1, 2))
    pool.free(b)
    picture = pool.picture(width=16, rows=4)
    assert [len(line) for line in picture.split("\n")] == [16] * 4
    assert picture.count("S") == 0 and picture.count("o") == 3 and "-" in picture
    stats = pool.stats()
    assert stats["steps"] == 2 and stats["hit_tokens"] == 4 and stats["asked_tokens"] == 20
    assert sum(stats["step_us"]) == 2 and stats["open_seqs"] == 1
    [group] = stats["groups"]
    assert group["free"] + group["reserved"] + group["cached"] == pool.available()
    assert "64" in repr(pool)
    pool.free(a)


def test_room_behind_sequences_makes_runs():
    """Mean run under churn at 90 % load: FastSwitch's groups against an LRU free list."""
    runs = {}
    for run_blocks in (1, 16):
        rng = random.Random(1)
        pool = BlockPool(4000, run_blocks=run_blocks, sharing=False, max_seqs=512, max_blocks=512)
        live, held = {}, 0
        for _ in range(2500):
            while held < 3600:
                want = min(400, max(2, int(rng.lognormvariate(3.3, 0.8))))
                [(seq, _)] = pool.step(admissions=[Admission(np.zeros(16, np.int32))]).admitted
                live[seq] = [1, want]
                held += want
            seqs = rng.sample(sorted(live), min(len(live), 48))
            grows = []
            for seq in seqs:
                live[seq][0] = min(live[seq][1], live[seq][0] + 1)
                grows.append((seq, live[seq][0] * 16))
            assert pool.step(grows=grows).fitted
            for seq in seqs:
                if live[seq][0] == live[seq][1]:
                    held -= live.pop(seq)[1]
                    pool.free(seq)
        pool.check()
        rows = [pool.tables([seq])[0] for seq in live]
        breaks = sum(1 + int((np.diff(row) != 1).sum()) for row in rows)
        runs[run_blocks] = sum(map(len, rows)) / breaks
    assert runs[16] > 3 * runs[1], runs


def test_the_serving_pool_prefers_requests_by_number():
    pool = ServingPool(16, 4)
    assert pool.admit(7, prompt(1, 2, 3), reserve=20) == 0 and pool.promised == 5
    with pytest.raises(errors.StateError):
        pool.admit(7, prompt(1))
    assert pool.need(7, 12) == 3 and pool.need(8, 12) == 3
    tables = pool.step([(7, 12)])
    assert tables.tables.shape == (1, 3) and tables.row_of == {7: 0} and pool.promised == 2
    pool.commit(7, 12, 1, prompt(1, 2, 3))
    assert pool.admit(8, prompt(1, 2, 3)) == 8 and pool.held(8) == 2 and pool.need(8, 12) == 1
    assert pool.hit_tokens == 8 and pool.asked_tokens == 24
    assert pool.dry_run([(8, 16)], [7]) == 16 - 4
    with pytest.raises(errors.CapacityError, match="lacks 2"):
        pool.step([(8, 17 * 4)])
    with pytest.raises(errors.NotFoundError):
        pool.step([(9, 4)])
    pool.free(7)
    pool.free(7)
    assert not pool.knows(7) and pool.fits(64) and not pool.fits(65)
    pool.check()
