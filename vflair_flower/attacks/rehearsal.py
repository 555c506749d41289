"""A rehearsal: a real session of one victim and a model party, with what was seen and what is true.

The parties are those of a job: segments from one checkpoint, joined by a hub, every tensor checked against the
agreement; only the network is left out.  So an attack on a finished run sees what it would have seen in it, at any cut.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vflair_flower.attacks.registry import Phase
from vflair_flower.attacks.scoring import Truth
from vflair_flower.attacks.view import SplitView, split_view
from vflair_flower.partition import Channel, ModelSource, load_segment
from vflair_flower.partition.sources import load_config
from vflair_flower.partition.structure import num_blocks
from vflair_flower.privacy import Shield
from vflair_flower.privacy.opening import open_shield, prepare_defences
from vflair_flower.remote import MODEL_PARTY, BodyMode, RemoteSegment, SegmentServer, agreement_for
from vflair_flower.session import Hub, Sighting, Tap
from vflair_flower.settings import GenerationSettings, one_of
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import (
    Encoded,
    Example,
    PromptRow,
    Secret,
    collate,
    encode_prompts,
    encode_task,
    padding_token_id,
)

PARTY = "victim"
DEADLINE_S = 600.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Rehearsal:
    """What came of a session.

    Parameters
    ----------
    view : SplitView
        For attacks.
    truth : Truth
        For the scorer alone.
    sightings : tuple of Sighting
        All that passed the hub, with copies of the tensors.
    """

    view: SplitView
    truth: Truth
    sightings: tuple[Sighting, ...]


def rehearse(
    source: ModelSource,
    spec: SplitSpec,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    phase: Phase | str = Phase.INFERENCE,
    batch_rows: int = 16,
    new_tokens: int = 32,
    secrets: Sequence[Secret] = (),
    learnt: Mapping[str, Any] | None = None,
) -> Rehearsal:
    """Let a victim run its rows through a cut model, once, with the job's defences.

    Parameters
    ----------
    source : ModelSource
        The checkpoint that both hold their parts of.
    spec : SplitSpec
        The job; gives cut, task, wire and lengths.  Nothing is tuned: no optimiser step is taken.
    rows : sequence of examples
        The victim's.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    phase : Phase
        ``"inference"``: forward passes without gradients; ``"training"``: forward and backward passes with dropout as
        the model has it; ``"generation"``: prompts, and greedy tokens after them, through a cache.
    batch_rows : int
        Rows per batch.
    new_tokens : int
        How many tokens are written, in ``"generation"``; of the last one nobody but the victim sees anything.
    secrets : sequence of Secret
        Planted in the rows; they become part of the truth.
    learnt : mapping, optional
        State of the party's `Shield`; without, defences that must learn something learn it from these rows.
    """
    spec = rehearsed(replace(spec, averaging="round", experts=None), phase, batch_rows, new_tokens)
    encoded = encode_victims(spec, rows, tokenizer, phase)
    sightings: list[Sighting] = []
    with _parties(source, spec, sightings, training=phase == Phase.TRAINING) as victim:
        if learnt is not None:
            victim.shield.load_state_dict(learnt)
        else:
            trained_on = encode_task(spec.task.kind, rows, tokenizer, max_tokens=spec.training.max_tokens)
            prepare_defences(
                victim.shield, trained_on, victim.model, victim.channel, victim.remote, padding_token_id(tokenizer)
            )
        orders: list[Tensor] = []

        def follow(first_row: int, rows: int) -> None:
            sent = victim.remote.sent_rows
            orders.append(first_row + (torch.arange(rows) if sent is None else sent))

        pad_id = padding_token_id(tokenizer)
        written = run_victim(victim.model, encoded, pad_id, phase, batch_rows, new_tokens, after_batch=follow)
    sent_rows = torch.cat(orders).tolist()  # the truth is in the order in which rows were seen
    encoded = [encoded[row] for row in sent_rows]
    written = None if written is None else [written[row] for row in sent_rows]
    view = split_view(sightings, plan=spec.plan, num_blocks=num_blocks(load_config(source, spec.task)), task=spec.task)
    truth = Truth.of(encoded, tokenizer, texts=written, secrets=secrets)
    return Rehearsal(view=view, truth=truth, sightings=tuple(sightings))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Victim:
    model: nn.Module
    channel: Channel
    remote: RemoteSegment
    shield: Shield


@contextmanager
def _parties(source: ModelSource, spec: SplitSpec, sightings: list[Sighting], *, training: bool) -> Iterator[_Victim]:
    blocks = num_blocks(load_config(source, spec.task))
    own = load_segment(source, spec.plan.data_party(blocks), spec.task, seed=spec.seed)
    body = load_segment(source, spec.plan.model_party(blocks), spec.task, seed=spec.seed)
    server = SegmentServer(body, spec, body_mode=BodyMode.SYNCHRONOUS, deadline_s=DEADLINE_S)
    agreement = agreement_for(spec, own.model.config)
    shield = open_shield(spec, own, source, party=PARTY, occasion="rehearsal")
    shield.train(training)
    own.model.train(training)

    with (
        Hub(bind="inproc") as hub,
        hub.open_session(
            [PARTY], agreement, hosts={MODEL_PARTY: server}, deadline_s=DEADLINE_S, tap=keeping(sightings)
        ) as session,
    ):
        server.begin([PARTY], server_round=1, training=training)
        with (
            hub.connect(session, PARTY, guard=shield.guard) as link,
            shield.watching(own.model, own.channel),
        ):
            remote = RemoteSegment(link, spec, shield=shield)
            with own.channel.joined(remote):
                yield _Victim(model=own.model, channel=own.channel, remote=remote, shield=shield)


def rehearsed(spec: SplitSpec, phase: Phase | str, batch_rows: int, new_tokens: int) -> SplitSpec:
    """Return a job's specification for a rehearsal: nothing is tuned, and batches and texts are as large as asked."""
    one_of("phase", str(phase), tuple(Phase))
    training = replace(spec.training, batch_size=batch_rows, evaluation_batch_size=batch_rows)
    writing = GenerationSettings(max_rows=batch_rows, max_length=spec.training.max_tokens + new_tokens)
    return replace(spec, tuning=None, training=training, generation=writing)


