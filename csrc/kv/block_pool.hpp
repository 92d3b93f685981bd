// The KV block pool: where the tokens of every sequence live, for the whole batch in one call.
//
// Two id spaces. A *physical block* is a place for `block_size` tokens of one KV group's layers;
// engines see its id. A *content node* is one block of content: its tokens, behind a parent node,
// under a namespace's root. A node may have a block in each group and copies in lower tiers, or
// none of them while others continue it: windows may drop blocks, and tiers hold content, without
// breaking the chain.
//
//   namespace root <- node <- node <- node          (parent links; children counted)
//                      |       |       |
//   group 0:        block 7  block 8  block 9       owner_[block] -> node, GroupNode.block -> block
//   group 1 (SWA):     -       -      block 3
//                      ^       ^       ^
//   sequence:       row[0]   row[1]  row[2]  row[3] = private block (not published: no node)
//
// Memory. Structure of arrays in reserved address space, indexed by node, block or sequence slot:
//
//   nodes_[node]              64 B   key, parent, children, generation, tier slots   (types.hpp)
//   tokens_[node*block_size]  64 B   at 16 tokens; compared as one line
//   group.nodes[node]         32 B   block, holds, eviction links, resident children, planned uses
//   group.owner, group.shared  4 B   per block: node it belongs to; private holders, pins, readers
//   group.external             2 B   per block: of `shared` those outside: pins, copies in flight
//   group.runs                 9 B   per block: the buddy lists of free runs          (runs.hpp)
//   index                     16 B   per node: open addressing at load 1/2            (index.hpp)
//   group.rows[slot*stride]    4 B   per table entry; node_rows_ the same for nodes
//
// 100 000 blocks with an index come to about 200 B each, tokens included. No pointers inside, so
// sizes beyond 2^32 bytes need no thought.
//
// Who holds what. GroupNode.hold counts table entries and retention holds of a node's block;
// `shared` counts the private table entries of a block, pins, and copies in flight that read or
// write it. A block is exactly one of
//
//   FREE      in the buddy lists
//   RESERVED  behind a sequence's last block, as its room to grow; anybody may take it
//   ACTIVE    hold > 0 or shared > 0
//   CACHED    a node's block with hold == 0 and shared == 0: in the eviction list (kListed)
//
// Sharing. Lookup is exact: keys are a keyed 64-bit chain computed for the whole prompt ahead, but
// a hit is accepted only if the parent node is the one just matched and all tokens are equal, so by
// induction the whole prefix is equal and of this namespace, whatever the hash does. Published is
// what is valid in all layers and of which the tokens are known (`commit`). Who publishes content
// that is indexed already keeps its own block as private and holds the node: tables only grow.
// Equal content is thus never in two cached blocks.
//
// Eviction. Blocks are cached in the order of their last use, a sequence's end before its
// beginning. Who holds a child holds its parent, so in full-attention groups a child is always
// ahead of its parent in the list, and the head is a leaf: O(1), no search. Where a tier or a pin
// broke that order, a head with resident children goes to the back of the list. Policies:
//   lru    one list
//   slru   blocks that an admission found move to a protected segment of at most 3/4 of the list
//   score  a C function rates 64 candidates from the list's head; lowest goes; NaN means now. A
//          function that does not answer for every candidate is switched off and counted.
// `plan` gives nodes a number of expected uses: they are held until that many sequences that
// contain them ended, and then go first.
//
// Runs. A sequence grows in place while the next block is free, else it gets the best-fitting
// extent of need + run_blocks, whose rest stays RESERVED for it. Without free extents reservations
// are halved, largest first, or, while reservations are few, a whole run of victims is evicted.
//
// Steps are transactions in two phases. The plan checks every handle, counts what each group needs
// and would have (frees and hits simulated), and takes all memory that is needed; it may fail and
// changes nothing. The commit cannot fail. `fail_at` makes the n-th internal step of a plan fail,
// in every build, for tests.
//
// Threads. One owner at a time, no locks; counters are atomics that any thread may read.
// Complexity. match, admit, commit, free: O(blocks); a decode step O(rows), with a constant of a
// few ns for rows whose block does not fill; everything else O(what changes).
//
// Tiers hook in at five places, all documented below: `Tiers` (told of evictions and removals),
// `pin_blocks` (in-flight copies), `take_blocks`/`attach` (content coming back), `park`/`unpark`
// (sequences swapped out) and Match::lower (lookup goes on below the device).
//
// Papers: PagedAttention (SOSP 23) for the tables; FastSwitch (arXiv 2411.18424) for runs with soft
// reservations; BatchLLM (arXiv 2412.03594) for planned lifetimes; LazyEviction (arXiv 2506.15969)
// drives `mask`.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "kv/events.hpp"
#include "kv/export_key.hpp"
#include "kv/index.hpp"
#include "kv/runs.hpp"
#include "kv/stats.hpp"
#include "kv/types.hpp"
#include "pyruntime/kv.h"

