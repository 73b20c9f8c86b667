"""The layers of each GPU: the model is split into stages of about equal time, which are assigned to pipeline ranks."""

from dataclasses import dataclass
from functools import lru_cache

from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.compute import LayerTime, layer_time
from fathom.lab.planner.hardware import Cluster
from fathom.lab.planner.layout import Layout
from fathom.lab.planner.schedule import stages
from fathom.lab.planner.work import Layer, layers
from fathom.model.config import ModelConfig


@dataclass(frozen=True)
class Rank:
    """A pipeline rank's layers. Under DualPipe each micro-batch passes through half of them, so `share` is a half."""

    layers: tuple[Layer, ...]
    times: tuple[LayerTime, ...]
    """Of every layer, per token."""
    share: float = 1.0
    """Fraction of the rank's layers that a micro-batch passes through on average."""

    @property
    def routed(self) -> int:
        """Number of its layers with routed experts."""
        return sum(layer.routed for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Per token, forward and backward."""
        return self.share * sum(time.total for time in self.times)


def ranks(config: ModelConfig, layout: Layout, cluster: Cluster, assumed: Assumptions) -> list[Rank]:
    """Every pipeline rank's layers.

    1F1B and zb1p: one stage each. Interleaved: `chunks` stages, one from each round. DualPipe: a stage from the front
    and one from the back, as micro-batches enter from both ends.
    """
    all_layers = tuple(layers(config, layout))
    times = tuple(layer_time(layer, layout, cluster, assumed) for layer in all_layers)
    runs = _runs(tuple(time.total for time in times), layout.pipeline * layout.chunks)
    result = []
    for index in range(layout.pipeline):
        mine = [runs[at] for at in range(index, len(runs), layout.pipeline)]
        if layout.schedule == "dualpipe":
            mine.append(runs[-1 - index])
        places = [at for run in mine for at in run]
        held = tuple(all_layers[at] for at in places)
        share = 0.5 if layout.schedule == "dualpipe" else 1.0
        result.append(Rank(held, tuple(times[at] for at in places), share))
    return result


@lru_cache(maxsize=4096)
def _runs(costs: tuple[float, ...], count: int) -> list[range]:
    return stages(costs, count)
