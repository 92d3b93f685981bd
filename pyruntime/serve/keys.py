"""API keys: who may send requests, on whose account, and how urgent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from pyruntime.errors import InvalidArgumentError

__all__ = ["ApiKeys", "Tenant"]


@dataclass(frozen=True)
class Tenant:
    """Whom a request is accounted to."""

    name: str = ""
    max_priority: int = 0


class ApiKeys:
    """Looks tenants up by key; without any key the server is open.

    Parameters
    ----------
    entries : iterable of str
        ``KEY``, ``KEY:TENANT`` or ``KEY:TENANT:MAX_PRIORITY``. The tenant's name defaults to a
        digest of the key. Only digests are kept.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._tenants: dict[bytes, Tenant] = {}
        for entry in entries:
            key, _, rest = entry.partition(":")
            name, _, priority = rest.partition(":")
            if not key:
                raise InvalidArgumentError("an API key must not be empty")
            try:
                limit = int(priority or 0)
            except ValueError:
                raise InvalidArgumentError(
                    f"the priority of tenant {name!r} must be an integer"
                ) from None
            digest = _digest(key)
            self._tenants[digest] = Tenant(name or digest.hex()[:12], limit)

    def tenant(self, authorization: str | None) -> Tenant | None:
        """Return the tenant of an ``Authorization`` header, None if it may not pass.

        Keys are compared by their digest, so the time taken tells nothing about them.
        """
        if not self._tenants:
            return Tenant()
        scheme, _, key = (authorization or "").partition(" ")
        return self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
