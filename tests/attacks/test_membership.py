"""Membership inference and the one-run audit: what must be found is found, what cannot be known is chance."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.attacks.test_core import reachable
from tests.tiny import WORDS, save_tiny
from vflair_flower.attacks import HeadKnowledge, Knowledge, Surrogate, auxiliary_texts, find_attack, run_attack
from vflair_flower.attacks.membership.audit import (
    Canaries,
    audit_in_one_run,
    canary_scores,
    epsilon_lower_bound,
    guess_p_value,
    mislabelled_canaries,
    random_canaries,
)
from vflair_flower.attacks.membership.lira import _halves, _log_ratio
from vflair_flower.attacks.membership.losses import log_odds, row_losses, token_log_probs
from vflair_flower.attacks.membership.shadows import fine_tuned
from vflair_flower.attacks.membership.victim import MemberRehearsal, member_rehearsal
from vflair_flower.attacks.membership.view import ModelView
from vflair_flower.attacks.scoring import Truth, score
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.partition import ModelSource, PartitionPlan, load_tokenizer, resolve_model
from vflair_flower.settings import LoraSettings, OptimizerSettings, TaskKind, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import EncodedPair, EncodedRow, EncodedWindow, PromptRow, Row, collate, encode_task

MAX_TOKENS = 48
LABELS = tuple("abcdefghijkl")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that was trained on some of its rows: the first `count`; all are alike."""

    base: ModelSource
    source: ModelSource
    spec: SplitSpec
    rows: tuple
    count: int

    @property
    def tokenizer(self):
        return load_tokenizer(self.base)

    def encoded(self, rows):
        return encode_task(self.spec.task.kind, rows, self.tokenizer, max_tokens=MAX_TOKENS)

    def part(self, number: int) -> tuple:
        return self.rows[number * self.count : (number + 1) * self.count]

    def rehearse(self, *, members: int = 0, source: ModelSource | None = None) -> MemberRehearsal:
        return member_rehearsal(
            source or self.source, self.spec, self.part(members), self.part(1), self.tokenizer, max_tokens=MAX_TOKENS
        )

    def knows(self, rehearsal: MemberRehearsal, head: HeadKnowledge = HeadKnowledge.PUBLIC) -> Knowledge:
        return Knowledge(
            head=head,
            surrogate=Surrogate(self.base, PartitionPlan(), self.spec.task, seed=self.spec.seed),
            pad_id=int(self.tokenizer.pad_token_id),
            auxiliary=auxiliary_texts(self.encoded(self.part(3)), rehearsal.truth.ids),
        )

    def auc(self, name: str, rehearsal: MemberRehearsal, **settings) -> "Area":
        found = run_attack(find_attack(name), rehearsal.view, self.knows(rehearsal), settings=settings)
        return Area.of(found.guess.scores, rehearsal.truth.members)


