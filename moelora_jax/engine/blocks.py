"""The blocks of the KV cache: who holds them, and what the free ones still contain.

A block that is full and whose tokens are known is remembered under a key: a hash of its tokens, of
all tokens before them, and of the weights that computed them. A later sequence that begins alike
takes the same block instead of computing it again. Nobody writes to such a block any more.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np


def block_keys(parent: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Keys of the full blocks of some tokens.

    Args:
        parent: key of the block before them, or of the weights where there is none.
        tokens: token ids; those after the last full block are left out.
        block_size: tokens per block.
    """
    raw = np.asarray(tokens, np.int32).tobytes()
    size = block_size * 4
    keys = []
    for start in range(0, len(raw) - size + 1, size):
        # 256 bits: nobody can make another prompt that has the same key.
        parent = blake2b(parent + raw[start : start + size], digest_size=32).digest()
        keys.append(parent)
    return keys


class BlockPool:
    """Hands out cache blocks and counts their users.

    Block 0 is never given out: padding tokens write there.

    Args:
        total: blocks of the cache, block 0 included.
    """

    def __init__(self, total: int) -> None:
        self.total = total - 1
        self._users = [0] * total
        self._empty = list(range(total - 1, 0, -1))  # used from the end: low blocks first
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered and unused, oldest first

    @property
    def num_free(self) -> int:
        """Blocks that :meth:`allocate` can give out, remembered ones included."""
        return len(self._empty) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.total - self.num_free

    @property
    def num_remembered(self) -> int:
        """Blocks that can be found by their key, in use or not."""
        return len(self._block_of_key)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, at most ``num_free``; contents longest unused are forgotten."""
        assert count <= self.num_free, f"{count} blocks of {self.num_free}"
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of_key[self._key_of_block.pop(block)]
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Take the remembered blocks of the leading keys, as far as there are any."""
        blocks = []
        for key in keys:
            block = self._block_of_key.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._users[block] += 1
            blocks.append(block)
        return blocks

    def remember(self, block: int, key: bytes) -> None:
        """From now on ``block``, which is in use and complete, can be found by its key."""
        assert self._users[block], f"block {block} is not in use"
        if key not in self._block_of_key and block not in self._key_of_block:
            self._block_of_key[key] = block
            self._key_of_block[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give back the blocks of a sequence, in its order; the last ones are forgotten first."""
        for block in reversed(blocks):
            assert self._users[block], f"block {block} is not in use"
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._key_of_block:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def forget(self) -> None:
        """Forget all contents; blocks in use stay in use."""
        self._empty.extend(reversed(self._idle))
        self._idle.clear()
        self._block_of_key.clear()
        self._key_of_block.clear()

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the books agree with the blocks that sequences hold."""
        users = [0] * (self.total + 1)
        for blocks in held:
            for block in blocks:
                users[block] += 1
        assert users == self._users
        assert users[0] == 0
        unused = [block for block in range(1, self.total + 1) if not users[block]]
        assert sorted([*self._empty, *self._idle]) == unused
        assert all(block in self._key_of_block for block in self._idle)
        assert {block: key for key, block in self._block_of_key.items()} == self._key_of_block
