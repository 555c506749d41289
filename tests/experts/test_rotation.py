"""Why experts are not rotated in secret: what a host makes of rotated states and weights (docs/decisions/0009).

The idea: an owner gives each host its experts with W Q^T in place of W, and sends Q x in place of x, with a secret
orthogonal Q; W Q^T Q x = W x, so that nothing changes.  D hidden, M rows of a host's weights, N tokens seen.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.test_experts import MATCHING, Victim, accuracy, commonest, made_up_rows
from tests.writers import save_sparse_writer
from vflair_flower.attacks import find_attack, run_attack
from vflair_flower.attacks.experts.public import PublicModel
from vflair_flower.attacks.experts.rehearsal import MoeRehearsal
from vflair_flower.attacks.experts.view import HostView
from vflair_flower.experts.modules import expert_modules, run_experts

HOST = "party-1"
KNOWN_TEXTS = 20


@torch.no_grad()
def move_norms(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    """A tiny OLMoE whose norms have weights that differ, as trained ones do."""
    folder = save_sparse_writer(tmp_path_factory.mktemp("moe"), change=move_norms)
    return Victim(folder, made_up_rows(8, seed=1), made_up_rows(100, seed=2))


@pytest.fixture(scope="module")
def rehearsal(victim: Victim) -> MoeRehearsal:
    return victim.rehearse()


@pytest.fixture(scope="module")
def public(victim: Victim, rehearsal: MoeRehearsal) -> PublicModel:
    return PublicModel(victim.knows(rehearsal).surrogate)


def secret_rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(77)))[0]


def host_weights(public: PublicModel, rehearsal: MoeRehearsal) -> Tensor:
    """Return all input weights of the host's experts in the first layer, one below the other: [M, D]."""
    own = rehearsal.placement.experts_of(HOST)[0]
    module = next(iter(expert_modules(public.model).values()))
    weights: Tensor = module.gate_up_proj.detach()[list(own)].flatten(0, 1)  # type: ignore[operator]
    return weights


def turned(view: HostView, by_DD: Tensor) -> HostView:
    return replace(view, calls=tuple(replace(call, tokens_UD=call.tokens_UD @ by_DD.T) for call in view.calls))


def read(victim: Victim, rehearsal: MoeRehearsal, view: HostView) -> float:
    found = run_attack(find_attack(MATCHING), view, victim.knows(rehearsal), settings={"exhaustive": True})
    return accuracy(rehearsal.truth, view, found.guess)


def off(found_DD: Tensor, true_DD: Tensor) -> float:
    return float((found_DD - true_DD).norm() / true_DD.norm())


def nearest_rotation(from_ND: Tensor, to_ND: Tensor) -> Tensor:
    """Return the orthogonal Q for which ``from @ Q.T`` is nearest to ``to`` (Procrustes)."""
    left, _, right = torch.linalg.svd(to_ND.T @ from_ND)
    return left @ right


def test_the_rotation_is_exact(public: PublicModel, rehearsal: MoeRehearsal) -> None:
    module, call = next(iter(expert_modules(public.model).values())), rehearsal.view(HOST).at(0).calls[0]
    q_DD = secret_rotation(call.tokens_UD.shape[1])
    expert_U = torch.zeros(len(call.tokens_UD), dtype=torch.int64)
    with torch.no_grad():
        expected = run_experts(module, call.tokens_UD, expert_U)
        before = module.gate_up_proj.clone()  # type: ignore[operator]
        module.gate_up_proj.copy_(before @ q_DD.T)  # type: ignore[operator]
        found = run_experts(module, call.tokens_UD @ q_DD.T, expert_U)
        module.gate_up_proj.copy_(before)  # type: ignore[operator]
    assert torch.allclose(found, expected, atol=1e-5)


