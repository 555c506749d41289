"""The owner's calls to the hosts of experts: all at once, its own experts meanwhile; and what to do when one is lost.

Invariants: a call ends at the latest at the link's deadline; an answer that comes later belongs to no one.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vflair_flower.errors import PartyLostError, SessionClosedError, SessionError
from vflair_flower.experts.copies import preferred_copies, refuse_parted
from vflair_flower.experts.dispatch import Answer, Portion
from vflair_flower.experts.padding import Room, filled, rooms
from vflair_flower.experts.placement import Placement
from vflair_flower.experts.protocol import INDEX_DTYPE, Codec
from vflair_flower.remote.protocol import BACKWARD, FINISH, FORWARD, STEP
from vflair_flower.remote.segment import StepPrivacy
from vflair_flower.session import Caller, Handler, Reply, Request
from vflair_flower.spec import SplitSpec


class ExpertPrivacy(StepPrivacy, Protocol):
    """An owner's side of DP-SGD, as its calls need it (`vflair_flower.privacy.dpsgd.PrivateTraining`)."""

    @property
    def pass_rows(self) -> int:
        """How many rows the newest forward pass has."""


class ExpertCaller:
    """Calls the hosts of a model's experts; put it into `ExpertChannel.joined`.

    Parameters
    ----------
    link : Caller
        An open link; every call has its deadline.
    own : Handler or None
        This party's own host of experts, called without the link; None for one that hosts none.
    placement : Placement
        Who hosts what.
    spec : SplitSpec
        The job.
    """

    def __init__(self, link: Caller, own: Handler | None, placement: Placement, spec: SplitSpec) -> None:
        assert spec.experts is not None
        self.combine = spec.experts.combine
        self.rows_since_step = 0
        """Over how many items (rows, asked tokens) the coming step's loss is the mean; tokens unless it is set."""
        self.tokens = 0
        """Tokens, padding counted, that went through the model so far."""
        self.lost: dict[str, str] = {}
        """Hosts that did not answer well, and what was seen; they are not asked again."""
        self.privacy: ExpertPrivacy | None = None
        """This owner's DP-SGD: says which rows a pass has, and what a step asks of the hosts."""
        self.watch: Callable[[int, Portion], None] | None = None
        """Told the number and the portion of every forward call before it leaves."""
        self._link, self._own, self._placement = link, own, placement
        self._settings = spec.experts
        self._codec = Codec(spec)
        self._first = placement.spread[0]
        self._held = {host: list(map(len, placement.experts_of(host))) for host in placement.called}
        self._preferred = preferred_copies(placement, link.party)
        self._calls = 0
        self._pool = ThreadPoolExecutor(len(placement.hosts), thread_name_prefix=f"vflair-owner-{link.party}")

    def close(self) -> None:
        """Free the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forward(
        self, layer: int, rows_RD: Tensor, expert_R: Tensor, token_R: Tensor, weight_R: Tensor, *, keep: bool
    ) -> Sequence[Answer]:
        """Run rows, sorted by expert, at their hosts; see `ExpertCalls`."""
        count = int(token_R.max()) + 1
        columns = count // self.privacy.pass_rows if keep and self.privacy is not None else 0
        if layer == self._first:
            self.tokens += count
            self.rows_since_step += count if keep else 0
        expert_R, token_R = expert_R.cpu(), token_R.cpu()
        copies_RC = self._preferred[layer][expert_R]
        waiting_R = torch.ones(len(expert_R), dtype=torch.bool)
        answers: list[Answer] = []
        while True:
            asked_RC = self._alive()[copies_RC] & waiting_R.unsqueeze(-1)
            if not keep:  # nothing is learnt: one copy will do, and the next where one is lost
                asked_RC &= asked_RC.cumsum(-1) == 1
            if not bool(asked_RC.any()):
                break
            portions = self._portions(layer, copies_RC, asked_RC, expert_R, token_R)
            for answer in self._run(portions, rows_RD, weight_R, keep=keep, columns=columns):
                answers.append(answer)
                if answer.output is not None:
                    waiting_R[answer.portion.rows_N] = False
        self._refuse_lost(layer, expert_R[waiting_R])
        return answers

    def _run(
        self, portions: Sequence[Portion], rows_RD: Tensor, weight_R: Tensor, *, keep: bool, columns: int
    ) -> list[Answer]:
        """Have each host run its portion; with `columns`, the length of rows, it is told which row a token is of."""
        asked: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        for portion in portions:
            self._calls += 1
            tensors = {
                **self._codec.pack("hidden", rows_RD[portion.first_U]),
                "row": portion.token_N.to(INDEX_DTYPE),
                "expert": portion.expert_N.to(INDEX_DTYPE),
            }
            if self.combine == "host":
                tensors["weight"] = weight_R[portion.rows_N].to("cpu", torch.float32)
            if columns:
                tensors["text"] = (portion.tokens_U // columns).to(INDEX_DTYPE)
            meta = {"layer": portion.layer, "call": self._calls, "keep": keep}
            asked[portion.host] = (filled(tensors, portion.room), meta)
            if self.watch is not None:
                self.watch(self._calls, portion)
        replies = self._ask(FORWARD, asked)
        answers = []
        for portion in portions:
            output, reply = None, replies[portion.host]
            if reply is not None:
                output = self._checked("output", reply, portion, rows_RD, FORWARD)
            answers.append(Answer(portion=portion, call=int(asked[portion.host][1]["call"]), output=output))
        return answers

    def backward(
        self, answers: Sequence[Answer], grad_RD: Tensor, weight_R: Tensor
    ) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        """Return what the hosts make of the gradient of what they answered; see `ExpertCalls`."""
        asked = {}
        for answer in answers:
            if answer.output is None:
                continue
            tensors = self._codec.pack("grad", grad_RD[answer.portion.first_U])
            if self.combine == "owner":
                tensors["weight"] = weight_R[answer.portion.rows_N].to("cpu", torch.float32)
            asked[answer.portion.host] = (filled(tensors, answer.portion.room), {"call": answer.call})
        replies = self._ask(BACKWARD, asked)
        back: list[tuple[Tensor | None, Tensor | None]] = []
        waiting_R = torch.zeros(len(grad_RD), dtype=torch.bool)
        for answer in answers:
            waiting_R[answer.portion.rows_N] = True
        for answer in answers:
            portion, reply = answer.portion, replies.get(answer.portion.host)
            grad = None
            if reply is not None:
                grad = self._checked("grad", reply, portion, grad_RD, BACKWARD)
            if reply is None or grad is None:
                back.append((None, None))
            else:
                weight_grad = reply.tensors.get("weight_grad")
                back.append((grad, None if weight_grad is None else weight_grad[: len(portion.rows_N)]))
                waiting_R[portion.rows_N] = False
        for answer in answers:
            self._refuse_lost(answer.portion.layer, answer.portion.expert_N[waiting_R[answer.portion.rows_N]])
        return back

    def step(self, *, step: int, total_steps: int) -> None:
        """Tell all hosts that an optimiser step is due; returns when it is done at all of them."""
        if self.rows_since_step == 0:
            raise SessionError(
                "a step is due, but no rows went through the model since the last one, so no expert has a gradient. "
                "Run the forward and backward pass of a batch before every optimiser step."
            )
        meta: dict[str, Any] = {"rows": self.rows_since_step, "step": step, "total_steps": total_steps}
        if self.privacy is not None:
            meta |= self.privacy.request()
        replies = self._ask(STEP, {host: ({}, meta) for host in self._placement.called})
        if self.privacy is not None:  # the least of the hosts' noise: none may have left it out
            told = [0.0 if reply is None else float(reply.meta.get("noise") or 0.0) for reply in replies.values()]
            self.privacy.confirm({"noise": min(told)})
        for layer, copies_EC in enumerate(self._preferred):
            self._refuse_lost(layer, torch.nonzero(~self._alive()[copies_EC].any(-1)).flatten())
        if self._placement.replicas > 1:
            refuse_parted({host: reply.meta for host, reply in replies.items() if reply is not None})
        self.rows_since_step = 0

    def finish(self) -> None:
        """Tell all hosts that this owner is done in this session."""
        self._ask(FINISH, {host: ({}, {}) for host in self._placement.hosts})

    def joint_norm(self, squared: float) -> float:
        """Refuse: gradients are not clipped over a model whose experts are at many parties."""
        raise SessionError("max_grad_norm is set; it is not supported where experts are spread. Set it to 0.")

    def refuse_too_few(self, answered_R: Tensor, token_R: Tensor, layer: int) -> None:
        """Raise PartyLostError where fewer of a token's experts than `k_min` have answered."""
        counts_T = torch.bincount(token_R, weights=answered_R.double())
        fewest = int(counts_T.min())
        if fewest < self._settings.k_min:
            host, reason = next(iter(self.lost.items()))
            raise PartyLostError(
                host,
                f"{reason}; in layer {layer} a token is left with {fewest} experts, and k_min is "
                f"{self._settings.k_min}. Lower k_min, or train without that party",
            )

    def _lengths(self, portion: Portion) -> tuple[int, int]:
        """Return how many vectors a host answers for a portion, without and with what they are filled up by.

        One per row, or per token if it combines.
        """
        sent = Room(tokens=len(portion.first_U), rows=len(portion.rows_N))
        room = portion.room or sent
        return (sent.tokens, room.tokens) if self.combine == "host" else (sent.rows, room.rows)

    def _alive(self) -> Tensor:
        """Return, for each host, whether it is still asked."""
        return torch.tensor([host not in self.lost for host in self._placement.hosts])

    def _portions(
        self, layer: int, copies_RC: Tensor, asked_RC: Tensor, expert_R: Tensor, token_R: Tensor
    ) -> list[Portion]:
        portions = []
        for index, host in enumerate(self._placement.hosts):
            here_RC = (copies_RC == index) & asked_RC
            rows_N = torch.nonzero(here_RC.any(-1)).squeeze(-1)
            if len(rows_N) == 0 and not self._fills(layer, host):
                continue
            tokens_U, token_N = torch.unique(token_R[rows_N], return_inverse=True)
            first_U = torch.empty_like(tokens_U)
            first_U[token_N.flip(0)] = rows_N.flip(0)  # of several rows, the first is written last
            portions.append(
                Portion(
                    layer=layer,
                    host=host,
                    rows_N=rows_N,
                    expert_N=expert_R[rows_N],
                    token_N=token_N,
                    tokens_U=tokens_U,
                    first_U=first_U,
                    rank_N=here_RC[rows_N].long().argmax(-1),
                )
            )
        return self._filled_up(portions, expert_R, token_R)

    def _fills(self, layer: int, host: str) -> bool:
        """Whether a host is called also where nothing goes to it."""
        called = host in self._held and bool(self._held[host][layer]) and host not in self.lost
        return called and self._settings.padding != "none"

    def _filled_up(self, portions: list[Portion], expert_R: Tensor, token_R: Tensor) -> list[Portion]:
        """Give portions their rooms, where calls are filled up."""
        if self._settings.padding == "none":
            return portions
        tokens = int(token_R.max()) + 1
        found = rooms(
            self._settings.padding,
            {one.host: Room(tokens=len(one.first_U), rows=len(one.rows_N)) for one in portions},
            {one.host: self._held[one.host][one.layer] for one in portions},
            tokens=tokens,
            per_token=len(expert_R) // tokens,
        )
        return [replace(one, room=found[one.host]) for one in portions]

    def _refuse_lost(self, layer: int, expert_N: Tensor) -> None:
        """Raise PartyLostError for experts of which no copy has answered, where copies are to stand in."""
        if len(expert_N) == 0 or self._settings.on_host_lost != "replica":
            return
        expert = int(expert_N[0])
        hosts = self._placement.hosts_of(layer, expert)
        reasons = "; ".join(self.lost.get(host, f"'{host}' has no part in this call any more") for host in hosts)
        raise PartyLostError(
            hosts[0],
            f"expert {expert} of layer {layer} was at {', '.join(hosts)}, and no copy is left: {reasons}. Raise "
            "replicas to go on with more lost hosts, and begin again from the last checkpoint",
        )

    def _ask(
        self, operation: str, asked: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]
    ) -> dict[str, Reply | None]:
        """Call hosts at once, this party's own last; None for one that is lost where that is to be skipped."""
        futures: dict[str, Future[Reply]] = {}
        for host, (tensors, meta) in asked.items():
            if host not in self.lost and host != self._link.party:
                futures[host] = self._pool.submit(self._link.call, host, operation, tensors, meta)
        replies: dict[str, Reply | None] = dict.fromkeys(asked)
        own = self._link.party
        try:
            if own in asked and self._own is not None:
                tensors, meta = asked[own]
                replies[own] = self._own(Request(own, operation, dict(tensors), dict(meta)))
        finally:
            failures = {host: self._settled(future, replies, host) for host, future in futures.items()}
        for host, error in failures.items():
            if error is not None:
                self._give_up(host, operation, error)
        return replies

    @staticmethod
    def _settled(future: "Future[Reply]", replies: dict[str, Reply | None], host: str) -> SessionError | None:
        try:
            replies[host] = future.result()
        except SessionError as error:
            return error
        return None

    def _give_up(self, host: str, operation: str, error: SessionError) -> None:
        ended = isinstance(error, SessionClosedError) and operation == FINISH
        if self._settings.on_host_lost == "fail" and not ended:
            raise error
        self.lost.setdefault(host, f"the host '{host}' did not answer '{operation}': {error}")

    def _checked(self, name: str, reply: Reply, portion: Portion, like_RD: Tensor, operation: str) -> Tensor | None:
        """Return an answer's vectors, or None if they are no answer and hosts may be skipped."""
        host, width, (real, length) = portion.host, like_RD.shape[1], self._lengths(portion)
        vectors = self._codec.unpack(name, reply.tensors, like_RD.dtype)
        finite = vectors.shape == (length, width) and bool(torch.isfinite(vectors).all())
        if finite:
            return vectors if real == length else vectors[:real].clone()
        what = "numbers that are not finite" if vectors.shape == (length, width) else f"shape {tuple(vectors.shape)}"
        self._give_up(
            host,
            operation,
            SessionError(f"the host '{host}' answered '{operation}' with {what}, and ({length}, {width}) was asked"),
        )
        return None
