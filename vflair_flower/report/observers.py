"""Who saw what: the observer table, made from what the ledger recorded.

Each kind of tensor that may cross a cut is described once, below: its plain name, what it lets its reader infer.
`observer_table` looks every ledger entry up there, by where the model was cut, operation, direction and tensor.
Invariant: no entry is dropped.  One that nobody has described becomes a row that warns.

A body at a node of its own is reached by way of the hub, so the ledger has each tensor twice: on the data party's
stream and on the model party's.  The second leg shows the same tensor to the same reader and is not counted again.

Not here: how much an attack really recovers.  That is measured, on the same runs, by attacks; a row says what to expect
when no such figure is known.
"""

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vflair_flower.report.result import ControlTraffic, ObserverRow, Seen, TrafficEntry

logger = logging.getLogger(__name__)

Partition = Literal["HBT", "HT"]

MODEL_PARTY = "model party"
DATA_PARTY = "data party"
OTHER_DATA_PARTIES = "other data parties"
HUB_OPERATOR = "hub operator"
AGGREGATING_SERVER = "aggregating server"
NETWORK = "network"
NO_ONE = "no one"

SMASHED = "smashed data"
GRADIENT = "returned gradient"
LOGITS = "logits"
ANSWERS = "the body's answers"
ADAPTERS = "adapters"
TEXT = "text"
LABELS = "labels"
UNDESCRIBED = "undescribed tensor"
HEADER = "header"
"""What the ledger calls all bytes of a frame that are not tensor bytes."""
ANY = "any operation"
_NO_NETWORK = "nothing: all parties ran on one machine"
_GRAVE = (UNDESCRIBED, TEXT, LABELS, SMASHED, GRADIENT, LOGITS, ANSWERS, ADAPTERS, "all tensors")

