"""Where things lie, as it may be shown and kept: a URL without user names, passwords, tokens and query strings."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote

_URL: Final = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(?:[^/?#]*@)?([^?#]*)", re.DOTALL)
# fsspec chains protocols: "zip://weights.pt::https://user:password@host/archive.zip".
_LINK: Final = re.compile(r"::(?=[a-zA-Z][a-zA-Z0-9+.-]*(?:::|://))")
_SHORTEST: Final = 3


def public(location: str) -> str:
    """A location without user names, passwords, tokens and query strings; a path stays as it is."""
    return "::".join(_public_link(link) for link in _LINK.split(location))


def sibling(url: str, name: str) -> str:
    """The URL of another file of the same folder, asked for with the same user and query."""
    links = _LINK.split(url)
    at = next((i for i, link in enumerate(links) if "://" in link), 0)
    folder, last = re.match(r"([^?#]*/)?(.*)", links[at], re.DOTALL).groups()  # type: ignore[union-attr]
    web = folder.lower().startswith(("http://", "https://"))
    links[at] = folder + (quote(name) if web else name) + last[len(re.split("[?#]", last)[0]) :]
    return "::".join(links)


def scrub(text: str, url: str) -> str:
    """What another library said, without anything of `url` that is secret, on one line."""
    text = re.sub(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>]+", lambda found: public(found[0]), text)
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, "***")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _public_link(link: str) -> str:
    match = _URL.match(link)
    return f"{match[1]}://{match[2]}" if match else link


def _secrets(url: str) -> set[str]:
    found: set[str] = set()
    for link in _LINK.split(url):
        _, _, rest = link.partition("://")
        address, _, query = rest.partition("?")
        found.add(query)
        found.update(part.partition("=")[2] for part in query.split("&"))
        user, at, _ = address.partition("/")[0].rpartition("@")
        if at:
            found.update((user, *user.split(":", 1)))
    found |= {unquote(secret) for secret in found}
    return {secret for secret in found if len(secret) >= _SHORTEST}
