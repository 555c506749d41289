"""DP-SGD at the model party: what `SegmentServer` does with rows' gradients where a job trains privately.

B rows of a call, T tokens, D hidden.  A call's gradients are clipped row by row before they are added to anything.
Invariant: nothing that one party's call left behind is read by another's backward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import LoadedSegment, SegmentRunner
from vflair_flower.partition.structure import hidden_size, segments_of
from vflair_flower.privacy.secret import Noise, Secret
from vflair_flower.remote.updates import Gradients, StepRequest, Update
from vflair_flower.spec import SplitSpec

if TYPE_CHECKING:
    from vflair_flower.privacy.dpsgd.rows import RowSampler, Taken

_TRIED_ROWS, _TRIED_TOKENS = 3, 5


class PrivateServing:
    """Takes rows' gradients of a segment, and holds them against the oracle at the start of every session.

    Parameters
    ----------
    module : torch.nn.Module
        The segment, as it is trained.
    update : Update
        Takes the steps; gets its noise here.
    loaded : LoadedSegment
        The segment.
    spec : SplitSpec
        The job, with DP-SGD.
    """

    def __init__(self, module: nn.Module, update: Update, loaded: LoadedSegment, spec: SplitSpec) -> None:
        from vflair_flower.privacy.dpsgd.body import BodyPrivacy
        from vflair_flower.privacy.dpsgd.rows import RowSampler, refuse_unsupported

        assert spec.privacy is not None
        refuse_unsupported(module)
        self.noise: BodyPrivacy = BodyPrivacy(spec.privacy)
        self.worst_difference = 0.0
        """Between rows' gradients and the oracle's, as a part of the largest gradient."""
        update.noise = self.noise
        self._trains = bool(update.parameters)
        self._sampler: RowSampler | None = RowSampler(module) if self._trains else None
        self._module = module
        self._spec = spec
        self._config = loaded.model.config
        self._parts = list(segments_of(self._config, loaded.segment))
        if self._trains and len(self._parts) > 1:
            raise ConfigurationError(
                f"the model has {' and '.join(self._parts)}, and the model party's segment trains blocks of both: a "
                "row crosses the cut twice, in calls whose gradients would be clipped one by one, so that a row could "
                "change twice what the account says. Set scope to 'local', or choose a model with one stack."
            )
        repeatable = Secret.repeatable(spec.defence_seed, "model-party") if spec.defence_seed else None
        self._secret = repeatable or Secret.fresh()
        self._sessions = 0

    @classmethod
    def of(cls, module: nn.Module, update: Update, loaded: LoadedSegment, spec: SplitSpec) -> "PrivateServing | None":
        """Return what a job needs: None without DP-SGD."""
        return None if spec.privacy is None else cls(module, update, loaded, spec)

    def begin(self, run: SegmentRunner, *, server_round: int) -> None:
        """Start a training session: new noise, and a look at rows' gradients before anybody calls.

        Raises
        ------
        ConfigurationError
            Rows' gradients differ from those of one backward pass per row; the parameter is named.
        """
        self._sessions += 1
        # What a job wants to be repeatable may not depend on how often a round was begun.
        words = ("round", server_round) if self._spec.defence_seed else ("session", self._sessions)
        self.noise.begin(Noise(self._secret, "dp-sgd", *words))
        if self._sampler is not None:
            self.worst_difference = self._try(run, self._sampler)

    def check(self, party: str, request: StepRequest) -> None:
        """Raise SessionError for a step without noise, where anything is trained."""
        if self._trains:
            self.noise.check(party, request)

    @contextmanager
    def capturing(self, rows: int, held: list[object]) -> Iterator[None]:
        """Run a forward pass, and put what it left for its backward pass into `held`."""
        if self._sampler is None:
            yield
            return
        held.append(self._sampler.begin(rows))
        try:
            yield
        finally:
            self._sampler.end()

    def backward(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        parameters: Mapping[str, nn.Parameter],
        taken: object,
    ) -> tuple[tuple[Tensor, ...], Gradients]:
        """Differentiate a call: return the gradients of all inputs, and the clipped sum over the expected rows.

        Parameters
        ----------
        outputs, inputs, grads
            As of `torch.autograd.grad`; the trained parameters come first among the inputs.
        parameters : mapping of str to torch.nn.Parameter
            The trained parameters.
        taken : object
            What `capturing` left in the call's forward pass.
        """
        found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True) if inputs else ()
        if self._sampler is None:
            return found, {}
        from vflair_flower.privacy.dpsgd.noise import clipped_sum

        rows = self._sampler.take(cast("Taken", taken), dict(zip(parameters, found, strict=False)))
        assert self._spec.privacy is not None
        with torch.no_grad():
            sums = clipped_sum(rows, self._spec.privacy.body_clip)
            means = {name: one.div_(self._spec.training.batch_size) for name, one in sums.items()}
        return found, means

    def _try(self, run: SegmentRunner, sampler: "RowSampler") -> float:
        from vflair_flower.privacy.dpsgd.oracle import check_rows

        generator = torch.Generator().manual_seed(0)
        dtype = self._spec.weights.torch_dtype
        like = next(self._module.parameters())
        shape = (_TRIED_ROWS, _TRIED_TOKENS, hidden_size(self._config))
        hidden_BTD = torch.randn(shape, generator=generator).to(like.device, dtype)
        mask_BT = torch.ones(shape[:2], dtype=torch.int64, device=like.device)
        mask_BT[0, -2:] = 0
        (stack,) = self._parts
        weights: list[Tensor] = []

        def loss_of(part: slice) -> Tensor:
            out = run(hidden_BTD[part].clone().requires_grad_(), mask_BT[part], None, part=stack).float()
            if not weights:  # of a linear loss; its shape is known only now
                weights.append(torch.randn((_TRIED_ROWS, *out.shape[1:]), generator=generator).to(out.device))
            return (out * weights[0][part]).sum()

        with torch.enable_grad():
            return check_rows(sampler, self._module, loss_of, _TRIED_ROWS, segment="the model party's segment")