@dataclass(frozen=True, kw_only=True)
class Area:
    """The area under the curve with the 95 % interval of Hanley and McNeil, which needs no resampling."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, scores, members) -> "Area":
        own, others = scores[members][:, None], scores[~members][None]
        value = float((own > others).double().mean() + (own == others).double().mean() / 2)
        twice, once = value / (2 - value) - value**2, 2 * value**2 / (1 + value) - value**2
        n, m = own.shape[0], others.shape[1]
        error = math.sqrt((value * (1 - value) + (n - 1) * twice + (m - 1) * once) / (n * m))
        return cls(value=value, low=value - 1.96 * error, high=value + 1.96 * error)

    @property
    def is_chance(self) -> bool:
        return self.low <= 0.5 <= self.high


def trained_on(base, task, rows, count, folder, *, passes, rate, tuning=None, batch_size=16) -> Trained:
    tokenizer = load_tokenizer(base)
    spec = SplitSpec(
        model=base.location,
        task=task,
        tuning=tuning,
        training=TrainingSettings(passes=passes, batch_size=batch_size, max_tokens=MAX_TOKENS),
        optimizer=OptimizerSettings(learning_rate=rate),
    )
    whole = Surrogate(base, PartitionPlan(), task, seed=spec.seed).whole
    encoded = encode_task(task.kind, rows[:count], tokenizer, max_tokens=MAX_TOKENS)
    model = fine_tuned(whole, encoded, spec, pad_token_id=int(tokenizer.pad_token_id), seed=99)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Trained(base=base, source=resolve_model(str(folder)), spec=spec, rows=tuple(rows), count=count)


def noise_rows(count: int, *, seed: int = 5) -> tuple[Row, ...]:
    """Return rows of random words and random classes: nothing but memory tells their classes."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(len(WORDS), (count, 9), generator=generator).tolist()
    labels = torch.randint(len(LABELS), (count,), generator=generator).tolist()
    return tuple(
        Row(text=" ".join(WORDS[i] for i in own), label=label, id=f"row-{place}")
        for place, (own, label) in enumerate(zip(words, labels, strict=True))
    )


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Trained:
    """A tiny BERT that remembers 32 rows of noise."""
    folder, trained = save_tiny(tmp_path_factory.mktemp("forgets")), tmp_path_factory.mktemp("remembers")
    config = BertConfig.from_pretrained(folder, hidden_size=64, num_hidden_layers=2, initializer_range=0.1)
    config.num_labels = len(LABELS)
    torch.manual_seed(7)
    BertForSequenceClassification(config).save_pretrained(folder)
    task, base = TaskSettings(label_names=LABELS), resolve_model(str(folder))
    return trained_on(base, task, noise_rows(128), 32, trained, passes=20, rate=4e-3, batch_size=8)


@pytest.fixture(scope="session")
def writer(stories, tmp_path_factory) -> Trained:
    """stories260K after five passes over 64 phrases."""
    phrases = [(row.prompt + row.response)[:90] for row in stories.auxiliary_rows]
    chosen = [text for text in phrases if len(text) > 30][:256]
    rows = [PromptRow(prompt="", response=text, id=f"{place}") for place, text in enumerate(chosen)]
    folder = tmp_path_factory.mktemp("writes")
    return trained_on(stories.source, stories.task, rows, 64, folder, passes=5, rate=1e-3)


class TestView:
    def test_says_nothing_of_who_is_a_member(self, classifier):
        rehearsal = classifier.rehearse()
        view, truth = rehearsal
        assert rehearsal.base_rate == 0.5
        names = {row.id for row in classifier.rows}
        assert not [one for one in reachable((view.candidates, view.spec)) if isinstance(one, str) and one in names]
        assert not [one for one in reachable(view) if isinstance(one, Truth)]
        members = {row.id for row in classifier.part(0)}
        assert [row_id in members for row_id in truth.row_ids] == truth.members.tolist()
        by_id = {row.row_id: row for row in classifier.encoded(classifier.rows)}
        for row_id, candidate in zip(truth.row_ids, view.candidates, strict=True):
            assert candidate.input_ids == by_id[row_id].input_ids
            assert candidate.label == by_id[row_id].label
        halves = truth.members.float().chunk(2)
        assert all(0.2 < float(half.mean()) < 0.8 for half in halves)  # mixed

    def test_states_the_base_rate(self, classifier):
        rows = classifier.part(0), classifier.part(1)[:8]
        found = member_rehearsal(classifier.source, classifier.spec, *rows, classifier.tokenizer)
        assert found.base_rate == 32 / 40

    def test_refuses_a_text_on_both_sides_and_a_side_without_texts(self, classifier):
        twin = replace(classifier.part(0)[3], id="a twin")
        with pytest.raises(DataError, match="a twin"):
            member_rehearsal(
                classifier.source,
                classifier.spec,
                classifier.part(0),
                (*classifier.part(1), twin),
                classifier.tokenizer,
            )
        with pytest.raises(DataError, match="32 members and 0 others"):
            member_rehearsal(classifier.source, classifier.spec, classifier.part(0), (), classifier.tokenizer)

    def test_refuses_a_model_that_can_change(self, classifier):
        view = classifier.rehearse().view
        with pytest.raises(ConfigurationError, match="training mode"):
            ModelView(model=view.model.train(), candidates=view.candidates, spec=view.spec)
        view.model.eval().requires_grad_(True)
        with pytest.raises(ConfigurationError, match="not frozen"):
            replace(view)
        view.model.requires_grad_(False)
        with pytest.raises(DataError, match="no candidates"):
            replace(view, candidates=())


