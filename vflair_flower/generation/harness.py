"""The live cut model as a model of lm-evaluation-harness: `SplitLM`, registered there as ``vflair``.

The scores are the whole model's: the harness asks for log-likelihoods and texts as of any transformers model, and the
hole calls.  Questions and answers stay at the data party; hidden states leave it, and in Head-Tail logits come back.
Invariant: nothing is asked for beyond the rows and tokens that the parties agreed on.
"""

import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import ConfigurationError, DataError, SessionError
from vflair_flower.generation.talking import Conversation, open_conversation, read_adapter
from vflair_flower.generation.tickets import Ticket
from vflair_flower.settings import GenerationSettings

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, simple_parse_args_string
except ImportError as error:
    raise ConfigurationError(
        f"lm-evaluation-harness is needed to evaluate a model on its tasks, and cannot be imported ({error}). Install "
        "it: pip install 'vflair-flower[eval]'."
    ) from error

_ARGUMENTS = ("ticket", "model", "hub", "adapter", "max_length", "add_bos_token")
_log = logging.getLogger(__name__)


@register_model("vflair")
class SplitLM(HFLM):  # type: ignore[misc] # lm_eval has no types
    """A cut model that `lm_eval.simple_evaluate` takes.

    With ``simple_evaluate(model="vflair", model_args="ticket=ann.ticket")`` it enters the ticket's session itself, and
    leaves it when the evaluation is over; further arguments are ``model``, ``hub``, ``adapter``, as for `vflair
    generate`, ``max_length`` and ``add_bos_token``.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model that writes, or a `PeftModel` around one, with its session open; set to evaluation mode.
        The model of a `Conversation` or of `vflair_flower.clients.split_session`.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    bounds : GenerationSettings
        Rows and tokens that the parties agreed on: ``spec.generation``.
    batch_size : int, str or None
        Rows at once; as many as agreed by default and for ``"auto"``.
    max_length : int, optional
        Tokens per row, at most; by default what the model has room for and the parties agreed on.
    add_bos_token : bool, optional
        Whether texts begin with the tokenizer's first token; by default as the tokenizer does it.

    Raises
    ------
    ConfigurationError
        If the model does not write, or more is asked for than was agreed.

    Examples
    --------
    >>> with open_conversation(Ticket.read(path)) as talk:  # doctest: +SKIP
    ...     lm = SplitLM(talk.model, talk.tokenizer, talk.spec.generation)
    ...     results = lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        bounds: GenerationSettings,
        *,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        writer: Any = model
        if not writer.can_generate():
            raise ConfigurationError(
                f"the model is a {type(model).__name__} that cannot write, and lm-evaluation-harness asks for the "
                "likelihood of texts. Open the session for a language model (task causal-lm)."
            )
        rows = _rows(batch_size, bounds)
        super().__init__(
            model, tokenizer=tokenizer, batch_size=rows, max_length=max_length, add_bos_token=add_bos_token
        )
        if max_length is not None and max_length > bounds.max_length:
            raise ConfigurationError(
                f"max_length is {max_length}, and the parties agreed on rows of {bounds.max_length} tokens. Choose "
                "fewer, or raise max_length where the model party serves (--max-length)."
            )
        self._max_length = min(self.max_length, bounds.max_length)
        self._bounds = bounds

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Self:
        """Enter the session of ``"ticket=path,..."``; the harness calls this."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Enter the session of a ticket, for as long as the object lives; the harness calls this.

        Parameters
        ----------
        arg_dict : mapping
            ``ticket``, a file of `vflair serve`, and what the class lists.
        additional_config : mapping, optional
            ``batch_size``, ``max_batch_size`` and ``device``, from the arguments of `simple_evaluate`.

        Raises
        ------
        ConfigurationError
            If the ticket is missing, an argument is unknown, or what it says does not fit.
        SessionError
            If the hub cannot be reached or lets this party not in.
        """
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        asked = {**arg_dict, **({"batch_size": more["batch_size"]} if "batch_size" in more else {})}
        batch_size = asked.pop("batch_size", None)
        unknown = sorted(asked.keys() - {*_ARGUMENTS})
        if unknown or not asked.get("ticket"):
            said = f"the argument {unknown[0]!r} is unknown" if unknown else "no ticket is named"
            raise ConfigurationError(
                f"{said}; the model 'vflair' takes {', '.join(_ARGUMENTS)}, and needs the ticket: "
                "model_args='ticket=tickets/ann.ticket'."
            )
        adapter = asked.get("adapter")
        with ExitStack() as stack:
            conversation = stack.enter_context(
                open_conversation(
                    Ticket.read(Path(str(asked["ticket"]))),
                    hub=asked.get("hub"),
                    model=asked.get("model"),
                    adapter=read_adapter(None if adapter is None else Path(str(adapter))),
                )
            )
            made = cls(
                conversation.model,
                conversation.tokenizer,
                conversation.spec.generation,
                batch_size=batch_size,
                max_length=asked.get("max_length"),
                add_bos_token=asked.get("add_bos_token"),
            )
            device = more.get("device", made.device)
            if str(device) != str(made.device):
                raise ConfigurationError(
                    f"device is {str(device)!r}, and this party's segment is on {str(made.device)!r}; leave it out."
                )
            weakref.finalize(made, _leave, stack.pop_all())
        return made

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write the texts that tasks ask for; raise ConfigurationError before the first if one cannot be written."""
        for request in requests:
            self._refuse_beyond_bounds(normalize_gen_kwargs(request.args[1], self.max_gen_toks))
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return texts

    def _refuse_beyond_bounds(self, asked: Mapping[str, Any]) -> None:
        each = max(int(asked.get("num_beams", 1)), int(asked.get("num_return_sequences", 1)))
        if each * self.batch_size > self._bounds.max_rows:
            raise ConfigurationError(
                f"a task asks for {each} beams, with batches of {self.batch_size} that is {each * self.batch_size} "
                f"rows, and the parties agreed on {self._bounds.max_rows} at once. Choose a batch size of "
                f"{self._bounds.max_rows // each or 'less beams'}, or raise max_rows where the model party serves."
            )
        if self.backend == "causal" and int(asked["max_gen_toks"]) >= self.max_length:
            raise ConfigurationError(
                f"a task asks for {asked['max_gen_toks']} new tokens (max_gen_toks), and a row has room for "
                f"{self.max_length}, prompt included. Ask for fewer with gen_kwargs, or raise max_length where the "
                "model party serves."
            )


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of lm-evaluation-harness with their data, ready to be asked; made by `load_tasks`."""

    manager: TaskManager
    loaded: list[Any]


def load_tasks(names: Sequence[str], *, include_paths: Sequence[Path] = ()) -> Tasks:
    """Load tasks and their data, before anybody is asked anything.

    Parameters
    ----------
    names : sequence of str
        Tasks, groups and tags of the harness or of your own, or paths of YAML files.
    include_paths : sequence of pathlib.Path
        Folders with YAML files of your own tasks.

    Raises
    ------
    DataError
        If a task is unknown, or its data cannot be had.
    """
    missing = [path for path in include_paths if not path.is_dir()]
    if missing or not names:
        raise DataError(
            f"the folder of tasks is {missing[0]}, which is none; name a folder of YAML files."
            if missing
            else "no task is named; name one or more, such as lambada_openai."
        )
    manager = TaskManager(include_path=[str(path) for path in include_paths])
    try:
        loaded = manager.load(list(names))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"the tasks {', '.join(names)} cannot be loaded ({type(error).__name__}: {error}). Choose some that "
            "`lm-eval ls tasks` lists, or name your own YAML files; their data must be here, or a hub within reach."
        ) from error
    return Tasks(manager=manager, loaded=[*loaded["groups"].values(), *loaded["tasks"].values()])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an evaluation gave.

    Parameters
    ----------
    results : dict
        As `lm_eval.simple_evaluate` returns it: ``results["results"]`` by task and metric, ``results["samples"]`` with
        every question and answer.
    """

    results: dict[str, Any]

    @property
    def table(self) -> str:
        """The scores as a Markdown table, with the harness's standard errors."""
        lines = ["| task | questions | examples | metric | score | standard error |", "|---|---|---|---|---|---|"]
        for task, scores in {**self.results["results"], **self.results.get("groups", {})}.items():
            for metric, score in scores.items():
                name, _, filtered = metric.partition(",")
                if not filtered or name.endswith("_stderr"):
                    continue
                error = scores.get(f"{name}_stderr,{filtered}")
                cells = (
                    task,
                    scores.get("sample_len", ""),
                    self.results.get("n-shot", {}).get(task, ""),
                    name if filtered == "none" else f"{name} ({filtered})",
                    f"{score:.4f}" if isinstance(score, float) else score,
                    f"{error:.4f}" if isinstance(error, float) else "",
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return all of it as JSON text."""
        return json.dumps(self.results, default=handle_non_serializable, indent=1)


def evaluate_tasks(
    conversation: Conversation,
    tasks: Tasks,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    chat_template: bool = False,
    seed: int = 0,
) -> Scores:
    """Score the model of an open session; `vflair evaluate` calls this.

    Parameters
    ----------
    conversation : Conversation
        An open session.
    tasks : Tasks
        What to ask.
    num_fewshot : int, optional
        Examples before each question; by default the task's own number.
    limit : int, optional
        Only the first questions of each task, so many.
    batch_size, max_length
        As for `SplitLM`.
    chat_template : bool
        Whether questions are put as a user's turns.
    seed : int
        Of the choice of examples, and of what is drawn.

    Raises
    ------
    ConfigurationError
        If more rows or tokens are asked for than the parties agreed on.
    SessionError
        If the model party is gone, or too slow.
    """
    bounds = conversation.spec.generation
    lm = SplitLM(conversation.model, conversation.tokenizer, bounds, batch_size=batch_size, max_length=max_length)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks.loaded,
        task_manager=tasks.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=lm.batch_size,
        apply_chat_template=chat_template,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return Scores(results=results)


def _rows(batch_size: int | str | None, bounds: GenerationSettings) -> int:
    """Return how many rows to send at once; raise ConfigurationError for more than the parties agreed on."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return bounds.max_rows
    if not str(batch_size).isdecimal() or not 1 <= int(batch_size) <= bounds.max_rows:
        raise ConfigurationError(
            f"batch_size is {batch_size}, and the parties agreed on {bounds.max_rows} rows at once. Choose 1 to "
            f"{bounds.max_rows} or 'auto', or raise max_rows where the model party serves (--max-rows)."
        )
    return int(batch_size)


def _leave(session: ExitStack) -> None:
    try:
        session.close()
    except SessionError as error:
        _log.warning("the session ended without a goodbye: %s", error)


__all__ = ["Scores", "SplitLM", "Tasks", "evaluate_tasks", "load_tasks"]
