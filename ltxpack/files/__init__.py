"""Bytes on a disk, knowing no names of ours: headers, JSON, reads with several in flight, hashes, links, publishing."""