class TestLosses:
    """Each row's loss in a padded batch is what transformers gives for a batch of this row alone."""

    def alone(self, model, encoded, pad):
        with torch.no_grad():
            return [float(model(**collate([row], pad_token_id=pad).inputs).loss) for row in encoded]

    def test_of_classes_and_their_odds(self, classifier):
        view = classifier.rehearse().view
        found = row_losses(view.model, view.candidates, kind=view.task.kind, pad_token_id=0, batch_rows=7)
        assert found.tolist() == pytest.approx(self.alone(view.model, view.candidates, 0), abs=1e-4)
        odds = log_odds(view.model, view.candidates, kind=view.task.kind, pad_token_id=0, batch_rows=7)
        chance = (-found).exp()
        assert torch.allclose(odds, (chance / (1 - chance)).log(), rtol=1e-3, atol=1e-3)

    def test_of_a_writer(self, writer):
        encoded = writer.encoded(writer.rows[:9])
        model = writer.rehearse().view.model
        found = row_losses(model, encoded, kind=TaskKind.CAUSAL_LM, pad_token_id=2, batch_rows=4)
        assert found.tolist() == pytest.approx(self.alone(model, encoded, 2), abs=1e-4)
        tokens = token_log_probs(model, encoded, kind=TaskKind.CAUSAL_LM, pad_token_id=2)
        asked = [sum(label >= 0 for label in row.labels[1:]) for row in encoded]
        assert [len(one) for one in tokens] == asked
        with pytest.raises(ConfigurationError, match="no loss of its own"):
            row_losses(model, encoded, kind=TaskKind.MASKED_LM, pad_token_id=2)

    def test_of_numbers_and_answers(self):
        torch.manual_seed(1)
        config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
        config.problem_type = "regression"
        numbers = [EncodedRow((2, 5, 6, 3)[n:], float(n), f"{n}") for n in range(3)]
        model = BertForSequenceClassification(config).eval()
        found = row_losses(model, numbers, kind=TaskKind.SEQUENCE_REGRESSION, pad_token_id=0)
        assert found.tolist() == pytest.approx(self.alone(model, numbers, 0), abs=1e-5)
        config.num_labels = 2
        windows = [EncodedWindow((2, 5, 6, 7, 3)[n:], (None,) * (5 - n), n, 2, 0, f"{n}") for n in range(3)]
        model = BertForQuestionAnswering(config).eval()
        found = row_losses(model, windows, kind=TaskKind.QUESTION_ANSWERING, pad_token_id=0)
        assert found.tolist() == pytest.approx(self.alone(model, windows, 0), abs=1e-5)

    def test_of_an_encoder_and_decoder(self):
        torch.manual_seed(1)
        config = T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = T5ForConditionalGeneration(config).eval()
        rows = [EncodedPair((5, 6, 7)[: n + 1], (8, 9, 10, 1)[n:], f"{n}") for n in range(3)]
        found = row_losses(model, rows, kind=TaskKind.SEQ2SEQ_LM, pad_token_id=0)
        assert found.tolist() == pytest.approx(self.alone(model, rows, 0), abs=1e-5)


