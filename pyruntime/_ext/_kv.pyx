# cython: language_level=3, binding=False, embedsignature=True, freethreading_compatible=False
"""The KV block pool: every call of `pyruntime/kv.h`, thin; what it means is in `pyruntime.kv`."""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.stdint cimport int32_t, int64_t, intptr_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from pyruntime._ext.capi cimport PYRT_EFULL, PYRT_OK, pyrt_last_error, pyrt_status

from pyruntime.errors import InvalidArgumentError, StateError, from_status

cdef extern from "pyruntime/kv.h" nogil:
    ctypedef struct pyrt_kv:
        pass
    ctypedef struct pyrt_kv_batch:
        pass
    ctypedef struct pyrt_kv_options:
        uint32_t block_size, num_layers, num_groups, max_seqs, max_blocks, extra_nodes
        uint32_t run_blocks, event_capacity, sharing
        uint32_t num_blocks[8]
        uint32_t window[8]
        uint64_t seed
        const void* secret
        size_t secret_bytes
    ctypedef struct pyrt_kv_seq_info:
        uint32_t struct_size, blocks, held, valid, published, parked
        uint32_t partial_tokens, partial_layers
    ctypedef struct pyrt_kv_growth:
        uint64_t seq
        uint32_t tokens
    ctypedef struct pyrt_kv_admission:
        const int32_t* tokens
        uint64_t seq
        uint32_t num_tokens, space, room, reserve, cached
    ctypedef struct pyrt_kv_ops:
        uint32_t struct_size, flags
        const uint64_t* frees
        size_t num_frees
        const pyrt_kv_growth* trims
        size_t num_trims
        const pyrt_kv_growth* grows
        size_t num_grows
        pyrt_kv_admission* admissions
        size_t num_admissions
        int32_t** tables
        size_t table_stride
    ctypedef struct pyrt_kv_copy:
        uint32_t group, from_ "from", to
    ctypedef struct pyrt_kv_eviction:
        uint32_t group, block, node, generation
    ctypedef struct pyrt_kv_move:
        uint64_t from_ "from", to
        uint32_t group
    ctypedef struct pyrt_kv_result:
        uint32_t struct_size, num_grown, num_admitted, never_fits
        int64_t left[8]
        uint32_t need[8]
        const pyrt_kv_copy* copies
        size_t num_copies
        const pyrt_kv_eviction* evictions
        size_t num_evictions
    ctypedef struct pyrt_kv_event:
        uint32_t type, reason
        uint8_t key[16]
    ctypedef struct pyrt_kv_group_statistics:
        uint32_t num_blocks, free, reserved, cached
    ctypedef struct pyrt_kv_statistics:
        uint32_t struct_size, num_groups
        pyrt_kv_group_statistics groups[8]
        uint64_t open_seqs, promised, nodes, steps, failed_steps, admissions, asked_tokens
        uint64_t hit_tokens, allocated, extended, extents
        uint64_t evicted[4]
        uint64_t published, duplicates, unpublished, copies, moves, rotations, rooms_halved
        uint64_t score_calls, score_faults, step_ns
        uint64_t step_us[20]
        uint64_t bytes
        uint64_t pins, pinned_blocks, pins_made, pins_expired, pins_ended, pins_pressed, pins_refused
        uint64_t index_closed
    ctypedef struct pyrt_kv_ttl:
        uint32_t struct_size, rule
        double wait_s, eta, reload_s, unknown_mean_s
    ctypedef void (*pyrt_kv_score)(const void*, int64_t, double*, void*)
    void pyrt_kv_options_init(pyrt_kv_options*)
    pyrt_status pyrt_kv_create(const pyrt_kv_options*, pyrt_kv**)
    void pyrt_kv_destroy(pyrt_kv*)
    pyrt_status pyrt_kv_space_open(pyrt_kv*, const void*, size_t, uint32_t*)
    pyrt_status pyrt_kv_seq_open(pyrt_kv*, uint32_t, uint64_t*)
    pyrt_status pyrt_kv_seq_admit(pyrt_kv*, uint64_t, const int32_t*, uint32_t, uint32_t, uint32_t*)
    pyrt_status pyrt_kv_seq_fork(pyrt_kv*, uint64_t, int32_t, uint64_t*)
    pyrt_status pyrt_kv_seq_free(pyrt_kv*, const uint64_t*, size_t)
    pyrt_status pyrt_kv_seq_trim(pyrt_kv*, uint64_t, uint32_t)
    pyrt_status pyrt_kv_seq_commit(pyrt_kv*, uint64_t, uint32_t, uint32_t, const int32_t*, uint32_t)
    pyrt_status pyrt_kv_seq_plan(pyrt_kv*, uint64_t, uint32_t, uint32_t)
    pyrt_status pyrt_kv_seq_mask(
        pyrt_kv*, uint64_t, const uint64_t*, uint32_t, int32_t, const pyrt_kv_move**, size_t*, uint32_t*
    )
    pyrt_status pyrt_kv_seq_park(pyrt_kv*, uint64_t)
    pyrt_status pyrt_kv_seq_unpark(pyrt_kv*, uint64_t)
    pyrt_status pyrt_kv_seq_get_info(const pyrt_kv*, uint64_t, pyrt_kv_seq_info*)
    pyrt_status pyrt_kv_match(pyrt_kv*, uint32_t, const int32_t*, uint32_t, uint32_t*, uint32_t*)
    pyrt_status pyrt_kv_step(pyrt_kv*, const pyrt_kv_ops*, pyrt_kv_result*)
    pyrt_status pyrt_kv_tables(const pyrt_kv*, uint32_t, const uint64_t*, size_t, int32_t*, size_t)
    pyrt_status pyrt_kv_batch_create(
        pyrt_kv*, const uint64_t*, size_t, int32_t**, size_t, int32_t**, int32_t*, pyrt_kv_batch**
    )
    void pyrt_kv_batch_destroy(pyrt_kv_batch*)
    pyrt_status pyrt_kv_batch_advance(pyrt_kv_batch*, const int32_t*, size_t, pyrt_kv_result*)
    pyrt_status pyrt_kv_set_policy(pyrt_kv*, uint32_t, pyrt_kv_score, void*)
    pyrt_status pyrt_kv_clear(pyrt_kv*)
    pyrt_status pyrt_kv_pin(pyrt_kv*, uint64_t, int64_t, uint64_t, uint64_t*)
    pyrt_status pyrt_kv_unpin(pyrt_kv*, uint64_t)
    pyrt_status pyrt_kv_tick(pyrt_kv*, int64_t, uint32_t*)
    pyrt_status pyrt_kv_pin_cap(pyrt_kv*, double)
    pyrt_status pyrt_kv_ttl_observe(pyrt_kv*, const void*, size_t, double)
    pyrt_status pyrt_kv_ttl_ended(pyrt_kv*, uint32_t)
    pyrt_status pyrt_kv_ttl_suggest(
        const pyrt_kv*, const void*, size_t, const pyrt_kv_ttl*, double*
    )
    pyrt_status pyrt_kv_pin_blocks(pyrt_kv*, uint32_t, const uint32_t*, size_t)
    pyrt_status pyrt_kv_unpin_blocks(pyrt_kv*, uint32_t, const uint32_t*, size_t)
    pyrt_status pyrt_kv_take_blocks(pyrt_kv*, uint32_t, uint32_t*, size_t)
    pyrt_status pyrt_kv_events(
        pyrt_kv*, uint64_t, pyrt_kv_event*, size_t, size_t*, uint64_t*, uint64_t*
    )
    pyrt_status pyrt_kv_events_snapshot(pyrt_kv*, uint8_t*, size_t, size_t*, uint64_t*)
    pyrt_status pyrt_kv_get_statistics(const pyrt_kv*, pyrt_kv_statistics*)
    pyrt_status pyrt_kv_available(const pyrt_kv*, uint32_t, uint32_t*)
    pyrt_status pyrt_kv_check(pyrt_kv*)
    pyrt_status pyrt_kv_state_hash(const pyrt_kv*, uint64_t*)
    pyrt_status pyrt_kv_picture(const pyrt_kv*, uint32_t, char*, size_t)
    pyrt_status pyrt_kv_fail_at(pyrt_kv*, int64_t)

