"""``stale-lr``: the learning rate over the staleness (Zhang, Gupta, Lian, Liu 2016, "Staleness-aware async-SGD").

η(t) = η / max(1, t − b). It is the rule's learning rate that is divided, not the gradient: Adam and its kind divide a
gradient's size out again. With momentum the whole step is shortened, what earlier gradients have left in it included.
"""

from __future__ import annotations

from downpour_server.compensation.plain import Plain


class StaleLearningRate(Plain):
    """See the module."""

    def lr_factor(self, staleness: int) -> float:
        """See :class:`downpour_server.compensation.Compensation`."""
        return 1.0 / max(1, staleness)