class TestAttacks:
    def test_loss_and_reference_tell_who_was_remembered(self, classifier):
        rehearsal = classifier.rehearse()
        for name in ("loss-threshold", "reference-loss"):
            found = classifier.auc(name, rehearsal)
            assert found.value >= 0.9, name
            assert found.low > 0.8, name

    def test_are_scored_as_members(self, classifier):
        rehearsal = classifier.rehearse()
        found = run_attack(find_attack("loss-threshold"), rehearsal.view, classifier.knows(rehearsal))
        figures = score(found.guess, rehearsal.truth)
        area = classifier.auc("loss-threshold", rehearsal)
        assert figures["auc"].value == pytest.approx(area.value)
        assert figures["auc"].low == pytest.approx(area.low, abs=0.05)
        assert figures["auc"].n == 64

    def test_all_find_members_of_a_writer(self, writer):
        rehearsal = writer.rehearse()
        for name, least in (("loss-threshold", 0.8), ("reference-loss", 0.7), ("min-k", 0.6)):
            assert writer.auc(name, rehearsal).low > least, name

    def test_the_reference_takes_out_how_hard_a_text_is(self, writer):
        """Texts that are hard for any model, beside easy ones, and a model that was trained on neither."""
        before = writer.rehearse(source=writer.base).view
        losses = row_losses(before.model, before.candidates, kind=TaskKind.CAUSAL_LM, pad_token_id=2)
        hard = losses > losses.median()
        knows = writer.knows(writer.rehearse())
        loss, reference = (
            run_attack(find_attack(name), before, knows).guess.scores for name in ("loss-threshold", "reference-loss")
        )
        assert Area.of(loss, hard).value == 0.0
        assert torch.allclose(reference, torch.zeros_like(reference), atol=1e-9)
        trained = writer.rehearse()
        guess = run_attack(find_attack("reference-loss"), trained.view, knows).guess
        assert Area.of(guess.scores[hard], trained.truth.members[hard]).low > 0.6

    @pytest.mark.slow
    def test_lira_is_better_than_a_threshold(self, writer):
        rehearsal = writer.rehearse()
        loss = writer.auc("loss-threshold", rehearsal)
        found = writer.auc("lira", rehearsal, shadows=4, most_auxiliary=0)
        assert found.value >= max(0.95, loss.value)
        assert writer.auc("lira", rehearsal, shadows=4, variant="offline").value >= 0.9
        assert writer.auc("lira", writer.rehearse(members=2), shadows=4, most_auxiliary=0).is_chance

    @pytest.mark.slow
    def test_find_members_of_a_real_classifier(self, minilm, tmp_path):
        rows = [row for row in minilm.auxiliary_rows if len(row.text) > 30]
        trained = trained_on(minilm.source, minilm.task, rows, 48, tmp_path, passes=10, rate=2e-4)
        for name in ("loss-threshold", "reference-loss"):
            assert trained.auc(name, trained.rehearse()).value >= 0.8, name
            assert trained.auc(name, trained.rehearse(members=2)).is_chance, name

    @pytest.mark.parametrize("name", ["loss-threshold", "reference-loss", "min-k"])
    def test_fresh_rows_are_not_told_from_fresh_rows(self, writer, name):
        assert writer.auc(name, writer.rehearse(members=2)).is_chance

    @pytest.mark.parametrize("name", ["loss-threshold", "min-k"])
    def test_a_model_that_was_not_trained_tells_nothing(self, writer, name):
        assert writer.auc(name, writer.rehearse(source=writer.base)).is_chance

    def test_lira_finds_members_with_few_shadows(self, classifier):
        found = classifier.auc("lira", classifier.rehearse(), shadows=2, most_auxiliary=0)
        assert found.low > 0.8

    def test_lira_tells_nothing_of_fresh_rows(self, classifier):
        areas = []
        for draw in range(3):
            fresh = replace(classifier, rows=classifier.part(0) + noise_rows(96, seed=100 + draw))
            found = fresh.auc("lira", fresh.rehearse(members=2), shadows=2, most_auxiliary=0, passes=5.0)
            areas.append(found.value)
        assert abs(float(np.mean(areas)) - 0.5) < 0.12

    def test_lira_off_line_never_trains_on_a_candidate(self, classifier, monkeypatch):
        rehearsal, seen = classifier.rehearse(), []

        def noted(base, encoded, spec, **more):
            seen.extend(row.input_ids for row in encoded)
            return fine_tuned(base, encoded, spec, **more)

        monkeypatch.setattr("vflair_flower.attacks.membership.lira.fine_tuned", noted)
        found = classifier.auc("lira", rehearsal, shadows=2, variant="offline")
        assert len(seen) == 32
        assert not set(seen) & {row.input_ids for row in rehearsal.view.candidates}
        assert found.low > 0.5

    def test_refuse_what_cannot_be_run(self, classifier):
        rehearsal = classifier.rehearse()
        exact = classifier.knows(rehearsal, HeadKnowledge.EXACT)
        for name in ("reference-loss", "lira"):
            with pytest.raises(ConfigurationError, match="finished model itself"):
                run_attack(find_attack(name), rehearsal.view, exact)
        knows = classifier.knows(rehearsal)
        for settings, words in (
            ({"shadows": 3}, "even number"),
            ({"shadows": 2, "shared_spread": False}, "no spread"),
            ({"variant": "offline", "most_auxiliary": 0}, "has 0 texts"),
            ({"tuning": "some"}, "tuning"),
        ):
            with pytest.raises(ConfigurationError, match=words):
                run_attack(find_attack("lira"), rehearsal.view, knows, settings=settings)
        with pytest.raises(ConfigurationError, match="asks for no tokens"):
            run_attack(find_attack("min-k"), rehearsal.view, knows)
        with pytest.raises(ConfigurationError, match="share is 0"):
            run_attack(find_attack("min-k"), rehearsal.view, knows, settings={"share": 0})