Key = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What one kind of tensor is called, what its reader can do with it, and what stays if nothing covers it."""

    name: str
    allows: str
    uncovered: str


_MASK = _Kind(
    name="attention mask",
    allows="know the exact length in tokens of every text, and how many texts a batch has",
    uncovered="lengths; short and long texts can be told apart, and a rare length can point to one row",
)
_POSITIONS = _Kind(
    name="position numbers",
    allows="know how the texts of a batch are padded, and from that their lengths",
    uncovered="lengths, as with the attention mask",
)
_IDS = _Kind(name=f"{TEXT}: token numbers", allows="read the text itself", uncovered="all of the text")
_LABELS = _Kind(name=f"{LABELS} of the rows", allows="read the labels themselves", uncovered="all of the labels")
_HEADERS_UP = _Kind(
    name="message headers: operation, shapes, row counts",
    allows="count and time the steps, and from that know how many rows a party has",
    uncovered="numbers of rows, size and time of each step",
)
_HEADERS_DOWN = _Kind(
    name="message headers: operation, shapes, who joined or left",
    allows="know when it is served, and which other parties come and go",
    uncovered="who takes part, and when",
)
_HEAD_GRADIENT = _Kind(
    name="gradient for the head",
    allows="learn how the model party's blocks react to its own rows (model extraction)",
    uncovered="some knowledge of blocks it does not hold",
)


def observer_table(
    entries: Iterable[TrafficEntry | Mapping[str, object]],
    *,
    partition: Partition,
    num_blocks: int,
    head_blocks: int,
    tail_blocks: int,
    body_host: str = "strategy",
    tls: bool,
    loopback: bool = False,
    model_party: str = "model-party",
    adapters: Sequence[str] = (),
    control: ControlTraffic | None = None,
    text_stays: bool = True,
    labels_stay: bool = True,
    adapters_cover: str | None = None,
    adapters_summed: bool = False,
) -> tuple[ObserverRow, ...]:
    """Say who saw which tensor of a run, what can be inferred from it, and what covers it.

    Parameters
    ----------
    entries : iterable of TrafficEntry or mappings with its fields
        The ledger: what was really sent, not what was planned.
    partition : {"HBT", "HT"}
        Where the model was cut.
    num_blocks, head_blocks, tail_blocks : int
        Blocks of the model, and of its head and tail; they name the layer at which a tensor crossed.
    body_host : str
        ``"strategy"``, or whoever else holds the model party's blocks: ``"node"`` or a name.
    model_party : str
        Name of the model party in the ledger.
    tls : bool
        Whether links between parties, and Flower's, were encrypted.
    loopback : bool
        Whether all parties ran on one machine, so that no network lay between them.
    adapters : sequence of str
        Names of the data parties whose trained parameters Flower messages carry to be averaged; empty if none do.
    control : ControlTraffic, optional
        Bytes and messages of Flower's own; ``None`` if nobody counted them.
    text_stays, labels_stay : bool
        Whether the job keeps them at the data party.  The ledger overrules a ``True``.
    adapters_cover : str, optional
        What covers the adapters that Flower messages carry; of tensors of a session the ledger says it.
    adapters_summed : bool
        Whether secure aggregation lets no one see a single party's adapters, but their sum alone.

    Returns
    -------
    tuple of ObserverRow
        Model party first, then whoever else sees something, and last what no one gets and why.

    Examples
    --------
    >>> entry = dict(party="alpha", peer="model party", direction="up", operation="forward", tensor="hidden",
    ...              dtype="float32", max_shape=[8, 64, 384], messages=10, bytes=7_864_320)
    >>> rows = observer_table([entry], partition="HBT", num_blocks=6, head_blocks=1, tail_blocks=1, tls=True)
    >>> rows[0].tensor
    'smashed data: hidden states at the cut, after block 0'
    """
    given = [entry if isinstance(entry, TrafficEntry) else TrafficEntry.from_json(entry) for entry in entries]
    ledger = _first_legs(given, model_party)
    covers = _covered(ledger)
    kinds = _kinds(partition, num_blocks=num_blocks, head_blocks=head_blocks, tail_blocks=tail_blocks)
    seen_in_sessions = _seen(given)
    grouped = _grouped(ledger)
    order = [*(key for key in kinds if key in grouped), *(key for key in grouped if key not in kinds)]
    by_key = {key: grouped[key] for key in order}
    parts = ("head", "tail") if partition == "HBT" else ("head",)

    rows: list[ObserverRow] = []
    for receiver, direction in ((MODEL_PARTY, "up"), (DATA_PARTY, "down")):
        for key, seen in by_key.items():
            if key[1] == direction:
                # What is averaged goes to the hub itself, whoever holds the body.
                reader = AGGREGATING_SERVER if key[:2] == ("average", "up") else receiver
                rows.append(_tensor_row(reader, key, seen, kinds, covers.get(key)))
        if receiver == MODEL_PARTY:
            rows += _computed_rows(partition, by_key)
    rows += _hub_rows(body_host, tls=tls, seen=seen_in_sessions, known=parts if adapters else ())
    rows += _aggregation_rows(parts, control, adapters, adapters_cover, summed=adapters_summed)
    rows.append(_network_row(tls=tls, loopback=loopback, seen=_with_control(seen_in_sessions, control)))
    rows += _no_one_rows(partition, by_key, body_host, text_stays=text_stays, labels_stay=labels_stay)
    return tuple(rows)


def tensor_name(
    entry: TrafficEntry, *, partition: Partition, num_blocks: int, head_blocks: int, tail_blocks: int
) -> str:
    """Return the plain name of the tensor of a ledger entry, or one that says that it has none."""
    kinds = _kinds(partition, num_blocks=num_blocks, head_blocks=head_blocks, tail_blocks=tail_blocks)
    key = _key(entry)
    return kinds[key].name if key in kinds else _undescribed_name(key)


def grave_rows(rows: Iterable[ObserverRow]) -> tuple[ObserverRow, ...]:
    """Return the rows to warn of: seen by someone other than the owner, worth hiding, and covered by nothing."""
    return tuple(
        row
        for row in rows
        if row.covered_by is None
        and (row.tensor.startswith(UNDESCRIBED) or (row.observer != DATA_PARTY and row.tensor.startswith(_GRAVE)))
    )


def on_one_machine(rows: Iterable[ObserverRow]) -> bool:
    """Return whether the table says that no network lay between the parties."""
    return any(row.observer == NETWORK and row.tensor == _NO_NETWORK for row in rows)


def text_stayed(rows: Iterable[ObserverRow]) -> bool:
    """Return whether the table says that no one got the text."""
    return any(row.observer == NO_ONE and row.tensor.startswith(TEXT) for row in rows)


def _kinds(partition: Partition, *, num_blocks: int, head_blocks: int, tail_blocks: int) -> dict[Key, _Kind]:
    """Return the description of every tensor that such a run is known to send, in the order of the table."""
    cut = f"after block {head_blocks - 1}" if head_blocks else "after the embedding"
    kinds: dict[Key, _Kind] = {
        ("forward", "up", "hidden"): _Kind(
            name=f"{SMASHED}: hidden states at the cut, {cut}",
            allows="reconstruct much of the text (model inversion)",
            uncovered="the text of every row that was trained or evaluated on",
        ),
        ("forward", "up", "attention_mask"): _MASK,
        ("forward", "up", "position_ids"): _POSITIONS,
        ("forward", "up", "encoder_hidden"): _Kind(
            name=f"{SMASHED}: what the encoder made of the text, after its last block",
            allows="reconstruct much of the text (model inversion)",
            uncovered="the text of every row that was trained or evaluated on",
        ),
        ("forward", "up", "encoder_mask"): _MASK,
        ("forward", "up", "cache_rows"): _Kind(
            name="row numbers: which row beam search goes on from",
            allows="see how the search branches",
            uncovered="the shape of the search, not the words",
        ),
        ("forward", "up", "input_ids"): _IDS,
        ("forward", "up", "labels"): _LABELS,
        ("backward", "up", "labels"): _LABELS,
        ("average", "up", "gradient"): _Kind(
            name=f"{GRADIENT}: of the head's and tail's trained parameters, at every step",
            allows="infer labels of the batch and, with enough effort, words of it (gradient inversion)",
            uncovered="much about every batch that was trained on; averaging='round' sends only the sum of a round",
        ),
    }
    last: dict[Key, _Kind] = {
        ("backward", "down", "grad"): _HEAD_GRADIENT,
        ("backward", "down", "encoder_grad"): _HEAD_GRADIENT,
        ("average", "down", "gradient"): _Kind(
            name=f"{GRADIENT}: the mean over all parties, of heads and tails",
            allows="learn something about the other parties' batches, the more the fewer parties there are",
            uncovered="what can be told from a mean; with two parties each can subtract its own part",
        ),
        (ANY, "up", HEADER): _HEADERS_UP,
        (ANY, "down", HEADER): _HEADERS_DOWN,
    }
    if partition == "HT":
        kinds[("forward", "down", "logits")] = _Kind(
            name=f"{LOGITS}: the answers to its own rows",
            allows="imitate the model party's blocks by learning from their answers (model extraction)",
            uncovered="what the model can do, to whoever may ask it",
        )
        kinds[("backward", "up", "grad")] = _Kind(
            name=f"{GRADIENT}: of the loss by the logits",
            allows="read the label of each row exactly (the gradient is probability minus label)",
            uncovered="the label of every row that was trained on",
        )
        return {**kinds, **last}
    tail = f"before block {num_blocks - tail_blocks}" if tail_blocks else "before the task head"
    kinds[("forward", "down", "hidden")] = _Kind(
        name=f"{ANSWERS}: hidden states, {tail}",
        allows="imitate the body by learning from its answers (model extraction), and test whether a text that it "
        "already has was trained on by another party (membership inference)",
        uncovered="what the body can do, to whoever may ask it",
    )
    kinds[("backward", "up", "grad")] = _Kind(
        name=f"{GRADIENT}: at the tail's cut, {tail}",
        allows="infer labels (rows of one class have gradients of like direction and length)",
        uncovered="much about the label of every row that was trained on",
    )
    kinds[("backward", "up", "encoder_grad")] = _Kind(
        name=f"{GRADIENT}: of the encoder's last hidden states, from the decoder's tail",
        allows="infer words of the target text (they were made from it)",
        uncovered="much about what every row was trained to write",
    )
    return {**kinds, **last}


def is_second_leg(entry: TrafficEntry, model_parties: Container[str]) -> bool:
    """Return whether the entry is of the model party's own stream: what the hub passed on."""
    return entry.party in model_parties


