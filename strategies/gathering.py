"""Gather the parts of a finished model from the parties that have them, and write it down, if all of them agree.

All are asked first; no tensor comes before everyone has said yes.  Layers come one after the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor
from transformers import PreTrainedConfig

from vflair_flower.control import HAND_OVER, KEY, PartRequest
from vflair_flower.errors import ConfigurationError, PartyLostError
from vflair_flower.experts.export import Pieces, write_checkpoint
from vflair_flower.experts.loading import layers_and_placement
from vflair_flower.experts.parcels import from_records
from vflair_flower.partition import ModelSource
from vflair_flower.partition.export import refuse_to_overwrite
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies.grid import reason_of


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """What parts are asked for with.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Flower's.
    spec, config, job
        The job's.
    nodes : mapping of str to int
        Each party's node.
    body : mapping of str to torch.Tensor
        What the strategy itself has of the model: the body where the parties' own models are split, else nothing.
    server_round : int
        Of the newest training.
    arrays : flwr.app.ArrayRecord
        The parties' own models, where the job averages; else empty.
    timeout_s : float
        For each part.
    """

    grid: Grid
    spec: SplitSpec
    config: PreTrainedConfig
    job: str
    nodes: Mapping[str, int]
    body: Mapping[str, Tensor]
    server_round: int
    arrays: ArrayRecord
    timeout_s: float

    def write(self, source: ModelSource, folder: Path, *, model_of: str | None) -> None:
        """Write the whole model into a folder, or nothing; see `CollaborativeMoE.export`."""
        refuse_to_overwrite(folder)
        owners = self._owners(model_of)
        self._ask("experts", sorted(self.nodes), only_ask=True)
        self._ask("backbone", owners, only_ask=True)
        _, placement = layers_and_placement(self.config, self.spec, list(self.nodes))

        def experts(layer: int) -> Pieces:
            hosts = {host: placement.experts_of(host)[layer] for host in placement.hosts}
            found = self._ask("experts", [host for host, own in hosts.items() if own], layer=layer)
            return {hosts[host]: state for host, state in found.items() if state}

        write_checkpoint(
            folder,
            source,
            self.config,
            self.spec.task,
            backbone=lambda: {**self._average(owners), **self.body},
            experts=experts,
            local=set(range(len(placement.host_of))) - set(placement.spread),
        )

    def _owners(self, model_of: str | None) -> list[str]:
        if model_of is not None and model_of not in self.nodes:
            raise ConfigurationError(f"model_of is {model_of!r}; the parties are {', '.join(sorted(self.nodes))}.")
        if model_of is not None:
            return [model_of]
        return sorted(self.nodes) if self.spec.averaging == "none" else sorted(self.nodes)[:1]

    def _average(self, owners: Sequence[str]) -> dict[str, Tensor]:
        """Return the mean of parties' own models, summed in the order of their names; counts are the first one's."""
        total: dict[str, Tensor] = {}
        for owner in owners:
            found = self._ask("backbone", [owner])[owner]
            for name, tensor in found.items():
                if name not in total:
                    total[name] = tensor.double() if tensor.is_floating_point() and len(owners) > 1 else tensor
                elif tensor.is_floating_point():
                    total[name] += tensor
        return {
            name: (t / len(owners)).to(found[name].dtype) if len(owners) > 1 and t.is_floating_point() else t
            for name, t in total.items()
        }

    def _ask(
        self, part: str, parties: Sequence[str], *, layer: int = 0, only_ask: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        """Ask parties for a part of each; raise ConfigurationError with the words of one that refuses."""
        asked = []
        for party in parties:
            request = PartRequest(
                spec=self.spec.to_json(),
                job=self.job,
                party=party,
                parties=sorted(self.nodes),
                server_round=self.server_round,
                part=part,
                layer=layer,
                only_ask=only_ask,
            )
            content = RecordDict({KEY: request.to_record()})
            if part == "backbone" and not only_ask:
                content["arrays"] = self.arrays
            asked.append(Message(content, dst_node_id=self.nodes[party], message_type=f"query.{HAND_OVER}"))
        names = {node: party for party, node in self.nodes.items()}
        replies = {
            names[reply.metadata.src_node_id]: reply
            for reply in self.grid.send_and_receive(asked, timeout=self.timeout_s)
        }
        for party in parties:
            if party not in replies:
                raise PartyLostError(party, f"it has not handed over its {part} within {self.timeout_s:g} s")
            if replies[party].has_error():
                raise ConfigurationError(
                    f"the model is not written, because '{party}' said: {reason_of(replies[party])}"
                )
        return {} if only_ask else {party: from_records(replies[party].content) for party in parties}