namespace pyruntime::kv {

// What a swap engine implements. Called by the pool's owner thread inside a commit phase, so
// neither may fail, throw or call the pool back.
class Tiers {
 public:
  virtual ~Tiers() = default;
  // The node's cached block is about to be handed to somebody else. True: keep the node, it has a
  // copy below or will have one; the block's bytes may be read until the step that evicted it
  // writes (StepResult::evicted lists it), or longer if pin_blocks was called in time (not here).
  virtual bool evicting(uint32_t group, NodeId node, BlockId block) noexcept = 0;
  // The node is about to be removed; its tier slots are to be released.
  virtual void removed(NodeId node) noexcept = 0;
};

// What a score function sees, and the function: the C ABI's own, see pyruntime/kv.h.
using Candidate = pyrt_kv_candidate;
using ScoreFunction = pyrt_kv_score;

struct Match {
  uint32_t blocks = 0;  // leading blocks that every group can serve from the device
  uint32_t lower = 0;   // further blocks whose nodes have a copy in a lower tier or on the device
};

using BlockCopy = pyrt_kv_copy;     // in all layers of the group, before the step's writes
using Eviction = pyrt_kv_eviction;  // the node lives on only if a tier kept it

struct Move {  // slots of one sequence, block * block_size + offset; read all, then write all
  uint32_t group;
  uint64_t from;
  uint64_t to;
};

struct Admission {
  uint32_t space = 0;
  const int32_t* tokens = nullptr;
  uint32_t num_tokens = 0;
  uint32_t room = 0;     // tokens to hold blocks for at once; more than what is cached
  uint32_t reserve = 0;  // tokens promised
  SeqHandle seq = 0;     // out
  uint32_t cached = 0;   // out: leading tokens in memory already; at least one is left to compute
};

struct Growth {
  SeqHandle seq = 0;
  uint32_t tokens = 0;  // to hold after the step
};

struct StepOps {
  std::span<const SeqHandle> frees;
  std::span<const Growth> trims;    // rejected drafts: `tokens` are left
  std::span<const Growth> grows;    // in order of priority
  std::span<Admission> admissions;  // behind all of them
  bool prefix = false;              // grow and admit as many as fit, in order; else all or nothing
  bool keep_promises = false;       // admissions leave room for what others were promised
  bool attempt = false;             // a refusal is not counted: another try follows
  bool pins_end = false;            // a dry step as if all pins had ended (retention.hpp)
};

struct StepResult {
  uint32_t num_grown = 0;
  uint32_t num_admitted = 0;
  bool never_fits = false;        // one of them exceeds the pool by itself
  int64_t left[kMaxGroups] = {};  // blocks free or evictable afterwards; negative: the deficit
  uint32_t need[kMaxGroups] = {};
  std::vector<BlockCopy> copies;
  std::vector<Eviction> evicted;
};

class BlockPool {
 public:
  explicit BlockPool(const Options& options);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  const Options& options() const { return options_; }
  uint32_t num_groups() const { return num_groups_; }
  uint32_t max_blocks() const { return max_blocks_; }

  // Namespaces: equal salts give the same one. Nothing is ever shared between two.
  uint32_t open_space(const void* salt, size_t bytes);

