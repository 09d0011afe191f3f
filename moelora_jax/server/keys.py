"""Who may do what: API keys, the admin key, and the adapters that a key may use."""

import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moelora_jax.errors import RequestError
from moelora_jax.server.errors import ApiError


@dataclass(frozen=True)
class Key:
    """What the bearer of a key may do.

    Attributes:
        digest: SHA-256 of the key; the key itself is not kept.
        name: for people.
        adapters: patterns as of a shell (``*``, ``?``) of the adapters that it may use; None for
            all of them.
        base: whether it may use the base model.
        admin: whether it may load and unload adapters.
    """

    digest: bytes
    name: str = ""
    adapters: tuple[str, ...] | None = None
    base: bool = True
    admin: bool = False

    def allows(self, adapter: str | None) -> bool:
        """Whether the key may use an adapter, or with None the base model."""
        if adapter is None:
            return self.base
        return self.adapters is None or any(fnmatchcase(adapter, p) for p in self.adapters)

    @property
    def unrestricted(self) -> bool:
        """Whether the key may see everything."""
        return self.admin or (self.base and self.adapters is None)


#: What everyone may do where no API key was configured.
EVERYONE = Key(b"", "everyone")


class Keys:
    """All keys of a server.

    Args:
        keys: of clients; if there are none, everyone may use all models.
        admin: may load and unload adapters, and do all that other keys may; without one nobody may.
    """

    def __init__(self, keys: Iterable[Key] = (), admin: str | None = None) -> None:
        self._open = True
        self._keys: list[Key] = []
        for key in keys:
            self._open = False
            self._keys.append(key)
        self.has_admin = admin is not None
        if admin is not None:
            self._keys.append(Key(digest(admin), "admin", admin=True))
        if len({key.digest for key in self._keys}) != len(self._keys):
            raise RequestError("the same key is configured twice; every key needs its own value")

    def client(self, authorization: str | None) -> Key:
        """The key of a request's ``Authorization`` header.

        Raises:
            ApiError: 401, it is missing or wrong.
        """
        key = self._find(authorization)
        if key is not None:
            return key
        if self._open:
            return EVERYONE
        raise _unauthorized("API key")

    def admin(self, authorization: str | None) -> None:
        """Checks that a request comes with the admin key.

        Raises:
            ApiError: 401, it is missing or wrong; 403, it is a client's, or there is none.
        """
        if not self.has_admin:
            raise ApiError(
                403,
                "this server does not load or unload adapters on request: start it with "
                "--admin-key and --adapter-root",
                "permission_denied",
            )
        key = self._find(authorization)
        if key is None:
            raise _unauthorized("admin key")
        if not key.admin:
            raise ApiError(
                403, "this needs the admin key; the given one is a client's", "permission_denied"
            )

    def _find(self, authorization: str | None) -> Key | None:
        scheme, _, value = (authorization or "").partition(" ")
        given = digest(value.strip()) if scheme.lower() == "bearer" else b""
        found = None
        for key in self._keys:  # All of them, so that the time tells nothing.
            if hmac.compare_digest(key.digest, given):
                found = key
        return found


def _unauthorized(kind: str) -> ApiError:
    return ApiError(
        401,
        f"missing or wrong {kind}: send it as 'Authorization: Bearer KEY'",
        "invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


_FIELDS = {"name", "key", "key_sha256", "adapters", "base"}


def read_keys(path: Path) -> list[Key]:
    """Read a file of API keys.

    The file is a JSON list with one object for each key::

        [
          {"name": "everything", "key": "sk-..."},
          {"name": "team a", "key_sha256": "9f86d0...", "adapters": ["french", "team-a-*"],
           "base": false}
        ]

    Raises:
        RequestError: naming the entry at fault, never a key.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise RequestError(f"{path}: not a readable JSON file: {cause}") from cause
    if not isinstance(values, list) or not values:
        raise RequestError(f"{path}: must be a list of at least one key")
    return [_key(f"{path}, key {number}", value) for number, value in enumerate(values, start=1)]


def _key(where: str, value: Any) -> Key:
    if not isinstance(value, dict):
        raise RequestError(f'{where}: must be an object, such as {{"name": "...", "key": "..."}}')
    if unknown := sorted(value.keys() - _FIELDS):
        known = ", ".join(sorted(_FIELDS))
        raise RequestError(f"{where}: unknown field {unknown[0]!r}; known are {known}")
    adapters, base, name = value.get("adapters"), value.get("base", True), value.get("name", "")
    if adapters is not None and not (
        isinstance(adapters, list) and all(isinstance(pattern, str) for pattern in adapters)
    ):
        raise RequestError(f"{where}: adapters must be a list of names or patterns")
    if not isinstance(base, bool) or not isinstance(name, str):
        raise RequestError(f"{where}: base must be true or false, and name a string")
    return Key(_digest_of(where, value), name, None if adapters is None else tuple(adapters), base)


def _digest_of(where: str, value: dict[str, Any]) -> bytes:
    if ("key" in value) == ("key_sha256" in value):
        raise RequestError(f"{where}: give either key or key_sha256")
    if "key" in value:
        if not isinstance(value["key"], str) or not value["key"].strip():
            raise RequestError(f"{where}: key must be a string that is not empty")
        return digest(value["key"])
    try:
        found = bytes.fromhex(value["key_sha256"])
    except (TypeError, ValueError):
        found = b""
    if len(found) != 32:
        raise RequestError(f"{where}: key_sha256 must be 64 hexadecimal digits")
    return found
