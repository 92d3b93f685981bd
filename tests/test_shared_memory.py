"""The KV cache and the experts on one budget: who gives way, and that the text is the same."""

import mmap
import re
import subprocess
import sys

import numpy as np
import pytest

from pyruntime import LLM, errors
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.layers import activation_bytes
from pyruntime.engine.llm import BLOCK_SIZE, STEP_TOKENS, make_loop
from pyruntime.engine.loader import dense_bytes, load_weights
from pyruntime.engine.memory import EXTENT_OVERHEAD, plan_memory
from pyruntime.engine.messages import Submit
from pyruntime.engine.quantize import quantize
from pyruntime.engine.stored import STORE_NAME
from pyruntime.kv import BlockMemory, BlockPool, KvGroup, KvStorage, ServingPool
from pyruntime.models import shipped
from pyruntime.moe import ExpertStore
from pyruntime.pool import UNIT_BYTES, Budget
from tests.stepping import DATA

MIB = 1 << 20
KV = 4 * MIB
RUNNING = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("q") / "tiny"
    quantize(shipped(), out, layout="422")
    return out


@pytest.fixture(scope="module")
def unlimited(directory):
    return LLM(directory)


def parts(llm, **changed):
    """What a plan needs to know of a model."""
    engine = llm.loop.engine
    return {
        "dense": engine.weights.dense_bytes,
        "other": EXTENT_OVERHEAD * len(engine.experts.store.extents),
        "activations": activation_bytes(engine.config, STEP_TOKENS + RUNNING, RUNNING),
        "experts": 0,
        "kv_most": 1 << 40,
        "kv_least": 0,
    } | changed


