"""An update rule of one's own: SignSGD with momentum (Bernstein et al., 2018). It is an ordinary torch optimizer.

The script makes one, and ``downpour run --rule sign_rules:SignSGD`` has every shard run the same class on its part of
the model. What it keeps in ``self.state[parameter]``, tensors of the parameter's shape and numbers, is in checkpoints.
"""

from __future__ import annotations

import torch


class SignSGD(torch.optim.Optimizer):
    """m ← βm + (1−β)g; w ← w − lr · sgn(m). Element by element, so tensors may be cut.

    A rule that needs a whole tensor at a time (a norm, a product of matrices) says so with ``whole_tensors = True``.
    """

    whole_tensors = False

    def __init__(self, params: object, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["beta"])
                p.add_(state["momentum"].sign(), alpha=-group["lr"])
