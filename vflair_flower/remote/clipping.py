"""Clip gradients by their norm over the whole model, of which each party has a part."""

from collections.abc import Iterable

from torch import nn

from vflair_flower.remote.segment import StepCalls
from vflair_flower.remote.updates import squared_norm
from vflair_flower.settings import OptimizerSettings


def clip_gradients(parameters: Iterable[nn.Parameter], remote: StepCalls, settings: OptimizerSettings) -> float:
    """Scale this party's gradients down, in place, as the model party will scale its own at the coming step.

    Equals `torch.nn.utils.clip_grad_norm_` on the whole model but for rounding.  What crosses is one number each way.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        All that this party trains.
    remote : StepCalls
        Joins the model party.
    settings : OptimizerSettings
        The highest norm is above 0.

    Returns
    -------
    float
        The norm of the whole model's gradient before it was clipped.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = remote.joint_norm(squared_norm(gradients))
    factor = settings.clip_factor(norm)
    for gradient in gradients if factor < 1.0 else ():
        gradient.mul_(factor)
    return norm
