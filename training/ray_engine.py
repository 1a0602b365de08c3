"""A training's work on a Ray cluster: what grows with the log by Ray Data, boosting by Ray Train.

Workers read the log themselves, so it has to lie where all of them find it (a shared disk, or a URL), and router-ml
with `[train,ray]` has to be installed there. What comes back to the driver is what one process would have made, but for
the boosters: each is fitted on histograms summed over the workers, whose bagging and last bits differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from router_ml.errors import InputError
from training.boosting import ROUNDS, Boosted, Cells, from_texts

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")


class Ray:
    """The cluster that `RAY_ADDRESS` names, the one that was started on this machine, or the one already connected to.

    `workers` processes of one core each do the work (None: as many as the cluster has cores). Raises InputError when
    Ray is not installed and when there is no cluster.
    """

    def __init__(self, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError(f"--engine ray needs Ray ({error}): pip install 'router-ml[train,ray]'") from None
        if not ray.is_initialized():
            try:
                ray.init(address="auto", log_to_driver=False)
            except ConnectionError as error:
                raise InputError(
                    f"no Ray cluster was found ({str(error).splitlines()[0]}): set RAY_ADDRESS, or start one with "
                    "'ray start --head'"
                ) from None
        cores = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
        self.workers = workers or max(int(cores), 1)

    def map(
        self, function: Callable[[Shared, Task], Result], shared: Shared, tasks: Iterable[Task], count: int
    ) -> Iterator[Result]:
        """See `Engine`. Tasks and results are in Ray's object store, which goes to disk where memory ends."""
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        waiting = [ray.put(task) for task in tasks]
        numbers = ray.data.from_items([{"number": i} for i in range(count)], override_num_blocks=count)
        done = numbers.map_batches(
            _Worker,
            fn_constructor_args=(function, ray.put(shared), waiting),
            batch_size=1,
            concurrency=(1, min(self.workers, count)),
            num_cpus=1,
        )
        for row in done.iter_rows():
            yield row["result"]

    def boost(self, cells: Cells) -> Boosted:
        """See `Engine`. Each worker holds a part of the cells; trees are grown from the sums of their histograms."""
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.lightgbm import LightGBMTrainer

        workers = min(self.workers, max(len(cells.y) // 1000, 1))
        order = np.random.default_rng(cells.seed).permutation(len(cells.y))
        shards = [np.sort(order[k::workers]) for k in range(workers)]
        parts = [ray.put((cells.x[at], cells.y[at], cells.fold[at])) for at in shards]
        config = {"parts": parts, "params": cells.params, "folds": cells.folds, "names": list(cells.names)}
        trainer = LightGBMTrainer(
            _boost_part,  # type: ignore[arg-type]  # what it returns comes back since Ray 2.50
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(),
        )
        result = trainer.fit()
        return from_texts(cells, result.return_value)  # type: ignore[attr-defined]


class _Worker:
    """A process of Ray Data: does the tasks whose numbers it is given."""

    def __init__(self, function: Callable[[Any, Any], Any], shared: Any, tasks: list[Any]) -> None:
        import ray

        threadpool_limits(limits=1, user_api="blas")
        self._function, self._shared, self._tasks = function, ray.get(shared), tasks

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import ray

        results = np.empty(len(batch["number"]), dtype=object)
        for i, number in enumerate(batch["number"]):
            results[i] = self._function(self._shared, ray.get(self._tasks[int(number)]))
        return {"number": batch["number"], "result": results}


def _boost_part(config: dict[str, Any]) -> list[str] | None:
    """A worker of Ray Train: with the others it fits a model per fold and one of all; the first says their texts."""
    import lightgbm as lgb
    import ray
    from ray import train
    from ray.train.lightgbm import get_network_params

    rank = train.get_context().get_world_rank()
    x, y, fold = ray.get(config["parts"][rank])
    params = {
        **config["params"],
        "num_threads": 1,
        "tree_learner": "data",
        "pre_partition": True,
        **get_network_params(),
    }
    texts = []
    for f in [*range(config["folds"]), None]:
        at = slice(None) if f is None else fold != f
        data = lgb.Dataset(x[at], y[at], feature_name=config["names"], params=params)
        texts.append(lgb.train(params, data, ROUNDS).model_to_string(num_iteration=-1))
    return texts if rank == 0 else None
