"""CartPole's environments, network and evaluation, once for the two examples of reinforcement learning.

gymnasium's CartPole-v1 (Barto, Sutton, Anderson 1983): a pole on a cart, pushed left or right; a reward of 1 for every
step until it has fallen, 500 steps at most. It counts as solved at a mean return of 475.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

SOLVED = 475.0
EPISODES = 100
"""of an evaluation"""
GAMMA = 0.99
"""discount per step"""
REWARD = 1 - GAMMA
"""that the networks see for a step, in place of 1: what is to come is then worth 1 at most. Otherwise the values'
errors, which may be a hundred, decide alone how gradients are clipped, and the policy's steps with them."""
LEAST_STD = 0.1
"""the least standard deviation that advantages are divided by: ten steps' rewards. Once the pole stays up, they differ
by the values' errors alone, which would otherwise be blown up and move the policy as far as real mistakes do."""


class ActorCritic(nn.Module):
    """Policy and value network. Input: observations (..., 4). Output: logits (..., 2) and values (...)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.policy = perceptron(width, 2, last=0.01)
        self.value = perceptron(width, 1, last=1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(observations), self.value(observations).squeeze(-1)


def perceptron(width: int, outputs: int, last: float) -> nn.Module:
    """Two hidden layers; ``last`` scales the first weights of the output layer."""
    layers = [nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


@dataclass(frozen=True)
class Trajectory:
    """``T`` steps of ``n`` environments."""

    observations: Tensor
    """shape (T + 1, n, 4): before each step, and after the last"""
    actions: Tensor
    """int64 of shape (T, n)"""
    log_probs: Tensor
    """of the actions under the policy that took them, shape (T, n)"""
    rewards: Tensor
    """shape (T, n): :data:`REWARD` for a step, 0 where an episode begins"""
    ends: Tensor
    """bool of shape (T, n): the pole fell, so that nothing comes after"""
    cuts: Tensor
    """bool of shape (T, n): the episode is over, because the pole fell or after 500 steps"""
    valid: Tensor
    """bool of shape (T, n): false for the step in which an environment begins anew, whatever the action"""
    version: int
    """:func:`downpour.version` of the weights that acted"""

    @property
    def samples(self) -> int:
        return int(self.valid.sum())


class Actor:
    """``count`` environments that go on where the last trajectory has ended."""

    def __init__(self, count: int, seed: int) -> None:
        self.envs = gymnasium.make_vec("CartPole-v1", num_envs=count)
        self.observations = self._observed(self.envs.reset(seed=seed)[0])
        self.over = np.zeros(count, dtype=bool)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.returns: deque[int] = deque(maxlen=EPISODES)
        """of the episodes that ended last"""

    @torch.no_grad()
    def act(self, model: nn.Module, steps: int, version: int) -> Trajectory:
        """Take ``steps`` steps with actions drawn from the policy of ``model``."""
        observations, rows = [self.observations], []
        for _ in range(steps):
            logits = model.policy(self.observations).log_softmax(-1)
            actions = torch.multinomial(logits.exp(), 1)
            after, rewards, fell, late, _ = self.envs.step(actions.squeeze(1).numpy())
            # An environment that is over takes one more step, which only begins the next episode.
            valid, self.over = ~self.over, fell | late
            self.lengths += valid
            self.returns.extend(self.lengths[self.over].tolist())
            self.lengths[self.over] = 0
            self.observations = self._observed(after)
            observations.append(self.observations)
            rows.append((actions, logits.gather(1, actions), rewards, fell, self.over, valid))
        acted, log_probs, *others = zip(*rows, strict=True)
        rewards_, ends, cuts, valid_ = (torch.from_numpy(np.stack(column)) for column in others)
        chosen, probs = torch.stack(acted).squeeze(2), torch.stack(log_probs).squeeze(2)
        return Trajectory(
            torch.stack(observations), chosen, probs, REWARD * rewards_.float(), ends, cuts, valid_, version
        )

    @property
    def mean_return(self) -> float:
        """Of the last 100 episodes; 0 before there are so many."""
        return float(np.mean(self.returns)) if len(self.returns) == EPISODES else 0.0

    @staticmethod
    def _observed(observations: np.ndarray) -> Tensor:
        return torch.as_tensor(observations, dtype=torch.float32)


@torch.no_grad()
def evaluate(model: nn.Module, seed: int, episodes: int = EPISODES) -> float:
    """The mean return over ``episodes`` episodes, always with the likeliest action."""
    envs = gymnasium.make_vec("CartPole-v1", num_envs=episodes)
    observations, _ = envs.reset(seed=seed)
    lengths, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        lengths += running
        logits = model.policy(torch.as_tensor(observations, dtype=torch.float32))
        observations, _, fell, late, _ = envs.step(logits.argmax(-1).numpy())
        running &= ~(fell | late)
    return float(lengths.mean())
