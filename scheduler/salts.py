"""Cache salts: prefixes are shared within a tenant, and invisible to all others."""

from __future__ import annotations

import hashlib
import os

from redis.asyncio import Redis

from wire.keys import LIVE_TTL_MS, Keys


class TenantSalts:
    """Salts derived from a secret of the fleet, which no client ever sees."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    async def shared(cls, client: Redis, keys: Keys) -> TenantSalts:
        """With the fleet's secret, which whichever scheduler comes first makes."""
        await client.set(keys.salt, os.urandom(32), px=LIVE_TTL_MS, nx=True)
        secret = await client.get(keys.salt)
        assert isinstance(secret, bytes)
        return cls(secret)

    def of(self, tenant: str) -> bytes:
        """The tenant's salt, 16 bytes."""
        return hashlib.blake2b(tenant.encode(), key=self._secret, digest_size=16).digest()
