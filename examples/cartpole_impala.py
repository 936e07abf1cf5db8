"""Actor-learners with V-trace (IMPALA, Espeholt et al. 2018) and a small replay, on gymnasium's CartPole-v1.

    OMP_NUM_THREADS=1 python cartpole_impala.py                        one ordinary process; the networks are small
    downpour run -w 4 -s 1 --mode async cartpole_impala.py              four actor-learners
    downpour run -w 4 -s 1 --mode async cartpole_impala.py --actor-lag 16

Actors need not have the newest weights: each worker plays with a copy that it renews every `--actor-lag` updates, and
learns from its trajectories several times (`--replay`), the last time long after they were played. V-trace weighs each
step by how likely the policy of now would take the same action, clipped, so that what is learned is about the policy
of now. How old the weights were that played is logged as `policy_lag`, in updates of the servers.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections import deque

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import downpour
from cartpole_env import GAMMA, LEAST_STD, SOLVED, Actor, ActorCritic, Trajectory, evaluate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn to balance a pole with V-trace and replay.")
    parser.add_argument("--envs", type=int, default=16, help="environments of each worker")
    parser.add_argument("--n-steps", type=int, default=32, help="steps of each environment per update")
    parser.add_argument("--updates", type=int, default=3000, help="updates of each worker at most")
    parser.add_argument("--lr", type=float, default=0.0005, help="learning rate at the start")
    parser.add_argument("--value-lr", type=float, default=0.002, help="that of the value network")
    parser.add_argument("--lam", type=float, default=0.95, help="factor of V-trace's c, as in GAE")
    parser.add_argument("--entropy", type=float, default=0.005, help="weight of the policy's entropy")
    parser.add_argument("--actor-lag", type=int, default=4, help="updates between two renewals of the actor's weights")
    parser.add_argument("--replay", type=int, default=1, help="old trajectories in an update, beside the new one")
    parser.add_argument("--memory", type=int, default=16, help="trajectories that are kept for replay")
    parser.add_argument("--clip", type=float, nargs=2, default=(1.0, 1.0), help="largest rho and c of V-trace")
    parser.add_argument("--target", type=float, default=SOLVED, help="mean return to stop at")
    parser.add_argument("--print-every", type=int, default=50, help="updates of the chief between two lines")
    parser.add_argument("--seed", type=int, default=None, help="default: the job's (downpour run --seed)")
    return parser.parse_args()


def vtrace(
    trajectory: Trajectory,
    log_probs: Tensor,
    values: Tensor,
    gamma: float,
    lam: float = 1.0,
    clip: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """The targets v_t of the values and the advantages of the policy gradient, both of shape (T, n).

    ``log_probs``: of the actions taken, under the policy of now, (T, n); ``values``: V(s_t), (T + 1, n). Espeholt et
    al. 2018, equation 1 with remarks 1 and 2, for ratios w_t of now's policy to the one that acted:

        v_t = V_t + d_t + gamma c_t (v_{t+1} - V_{t+1})        d_t = rho_t (r_t + gamma V_{t+1} - V_t)
        rho_t = min(clip[0], w_t)    c_t = lam min(clip[1], w_t)    A_t = rho_t (r_t + gamma v_{t+1} - V_t)

    Where an episode is over, v_{t+1} is V_{t+1}, or 0 if the pole fell.
    """
    ratios = (log_probs - trajectory.log_probs).exp()
    rho, c = ratios.clamp(max=clip[0]), lam * ratios.clamp(max=clip[1])
    after = values[1:] * ~trajectory.ends
    deltas = rho * (trajectory.rewards + gamma * after - values[:-1])
    beyond = torch.zeros_like(values[0])  # v_{t+1} - V_{t+1}, or 0 where the episode is over
    targets, advantages = torch.empty_like(deltas), torch.empty_like(deltas)
    for t in range(len(deltas) - 1, -1, -1):
        beyond = beyond * ~trajectory.cuts[t]
        advantages[t] = rho[t] * (trajectory.rewards[t] + gamma * (after[t] + beyond) - values[t])
        beyond = deltas[t] + gamma * c[t] * beyond
        targets[t] = values[t] + beyond
    return targets, advantages


def loss_of(model: nn.Module, trajectory: Trajectory, args: argparse.Namespace) -> Tensor:
    """Policy gradient, squared error of the values, and a bonus for entropy: means over the valid steps."""
    logits, values = model(trajectory.observations)
    every = logits[:-1].log_softmax(-1)
    taken = every.gather(2, trajectory.actions.unsqueeze(2)).squeeze(2)
    targets, advantages = vtrace(trajectory, taken.detach(), values.detach(), GAMMA, args.lam, args.clip)
    valid = trajectory.valid
    # Centred as rho weighs it: an action that the policy of now would hardly take keeps an advantage near 0.
    rho = (taken.detach() - trajectory.log_probs).exp().clamp(max=args.clip[0])[valid]
    better = advantages[valid]
    better = (better - rho * better.mean() / rho.mean()) / better.std().clamp(min=LEAST_STD)
    entropy = -(every.exp() * every).sum(-1)[valid].mean()
    value_loss = (targets - values[:-1])[valid].square().mean()
    return -(taken[valid] * better).mean() + 0.5 * value_loss - args.entropy * entropy


def main() -> None:
    args = parse_args()
    seed = downpour.seed() if args.seed is None else args.seed
    torch.manual_seed(seed)
    model = ActorCritic()
    acting = copy.deepcopy(model)  # with the weights of the last renewal
    groups = [{"params": model.policy.parameters()}, {"params": model.value.parameters(), "lr": args.value_lr}]
    optimizer = torch.optim.Adam(groups, lr=args.lr, eps=1e-5)
    model, optimizer = downpour.prepare(model, optimizer)

    first = downpour.clock()  # above 0 in a run that was resumed, and in a worker that takes another's place
    scheduler = LambdaLR(optimizer, lambda i: max(0.05, 1 - (first + i) / args.updates))
    actor = Actor(args.envs, seed=1000 * (seed + first) + downpour.rank())
    memory: deque[Trajectory] = deque(maxlen=args.memory)
    draw = random.Random(1000 * (seed + first) + downpour.rank())
    version = 0
    lags: list[list[int]] = []  # since the last line of metrics: the new trajectory's, and those of the replayed ones
    began_s = time.monotonic()
    for update in range(first, args.updates):
        if (update - first) % args.actor_lag == 0:
            acting.load_state_dict(model.state_dict())
            version = downpour.version()
        new = actor.act(acting, args.n_steps, version)
        learned = [new, *draw.sample(list(memory), min(args.replay, len(memory)))]
        memory.append(new)

        optimizer.zero_grad()
        loss = torch.stack([loss_of(model, trajectory, args) for trajectory in learned]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.5)
        downpour.add_samples(new.samples)
        optimizer.step()
        scheduler.step()

        # Updates that the servers made, of anyone's gradients, between the weights that played and this update.
        lags.append([max(0, downpour.version() - 1 - trajectory.version) for trajectory in learned])
        if update % 20 == 0:
            policy_lag, replay_lag = sum(of[0] for of in lags) / len(lags), max(max(of) for of in lags)
            lags.clear()
            downpour.log(mean_return=actor.mean_return, policy_lag=policy_lag, replay_lag=replay_lag, loss=loss)
        if downpour.is_chief() and (update + 1) % args.print_every == 0:
            print(f"update {update + 1}  mean return {actor.mean_return:.1f}")
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
