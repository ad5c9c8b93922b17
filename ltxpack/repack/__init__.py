"""The offline copy: shard assignment, streaming byte-range copy, verification."""
