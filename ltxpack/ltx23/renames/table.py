"""How a rename table is applied; it knows no names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RenameTable:
    """Renames of one component.

    ``roots`` maps a key prefix in the source to the prefix in the target (both end in ``.`` or are empty).
    ``paths`` maps a run of whole path components to another; the longest run that matches at a position wins.
    """

    roots: Mapping[str, str]
    paths: Mapping[str, str]

    def source_root(self, key: str) -> str | None:
        """The root that ``key`` lies under, or None if it is not this component's."""
        return max((root for root in self.roots if key.startswith(root)), key=len, default=None)

    def rename(self, key: str) -> str:
        """The target name of ``key``. Raises KeyError if it lies under no root."""
        root = self.source_root(key)
        if root is None:
            raise KeyError(key)
        parts = key[len(root) :].split(".")
        renamed: list[str] = []
        position = 0
        while position < len(parts):
            for length in range(min(self._longest, len(parts) - position), 0, -1):
                target = self.paths.get(".".join(parts[position : position + length]))
                if target is not None:
                    renamed.append(target)
                    position += length
                    break
            else:
                renamed.append(parts[position])
                position += 1
        return self.roots[root] + ".".join(renamed)

    def reverse(self) -> RenameTable:
        """The table that undoes this one."""
        return RenameTable(
            {target: source for source, target in self.roots.items()},
            {target: source for source, target in self.paths.items()},
        )

    @property
    def _longest(self) -> int:
        return max((path.count(".") + 1 for path in self.paths), default=0)