DRY, PREFIX, PROMISES, PINS_END = 1, 2, 4, 8


cdef int fail(pyrt_status status) except -1:
    raise from_status(status, pyrt_last_error().decode("utf-8", "replace"))


cdef class View:
    """A buffer of int32, uint32 or uint64 for the length of a call."""

    cdef Py_buffer buffer
    cdef bint held

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.buffer)


cdef int take(View view, object array, int itemsize, bint signed_, int ndim, bint writable, str name) except -1:
    cdef int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT
    if writable:
        flags |= PyBUF_WRITABLE
    try:
        PyObject_GetBuffer(array, &view.buffer, flags)
    except (TypeError, BufferError, ValueError) as error:
        raise InvalidArgumentError(f"{name} must be a C-contiguous array: {error}") from None
    view.held = True
    cdef char code = b"B"
    if view.buffer.format is not NULL:
        code = view.buffer.format[0]
        if code == b"<" or code == b"=" or code == b"@":
            code = view.buffer.format[1]
    cdef bint right = view.buffer.itemsize == itemsize and view.buffer.ndim == ndim
    if signed_:
        right = right and (code == b"i" or code == b"l" or code == b"q")
    else:
        right = right and (code == b"I" or code == b"L" or code == b"Q")
    if not right:
        dtype = f"{'int' if signed_ else 'uint'}{8 * itemsize}"
        raise InvalidArgumentError(f"{name} must be {dtype} with {ndim} axes")
    return 0


