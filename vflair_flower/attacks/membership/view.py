"""The view of whoever has the finished model, and texts that it asks about.

Invariant: a candidate's place and id say nothing of whether it was trained on; `member_rehearsal` sees to it.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.settings import TaskSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import Encoded


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelView:
    """What whoever has the finished model sees.

    Parameters
    ----------
    model : PreTrainedModel
        The whole trained model, adapters merged or experts in their places; in evaluation mode and frozen.
    candidates : tuple of Encoded
        Texts, with their labels, of which some were trained on.
    spec : SplitSpec
        The job that trained it, which every party knows.

    Raises
    ------
    DataError
        There are no candidates.
    ConfigurationError
        The model is in training mode, or not frozen.
    """

    model: PreTrainedModel
    candidates: tuple[Encoded, ...]
    spec: SplitSpec

    def __post_init__(self) -> None:
        if not self.candidates:
            raise DataError("there are no candidates, so there is no membership to ask about. Give some texts.")
        if self.model.training or any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigurationError(
                "the model is in training mode or not frozen, and its losses could change from one look to the next. "
                "Call eval() and requires_grad_(False) on it."
            )

    @property
    def task(self) -> TaskSettings:
        """What the model was trained for."""
        return self.spec.task
