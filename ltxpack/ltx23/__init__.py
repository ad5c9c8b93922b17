"""LTX-2.3 as data for both halves: configs, tensors, renames, published files.

A generation of the model is one folder.
"""
