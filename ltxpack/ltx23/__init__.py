"""LTX-2.3 as data, read by both halves: configs, tensors, renames, published files. A generation is such a folder."""