  // Sequences. All throw PYRT_ESTATE for a handle that is not, or no longer, one.
  SeqHandle open(uint32_t space);  // PYRT_EFULL: max_seqs
  // Takes the leading blocks that are in memory into an empty sequence; returns their tokens.
  uint32_t admit(SeqHandle seq, const int32_t* tokens, uint32_t n, uint32_t reserve);
  // A sequence with the same content; the partial last block is copied when either writes it. With
  // `published_only` it holds just the published blocks: a pin against eviction until it is freed.
  SeqHandle fork(SeqHandle parent, bool published_only);
  void free(std::span<const SeqHandle> seqs);  // all or none; duplicates are PYRT_ESTATE
  void trim(SeqHandle seq, uint32_t tokens);
  // The first `tokens` are valid in `layers` layers. `ids` begins with them, or is null: then what
  // was not told before stays unpublished.
  void commit(SeqHandle seq, uint32_t tokens, uint32_t layers, const int32_t* ids, uint32_t n);
  // Published blocks of the first `tokens` are kept until `uses` further sequences held and
  // released them, then go first.
  void plan(SeqHandle seq, uint32_t tokens, uint32_t uses);
  // Drops tokens inside a sequence: bit i of `keep` is token i. Blocks without a kept token are
  // released and leave a hole; with `moves`, kept tokens are packed instead, from the first
  // dropped one on. Nothing behind the first dropped token is published from then on. Returns the
  // tokens held afterwards.
  uint32_t mask(SeqHandle seq, const uint64_t* keep, uint32_t tokens, std::vector<Move>* moves);

  // Tokens in memory for a prompt, without taking anything; `nodes` (may be null) receives the
  // nodes of Match::blocks + Match::lower.
  Match match(uint32_t space, const int32_t* tokens, uint32_t n, std::vector<NodeId>* nodes);

  // One scheduler step; see StepOps. False: not everything fitted, `result` says by how much, and
  // (unless ops.prefix) nothing has changed. `dry` never changes anything.
  bool step(const StepOps& ops, StepResult& result, bool dry);

  // Tables and lengths.
  uint32_t blocks(SeqHandle seq) const { return seqs_[slot_of(seq)].blocks; }
  uint32_t held(SeqHandle seq) const { return hot_[slot_of(seq)].held; }
  uint32_t valid(SeqHandle seq) const { return hot_[slot_of(seq)].valid; }
  uint32_t published(SeqHandle seq) const { return seqs_[slot_of(seq)].published; }
  const int32_t* row(uint32_t group, SeqHandle seq) const {
    return groups_[group].rows.data() + size_t{slot_of(seq)} * stride_;
  }
  bool alive(SeqHandle seq) const;
  // The latest commit in fewer layers than all: tokens, layers.
  std::pair<uint32_t, uint32_t> partial(SeqHandle seq) const {
    const Sequence& s = seqs_[slot_of(seq)];
    return {s.layered, s.layers};
  }
  uint32_t blocks_for(uint64_t tokens) const {
    return static_cast<uint32_t>((tokens + options_.block_size - 1) / options_.block_size);
  }

  // Blocks that are free, reserved as room to grow, or cached: what a step can have at most.
  uint32_t available(uint32_t group) const;
  bool fits(uint32_t tokens) const;

  void set_policy(Policy policy, ScoreFunction score, void* user);
  // After a failed check: nothing is found any more and nothing published, the rest goes on.
  void close_index() noexcept { options_.sharing = false, index_closed_ = true; }
  bool index_closed() const noexcept { return index_closed_; }
  // Forgets all content that no sequence holds.
  void clear();

