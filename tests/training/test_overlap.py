"""Chunks that leave during backward: whatever a script does to its gradients, the weights are the same, bit for bit."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import downpour.overlap
from downpour.session import Session
from downpour.trial import Trial
from downpour_common import messages as m
from downpour_common.errors import NonFiniteContribution
from downpour_common.messages import Message
from downpour_common.transport.memory import MemoryClient
from harness import CONTEXT, Job, run_job

STEPS = 10
ONE_BY_ONE = replace(CONTEXT, shared_memory=False, shards=2, chunk_bytes=1024)


class Always(Trial):
    """Never compares: it is on from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True

    def ended(self, _now_s: float, _verdict: str) -> None:
        """See :class:`Trial`."""


class Counting(Trial):
    """Takes all steps to last as long as each other."""

    def ended(self, _now_s: float, verdict: Any) -> None:
        """See :class:`Trial`."""
        super().ended(0.0, verdict)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downpour.overlap, "Trial", Always)


class Net(nn.Module):
    """With a tied weight, and a branch that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.first.weight
        self.branch = nn.Linear(16, 16)
        self.last = nn.Linear(16, 40)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.3, 0.3, generator=generator)

    def forward(self, x: torch.Tensor, branch: bool = True) -> torch.Tensor:
        hidden = torch.tanh(self.tied(torch.tanh(self.first(x))))
        out: torch.Tensor = self.last(self.branch(hidden) if branch else hidden)
        return out


Script = Callable[[Net, torch.optim.Optimizer, torch.Tensor, int], object]
"""One step: model, optimizer, input, number of the step."""


def plain(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def between(change: Callable[[Net, int], object]) -> Script:
    def script(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        change(net, step)
        optimizer.step()

    return script


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def scaled(net: Net, _step: int) -> None:
    for gradient in gradients(net):
        gradient.mul_(0.5)


def changed_past_autograd(net: Net, step: int) -> None:
    for gradient in gradients(net)[step % 2 :: 2]:
        gradient.data.mul_(0.5)


def changed_through_numpy(net: Net, _step: int) -> None:
    gradients(net)[0].numpy()[0] += 1.0


def replaced(net: Net, _step: int) -> None:
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad * 0.5


def removed(net: Net, step: int) -> None:
    if step % 3 == 2:
        net.last.weight.grad = None


def there_and_back(net: Net, _step: int) -> None:
    for gradient in gradients(net):
        gradient.mul_(2.0).mul_(0.5)


def swapped(net: Net, _step: int) -> None:
    first, second = net.first.bias.grad, net.branch.bias.grad
    assert first is not None
    assert second is not None
    kept = first.clone()
    first.data.copy_(second)
    second.data.copy_(kept)


def looked_at(net: Net, _step: int) -> None:
    assert all(torch.isfinite(gradient).all() for gradient in gradients(net))


def accumulating(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    for part in x.chunk(2 if step < 6 else 4):  # another number of times from some step on
        net(part).square().mean().backward()
    optimizer.step()


def without_gradients(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    net.zero_grad(set_to_none=True)
    net(x).square().mean().backward()
    optimizer.step()


def two_gradients_kept(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    kept = []
    for part in x.chunk(2):
        net.zero_grad(set_to_none=True)
        net(part).square().mean().backward()
        kept.append(gradients(net))
    for parameter, first, second in zip(net.parameters(), *kept, strict=True):
        parameter.grad = first - 0.1 * second
    optimizer.step()


def with_a_branch_now_and_then(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    net(x, branch=step % 4 < 2).square().mean().backward()
    optimizer.step()


def a_step_skipped(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    (net(x).square().mean() * (float("inf") if step % 3 == 1 else 1.0)).backward()
    if step % 3 != 1:  # as a gradient scaler does
        optimizer.step()


def a_step_skipped_and_kept(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    net(x).square().mean().backward()
    if step % 2:
        optimizer.step()
        optimizer.zero_grad()


def learning_rate_changed(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
    optimizer.step()


def backward_twice(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    loss = net(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def gradient_of_a_gradient(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    loss = net(x).square().mean()
    [slope] = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()
    optimizer.step()


def graph_kept(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    """Gradients that are part of a graph are new tensors each time."""
    optimizer.zero_grad()
    loss = net(x).square().mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a cycle that is broken below
        loss.backward(create_graph=step % 2 == 1)
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad.detach()
    optimizer.step()


def reentrant(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    hidden = torch.utils.checkpoint.checkpoint(net.first, x, use_reentrant=True)
    torch.utils.checkpoint.checkpoint(net.tied, hidden, use_reentrant=True).square().mean().backward()
    optimizer.step()


def in_another_thread(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()
    loss = net(x).square().mean()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    optimizer.step()


def a_hook_raises(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
    optimizer.zero_grad()

    def fail(_gradient: torch.Tensor) -> None:
        raise KeyError("from a hook")

    loss = net(x).square().mean()
    if step % 3 == 1:
        hook = net.branch.weight.register_hook(fail)
        with pytest.raises(KeyError, match="from a hook"):
            loss.backward()
        hook.remove()
        optimizer.zero_grad()
        loss = net(x).square().mean()
    loss.backward()
    optimizer.step()


SCRIPTS: dict[str, Script] = {
    "plain": plain,
    "clipped": between(lambda net, _: nn.utils.clip_grad_norm_(net.parameters(), 0.1)),
    "hardly-clipped": between(lambda net, _: nn.utils.clip_grad_norm_(net.parameters(), 1e6)),
    **{
        f.__name__: between(f)
        for f in (
            scaled,
            changed_past_autograd,
            changed_through_numpy,
            replaced,
            removed,
            there_and_back,
            swapped,
            looked_at,
        )
    },
    **{
        f.__name__: f
        for f in (
            accumulating,
            without_gradients,
            two_gradients_kept,
            with_a_branch_now_and_then,
            a_step_skipped,
            a_step_skipped_and_kept,
            learning_rate_changed,
            backward_twice,
            gradient_of_a_gradient,
            graph_kept,
            reentrant,
            in_another_thread,
            a_hook_raises,
        )
    },
}
NEVER_STAGED = {"without_gradients", "two_gradients_kept"}
"""Gradients are in memory of the script's own when backward makes them."""