def _first_legs(ledger: Sequence[TrafficEntry], model_party: str) -> list[TrafficEntry]:
    """Return the ledger as the data parties' streams have it.

    What only the second leg has (a message between model party and hub, say) stays, seen from its far end.
    """
    first = [entry for entry in ledger if not is_second_leg(entry, (model_party,))]
    known = {(entry.party, *_key(entry)) for entry in first}
    turned = [turn(entry) for entry in ledger if is_second_leg(entry, (model_party,))]
    return first + [entry for entry in turned if (entry.party, *_key(entry)) not in known]


def turn(entry: TrafficEntry) -> TrafficEntry:
    """Return the entry as its other end has it."""
    direction: Literal["up", "down"] = "down" if entry.direction == "up" else "up"
    return replace(entry, party=entry.peer, peer=entry.party, direction=direction)


def _key(entry: TrafficEntry) -> Key:
    if entry.tensor == HEADER:
        return ANY, entry.direction, HEADER
    return entry.operation, entry.direction, entry.tensor


def _grouped(ledger: Iterable[TrafficEntry]) -> dict[Key, Seen]:
    """Sum the ledger over parties, in the order in which kinds first occur."""
    grouped: dict[Key, Seen] = {}
    for entry in ledger:
        before = grouped.get(_key(entry), Seen(bytes=0, messages=0))
        grouped[_key(entry)] = Seen(bytes=before.bytes + entry.bytes, messages=before.messages + entry.messages)
    return grouped