  // Tiers.
  void set_tiers(Tiers* tiers) { tiers_ = tiers; }
  bool has_tiers() const { return tiers_ != nullptr; }
  // While pinned a block is neither evicted nor reused, whoever frees it: copies in flight.
  void pin_blocks(uint32_t group, std::span<const BlockId> blocks);
  void unpin_blocks(uint32_t group, std::span<const BlockId> blocks);
  // Blocks for content that comes back, owned by the caller (evicting if need be); all or none.
  bool take_blocks(uint32_t group, std::span<BlockId> out, std::vector<Eviction>* evicted);
  void give_blocks(uint32_t group, std::span<const BlockId> blocks);
  // The caller's block becomes the node's in this group, visible to lookups at once.
  void attach(NodeId node, uint32_t group, BlockId block);
  // A node for content known from elsewhere, without a block; the one that exists already if so.
  // kNoNode when there is no room for nodes.
  NodeId import(NodeId parent, const int32_t* tokens);
  NodeId root(uint32_t space) const { return roots_[space]; }
  // To be called when a tier gave up its copy (Node::tier is kNone again).
  void release(NodeId node);
  // The next `n` nodes to be evicted from a group, in order: for writing back ahead of time.
  uint32_t oldest(uint32_t group, std::span<NodeId> out) const;
  // Swapped out: the sequence gives up all blocks but keeps its lengths; `unpark` (after a step
  // made room: it needs `blocks` of each group less holes) gives it private ones again.
  void park(SeqHandle seq);
  bool parked(SeqHandle seq) const;
  uint32_t parked_blocks(SeqHandle seq, uint32_t group) const;  // what it needs
  void unpark(SeqHandle seq, std::vector<Eviction>* evicted);

  const Node& node(NodeId id) const { return nodes_[id]; }
  Node& node(NodeId id) { return nodes_[id]; }
  bool is_node(NodeId id) const;
  const GroupNode& group_node(uint32_t group, NodeId id) const { return groups_[group].nodes[id]; }
  const int32_t* tokens(NodeId id) const {
    return tokens_.data() + size_t{id} * options_.block_size;
  }
  NodeId owner(uint32_t group, BlockId block) const { return groups_[group].owner[block]; }

  // Inspection.
  const EventRing& events() const { return events_; }
  const Event& event(uint64_t sequence) noexcept;             // with its key
  size_t announced(uint8_t* keys, size_t capacity) noexcept;  // keys of all content announced
  Stats& stats() { return stats_; }
  void fill(pyrt_kv_statistics& statistics) const noexcept;
  void check() const;           // throws PYRT_ECORRUPT
  uint64_t state_hash() const;  // of everything a caller can observe, eviction order included
  std::string picture(uint32_t group, uint32_t width) const;
  uint64_t promised() const { return promised_; }
  // Test hooks.
  void fail_at(int64_t n) { fail_countdown_ = n; }
  void collide_for_test() { index_.collide_for_test(); }

  friend class Batch;

 private:
  // What a decode step touches of every sequence; the rest is in Sequence.
  struct Hot {
    uint32_t generation;
    uint32_t held;   // tokens there is room for
    uint32_t valid;  // leading tokens valid in all layers
    uint16_t fill;   // known tokens of the open block, entry `published`; they are in tails_
    uint16_t flags;  // SequenceFlags
  };
  struct Sequence {
    uint32_t space;
    NodeId tip;          // node of the last settled entry, or the namespace's root
    uint32_t blocks;     // table entries
    uint32_t published;  // leading entries that are settled
    uint32_t promised;   // blocks
    uint32_t layers;     // done of `layered` tokens (layered prefill)
    uint32_t layered;
    uint32_t plan_blocks;  // leading entries whose nodes get plan_uses when they are made
    uint32_t plan_uses;
    uint32_t next_free;  // slot + 1
    uint32_t mark;       // epoch of the plan that has seen it
    uint32_t trim_to;    // by the plan that is being made, if `trimmed`
    bool trimmed;
  };
  enum SequenceFlags : uint16_t {
    kOpen = 1,
    kStopped = 2,  // publishes no more: unknown tokens or a hole
    kParked = 4,
    kShares = 8,    // its entry that is written next may be shared: copy first
    kTouched = 16,  // changed outside a Batch since the batch last looked
  };
  // A sequence's reservation in one group, linked (lazily) into a list of its size class.
  struct Room {
    BlockId begin;
    uint32_t count;
    uint32_t prev, next;  // slot + 1
    uint32_t bin;         // list it is in + 1
    uint32_t released;    // leading entries the window has left behind
  };
  static constexpr uint32_t kBins = 12;
  static constexpr int32_t kParkedEntry = -2;  // of a sequence that is swapped out: had a block

