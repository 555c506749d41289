"""What one example of each kind of task is: texts with a label, with a number, with marked answers, or with a response.

Values only.  Each has an `id` that is unique in its split, so that every figure can be traced to rows.

A place in a text counts characters (Unicode code points), never bytes or tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar


@dataclass(frozen=True, slots=True)
class Row:
    """One text, or two that belong together, and a label.

    Parameters
    ----------
    text : str
        The text as it was written.
    label : int
        Index into the data set's `label_names`.
    id : str
        Name of the row, unique in its split.
    pair : str, optional
        The second text, for tasks on two.
    """

    text: str
    label: int
    id: str
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class NumberRow:
    """One text, or two, and a number to predict, such as how alike two sentences are."""

    text: str
    number: float
    id: str
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """An answer that stands in a context word for word, from character `start` on."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """The character after the last."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class SpanRow:
    """A question, the context that answers it, and where; no answers if the context has none."""

    question: str
    context: str
    answers: tuple[Span, ...]
    id: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt and the response that should follow it.

    Parameters
    ----------
    prompt : str
        What the model reads, with the template around it.
    response : str
        What it learns to write.
    id : str
        Name of the row, unique in its split.
    references : tuple of str
        What a metric compares with; `response` alone if empty.
    image : Path or bytes, optional
        An image file, or what such a file holds.
    tests : str
        A program that raises unless the response, put after the prompt, is right; empty if there is none.
    """

    prompt: str
    response: str
    id: str
    references: tuple[str, ...] = ()
    image: Path | bytes | None = None
    tests: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The references, or the response where there are none."""
        return self.references or (self.response,)


Example: TypeAlias = Row | NumberRow | SpanRow | PromptRow
ExampleT = TypeVar("ExampleT", bound=Example)


def text_of(example: Example) -> str:
    r"""Return all text of an example as one, for language modelling and to tell equal examples.

    Examples
    --------
    >>> text_of(Row("It rains.", 1, "a", pair="It is wet."))
    'It rains.\nIt is wet.'
    """
    if isinstance(example, SpanRow):
        return f"{example.question}\n{example.context}"
    if isinstance(example, PromptRow):
        return example.prompt + example.response
    return example.text if example.pair is None else f"{example.text}\n{example.pair}"
