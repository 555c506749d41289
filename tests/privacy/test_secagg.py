"""Secure aggregation without a job: sums are exact, single vectors are noise, and parties refuse what they should."""

import dataclasses
import math

import numpy as np
import pytest
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.privacy import masked_party, masked_sum
from vflair_flower.privacy.masked_party import KEY, SEED, MaskedParty
from vflair_flower.privacy.masked_sum import MaskedSum, ring
from vflair_flower.privacy.masks import Layout, decode, derive, encode, mask_of
from vflair_flower.secagg_settings import SecAggSettings

SETTINGS = SecAggSettings()
NAMES = ["ada", "bea", "cleo"]
ABOUT = {"job": "job", "server_round": 3}


def arrays_of(index, size=400, scale=1.0):
    drawn = np.random.default_rng(index).normal(0, scale, size).astype(np.float32)
    return {"tail": drawn[: size // 2].reshape(2, -1), "head": drawn[size // 2 :]}


class Round:
    """A round whose parties and strategy talk by calls."""

    def __init__(self, names=NAMES, settings=SETTINGS, silent=()):
        self.settings = settings
        self.parties = {name: MaskedParty(party=name, settings=settings, **ABOUT) for name in names}
        self.sum = MaskedSum(settings, asked=names, **ABOUT)
        self.sum.add_keys({name: self._kept(name).keys() for name in names})
        self.sum.add_sealed(
            {
                name: self._kept(name).share(self.sum.keys_for(name), self.sum.parties)
                for name in names
                if name not in silent
            }
        )
        self.weights = {name: 5 + i for i, name in enumerate(names)}
        self.vectors = {}

    def _kept(self, name):
        """The party as it is after a message: read back from what it keeps."""
        self.parties[name] = MaskedParty.from_json(self.parties[name].to_json())
        return self.parties[name]

    def train(self, *names):
        for name in names:
            party = self._kept(name)
            party.open(self.sum.sealed_for(name))
            arrays, metrics = arrays_of(self.weights[name]), {"loss": float(self.weights[name])}
            plain = encode(arrays, metrics, weight=self.weights[name], settings=self.settings, parties=party.parties)
            self.vectors[name] = party.mask(plain)
            layout = Layout.of(arrays, metrics)
            self.sum.add_vector(name, self.vectors[name], layout=layout, seed_check=party.seed_check())
        return self

    def reveal(self, silent=()):
        for name, (summed, lost) in self.sum.unmasking().items():
            if name not in silent:
                self.sum.add_shares(self._kept(name).unmask(summed, lost))
        return self.sum.total()

    def expected(self, *names):
        weight = sum(self.weights[name] for name in names)
        mean = {
            key: sum(self.weights[n] * arrays_of(self.weights[n])[key].astype(np.float64) for n in names) / weight
            for key in ("head", "tail")
        }
        return mean, sum(self.weights[n] ** 2 for n in names) / weight, weight


def assert_is_mean(found, expected, settings=SETTINGS, parties=3):
    arrays, metrics, weight = found
    mean, loss, total = expected
    assert weight == total
    bound = 2.0 ** -(settings.fraction_bits(parties) + 1)
    assert metrics["loss"] == pytest.approx(loss, abs=bound + 1e-12)
    for name, array in arrays.items():
        assert array.dtype == np.float32
        # The bound of the sum, and that of rounding the mean to float32.
        assert np.all(np.abs(array - mean[name]) <= bound + np.abs(mean[name]) * 2.0**-24)


# ---- sums ----


def test_the_sum_is_the_weighted_mean_within_the_bound():
    assert_is_mean(Round().train(*NAMES).reveal(), Round().expected(*NAMES))


@pytest.mark.parametrize("silent_later", [(), ("bea",)])
def test_a_party_lost_after_sharing_keys_leaves_a_right_sum(silent_later):
    four = [*NAMES, "dora"]
    settings = SecAggSettings(threshold=0.51)  # 3 of 4
    one = Round([*four, "eve"], SecAggSettings(threshold=0.51)).train("ada", "bea", "dora", "eve")
    assert_is_mean(one.reveal(silent_later), one.expected("ada", "bea", "dora", "eve"), settings, 5)


def test_a_party_lost_before_it_has_shared_is_not_waited_for():
    one = Round(silent=("cleo",)).train("ada", "bea")
    assert one.sum.ready == ["ada", "bea"]
    assert_is_mean(one.reveal(), one.expected("ada", "bea"))


def test_a_ring_of_neighbours_sums_as_all_do_and_takes_a_loss():
    names = [f"p{i}" for i in range(9)]
    one = Round(names, SecAggSettings(neighbours=4))
    assert {len(one.sum.keys_for(name)) for name in names} == {5}
    rest = names[1:]
    assert_is_mean(one.train(*rest).reveal(), one.expected(*rest), one.settings, 9)


def test_groups_without_masks_between_them_are_not_unmasked(monkeypatch):
    monkeypatch.setattr(masked_sum.secrets.SystemRandom, "shuffle", lambda self, names: None)
    names = [f"p{i}" for i in range(6)]
    one = Round(names, SecAggSettings(threshold=0.51, neighbours=2))
    assert ring(names, 2)["p0"] == {"p1", "p5"}
    one.train("p0", "p1", "p3", "p4")  # p2 and p5 gone: two pairs
    with pytest.raises(SessionError, match="groups without masks between them"):
        one.reveal()
    assert all(one.parties[name].stage == "masked" for name in ("p0", "p1", "p3", "p4"))


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-64, 64, width=32), st.integers(0, 2**20)), min_size=2, max_size=6).filter(
        lambda given: any(weight for _, weight in given)
    ),
)
def test_no_sum_in_range_wraps_and_the_error_is_below_the_bound(given):
    parties, total, layout = len(given), np.zeros(3, np.uint64), None
    for value, weight in given:
        array = {"x": np.asarray([value])}
        layout = Layout.of(array, {})
        total += encode(array, {}, weight=weight, settings=SETTINGS, parties=parties)
    arrays, _, weight = decode(total, layout, summed=parties, settings=SETTINGS, parties=parties)
    exact = math.fsum(value * weight for value, weight in given) / weight
    assert abs(arrays["x"][0] - exact) <= 2.0 ** -(SETTINGS.fraction_bits(parties) + 1) + abs(exact) * 2.0**-50


