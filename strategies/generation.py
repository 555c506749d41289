"""The strategy's side of a generate message: what it asks, and what it learns, which is no text."""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from vflair_flower.control import GENERATE
from vflair_flower.errors import ConfigurationError
from vflair_flower.session import Ledger
from vflair_flower.settings import DecodingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies.session_strategy import SessionStrategy


@dataclass(frozen=True, kw_only=True)
class GenerationCounts:
    """What a data party wrote, in numbers.

    Parameters
    ----------
    party : str
        Who.
    prompts, texts : int
        How many.
    prompt_tokens, new_tokens : int
        Read, padding not counted, and written.
    seconds : float
        In `generate`.
    sent_bytes : int
        What the session carried for this party, both ways, headers included.
    """

    party: str
    prompts: int
    texts: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    sent_bytes: int


def check_generation(spec: SplitSpec, decoding: DecodingSettings) -> None:
    """Raise ConfigurationError if a job cannot write, or not so."""
    if not spec.task.kind.writes:
        raise ConfigurationError(
            f"the job's task is {spec.task.kind.value!r}, which writes no texts. Set the task to 'causal-lm'."
        )
    decoding.prompts_at_once(spec.generation)


def counts_of(replies: list[Message], parties: Mapping[int, str], ledger: Ledger) -> list[GenerationCounts]:
    """Return what the replies say, by party.

    Parameters
    ----------
    replies : list[flwr.app.Message]
        The data parties'.
    parties : mapping
        Each node's party.
    ledger : Ledger
        The session's.
    """
    counts = []
    for reply in replies:
        party, metrics = parties[reply.metadata.src_node_id], reply.content.metric_records["metrics"]
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        counts.append(
            GenerationCounts(
                party=party,
                prompts=int(numbers["num-examples"]),
                texts=int(numbers["texts"]),
                prompt_tokens=int(numbers["prompt-tokens"]),
                new_tokens=int(numbers["new-tokens"]),
                seconds=float(numbers["seconds"]),
                sent_bytes=ledger.total(party=party),
            )
        )
    return sorted(counts, key=lambda one: one.party)


class WritingStrategy(SessionStrategy):
    """A strategy whose parties also write texts, each for its own prompts."""

    def generate(
        self, grid: Grid, decoding: DecodingSettings | None = None, *, timeout: float = 3600
    ) -> list[GenerationCounts]:
        """Have every data party write texts for its own prompts with the newest arrays; prompts and texts stay there.

        Parameters
        ----------
        grid : flwr.serverapp.Grid
            Flower's.
        decoding : DecodingSettings, optional
            How; greedy by default.
        timeout : float
            Seconds.

        Returns
        -------
        list[GenerationCounts]
            By party; parties that were lost are missing, unless `on_party_lost` is ``"stop"``.

        Raises
        ------
        ConfigurationError
            If the job writes no texts, or not so many or so long ones.
        PartyLostError
            As in `start`.
        """
        decoding = decoding or DecodingSettings()
        check_generation(self.spec, decoding)
        self._hub.start()
        watching = self._watch(grid)
        if not self.cards:
            self._meet(watching, None)
        content = RecordDict({"arrays": self.arrays, "config": ConfigRecord({"decoding": decoding.to_json()})})
        asked = [
            Message(content, dst_node_id=node, message_type=f"query.{GENERATE}") for node in self._data_nodes() or ()
        ]
        opened, messages = self._invite(asked, self._newest_round, training=False)
        outcome = self._close(watching.send_and_receive(messages, timeout=timeout))
        return counts_of(outcome.replies, opened.nodes, opened.session.ledger)