def _seen(ledger: Iterable[TrafficEntry]) -> Seen:
    """Sum bytes and messages; each message has one header, and may have several tensors."""
    entries = list(ledger)
    headers = [entry for entry in entries if entry.tensor == HEADER]
    return Seen(
        bytes=sum(entry.bytes for entry in entries), messages=sum(entry.messages for entry in headers or entries)
    )


def _with_control(seen: Seen, control: ControlTraffic | None) -> Seen:
    if control is None:
        return seen
    return Seen(bytes=seen.bytes + control.bytes, messages=seen.messages + control.messages)


def _covered(ledger: Iterable[TrafficEntry]) -> dict[Key, str]:
    """Return what each kind of tensor that left a data party went through, where anything was."""
    by_key: dict[Key, dict[str, int]] = {}
    for entry in ledger:
        if entry.direction == "up" and entry.tensor != HEADER:
            counts = by_key.setdefault(_key(entry), {})
            counts[entry.covers] = counts.get(entry.covers, 0) + entry.messages
    said = {}
    for key, counts in by_key.items():
        total = sum(counts.values())
        parts = [
            f"{covers} ({'all' if count == total else f'{count} of {total}'} messages)"
            for covers, count in counts.items()
            if covers
        ]
        if parts:
            said[key] = "; ".join(parts)
    return said


def _left_under(covered_by: str) -> str:
    return f"what an attack still finds under {covered_by}; measure it before relying on it"


def _undescribed_name(key: Key) -> str:
    operation, direction, tensor = key
    return f"{UNDESCRIBED}: '{tensor}' of '{operation}', {direction}"


def _tensor_row(receiver: str, key: Key, seen: Seen, kinds: Mapping[Key, _Kind], covered_by: str | None) -> ObserverRow:
    kind = kinds.get(key)
    if kind is None:
        logger.warning("The ledger has %s; nobody has written down what it gives away.", _undescribed_name(key))
        kind = _Kind(
            name=_undescribed_name(key),
            allows="infer nobody knows what: no one has written down what this tensor gives away",
            uncovered="all of it; treat it as the text itself until it is described in report/observers.py",
        )
    return ObserverRow(
        observer=receiver,
        tensor=kind.name,
        seen=seen,
        allows=kind.allows,
        covered_by=covered_by,
        uncovered=kind.uncovered if covered_by is None else _left_under(covered_by),
    )


