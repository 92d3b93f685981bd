/* KV blocks: the paged KV cache's allocator, prefix cache and scheduler-step transactions.
 *
 * A pool owns the block ids of one or more groups of layers, the tables of sequences, and what is
 * cached. Content is shared by exact comparison of tokens within a namespace. Blocks are int32 ids
 * from 0; -1 in a table is a hole, or behind its end. Tokens are int32.
 *
 * Threads: one at a time per pool, any of them; calls on one pool must not overlap.
 * Sequences are 64-bit handles that carry a generation: PYRT_ESTATE for one that is not, or no
 * longer, one of the pool.
 */
#ifndef PYRUNTIME_KV_H
#define PYRUNTIME_KV_H

#include "pyruntime/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pyrt_kv pyrt_kv;
typedef struct pyrt_kv_batch pyrt_kv_batch;

enum { PYRT_KV_MAX_GROUPS = 8 };

typedef struct pyrt_kv_options {
  uint32_t struct_size;
  uint32_t block_size;     /* tokens per block, 1..1024 */
  uint32_t num_layers;     /* a token is valid when it is in all of them */
  uint32_t num_groups;     /* layers that attend alike: 1..8 */
  uint32_t num_blocks[8];  /* of each group */
  uint32_t window[8];      /* tokens a query attends to, itself included; 0: all */
  uint32_t max_seqs;       /* open at a time, 1..2^20 */
  uint32_t max_blocks;     /* of a sequence; 0: as many as the largest group has */
  uint32_t extra_nodes;    /* content that lower tiers may hold beyond the blocks */
  uint32_t run_blocks;     /* blocks an allocation tries to get in a run, 1..512; 1: no room kept */
  uint32_t event_capacity; /* events kept; 0: none are made */
  uint32_t sharing;        /* 0: nothing is published */
  uint64_t seed;           /* of the index's hash; 0: random */
  const void* secret; /* the deployment's: export keys can neither be guessed nor tested without */
  size_t secret_bytes;
} pyrt_kv_options;

/* Fills defaults: blocks of 16 tokens, one layer, one group of 0 blocks, 1024 sequences, runs of
 * 16, sharing, a random seed. */
PYRT_API void pyrt_kv_options_init(pyrt_kv_options* options) PYRT_NOEXCEPT;

/* Creates a pool. PYRT_EINVAL names the option; PYRT_ENOMEM when there is no address space. */
PYRT_API pyrt_status pyrt_kv_create(const pyrt_kv_options* options, pyrt_kv** out) PYRT_NOEXCEPT;
PYRT_API void pyrt_kv_destroy(pyrt_kv* pool) PYRT_NOEXCEPT;

/* The namespace of a salt: equal salts give the same one, and nothing is shared between two. The
 * empty salt is namespace 0. PYRT_EFULL when there is no node for another. */
PYRT_API pyrt_status pyrt_kv_space_open(pyrt_kv* pool, const void* salt, size_t bytes,
                                        uint32_t* space) PYRT_NOEXCEPT;

/* A new, empty sequence. PYRT_EFULL: max_seqs. PYRT_ENOENT: no such namespace. */
PYRT_API pyrt_status pyrt_kv_seq_open(pyrt_kv* pool, uint32_t space, uint64_t* seq) PYRT_NOEXCEPT;
/* Gives an empty sequence the leading blocks of its prompt that are in memory; `cached` (may be
 * NULL) is their tokens, of which the last of the prompt never is one. `reserve` tokens count as
 * promised from then on. */
PYRT_API pyrt_status pyrt_kv_seq_admit(pyrt_kv* pool, uint64_t seq, const int32_t* tokens,
                                       uint32_t n, uint32_t reserve,
                                       uint32_t* cached) PYRT_NOEXCEPT;
/* Another sequence with the same valid tokens in the same blocks; whoever writes a partial block
 * that both hold copies it first (pyrt_kv_result.copies). `published_only`: it holds the published
 * blocks alone, as a pin against eviction until it is freed. */
PYRT_API pyrt_status pyrt_kv_seq_fork(pyrt_kv* pool, uint64_t parent, int32_t published_only,
                                      uint64_t* child) PYRT_NOEXCEPT;
/* Ends sequences, all or none; published blocks stay cached. */
PYRT_API pyrt_status pyrt_kv_seq_free(pyrt_kv* pool, const uint64_t* seqs, size_t n) PYRT_NOEXCEPT;
/* Leaves the first `tokens` tokens: rejected drafts. PYRT_EINVAL beyond what it holds, and where a
 * window or a mask has given up what the next token needs: never for tokens that are not valid. */