def test_the_bound_is_tight():
    """Numbers with more bits than are kept: the error comes near the bound, and never beyond."""
    values = np.random.default_rng(0).uniform(-0.1, 0.1, (3, 10_000))
    weights = [1, 7, 1000]
    total = sum(
        encode({"x": array}, {}, weight=weight, settings=SETTINGS, parties=3)
        for array, weight in zip(values, weights, strict=True)
    )
    arrays, *_ = decode(total, Layout.of({"x": values[0]}, {}), summed=3, settings=SETTINGS, parties=3)
    error = np.abs(arrays["x"] - np.asarray(weights) @ values / sum(weights)).max()
    bound = 2.0 ** -(SETTINGS.fraction_bits(3) + 1)
    assert 0.9 * bound < error <= bound + 2.0**-50


def test_the_largest_sum_does_not_wrap():
    settings = SecAggSettings()
    array = {"x": np.full(2, 64.0)}
    total = np.zeros(4, np.uint64)
    for _ in range(1000):
        total += encode(array, {}, weight=2**20, settings=settings, parties=1000)
    arrays, _, weight = decode(total, Layout.of(array, {}), summed=1000, settings=settings, parties=1000)
    assert weight == 1000 * 2**20
    assert arrays["x"].tolist() == [64.0, 64.0]


# ---- what single vectors give away ----


def ones(vector):
    """Share of each of the 64 bits that is set, over a vector."""
    return np.unpackbits(vector.view(np.uint8)).mean()


def looks_uniform(vector):
    """Whether all 64 bits are fair coins, and neighbouring numbers are not alike, at 6 standard deviations."""
    bits = np.unpackbits(vector.view(np.uint8).reshape(len(vector), 8), axis=1)
    return bool(
        np.all(np.abs(bits.mean(axis=0) - 0.5) < 6 * 0.5 / math.sqrt(len(vector)))
        and abs(ones(vector) - 0.5) < 6 * 0.5 / math.sqrt(bits.size)
    )


def test_a_single_vector_looks_uniform_and_so_do_differences_and_other_rounds():
    one, other = Round().train(*NAMES), Round().train(*NAMES)
    seen = [*one.vectors.values(), *other.vectors.values()]
    assert all(looks_uniform(vector) for vector in seen)
    assert all(looks_uniform(a - b) for i, a in enumerate(seen) for b in seen[:i])
    # Two of three summed still have the masks with the third.
    assert looks_uniform(one.vectors["ada"] + one.vectors["bea"])