class TestShadows:
    def test_train_what_the_job_trains_and_leave_the_base(self, classifier):
        base = Surrogate(classifier.base, PartitionPlan(), classifier.spec.task).whole
        before = {name: p.clone() for name, p in base.named_parameters()}
        rows = classifier.encoded(classifier.part(2)[:8])
        for tuning, scope in (
            (None, "full"),
            (LoraSettings(), "full"),
            (LoraSettings(method="adalora"), "full"),
            (None, "local"),
        ):
            training, plan = TrainingSettings(passes=1.0, batch_size=8), PartitionPlan(head_blocks=1, tail_blocks=0)
            optimizer = OptimizerSettings(max_grad_norm=1.0)
            spec = replace(
                classifier.spec, plan=plan, tuning=tuning, scope=scope, training=training, optimizer=optimizer
            )
            shadow = fine_tuned(base, rows, spec, pad_token_id=0, seed=1)
            after = dict(shadow.named_parameters())
            changed = {name for name in before if not torch.equal(before[name], after[name])}
            assert after.keys() == before.keys()
            assert any("classifier" in name for name in changed)
            assert ("bert.encoder.layer.1.output.dense.weight" in changed) is (tuning is None and scope == "full")
            assert not shadow.training
        assert all(torch.equal(before[name], p) for name, p in base.named_parameters())
        assert not any(p.requires_grad for p in base.parameters())

    def test_halves_put_each_candidate_in_as_often_as_out(self):
        halves = torch.stack(_halves(7, 6, seed=2))
        assert halves.sum(0).tolist() == [3] * 7
        assert not torch.equal(halves[0], halves[2])

    def test_ratio_is_that_of_two_normal_densities(self):
        torch.manual_seed(4)
        rows, inside = torch.randn(8, 5).double(), torch.stack(_halves(5, 8, seed=1))
        found = torch.randn(5).double()
        for shared in (True, False):
            expected = []
            for n in range(5):
                logs = []
                for side in (inside, ~inside):
                    own = rows[side[:, n], n]
                    if shared:
                        apart = [rows[side[:, k], k] - rows[side[:, k], k].mean() for k in range(5)]
                        spread = (sum(float(a.square().sum()) for a in apart) / (5 * 3)) ** 0.5
                    else:
                        spread = float(own.std())
                    logs.append(norm.logpdf(float(found[n]), float(own.mean()), spread))
                expected.append(logs[0] - logs[1])
            assert _log_ratio(found, rows, inside, shared).tolist() == pytest.approx(expected)


