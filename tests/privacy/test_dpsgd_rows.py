"""Rows' gradients against one backward pass per row, and failures planted in hooks and models."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config

from tests.privacy.house import defended
from tests.privacy.private_house import draw, losses, open_private, privately
from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.privacy import Noise, Secret
from vflair_flower.privacy.dpsgd.gradients import Dense, rows_of
from vflair_flower.privacy.dpsgd.noise import clipped_sum, noised
from vflair_flower.privacy.dpsgd.oracle import check_rows
from vflair_flower.privacy.dpsgd.rows import RowSampler, refuse_unsupported
from vflair_flower.settings import LoraSettings, TaskKind
from vflair_flower.training.row_losses import losses_per_row


class Rows(nn.Module):
    """A model on [B, T, 6] with a part in the middle."""

    def __init__(self, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.middle = middle or nn.LayerNorm(6)
        self.last = nn.Linear(6, 3)

    def forward(self, values_BTD):
        return self.last(torch.tanh(self.middle(self.first(values_BTD))))


class MeanOverRows(nn.Module):
    """Mixes rows without any parameter."""

    def forward(self, values_BTD):
        return values_BTD - values_BTD.mean(0, keepdim=True)


class Bare(nn.Module):
    """Has a parameter of its own and takes two tensors, as XLNet's attention does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, values_BTD):
        return (values_BTD * self.scale, values_BTD)