PYRT_API pyrt_status pyrt_kv_seq_trim(pyrt_kv* pool, uint64_t seq, uint32_t tokens) PYRT_NOEXCEPT;
/* The first `tokens` are valid in `layers` layers. In all of them: full blocks whose tokens are
 * known are published, and windows release what they left behind. ids[n] (may be NULL) begins with
 * the sequence's tokens; tokens nobody told are never published. */
PYRT_API pyrt_status pyrt_kv_seq_commit(pyrt_kv* pool, uint64_t seq, uint32_t tokens,
                                        uint32_t layers, const int32_t* ids,
                                        uint32_t n) PYRT_NOEXCEPT;
/* Published blocks of the first `tokens` are kept until `uses` further sequences held and released
 * them, and then go first. uses 0 ends the plan. The end of a pin or of a fork counts as a use. */
PYRT_API pyrt_status pyrt_kv_seq_plan(pyrt_kv* pool, uint64_t seq, uint32_t tokens,
                                      uint32_t uses) PYRT_NOEXCEPT;

typedef struct pyrt_kv_move {
  uint64_t from; /* slots: block * block_size + offset */
  uint64_t to;
  uint32_t group;
  uint32_t reserved;
} pyrt_kv_move;

/* Drops tokens inside a sequence whose tokens are all valid: bit i % 64 of keep[i / 64] is token i
 * of `tokens`, which is what it holds. With `pack` 0 blocks without a kept token are released and
 * leave holes. With `pack` kept tokens move together, from the first dropped one on: *moves are to
 * be done in all layers of their group, all read before any is written, before the next step; they
 * are the pool's until its next call. Nothing behind the first dropped token is published from then
 * on. *held is what the sequence holds now. PYRT_EFULL: packing needs blocks. PYRT_EUNSUPPORTED:
 * packing behind a window. */
PYRT_API pyrt_status pyrt_kv_seq_mask(pyrt_kv* pool, uint64_t seq, const uint64_t* keep,
                                      uint32_t tokens, int32_t pack, const pyrt_kv_move** moves,
                                      size_t* num_moves, uint32_t* held) PYRT_NOEXCEPT;

/* Swapped out: gives up all blocks, keeps its lengths. Back: gets others, private, in the same
 * entries, ending pins for them as a step does; PYRT_EFULL when there are not enough. What they
 * hold is the caller's to copy. */
PYRT_API pyrt_status pyrt_kv_seq_park(pyrt_kv* pool, uint64_t seq) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_kv_seq_unpark(pyrt_kv* pool, uint64_t seq) PYRT_NOEXCEPT;

typedef struct pyrt_kv_seq_info {
  uint32_t struct_size;
  uint32_t blocks;    /* table entries */
  uint32_t held;      /* tokens */
  uint32_t valid;     /* of them in all layers */
  uint32_t published; /* leading entries whose content is settled */
  uint32_t parked;
  uint32_t partial_tokens; /* the latest commit in fewer layers: tokens, layers */
  uint32_t partial_layers;
} pyrt_kv_seq_info;
PYRT_API pyrt_status pyrt_kv_seq_get_info(const pyrt_kv* pool, uint64_t seq,
                                          pyrt_kv_seq_info* info) PYRT_NOEXCEPT;

/* Leading blocks of a prompt that are in memory, and further ones that a lower tier has; nothing
 * changes. */
PYRT_API pyrt_status pyrt_kv_match(pyrt_kv* pool, uint32_t space, const int32_t* tokens, uint32_t n,
                                   uint32_t* blocks, uint32_t* lower) PYRT_NOEXCEPT;

typedef struct pyrt_kv_growth {
  uint64_t seq;
  uint32_t tokens; /* to hold, or to leave */
  uint32_t reserved;
} pyrt_kv_growth;

typedef struct pyrt_kv_admission {
  const int32_t* tokens;
  uint64_t seq; /* out */
  uint32_t num_tokens;
  uint32_t space;
  uint32_t room;    /* tokens to hold blocks for at once */
  uint32_t reserve; /* tokens promised */
  uint32_t cached;  /* out: leading tokens in memory already */
  uint32_t reserved;
} pyrt_kv_admission;

enum {
  PYRT_KV_DRY = 1,      /* plan only: nothing changes, the result says what would be */
  PYRT_KV_PREFIX = 2,   /* grow and admit as many as fit, in order; else all or nothing */
  PYRT_KV_PROMISES = 4, /* admissions leave room for what others were promised */
  PYRT_KV_PINS_END = 8  /* with PYRT_KV_DRY: as if all pins had ended, which a step may do */
};

