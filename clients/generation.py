"""The data party's answer to a generate message: it writes texts for prompts that only it holds.

    party = DataParty(my_rows, state_dir=..., generation=TextGeneration(prompts=my_prompts, on_text=keep))

Prompts and texts stay in this process: `prompts` gives the former, `on_text` takes the latter.  What goes back to the
strategy are counts and seconds.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from flwr.app import Context, Message

from vflair_flower.clients.session import PartySession
from vflair_flower.errors import ConfigurationError
from vflair_flower.generation import Written, write_texts
from vflair_flower.settings import DecodingSettings


@dataclass(frozen=True, kw_only=True)
class TextGeneration:
    """Where a data party's prompts come from and where its texts go.

    Parameters
    ----------
    prompts : callable
        Gets the node's context, returns the prompts.
    on_text : callable
        Gets the node's context, the prompts, and for each prompt its texts (`num_return_sequences` of them); called
        once, after the session is closed.  What it raises fails this party's answer.
    """

    prompts: Callable[[Context], Sequence[str]]
    on_text: Callable[[Context, Sequence[str], Sequence[Sequence[str]]], None]


def generate_texts(
    message: Message,
    context: Context,
    generation: TextGeneration | None,
    session: AbstractContextManager[PartySession],
    *,
    prompts_needed: bool = True,
) -> Message:
    """Answer a generate message.

    Parameters
    ----------
    message : flwr.app.Message
        Sent by `SplitLearning.generate` or `CollaborativeMoE.generate`.
    context : flwr.app.Context
        The node's.
    generation : TextGeneration or None
        The party's own.
    session : context manager
        Opens the session that the message invites to.
    prompts_needed : bool
        Whether a party without prompts has nothing to do in the session.

    Raises
    ------
    ConfigurationError
        If this party has no prompts to give, or none to be had from it, and `prompts_needed`.
    DataError
        If a prompt does not fit.
    """
    if generation is None and prompts_needed:
        raise ConfigurationError(
            "this party was asked to generate, but has no prompts; give DataParty(generation=TextGeneration(...))."
        )
    decoding = DecodingSettings.from_json(str(message.content["config"]["decoding"]))
    prompts = [] if generation is None else list(generation.prompts(context))
    written = Written(texts=(), prompt_tokens=0, new_tokens=0, seconds=0.0)
    with session as opened:
        if prompts or prompts_needed:
            written = write_texts(opened.model, opened.tokenizer, prompts, decoding, opened.spec.generation)
        report = opened.report()
    if generation is not None:
        generation.on_text(context, prompts, written.texts)
    metrics = {
        "texts": sum(map(len, written.texts)),
        "prompt-tokens": written.prompt_tokens,
        "new-tokens": written.new_tokens,
        "seconds": written.seconds,
    }
    return opened.reply(num_examples=len(prompts), metrics=metrics, report=report)
