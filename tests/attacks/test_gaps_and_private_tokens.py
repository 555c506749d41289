"""What routing gaps and private tokens leave of a text to a host that reads by matching, and what they do not hide."""

import pytest
import torch
from torch import Tensor

from tests.attacks.test_experts import MATCHING, Victim, commonest, made_up_rows
from tests.tiny import WORDS
from tests.writers import save_sparse_writer
from vflair_flower.attacks import NOTHING, TextGuess, find_attack, run_attack
from vflair_flower.attacks.experts.rehearsal import MoeRehearsal
from vflair_flower.attacks.experts.truth import coverage
from vflair_flower.attacks.scoring import Truth, score


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    """A tiny OLMoE with random weights at two parties: the host has half of sixteen experts, a token takes six."""
    folder = save_sparse_writer(tmp_path_factory.mktemp("moe"), per_token=6)
    return Victim(folder, made_up_rows(6, seed=1), made_up_rows(100, seed=2))


def read(victim: Victim, rehearsal: MoeRehearsal, **settings: object) -> TextGuess:
    """Return what the host reads at the first layer: the places granted, all words tried, where and in gaps."""
    view = rehearsal.truth.grant(rehearsal.view("party-1")).at(0)
    given = {"knows_positions": True, "exhaustive": True, "beam": len(WORDS) + 5, **settings}
    return run_attack(find_attack(MATCHING), view, victim.knows(rehearsal), settings=given).guess


def accuracy(guess: TextGuess, truth: Truth) -> float:
    return score(guess, truth)["position_accuracy"].value


def test_a_gap_leaves_a_host_that_knows_of_it_little_of_the_text(victim: Victim) -> None:
    whole: dict[int, float] = {}
    for gap in (1, 3):
        rehearsal = victim.rehearse(spec=victim.spec(routing_gap=gap), parties=2)
        guess, view = read(victim, rehearsal, gap=2, beam=16 if gap == 3 else len(WORDS)), rehearsal.view("party-1")
        if gap == 1:
            assert accuracy(guess, rehearsal.truth.seen(view.at(0))) >= 0.9
        else:
            assert 0.2 < coverage(view, rehearsal.truth)[None] <= 0.45  # of all layers together
        whole[gap] = accuracy(guess, rehearsal.truth.texts)
    assert whole[1] >= 0.85
    assert whole[3] < 0.35


def test_a_gap_of_two_is_filled(victim: Victim) -> None:
    """Why three is the least: between two tokens that were seen, one word of all fits."""
    rehearsal = victim.rehearse(spec=victim.spec(routing_gap=2), parties=2)
    guess = read(victim, rehearsal, gap=1)
    unseen = accuracy_between(guess, rehearsal)
    assert unseen > 0.35
    assert unseen > 3 * commonest(rehearsal.truth.texts)


def accuracy_between(guess: TextGuess, rehearsal: MoeRehearsal) -> float:
    """Return the share of tokens right that the host did not see and that stand before one that it saw."""
    right: list[Tensor] = []
    seen = rehearsal.truth.seen(rehearsal.view("party-1").at(0)).counted
    for ids, true, counted, here in zip(
        guess.ids, rehearsal.truth.texts.ids, rehearsal.truth.texts.counted, seen, strict=True
    ):
        last = int(here.nonzero().max()) if bool(here.any()) else 0
        right.append((ids == true)[:last][counted[:last] & ~here[:last]])
    return float(torch.cat(right).float().mean())


def test_private_tokens_are_not_read_at_their_places(victim: Victim) -> None:
    def rule(ids_BT: Tensor) -> Tensor:
        return ids_BT >= 5 + len(WORDS) // 2

    found = {}
    for name, private in (("undefended", None), ("private", rule)):
        rehearsal = victim.rehearse(parties=2, private_tokens=private)
        view = rehearsal.view("party-1")
        spread = read_in_order(victim, rehearsal)
        sensitive = [rule(ids) & counted for ids, counted in truths(rehearsal)]
        assert sum(int(one.sum()) for one in sensitive) > 15
        right = torch.cat([(g == t)[s] for g, (t, _), s in zip(spread.ids, truths(rehearsal), sensitive, strict=True)])
        found[name] = float(right.float().mean())
        others = [~rule(ids) & counted for ids, counted in truths(rehearsal)]
        seen = [(g != NOTHING) & s for g, s in zip(spread.ids, others, strict=True)]
        assert sum(int(one.sum()) for one in seen) > 10
        if private is not None:  # in all layers together
            for row, counted in enumerate(rehearsal.truth.seen(view).counted):
                assert not bool((counted & sensitive[row]).any())
    assert found["undefended"] >= 0.8
    assert found["private"] == 0.0


def truths(rehearsal: MoeRehearsal) -> list[tuple[Tensor, Tensor]]:
    return list(zip(rehearsal.truth.texts.ids, rehearsal.truth.texts.counted, strict=True))


def read_in_order(victim: Victim, rehearsal: MoeRehearsal) -> TextGuess:
    view = rehearsal.view("party-1").at(0)
    found = run_attack(find_attack(MATCHING), view, victim.knows(rehearsal), settings={"exhaustive": True})
    return rehearsal.truth.spread(view, found.guess)


def test_gradients_say_the_token_behind_each_that_was_seen_and_of_private_ones_nothing(victim: Victim) -> None:
    """A gap hides inputs, and the last layer's gradient at a token says the next one; private tokens mind that."""

    def rule(ids_BT: Tensor) -> Tensor:
        return ids_BT >= 5 + len(WORDS) // 2

    gapped = victim.rehearse(phase="training", spec=victim.spec(routing_gap=3), parties=2)
    view = gapped.view("party-1").at(3)
    labels = run_attack(find_attack("label-readout-expert"), view, victim.knows(gapped)).guess
    asked = gapped.truth.asked(view)
    assert accuracy(gapped.truth.spread(view, labels), asked) >= 0.95
    sheltered = victim.rehearse(phase="training", parties=2, private_tokens=rule)
    for layer in range(4):
        asked = sheltered.truth.asked(sheltered.view("party-1").at(layer))
        assert not any(bool((rule(ids) & counted).any()) for ids, counted in zip(asked.ids, asked.counted, strict=True))
        assert any(bool(counted.any()) for counted in asked.counted)
