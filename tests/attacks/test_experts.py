"""Attacks on experts' hosts: what is seen, what can be made of it, and what cannot."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from simulations.pretraining import PretrainSettings, pretrain
from tests.attacks.test_core import reachable
from tests.tiny import WORDS
from tests.writers import save_sparse_writer
from vflair_flower.attacks import (
    NOTHING,
    HeadKnowledge,
    Knowledge,
    Surrogate,
    TextGuess,
    auxiliary_texts,
    find_attack,
    random_checkpoint,
    run_attack,
)
from vflair_flower.attacks.experts.rehearsal import MoeRehearsal, moe_rehearsal
from vflair_flower.attacks.experts.truth import MoeTruth, coverage, expected_coverage
from vflair_flower.attacks.experts.view import HostView
from vflair_flower.attacks.experts.wire import wire_view
from vflair_flower.attacks.scoring import Truth, score
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.experts.host import ExpertHost
from vflair_flower.experts.loading import expert_layer_names, load_experts
from vflair_flower.partition import load_config, load_tokenizer, resolve_model
from vflair_flower.remote.protocol import FORWARD
from vflair_flower.session import Request
from vflair_flower.settings import ExpertSettings, TaskKind, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import PromptRow, encode_task

WRITE = TaskSettings(kind=TaskKind.CAUSAL_LM)
MATCHING = "gapped-vocabulary-matching"


def made_up_rows(count: int, seed: int, *, least: int = 6, most: int = 11) -> tuple[PromptRow, ...]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(least, most))) for _ in range(count)]
    return tuple(PromptRow(prompt="", response=text, id=f"{seed}-{i}") for i, text in enumerate(texts))


class Victim:
    """A mixture-of-experts model of which four parties hold experts, and the first one's texts."""

    def __init__(self, folder, rows, auxiliary_rows, *, max_tokens=16) -> None:
        self.source = resolve_model(str(folder))
        self.tokenizer = load_tokenizer(self.source)
        self.rows, self.auxiliary_rows, self.max_tokens = rows, auxiliary_rows, max_tokens

    def spec(self, **experts) -> SplitSpec:
        training = TrainingSettings(max_tokens=self.max_tokens)
        settings = ExpertSettings(**experts)
        return SplitSpec(model=self.source.location, task=WRITE, tuning=None, training=training, experts=settings)

    def rehearse(self, *, count=8, spec=None, **more) -> MoeRehearsal:
        more = {"batch_rows": 4, **more}
        return moe_rehearsal(self.source, spec or self.spec(), self.rows[:count], self.tokenizer, **more)

    def knows(self, rehearsal, *, source=None) -> Knowledge:
        encoded = encode_task(WRITE.kind, self.auxiliary_rows, self.tokenizer, max_tokens=self.max_tokens)
        return Knowledge(
            head=HeadKnowledge.EXACT if source is None else HeadKnowledge.ARCHITECTURE,
            surrogate=Surrogate(source or self.source, rehearsal.spec.plan, WRITE),
            special_ids=frozenset(self.tokenizer.all_special_ids),
            pad_id=int(self.tokenizer.pad_token_id),
            auxiliary=auxiliary_texts(encoded, rehearsal.truth.texts.ids),
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Victim:
    """A tiny OLMoE with random weights: sixteen experts in each of four layers, four per token."""
    folder = save_sparse_writer(tmp_path_factory.mktemp("moe"))
    return Victim(folder, made_up_rows(16, seed=1), made_up_rows(300, seed=2))


@pytest.fixture(scope="module")
def inference(tiny) -> MoeRehearsal:
    return tiny.rehearse()


@pytest.fixture(scope="module")
def training(tiny) -> MoeRehearsal:
    return tiny.rehearse(phase="training")


@pytest.fixture(scope="module")
def random_tiny(tiny):
    """Its architecture with other weights."""
    with random_checkpoint(tiny.source, WRITE, seed=11) as source:
        yield source


def accuracy(truth: MoeTruth, view: HostView, guess: TextGuess, of: Truth | None = None) -> float:
    return score(truth.spread(view, guess), of or truth.seen(view))["position_accuracy"].value


def commonest(truth: Truth) -> float:
    """Return what the commonest token gets everywhere."""
    ids = torch.cat([ids[counted] for ids, counted in zip(truth.ids, truth.counted, strict=True)])
    return float(torch.bincount(ids).max() / len(ids))


def shuffled(view: HostView, *, seed: int = 3) -> HostView:
    """Return a view whose calls hold their tokens, rows and gradients in another order."""
    generator, calls = torch.Generator().manual_seed(seed), []
    for call in view.calls:
        order_U = torch.randperm(len(call.tokens_UD), generator=generator)
        token_R = torch.argsort(order_U)[call.token_R]
        grad_UD = None if call.grad_UD is None else call.grad_UD[order_U]
        calls.append(replace(call, tokens_UD=call.tokens_UD[order_U], token_R=token_R, grad_UD=grad_UD))
    return replace(view, calls=tuple(calls))


def own_places(rehearsal: MoeRehearsal, view: HostView) -> MoeTruth:
    """Return the truth, which a view that was shuffled must not move: what stood at a place is asked there."""
    moments = zip(view.moments, rehearsal.view(*view.hosts).at(*view.layers).moments, strict=True)
    places = {}
    for new, old in moments:
        for call, before in zip(new.calls, old.calls, strict=True):
            places[call.number] = rehearsal.truth.places[before.number]
    return replace(rehearsal.truth, places=places)


class TestView:
    def test_holds_what_the_experts_of_the_whole_model_get(self, tiny, inference):
        from vflair_flower.attacks.experts.public import PublicModel

        public, view = PublicModel(tiny.knows(inference).surrogate), inference.view()
        for moment in view.moments:
            place_N2 = inference.truth.places_of(moment)
            for state_D, hits_E, (row, position) in zip(
                moment.tokens_ND, moment.hits(16), place_N2.tolist(), strict=True
            ):
                if position == NOTHING or row > 1:
                    continue
                ids_1T = inference.truth.texts.ids[row][None]
                whole = public.entered(ids_1T, layers=(moment.layer,))[moment.layer]
                assert torch.allclose(whole.hidden_BTD[0, position], state_D, atol=1e-4)
                held = set(view.held(moment.layer)) & set(whole.expert_BTK[0, position].tolist())
                assert set(torch.nonzero(hits_E).flatten().tolist()) == held

    def test_of_several_hosts_holds_each_token_once_and_in_every_hosts_order(self, inference):
        view = inference.view()
        assert view.hosts == ("party-1", "party-2", "party-3")
        for moment in view.moments:
            places = [tuple(place) for place in inference.truth.places_of(moment).tolist()]
            inside = [place for place in places if place[1] != NOTHING]
            assert len(inside) == len(set(inside))
            for call, place_U in zip(moment.calls, moment.place_of, strict=True):
                assert bool((place_U[1:] > place_U[:-1]).all())
                assert torch.equal(moment.tokens_ND[place_U], call.tokens_UD)

    def test_of_training_holds_gradients_of_what_was_answered(self, training):
        view = training.view("party-2")
        assert all(call.grad_UD.shape == call.tokens_UD.shape for call in view.calls)
        assert all(call.weight_R.shape == call.expert_R.shape for call in view.calls)
        assert all(call.host == "party-2" and call.owner == "party-0" for call in view.calls)

    @pytest.mark.parametrize("experts", [{"combine": "host"}, {"codec": "int8"}, {"replicas": 2}])
    def test_of_other_jobs_is_of_the_same_tokens(self, tiny, training, experts):
        other = tiny.rehearse(phase="training", spec=tiny.spec(**experts)).view()
        for layer in training.view().layers:
            sent = torch.cat([moment.tokens_ND for moment in training.view().at(layer).moments])
            for moment in other.at(layer).moments:
                assert moment.gradients.isfinite().all()
                apart = torch.cdist(moment.tokens_ND, sent, compute_mode="donot_use_mm_for_euclid_dist").min(-1).values
                if layer == 0:  # behind it, rounding may send a token elsewhere
                    assert float(apart.max()) < (0.2 if experts.get("codec") else 1e-4)

    def test_reaches_no_truth_and_shares_no_memory(self, training):
        view = training.view()
        assert view.moments
        found = reachable(view)
        rows = {tuple(ids.tolist()) for ids in training.truth.texts.ids}
        assert not any(isinstance(one, Truth | MoeTruth) for one in found)
        for one in found:
            if isinstance(one, Tensor):
                assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
                assert one.dtype != torch.int64 or tuple(one.flatten().tolist()) not in rows
        assert any(isinstance(one, Truth) for one in reachable(training))  # what must be found is found

    def test_of_no_token_and_of_unknown_hosts_is_refused(self, inference):
        with pytest.raises(DataError, match="saw no token"):
            inference.view("party-0")
        with pytest.raises(ConfigurationError, match="choose from party-0"):
            inference.view("party-9")

    def test_of_writing_knows_where_every_new_token_stands(self, tiny):
        rows = [PromptRow(prompt=row.response, response="x", id=row.id) for row in tiny.rows[:3]]
        tiny_prompts = Victim(tiny.source.location, rows, tiny.auxiliary_rows)
        rehearsal = tiny_prompts.rehearse(count=3, phase="generation", new_tokens=4)
        view = rehearsal.view()
        last = rehearsal.truth.places_of(view.at(0).moments[-1])
        lengths = [len(ids) for ids in rehearsal.truth.texts.ids]
        assert all(position == lengths[row] - 1 for row, position in last.tolist())
        found = run_attack(find_attack(MATCHING), view.at(0), tiny_prompts.knows(rehearsal))
        assert accuracy(rehearsal.truth, view.at(0), found.guess) > 0.5  # the prompt is enough for that


class TestCoverage:
    def test_is_what_uniform_routing_says_where_routing_is_uniform(self):
        torch.manual_seed(2)
        chosen = torch.rand(20_000, 16).topk(4).indices
        for held in (4, 8, 12):
            share = float((chosen < held).any(-1).float().mean())
            assert share == pytest.approx(expected_coverage(experts=16, per_token=4, held=held), abs=0.01)
        assert expected_coverage(experts=64, per_token=8, held=16) == pytest.approx(0.915, abs=5e-4)

    def test_grows_with_the_coalition_and_counts_tokens_that_were_seen(self, inference):
        one, two, three = (inference.view(*inference.others[:count]) for count in (1, 2, 3))
        shares = [coverage(view, inference.truth) for view in (one, two, three)]
        for smaller, larger in pairwise(shares):
            assert all(smaller[layer] <= larger[layer] for layer in smaller)
        total = sum(int(counted.sum()) for counted in inference.truth.texts.counted)
        seen = {
            (row, position)
            for moment in three.at(1).moments
            for row, position in inference.truth.places_of(moment).tolist()
            if position != NOTHING and inference.truth.texts.counted[row][position]
        }
        assert shares[2][1] == pytest.approx(len(seen) / total)
        assert 0.2 < shares[0][0] < shares[2][0] <= 1.0


class TestMatching:
    def test_of_all_hosts_reads_every_token_without_places(self, tiny, inference):
        view, knows = inference.view().at(0), tiny.knows(inference)
        found = run_attack(find_attack(MATCHING), view, knows, settings={"exhaustive": True})
        assert accuracy(inference.truth, view, found.guess) >= 0.97

    def test_reads_every_layer(self, tiny, inference):
        view = inference.view().at(2)
        found = run_attack(find_attack(MATCHING), view, tiny.knows(inference), settings={"exhaustive": True})
        assert accuracy(inference.truth, view, found.guess) >= 0.8

    def test_of_one_host_reads_more_than_half_of_what_it_saw(self, tiny, inference):
        view = inference.view("party-1").at(0)
        assert coverage(view, inference.truth)[0] < 0.9
        found = run_attack(find_attack(MATCHING), view, tiny.knows(inference))
        assert accuracy(inference.truth, view, found.guess) >= 0.5

    def test_fills_gaps_where_places_are_known(self, tiny, inference):
        view = inference.truth.grant(inference.view("party-1", "party-3")).at(0)
        settings = {"knows_positions": True, "beam": 40, "exhaustive": True}
        known = run_attack(find_attack(MATCHING), view, tiny.knows(inference), settings=settings)
        seen = inference.truth.seen(view).counted
        pairs = zip(known.guess.ids, inference.truth.texts.ids, inference.truth.texts.counted, seen, strict=True)
        unseen = torch.cat([(ids == true)[counted & ~here] for ids, true, counted, here in pairs])
        assert len(unseen) >= 5
        assert float(unseen.float().mean()) > 0.2  # of forty words; where all prefixes are right, the distance tells
        assert score(known.guess, inference.truth.seen(view))["position_accuracy"].value >= 0.8

    def test_with_another_model_or_another_order_is_no_better_than_chance(self, tiny, inference, random_tiny):
        view = inference.view().at(0)
        lost = run_attack(find_attack(MATCHING), view, tiny.knows(inference, source=random_tiny))
        limit = 2.5 * commonest(inference.truth.texts)
        assert accuracy(inference.truth, view, lost.guess) < limit
        mixed = shuffled(inference.view("party-1").at(0))
        found = run_attack(find_attack(MATCHING), mixed, tiny.knows(inference))
        assert accuracy(own_places(inference, mixed), mixed, found.guess) < limit

    def test_needs_places_and_one_layer_if_it_is_to_know_positions(self, tiny, inference):
        for view in (inference.view().at(0), inference.truth.grant(inference.view())):
            with pytest.raises(DataError, match="knows_positions is on"):
                run_attack(find_attack(MATCHING), view, tiny.knows(inference), settings={"knows_positions": True})


class TestReadout:
    def test_with_the_exact_head_reads_labels_at_the_last_layer(self, tiny, training):
        knows = tiny.knows(training)
        for hosts in (("party-1",), training.others):
            view = training.view(*hosts).at(3)
            found = run_attack(find_attack("label-readout-expert"), view, knows)
            assert accuracy(training.truth, view, found.guess, training.truth.asked(view)) >= 0.97

    @pytest.mark.parametrize("experts", [{"combine": "host"}, {"codec": "int8"}])
    def test_reads_them_through_codecs_and_combined_answers(self, tiny, experts):
        rehearsal = tiny.rehearse(phase="training", spec=tiny.spec(**experts))
        view = rehearsal.view().at(3)
        found = run_attack(find_attack("label-readout-expert"), view, tiny.knows(rehearsal))
        assert accuracy(rehearsal.truth, view, found.guess, rehearsal.truth.asked(view)) >= 0.95

    def test_with_another_head_or_another_order_is_no_better_than_chance(self, tiny, training, random_tiny):
        view = training.view().at(3)
        asked = training.truth.asked(view)
        lost = run_attack(find_attack("label-readout-expert"), view, tiny.knows(training, source=random_tiny))
        limit = 2.5 * commonest(asked)
        assert accuracy(training.truth, view, lost.guess, asked) < limit
        mixed = shuffled(training.view("party-1").at(3))
        found = run_attack(find_attack("label-readout-expert"), mixed, tiny.knows(training))
        truth = own_places(training, mixed)
        assert accuracy(truth, mixed, found.guess, truth.asked(mixed)) < limit

    def test_needs_gradients(self, tiny, inference):
        with pytest.raises(DataError, match="no gradient"):
            run_attack(find_attack("label-readout-expert"), inference.view(), tiny.knows(inference))


class TestLearned:
    @pytest.mark.parametrize(
        ("model", "least"), [("linear", 0.6), ("mlp", 0.85), pytest.param("gru", 0.5, marks=pytest.mark.slow)]
    )
    def test_inverter_reads_the_first_layer(self, tiny, inference, model, least):
        view = inference.view("party-2").at(0)
        settings = {"model": model, "width": 128, "epochs": 30}
        found = run_attack(find_attack("host-inversion"), view, tiny.knows(inference), settings=settings)
        assert accuracy(inference.truth, view, found.guess) >= least

    def test_inverter_of_another_model_is_no_better_than_chance(self, tiny, inference, random_tiny):
        view = inference.view().at(0)
        knows = tiny.knows(inference, source=random_tiny)
        lost = run_attack(find_attack("host-inversion"), view, knows, settings={"width": 64})
        assert accuracy(inference.truth, view, lost.guess) < 2.5 * commonest(inference.truth.texts)

    def test_traces_say_more_the_more_hosts_and_layers_are_seen(self, tiny, inference):
        knows, values = tiny.knows(inference), []
        for hosts in (("party-1",), inference.others):
            view = inference.view(*hosts)
            found = run_attack(find_attack("routing-trace"), view.at(0), knows, settings={"width": 64})
            values.append(accuracy(inference.truth, view.at(0), found.guess))
        view = inference.truth.grant(inference.view())
        linked = run_attack(find_attack("routing-trace"), view, knows, settings={"width": 64, "link_layers": True})
        values.append(accuracy(inference.truth, view, linked.guess))
        assert values[0] > commonest(inference.truth.texts)
        assert values == sorted(values)
        assert values[2] > 3 * commonest(inference.truth.texts)

    def test_traces_of_another_model_are_no_better_than_chance(self, tiny, inference, random_tiny):
        view, knows = inference.view().at(0), tiny.knows(inference, source=random_tiny)
        lost = run_attack(find_attack("routing-trace"), view, knows, settings={"width": 64})
        assert accuracy(inference.truth, view, lost.guess) < 2.5 * commonest(inference.truth.texts)

    def test_need_auxiliary_texts_and_places_to_link_layers(self, tiny, inference):
        knows = replace(tiny.knows(inference), auxiliary=())
        for name in ("host-inversion", "routing-trace"):
            with pytest.raises(DataError, match="no auxiliary texts"):
                run_attack(find_attack(name), inference.view(), knows)
        with pytest.raises(DataError, match="link_layers is on"):
            run_attack(
                find_attack("routing-trace"), inference.view(), tiny.knows(inference), settings={"link_layers": True}
            )


class TestWire:
    @pytest.fixture(scope="class")
    def alone(self, tiny) -> MoeRehearsal:
        return tiny.rehearse(count=12, batch_rows=1)

    def seen(self, tiny, alone, hosts):
        encoded = encode_task(WRITE.kind, tiny.rows, tiny.tokenizer, max_tokens=16)
        more = {"placement": alone.placement, "spec": alone.spec, "hidden": 64}
        return wire_view(alone.sightings, hosts=hosts, candidates=encoded, **more)

    def identified(self, alone, guess) -> float:
        """Return the share of texts that the guess at their place is."""
        pairs = zip(guess.ids, alone.truth.texts.ids, strict=False)
        return sum(torch.equal(ids, true) for ids, true in pairs) / len(alone.truth.texts.ids)

    def test_sizes_tell_which_of_sixteen_texts_was_sent(self, tiny, alone):
        values = []
        for hosts in (("party-1",), alone.others):
            found = run_attack(find_attack("size-time"), self.seen(tiny, alone, hosts), tiny.knows(alone))
            values.append(self.identified(alone, found.guess))
        assert values[0] > 3 / 16
        assert values[1] >= max(0.9, values[0])

    def test_sizes_by_another_model_tell_little(self, tiny, alone, random_tiny):
        knows = tiny.knows(alone, source=random_tiny)
        found = run_attack(find_attack("size-time"), self.seen(tiny, alone, alone.others), knows)
        assert self.identified(alone, found.guess) < 0.5

    def test_reaches_no_tensor_of_the_session(self, tiny, alone):
        view = self.seen(tiny, alone, alone.others)
        assert not [one for one in reachable(view.frames) if isinstance(one, Tensor)]
        assert not [one for one in reachable(view) if isinstance(one, Tensor | Truth)]


class TestRehearsal:
    def test_refuses_jobs_without_spread_experts(self, tiny):
        with pytest.raises(ConfigurationError, match="not at parties that answer"):
            tiny.rehearse(spec=replace(tiny.spec(), experts=None))


@pytest.mark.parametrize("combine", ["owner", "host"])
def test_a_hosts_answers_do_not_depend_on_other_owners_tokens(tiny, inference, combine):
    spec, host_name = tiny.spec(combine=combine), "party-1"
    layers = expert_layer_names(load_config(tiny.source, WRITE), WRITE)
    own = inference.placement.experts_of(host_name)
    shard = load_experts(tiny.source, dict(zip(layers, own, strict=True)), WRITE)
    host = ExpertHost(shard, layers, own, spec, deadline_s=5.0)
    calls = inference.view(host_name).calls

    def ask(owner: str, number: int, call, scale: float = 1.0) -> Tensor:
        tensors = {"hidden": call.tokens_UD * scale, "row": call.token_R.int(), "expert": call.expert_R.int()}
        if combine == "host":
            tensors["weight"] = torch.linspace(0.1, 0.9, len(call.expert_R))
        meta = {"layer": call.layer, "call": number, "keep": False}
        return host(Request(owner, FORWARD, tensors, meta)).tensors["output"]

    host.begin(["party-0"], training=False)
    alone = [ask("party-0", number, call) for number, call in enumerate(calls)]
    host.begin(["party-0", "party-2", "party-3"], training=False)
    with ThreadPoolExecutor(3) as pool:
        crowd = [
            pool.submit(ask, owner, number, call, 3.0)
            for number, call in enumerate(calls)
            for owner in ("party-2", "party-3")
        ]
        among = [ask("party-0", number, call) for number, call in enumerate(calls)]
        others = [one.result() for one in crowd]
    assert all(torch.equal(one, other) for one, other in zip(alone, among, strict=True))
    assert not torch.equal(others[0], alone[0])  # what the others sent was something else


def test_of_a_model_that_has_learnt_both_texts_and_labels_are_read(tmp_path):
    """Trained weights: texts of the next token's own making, so that predictions are far from uniform."""
    draw = random.Random(5)
    lines = [" ".join(sorted(draw.choices(WORDS, k=9))) + "\n" for _ in range(3000)]
    for split, part in (("train", lines[:2600]), ("validation", lines[2600:])):
        (tmp_path / f"{split}.txt").write_text("".join(part))
    settings = PretrainSettings(
        vocabulary=400, hidden=64, layers=2, heads=4, experts=16, per_token=4, expert_width=16, steps=150, tokens=32
    )
    assert pretrain(tmp_path, tmp_path / "model", settings) < 60
    rows = [PromptRow(prompt="", response=text.strip(), id=str(i)) for i, text in enumerate(lines[2600:2800])]
    victim = Victim(tmp_path / "model", rows[:8], rows[8:], max_tokens=24)
    rehearsal = victim.rehearse(phase="training")
    knows = victim.knows(rehearsal)
    first, last = rehearsal.view().at(0), rehearsal.view("party-3").at(1)
    found = run_attack(find_attack(MATCHING), first, knows)
    assert accuracy(rehearsal.truth, first, found.guess) >= 0.97
    labels = run_attack(find_attack("label-readout-expert"), last, knows)
    assert accuracy(rehearsal.truth, last, labels.guess, rehearsal.truth.asked(last)) >= 0.95
