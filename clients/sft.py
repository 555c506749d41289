"""TRL's SFTTrainer for a model whose task head is elsewhere (Head-Tail): its loss is the model's own, of its logits.

TRL's own multiplies hidden states by the task head's weights, part by part, so that the logits are never there as a
whole.  In Head-Body-Tail the data party has those weights, and TRL's `SFTTrainer` works as it is.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from vflair_flower.errors import ConfigurationError

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ConfigurationError(
        f"TRL is needed for its SFTTrainer, and cannot be imported ({error}). Install it: "
        "pip install 'vflair-flower[trl]'."
    ) from error


class LogitsSFTTrainer(SFTTrainer):  # type: ignore[misc] # mypy skips trl
    """TRL's `SFTTrainer` with the loss that the model itself makes of its logits; takes the same arguments.

    The loss is that of `SFTTrainer` but for rounding, and needs memory for all logits, which in Head-Tail come over the
    wire anyway.  TRL's `entropy` and `mean_token_accuracy` are not logged.

    Raises
    ------
    ConfigurationError
        If the loss is not to be the plain likelihood (``loss_type="nll"``).

    Examples
    --------
    >>> trainer = LogitsSFTTrainer(  # doctest: +SKIP
    ...     session.model, arguments, train_dataset=texts, processing_class=session.tokenizer,
    ...     callbacks=[session.trainer_callback()],
    ... )
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's own loss, as transformers' `Trainer` does."""
        if self.args.loss_type != "nll":
            raise ConfigurationError(
                f"loss_type is {self.args.loss_type!r}, which TRL makes of the task head's weights, and in Head-Tail "
                "they are at the model party. Choose 'nll', or cut Head-Body-Tail and take TRL's SFTTrainer."
            )
        inputs = {**inputs, "use_cache": False}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return loss, logits and labels, as transformers' `Trainer` does."""
        return Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
