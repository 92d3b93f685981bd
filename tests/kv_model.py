"""What the block pool must do, in lists and dicts."""

from collections import OrderedDict


class Model:
    """Content as tuples of tokens, sequences as lists of it, the eviction order as two lists."""

    def __init__(self, num_blocks, block_size, policy="lru"):
        self.num_blocks, self.size, self.policy = num_blocks, block_size, policy
        self.holders = {}  # content -> sequences that hold it
        self.idle = OrderedDict()  # content held by none, oldest first
        self.protected = OrderedDict()  # of the second segment, which goes after it
        self.hits = {}  # content -> admissions that found it
        self.live = {}  # seq -> [tokens, tokens held, entries: content or, private, None]
        self.chain = {}  # seq -> content it holds
        self.pins = {}  # pin -> (arrival, deadline, content)

    def private(self):
        return sum(e is None for _, _, entries in self.live.values() for e in entries)

    def listed(self):
        return len(self.idle) + len(self.protected)

    def available(self):
        return self.num_blocks - len(self.holders) + self.listed() - self.private()

    def cached(self, tokens):
        found = []
        for end in range(self.size, len(tokens), self.size):  # never the last token
            if tokens[:end] not in self.holders:
                break
            found.append(tokens[:end])
        return found

    def blocks(self, tokens):
        return -(-tokens // self.size)

    def hold(self, content):
        self.holders[content] += 1
        self.idle.pop(content, None)
        self.protected.pop(content, None)

    def release(self, chain):
        """The end of what a sequence held is the older."""
        for content in reversed(chain):
            self.holders[content] -= 1
            if self.holders[content]:
                continue
            if self.policy == "slru" and self.hits.get(content, 0):
                self.protected[content] = None
                while 4 * len(self.protected) > 3 * self.listed():
                    oldest, _ = self.protected.popitem(last=False)
                    self.hits[oldest] = 0
                    self.idle[oldest] = None
            else:
                self.idle[content] = None

    def evict(self):
        """Make room for what is held and cached together."""
        while len(self.holders) + self.private() > self.num_blocks:
            content, _ = (self.idle or self.protected).popitem(last=False)
            del self.holders[content]
            self.hits.pop(content, None)

    def clear(self):
        for content in [*self.idle, *self.protected]:
            del self.holders[content]
            self.hits.pop(content, None)
        self.idle.clear()
        self.protected.clear()

    def admit(self, seq, tokens):
        found = self.cached(tokens)
        for content in found:
            self.hold(content)
            self.hits[content] = self.hits.get(content, 0) + 1
        entries = found + [None] * (self.blocks(len(tokens)) - len(found))
        self.live[seq] = [tokens, len(tokens), entries]
        self.chain[seq] = found
        self.evict()
        return len(found) * self.size

    def need_to_admit(self, tokens):
        found = self.cached(tokens)
        taken = sum(not self.holders[content] for content in found)
        return self.blocks(len(tokens)) - len(found) + taken

    def grow(self, seq, tokens):
        entries = self.live[seq][2]
        entries += [None] * (self.blocks(len(tokens)) - len(entries))
        self.live[seq][:2] = [tokens, len(tokens)]
        self.evict()

    def commit(self, seq):
        tokens, held, entries = self.live[seq]
        for i in range(len(self.chain[seq]), held // self.size):
            content = tokens[: (i + 1) * self.size]
            if content not in self.holders:  # else a copy of its own, which stays private
                self.holders[content] = 0
                entries[i] = content
            self.hold(content)
            self.chain[seq].append(content)

    def free(self, seq):
        self.release(self.chain.pop(seq))
        del self.live[seq]

    # Pins

    def pin(self, pin, seq, arrival, deadline):
        self.pins[pin] = (arrival, deadline, list(self.chain[seq]))
        for content in self.chain[seq]:
            self.hold(content)

    def unpin(self, pin):
        self.release(self.pins.pop(pin)[2])

    def latest(self):
        """Pins, those of the programs that arrived last first."""
        return sorted(self.pins, key=lambda pin: self.pins[pin][0], reverse=True)
