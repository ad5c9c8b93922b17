"""Environment variables that stop a library with a traceback if they are malformed.

:func:`set_aside` is for every command: it checks the variables that libraries read at import. :func:`network_fault` is
for commands that are about to use the network: it checks the variables that httpx reads for a client. Both leave values
in ``os.environ`` that the libraries can read.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

# Whole seconds. The libraries take no larger numbers, and fail at once with negative ones.
SECONDS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "DIFFUSERS_TIMEOUT_REMOTE_CODE")
LONGEST_SECONDS = 10**6
WHOLE_NUMBERS = ("TQDM_INITIAL", "TQDM_NCOLS", "TQDM_NROWS", "TQDM_POSITION", "TQDM_UNIT_DIVISOR")
NUMBERS = ("TQDM_DELAY", "TQDM_MAXINTERVAL", "TQDM_MININTERVAL", "TQDM_MINITERS", "TQDM_SMOOTHING", "TQDM_TOTAL")
NETWORK = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
ENDPOINT = "HF_ENDPOINT"
# Desktops' name of socks5, which httpx does not know.
SOCKS = "socks://"
LONGEST_SHOWN = 100


class VariableFault(NamedTuple):
    """An unusable variable: its value, the reason, and what to do."""

    variable: str
    value: str
    reason: str
    next: str


def set_aside() -> list[str]:
    """Remove the variables that stop the import of a library; returns a sentence about each that is not empty."""
    told = []
    for names, wanted, fits in (
        (SECONDS, f"a whole number of seconds from 0 to {LONGEST_SECONDS}", _is_seconds),
        (WHOLE_NUMBERS, "a whole number", _reads(int)),
        (NUMBERS, "a number", _reads(float)),
        ((ENDPOINT,), "an address", lambda value: value != "" and _reads(urlsplit)(value)),
    ):
        for name in names:
            value = os.environ.get(name)
            if value is not None and not fits(value):
                del os.environ[name]
                if value.strip():
                    told.append(f"{name} is not {wanted}, but {_shown(value)}: ltxpack uses the default")
    return told


def network_fault(warn: Callable[[str], None]) -> VariableFault | None:
    """The variable that stops every HTTP client, or None. Repairs what it can, and calls ``warn`` about it."""
    present = {name: value for name, value in os.environ.items() if name.upper() in NETWORK and value}
    for name, value in present.items():
        if value.startswith(SOCKS):
            present[name] = os.environ[name] = f"socks5://{value.removeprefix(SOCKS)}"
    if not present or _refusal(present) is None:
        return None
    for name, value in present.items():
        error = _refusal({name: value})
        if error is not None and name.upper() == "NO_PROXY":
            entries = [entry.strip() for entry in value.split(",")]
            kept = [entry for entry in entries if _refusal({name: entry}) is None]
            os.environ[name] = ",".join(kept)
            lost = ", ".join(entry for entry in entries if entry not in kept)
            warn(f"{name}: {_shown(lost)} is not understood by the HTTP library and left out")
        elif error is not None:
            return VariableFault(name, _shown(value), *_explained(error, name))
    return None


def endpoint_fault(endpoint: str) -> VariableFault | None:
    """The fault of the hub's address, which HF_ENDPOINT sets, or None."""
    if _is_address(endpoint):
        return None
    better = f"https://{endpoint}" if _is_address(f"https://{endpoint}") and "://" not in endpoint else "https://HOST"
    return VariableFault(ENDPOINT, _shown(endpoint), "not an address", f"write {ENDPOINT}={better}, or unset it")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # of the port, or of brackets
        return False
    return whole and text.isascii() and text.isprintable() and " " not in text


def _is_seconds(value: str) -> bool:
    return _reads(int)(value) and 0 <= int(value) <= LONGEST_SECONDS


def _reads(kind: Callable[[str], object]) -> Callable[[str], bool]:
    def reads(value: str) -> bool:
        try:
            kind(value)
        except ValueError:
            return False
        return True

    return reads


def _refusal(variables: dict[str, str]) -> Exception | None:
    """The error that httpx raises with ``variables`` in place of all that it reads, or None."""
    import httpx

    before = {name: value for name, value in os.environ.items() if name.upper() in NETWORK}
    try:
        for name in before:
            del os.environ[name]
        os.environ.update(variables)
        httpx.Client().close()
    except Exception as error:
        return error
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
    return None


def _explained(error: Exception, name: str) -> tuple[str, str]:
    """The reason, and what to do."""
    correct = f"correct {name} or unset it, then run the same command again"
    if "socksio" in str(error):
        return "a SOCKS proxy needs the Python package socksio", "pip install socksio"
    if isinstance(error, ssl.SSLError):
        return "the file holds no certificate", correct
    if isinstance(error, OSError):
        return error.strerror or str(error), correct
    return str(error).partition(" URL(")[0], correct


def _shown(value: str) -> str:
    """``value`` without a password in an address."""
    value = re.sub(r"//[^@/]*@", "//…@", value)
    return repr(value if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]}…")
