"""Asynchronous advantage actor-critic (A3C, Mnih et al. 2016) on gymnasium's CartPole-v1.

    OMP_NUM_THREADS=1 python cartpole_a3c.py                    one ordinary process; the networks are small
    downpour run -w 4 -s 1 --mode async cartpole_a3c.py         four actor-learners that share weights and Adam's state

Every worker plays with environments of its own, and learns from each of its trajectories once, on the weights that it
played them with; the servers apply the workers' gradients as they come. There is no data loader: `downpour.add_samples`
counts the steps. The chief watches its own episodes, and ends the job for all with `downpour.stop`.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import downpour
from cartpole_env import GAMMA, LEAST_STD, SOLVED, Actor, ActorCritic, Trajectory, evaluate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn to balance a pole with A3C.")
    parser.add_argument("--envs", type=int, default=16, help="environments of each worker")
    parser.add_argument("--n-steps", type=int, default=32, help="steps of each environment per update")
    parser.add_argument("--updates", type=int, default=3000, help="updates of each worker at most")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate at the start")
    parser.add_argument("--value-lr", type=float, default=0.004, help="that of the value network")
    parser.add_argument(
        "--lam", type=float, default=0.95, help="1: n-step returns; less: mixed with shorter ones (GAE)"
    )
    parser.add_argument("--entropy", type=float, default=0.005, help="weight of the policy's entropy")
    parser.add_argument("--target", type=float, default=SOLVED, help="mean return to stop at")
    parser.add_argument("--print-every", type=int, default=50, help="updates of the chief between two lines")
    parser.add_argument("--seed", type=int, default=None, help="default: the job's (downpour run --seed)")
    return parser.parse_args()


def advantages(trajectory: Trajectory, values: Tensor, gamma: float, lam: float) -> Tensor:
    """How much better each action did than expected, shape (T, n). ``values``: (T + 1, n).

    A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V(s_{t+1}) - V(s_t), both up to the episode's end. With
    lam = 1 this is the n-step return of A3C less V(s_t). After 500 steps the pole still stands, so that V counts.
    """
    deltas = trajectory.rewards + gamma * values[1:] * ~trajectory.ends - values[:-1]
    goes_on = gamma * lam * ~trajectory.cuts
    found = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[0])
    for t in range(len(deltas) - 1, -1, -1):
        found[t] = following = deltas[t] + goes_on[t] * following
    return found


def loss_of(model: nn.Module, trajectory: Trajectory, args: argparse.Namespace) -> Tensor:
    """Policy gradient, squared error of the values, and a bonus for entropy: means over the valid steps."""
    logits, values = model(trajectory.observations)
    better = advantages(trajectory, values.detach(), GAMMA, args.lam)
    goals = (better + values[:-1].detach())[trajectory.valid]
    better = better[trajectory.valid]
    better = (better - better.mean()) / better.std().clamp(min=LEAST_STD)
    log_probs = logits[:-1][trajectory.valid].log_softmax(-1)
    taken = log_probs.gather(1, trajectory.actions[trajectory.valid].unsqueeze(1)).squeeze(1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    value_loss = (goals - values[:-1][trajectory.valid]).square().mean()
    return -(taken * better).mean() + 0.5 * value_loss - args.entropy * entropy


def main() -> None:
    args = parse_args()
    seed = downpour.seed() if args.seed is None else args.seed
    torch.manual_seed(seed)
    model = ActorCritic()
    groups = [{"params": model.policy.parameters()}, {"params": model.value.parameters(), "lr": args.value_lr}]
    optimizer = torch.optim.Adam(groups, lr=args.lr, eps=1e-5)
    model, optimizer = downpour.prepare(model, optimizer)

    first = downpour.clock()  # above 0 in a run that was resumed, and in a worker that takes another's place
    scheduler = LambdaLR(optimizer, lambda i: max(0.05, 1 - (first + i) / args.updates))
    actor = Actor(args.envs, seed=1000 * (seed + first) + downpour.rank())
    began_s = time.monotonic()
    steps = 0
    for update in range(first, args.updates):
        trajectory = actor.act(model, args.n_steps, downpour.version())
        optimizer.zero_grad()
        loss = loss_of(model, trajectory, args)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.5)
        downpour.add_samples(trajectory.samples)
        optimizer.step()
        scheduler.step()
        steps += trajectory.samples

        if update % 20 == 0:
            # Updates that the servers made of others' gradients since the weights were fetched that acted.
            lag = max(0, downpour.version() - 1 - trajectory.version)
            downpour.log(mean_return=actor.mean_return, policy_lag=lag, loss=loss)
        if downpour.is_chief() and (update + 1) % args.print_every == 0:
            print(f"update {update + 1}  own steps {steps:,}  mean return {actor.mean_return:.1f}")
        if downpour.is_chief() and actor.mean_return >= args.target:
            downpour.stop(f"mean return {actor.mean_return:.1f} after {time.monotonic() - began_s:.1f} s")
        if downpour.should_stop():
            break

    if downpour.is_chief():
        final = evaluate(model, seed=10**6)
        downpour.log(final_return=final)
        print(f"final mean return {final:.1f} over 100 episodes, {time.monotonic() - began_s:.1f} s")


if __name__ == "__main__":
    main()