def training(script: Script) -> Callable[[Session], list[torch.Tensor]]:
    def body(session: Session) -> list[torch.Tensor]:
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        session.prepare(net, optimizer, [])
        generator = torch.Generator().manual_seed(session.slot)
        for step in range(STEPS):
            script(net, optimizer, torch.randn(8, 16, generator=generator), step)
        return [p.detach().clone() for p in net.parameters()]

    return body


def staged(job: Job) -> int:
    return sum(shard.report["staged"] for shard in job.training.shards.values())


@pytest.mark.parametrize(("mode", "workers"), [("sync", 2), ("async", 1)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_weights_are_the_same_bit_for_bit(name: str, mode: str, workers: int) -> None:
    context = replace(ONE_BY_ONE, mode=mode, workers=workers)
    overlapped = run_job(training(SCRIPTS[name]), context)
    plainly = run_job(training(SCRIPTS[name]), replace(context, overlap="off"))
    for slot in range(workers):
        one: Any = overlapped.results[slot]
        other: Any = plainly.results[slot]
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert staged(plainly) == 0
    assert (staged(overlapped) > 0) == (name not in NEVER_STAGED)


def test_a_window_smaller_than_the_model_does_not_lock_workers_in() -> None:
    """Some push what they have sent ahead, others all anew, each within its credit, and wait for each other."""

    def script(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        if x[0, 0] > 0:
            scaled(net, step)
        optimizer.step()

    context = replace(ONE_BY_ONE, workers=3, window_bytes=1500, timeout_s=10.0)
    overlapped: Any = run_job(training(script), context).results
    plainly: Any = run_job(training(script), replace(context, overlap="off")).results
    assert all(torch.equal(a, b) for a, b in zip(overlapped[0], plainly[0], strict=True))


@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_not_a_number_is_refused_by_name(overlap: Any) -> None:
    def script(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, step: int) -> None:
        optimizer.zero_grad()
        (net(x).square().mean() * (float("nan") if step == 4 else 1.0)).backward()
        optimizer.step()

    with pytest.raises(NonFiniteContribution, match=r"step 4: the gradient of \S+ holds NaN or Inf"):
        run_job(training(script), replace(ONE_BY_ONE, mode="async", overlap=overlap))


def test_payloads_that_get_lost_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    send, seen = MemoryClient.send, [0]

    def lossy(self: MemoryClient, server: str, message: Message) -> None:
        if isinstance(message, m.Stage):
            seen[0] += 1
            if seen[0] % 3:
                return
        send(self, server, message)

    plainly: Any = run_job(training(plain), replace(ONE_BY_ONE, workers=2, overlap="off")).results
    monkeypatch.setattr(MemoryClient, "send", lossy)
    job = run_job(training(plain), replace(ONE_BY_ONE, workers=2, window_bytes=8192))
    results: Any = job.results
    assert seen[0] > staged(job) > 0
    assert all(torch.equal(a, b) for a, b in zip(results[1], plainly[1], strict=True))


def test_a_script_that_changes_all_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downpour.overlap, "Trial", Counting)
    steps = 200

    def body(session: Session) -> int:
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        session.prepare(net, optimizer, [])
        for step in range(steps):
            SCRIPTS["scaled"](net, optimizer, torch.ones(4, 16), step)
        assert session._engine is not None
        return len(session._engine._chunks)

    job = run_job(body, replace(ONE_BY_ONE, mode="async"))
    chunks: Any = job.results[0]
    assert 0 < staged(job) <= chunks * steps // 20


def test_nothing_is_watched_where_memory_is_shared_or_steps_do_not_push() -> None:
    def body(session: Session) -> object:
        net = Net()
        session.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01), [])
        assert session._engine is not None
        return session._engine._overlap

    assert run_job(body, replace(CONTEXT, shared_memory=True)).results[0] is None
    assert run_job(body, replace(CONTEXT, mode="async", shared_memory=False, n_push=2)).results[0] is None
    assert run_job(body, replace(CONTEXT, mode="async", shared_memory=False, n_fetch=2)).results[0] is None
    assert run_job(body, replace(CONTEXT, shared_memory=False)).results[0] is not None


def test_the_model_is_left_as_it_was() -> None:
    def body(session: Session) -> int:
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        session.prepare(net, optimizer, [])
        plain(net, optimizer, torch.ones(4, 16), 0)
        session.finish()
        net(torch.ones(4, 16)).sum().backward()
        return sum(len(p._post_accumulate_grad_hooks or ()) for p in net.parameters())

    assert run_job(body, ONE_BY_ONE).results[0] == 0
