"""Which hosts may see which tokens: by the token's place in its text (a gap), and by what it is (private tokens).

B rows, T columns of a pass, N = B * T tokens, E experts of a layer, G groups of hosts.
The other parties' hosts are dealt into G groups in the order of names, beginning behind the owner; the token at place
t of its text may go to the owner's own experts and to those of group t mod G.  A private token, padding, and a token
whose group is empty go to own experts alone.  Places count from a row's first token that is no padding.
Invariants: a token's group is the same in all layers, passes and epochs, so that a host that sees them all still has
the gap; the group depends on the place alone, so that beams may change rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.experts.dispatch import Replay
from vflair_flower.experts.placement import Placement
from vflair_flower.partition.structure import text_model
from vflair_flower.privacy.vocabulary import rarest_tokens
from vflair_flower.settings import ExpertSettings
from vflair_flower.tasks import Encoded

PrivateTokens = Callable[[Tensor], Tensor]
"""Given the tokens of a pass, int64 [B, T], which of them are private: bool [B, T]."""

_DIMENSIONS = 2


class TokenRouting:
    """Says which experts each token of the pass that runs may not be sent to.

    Parameters
    ----------
    settings : ExpertSettings
        The job's.
    placement : Placement
        Who hosts what.
    party : str
        The owner of the tokens.
    private_tokens : callable, optional
        The owner's rule.

    Raises
    ------
    ConfigurationError
        If the rule goes with none of the job's other settings, or one is needed and there is none.
    """

    def __init__(
        self, settings: ExpertSettings, placement: Placement, party: str, private_tokens: PrivateTokens | None = None
    ) -> None:
        if private_tokens is not None:
            settings.check_routes_by_token()
        elif settings.private_share:
            raise ConfigurationError(
                f"private_share is {settings.private_share}, and it is not known which tokens are the party's rarest. "
                "Pass private_tokens=rare_tokens(...) of the party's own training texts."
            )
        self._private, self._gap = private_tokens, settings.routing_gap
        groups = host_groups(placement, party, settings.routing_gap)
        own = placement.experts_of(party)
        self._shut: dict[int, Tensor] = {}
        for layer, homes in enumerate(placement.host_of):
            if not homes:
                continue
            shut_GE = torch.ones(self._gap + 1, len(homes), dtype=torch.bool)  # the last row: own experts alone
            for expert, home in enumerate(homes):
                open_to = slice(None) if expert in own[layer] else groups.get(placement.hosts[home], slice(0))
                shut_GE[open_to, expert] = home in placement.opted_out
            self._shut[layer] = shut_GE
        self._group_N: Tensor | None = None

    def sets_of_masked(self) -> Iterator[dict[int, tuple[int, ...]]]:
        """Yield, per layer, the experts that each group's tokens may not be sent to, and those of private ones."""
        for group in range(self._gap + 1):
            yield {layer: tuple(shut_GE[group].nonzero().flatten().tolist()) for layer, shut_GE in self._shut.items()}

    def masked(self, layer: int, replay: Replay | None = None) -> Tensor:
        """Return which experts the tokens of the pass that runs may not be sent to, bool [N, E]; [1, 1] in own layers.

        With `replay`, of the pass that a block was run in first.
        """
        if layer not in self._shut:
            return torch.zeros(1, 1, dtype=torch.bool)
        group_N = self._group_N
        if replay is not None:
            group_N = replay.group_N = group_N if replay.group_N is None else replay.group_N
        if group_N is None:
            raise ModelError("a router was called outside its model's forward pass, and tokens' places are not known.")
        return self._shut[layer][group_N]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note the tokens of each pass of a model inside the block."""
        found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if found is None:
            raise ModelError("the model is none of transformers', so that its tokens' places are not known.")
        handle = text_model(found).register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._group_N = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BT = args[0] if args else kwargs.get("input_ids")
        entered = ids_BT if ids_BT is not None else kwargs["inputs_embeds"]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        done = 0 if cache is None else int(cache.get_seq_length())
        place_BT, padding_BT = places(entered.shape[:_DIMENSIONS], done, mask)
        group_BT = torch.where(padding_BT, self._gap, place_BT % self._gap)
        if self._private is not None:
            if ids_BT is None:
                raise ModelError("private tokens are told by their numbers; call the model with input_ids.")
            learning = module.training and torch.is_grad_enabled()
            group_BT[_private(self._private, ids_BT, learning=learning)] = self._gap
        self._group_N = group_BT.flatten()


def host_groups(placement: Placement, party: str, gap: int) -> dict[str, int]:
    """Return the group of each other party's host, by its name."""
    ring = placement.hosts.index(party) + 1
    others = [host for host in placement.hosts[ring:] + placement.hosts[: ring - 1] if host in placement.called]
    return {host: index % gap for index, host in enumerate(others)}


def places(shape: Sequence[int], done: int, mask: Any) -> tuple[Tensor, Tensor]:
    """Return where the tokens of a pass stand in their texts, int64 [B, T], and which are padding, bool [B, T].

    Parameters
    ----------
    shape : sequence of int
        B and T.
    done : int
        How many columns a cache holds from earlier passes.
    mask : torch.Tensor or None
        ``[B, done + T]``, 0 for padding.

    Raises
    ------
    ModelError
        If the mask is of another kind.
    """
    rows, columns = shape
    column_BT = torch.arange(done, done + columns).expand(rows, columns)
    if mask is None:
        return column_BT, torch.zeros(rows, columns, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != (rows, done + columns):
        seen = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ModelError(
            f"the attention mask is {seen}, and {done + columns} columns are known of {rows} rows; where a text begins "
            "cannot be told from it. Pass one number per token: 1, or 0 for padding."
        )
    real = mask.cpu() != 0
    return column_BT - real.long().argmax(-1, keepdim=True), ~real[:, done:]


def rare_tokens(
    encoded: Sequence[Encoded], *, share: float, vocabulary: int, special_ids: Sequence[int] = ()
) -> PrivateTokens:
    """Return a rule by which the rarest tokens of some texts are private, and all that they lack.

    Parameters
    ----------
    encoded : sequence of encoded rows
        The party's own training texts.
    share : float
        Above 0 and at most 1, of the distinct tokens in the texts; special tokens are never private.
    vocabulary : int
        How many tokens the model knows.
    special_ids : sequence of int
        Tokens that no text is written with.

    Examples
    --------
    >>> from vflair_flower.tasks import EncodedText
    >>> texts = [EncodedText((5, 5, 6, 7, 5, 6), (5, 5, 6, 7, 5, 6), "row")]
    >>> rule = rare_tokens(texts, share=0.3, vocabulary=9, special_ids=(0,))
    >>> rule(torch.arange(5, 9)).tolist()
    [False, False, True, True]
    """
    open_V = torch.ones(vocabulary, dtype=torch.bool)
    open_V[list(special_ids)] = False
    private_V = rarest_tokens(encoded, open_V, share=share)
    return lambda ids_BT: private_V[ids_BT.cpu()]


def _private(rule: PrivateTokens, ids_BT: Tensor, *, learning: bool) -> Tensor:
    private_BT = rule(ids_BT)
    if private_BT.dtype != torch.bool or private_BT.shape != ids_BT.shape:
        raise ConfigurationError(
            f"private_tokens returned {private_BT.dtype} of shape {tuple(private_BT.shape)} for {tuple(ids_BT.shape)} "
            "tokens; return one bool for each."
        )
    private_BT = private_BT.cpu().clone()
    if learning:  # the gradient at a token says which one comes next
        private_BT[:, :-1] |= private_BT[:, 1:].clone()
    return private_BT
