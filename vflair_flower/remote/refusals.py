"""What both kinds of servers, of a segment and of experts, answer to calls that cannot be."""

from vflair_flower.errors import SessionError


def not_open(party: str, call: int) -> SessionError:
    """Return the error for the gradient of a call that keeps nothing any more."""
    return SessionError(
        f"'{party}' sent the gradient of call {call}, which is not open: it was never made, was differentiated before, "
        "or its step has been taken. Run backward once per forward, before the step."
    )


def not_training(party: str) -> SessionError:
    """Return the error for a call to be differentiated where nothing is trained."""
    return SessionError(
        f"'{party}' asked for a differentiable forward pass in a session that does not train. Evaluate under "
        "torch.no_grad()."
    )
