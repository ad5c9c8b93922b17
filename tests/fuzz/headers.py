"""The same targets under atheris, which looks for inputs that reach new code. Runs only where atheris is installed.

    python tests/fuzz/headers.py [--target NAME …] -max_total_time=60
    python tests/fuzz/headers.py [--target NAME …] crash-0123…        (tries one input again)

All other arguments are libFuzzer's. The first byte of an input chooses among the targets, the rest is the file.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    raise SystemExit("atheris is not installed: pip install atheris") from None

with atheris.instrument_imports(include=["ltxpack"]):
    import fuzz_targets
    from fuzz_mutations import mutate

# Instrumented code is several times slower.
fuzz_targets.SECONDS = 8.0


def main() -> None:
    """Fuzz until libFuzzer's own arguments end it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--target", action="append", default=[])
    stated, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="ltxpack-fuzz-") as folder:
        found = fuzz_targets.make_targets(Path(folder) / "files")
        unknown = sorted(set(stated.target) - set(found))
        if unknown:
            raise SystemExit(f"no such target: {', '.join(unknown)}; there are {', '.join(found)}")
        targets = [found[name] for name in stated.target or found]
        if not any(Path(argument).exists() for argument in arguments):
            arguments.append(str(write_corpus(Path(folder) / "corpus", targets)))

        def one_input(data: bytes) -> None:
            if data:
                targets[data[0] % len(targets)].attempt(data[1:])

        def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
            """Half of the time something that still is JSON."""
            if seed % 2 or not data:
                return bytes(atheris.Mutate(data, max_size))
            return (data[:1] + mutate(data[1:], random.Random(seed)))[:max_size]

        atheris.Setup([sys.argv[0], *arguments], one_input, custom_mutator=custom_mutator)
        atheris.Fuzz()


def write_corpus(folder: Path, targets: list[fuzz_targets.Target]) -> Path:
    """The valid files, each behind the byte that chooses its target."""
    folder.mkdir()
    for number, target in enumerate(targets):
        for i, seed in enumerate(target.seeds):
            (folder / f"{number}-{i}").write_bytes(bytes([number]) + seed)
    return folder


if __name__ == "__main__":
    main()
