"""Secrets in addresses and commands, taken out of what is written down or shown.

    s3://KEY:SECRET@bucket/a.tar?X-Amz-Signature=5f...
      -> s3://***@bucket/a.tar?X-Amz-Signature=***
    pipe:curl -u me:password -H 'Authorization: Bearer x' https://host/a.tar
      -> pipe:curl -u *** -H 'Authorization: ***' ...

The one function for it: quarantine, events, warnings, the report and W&B all use it. It works on
any text, also on a library's error message that quotes an address, or only a part of it
(`redacted_error`). config.yaml of a run keeps what was given: a resumed run needs it.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_SCHEME = r"(?i)(\b[a-z][a-z0-9+.-]*://)"
_VALUE = r"('[^']*'|\"[^\"]*\"|[^\s'\",;&]+)"
_NAME = (
    r"[\w-]*(?:passw|secret|token(?![a-z])|credential|signature|api[-_]?key|access[-_]?key)[\w-]*"
)
_RULES = (
    # user:password@ of an address; the password may hold a slash, a port is no password
    re.compile(_SCHEME + r"[^\s/?#'\"<>]*(?=@)"),
    re.compile(_SCHEME + r"[^\s/:?#@'\"<>]+:(?!\d+(?:/|$))[^\s'\"<>]*(?=@)"),
    # a header or an option of a command, and a variable before it
    re.compile(r"(?i)(\bauthorization\s*[:=]\s*)[^'\"\n]+"),
    re.compile(r"((?:^|\s)(?:-u|--user|--proxy-user)(?:\s+|=))" + _VALUE),
    re.compile(rf"(?i)((?:^|[\s'\"`:;|&(]){_NAME}\s*[:=]\s*)" + _VALUE),
    re.compile(rf"(?i)((?:^|\s)--{_NAME}\s+)" + _VALUE),
)
# every value of a query or fragment: any may be a signature
_QUERY = re.compile(_SCHEME + r"([^\s?#'\"<>]*)([?#][^\s'\"<>]*)")
_QUERY_VALUE = re.compile(r"(?<==)[^&;#]+")
_QUERY_ALONE = re.compile(r"(?<=[?#])[^=&]+$")


def redacted(value: Any) -> Any:
    """The text, or the texts in lists and objects of JSON, without passwords, signatures and tokens
    of addresses.
    """
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    if not isinstance(value, str):
        return value
    for rule in _RULES:
        value = rule.sub(rf"\g<1>{HIDDEN}", value)
    return _QUERY.sub(_without_query_values, value)


def redacted_error(error: BaseException | str, address: str) -> str:
    """What a library says of an address, without the address's secrets.

    Libraries quote parts of an address without its scheme ('Invalid bucket name "KEY:SECRET@b"'),
    decoded or not, where `redacted` cannot know them: they are taken from the address itself.
    Shorten afterwards: of a secret that is cut off the rest would not be found.
    """
    text = str(error)
    for secret in _secrets(address):
        text = text.replace(secret, HIDDEN)
    return redacted(text)


def _secrets(address: str) -> list[str]:
    """The parts of an address that nobody may see, as given and decoded, the longest first."""
    after_scheme = address.partition("://")[2]
    place, mark, query = after_scheme.partition("?")
    found = []
    account, at, _ = place.rpartition("@")
    if at:
        found.append(account)
        password = account.partition(":")[2]
        found.append(password)
    if mark:
        found += _QUERY_VALUE.findall(query)
    decoded = [unquote(secret) for secret in found]
    # a letter or two stand in every message: hiding them would hide nothing and spoil the rest
    long_enough = {secret for secret in found + decoded if len(secret) > 3}
    return sorted(long_enough, key=len, reverse=True)


def _without_query_values(match: re.Match) -> str:
    query = _QUERY_ALONE.sub(HIDDEN, _QUERY_VALUE.sub(HIDDEN, match[3]))
    return match[1] + match[2] + query
