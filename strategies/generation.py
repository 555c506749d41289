"""The strategy's side of a generate message: what it asks, and what it learns, which is no text."""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message

from vflair_flower.errors import ConfigurationError
from vflair_flower.session import Ledger
from vflair_flower.settings import DecodingSettings
from vflair_flower.spec import SplitSpec


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
