"""Names for the contents of KV-cache blocks: a keyed hash chain over token ids.

A block's keys and values depend on its own tokens and on all before them, so its hash covers the
hash of the block before it:

    key   = BLAKE2b(model, cache format, salt)
    h(i)  = BLAKE2b(key, h(i-1) | tokens of block i as little-endian uint32)      h(-1) = zeros

The key makes the chains of two models, two cache formats or two tenants unrelated: whoever does
not know the salt can neither compute another's hashes nor construct a collision with them.
BLAKE2b: RFC 7693.
"""

from __future__ import annotations

from hashlib import blake2b

from wire.ids import BlockHash, TokenIds, token_ids_to_bytes

HASH_BYTES = 16
_TOKEN_BYTES = 4
_NO_PARENT = BlockHash(bytes(HASH_BYTES))


class PrefixHasher:
    """Computes block hashes for one model, cache format and salt.

    `cache_format` names all that changes a block's bytes for the same tokens (element type, block
    layout) and must not depend on the tensor-parallel size.
    """

    def __init__(self, *, model: str, cache_format: str, salt: bytes, block_size: int) -> None:
        key = blake2b(digest_size=32)
        for part in (model.encode(), cache_format.encode(), salt):
            key.update(len(part).to_bytes(8, "little") + part)
        self._block_bytes = block_size * _TOKEN_BYTES
        # Copying a keyed state is cheaper than absorbing the key again for each block.
        self._keyed = blake2b(key=key.digest(), digest_size=HASH_BYTES)

    def hash_blocks(self, tokens: TokenIds, parent: BlockHash | None = None) -> list[BlockHash]:
        """The hash of each full block of `tokens`, a rest that fills no block left out.

        `parent` is the hash of the block before the first of them, None at a sequence's start.
        """
        data = memoryview(token_ids_to_bytes(tokens))
        last = _NO_PARENT if parent is None else parent
        hashes: list[BlockHash] = []
        for end in range(self._block_bytes, len(data) + 1, self._block_bytes):
            state = self._keyed.copy()
            state.update(last)
            state.update(data[end - self._block_bytes : end])
            last = BlockHash(state.digest())
            hashes.append(last)
        return hashes