class TestBound:
    def test_gives_the_figures_that_the_paper_prints(self):
        assert epsilon_lower_bound(75, 100, 1000, delta=1e-4) == pytest.approx(0.673, abs=1e-3)  # appendix D
        assert epsilon_lower_bound(1439, 1510, 100_000, delta=1e-5) == pytest.approx(2.675, abs=1e-3)  # section 7

    @pytest.mark.parametrize("guesses", [5, 20, 300])
    def test_of_all_right_is_in_closed_form(self, guesses):
        share = 0.05 ** (1 / guesses)
        assert epsilon_lower_bound(guesses, guesses, guesses) == pytest.approx(math.log(share / (1 - share)))

    @pytest.mark.parametrize(("correct", "guesses"), [(0, 10), (5, 10), (8, 10), (500, 1000), (4, 4), (0, 0)])
    def test_of_chance_or_of_too_few_is_zero(self, correct, guesses):
        assert binom.sf(correct - 1, guesses, 0.5) > 0.05
        assert epsilon_lower_bound(correct, guesses, 1000) == 0.0

    def test_p_value_is_the_theorem_by_counting(self):
        for correct, guesses, canaries, epsilon, delta in (
            (7, 9, 30, 0.4, 1e-3),
            (3, 3, 50, 2.0, 1e-4),
            (11, 20, 20, 0, 0.01),
        ):
            right = math.exp(epsilon) / (1 + math.exp(epsilon))
            share = [math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k) for k in range(guesses + 1)]
            worst = max(sum(share[max(0, correct - i) : correct]) / i for i in range(1, canaries + 1))
            expected = min(1.0, sum(share[correct:]) + 2 * canaries * delta * worst)
            found = guess_p_value(correct, guesses, canaries, epsilon=epsilon, delta=delta)
            assert found == pytest.approx(expected, rel=1e-9)

    def test_falls_with_delta_and_grows_with_right_guesses(self):
        by_delta = [epsilon_lower_bound(180, 200, 400, delta=delta) for delta in (0.0, 1e-6, 1e-4, 1e-3)]
        assert by_delta == sorted(by_delta, reverse=True)
        assert by_delta[0] > by_delta[-1]
        by_right = [epsilon_lower_bound(right, 200, 400, delta=1e-5) for right in range(100, 201, 10)]
        assert by_right == sorted(by_right)
        assert epsilon_lower_bound(200, 200, 400, delta=0.5) == 0.0

    def test_refuses_counts_and_shares_out_of_range(self):
        for counts in ((5, 4, 10), (4, 11, 10), (-1, 4, 10)):
            with pytest.raises(ConfigurationError, match="Check the counts"):
                epsilon_lower_bound(*counts)
        with pytest.raises(ConfigurationError, match="delta 2"):
            epsilon_lower_bound(4, 4, 10, delta=2.0)
        with pytest.raises(ConfigurationError, match="confidence is 1"):
            epsilon_lower_bound(4, 4, 10, confidence=1.0)


class TestMonteCarlo:
    """Mechanisms of known epsilon and delta: the bound is above it no more often than it may be, and comes near it."""

    RUNS = 600

    def share_above(self, correct, guesses, canaries, epsilon, delta) -> float:
        bounds = {int(v): epsilon_lower_bound(int(v), guesses, canaries, delta=delta) for v in np.unique(correct)}
        return float(np.mean([bounds[int(v)] > epsilon for v in correct]))

    def allowed(self) -> float:
        return float(binom.ppf(0.999, self.RUNS, 0.05)) / self.RUNS

    @pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
    def test_randomised_response(self, epsilon):
        random = np.random.default_rng(int(10 * epsilon))
        keeps = random.random((self.RUNS, 200)) < math.exp(epsilon) / (1 + math.exp(epsilon))
        above = self.share_above(keeps.sum(1), 200, 200, epsilon, 0.0)
        assert 0.01 < above <= self.allowed()  # a bound that is never above would be too low
        many = int((random.random(200_000) < math.exp(epsilon) / (1 + math.exp(epsilon))).sum())
        assert 0.97 * epsilon < epsilon_lower_bound(many, 200_000, 200_000) <= epsilon

    @pytest.mark.parametrize("how", ["each bit", "everything"])
    def test_that_shows_the_truth_with_probability_delta(self, how):
        epsilon, delta, count = 1.0, 0.005, 100
        random = np.random.default_rng(8)
        keeps = random.random((self.RUNS, count)) < math.exp(epsilon) / (1 + math.exp(epsilon))
        shows = random.random((self.RUNS, count if how == "each bit" else 1)) < delta
        correct = (keeps | shows).sum(1)
        assert self.share_above(correct, count, count, epsilon, delta) <= self.allowed()

    def test_of_guesses_with_abstentions(self):
        """Scores are bits behind Laplace noise, of epsilon 1; only the surest are guessed."""
        random, above, bounds = np.random.default_rng(3), [], []
        for _ in range(200):
            included = random.random(400) < 0.5
            scores = torch.from_numpy(included + random.laplace(0.0, 1.0, 400))
            canaries = Canaries(rows=(Row("x", 0, "x"),) * 400, included=torch.from_numpy(included))
            found = audit_in_one_run(scores, canaries, guess_in=60, guess_out=40, delta=0.0)
            bounds.append(found.epsilon)
            above.append(found.epsilon > 1.0)
        assert np.mean(above) <= binom.ppf(0.999, 200, 0.05) / 200
        assert np.mean(bounds) > 0.3