cdef dict as_dict(const pyrt_kv_result* r, int groups):
    cdef size_t i
    return {
        "num_grown": r.num_grown,
        "num_admitted": r.num_admitted,
        "never_fits": bool(r.never_fits),
        "left": [r.left[i] for i in range(groups)],
        "need": [r.need[i] for i in range(groups)],
        "copies": [
            (r.copies[i].group, r.copies[i].from_, r.copies[i].to) for i in range(r.num_copies)
        ],
        "evictions": [
            (r.evictions[i].group, r.evictions[i].block, r.evictions[i].node, r.evictions[i].generation)
            for i in range(r.num_evictions)
        ],
    }


cdef class Pool:
    """A pool; arguments as in `pyrt_kv_options`, arrays of exactly the documented type."""

    cdef pyrt_kv* pool
    cdef readonly int num_groups
    cdef readonly uint32_t block_size
    cdef object score
    cdef object __weakref__

    def __cinit__(
        self, groups, uint32_t block_size, uint32_t num_layers, uint32_t max_seqs, uint32_t max_blocks,
        uint32_t extra_nodes, uint32_t run_blocks, uint32_t event_capacity, bint sharing, uint64_t seed,
        bytes secret not None,
    ):
        cdef pyrt_kv_options o
        pyrt_kv_options_init(&o)
        if not 1 <= len(groups) <= 8:
            raise InvalidArgumentError(f"there are {len(groups)} groups; 1 to 8 are possible")
        o.num_groups = len(groups)
        for i, (blocks, window) in enumerate(groups):
            o.num_blocks[i] = blocks
            o.window[i] = window
        o.block_size = block_size
        o.num_layers = num_layers
        o.max_seqs = max_seqs
        o.max_blocks = max_blocks
        o.extra_nodes = extra_nodes
        o.run_blocks = run_blocks
        o.event_capacity = event_capacity
        o.sharing = sharing
        o.seed = seed
        o.secret = <const char*>secret
        o.secret_bytes = len(secret)
        cdef pyrt_status status = pyrt_kv_create(&o, &self.pool)
        if status != PYRT_OK:
            fail(status)
        self.num_groups = o.num_groups
        self.block_size = block_size

    def __dealloc__(self):
        pyrt_kv_destroy(self.pool)

    def __reduce__(self):
        raise TypeError("a block pool cannot be pickled: it names memory of this process")

    @property
    def address(self):
        """Address of the `pyrt_kv` handle."""
        return <intptr_t>self.pool

    def space(self, const unsigned char[::1] salt):
        """Namespace of a salt."""
        cdef uint32_t space
        cdef const void* data = NULL
        if salt.shape[0]:
            data = &salt[0]
        cdef pyrt_status status = pyrt_kv_space_open(self.pool, data, salt.shape[0], &space)
        if status != PYRT_OK:
            fail(status)
        return space

    def open(self, uint32_t space):
        """Handle of a new sequence."""
        cdef uint64_t seq
        cdef pyrt_status status = pyrt_kv_seq_open(self.pool, space, &seq)
        if status != PYRT_OK:
            fail(status)
        return seq

    def admit(self, uint64_t seq, tokens, uint32_t reserve):
        """Tokens of the prompt that were in memory."""
        cdef View view = View()
        take(view, tokens, 4, True, 1, False, "tokens")
        cdef uint32_t cached
        cdef pyrt_status status = pyrt_kv_seq_admit(
            self.pool, seq, <const int32_t*>view.buffer.buf, view.buffer.shape[0], reserve, &cached
        )
        if status != PYRT_OK:
            fail(status)
        return cached

    def fork(self, uint64_t parent, bint published_only):
        """Handle of a sequence with the same content."""
        cdef uint64_t seq
        cdef pyrt_status status = pyrt_kv_seq_fork(self.pool, parent, published_only, &seq)
        if status != PYRT_OK:
            fail(status)
        return seq

    def free(self, uint64_t seq):
        """End a sequence."""
        cdef pyrt_status status = pyrt_kv_seq_free(self.pool, &seq, 1)
        if status != PYRT_OK:
            fail(status)

    def free_many(self, seqs):
        """End sequences, all or none."""
        cdef View view = View()
        take(view, seqs, 8, False, 1, False, "seqs")
        cdef pyrt_status status = pyrt_kv_seq_free(
            self.pool, <const uint64_t*>view.buffer.buf, view.buffer.shape[0]
        )
        if status != PYRT_OK:
            fail(status)

    def trim(self, uint64_t seq, uint32_t tokens):
        """Leave the first tokens."""
        cdef pyrt_status status = pyrt_kv_seq_trim(self.pool, seq, tokens)
        if status != PYRT_OK:
            fail(status)

    def commit(self, uint64_t seq, uint32_t tokens, uint32_t layers, ids):
        """Note that tokens are valid."""
        cdef View view
        cdef const int32_t* data = NULL
        cdef uint32_t n = 0
        if ids is not None:
            view = View()
            take(view, ids, 4, True, 1, False, "ids")
            data = <const int32_t*>view.buffer.buf
            n = view.buffer.shape[0]
        cdef pyrt_status status = pyrt_kv_seq_commit(self.pool, seq, tokens, layers, data, n)
        if status != PYRT_OK:
            fail(status)

    def plan(self, uint64_t seq, uint32_t tokens, uint32_t uses):
        """Keep content for so many uses."""
        cdef pyrt_status status = pyrt_kv_seq_plan(self.pool, seq, tokens, uses)
        if status != PYRT_OK:
            fail(status)

    def mask(self, uint64_t seq, keep, uint32_t tokens, bint pack):
        """Tokens held afterwards, and the moves (group, from, to)."""
        cdef View view = View()
        take(view, keep, 8, False, 1, False, "keep")
        if <uint64_t>view.buffer.shape[0] * 64 < tokens:
            raise InvalidArgumentError(f"keep has fewer than {tokens} bits")
        cdef const pyrt_kv_move* moves = NULL
        cdef size_t n = 0, i
        cdef uint32_t held
        cdef pyrt_status status = pyrt_kv_seq_mask(
            self.pool, seq, <const uint64_t*>view.buffer.buf, tokens, pack, &moves, &n, &held
        )
        if status != PYRT_OK:
            fail(status)
        return held, [(moves[i].group, moves[i].from_, moves[i].to) for i in range(n)]

    def park(self, uint64_t seq):
        """Swap out."""
        cdef pyrt_status status = pyrt_kv_seq_park(self.pool, seq)
        if status != PYRT_OK:
            fail(status)

    def unpark(self, uint64_t seq):
        """Swap in."""
        cdef pyrt_status status = pyrt_kv_seq_unpark(self.pool, seq)
        if status != PYRT_OK:
            fail(status)

    def info(self, uint64_t seq):
        """The sequence's counts."""
        cdef pyrt_kv_seq_info i
        i.struct_size = sizeof(i)
        cdef pyrt_status status = pyrt_kv_seq_get_info(self.pool, seq, &i)
        if status != PYRT_OK:
            fail(status)
        return {
            "blocks": i.blocks, "held": i.held, "valid": i.valid, "published": i.published,
            "parked": bool(i.parked), "partial_tokens": i.partial_tokens,
            "partial_layers": i.partial_layers,
        }

    def match(self, uint32_t space, tokens):
        """Leading blocks in memory, and further ones in lower tiers."""
        cdef View view = View()
        take(view, tokens, 4, True, 1, False, "tokens")
        cdef uint32_t blocks, lower
        cdef pyrt_status status = pyrt_kv_match(
            self.pool, space, <const int32_t*>view.buffer.buf, view.buffer.shape[0], &blocks, &lower
        )
        if status != PYRT_OK:
            fail(status)
        return blocks, lower

    def step(self, frees, trims, grows, grow_tokens, admissions, uint32_t flags, tables):
        """One step; see `pyrt_kv_step`.

        frees, grows uint64 and grow_tokens uint32 arrays, or frees None, or grow_tokens None and
        grows pairs; trims pairs (handle, tokens); admissions tuples (space, tokens, room, reserve);
        tables one int32 array per group, or None. Returns (fitted, result, [(handle, cached)]).
        """
        cdef pyrt_kv_ops ops
        cdef pyrt_kv_result result
        cdef pyrt_kv_growth* growths = NULL
        cdef pyrt_kv_admission* given = NULL
        cdef int32_t* rows[8]
        cdef View view
        cdef list held = []
        cdef size_t i, n, num_trims = len(trims), num_admissions = len(admissions)
        cdef const uint64_t* seqs = NULL
        cdef const uint32_t* tokens = NULL
        cdef pyrt_status status
        memset(&ops, 0, sizeof(ops))
        ops.struct_size = sizeof(ops)
        ops.flags = flags
        result.struct_size = sizeof(result)
        if frees is not None:
            view = View()
            take(view, frees, 8, False, 1, False, "frees")
            held.append(view)
            ops.frees = <const uint64_t*>view.buffer.buf
            ops.num_frees = view.buffer.shape[0]
        if grow_tokens is None:
            n = len(grows)
        else:
            view = View()
            take(view, grows, 8, False, 1, False, "grows")
            held.append(view)
            n = view.buffer.shape[0]
            seqs = <const uint64_t*>view.buffer.buf
            view = View()
            take(view, grow_tokens, 4, False, 1, False, "grow_tokens")
            held.append(view)
            if <size_t>view.buffer.shape[0] != n:
                raise InvalidArgumentError("grows and grow_tokens have different lengths")
            tokens = <const uint32_t*>view.buffer.buf
        if tables is not None:
            if len(tables) != self.num_groups:
                raise InvalidArgumentError(f"tables are needed for {self.num_groups} groups")
            for g, table in enumerate(tables):
                view = View()
                take(view, table, 4, True, 2, True, "tables")
                held.append(view)
                if <size_t>view.buffer.shape[0] < n + num_admissions:
                    raise InvalidArgumentError("a table has fewer rows than the step")
                if g > 0 and <size_t>view.buffer.shape[1] != ops.table_stride:
                    raise InvalidArgumentError("tables have different widths")
                rows[g] = <int32_t*>view.buffer.buf
                ops.table_stride = view.buffer.shape[1]
            ops.tables = rows
        growths = <pyrt_kv_growth*>malloc((num_trims + n) * sizeof(pyrt_kv_growth) + 1)
        given = <pyrt_kv_admission*>malloc(num_admissions * sizeof(pyrt_kv_admission) + 1)
        try:
            if growths is NULL or given is NULL:
                raise MemoryError()
            for i, (seq, left) in enumerate(trims):
                growths[i].seq = seq
                growths[i].tokens = left
            if grow_tokens is None:
                for i, (seq, left) in enumerate(grows):
                    growths[num_trims + i].seq = seq
                    growths[num_trims + i].tokens = left
            else:
                for i in range(n):
                    growths[num_trims + i].seq = seqs[i]
                    growths[num_trims + i].tokens = tokens[i]
            for i, (space, prompt, room, reserve) in enumerate(admissions):
                view = View()
                take(view, prompt, 4, True, 1, False, "tokens")
                held.append(view)
                given[i].tokens = <const int32_t*>view.buffer.buf
                given[i].num_tokens = view.buffer.shape[0]
                given[i].space = space
                given[i].room = room
                given[i].reserve = reserve
                given[i].seq = 0
                given[i].cached = 0
            ops.trims = growths
            ops.num_trims = num_trims
            ops.grows = growths + num_trims
            ops.num_grows = n
            ops.admissions = given
            ops.num_admissions = num_admissions
            status = pyrt_kv_step(self.pool, &ops, &result)
            if status != PYRT_OK and status != PYRT_EFULL:
                fail(status)
            admitted = [(given[i].seq, given[i].cached) for i in range(result.num_admitted)]
            return status == PYRT_OK, as_dict(&result, self.num_groups), admitted
        finally:
            free(growths)
            free(given)

    def tables(self, uint32_t group, seqs, out):
        """Write tables into `out`, int32 [len(seqs), width]."""
        cdef View view = View()
        cdef View target = View()
        take(view, seqs, 8, False, 1, False, "seqs")
        take(target, out, 4, True, 2, True, "out")
        if target.buffer.shape[0] != view.buffer.shape[0]:
            raise InvalidArgumentError("out has not one row per sequence")
        cdef pyrt_status status = pyrt_kv_tables(
            self.pool, group, <const uint64_t*>view.buffer.buf, view.buffer.shape[0],
            <int32_t*>target.buffer.buf, target.buffer.shape[1],
        )
        if status != PYRT_OK:
            fail(status)

    def set_policy(self, uint32_t policy, intptr_t function, intptr_t user, owner):
        """Set the eviction policy; `owner` is kept alive."""
        cdef pyrt_status status = pyrt_kv_set_policy(
            self.pool, policy, <pyrt_kv_score><void*>function, <void*>user
        )
        if status != PYRT_OK:
            fail(status)
        self.score = owner

    def clear(self):
        """Forget cached content."""
        pyrt_kv_clear(self.pool)

    def pin(self, uint64_t seq, int64_t deadline_ns, uint64_t arrival):
        """Keep what a sequence has published; 0 when the cap does not allow it."""
        cdef uint64_t made
        cdef pyrt_status status = pyrt_kv_pin(self.pool, seq, deadline_ns, arrival, &made)
        if status != PYRT_OK:
            fail(status)
        return made

    def unpin(self, uint64_t pin):
        """End a pin."""
        cdef pyrt_status status = pyrt_kv_unpin(self.pool, pin)
        if status != PYRT_OK:
            fail(status)

    def tick(self, int64_t now_ns):
        """End the pins whose deadline has come; return how many."""
        cdef uint32_t expired = 0
        pyrt_kv_tick(self.pool, now_ns, &expired)
        return expired

    def pin_cap(self, double share):
        """Set the share of all blocks that pins may hold."""
        cdef pyrt_status status = pyrt_kv_pin_cap(self.pool, share)
        if status != PYRT_OK:
            fail(status)

    def ttl_observe(self, bytes tool not None, double seconds):
        """Note how long a call of a tool took."""
        cdef pyrt_status status = pyrt_kv_ttl_observe(
            self.pool, <const char*>tool, len(tool), seconds
        )
        if status != PYRT_OK:
            fail(status)

    def ttl_ended(self, uint32_t turns):
        """Note how many turns a program had."""
        cdef pyrt_status status = pyrt_kv_ttl_ended(self.pool, turns)
        if status != PYRT_OK:
            fail(status)

    def ttl_suggest(
        self, bytes tool not None, uint32_t rule, double wait, double eta, double reload,
        double unknown_mean,
    ):
        """Seconds that pinning for a call of the tool pays."""
        cdef pyrt_kv_ttl given
        cdef double seconds
        given.struct_size = sizeof(given)
        given.rule = rule
        given.wait_s = wait
        given.eta = eta
        given.reload_s = reload
        given.unknown_mean_s = unknown_mean
        cdef pyrt_status status = pyrt_kv_ttl_suggest(
            self.pool, <const char*>tool, len(tool), &given, &seconds
        )
        if status != PYRT_OK:
            fail(status)
        return seconds

    def pin_blocks(self, uint32_t group, blocks):
        """Hold blocks still."""
        cdef View view = View()
        take(view, blocks, 4, False, 1, False, "blocks")
        cdef pyrt_status status = pyrt_kv_pin_blocks(
            self.pool, group, <const uint32_t*>view.buffer.buf, view.buffer.shape[0]
        )
        if status != PYRT_OK:
            fail(status)

    def unpin_blocks(self, uint32_t group, blocks):
        """Let them go."""
        cdef View view = View()
        take(view, blocks, 4, False, 1, False, "blocks")
        cdef pyrt_status status = pyrt_kv_unpin_blocks(
            self.pool, group, <const uint32_t*>view.buffer.buf, view.buffer.shape[0]
        )
        if status != PYRT_OK:
            fail(status)

    def take_blocks(self, uint32_t group, out):
        """Take blocks out of the pool, as many as `out` has places."""
        cdef View view = View()
        take(view, out, 4, False, 1, True, "out")
        cdef pyrt_status status = pyrt_kv_take_blocks(
            self.pool, group, <uint32_t*>view.buffer.buf, view.buffer.shape[0]
        )
        if status != PYRT_OK:
            fail(status)

    def events(self, uint64_t since, size_t capacity):
        """Return (next, lost, [(type, reason, key)])."""
        cdef pyrt_kv_event* out = <pyrt_kv_event*>malloc(capacity * sizeof(pyrt_kv_event) + 1)
        cdef size_t n, i
        cdef uint64_t next_, lost
        cdef pyrt_status status
        if out is NULL:
            raise MemoryError()
        try:
            status = pyrt_kv_events(self.pool, since, out, capacity, &n, &next_, &lost)
            if status != PYRT_OK:
                fail(status)
            return next_, lost, [
                (out[i].type, out[i].reason, (<char*>out[i].key)[:16]) for i in range(n)
            ]
        finally:
            free(out)

    def events_snapshot(self):
        """Return (next, [key])."""
        cdef size_t n = 0, capacity = 0, i
        cdef uint64_t next_
        cdef uint8_t* keys = NULL
        cdef pyrt_status status
        while True:
            status = pyrt_kv_events_snapshot(self.pool, keys, capacity, &n, &next_)
            if status == PYRT_OK:
                break
            free(keys)
            if n <= capacity:
                fail(status)
            capacity = n
            keys = <uint8_t*>malloc(capacity * 16)
            if keys is NULL:
                raise MemoryError()
        found = [(<char*>keys + 16 * i)[:16] for i in range(n)]
        free(keys)
        return next_, found

    def statistics(self):
        """All counters and gauges."""
        cdef pyrt_kv_statistics s
        s.struct_size = sizeof(s)
        pyrt_kv_get_statistics(self.pool, &s)
        return {
            "groups": [
                {
                    "num_blocks": s.groups[i].num_blocks, "free": s.groups[i].free,
                    "reserved": s.groups[i].reserved, "cached": s.groups[i].cached,
                }
                for i in range(s.num_groups)
            ],
            "open_seqs": s.open_seqs, "promised": s.promised, "nodes": s.nodes, "steps": s.steps,
            "failed_steps": s.failed_steps, "admissions": s.admissions,
            "asked_tokens": s.asked_tokens, "hit_tokens": s.hit_tokens, "allocated": s.allocated,
            "extended": s.extended, "extents": s.extents,
            "evicted": {
                "capacity": s.evicted[0], "demoted": s.evicted[1], "cleared": s.evicted[2],
                "planned": s.evicted[3],
            },
            "published": s.published, "duplicates": s.duplicates, "unpublished": s.unpublished,
            "copies": s.copies, "moves": s.moves, "rotations": s.rotations,
            "rooms_halved": s.rooms_halved, "score_calls": s.score_calls,
            "score_faults": s.score_faults, "step_ns": s.step_ns,
            "step_us": [s.step_us[i] for i in range(20)], "bytes": s.bytes,
            "pins": s.pins, "pinned_blocks": s.pinned_blocks, "pins_made": s.pins_made,
            "pins_expired": s.pins_expired, "pins_ended": s.pins_ended,
            "pins_pressed": s.pins_pressed, "pins_refused": s.pins_refused,
            "index_closed": s.index_closed,
        }

    def available(self, uint32_t group):
        """Blocks a step could have."""
        cdef uint32_t blocks
        cdef pyrt_status status = pyrt_kv_available(self.pool, group, &blocks)
        if status != PYRT_OK:
            fail(status)
        return blocks

    def check(self):
        """Walk every invariant."""
        cdef pyrt_status status = pyrt_kv_check(self.pool)
        if status != PYRT_OK:
            fail(status)

    def state_hash(self):
        """Hash of everything observable."""
        cdef uint64_t hash_
        pyrt_kv_state_hash(self.pool, &hash_)
        return hash_

    def picture(self, uint32_t group, size_t width):
        """One character per part of the group."""
        cdef char* out = <char*>malloc(width + 1)
        if out is NULL:
            raise MemoryError()
        cdef pyrt_status status = pyrt_kv_picture(self.pool, group, out, width)
        try:
            if status != PYRT_OK:
                fail(status)
            return out.decode()
        finally:
            free(out)

    def fail_at(self, int64_t n):
        """Test hook."""
        pyrt_kv_fail_at(self.pool, n)


