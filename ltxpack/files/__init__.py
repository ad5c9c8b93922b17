"""Bytes on a disk, knowing no names of ours: safetensors headers, bounded JSON, reads past the page cache, links."""
