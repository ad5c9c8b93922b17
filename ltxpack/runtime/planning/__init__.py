"""What a run needs of memory and disk, and which way of running fits a machine: arithmetic alone, without torch.

sizes: bytes of the parts, from headers · activations: bytes beside the weights · modes: from both, the plan for a
machine · machine: what card and host have free · commands: what to type to get there.
"""