/* One scheduler step, in this order: frees, trims, growths, admissions. */
typedef struct pyrt_kv_ops {
  uint32_t struct_size;
  uint32_t flags;
  const uint64_t* frees;
  size_t num_frees;
  const pyrt_kv_growth* trims;
  size_t num_trims;
  const pyrt_kv_growth* grows; /* in order of priority */
  size_t num_grows;
  pyrt_kv_admission* admissions; /* behind them */
  size_t num_admissions;
  /* If not NULL, tables[g] is int32 [num_grows + num_admissions, table_stride] for group g: the
   * rows of what was grown and admitted are written, -1 behind the last entry. */
  int32_t* const* tables;
  size_t table_stride;
} pyrt_kv_ops;

typedef struct pyrt_kv_copy {
  uint32_t group;
  uint32_t from;
  uint32_t to;
} pyrt_kv_copy;

typedef struct pyrt_kv_eviction {
  uint32_t group;
  uint32_t block;
  uint32_t node;
  uint32_t generation;
} pyrt_kv_eviction;

typedef struct pyrt_kv_result {
  uint32_t struct_size;
  uint32_t num_grown;
  uint32_t num_admitted;
  uint32_t never_fits; /* one of them exceeds the pool by itself */
  int64_t left[8];     /* per group: blocks left afterwards at least; negative: the deficit */
  uint32_t need[8];    /* per group: blocks asked for */
  const pyrt_kv_copy* copies; /* copy on write, before the step's writes; the pool's until its next
                                 call */
  size_t num_copies;
  const pyrt_kv_eviction* evictions; /* where tiers are attached; the pool's until its next call */
  size_t num_evictions;
} pyrt_kv_result;

/* PYRT_EFULL when not everything fits: the result is written, and nothing has changed unless
 * PYRT_KV_PREFIX. PYRT_ESTATE: a handle that is none, twice in a list, freed and grown, or swapped
 * out; PYRT_EINVAL: a trim beyond what is held, a table row too short. Nothing has changed then. */
PYRT_API pyrt_status pyrt_kv_step(pyrt_kv* pool, const pyrt_kv_ops* ops,
                                  pyrt_kv_result* result) PYRT_NOEXCEPT;

/* Writes the tables of n sequences in one group: int32 [n, stride], -1 behind the last entry.
 * PYRT_EINVAL when a row is too short. */
PYRT_API pyrt_status pyrt_kv_tables(const pyrt_kv* pool, uint32_t group, const uint64_t* seqs,
                                    size_t n, int32_t* out, size_t stride) PYRT_NOEXCEPT;

/* A prepared decode batch; the arrays stay the caller's and must outlive it, as must the pool.
 * tables[g] int32 [n, stride], slots[g] int32 [n], each pointer, `tables`, `slots` and `lengths`
 * (int32 [n]) may be NULL. Tables are written now, and by each step where they change. */
PYRT_API pyrt_status pyrt_kv_batch_create(pyrt_kv* pool, const uint64_t* seqs, size_t n,
                                          int32_t* const* tables, size_t stride,
                                          int32_t* const* slots, int32_t* lengths,
                                          pyrt_kv_batch** out) PYRT_NOEXCEPT;
PYRT_API void pyrt_kv_batch_destroy(pyrt_kv_batch* batch) PYRT_NOEXCEPT;
/* Every row grows by one token, tokens[i]; slots[g][i] is where it goes. All tokens appended before
 * are valid in all layers now. PYRT_EFULL as pyrt_kv_step; PYRT_ESTATE when a sequence of the batch
 * has ended: make another batch. `result` may be NULL. */
PYRT_API pyrt_status pyrt_kv_batch_advance(pyrt_kv_batch* batch, const int32_t* tokens, size_t n,
                                           pyrt_kv_result* result) PYRT_NOEXCEPT;

/* Candidates for eviction, as a score function sees them. */
typedef struct pyrt_kv_candidate {
  uint32_t node;
  uint32_t block;
  uint32_t depth;    /* blocks from the namespace's beginning */
  uint32_t age;      /* steps since it was last held */
  uint32_t hits;     /* admissions that found it, up to 255 */
  uint32_t children; /* continuations known */
  int64_t expiry_ns;
} pyrt_kv_candidate;
/* Writes scores[i] for every candidate, oldest first; the lowest go first, NaN before all. */
typedef void (*pyrt_kv_score)(const pyrt_kv_candidate* candidates, int64_t n, double* scores,
                              void* user);
