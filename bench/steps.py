"""Make an implementation's forward, or forward and backward, one callable step on one rank's tensors.

step.reset()     drop the last results; never timed
step()           compute
step.outputs()   y, and in mode fwd_bwd dx, dw1, db1, dw2, db2
"""

from collections.abc import Callable

import torch
from implementations import Forward, Group
from torch import Tensor
from workloads import Problem


class Step:
    """One implementation on one rank's tensors. `reset` frees the last results, outside of the timed part."""

    def __init__(self, forward: Forward, problem: Problem, group: Group, mode: str) -> None:
        self.forward, self.problem, self.group, self.mode = forward, problem, group, mode
        self.y: Tensor | None = None

    def reset(self) -> None:
        """Drop y and the gradients."""
        self.y = None
        for leaf in self.problem.leaves().values():
            leaf.grad = None

    def __call__(self) -> None:
        """Compute."""
        p = self.problem
        if self.mode == "fwd":
            with torch.no_grad():
                self.y = self.forward(p.x, p.w1, p.b1, p.w2, p.b2, self.group)
        else:
            y = self.forward(p.x, p.w1, p.b1, p.w2, p.b2, self.group)
            y.backward(p.dy)
            self.y = y.detach()

    def outputs(self) -> dict[str, Tensor]:
        """The last results: y, and in mode fwd_bwd dx, dw1, db1, dw2, db2."""
        if self.y is None:
            raise RuntimeError("the step has not run")
        grads = {f"d{name}": leaf.grad for name, leaf in self.problem.leaves().items() if leaf.grad is not None}
        return {"y": self.y} | grads


class RecordedForward(Step):
    """A forward that keeps what backward needs."""

    def __call__(self) -> None:
        """Compute y."""
        p = self.problem
        self.y = self.forward(p.x, p.w1, p.b1, p.w2, p.b2, self.group)

    def backward(self) -> None:
        """Compute the gradients."""
        assert self.y is not None
        self.y.backward(self.problem.dy)


class BackwardOf(Step):
    """The backward of a recorded forward that has just run."""

    def __init__(self, forward: RecordedForward) -> None:
        super().__init__(forward.forward, forward.problem, forward.group, forward.mode)
        self.recorded = forward

    def reset(self) -> None:
        """Keep what forward has recorded."""

    def __call__(self) -> None:
        """Compute the gradients."""
        self.recorded.backward()


def passes_of(forward: Forward, problem: Problem, group: Group) -> dict[str, Step]:
    """Return forward and backward as steps of their own, to be run in this order."""
    recorded = RecordedForward(forward, problem, group, "fwd_bwd")
    return {"forward": recorded, "backward": BackwardOf(recorded)}


def captured(compute: Callable[[], None], reset: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of compute, after three runs outside of it; reset drops its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            reset()
            compute()
        reset()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph


class CapturedStep(Step):
    """A step replayed as a CUDA graph, which owns its results: NaN at first, overwritten by each call."""

    def __init__(self, forward: Forward, problem: Problem, group: Group, mode: str) -> None:
        super().__init__(forward, problem, group, mode)
        self.graph = captured(super().__call__, super().reset)
        self.captured = super().outputs()
        super().reset()
        for t in self.captured.values():
            t.fill_(float("nan"))

    def reset(self) -> None:
        """Nothing to free: the graph keeps its memory."""

    def __call__(self) -> None:
        """Replay."""
        self.graph.replay()

    def outputs(self) -> dict[str, Tensor]:
        """The results of the last replay."""
        return self.captured


def make_step(forward: Forward, problem: Problem, group: Group, mode: str, graph: bool) -> Step:
    """Return the step, captured with `graph`. Raises: ValueError: `graph` without a CUDA device."""
    if not graph:
        return Step(forward, problem, group, mode)
    if problem.x.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, got {problem.x.device.type}")
    return CapturedStep(forward, problem, group, mode)