def test_the_check_of_uniformity_sees_a_vector_without_its_masks(monkeypatch):
    for module in (masked_party, masked_sum):
        monkeypatch.setattr(module, "mask_of", lambda key, size: np.zeros(size, np.uint64))
    assert not any(looks_uniform(vector) for vector in Round().train(*NAMES).vectors.values())


def test_what_the_strategy_has_less_one_share_unmasks_nothing():
    one = Round().train(*NAMES)
    wishes = one.sum.unmasking()
    seed = bytes.fromhex(one.parties["ada"]._seed)
    first, second = (one.parties[name].unmask(*wishes[name]) for name in ("ada", "bea"))
    one.sum.add_shares(first)
    with pytest.raises(SessionError, match=r"only 1 of 3 parties .* share of the seed of 'ada'.* needs 2"):
        one.sum.total()
    shares = [bytes.fromhex(given["ada"][SEED]) for given in (first, second)]
    assert combine_shares(shares) == seed
    for share in shares:
        try:
            guessed = combine_shares([share])
        except ValueError:  # of its padding
            continue
        assert guessed != seed


def test_each_of_the_two_masks_hides_a_vector_alone():
    one = Round().train(*NAMES)
    ada = one.parties["ada"]
    size = len(one.vectors["ada"])
    own = mask_of(ada.own_key(bytes.fromhex(ada._seed), "ada"), size)
    pairs = sum(-mask_of(ada.pair_key(ada._private["mask"], ada._public[n]["mask"], n), size) for n in ("bea", "cleo"))
    assert looks_uniform(one.vectors["ada"] - own)
    assert looks_uniform(one.vectors["ada"] - pairs)
    assert not looks_uniform(one.vectors["ada"] - own - pairs)


def test_masks_differ_by_round_job_pair_and_purpose():
    words = [("pair", "job", 1, "a", "b"), ("pair", "job", 2, "a", "b"), ("pair", "jo", 1, "a", "b"),
             ("pair", "job", 1, "a", "c"), ("own", "job", 1, "a"), ("check", "job", 1, "a")]  # fmt: skip
    masks = {mask_of(derive(b"secret", *w), 4).tobytes() for w in words}
    assert len(masks) == len(words)


def test_masks_are_chacha20_streams():
    """The first test vector of RFC 8439, appendix A.1."""
    assert mask_of(bytes(32), 2).astype("<u8").tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


# ---- what parties refuse ----


def test_a_party_gives_of_each_other_one_share_and_the_round_is_unmasked_once():
    one = Round().train(*NAMES)
    ada = one.parties["ada"]
    before = ada.to_json()
    for summed, lost, said in [
        (["ada", "bea", "cleo"], ["cleo"], "both shares of 'cleo' are asked for"),
        (["bea", "cleo"], ["ada"], "has sent its vector and is said to be lost"),
        (["bea", "cleo"], [], "has sent its vector and is said to be lost"),
        (["ada"], ["bea", "cleo"], "only 1 of 3 parties that this one knows are in the sum, and 2 are needed"),
        (["ada", "bea", "mallory"], [], "holds no shares of 'mallory'"),
    ]:
        with pytest.raises(SessionError, match=said):
            ada.unmask(summed, lost)
        assert ada.to_json() == before
    given = ada.unmask(["ada", "bea"], ["cleo"])
    assert {name: set(share) for name, share in given.items()} == {"ada": {SEED}, "bea": {SEED}, "cleo": {KEY}}
    for summed, lost in ([["ada", "bea"], ["cleo"]], [["ada", "bea", "cleo"], []]):
        with pytest.raises(SessionError, match="has unmasked the round already"):
            MaskedParty.from_json(ada.to_json()).unmask(summed, lost)
    assert ada._seed == "" and not ada._private and not ada._held  # noqa: PT018


def test_a_party_unmasks_only_what_it_has_masked():
    one = Round()
    with pytest.raises(SessionError, match="has sent no vector"):
        one.parties["ada"].unmask(NAMES, [])
    with pytest.raises(SessionError, match="asks for what follows 'keys'"):
        one.parties["ada"].share(one.sum.keys_for("ada"), 3)
    party = one.parties["ada"]
    party.open(one.sum.sealed_for("ada"))
    party.mask(np.zeros(3, np.uint64))
    with pytest.raises(SessionError, match="asks for what follows 'opened'"):
        party.mask(np.ones(3, np.uint64))  # the same masks on two vectors would show their difference


