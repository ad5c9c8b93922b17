"""The runtime half: reads the manifest and tensors of an overlay; knows no vendor key names and no LoRA files."""