enum { PYRT_KV_LRU = 0, PYRT_KV_SLRU = 1, PYRT_KV_SCORE = 2 };
/* `score` and `user` are for PYRT_KV_SCORE alone and must stay usable. A function that leaves a
 * score unwritten is switched off and counted; the order is LRU from then on. */
PYRT_API pyrt_status pyrt_kv_set_policy(pyrt_kv* pool, uint32_t policy, pyrt_kv_score score,
                                        void* user) PYRT_NOEXCEPT;
/* Forgets all content that no sequence holds. */
PYRT_API pyrt_status pyrt_kv_clear(pyrt_kv* pool) PYRT_NOEXCEPT;

/* Retention while programs call tools (Continuum, arXiv 2511.02230). A pin keeps what a sequence
 * has published from eviction until its deadline, whatever becomes of the sequence; it takes the
 * place of one. `arrival` orders programs: a step that does not fit ends the pins of the latest, as
 * few as make it fit; if none would, it is refused and all stay. (A batch that is refused may have
 * ended some.) The clock is the caller's, in ns from anywhere, and only goes forward. *pin is 0
 * when the cap does not allow it. PYRT_EFULL: max_seqs. */
PYRT_API pyrt_status pyrt_kv_pin(pyrt_kv* pool, uint64_t seq, int64_t deadline_ns, uint64_t arrival,
                                 uint64_t* pin) PYRT_NOEXCEPT;
/* Ends a pin: the program is back. PYRT_ESTATE when it is over already: expired, or pressed out. */
PYRT_API pyrt_status pyrt_kv_unpin(pyrt_kv* pool, uint64_t pin) PYRT_NOEXCEPT;
/* Ends the pins whose deadline has come; *expired (may be NULL) says how many. */
PYRT_API pyrt_status pyrt_kv_tick(pyrt_kv* pool, int64_t now_ns, uint32_t* expired) PYRT_NOEXCEPT;
/* All pins together hold at most this share of all blocks, counted with repetitions; 0.6. */
PYRT_API pyrt_status pyrt_kv_pin_cap(pyrt_kv* pool, double share) PYRT_NOEXCEPT;

/* A call of the tool took so long. `tool` is any bytes; after 4096 tools new ones count among all
 * only. */
PYRT_API pyrt_status pyrt_kv_ttl_observe(pyrt_kv* pool, const void* tool, size_t bytes,
                                         double seconds) PYRT_NOEXCEPT;
/* A program ended after `turns` turns, 1..10^6: what eta is measured by. */
PYRT_API pyrt_status pyrt_kv_ttl_ended(pyrt_kv* pool, uint32_t turns) PYRT_NOEXCEPT;

enum { PYRT_KV_TTL_FORMULA = 0, PYRT_KV_TTL_FIXED = 1 };
typedef struct pyrt_kv_ttl {
  uint32_t struct_size;
  uint32_t rule;         /* the formula, or 2 s where the tool's mean is at most 2 s, else 0 */
  double wait_s;         /* mean wait for being admitted again */
  double eta;            /* how well turns done foretell those left, 0..1; negative: as measured */
  double reload_s;       /* to compute or load the content anew */
  double unknown_mean_s; /* of tools nobody knows yet, if exponential; above 0 */
} pyrt_kv_ttl;
/* How long pinning for a call of the tool pays: argmax of P(tau) (wait eta + reload) - tau. */
PYRT_API pyrt_status pyrt_kv_ttl_suggest(const pyrt_kv* pool, const void* tool, size_t bytes,
                                         const pyrt_kv_ttl* given, double* seconds) PYRT_NOEXCEPT;

/* Copies in flight: while pinned a block is neither evicted nor reused, whoever frees it. */
PYRT_API pyrt_status pyrt_kv_pin_blocks(pyrt_kv* pool, uint32_t group, const uint32_t* blocks,
                                        size_t n) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_kv_unpin_blocks(pyrt_kv* pool, uint32_t group, const uint32_t* blocks,
                                          size_t n) PYRT_NOEXCEPT;

/* Takes `n` blocks out of the pool, the lowest ids first where nothing was handed out yet, evicting
 * if need be; PYRT_EFULL, and nothing taken, if there are fewer. pyrt_kv_unpin_blocks gives them
 * back: what has no memory yet is kept out like that. */
PYRT_API pyrt_status pyrt_kv_take_blocks(pyrt_kv* pool, uint32_t group, uint32_t* blocks,
                                         size_t n) PYRT_NOEXCEPT;