@pytest.mark.parametrize("tampered", ["changed", "other sender", "other round", "itself"])
def test_sealed_shares_that_were_tampered_with_are_refused(tampered):
    one, other = Round(), Round()
    sealed = one.sum.sealed_for("ada")
    assert "seed" not in str(sealed)
    if tampered == "changed":
        text = sealed["bea"]
        sealed["bea"] = text[:60] + ("A" if text[60] != "A" else "B") + text[61:]
    elif tampered == "other sender":
        sealed["bea"] = sealed["cleo"]
    elif tampered == "other round":
        sealed["bea"] = other.sum.sealed_for("ada")["bea"]
    else:
        sealed = {**sealed, "ada": sealed["bea"]}
    with pytest.raises(SessionError, match=r"changed on the way|no neighbour"):
        one.parties["ada"].open(sealed)


def test_a_party_refuses_a_round_with_too_few_or_with_other_keys():
    one = Round()
    with pytest.raises(SessionError, match=r"only 1 of 3 .* have shared their secrets, and 2 are needed"):
        one.parties["ada"].open({})
    new = MaskedParty(party="ada", settings=SETTINGS, **ABOUT)
    own = new.keys()
    saved = new.to_json()
    theirs = one.sum.keys_for("ada")
    for public, said in [
        ({**theirs}, "other public keys of this party"),
        ({"ada": own}, "no one to hide among"),
        ({"ada": own, "bea": theirs["bea"], "cleo": theirs["bea"]}, "two of the public keys are the same"),
    ]:
        with pytest.raises(SessionError, match=said):
            MaskedParty.from_json(saved).share(public, 3)


def test_a_wrong_share_does_not_pass_for_a_sum():
    one = Round().train("ada", "bea")
    wishes = one.sum.unmasking()
    for name in ("ada", "bea"):
        given = one.parties[name].unmask(*wishes[name])
        share = bytearray.fromhex(given["cleo"][KEY])
        share[-20] ^= 1
        one.sum.add_shares({**given, "cleo": {KEY: share.hex()}})
    with pytest.raises(SessionError, match="key of 'cleo' do not fit together"):
        one.sum.total()


def test_below_the_threshold_says_what_to_do():
    one = Round().train("ada")
    with pytest.raises(SessionError, match=r"only 1 of 3 parties have sent their arrays, .* needs 2 .*Resume the job"):
        one.reveal()
    assert one.parties["ada"].stage == "masked"
    with pytest.raises(ConfigurationError, match="a sum over one party is that party's own"):
        MaskedSum(SETTINGS, asked=["ada"], **ABOUT)


@pytest.mark.parametrize("value", [64.001, -65.0, math.nan, math.inf])
def test_a_number_out_of_range_is_refused_by_the_array_s_name_alone(value):
    with pytest.raises(ConfigurationError, match=r"^head has a number beyond \+-64") as caught:
        encode({"head": np.asarray([0.5, value])}, {}, weight=1, settings=SETTINGS, parties=3)
    assert str(abs(value)) not in str(caught.value)
    with pytest.raises(ConfigurationError, match="metric 'loss' has a number"):
        encode({}, {"loss": value}, weight=1, settings=SETTINGS, parties=3)
    with pytest.raises(ConfigurationError, match="max_weight"):
        encode({}, {}, weight=2**20 + 1, settings=SETTINGS, parties=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threshold": 0.5}, "threshold is 0.5; with half"),
        ({"threshold": 1.1}, "threshold is 1.1"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": math.inf}, "clip is inf"),
        ({"max_weight": 0}, "max_weight is 0"),
        ({"neighbours": 3}, "neighbours is 3"),
        ({"neighbours": -2}, "neighbours is -2"),
        ({"clip": 1e6, "max_weight": 2**30}, "bits behind the point"),
    ],
)
def test_wrong_settings_are_refused_at_birth(given, said):
    with pytest.raises(ConfigurationError, match=said):
        SecAggSettings(**given)


def test_more_than_half_of_the_shares_are_needed_whatever_the_threshold():
    for threshold in (0.501, 0.6, 2 / 3, 0.9, 1.0):
        settings = dataclasses.replace(SETTINGS, threshold=threshold)
        for holders in range(2, 40):
            assert max(2, holders * threshold - 1e-6) <= settings.needed(holders) <= holders
            assert 2 * settings.needed(holders) > holders
