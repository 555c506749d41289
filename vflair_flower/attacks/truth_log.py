"""The truth behind a recording of real sessions: what the data parties wrote down, in the order of an attack's view.

B rows, T tokens.  For the scorer alone; a party's log is on its own disk and comes here only if it brings it.
Invariant: row n of the truth is row n of the view that `split_view` makes of the same sightings.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vflair_flower.attacks.scoring import Truth
from vflair_flower.attacks.view import exchange_key
from vflair_flower.errors import DataError
from vflair_flower.remote.protocol import FORWARD, MODEL_PARTY
from vflair_flower.remote.truth import TrueCall, read_truth_log
from vflair_flower.session import Sighting
from vflair_flower.session.header import Kind
from vflair_flower.tasks import Secret

_Key = tuple[str, ...]


def read_truth(
    folders: Sequence[Path],
    sightings: Iterable[Sighting],
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_party: str = MODEL_PARTY,
    limit: int | None = None,
    secrets: Sequence[Secret] = (),
) -> Truth:
    """Return what is true of the view that `split_view` makes of these sightings.

    Parameters
    ----------
    folders : sequence of pathlib.Path
        The data parties' logs, ``truth/<party>``.
    sightings : iterable of Sighting
        Those that the view is made of.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    model_party, limit
        As of `split_view`.
    secrets : sequence of Secret
        Planted in the rows; those in rows of the view become part of the truth.

    Raises
    ------
    DataError
        If a folder is no such log, or nobody wrote down the truth of a call.
    """
    true: dict[_Key, list[TrueCall]] = {}
    for folder in folders:
        for call in read_truth_log(folder):
            if call.target == model_party:
                true.setdefault((call.session, call.party, *call.name.split(":")), []).append(call)
    calls: dict[_Key, int] = {}
    for seen in sightings:
        if seen.kind is Kind.CALL and seen.operation == FORWARD and model_party in (seen.source, seen.target):
            key = exchange_key(seen)
            calls[key] = calls.get(key, 0) + 1
    ids: list[Tensor] = []
    row_ids: list[str] = []
    labels: list[Tensor | None] = []
    for key, count in list(calls.items())[:limit]:
        known = true.get(key, [])
        if len(known) < count:
            raise DataError(
                f"of {' '.join(key[2:])} of party {key[1]!r} in session {key[0]}, {len(known)} of {count} calls have "
                "their truth in the folders given. Give those of all data parties, recorded with the same `every`."
            )
        texts, rows = _texts(known[:count])
        ids += texts
        row_ids += rows
        labels.append(known[0].labels)
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    return Truth(
        ids=tuple(ids),
        counted=tuple(~torch.isin(one, special) for one in ids),
        tokenizer=tokenizer,
        labels=_classes(labels),
        row_ids=tuple(row_ids),
        secrets=tuple(secret for secret in secrets if secret.row_id in row_ids),
    )


def _texts(calls: Sequence[TrueCall]) -> tuple[list[Tensor], list[str]]:
    """Return each row's tokens, without padding, and its name; tokens of a cache's calls one after the other."""
    ids_BT, mask_BT = torch.empty(0, 0), torch.empty(0, 0)
    names = list(calls[0].row_ids)
    for place, call in enumerate(calls):
        assert call.mask_BT is not None
        if place == 0:
            ids_BT, mask_BT = call.ids, call.mask_BT
            continue
        if call.cache_rows_B is not None:  # beam search goes on from other rows
            ids_BT, mask_BT = ids_BT[call.cache_rows_B], mask_BT[call.cache_rows_B]
            names = [names[row] for row in call.cache_rows_B.tolist()]
        ids_BT, mask_BT = torch.cat([ids_BT, call.ids], dim=1), torch.cat([mask_BT, call.mask_BT], dim=1)
    return [row[mask.bool()] for row, mask in zip(ids_BT, mask_BT, strict=True)], names


def _classes(labels: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows' classes, if every exchange has one per row."""
    known = [one for one in labels if one is not None and one.dim() == 1 and not one.is_floating_point()]
    return torch.cat(known).long() if known and len(known) == len(labels) else None