def _computed_rows(partition: Partition, by_key: Mapping[Key, Seen]) -> list[ObserverRow]:
    """Say what the model party learns from the answer that it computes itself."""
    if partition == "HT" and ("forward", "down", "logits") in by_key:
        return [
            ObserverRow(
                observer=MODEL_PARTY,
                tensor=f"{LOGITS}: which it computes itself",
                seen=by_key[("forward", "down", "logits")],
                allows="read the model's answer to every row",
                covered_by=None,
                uncovered="every answer; only Head-Body-Tail keeps the last layers at the data party",
            )
        ]
    if partition == "HBT" and ("forward", "down", "hidden") in by_key:
        return [
            ObserverRow(
                observer=MODEL_PARTY,
                tensor=f"{ANSWERS}: which it computes itself",
                seen=by_key[("forward", "down", "hidden")],
                allows="complete the model with a tail of its own, or the public one, and guess the answers "
                "(model completion)",
                covered_by=None,
                uncovered="much about the answers, and more the less the tail was trained",
            )
        ]
    return []


def _hub_rows(body_host: str, *, tls: bool, seen: Seen, known: Sequence[str]) -> list[ObserverRow]:
    if body_host != "strategy":
        ends = "TLS ends at the hub" if tls else "nothing was encrypted"
        return [
            ObserverRow(
                observer=HUB_OPERATOR,
                tensor=f"all tensors between the data parties and {_holder(body_host)}, in the clear ({ends})",
                seen=seen,
                allows="do whatever the model party can do with them",
                covered_by=None,
                uncovered="the same as at the model party; choose a hub that every party trusts as much",
            )
        ]
    return [
        ObserverRow(
            observer=HUB_OPERATOR,
            tensor="all tensors above: hub, model party and aggregating server are one process",
            seen=seen,
            allows=f"combine what each of the three roles sees{_with_parts(known)}",
            covered_by=None,
            uncovered="no role is separated from another; host the body at a node of its own to separate them",
        )
    ]


def _holder(body_host: str) -> str:
    """Name who holds the model party's blocks."""
    return {"strategy": "the strategy", "node": "a node of its own"}.get(body_host, f"'{body_host}'")


def _with_parts(known: Sequence[str]) -> str:
    """Say what one operator gains from knowing the trained parameters of parts that it does not hold itself."""
    gains: list[str] = []
    if "head" in known:
        gains.append("know the trained head, which makes model inversion easier")
    if "tail" in known:
        gains.append("run the trained tail, and so read the model's answer to every row")
    return "".join(f"; {gain}" for gain in gains)


def _aggregation_rows(
    parts: Sequence[str],
    control: ControlTraffic | None,
    adapters: Sequence[str],
    covered_by: str | None,
    *,
    summed: bool,
) -> list[ObserverRow]:
    seen = Seen(bytes=control.bytes, messages=control.messages) if control else None
    rows: list[ObserverRow] = []
    if adapters:
        uncovered = "what each party's own update says about its rows; averaging hides it from the others only"
        single = covered_by
        if summed:
            single = f"secagg (the sum over a round's parties alone){'' if covered_by is None else f', {covered_by}'}"
            uncovered = (
                "what the average says about the rows of all, below; who changes public keys on the way sees more"
            )
        elif covered_by is not None:
            uncovered = _left_under(covered_by)
        rows.append(
            ObserverRow(
                observer=AGGREGATING_SERVER,
                tensor=f"{ADAPTERS} of each party's {' and '.join(parts)}, before averaging",
                seen=seen,
                allows="recover parts of rows from an update (gradient inversion), and test whether a text was "
                "trained on (membership inference)",
                covered_by=single,
                uncovered=uncovered,
            )
        )
    if adapters and summed:
        rows.append(
            ObserverRow(
                observer=AGGREGATING_SERVER,
                tensor=f"{ADAPTERS} of {' and '.join(parts)}, summed over a round's parties",
                seen=None,
                allows="test whether a text was trained on by someone (membership inference)",
                covered_by=covered_by,
                uncovered="how much the average says of a row; the fewer the parties, the more",
            )
        )
    rows.append(
        ObserverRow(
            observer=AGGREGATING_SERVER,
            tensor="row counts, losses and metrics of each party",
            seen=seen,
            allows="know how many rows each party has and how well the model does on them",
            covered_by=None,
            uncovered="size and difficulty of each party's data",
        )
    )
    if len(adapters) > 1:
        alone = "; with two parties, subtract its own and have the other's exactly" if len(adapters) == 2 else ""
        rows.append(
            ObserverRow(
                observer=OTHER_DATA_PARTIES,
                tensor=f"{ADAPTERS}, averaged over {len(adapters)} parties",
                seen=None,
                allows=f"test whether a text was trained on by someone (membership inference){alone}",
                covered_by=covered_by,
                uncovered="less than the server sees, as others are mixed in; nothing limits it by proof",
            )
        )
    return rows


