"""Attacks: what an adversary can make of what it saw, measured against the truth that it never gets.

From the ground up: `view` (what it saw), `surrogate` and `knowledge` (what it knows beside), `guesses` (what it comes
to), `registry` (one file and one decorator per attack), `scoring` (how good a guess is, beside chance), `rehearsal` (a
real session of a victim, with its view and its truth).  The attacks are in `inversion` and its neighbours.
"""

from vflair_flower.attacks.guesses import NOTHING, Guess, LabelGuess, MemberGuess, TextGuess
from vflair_flower.attacks.knowledge import HeadKnowledge, Knowledge, auxiliary_texts
from vflair_flower.attacks.registry import (
    Attack,
    Attempt,
    Goal,
    Phase,
    attack,
    attacks,
    find_attack,
    load_attacks,
    run_attack,
)
from vflair_flower.attacks.surrogate import Surrogate, random_checkpoint
from vflair_flower.attacks.view import Exchange, NetworkFrame, NetworkView, SplitView, network_view, split_view

__all__ = [
    "NOTHING",
    "Attack",
    "Attempt",
    "Exchange",
    "Goal",
    "Guess",
    "HeadKnowledge",
    "Knowledge",
    "LabelGuess",
    "MemberGuess",
    "NetworkFrame",
    "NetworkView",
    "Phase",
    "SplitView",
    "Surrogate",
    "TextGuess",
    "attack",
    "attacks",
    "auxiliary_texts",
    "find_attack",
    "load_attacks",
    "network_view",
    "random_checkpoint",
    "run_attack",
    "split_view",
]
