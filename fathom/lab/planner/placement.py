"""Which layers a GPU holds: the model cut into stages of about equal time, and the stages given to pipeline ranks."""

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
    """A pipeline rank's layers. Under DualPipe, where each micro-batch passes one half of them, `share` is a half."""

    layers: tuple[Layer, ...]
    times: tuple[LayerTime, ...]
    """Of every layer, per token."""
    share: float = 1.0
    """Of the rank's layers, how many a micro-batch passes on average."""

    @property
    def routed(self) -> int:
        """How many of its layers have routed experts."""
        return sum(layer.routed for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Of a token, forward and backward."""
        return self.share * sum(time.total for time in self.times)


def ranks(config: ModelConfig, layout: Layout, cluster: Cluster, assumed: Assumptions) -> list[Rank]:
    """Every pipeline rank's layers.

    1F1B and zb1p: one run of layers each. Interleaved: `chunks` runs, one from each round. DualPipe: a run from the
    front and one from the back, so that two directions meet.
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
