"""``python -m ltxpack``."""

from ltxpack.cli import main

main()
