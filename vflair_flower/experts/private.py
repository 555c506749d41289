"""A host's side of DP-SGD: clips what each row of an owner's texts would change of the experts here, and adds noise.

H hosts, L layers with experts, C the bound of a segment that is not the data party's own, s_B its noise multiplier.
Tokens come to a host layer by layer, and a row's tokens to several hosts.  So each layer here has the bound
C / sqrt(L), which keeps a row's gradient of all experts here within C (group-wise clipping, equal groups: He et al.,
arXiv 2212.01539), and each host adds noise of s_B sqrt(H), so that all hosts together are one mechanism of s_B.
The gradient of a row is taken by a backward pass over its tokens alone; no hook could mix rows or miss a parameter.
Invariant: no step is taken without noise, whichever owners take it together.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vflair_flower.errors import SessionError
from vflair_flower.experts.dispatch import Answer, Portion
from vflair_flower.experts.placement import Placement
from vflair_flower.privacy.secret import Noise, Secret
from vflair_flower.remote.updates import Gradients
from vflair_flower.spec import SplitSpec

RowPass = Callable[[Tensor], Mapping[str, Tensor]]
"""Given which of a call's tokens are one row's, int64 [U], returns the parameters' gradients by them alone."""


class PrivateExperts:
    """Bounds and noise of one host over a session.

    Parameters
    ----------
    spec : SplitSpec
        The job, with DP-SGD.
    placement : Placement
        Who hosts what.
    party : str
        The host.
    server_round : int
        Of the session; names the noise where a job wants it to be the same whenever it is run.
    """

    def __init__(self, spec: SplitSpec, placement: Placement, party: str, *, server_round: int) -> None:
        from vflair_flower.privacy.dpsgd.body import BodyPrivacy  # which needs Opacus

        assert spec.privacy is not None
        layers = sum(bool(layer) for layer in placement.experts_of(party))
        self.noise: BodyPrivacy = BodyPrivacy(spec.privacy, bodies=training_hosts(spec, placement))
        self._bound = spec.privacy.body_clip / math.sqrt(max(layers, 1))
        self._expected_rows = spec.training.batch_size
        repeatable = Secret.repeatable(spec.defence_seed, f"host {party}") if spec.defence_seed else None
        self.noise.begin(Noise(repeatable or Secret.fresh(), "dp-sgd", "round", server_round))

    @classmethod
    def of(cls, spec: SplitSpec, placement: Placement, party: str, *, server_round: int) -> "PrivateExperts | None":
        """Return what a job needs: None without DP-SGD, or where experts are not trained."""
        if spec.privacy is None or not training_hosts(spec, placement):
            return None
        return cls(spec, placement, party, server_round=server_round)

    def gradients(self, text_U: Tensor, row_pass: RowPass) -> Gradients:
        """Return the clipped sum over a call's rows, divided by the rows that a step is expected to have.

        Parameters
        ----------
        text_U : Tensor
            Integers [U], to which of the owner's rows each token belongs.
        row_pass : callable
            See `RowPass`.

        Raises
        ------
        SessionError
            A row's gradient is not finite.
        """
        from vflair_flower.privacy.dpsgd.gradients import Dense
        from vflair_flower.privacy.dpsgd.noise import clipped_sum

        sums: Gradients = {}
        for text in torch.unique(text_U).tolist():
            own = row_pass(torch.nonzero(text_U == text).flatten())
            with torch.no_grad():
                clipped = clipped_sum({name: Dense(one.unsqueeze(0)) for name, one in own.items()}, self._bound)
                for name, one in clipped.items():
                    sums[name] = sums[name] + one if name in sums else one
        return {name: one / self._expected_rows for name, one in sums.items()}


def training_hosts(spec: SplitSpec, placement: Placement) -> int:
    """Return how many hosts learn from each owner's rows: none where experts stay as they are."""
    return len(placement.called) if spec.experts is not None and spec.experts.trained == "all" else 0


class StandInExperts:
    """Answers a model's calls of experts where nobody may be called: while rows' gradients are tried.

    Row by row, and differentiable in what it is given, as experts are (`vflair_flower.experts.dispatch.ExpertCalls`).
    """

    combine = "owner"

    def forward(
        self, layer: int, rows_RD: Tensor, expert_R: Tensor, token_R: Tensor, weight_R: Tensor, *, keep: bool
    ) -> Sequence[Answer]:
        """Return each row, and its neighbours' numbers added to it."""
        place_R = torch.arange(len(expert_R))
        portion = Portion(
            layer=layer,
            host="",
            rows_N=place_R,
            expert_N=expert_R.cpu(),
            token_N=place_R,
            tokens_U=token_R.cpu(),
            first_U=place_R,
            rank_N=torch.zeros_like(place_R),
        )
        return [Answer(portion=portion, call=0, output=rows_RD + rows_RD.roll(1, dims=1))]

    def backward(
        self, answers: Sequence[Answer], grad_RD: Tensor, weight_R: Tensor
    ) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        """Return the gradient of the rows."""
        row_grad_RD = grad_RD * weight_R.to(grad_RD).unsqueeze(-1)
        return [(row_grad_RD + row_grad_RD.roll(-1, dims=1), None) for _ in answers]

    def refuse_too_few(self, answered_R: Tensor, token_R: Tensor, layer: int) -> None:
        """All have answered."""


def check_texts(text_U: Tensor | None, count: int, *, source: str) -> None:
    """Raise SessionError unless a call says of each of its tokens to which of the owner's rows it belongs."""
    if text_U is None or text_U.shape != (count,):
        raise SessionError(
            f"'{source}' sent {count} tokens to be learnt from, and did not say of each which row it is of; the job "
            "trains by DP-SGD, and without that a row's gradient cannot be clipped. Train with the session's privacy, "
            "at the same version."
        )
