"""Rows' gradients as factors: the same numbers, norms and clipped sums, without the numbers."""

import math

import pytest
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import nn
from transformers.pytorch_utils import Conv1D

from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy.dpsgd import gradients
from vflair_flower.privacy.dpsgd.gradients import Dense, Factors, factored, rows_of
from vflair_flower.privacy.dpsgd.noise import clipped_sum
from vflair_flower.privacy.dpsgd.oracle import check_rows
from vflair_flower.privacy.dpsgd.rows import RowSampler

ROWS, TOKENS, WIDTH, WORDS = 5, 4, 24, 40
MODULES = {
    "linear": lambda: nn.Linear(WIDTH, WORDS),
    "without bias": lambda: nn.Linear(WIDTH, WORDS, bias=False),
    "transposed": lambda: Conv1D(WORDS, WIDTH),
    "table": lambda: nn.Embedding(WORDS, WIDTH, padding_idx=0),
}


class Tied(nn.Module):
    """Reads words from a table and names the next by the same one, as GPT-2 does, with another matrix between."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.between = Conv1D(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids_BT):
        return self.head(torch.tanh(self.between(self.table(ids_BT))))


def given(module):
    if isinstance(module, nn.Embedding | Tied):
        return torch.randint(0, 4, (ROWS, TOKENS))  # of few words, so that rows repeat them, and some padding
    return torch.randn(ROWS, TOKENS, WIDTH)


def one_pass_per_row(module, went_in):
    found = {name: [] for name, _ in module.named_parameters()}
    for row in range(len(went_in)):
        module.zero_grad()
        loss_of(module(went_in[row : row + 1]), row).backward()
        for name, parameter in module.named_parameters():
            found[name].append(parameter.grad.clone())
    return {name: torch.stack(values) for name, values in found.items()}


def loss_of(output, row=None):
    weights = torch.randn(ROWS, *output.shape[1:], generator=torch.Generator().manual_seed(5))
    return (output.square() * (weights if row is None else weights[row : row + 1])).sum()


def taken_from(module, went_in):
    sampler = RowSampler(module)
    taken = sampler.begin(len(went_in))
    loss_of(module(went_in)).backward()
    sampler.end()
    return sampler.take(taken, {name: p.grad for name, p in module.named_parameters()})


@pytest.fixture(params=[*MODULES, "tied"])
def module(request):
    torch.manual_seed(0)
    return (MODULES.get(request.param) or Tied)()


def test_factors_are_the_gradients_of_one_pass_per_row(module):
    went_in = given(module)
    alone = one_pass_per_row(module, went_in)
    found = taken_from(module, went_in)
    assert found.keys() == alone.keys()
    assert any(isinstance(one, Factors) for one in found.values())
    factors_B = torch.rand(ROWS)
    for name, own in alone.items():
        assert found[name].rows == ROWS
        assert found[name].shape == tuple(own.shape[1:])
        torch.testing.assert_close(rows_of(found[name]), own)
        torch.testing.assert_close(found[name].squared_norms(), own.flatten(1).square().sum(1), rtol=1e-4, atol=0.0)
        torch.testing.assert_close(found[name].weighted_sum(factors_B), torch.einsum("b,b...->...", factors_B, own))


def test_clipped_sums_are_those_of_numbers(module):
    went_in = given(module)
    found = taken_from(module, went_in)
    numbers = {name: Dense(own) for name, own in one_pass_per_row(module, went_in).items()}
    norms_B = torch.stack([own.squared_norms() for own in numbers.values()]).sum(0).sqrt()
    bound = float(norms_B.median())
    expected = clipped_sum(numbers, bound)
    for name, own in clipped_sum(found, bound).items():
        assert float((own - expected[name]).norm()) < 1e-5 * bound


@pytest.mark.parametrize("kind", ["linear", "without bias", "table"])  # Opacus has no norms of the others
def test_norms_are_those_of_opacus(kind):
    torch.manual_seed(0)
    module = MODULES[kind]()
    went_in, grad = given(module), torch.randn(ROWS, TOKENS, WIDTH)
    if not isinstance(module, nn.Embedding):
        grad = torch.randn(ROWS, TOKENS, WORDS)
    else:
        went_in = went_in + 1  # Opacus counts padding in
    theirs = GradSampleModuleFastGradientClipping.NORM_SAMPLERS[type(module)](module, [went_in], grad)
    own = factored(module.weight, module, went_in, grad)
    torch.testing.assert_close(own.squared_norms().sqrt(), theirs[module.weight].reshape(-1), rtol=1e-4, atol=0.0)


def test_a_tied_table_is_clipped_as_one_parameter():
    """Two uses whose gradients are each other's negative cancel; two norms taken apart would not."""
    left, right = torch.randn(ROWS, TOKENS, WORDS), torch.randn(ROWS, TOKENS, WIDTH)
    one, other = (Factors((WORDS, WIDTH), ((sign * left, right),)) for sign in (1.0, -1.0))
    apart = float((one.squared_norms() + other.squared_norms()).min())
    assert float(one.plus(other).squared_norms().max()) < 1e-3 * apart


