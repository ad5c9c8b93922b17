"""What names a repository of the hub and what it holds: references as users type them, listings as hubs state them.

Both are checked here before they become a part of an address or of a path. Pure: nothing is fetched or read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import unquote

from ltxpack.errors import UsageError
from ltxpack.materialize.hub.errors import Place, not_understood

REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
REFERENCE = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<file>.+))?")
REVISION_FORBIDDEN = re.compile(r"[\s~^:?*\[\\]|\.\.|@\{|^-|\.lock$")
WEB_ADDRESS = re.compile(r"https?://[^/]+/(?P<repo>[^/?#]+/[^/?#]+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LONGEST_NAME = 1024
LONGEST_PART = 255
LARGEST_FILE = 2**63 - 1
SIMILAR_NAMES = 5


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository: ``size`` in bytes; ``sha256`` as the hub states it, for large files only."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class RepoInfo:
    """A repository at one commit.

    ``revision`` is the branch or tag that was asked for, None for the main branch. ``cached_only``: read from the hub
    cache, so ``files`` may not be all there are.
    """

    repo: str
    commit: str
    files: Mapping[str, RepoFile]
    revision: str | None = None
    cached_only: bool = False


class Reference(NamedTuple):
    """``ORG/NAME[@REV][/FILE]``."""

    repo: str
    revision: str | None
    file: str | None


def parse_reference(text: str) -> Reference:
    """``ORG/NAME[@REV][/FILE]`` taken apart.

    A revision is a branch, tag, commit or ``refs/pr/N``; a slash in a branch's name is written ``%2F``. Raises
    UsageError.
    """
    match = REFERENCE.fullmatch(text)
    if match is None:
        address = WEB_ADDRESS.match(text)
        raise UsageError(
            "is not a reference to a repository of the hub",
            file=text,
            expected="ORG/NAME, ORG/NAME@REVISION or ORG/NAME/FILE",
            next=f"write {address['repo']}" if address else "write it like Lightricks/LTX-2.3",
        )
    revision = None if match["revision"] is None else unquote(match["revision"])
    check_request(match["repo"], revision)
    if match["file"] is not None and not is_safe_name(match["file"]):
        raise UsageError("is not the name of a file in a repository", file=match["file"], next=f"correct {text}")
    return Reference(match["repo"], revision, match["file"])


def check_request(repo: str, revision: str | None) -> None:
    """Raises UsageError unless both can stand in an address and name a folder of the cache."""
    parts = repo.split("/")
    plain = len(parts) == 2 and all(REPO_PART.fullmatch(part) for part in parts)
    if not plain or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise UsageError(
            "is not the name of a repository of the hub",
            file=repo,
            expected="ORG/NAME of letters, digits, '-', '_' and '.'",
            next="write it like Lightricks/LTX-2.3",
        )
    if revision is not None and (not is_safe_name(revision) or REVISION_FORBIDDEN.search(revision)):
        raise UsageError(
            "is not a revision", file=revision, expected="a branch, tag or commit", next=f"correct the one of {repo}"
        )


def is_safe_name(name: object) -> bool:
    """Whether ``name`` is a relative path of plain parts: nothing that leads out of a folder or upsets a terminal."""
    return (
        isinstance(name, str)
        and len(name) <= LONGEST_NAME
        and name.isprintable()
        and "\\" not in name
        and all(part not in ("", ".", "..") and len(part.encode()) <= LONGEST_PART for part in name.split("/"))
    )


def read_listing(model: Any, place: Place) -> RepoInfo:
    """The hub's description of a repository (huggingface_hub's ``ModelInfo``), checked; SourceError if it is unsound.

    Its owner writes it: names that lead out of a folder, impossible sizes and hashes, and double names are refused.
    """
    if not isinstance(model.sha, str) or not COMMIT.fullmatch(model.sha):
        raise not_understood(place, "the repository has no commit")
    if model.siblings is None:
        raise not_understood(place, "no list of files")
    files: dict[str, RepoFile] = {}
    for sibling in model.siblings:
        file = _read_file(sibling, place)
        if file.name in files:
            raise not_understood(place, f"two files named {file.name}")
        files[file.name] = file
    return RepoInfo(place.repo, model.sha, MappingProxyType(files), place.revision)


def similar_names(name: str, names: list[str]) -> list[str]:
    """Of ``names`` those like ``name``, and those that hold its last part (in another folder, with another ending)."""
    last = name.rsplit("/", 1)[-1].lower()
    close = difflib.get_close_matches(name, names, SIMILAR_NAMES, 0.6)
    return list(dict.fromkeys([*close, *(other for other in names if last in other.lower())]))[:SIMILAR_NAMES]


def _read_file(sibling: Any, place: Place) -> RepoFile:
    name, large = sibling.rfilename, sibling.lfs
    if not is_safe_name(name):
        raise not_understood(place, f"a file named {str(name)[:LONGEST_PART]!r}")
    sizes = [sibling.size, large.size] if large else [sibling.size]
    if any(type(size) is not int or not 0 <= size <= LARGEST_FILE for size in sizes) or len(set(sizes)) > 1:
        raise not_understood(place, f"{name} has the size {str(sizes)[:LONGEST_PART]}")
    if large and not (isinstance(large.sha256, str) and SHA256.fullmatch(large.sha256)):
        raise not_understood(place, f"{name} has the sha256 {str(large.sha256)[:LONGEST_PART]!r}")
    return RepoFile(name, sibling.size, large.sha256 if large else None)