enum { PYRT_KV_STORED = 1, PYRT_KV_REMOVED = 2, PYRT_KV_CLEARED = 3 };
typedef struct pyrt_kv_event {
  uint32_t type;
  uint32_t reason; /* of PYRT_KV_REMOVED: 0 capacity, 1 demoted, 2 cleared */
  uint8_t key[16]; /* export key of the block */
} pyrt_kv_event;
/* Events from number `since` on, at most `capacity`. *next is the number to go on with; *lost how
 * many are not to be had any more, or were of another pool: then take a snapshot. */
PYRT_API pyrt_status pyrt_kv_events(pyrt_kv* pool, uint64_t since, pyrt_kv_event* out,
                                    size_t capacity, size_t* n, uint64_t* next,
                                    uint64_t* lost) PYRT_NOEXCEPT;
/* Export keys of everything announced, uint8 [capacity, 16]; *n of them, and the number of the next
 * event. PYRT_EINVAL when the capacity is too small; *n then says what it takes. */
PYRT_API pyrt_status pyrt_kv_events_snapshot(pyrt_kv* pool, uint8_t* keys, size_t capacity,
                                             size_t* n, uint64_t* next) PYRT_NOEXCEPT;

typedef struct pyrt_kv_group_statistics {
  uint32_t num_blocks;
  uint32_t free;     /* never used, or given back */
  uint32_t reserved; /* room to grow behind sequences; anybody may take it */
  uint32_t cached;   /* content that no sequence holds */
} pyrt_kv_group_statistics;

typedef struct pyrt_kv_statistics {
  uint32_t struct_size;
  uint32_t num_groups;
  pyrt_kv_group_statistics groups[8];
  uint64_t open_seqs;
  uint64_t promised; /* blocks */
  uint64_t nodes;    /* content known */
  uint64_t steps;
  uint64_t failed_steps;
  uint64_t admissions;
  uint64_t asked_tokens;
  uint64_t hit_tokens;
  uint64_t allocated; /* blocks handed out; of them in place, and extents begun */
  uint64_t extended;
  uint64_t extents;
  uint64_t evicted[4]; /* by reason: capacity, demoted, cleared, planned */
  uint64_t published;  /* blocks settled: indexed, known already, not to be shared */
  uint64_t duplicates;
  uint64_t unpublished;
  uint64_t copies; /* copy on write */
  uint64_t moves;  /* slots packed */
  uint64_t rotations;
  uint64_t rooms_halved;
  uint64_t score_calls;
  uint64_t score_faults;
  uint64_t step_ns;     /* in all steps */
  uint64_t step_us[20]; /* steps of less than 2^i us; the last: all others */
  uint64_t bytes;       /* address space reserved; pages appear as they are written */
  uint64_t pins;        /* that are held now, and their blocks, with repetitions */
  uint64_t pinned_blocks;
  uint64_t pins_made; /* so far; ended by time, by their program, by pressure; refused by the cap */
  uint64_t pins_expired;
  uint64_t pins_ended;
  uint64_t pins_pressed;
  uint64_t pins_refused;
  uint64_t index_closed; /* 1 after a check that failed */
} pyrt_kv_statistics;

/* Counters and gauges; fields beyond the caller's struct_size are not written. */
PYRT_API pyrt_status pyrt_kv_get_statistics(const pyrt_kv* pool,
                                            pyrt_kv_statistics* statistics) PYRT_NOEXCEPT;
/* Blocks a step could have in a group: free, reserved and cached. */
PYRT_API pyrt_status pyrt_kv_available(const pyrt_kv* pool, uint32_t group,
                                       uint32_t* blocks) PYRT_NOEXCEPT;

/* Walks every invariant, O(blocks + nodes + entries). PYRT_ECORRUPT says what is wrong; from then
 * on nothing is found or published any more, so that no sequence gets another's content, while
 * allocation goes on. */
PYRT_API pyrt_status pyrt_kv_check(pyrt_kv* pool) PYRT_NOEXCEPT;
/* A hash of everything callers can observe, eviction order included: equal before and after a call
 * that failed. */
PYRT_API pyrt_status pyrt_kv_state_hash(const pyrt_kv* pool, uint64_t* hash) PYRT_NOEXCEPT;
/* A picture of a group: `width` characters and a 0, each for as many blocks, by what most of them
 * are: . free - reserved c cached o held S shared # pinned. */
PYRT_API pyrt_status pyrt_kv_picture(const pyrt_kv* pool, uint32_t group, char* out,
                                     size_t width) PYRT_NOEXCEPT;
/* For tests: the n-th internal step of a plan from now on fails with PYRT_ENOMEM; -1: none. */
PYRT_API pyrt_status pyrt_kv_fail_at(pyrt_kv* pool, int64_t n) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
