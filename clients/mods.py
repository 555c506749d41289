"""Flower's own mods on a data party's replies: client-side clipping and local differential privacy of its adapters.

    app.train(mods=[beside_session(fixedclipping_mod)])(data_party.train)

They work on the change that a round made to a party's head and tail.  The model party's segment is trained in the
session, where no Flower mod reaches; its noise is DP-SGD's (docs/dp-sgd.md).
Invariant: a mod sees of a message what Flower's own strategies put there, and nothing else.
"""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from vflair_flower.control import KEY, SECAGG
from vflair_flower.errors import ConfigurationError


def beside_session(mod: Mod) -> Mod:
    """Return a mod that does not see the way into the session; Flower's mods refuse messages with a second record.

    Parameters
    ----------
    mod : Mod
        Such as `flwr.clientapp.mod.fixedclipping_mod` or `flwr.clientapp.mod.LocalDpMod`.
    """

    def beside(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        ours = {name: record for name, record in message.content.items() if name in (KEY, SECAGG)}
        if not ours:
            return mod(message, context, call_next)

        def with_offer(inner: Message, own_context: Context) -> Message:
            inner.content = RecordDict({**inner.content, **ours})
            reply = call_next(inner, own_context)
            if reply.has_content() and SECAGG in reply.content:
                raise ConfigurationError(
                    f"the mod {getattr(mod, '__name__', type(mod).__name__)!r} would change a reply that is masked "
                    "already. Put `masked` before it: mods=[masked, beside_session(...)]."
                )
            return reply

        message.content = RecordDict({name: record for name, record in message.content.items() if name not in ours})
        return mod(message, context, with_offer)

    return beside