class Batchless(nn.Module):
    """Adds a trained table that is looked up once for all rows, [1, T]."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6, padding_idx=0)

    def forward(self, values_BTD):
        return values_BTD + self.table(torch.arange(values_BTD.shape[1]).unsqueeze(0))


def tried(model, sampler=None):
    sampler = sampler or RowSampler(model)
    values_BTD = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))

    def loss_of(part):
        if sampler.taken is not None and not sampler._off:
            sampler.begin(len(values_BTD[part]))
        return model(values_BTD[part]).square().sum((1, 2)).sum()

    return check_rows(sampler, model, loss_of, 4, segment="the test")


@pytest.mark.parametrize(
    "middle", [nn.LayerNorm(6), nn.GroupNorm(1, 5), nn.Linear(6, 6, bias=False), Batchless(), nn.RMSNorm(6)]
)
def test_rows_gradients_equal_one_pass_per_row(middle):
    assert tried(Rows(copy.deepcopy(middle))) < 1e-5


def test_nothing_of_the_model_changes_when_it_is_tried():
    model = Rows(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)))
    with torch.no_grad():
        model.middle[0].weight.zero_()
    before = copy.deepcopy(model.state_dict())
    assert tried(model.train()) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.middle[1].p == 0.5
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("trained", [True, False])
def test_a_batch_norm_is_refused_by_name_even_if_it_is_frozen(trained):
    model = Rows(nn.BatchNorm1d(5))
    model.middle.requires_grad_(trained)
    with pytest.raises(ConfigurationError, match=r"'middle'.*BatchNorm1d"):
        RowSampler(model)


def test_a_batch_norm_that_nobody_looked_for_is_found_by_the_oracle(monkeypatch):
    monkeypatch.setattr("vflair_flower.privacy.dpsgd.rows.refuse_unsupported", lambda module: None)
    model = Rows(nn.BatchNorm1d(5))
    model.middle.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="the test"):
        tried(model)


def test_rows_that_change_each_other_are_found():
    with pytest.raises(ConfigurationError, match=r"first|one backward pass|nothing can be"):
        tried(Rows(MeanOverRows()))


def test_what_opacus_cannot_follow_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"'middle\.0'"):
        tried(Rows(nn.Sequential(Bare(), _First())))
    with pytest.raises(ConfigurationError, match=r"LSTM"):
        refuse_unsupported(nn.LSTM(3, 3))
    buffered = nn.Linear(6, 6)
    buffered.register_buffer("seen", torch.zeros(1))
    with pytest.raises(ConfigurationError, match=r"'middle'.*buffers"):
        RowSampler(Rows(buffered))
    experts = nn.Module()
    experts.experts = nn.Parameter(torch.ones(4, 3, 3))
    with pytest.raises(ConfigurationError, match="several experts"):
        refuse_unsupported(experts)


class _First(nn.Module):
    def forward(self, values):
        return values[0]


@pytest.mark.parametrize("name", ["first.bias", "last.weight"])
def test_a_wrong_gradient_is_found_by_name(name):
    model = Rows()
    sampler = RowSampler(model)
    took = sampler._came_back

    def wrong(own, module, went_in, taken, grad):
        took(own, module, went_in, taken, grad)
        if name in taken.found:
            taken.found[name] = Dense(rows_of(taken.found[name]).roll(1, 0))

    for hook in sampler.hooks:
        hook.remove()
    sampler._came_back = wrong
    for own, module in model.named_children():
        module.register_forward_hook(lambda m, args, out, own=own: sampler._went_in(own, m, args, out))
    with pytest.raises(ConfigurationError, match=rf"'{name}'"):
        tried(model, sampler)


@pytest.mark.parametrize("where", ["data party", "model party"])
def test_hooks_that_miss_a_lora_layer_are_found_by_name(bert, where):
    with defended(bert, change=privately(tuning=LoraSettings(rank=2))) as party:
        module = party.model if where == "data party" else party.server.module
        missed = next(m for n, m in module.named_modules() if n.endswith("lora_A.default"))
        name = next(n for n, m in module.named_modules() if m is missed)
        if where == "data party":
            private = open_private(party)
            missed._forward_hooks.clear()
            with pytest.raises(SessionError, match=name):
                private.backward(losses(party, private, draw(private)))
            party.server.drop_gradients("alpha")
            with pytest.raises(ConfigurationError, match=name):
                open_again(party, private)
        else:
            missed._forward_hooks.clear()
            with pytest.raises(ConfigurationError, match=name):
                party.server.begin(["alpha"], server_round=2, training=True)


def open_again(party, private):
    from tests.privacy.private_house import encoded_of
    from vflair_flower.privacy.dpsgd import StandIn
    from vflair_flower.tasks import collate

    def loss_of(some):
        batch = collate(list(some), pad_token_id=0)
        with party.own.channel.joined(StandIn(party.spec, party.own.model.config)):
            return losses_per_row(party.model(**batch.inputs), batch.inputs, party.spec.task.kind)

    private.begin(encoded_of(party), batch_size=4, total_steps=9, loss_of=loss_of)


def test_a_position_table_has_rows_of_its_own():
    torch.manual_seed(0)
    for config in (
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
        GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16, pad_token_id=0),
    ):
        model = AutoModelForSequenceClassification.from_config(config).train()
        sampler = RowSampler(model)
        ids_BT = torch.randint(1, 30, (3, 6))
        types = {"token_type_ids": torch.zeros_like(ids_BT)} if config.model_type == "bert" else {}

        def loss_of(part, model=model, ids_BT=ids_BT, types=types):
            own = {name: value[part] for name, value in types.items()}
            return model(input_ids=ids_BT[part], **own).logits.square().sum()

        assert check_rows(sampler, model, loss_of, 3, segment="it") < 1e-4


def test_a_rows_loss_is_that_of_the_row_alone(bert, llama):
    logits_BTV = torch.randn(3, 5, 7)
    labels_BT = torch.randint(0, 7, (3, 5))
    labels_BT[0, 2:] = -100
    labels_BT[2] = -100
    for kind in (TaskKind.CAUSAL_LM, TaskKind.MASKED_LM, TaskKind.SEQ2SEQ_LM):
        together = losses_per_row(_Output(logits=logits_BTV), {"labels": labels_BT}, kind)
        for row in range(3):
            shift = 1 if kind is TaskKind.CAUSAL_LM else 0
            own, labels = logits_BTV[row, : 5 - shift], labels_BT[row, shift:]
            asked = labels != -100
            alone = nn.functional.cross_entropy(own[asked], labels[asked]) if asked.any() else torch.zeros(())
            assert torch.allclose(together[row], alone, atol=1e-6)
    with pytest.raises(ConfigurationError, match="images"):
        losses_per_row(_Output(logits=logits_BTV), {"labels": labels_BT}, TaskKind.IMAGE_TEXT_TO_TEXT)


class _Output:
    def __init__(self, **values):
        self.__dict__.update(values)


def test_no_row_adds_more_than_the_bound_and_what_is_not_finite_is_refused():
    values = {"a": torch.randn(6, 3, 2) * 10, "b": torch.randn(6, 4) * torch.arange(6).unsqueeze(1)}
    rows = {name: Dense(gradient) for name, gradient in values.items()}
    for row in range(6):
        own = {name: gradient[row : row + 1] for name, gradient in values.items()}
        norm = torch.cat([one.flatten() for one in own.values()]).norm()
        clipped = torch.cat(
            [one.flatten() for one in clipped_sum({n: Dense(g) for n, g in own.items()}, 0.7).values()]
        ).norm()
        assert float(clipped) == pytest.approx(min(float(norm), 0.7), rel=1e-5)
    assert clipped_sum({}, 1.0) == {}
    values["a"][3] = float("nan")
    with pytest.raises(SessionError, match="not finite"):
        clipped_sum(rows, 1.0)


def test_noise_has_its_deviation_and_none_is_refused():
    like = {"a": torch.zeros(200, 100), "b": torch.zeros(3)}
    found = noised({"b": torch.full((3,), 9.0)}, like.items(), deviation=0.3, noise=Noise(Secret(b"3" * 32), "it"))
    assert float(found["a"].std()) == pytest.approx(0.3, rel=0.03)
    assert float(found["b"].mean()) == pytest.approx(9.0, abs=1.0)
    for deviation in (0.0, float("nan"), float("inf")):
        with pytest.raises(SessionError, match="hides nothing"):
            noised({}, like.items(), deviation=deviation, noise=Noise(Secret.fresh(), "it"))
