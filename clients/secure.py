"""Secure aggregation at a data party: what answers its stages, and the mod that masks what a round has trained.

    app.query(SECAGG)(answer_stage)
    app.train(mods=[masked])(data_party.train)

`DataParty.register` does both.  Mods that change the reply come after `masked`:
``mods=[masked, beside_session(fixedclipping_mod)]``.  A round's secrets are in the node's own context state, which
Flower never sends.  Invariant: in a job with secure aggregation no reply with a party's own arrays is made unless this
mod is around it, and what the mod lets out has the masked vector and the round's report, nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from vflair_flower.clients.naming import party_name
from vflair_flower.control import KEY, SECAGG, SessionOffer, SumAnswer, SumStage
from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.privacy.masked_party import MaskedParty
from vflair_flower.privacy.masks import Layout, encode
from vflair_flower.spec import SplitSpec

VECTOR = "vector"
_WEIGHT = "num-examples"
_masking: ContextVar[bool] = ContextVar("vflair_masking", default=False)


def answer_stage(message: Message, context: Context) -> Message:
    """Answer a stage that has a message of its own: keys, shares, unmasking.

    Raises
    ------
    SessionError
        If the strategy asks for what this party does not give (`MaskedParty`).
    """
    asked = SumStage.from_content(message.content)
    if asked.party != party_name(context):
        raise SessionError(f"the strategy takes '{party_name(context)}' for '{asked.party}'; nothing was answered.")
    answer: dict[str, Any]
    if asked.stage == "keys":
        settings = SplitSpec.from_json(asked.spec).secure_aggregation
        if settings is None:
            raise ConfigurationError("the strategy begins a secure aggregation, and the job's specification has none.")
        party = MaskedParty(party=asked.party, job=asked.job, server_round=asked.server_round, settings=settings)
        answer = party.keys()
    else:
        party = _kept(context, asked)
        if asked.stage == "share":
            answer = party.share(asked.payload, asked.parties)
        elif asked.stage == "unmask":
            answer = party.unmask(asked.payload["summed"], asked.payload["lost"])
        else:
            raise SessionError(f"the stage {asked.stage!r} is unknown to secure aggregation; update this party.")
    _keep(context, party)
    return Message(RecordDict({KEY: SumAnswer(payload=answer).to_record()}), reply_to=message)


def masked(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mask a training reply's arrays, metrics and number of examples; a Flower mod, the first of an app's.

    Does nothing in jobs without secure aggregation.
    """
    if KEY not in message.content:
        return call_next(message, context)
    offer = SessionOffer.from_content(message.content)
    settings = SplitSpec.from_json(offer.spec).secure_aggregation
    if settings is None or not offer.training:
        return call_next(message, context)
    asked = SumStage.from_content(message.content, SECAGG)
    party = _kept(context, asked)
    party.open(asked.payload)
    message.content = RecordDict({name: record for name, record in message.content.items() if name != SECAGG})
    with _around():
        reply = call_next(message, context)
    if reply.has_error():
        return reply
    arrays, metrics, weight = _parts(reply.content)
    layout = Layout.of(arrays, metrics)
    vector = party.mask(encode(arrays, metrics, weight=weight, settings=party.settings, parties=party.parties))
    _keep(context, party)
    about = SumAnswer(payload={"layout": layout.to_json(), "seed-check": party.seed_check()})
    content = RecordDict(
        {KEY: reply.content[KEY], SECAGG: about.to_record(), VECTOR: ArrayRecord({VECTOR: Array(vector)})}
    )
    return Message(content, reply_to=message)


def check_masked() -> None:
    """Raise ConfigurationError unless `masked` is around the handler that runs."""
    if not _masking.get():
        raise ConfigurationError(
            "the job aggregates securely, and nothing would mask this party's arrays: they would go to the strategy as "
            "they are. Register with mods=[masked] (vflair_flower.clients.secure), before all other mods."
        )


@contextmanager
def _around() -> Iterator[None]:
    token = _masking.set(True)
    try:
        yield
    finally:
        _masking.reset(token)


def _parts(content: RecordDict) -> tuple[dict[str, Any], dict[str, float], int]:
    """Return a reply's arrays, metrics and weight; refuse what would be left out of the sum without a word."""
    arrays, metrics = list(content.array_records.values()), list(content.metric_records.values())
    odd = sorted(set(content.config_records) - {KEY})
    if len(arrays) != 1 or len(metrics) != 1 or odd:
        raise ConfigurationError(
            f"a reply to be masked has {len(arrays)} array records, {len(metrics)} metric records and beside them "
            f"{odd}; only one of each is summed, and what is beside them would be seen. Reply with session.reply(...)."
        )
    values: dict[str, Any] = dict(metrics[0])
    weight = values.pop(_WEIGHT, None)
    if not isinstance(weight, int):
        raise ConfigurationError(
            f"the reply's {_WEIGHT!r} is {type(weight).__name__}; masked weights are whole numbers."
        )
    lists = sorted(name for name, value in values.items() if isinstance(value, list))
    if lists:
        raise ConfigurationError(
            f"the metric {lists[0]!r} is a list, and masked metrics are numbers; report them singly."
        )
    return {name: array.numpy() for name, array in arrays[0].items()}, values, weight


def _kept(context: Context, asked: SumStage) -> MaskedParty:
    record = context.state.config_records.get(SECAGG)
    party = None if record is None else MaskedParty.from_json(str(record["json"]))
    if party is None or (party.job, party.server_round) != (asked.job, asked.server_round):
        raise SessionError(
            f"the strategy is at {asked.stage!r} of secure aggregation in round {asked.server_round}, which this party "
            "has not begun; it may have been started anew. The round must be run again."
        )
    return party


def _keep(context: Context, party: MaskedParty) -> None:
    context.state.config_records[SECAGG] = ConfigRecord({"json": party.to_json()})