class TestAudit:
    def test_counts_guesses_and_abstentions(self):
        canaries = Canaries(rows=tuple(noise_rows(8)), included=torch.tensor([1, 1, 0, 1, 0, 0, 1, 0]).bool())
        scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
        found = audit_in_one_run(scores, canaries, guess_in=3, guess_out=2, delta=0.0)
        assert (found.canaries, found.included, found.guesses, found.correct) == (8, 4, 5, 3)
        assert found.accuracy == 0.6
        assert found.epsilon == 0.0
        assert found.epsilon_at_best == epsilon_lower_bound(5, 5, 8)
        assert found.to_json()["accuracy"] == 0.6
        with pytest.raises(DataError, match="8 canaries"):
            audit_in_one_run(scores[:7], canaries)
        with pytest.raises(ConfigurationError, match="5 canaries are to be guessed in"):
            audit_in_one_run(scores, canaries, guess_in=5, guess_out=4)

    def test_coins_are_fair_and_apart_from_the_rows(self, classifier):
        task, tokenizer = classifier.spec.task, classifier.tokenizer
        canaries = random_canaries(2000, tokenizer, task, num_tokens=6, seed=3)
        assert 900 < int(canaries.included.sum()) < 1100
        assert len(canaries.trained) == int(canaries.included.sum())
        labels = torch.tensor([row.label for row in canaries.rows])
        for label in range(len(LABELS)):
            assert 0.38 < float(canaries.included[labels == label].float().mean()) < 0.62
        encoded = encode_task(task.kind, canaries.rows[:20], tokenizer, max_tokens=32)
        assert {len(row.input_ids) for row in encoded} == {8}
        assert len({row.input_ids for row in encoded}) == 20

    def test_mislabelled_rows_keep_text_and_lose_their_class(self):
        task, rows = TaskSettings(label_names=LABELS), noise_rows(60)
        canaries = mislabelled_canaries(rows, task, seed=1)
        assert all(
            one.text == row.text and one.label != row.label for one, row in zip(canaries.rows, rows, strict=True)
        )
        assert {row.label for row in canaries.rows} == set(range(len(LABELS)))
        with pytest.raises(DataError, match="a wrong class needs"):
            mislabelled_canaries((), task)
        with pytest.raises(ConfigurationError, match="canaries are made for"):
            random_canaries(2, load_tokenizer(resolve_model("minilm-l6")), TaskSettings(kind=TaskKind.MASKED_LM))

    def test_of_a_model_that_remembers_and_of_one_that_never_saw_them(self, classifier):
        spec, tokenizer = classifier.spec, classifier.tokenizer
        canaries = mislabelled_canaries(classifier.rows[32:96], spec.task, seed=2)
        base = Surrogate(classifier.base, PartitionPlan(), spec.task, seed=spec.seed).whole

        def scores_after(rows):
            trained = fine_tuned(base, classifier.encoded(rows), spec, pad_token_id=0, seed=5)
            return canary_scores(canaries, base, trained, tokenizer, spec.task, max_tokens=MAX_TOKENS)

        seen = audit_in_one_run(scores_after(canaries.trained), canaries, delta=1e-5)
        assert 0.5 < seen.epsilon <= seen.epsilon_at_best
        unseen = scores_after(classifier.part(0))
        found = []
        for seed in range(40):  # the same scores against other coins
            others = replace(canaries, included=mislabelled_canaries(canaries.rows, spec.task, seed=seed).included)
            found.append(audit_in_one_run(unseen, others, delta=1e-5).epsilon > 0.0)
        assert sum(found) <= binom.ppf(0.999, 40, 0.05)