def encode_victims(
    spec: SplitSpec, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, phase: Phase | str
) -> Sequence[Encoded]:
    """Encode rows as the phase needs them: where texts are written, prompts alone."""
    if phase == Phase.GENERATION:
        prompts = [row for row in rows if isinstance(row, PromptRow)]
        return encode_prompts(prompts, tokenizer, max_tokens=spec.training.max_tokens)
    return encode_task(spec.task.kind, rows, tokenizer, max_tokens=spec.training.max_tokens)


def keeping(sightings: list[Sighting]) -> Tap:
    """Return a tap that keeps all it sees, with copies of the tensors."""

    def look(seen: Sighting) -> None:
        copies = {name: tensor.clone() for name, tensor in seen.tensors.items()}
        sightings.append(replace(seen, tensors=copies))

    return look


def run_victim(
    model: nn.Module,
    encoded: Sequence[Encoded],
    pad_id: int,
    phase: Phase | str,
    batch_rows: int,
    new_tokens: int,
    *,
    before_batch: Callable[[int, Tensor], None] = lambda first_row, mask_BT: None,
    after_batch: Callable[[int, int], None] = lambda first_row, rows: None,
) -> list[Tensor] | None:
    """Run a victim's rows through its model, in an open session.

    Parameters
    ----------
    model : torch.nn.Module
        With what joins its holes.
    encoded, pad_id, phase, batch_rows, new_tokens
        As of `rehearse`.
    before_batch : callable
        Told the number of each batch's first row, and its mask with the tokens that will be written, [B, T].
    after_batch : callable
        Told the number of each batch's first row, and how many it has.

    Returns
    -------
    list of Tensor or None
        What was written: for each row the prompt's tokens and all new ones but the last; None in other phases.
    """
    written: list[Tensor] = []
    for start in range(0, len(encoded), batch_rows):
        side: Literal["left", "right"] = "left" if phase == Phase.GENERATION else "right"
        batch = collate(encoded[start : start + batch_rows], pad_token_id=pad_id, padding_side=side)
        mask_BT = batch.attention_mask
        if phase == Phase.GENERATION:
            before_batch(start, torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), new_tokens)], dim=-1))
            written += _written(model, batch.input_ids, mask_BT, pad_id, new_tokens)
            after_batch(start, len(mask_BT))
            continue
        before_batch(start, mask_BT)
        if phase == Phase.TRAINING:
            model(**batch.inputs).loss.backward()
        else:
            with torch.no_grad():
                model(**batch.inputs)
        after_batch(start, len(mask_BT))
    return written or None


def _written(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, pad_id: int, new_tokens: int) -> list[Tensor]:
    with torch.no_grad():
        whole_BT = model.generate(  # type: ignore[operator]
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad_id,
        )
    width = ids_BT.shape[1]
    pairs = zip(whole_BT, mask_BT, strict=True)
    return [torch.cat([ids[:width][mask.bool()], ids[width:-1]]) for ids, mask in pairs]
