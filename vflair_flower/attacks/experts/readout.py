"""Labels from the gradients that hosts of experts get: which token the loss asks for at each token that they saw.

N tokens, D hidden, V vocabulary.  Behind the last layer with experts, the loss's gradient by a token's output is
J (sum over v of p_v w_v - w_y) up to a factor, where w_v is row v of the head times the final norm's scale, p what the
model predicts, and J the final norm's Jacobian; it holds no other token's label.  In language modelling labels are the
text, one token on.  Gradients of layers before hold the same, mixed over the tokens that come after.
"""

import torch
from torch import Tensor, nn

from vflair_flower.attacks.experts.public import PublicModel
from vflair_flower.attacks.experts.view import HostView
from vflair_flower.attacks.guesses import NOTHING, TextGuess
from vflair_flower.attacks.inversion.matching import forbid
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.errors import DataError, ModelError
from vflair_flower.settings import TaskKind


@attack(
    "label-readout-expert",
    goal=Goal.LABELS,
    sees=HostView,
    paper="own; the closed form of gradient matching at a cut (Zhang et al., 'Gradient Mirage'; BiSR, arXiv "
    "2409.00960) for experts' hosts, without optimisation",
    during=Phase.TRAINING,
    kinds=(TaskKind.CAUSAL_LM,),
)
def label_readout(
    view: HostView, knows: Knowledge, *, seed: int = 0, whiten: bool = True, ridge: float = 1e-3
) -> TextGuess:
    """Take the token whose row of the head points against the gradient most.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`; a row of the guess is a moment, and a guess at a token is what follows it.
    whiten : bool
        Measure angles where the head's rows lie equally in all directions, so that what the model predicts, a mean of
        many rows, weighs less; else as they are.
    ridge : float
        Of the whitening, relative to the rows' mean variance.

    Raises
    ------
    DataError
        The view holds no gradients.
    ModelError
        The model has no head of one linear map behind a norm.
    """
    rows_VD = head_rows(PublicModel(knows.surrogate).model)
    rows_VD = rows_VD - rows_VD.mean(0)
    if whiten:
        spread_DD = rows_VD.T @ rows_VD / len(rows_VD)
        width = rows_VD.shape[1]
        spread_DD += ridge * spread_DD.trace() / width * torch.eye(width, dtype=spread_DD.dtype)
        back_DD = torch.linalg.cholesky(torch.linalg.inv(spread_DD))
        rows_VD = rows_VD @ back_DD
    unit_VD = nn.functional.normalize(rows_VD, dim=-1)
    found = []
    for moment in view.moments:
        grad_ND = moment.gradients
        if grad_ND is None:
            raise DataError(
                f"of layer {moment.layer} a call has no gradient, so no label can be read. Take a view of training."
            )
        aim_ND = grad_ND.double() @ back_DD if whiten else grad_ND.double()
        ids_N = forbid(-(aim_ND @ unit_VD.T), knows.special_ids).argmax(-1)
        found.append(torch.where(grad_ND.abs().sum(-1) > 0, ids_N, NOTHING))
    return TextGuess(ids=tuple(found))


def head_rows(model: nn.Module) -> Tensor:
    """Return the head's rows times the final norm's scale, float64 [V, D]."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    norm = getattr(model.base_model, "norm", None)
    scale_D = getattr(norm, "weight", None)
    if head is None or not isinstance(scale_D, Tensor):
        raise ModelError(
            f"the model {type(model).__name__} has no linear head behind a norm with a scale, so nothing can be read "
            "from a gradient in closed form. Choose a causal language model."
        )
    weight_VD: Tensor = head.weight
    return (weight_VD.detach() * scale_D.detach()).double().cpu()
