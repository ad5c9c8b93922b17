"""What is on the device when, by a plan made before anything is loaded; :class:`Residency` is all the pipeline knows.

slots: blocks through two slots · offload: modules off the card and back · background: loading ahead ·
device: which one, and what it has free. The plan itself is made in ltxpack.runtime.planning.
"""

from ltxpack.runtime.residency.device import known_fault, machine_of, resolve_device
from ltxpack.runtime.residency.keeper import Residency

__all__ = ["Residency", "known_fault", "machine_of", "resolve_device"]
