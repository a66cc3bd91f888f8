"""Tests a state on the test set of a run."""

import jax
import numpy as np
from jax.sharding import Mesh

from msjax.split.metrics import zero_sums
from msjax.split.state import TrainState, eval_key
from msjax.training import batching, program
from msjax.training.batching import batches_on_device, client_groups
from msjax.training.devices import replicate
from msjax.training.loaded import LoadedRun


class Evaluator:
    """Tests a state on a run's test set; keeps the set on the devices between epochs."""

    def __init__(self, run: LoadedRun, mesh: Mesh | None = None):
        self._run, self._mesh = run, mesh
        rounds, everyone = run.spec.schedule.test_rounds(), len(run.spec.schedule.test_clients)
        # Rounds of all clients are spread over them; what is left is tested on every device alike.
        spread = [samples for samples in rounds if mesh and (len(samples) == everyone or run.shard_server)]
        self._groups, number = [], 0
        for mesh_of_group, group in ((mesh, spread), (None, rounds[len(spread) :])):
            if not group:
                continue
            calls = []
            for samples in group:
                for which in client_groups(len(samples), mesh_of_group, run.clients_per_group):
                    calls.append((number, which, samples[None, which]))
                number += 1
            self._groups.append((mesh_of_group, self._resident(mesh_of_group, group), calls))

    def _resident(self, mesh, rounds):
        """The test samples of these rounds on the devices."""
        test = self._run.dataset.test
        if mesh is not None and not self._run.shard_server:
            return batching.spread_resident(test, mesh, np.concatenate(rounds, axis=1))
        every = None if self._mesh is None else np.concatenate([samples.ravel() for samples in rounds])
        return batching.make_resident(test, self._mesh, every)

    def __call__(self, state: TrainState, epoch: int | None = None) -> dict[str, float]:
        """Returns the mean loss and the metrics of a state as `program.place` gives it.

        Args:
          epoch: after which, counted from 0; by default the last.
        """
        spec, key = self._run.spec, eval_key(self._run.seed)
        testing = np.int32(spec.schedule.test_clients_after(spec.schedule.epochs - 1 if epoch is None else epoch))
        sums = replicate(zero_sums(spec), self._mesh)
        options = {"shard_server": self._run.shard_server}
        for mesh, resident, groups in self._groups:
            reading = {"mesh": mesh, "workers": self._run.workers}
            calls = [samples for _, _, samples in groups]
            batches = batches_on_device(self._run.dataset.test, resident, calls, **reading)
            for (number, which, _), batch in zip(groups, batches, strict=True):
                args = (*batch, testing[which], jax.random.fold_in(key, number), np.int32(which))
                sums = program.eval_rounds(spec, mesh, state, sums, *args, **options)
        return jax.device_get(sums).means(spec.task)
