"""Where the work of a training is done: the same tasks in this process, in several of this machine, or on a cluster.

A task is a pure function of what it is given and results come in the tasks' order, so what comes out does not depend on
where the work was done or by how many.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from threadpoolctl import threadpool_limits

from training.boosting import Boosted, Cells, boost

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")
_MOST_PROCESSES = 16


class Engine(Protocol):
    """Who does the tasks."""

    def map(
        self, function: Callable[[Shared, Task], Result], shared: Shared, tasks: Iterable[Task], count: int
    ) -> Iterator[Result]:
        """`function(shared, task)` of each of `count` tasks, in their order; `function` is a module's own."""
        ...

    def boost(self, cells: Cells) -> Boosted:
        """The boosters of all folds and that of all cells."""
        ...


@dataclass(frozen=True)
class Local:
    """This process for one task, for more of them as many processes as there are cores, each on one thread.

    `processes` 1 keeps to this process. A script that trains on more than 32,768 requests has to guard its
    main part by `if __name__ == "__main__"`, as with all of Python's processes.
    """

    processes: int | None = None

    def map(
        self, function: Callable[[Shared, Task], Result], shared: Shared, tasks: Iterable[Task], count: int
    ) -> Iterator[Result]:
        """See `Engine`. Some tasks ahead are worked on, so that results wait in bounded memory."""
        size = min(self.processes or _cores(), count)
        if size < 2:
            yield from (function(shared, task) for task in tasks)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(size, context, _begin, (function, shared)) as pool:
            waiting: deque[Future[Any]] = deque()
            try:
                for task in tasks:
                    waiting.append(pool.submit(_do, task))
                    if len(waiting) > size:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def boost(self, cells: Cells) -> Boosted:
        """See `Engine`: in this process, on LightGBM's threads."""
        return boost(cells)


def engine_of(name: str) -> Engine:
    """The engine "local" or "ray". Raises InputError as `Ray` does."""
    if name == "ray":
        from training.ray_engine import Ray  # Ray is no part of [train]

        return Ray()
    return Local()


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MOST_PROCESSES)


_work: Callable[[Any], Any]


def _begin(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts its whole group: who started this one ends it
    threadpool_limits(limits=1, user_api="blas")

    def work(task: Any) -> Any:
        return function(shared, task)

    _work = work


def _do(task: Any) -> Any:
    return _work(task)