  struct Group {
    GroupOptions options;
    Array<GroupNode> nodes;
    Array<NodeId> owner;
    Array<uint32_t> shared;
    Array<int32_t> rows;
    Array<Room> rooms;
    Array<uint32_t> node_drops, block_drops, node_takes;  // scratch of plans, all zero between them
    Runs runs;
    uint32_t listed = 0;            // blocks in the eviction lists
    uint32_t protected_listed = 0;  // of them in the second segment
    uint32_t reserved = 0;
    uint32_t bins[kBins] = {};  // slot + 1
    uint64_t pins = 0;          // holders in `shared` beyond the first of a block without a node
    Array<uint16_t> external;   // per block: holders that pin_blocks and take_blocks stand for
  };

  uint32_t slot_of(SeqHandle seq) const;  // throws PYRT_ESTATE
  int32_t* row_of(Group& group, uint32_t slot) { return group.rows.data() + slot * stride_; }
  const int32_t* row_of(const Group& group, uint32_t slot) const {
    return group.rows.data() + slot * stride_;
  }
  NodeId* node_row_of(uint32_t slot) { return node_rows_.data() + slot * stride_; }
  const NodeId* node_row_of(uint32_t slot) const { return node_rows_.data() + slot * stride_; }
  void checkpoint();  // an internal step of a plan: throws PYRT_ENOMEM when fail_at says so

  // prefix.cpp
  uint32_t walk(NodeId root, const int32_t* tokens, uint32_t blocks, NodeId* out) const noexcept;
  uint32_t resident(const NodeId* nodes, uint32_t count) const noexcept;
  void acquire(uint32_t slot, const NodeId* nodes, uint32_t count) noexcept;
  NodeId find_child(NodeId parent, uint64_t key, const int32_t* tokens) const noexcept;
  bool settle(uint32_t slot, uint64_t key, const int32_t* tokens) noexcept;
  void publish(uint32_t slot, const int32_t* ids, uint32_t n) noexcept;
  void stop(uint32_t slot) noexcept;
  void slide_windows(uint32_t slot) noexcept;
  void set_tip(uint32_t slot, NodeId node) noexcept;

  // eviction.cpp
  NodeId make_node(NodeId parent, uint64_t key, const int32_t* tokens) noexcept;
  void remove_if_unused(NodeId node) noexcept;
  void list(Group& group, NodeId node, bool spent) noexcept;
  void unlist(Group& group, NodeId node) noexcept;
  void hold(Group& group, NodeId node) noexcept;
  void unhold(Group& group, NodeId node) noexcept;
  void attach_block(Group& group, NodeId node, BlockId block) noexcept;
  void share(Group& group, BlockId block) noexcept;
  bool unshare(Group& group, BlockId block) noexcept;  // true: the block is free now
  BlockId evict_node(uint32_t group, NodeId node, std::vector<Eviction>* evicted) noexcept;
  void evict(uint32_t group, uint32_t n, BlockId* out, std::vector<Eviction>* evicted) noexcept;
  uint32_t candidates(Group& group, uint32_t n, NodeId* out) noexcept;
  static uint32_t oldest_in(const Group& group, std::span<NodeId> out) noexcept;
  uint32_t rate(Group& group, NodeId* ids, uint32_t count) noexcept;
  void export_key(NodeId node) noexcept;
  bool chain_known(NodeId node, bool resumable) const noexcept;
  void announce(NodeId node, EventType type, Reason reason) noexcept;

  // allocate.cpp
  void take(uint32_t group, uint32_t slot, uint32_t n, std::vector<Eviction>* evicted) noexcept;
  BlockId take_loose(uint32_t group, std::vector<Eviction>* evicted) noexcept;
  // Where evictions are noted: only tiers want to know, and only for them room was made.
  std::vector<Eviction>* evictions(StepResult& result) const noexcept {
    return tiers_ != nullptr ? &result.evicted : nullptr;
  }
  void set_room(Group& group, uint32_t slot, BlockId begin, uint32_t count) noexcept;
  void drop_room(Group& group, uint32_t slot) noexcept;
  bool halve_a_room(Group& group) noexcept;
  void bin(Group& group, uint32_t slot) noexcept;
  void unbin(Group& group, uint32_t slot) noexcept;
  void grow(uint32_t slot, uint32_t tokens, StepResult& result) noexcept;
  void copy_on_write(uint32_t slot, StepResult& result) noexcept;
  uint32_t copies_for(uint32_t group, uint32_t slot) const noexcept;

