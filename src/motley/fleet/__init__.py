"""What hardware there is, measured rather than read from a data sheet."""

from motley.fleet.probe import Machine, MatmulRate, best_device, describe, probe

__all__ = ["Machine", "MatmulRate", "best_device", "describe", "probe"]