def budget_for(llm, shared):
    """A budget that leaves `shared` bytes to experts and the KV cache."""
    for budget in range(shared, shared + 64 * MIB, MIB // 4):
        if plan_memory(budget, **parts(llm)).shared == shared:
            return budget
    raise AssertionError("no budget is enough")


def resident_keys(storage):
    """Resident bytes of keys and values in one mapping; the kernel may join it with others."""
    page = mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        pages.seek(storage.keys[0].ctypes.data // page * 8)
        entries = np.frombuffer(pages.read(storage.nbytes // page * 8), np.uint64)
    assert len(entries) == storage.nbytes // page
    return int((entries >> np.uint64(63)).sum()) * page


def prompts(tokens, n, length, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, tokens, length).tolist() for _ in range(n)]


def drive(loop, submits, each=lambda: None):
    texts = {}
    for submit in submits:
        assert loop.submit(submit).finish_reason is None
        texts[submit.id] = []
    while loop.busy:
        for delta in loop.step():
            assert not delta.error, delta.error
            texts[delta.id] += delta.tokens
        each()
    return texts


def submits(llm, n=12, length=300, out=24):
    some = prompts(llm.loop.engine.config.vocab_size, n, length)
    return [Submit(f"r{i}", each, max_tokens=out, ignore_eos=True) for i, each in enumerate(some)]


def test_experts_give_way_as_the_kv_cache_grows(directory, unlimited):
    want = drive(unlimited.loop, submits(unlimited))
    shared = KV + 2 * UNIT_BYTES
    budget = budget_for(unlimited, shared)
    loop = make_loop(directory, kv_bytes=KV, max_running=RUNNING, memory_budget=budget)
    experts, memory = loop.engine.experts, loop.pool._memory
    whole = experts._live().statistics()["limit_bytes"]
    assert shared <= whole < shared + UNIT_BYTES
    # Before anything is written, all of it is the experts'.
    for layer in experts.store.layers:
        experts.prefetch(layer, range(experts.store.num_experts), bits=8)
    experts.drain()
    before = experts.stats()
    assert before["capacity_bytes"] > shared - KV and memory.reserved_bytes == 0
    seen = []

    def check():
        stats = experts.stats()
        used = stats["capacity_bytes"] + memory.reserved_bytes
        assert stats["resident_bytes"] <= stats["capacity_bytes"]
        assert used <= whole
        assert memory.opened[0] * loop.engine.kv_bytes // loop.pool.num_blocks <= KV
        tables = {
            block
            for known in loop.pool._requests.values()
            for block in loop.pool.pool.tables([known.seq], width=known.blocks or 1).ravel()
        }
        assert max(tables, default=-1) < memory.opened[0]
        seen.append((memory.reserved_bytes, stats["capacity_bytes"], resident_keys(loop.engine.kv)))
        experts.verify()
        loop.pool.check()

    assert drive(loop, submits(unlimited), check) == want
    reserved, capacity, kv = zip(*seen, strict=True)
    assert reserved[-1] == KV and list(reserved) == sorted(reserved)
    assert capacity[-1] < before["capacity_bytes"]
    slack = 4096 * 2 * loop.engine.config.num_layers  # a page on the mark, of each part
    assert all(there <= granted + slack for there, granted in zip(kv, reserved, strict=True))
    assert kv[0] > 0 and kv[-1] > KV // 2
    assert loop.pool.stats()["memory_bytes"] == KV
    flat = loop.snapshot()
    assert flat["kv"]["memory_bytes"] == KV and flat["kv"]["blocks|0|withheld"] == 0
    assert loop.stats.step_errors == 0


def test_refinements_are_the_first_to_go(directory, unlimited):
    budget = budget_for(unlimited, 10 * MIB)
    loop = make_loop(directory, kv_bytes=KV, max_running=RUNNING, memory_budget=budget)
    experts, memory = loop.engine.experts, loop.pool._memory
    for layer in experts.store.layers:
        experts.prefetch(layer, range(experts.store.num_experts), bits=8)
    experts.drain()
    other = memory._budget.register("others", priority=1)
    seen = []
    while memory._budget.available_bytes + experts.spare_bytes() > 0:
        other.reserve(UNIT_BYTES)
        seen.append(experts.stats()["resident"])
        experts.verify()
    base, refinements = [n[0] for n in seen], [sum(n[1:]) for n in seen]
    assert refinements[0] > 0 == refinements[-1] and base[0] > base[-1]
    assert all(n == base[0] for n, finer in zip(base, refinements, strict=True) if finer)
    assert base[-1] >= len(experts.store.layers)  # a floor in each
    assert experts.stats()["capacity_bytes"] == experts._least_bytes
    with pytest.raises(errors.CapacityError):
        other.reserve(UNIT_BYTES)
    other.close(force=True)


def test_what_others_hold_is_back_pressure(directory, unlimited):
    few = submits(unlimited, n=6, length=200, out=40)
    want = drive(unlimited.loop, few)
    budget = budget_for(unlimited, KV + 2 * UNIT_BYTES)
    loop = make_loop(directory, kv_bytes=KV, max_running=RUNNING, memory_budget=budget)
    memory, experts = loop.pool._memory, loop.engine.experts
    other = memory._budget.register("other", priority=5)
    # What is left is enough for two requests, not for four.
    bytes_of_one = -(-240 // BLOCK_SIZE) * loop.engine.kv_bytes // loop.pool.num_blocks
    leave = -(-2 * bytes_of_one // UNIT_BYTES) * UNIT_BYTES
    other.reserve(memory._budget.limit_bytes - experts._least_bytes - leave)
    most = []
    running = lambda: most.append(len(loop.scheduler.running))  # noqa: E731
    assert drive(loop, few, running) == want
    assert max(most) < RUNNING
    assert loop.pool.num_free < loop.pool.num_blocks
    assert memory.reserved_bytes <= leave
    assert loop.stats.step_errors == 0
    experts.verify()
    # With the memory back, all of it can be had again.
    other.close(force=True)
    assert drive(loop, submits(unlimited, n=8, length=300)) == drive(
        unlimited.loop, submits(unlimited, n=8, length=300)
    )
    assert memory.reserved_bytes == KV


def test_prefetches_on_their_way_do_not_stop_the_kv_cache(directory, unlimited):
    budget = budget_for(unlimited, KV + UNIT_BYTES)
    loop = make_loop(directory, kv_bytes=KV, max_running=RUNNING, memory_budget=budget)
    experts = loop.engine.experts

    def fetch():
        for layer in experts.store.layers:
            experts.prefetch(layer, range(experts.store.num_experts), bits=8)

    given = submits(unlimited)
    assert drive(loop, given, fetch) == drive(unlimited.loop, given)
    assert loop.pool._memory.reserved_bytes == KV
    assert loop.stats.step_errors == 0


def test_a_lone_request_reaches_the_limit(directory, unlimited):
    budget = budget_for(unlimited, KV + UNIT_BYTES)
    loop = make_loop(directory, kv_bytes=KV, max_running=1, memory_budget=budget)
    longest = min(loop.engine.config.max_len, loop.pool.num_blocks * BLOCK_SIZE) - 8
    [prompt] = prompts(loop.engine.config.vocab_size, 1, longest)
    given = [Submit("a", prompt, max_tokens=8, ignore_eos=True)]
    assert drive(loop, given) == drive(unlimited.loop, given)


@pytest.mark.parametrize("policy", ["swap", "layered"])
def test_other_policies_share_too(directory, unlimited, policy):
    given = submits(unlimited, n=10, length=400, out=24)
    want = drive(unlimited.loop, given)
    budget = budget_for(unlimited, KV + 4 * UNIT_BYTES) + 96 * MIB
    loop = make_loop(
        directory,
        policy=policy,
        kv_bytes=KV,
        max_running=RUNNING,
        memory_budget=budget,
        swap_bytes=4 * MIB if policy == "swap" else 0,
    )
    assert drive(loop, given) == want
    assert loop.stats.step_errors == 0
    loop.pool.check()


def test_a_plan_without_room_is_refused(directory, unlimited):
    for groups, kv_least in ((1, KV), (2, KV), (1, KV + 1), (3, 1)):
        given = parts(unlimited, experts=UNIT_BYTES - 1, kv_least=kv_least, groups=groups)
        with pytest.raises(errors.CapacityError, match=r"experts at least 2\.0") as refused:
            plan_memory(UNIT_BYTES, **given)
        least = int(re.search(r"at least (\d+):", str(refused.value))[1])
        plan = plan_memory(least, **given)
        assert plan.kv >= kv_least
        assert plan.kv + (groups - 1) * UNIT_BYTES + plan.experts <= plan.shared
        with pytest.raises(errors.CapacityError, match=f"needs at least {least}:"):
            plan_memory(least - 1, **given)


@pytest.mark.parametrize("policy", ["fcfs", "layered"])
def test_the_least_budget_is_named_and_is_enough(directory, unlimited, policy):
    options = {"policy": policy, "max_running": RUNNING}
    least = least_budget(directory, **options)
    with pytest.raises(errors.CapacityError, match=f"at least {least}:"):
        make_loop(directory, memory_budget=least - 1, **options)
    loop = make_loop(directory, memory_budget=least, **options)
    experts = loop.engine.experts
    assert loop.pool.num_blocks * BLOCK_SIZE >= STEP_TOKENS
    given = submits(unlimited)
    assert drive(loop, given, experts.verify) == drive(unlimited.loop, given)
    assert loop.stats.step_errors == 0


def least_budget(directory, **options):
    with pytest.raises(errors.CapacityError) as refused:
        make_loop(directory, memory_budget=MIB, **options)
    return int(re.search(r"at least (\d+):", str(refused.value))[1])


def test_requests_may_have_all_but_the_experts_least(directory, unlimited):
    given = submits(unlimited, n=8, length=900, out=8)
    want = drive(unlimited.loop, given)
    budget = budget_for(unlimited, 14 * MIB)
    loop = make_loop(directory, max_running=RUNNING, memory_budget=budget)
    experts, memory = loop.engine.experts, loop.pool._memory
    least = experts._least_bytes
    seen = []

    def check():
        stats = experts.stats()
        seen.append(memory.reserved_bytes)
        assert stats["capacity_bytes"] >= least
        assert stats["resident_bytes"] <= stats["capacity_bytes"]
        assert stats["capacity_bytes"] + memory.reserved_bytes <= 14 * MIB
        experts.verify()
        loop.pool.check()

    assert drive(loop, given, check) == want
    assert loop.stats.step_errors == 0
    assert max(seen) == 14 * MIB - least > budget // 4

    # A burst does not keep it once others come: their experts get it back.
    assert resident_keys(loop.engine.kv) > 11 * MIB
    again = submits(unlimited, n=2, length=100)
    want = drive(unlimited.loop, again)
    seen.clear()
    assert drive(loop, again, check) == want
    assert max(seen) <= budget // 4
    assert resident_keys(loop.engine.kv) <= budget // 4 + MIB
    for layer in experts.store.layers:
        experts.prefetch(layer, range(experts.store.num_experts), bits=8)
    experts.drain()
    assert experts.stats()["capacity_bytes"] > least


def test_a_long_context_stays_for_its_next_turn(directory, unlimited):
    [prompt] = prompts(unlimited.loop.engine.config.vocab_size, 1, 1900)
    budget = budget_for(unlimited, 12 * MIB)
    loop = make_loop(directory, max_running=1, memory_budget=budget)
    drive(loop, [Submit("a", prompt[:1800], max_tokens=4, ignore_eos=True)])
    held = loop.pool._memory.reserved_bytes
    assert held == 8 * MIB > budget // 4  # 1803 tokens
    drive(loop, [Submit("b", prompt, max_tokens=4, ignore_eos=True)])
    assert loop.stats.cached_tokens == 1792 and loop.pool._memory.reserved_bytes == held


def test_what_was_served_keeps_a_quarter(directory, unlimited):
    budget = budget_for(unlimited, 24 * MIB)
    loop = make_loop(directory, max_running=1, memory_budget=budget)
    assert loop.engine.kv_bytes > budget // 3
    drive(loop, submits(unlimited, n=40))
    assert budget // 4 - UNIT_BYTES < loop.pool._memory.reserved_bytes <= budget // 4
    assert loop.pool.stats()["evicted"]["capacity"] > 0


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_open_as_memory_is_granted(groups):
    layers = [KvGroup((i,), 64 * i, 16) for i in range(groups)]
    pool = BlockPool(64, groups=layers, num_layers=groups)
    budget = Budget(96 * MIB)
    holder = budget.register("holder")
    asked = []
    sizes = [300 << 10, 1 << 20][:groups]
    memory = BlockMemory(pool, budget, sizes, spare=lambda: 0, settle=lambda: asked.append(1))
    assert memory.opened == [0] * groups and pool.available() == 0
    assert memory.withheld == [64] * groups
    memory.open([1] * groups, [0] * groups)
    assert pool.available(group=0) == memory.opened[0] == UNIT_BYTES // sizes[0]
    assert memory.reserved_bytes == groups * UNIT_BYTES
    for left in (0, 1, 5, 11):
        holder.reserve(budget.available_bytes - left * UNIT_BYTES)
        could = memory.obtainable()
        cost = memory._more(could)
        assert sum(cost) <= left * UNIT_BYTES
        more = [n + 1 for n in could]
        before = memory.opened
        if could != memory.withheld:
            assert sum(memory._more(more)) > left * UNIT_BYTES
            memory.open(more, more)
            assert memory.opened == before and asked.pop() == 1
        memory.open(could, could)
        assert all(a >= b + n for a, b, n in zip(memory.opened, before, could, strict=True))
        assert not asked
        pool.check()
        holder.give_back(holder.reserved_bytes)
    memory.open([64] * groups, [0] * groups)
    assert memory.withheld == [0] * groups == memory.obtainable()
    assert [pool.available(group=g) for g in range(groups)] == [64] * groups


@pytest.mark.parametrize("groups", [1, 2])
def test_memory_goes_back_when_nothing_is_in_use(groups):
    layers = [KvGroup((i,), 64 * i, 16) for i in range(groups)]
    pool = BlockPool(64, groups=layers, num_layers=groups)
    budget = Budget(96 * MIB)
    gone = []
    memory = BlockMemory(
        pool,
        budget,
        [300 << 10, 1 << 20][:groups],
        kept_bytes=groups * 3 * UNIT_BYTES - 1,
        discard=lambda *which: gone.append(which),
    )
    memory.open([8] * groups, [0] * groups)
    assert not memory.exceeded
    before = memory.opened
    memory.open([60] * groups, [0] * groups)  # content goes first
    assert memory.opened == before
    memory.open([60] * groups, [60] * groups)
    assert memory.exceeded and min(memory.opened) >= 60
    opened = memory.opened
    ids = pool.take_blocks(1)
    assert not memory.give_back() and memory.exceeded and memory.opened == opened
    pool.unpin_blocks(ids)
    assert memory.give_back() and not memory.exceeded
    assert memory.reserved_bytes == 96 * MIB - budget.available_bytes <= groups * 3 * UNIT_BYTES
    assert gone == [(g, memory.opened[g], opened[g]) for g in range(groups)]
    for g in range(groups):
        assert memory.opened[g] > 0
        assert pool.available(group=g) == memory.opened[g]
        ids = pool.take_blocks(memory.opened[g], group=g)
        assert sorted(ids.tolist()) == list(range(memory.opened[g]))
    pool.check()


def test_blocks_are_written_from_the_lowest_on():
    pool = BlockPool(3000, block_size=16)
    ids = pool.take_blocks(3000)
    assert sorted(ids.tolist()) == list(range(3000))
    with pytest.raises(errors.CapacityError, match="are wanted and 0"):
        pool.take_blocks(1)
    pool.unpin_blocks(np.arange(10, dtype=np.uint32))
    assert sorted(pool.take_blocks(4).tolist()) == [0, 1, 2, 3] or pool.available() == 6
    pool.check()


def test_content_is_kept_while_there_is_memory():
    budget = Budget(16 * MIB)
    size = UNIT_BYTES // 4
    pool = ServingPool(16, memory=lambda blocks: BlockMemory(blocks, budget, [size]))
    for request in range(3):
        tokens = np.arange(64, dtype=np.int32) + 1000 * request
        pool.admit(request, tokens)
        pool.step([(request, 64)])
        pool.commit(request, 64, 1, tokens)
        pool.free(request)
    assert pool.stats()["groups"][0]["cached"] == 12
    assert pool.stats()["evicted"]["capacity"] == 0
    other = budget.register("other")
    other.reserve(budget.available_bytes)
    tokens = np.arange(128, dtype=np.int32) + 9000
    pool.admit(9, tokens)
    assert pool.dry_run([(9, 128)]) == pool.num_free - 8 >= 0
    pool.step([(9, 128)])
    assert pool.stats()["evicted"]["capacity"] > 0
    pool.check()


def test_small_pages_hold_what_was_written():
    storage = KvStorage.allocate([KvGroup((0, 1), 0, 16)], 32, 2, 8, small_pages=True)
    storage.keys[1][3] = 7
    assert storage.keys[1][3].min() == 7 and not storage.values[1].any()
    assert storage.nbytes == 2 * 2 * 32 * 16 * 2 * 8 * 4
    for part in (*storage.keys, *storage.values):  # blocks of a quarter of a page
        part[:] = 1
    storage.discard(0, 5, 18)
    for part in (*storage.keys, *storage.values):
        assert not part[8:16].any() and part[:8].all() and part[16:].all()


PEAK = """
import resource, sys
import numpy as np
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine import quantize  # what imports take is not the budget's
def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
directory, budget, kv = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
before = resident()
loop = make_loop(directory, policy=sys.argv[4], kv_bytes=kv, max_running=4, memory_budget=budget)
peak = 0
for i in range(16):
    loop.submit(Submit(f"r{i}", rng.integers(3, 2000, 400).tolist(), max_tokens=24))
while loop.busy:
    loop.step()
    peak = max(peak, resident())
print(peak - before, loop.pool._memory.reserved_bytes, loop.stats.step_errors)
"""


@pytest.mark.parametrize("policy", ["fcfs", "layered"])
@pytest.mark.parametrize("budget", [0, 32 * MIB, 48 * MIB, 64 * MIB])
def test_resident_memory_stays_within_the_budget(directory, budget, policy):
    if budget == 0:
        budget = least_budget(directory, policy=policy, max_running=4)
    command = [sys.executable, "-c", PEAK, str(directory), str(budget), str(1 << 30), policy]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, kv, failed = map(int, done.stdout.split())
    assert failed == 0 and kv >= 4 * MIB
    assert peak <= 1.05 * budget


@pytest.mark.parametrize("case", ["mixtral_window", "qwen2moe", "olmoe"])
@pytest.mark.parametrize("dense_bits", [None, 8])
def test_dense_bytes_are_known_before_any_is_read(tmp_path, case, dense_bits):
    quantize(DATA / case, tmp_path / "q", layout="422", dense_bits=dense_bits)
    config = ModelConfig.load(tmp_path / "q")
    store = ExpertStore(tmp_path / "q" / STORE_NAME)
    loaded = load_weights(tmp_path / "q", config, store=store).dense_bytes
    assert loaded <= dense_bytes(tmp_path / "q", store) <= 1.05 * loaded


def test_a_small_budget_is_refused_before_weights_are_read(directory, monkeypatch):
    def load(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("pyruntime.engine.llm.load_weights", load)
    with pytest.raises(errors.CapacityError, match="needs at least"):
        make_loop(directory, memory_budget=MIB)


@pytest.mark.parametrize("case", ["mixtral_window", "qwen2moe"])
def test_windows_and_dense_layers_share_too(tmp_path, case):
    quantize(DATA / case, tmp_path / "q", layout="422")
    given = [
        Submit(f"r{i}", each, max_tokens=8, ignore_eos=True)
        for i, each in enumerate(prompts(90, 6, 60))
    ]
    want = drive(make_loop(tmp_path / "q", kv_bytes=MIB), given)
    loop = make_loop(tmp_path / "q", kv_bytes=MIB, max_running=2, memory_budget=64 * MIB)
    assert drive(loop, given) == want
    assert loop.pool._memory.reserved_bytes >= UNIT_BYTES
    loop.pool.check()
    loop.engine.experts.verify()