def test_who_has_the_weights_solves_for_it_and_reads_on(
    victim: Victim, public: PublicModel, rehearsal: MoeRehearsal
) -> None:
    """Least squares over the weights alone, before a single token came."""
    view, w_MD = rehearsal.view(HOST).at(0), host_weights(public, rehearsal)
    q_DD = secret_rotation(w_MD.shape[1])
    seen, given_MD = turned(view, q_DD), w_MD @ q_DD.T
    plain = read(victim, rehearsal, view)
    assert plain > 0.5
    assert read(victim, rehearsal, seen) < 2.5 * commonest(rehearsal.truth.texts)  # the rotation by itself does hide
    solved_DD = torch.linalg.lstsq(w_MD, given_MD).solution.T
    assert off(solved_DD, q_DD) < 1e-4
    assert read(victim, rehearsal, turned(seen, solved_DD.T)) == pytest.approx(plain, abs=0.02)


def test_who_has_weights_that_are_near_solves_for_it_too(public: PublicModel, rehearsal: MoeRehearsal) -> None:
    """A private checkpoint that was trained on from a public one: the weights here are off by a third of their size."""
    w_MD = host_weights(public, rehearsal)
    q_DD = secret_rotation(w_MD.shape[1])
    away_MD = w_MD + 0.33 * w_MD.std() * torch.randn(w_MD.shape, generator=torch.Generator().manual_seed(3))
    assert off(nearest_rotation(w_MD, away_MD @ q_DD.T), q_DD) < 0.25
    unlike_MD = torch.randn(w_MD.shape, generator=torch.Generator().manual_seed(4))
    assert off(nearest_rotation(w_MD, unlike_MD @ q_DD.T), q_DD) > 1.0  # of another model altogether, nothing follows


def test_known_texts_give_it_away_without_any_weights(
    victim: Victim, public: PublicModel, rehearsal: MoeRehearsal
) -> None:
    """States of texts that the host knows, by the model without experts that every party has: D of them are enough."""
    view, size = rehearsal.view(HOST).at(0), rehearsal.view(HOST).calls[0].tokens_UD.shape[1]
    q_DD = secret_rotation(size)
    seen = turned(view, q_DD)
    texts = [torch.tensor([text.input_ids]) for text in victim.knows(rehearsal).auxiliary[:KNOWN_TEXTS]]
    known_ND = torch.cat([public.entered(ids, layers=(0,))[0].hidden_BTD[0] for ids in texts])
    assert len(known_ND) > size
    errors = []
    for count in (size // 2, size + size // 2):
        known = known_ND[torch.randperm(len(known_ND), generator=torch.Generator().manual_seed(0))[:count]]
        errors.append(off(nearest_rotation(known, known @ q_DD.T), q_DD))
        solved = nearest_rotation(known, known @ q_DD.T)
    assert errors[0] > 0.1
    assert errors[1] < 1e-3
    assert read(victim, rehearsal, turned(seen, solved.T)) == pytest.approx(read(victim, rehearsal, view), abs=0.02)


def test_lengths_and_angles_are_read_without_it(public: PublicModel, rehearsal: MoeRehearsal) -> None:
    """Word for word by what no rotation changes: a state's length, and its products with those before it."""
    right, total = {"products": 0, "lengths": 0}, 0
    for ids_T in rehearsal.truth.texts.ids:
        states_TD = public.entered(ids_T[None], layers=(0,))[0].hidden_BTD[0]
        seen_TD = states_TD @ secret_rotation(states_TD.shape[1]).T
        for place, word in enumerate(ids_T.tolist()):  # what came before counts as read
            tried_VT = torch.cat(
                [ids_T[:place].expand(public.vocabulary, -1), torch.arange(public.vocabulary)[:, None]], 1
            )
            tried_VTD = public.entered(tried_VT, layers=(0,))[0].hidden_BTD
            products_VT = (tried_VTD @ tried_VTD[:, -1:].transpose(1, 2)).squeeze(-1)
            apart_V = (products_VT - seen_TD[: place + 1] @ seen_TD[place]).abs().sum(-1)
            longer_V = (tried_VTD[:, -1].norm(dim=-1) - seen_TD[place].norm()).abs()
            right["products"] += int(apart_V.argmin() == word)
            right["lengths"] += int(longer_V.argmin() == word)
            total += 1
    assert right["products"] / total > 0.95
    assert right["lengths"] / total > 0.9
