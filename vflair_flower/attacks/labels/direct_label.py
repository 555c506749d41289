"""Direct labels: who holds the task head gets the gradient of the logits, in which the label is the negative number.

B rows, T tokens, C classes, V vocabulary.  The gradient of the cross-entropy is (p - y) / N over N items: negative for
the label alone, and positive or zero for all others, whatever the model, its dropout and N are.
"""

from torch import Tensor

from vflair_flower.attacks.guesses import NOTHING, LabelGuess, TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.labels.seen import answer_grad, guess_of
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.attacks.view import SplitView
from vflair_flower.partition import Mode
from vflair_flower.settings import TaskKind


@attack(
    "direct-label",
    goal=Goal.LABELS,
    sees=SplitView,
    paper="Fu et al., USENIX Security 2022, arXiv 2202.06684 (direct label inference); of language models "
    "it gives the text",
    during=Phase.TRAINING,
    modes=(Mode.HT,),
    kinds=(TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM, TaskKind.MASKED_LM),
)
def direct_label(view: SplitView, knows: Knowledge, *, seed: int = 0) -> LabelGuess | TextGuess:
    """Take the only negative coordinate of the gradient of the logits; nothing is optimised and nothing known.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    """
    return guess_of(view, [_negative(answer_grad(exchange), view) for exchange in view.exchanges])


def _negative(grad: Tensor, view: SplitView) -> Tensor:
    if view.task.kind.reads_whole_texts:
        return (grad.sum(1) if grad.dim() == 3 else grad).argmin(-1)  # a decoder's: one token per row has any
    lowest, labels_BT = grad.min(-1)
    return labels_BT.where(lowest < 0, NOTHING)
