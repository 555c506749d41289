"""Before anything is trained: ask every node who it is, and check that the parties fit the job and each other."""

import time
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from vflair_flower.control import HELLO, MODEL_PARTY_ROLE, PartyCard, package_versions
from vflair_flower.errors import ConfigurationError
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies.grid import reason_of

_POLL_S = 0.5


def meet(
    grid: Grid, spec: SplitSpec, *, want_arrays: bool, body_here: bool, timeout_s: float
) -> tuple[dict[int, PartyCard], ArrayRecord]:
    """Ask all nodes who they are.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Flower's own, with all nodes.
    spec : SplitSpec
        What each party holds its data and model against.
    want_arrays : bool
        Whether one data party is to draw the initial arrays.
    body_here : bool
        Whether the strategy holds the body, so that no node may.
    timeout_s : float
        For all answers.

    Returns
    -------
    cards, arrays
        Each node's card, and the initial arrays (empty if not asked for).

    Raises
    ------
    ConfigurationError
        With every party's own words, if any of them cannot take part.
    """
    nodes = _wait_for_nodes(grid, timeout_s)
    ask = ConfigRecord({"spec": spec.to_json(), "want-arrays": want_arrays})
    asked = [Message(RecordDict({"config": ask}), dst_node_id=n, message_type=f"query.{HELLO}") for n in nodes]
    replies = sorted(grid.send_and_receive(asked, timeout=timeout_s), key=lambda reply: reply.metadata.src_node_id)
    problems = [f"node {r.metadata.src_node_id}: {reason_of(r)}" for r in replies if r.has_error()]
    silent = set(nodes) - {r.metadata.src_node_id for r in replies}
    problems += [f"node {node}: no answer within {timeout_s:g} s" for node in sorted(silent)]
    if problems:
        raise ConfigurationError("the job cannot start; " + " | ".join(dict.fromkeys(problems)))
    cards = {r.metadata.src_node_id: PartyCard.from_content(r.content) for r in replies}
    _check(cards, body_here=body_here)
    offered = [r.content.array_records["arrays"] for r in replies if "arrays" in r.content]
    return cards, offered[0] if offered else ArrayRecord()


def _wait_for_nodes(grid: Grid, timeout_s: float) -> list[int]:
    limit = time.monotonic() + timeout_s
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() > limit:
            raise ConfigurationError(f"no Flower node came within {timeout_s:g} s; start the parties' SuperNodes.")
        time.sleep(_POLL_S)
    return nodes


def _check(cards: dict[int, PartyCard], *, body_here: bool) -> None:
    names = [card.party for card in cards.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"several nodes are called {', '.join(map(repr, twice))}; give each node a name of its own "
            "(node_config party=...), and only one the role of model party."
        )
    model_parties = sum(card.role == MODEL_PARTY_ROLE for card in cards.values())
    if model_parties != (0 if body_here else 1) or model_parties == len(cards):
        raise ConfigurationError(
            f"there are {model_parties} nodes with the role of model party and {len(cards) - model_parties} "
            f"data parties; this job needs {'none' if body_here else 'exactly one'} of the former and at least one of "
            "the latter. Set the nodes' role, or the strategy's model_party."
        )
    mine = package_versions()
    for card in cards.values():
        for package in ("torch", "transformers", "peft"):
            theirs = card.versions.get(package)
            if theirs != mine[package]:
                log(WARNING, "party '%s' has %s %s, the strategy has %s", card.party, package, theirs, mine[package])