  // block_pool.cpp
  SeqHandle handle_of(uint32_t slot) const { return SeqHandle{hot_[slot].generation} << 32 | slot; }
  static uint32_t owed(const Sequence& s) {
    return s.promised > s.blocks ? s.promised - s.blocks : 0;
  }
  void touch(uint32_t slot) noexcept {  // batches look at it again
    hot_[slot].flags |= kTouched;
    ++touches_;
  }
  uint32_t open_slot(uint32_t space) noexcept;
  void close_slot(uint32_t slot) noexcept;
  void promise(uint32_t slot, uint32_t blocks) noexcept;
  void release_entries(uint32_t slot, uint32_t from) noexcept;
  void release_entry(Group& group, uint32_t slot, uint32_t at) noexcept;
  void check_trim(uint32_t slot, uint32_t tokens) const;
  void trim_slot(uint32_t slot, uint32_t tokens) noexcept;

  // mask.cpp, tiers.cpp
  void cut_chain(uint32_t slot, uint32_t at) noexcept;
  uint32_t group_of(uint32_t group) const;  // throws PYRT_EINVAL
  void take_many(uint32_t group, std::span<BlockId> out, std::vector<Eviction>* evicted);

  // check.cpp
  void check_group(uint32_t group) const;
  void check_nodes() const;
  void check_sequences() const;

  // step.cpp
  void next_epoch() noexcept;
  void validate(const StepOps& ops);
  void plan_growth(uint32_t slot, uint32_t tokens, uint32_t valid, int64_t* need);
  uint32_t plan_admission(const Admission& admission, size_t at, int64_t* need);
  void count_drops(uint32_t slot, uint32_t from, int64_t* gains) noexcept;
  void clear_drops(uint32_t slot, uint32_t from) noexcept;
  bool would_be_cached(const Group& group, NodeId node, uint32_t taken) const noexcept;
  uint32_t first_seen(uint32_t group, uint32_t found) const noexcept;

  // Numbers that change in no call begin; then what they size.
  Options options_;
  bool index_closed_ = false;
  uint32_t num_groups_;
  uint32_t max_blocks_;
  size_t stride_;
  uint32_t max_nodes_;
  Group groups_[kMaxGroups];

  Index index_;
  Array<Node> nodes_;
  Array<int32_t> tokens_;
  Array<NodeId> node_rows_;
  Array<Hot> hot_;
  Array<Sequence> seqs_;
  Array<int32_t> tails_;
  NodeId free_node_ = kNoNode;  // linked through Node::parent
  NodeId fresh_node_ = kFirstNode;
  uint32_t free_slot_ = 0;  // slot + 1
  uint32_t fresh_slot_ = 0;
  uint32_t num_open_ = 0;
  uint64_t promised_ = 0;
  uint32_t stamp_ = 0;
  uint32_t epoch_ = 0;
  uint64_t touches_ = 0;       // changes to sequences outside a batch
  uint64_t active_batch_ = 0;  // that advanced last
  uint64_t batches_ = 0;

  std::unordered_map<std::string, uint32_t> spaces_;
  std::vector<NodeId> roots_;

  Policy policy_ = Policy::lru;
  ScoreFunction score_ = nullptr;
  void* score_user_ = nullptr;
  Tiers* tiers_ = nullptr;
  EventRing events_;
  std::vector<KeyChain> chains_;  // per namespace, where there are events
  Array<ShaState> states_;        // per node, valid if kHasExportKey
  std::vector<NodeId> path_;
  Stats stats_;
  int64_t fail_countdown_ = -1;

  // Scratch of one call.
  std::vector<NodeId> walked_;  // max_blocks
  std::vector<BlockId> victims_;
  std::vector<NodeId> hits_, taken_;  // of a step's admissions
  std::vector<uint32_t> found_;
  std::vector<std::pair<uint32_t, BlockId>> copied_;  // group, block
  uint32_t trim_epoch_ = 0;
};

}  // namespace pyruntime::kv