def _network_row(*, tls: bool, loopback: bool, seen: Seen) -> ObserverRow:
    if tls:
        return ObserverRow(
            observer=NETWORK,
            tensor="sizes and times of messages; contents are encrypted",
            seen=seen,
            allows="estimate lengths of texts and numbers of rows, and know who works when",
            covered_by="TLS (contents, against outsiders; not against model party or hub operator)",
            uncovered="sizes and times",
        )
    if loopback:
        return ObserverRow(
            observer=NETWORK,
            tensor=_NO_NETWORK,
            seen=Seen(bytes=0, messages=0),
            allows="see nothing; whoever administers the machine sees all of it",
            covered_by="loopback (no network between parties)",
            uncovered="the links were not encrypted; between companies, use TLS",
        )
    return ObserverRow(
        observer=NETWORK,
        tensor="all tensors and adapters, in the clear",
        seen=seen,
        allows="do whatever model party and aggregating server can do with them, and change them on the way",
        covered_by=None,
        uncovered="everything that was sent; use TLS",
    )


def _no_one_rows(
    partition: Partition, by_key: Mapping[Key, Seen], body_host: str, *, text_stays: bool, labels_stay: bool
) -> list[ObserverRow]:
    """Say what was never sent, and why; a row is left out as soon as the ledger or the job says otherwise."""
    sent = {tensor for _, _, tensor in by_key}
    gives_labels_away = partition == "HT" and ("backward", "up", "grad") in by_key
    last = "tail and loss run" if partition == "HBT" else "the loss runs"
    never: list[tuple[str, str, str]] = []
    if text_stays and "input_ids" not in sent:
        never.append(
            (
                f"{TEXT} and its token numbers",
                "not sent: embedding and head run at the data party",
                "reconstruction from smashed data, above",
            )
        )
    if labels_stay and "labels" not in sent and not gives_labels_away:
        never.append((LABELS, f"not sent: {last} at the data party", "inference from gradients and answers, above"))
    part = "the body" if partition == "HBT" else "the model party's blocks"
    never.append(
        (
            f"weights of {part}, by anyone but the model party",
            f"not sent: they are loaded and trained at {_holder(body_host)}",
            "the public checkpoint that they started from, and imitation by whoever may ask",
        )
    )
    nothing = Seen(bytes=0, messages=0)
    return [
        ObserverRow(
            observer=NO_ONE, tensor=tensor, seen=nothing, allows="nothing directly", covered_by=reason, uncovered=rest
        )
        for tensor, reason, rest in never
    ] + _left_rows(text_stays=text_stays, labels_stay=labels_stay, sent=sent)


def _left_rows(*, text_stays: bool, labels_stay: bool, sent: set[str]) -> list[ObserverRow]:
    """Warn of text or labels that the job lets go by a way that the ledger does not show."""
    leaving = [(TEXT, text_stays, "input_ids"), (LABELS, labels_stay, "labels")]
    return [
        ObserverRow(
            observer=MODEL_PARTY,
            tensor=f"{what}: the job lets them leave the data party",
            seen=None,
            allows=f"read the {what} itself" if what == TEXT else f"read the {what} themselves",
            covered_by=None,
            uncovered=f"all of the {what}",
        )
        for what, stays, tensor in leaving
        if not stays and tensor not in sent
    ]