cdef class Batch:
    """A prepared decode batch; tables and slots one array per group, or None."""

    cdef pyrt_kv_batch* batch
    cdef readonly Pool pool
    cdef list held
    cdef size_t rows

    def __cinit__(self, Pool pool not None, seqs, tables, slots, lengths):
        cdef View view = View()
        cdef int32_t* table_rows[8]
        cdef int32_t* slot_rows[8]
        cdef int32_t* length_rows = NULL
        cdef size_t stride = 0
        self.pool = pool
        take(view, seqs, 8, False, 1, False, "seqs")
        self.held = [view]
        self.rows = view.buffer.shape[0]
        cdef const uint64_t* handles = <const uint64_t*>view.buffer.buf
        for given, name in ((tables, "tables"), (slots, "slots")):
            if given is not None and len(given) != pool.num_groups:
                raise InvalidArgumentError(f"{name} are needed for {pool.num_groups} groups")
        for g, table in enumerate(tables or ()):
            view = View()
            take(view, table, 4, True, 2, True, "tables")
            self.held.append(view)
            if <size_t>view.buffer.shape[0] != self.rows or (g > 0 and <size_t>view.buffer.shape[1] != stride):
                raise InvalidArgumentError("tables must have one row per sequence and one width")
            stride = view.buffer.shape[1]
            table_rows[g] = <int32_t*>view.buffer.buf
        for g, row in enumerate(slots or ()):
            view = View()
            take(view, row, 4, True, 1, True, "slots")
            self.held.append(view)
            if <size_t>view.buffer.shape[0] != self.rows:
                raise InvalidArgumentError("slots must have one element per sequence")
            slot_rows[g] = <int32_t*>view.buffer.buf
        if lengths is not None:
            view = View()
            take(view, lengths, 4, True, 1, True, "lengths")
            self.held.append(view)
            if <size_t>view.buffer.shape[0] != self.rows:
                raise InvalidArgumentError("lengths must have one element per sequence")
            length_rows = <int32_t*>view.buffer.buf
        cdef pyrt_status status = pyrt_kv_batch_create(
            pool.pool, handles, self.rows, table_rows if tables is not None else NULL, stride,
            slot_rows if slots is not None else NULL, length_rows, &self.batch,
        )
        if status != PYRT_OK:
            fail(status)

    def __dealloc__(self):
        pyrt_kv_batch_destroy(self.batch)

    def __len__(self):
        return self.rows

    def advance(self, tokens):
        """Append one token to every row; the copies (group, from, to) that come before the writes."""
        cdef View view = View()
        cdef pyrt_kv_result result
        result.struct_size = sizeof(result)
        take(view, tokens, 4, True, 1, False, "tokens")
        cdef pyrt_status status = pyrt_kv_batch_advance(
            self.batch, <const int32_t*>view.buffer.buf, view.buffer.shape[0], &result
        )
        cdef size_t i
        if status != PYRT_OK:
            fail(status)
        if result.num_copies == 0:
            return ()
        return [
            (result.copies[i].group, result.copies[i].from_, result.copies[i].to)
            for i in range(result.num_copies)
        ]
