"""The data party's answer to a generate message: it writes texts for prompts that only it holds.

    party = DataParty(my_rows, state_dir=..., generation=TextGeneration(prompts=my_prompts, on_text=keep))

Prompts and texts stay in this process: `prompts` gives the former, `on_text` takes the latter.  What goes back to the
strategy are counts and seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message

from vflair_flower.clients.session import split_session
from vflair_flower.errors import ConfigurationError
from vflair_flower.generation import write_texts
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
    message: Message, context: Context, generation: TextGeneration | None, *, base_dir: Path | None = None
) -> Message:
    """Answer a generate message.

    Parameters
    ----------
    message : flwr.app.Message
        Sent by `SplitLearning.generate`.
    context : flwr.app.Context
        The node's.
    generation : TextGeneration or None
        The party's own.
    base_dir : pathlib.Path, optional
        What a relative model folder is relative to.

    Raises
    ------
    ConfigurationError
        If this party has no prompts to give, or none to be had from it.
    DataError
        If a prompt does not fit.
    """
    if generation is None:
        raise ConfigurationError(
            "this party was asked to generate, but has no prompts; give DataParty(generation=TextGeneration(...))."
        )
    decoding = DecodingSettings.from_json(str(message.content["config"]["decoding"]))
    prompts = list(generation.prompts(context))
    with split_session(message, context, base_dir=base_dir) as session:
        written = write_texts(session.model, session.tokenizer, prompts, decoding, session.spec.generation)
        report = session.report()
    generation.on_text(context, prompts, written.texts)
    metrics = {
        "texts": sum(map(len, written.texts)),
        "prompt-tokens": written.prompt_tokens,
        "new-tokens": written.new_tokens,
        "seconds": written.seconds,
    }
    return session.reply(num_examples=len(prompts), metrics=metrics, report=report)
