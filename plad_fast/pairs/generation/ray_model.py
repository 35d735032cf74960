"""Any source of text in actors of Ray Data: a model on every GPU of a cluster."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from plad_fast.checks import require_packages
from plad_fast.errors import UsageError, reported_as
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Batches, Failure, TextModel, Wanted

logger = logging.getLogger(__name__)

_BATCHES = 8  # that an actor takes at a time: what a killed run loses, and enough to refill from
_LIVES = 3  # actors that the same prompts may cost; Ray itself would try for ever


class RayModel(TextModel):
    """Shares what is wanted among actors, each of which opens the model for itself.

    They run on the cluster of RAY_ADDRESS, else on one that was started on this machine, else on
    this machine alone. An actor takes eight batches of `Sampling.batch_size` answers at a time,
    which come together. Ray restarts an actor that was killed, and asks it for the same again.

    Args:
        open_model: makes the model; a function of a module, or a `functools.partial` of one, that
            is found in every node's installation.
        name: for progress and messages.
        actors: how many; None for one per GPU of the cluster, or one where it has none.
        gpus: of each actor; None for 1 where the cluster has GPUs, else 0.

    Raises:
        UsageError: Ray is not installed.
    """

    def __init__(
        self,
        open_model: Callable[[], TextModel],
        name: str,
        *,
        actors: int | None = None,
        gpus: float | None = None,
    ) -> None:
        require_packages("ray")
        self.name = name
        self._open_model = open_model
        self._actors = actors
        self._gpus = gpus

    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Batches:
        """Yields what an actor answered at a time.

        Raises:
            UsageError: from the iterator, with the longest prompts first: the cluster cannot be
                reached or has too few GPUs, whatever the model raises, and where several actors
                died over the same prompts.
        """
        with _cluster() as ray:
            actors, gpus = self._pool(ray)
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.WARNING)
            # It warns that there are no bars.
            logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
            parts = _parts(wanted, sampling.batch_size, actors)
            tries = ray.remote(num_cpus=0)(_Tries).remote()
            answered = ray.data.from_items(
                [{"wanted": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts)
            ).map_batches(
                _Actor,
                fn_constructor_args=(self._open_model, sampling, self.name, tries, os.getcwd()),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
                num_gpus=gpus,
            )
            # One that is prefetched would be lost with those that are under way.
            for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
                found: list[Answer | Failure] | UsageError = pickle.loads(batch["found"][0])
                if isinstance(found, UsageError):
                    raise found
                yield found

    def _pool(self, ray: Any) -> tuple[int, float]:
        """Number of actors, and the GPUs of each."""
        resources = ray.cluster_resources()
        has = resources.get("GPU", 0)
        gpus = self._gpus if self._gpus is not None else min(has, 1)
        if gpus > has:
            raise UsageError(
                f"{self.name}: an actor is to have {gpus:g} GPUs, and the cluster has {has:g}; "
                "lower --gpus-per-actor, or start nodes with GPUs"
            )
        room = int(has // gpus if gpus else resources.get("CPU", 0))
        actors = self._actors or (room if gpus else 1)
        if actors > room:
            place = "GPUs" if gpus else "cores"
            logger.warning(
                "%s: the cluster has %s for %d of %d actors", self.name, place, room, actors
            )
        return actors, gpus


class _Actor:
    """A model in a process of Ray, opened when it is first asked."""

    def __init__(
        self,
        open_model: Callable[[], TextModel],
        sampling: Sampling,
        name: str,
        tries: Any,  # of `_Tries`
        folder: str,
    ) -> None:
        self._open_model = open_model
        self._sampling = sampling
        self._name = name
        self._tries = tries
        self._model: TextModel | None = None
        # Relative paths, and functions of modules, are the driver's.
        if os.path.isdir(folder):
            os.chdir(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        wanted: Wanted = pickle.loads(batch["wanted"][0])
        first, sample = wanted[0]
        found: list[Answer | Failure] | UsageError
        try:
            self._require_lives(first.id, sample)
            if self._model is None:
                _quiet_loading()
                self._model = self._open_model()
            batches = self._model.generate_samples(wanted, self._sampling)
            found = [item for items in batches for item in items]
        except UsageError as error:  # Ray would try again, and hide it among errors of its own
            found = UsageError(str(error))
        return {"found": [pickle.dumps(found)]}

    def _require_lives(self, prompt_id: str, sample: int) -> None:
        """Raises UsageError where the actors before this one died over the same part."""
        import ray

        died = ray.get(self._tries.before.remote((prompt_id, sample)))
        if died > _LIVES:
            raise UsageError(
                f"{self._name}: {died} actors died over the same prompts, the first of which is "
                f"{prompt_id!r} (out of memory?); what has come is stored: lower "
                "--generation-batch-size, and run again"
            )


class _Tries:
    """How often each part was begun, in a process that outlives those of the models."""

    def __init__(self) -> None:
        self._begun: Counter[Any] = Counter()

    def before(self, part: Any) -> int:
        """Counts one, and tells how many there were before."""
        self._begun[part] += 1
        return self._begun[part] - 1


def _parts(wanted: Wanted, batch_size: int, actors: int) -> list[Wanted]:
    """What actors take at a time: longest prompts first, so that memory runs out early or never."""
    ordered = sorted(wanted, key=lambda asked: (-len(json.dumps(asked[0].content)), asked[0].id))
    size = max(1, min(_BATCHES * batch_size, -(-len(ordered) // actors)))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected until the block ends."""
    import ray
    import ray.data

    if ray.is_initialized():
        yield ray
        return
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    where = os.environ.get("RAY_ADDRESS") or "this machine"
    advice = "check RAY_ADDRESS, and RAY_AUTH_MODE=token where the cluster wants a token"
    with reported_as(f"cannot connect to Ray at {where}; {advice}", "Ray"):
        ray.init(logging_level=logging.WARNING)
    try:
        if is_main:  # Ray has set one of its own, which leaves with the status 15
            signal.signal(signal.SIGTERM, handler)
        yield ray
    finally:
        ray.shutdown()


def _quiet_loading() -> None:
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()