@pytest.mark.parametrize("mixed", [True, False])
def test_uses_as_numbers_and_as_factors_add_up(mixed):
    left, right = torch.randn(ROWS, TOKENS, WORDS), torch.randn(ROWS, TOKENS, WIDTH)
    factors = Factors((WORDS, WIDTH), ((left, right),))
    numbers = Dense(torch.randn(ROWS, WORDS, WIDTH))
    both = factors.plus(numbers) if mixed else numbers.plus(factors)
    torch.testing.assert_close(rows_of(both), numbers.values + torch.einsum("bto,bti->boi", left, right))


def test_a_row_whose_tokens_cancel_does_not_pass_unclipped():
    """Of a norm far below what was multiplied, float32 leaves rounding alone; the bound must hold all the same."""
    generator, tokens = torch.Generator().manual_seed(2), 64
    same_TO = torch.randn(1, 32, generator=generator).expand(tokens, 32)
    sign_T1 = torch.tensor([1.0, -1.0]).repeat(tokens // 2).unsqueeze(1)
    bound, longest, unguarded = 1.0, 0.0, 0.0
    for scale in (1e2, 1e3, 1e4):
        left = (scale * (same_TO + 1e-6 * torch.randn(tokens, 32, generator=generator))).unsqueeze(0)
        right = (scale * sign_T1 * torch.randn(1, 32, generator=generator)).unsqueeze(0)
        rows = {"matrix": Factors((32, 32), ((left, right),))}
        longest = max(longest, float(clipped_sum(rows, bound)["matrix"].norm()))
        squared = float(((left @ left.mT) * (right @ right.mT)).sum())
        factor = min(1.0, bound / math.sqrt(max(squared, 1e-24)))
        unguarded = max(unguarded, factor * float((left[0].double().T @ right[0].double()).norm()))
    assert longest <= bound
    assert unguarded > 2.0 * bound


def test_small_matrices_stay_numbers():
    narrow, norm = nn.Linear(WIDTH, 2), nn.LayerNorm(WIDTH)
    assert factored(narrow.weight, narrow, torch.randn(ROWS, TOKENS, WIDTH), torch.randn(ROWS, TOKENS, 2)) is None
    assert factored(norm.weight, norm, torch.randn(ROWS, TOKENS, WIDTH), torch.randn(ROWS, TOKENS, WIDTH)) is None


def test_a_norm_that_leaves_out_a_token_is_found_by_the_oracle(monkeypatch):
    torch.manual_seed(0)
    model = Tied()
    ids_BT = torch.randint(1, WORDS, (3, TOKENS))
    sampler = RowSampler(model)

    def loss(part):
        if not sampler._off:
            sampler.begin(len(ids_BT[part]))
        return model(ids_BT[part]).square().sum()

    assert check_rows(sampler, model, loss, 3, segment="it") < 1e-5
    inner = gradients._inner
    monkeypatch.setattr(
        gradients, "_inner", lambda one, other: inner(one, other).float().index_fill(1, torch.tensor(0), 0)
    )
    with pytest.raises(ConfigurationError, match=r"norms.*'table.weight'"):
        check_rows(sampler, model, loss, 3, segment="it")
