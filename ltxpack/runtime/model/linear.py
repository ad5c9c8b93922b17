"""A linear layer without first values: its weights come from a file, and drawing some takes longer than all the rest
of building a model.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """``torch.nn.Linear``; off the meta device its weights are whatever the memory held."""

    def reset_parameters(self) -> None:
        """Nothing is drawn."""
