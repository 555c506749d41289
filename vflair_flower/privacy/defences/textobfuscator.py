"""TextObfuscator: states of like tokens are drawn together, so that noise takes one for another.

B rows, T tokens, D hidden, V vocabulary, K clusters, N tokens, S different tokens of the party's own texts, C classes.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy.bottleneck import ReadsTokens, check_weight, own_states
from vflair_flower.privacy.defence import Moment, Needs, Place, Preparation, Scene, defence
from vflair_flower.settings import one_of
from vflair_flower.tasks import Encoded
from vflair_flower.tasks.encoded import EncodedRow

_ROWS = 1024
_TRIES = 3
_NOWHERE = -1
_LEAST_COUNT = 3


@defence(
    "textobfuscator",
    places=(Place.IDS, Place.SMASHED),
    needs=Needs.OWN_TEXTS,
    paper="Zhou et al., Findings of ACL 2023. Centres are apart enough once they are as far apart as `apart` says, "
    "so their distance is bounded; noise is in deviations of the states, not an epsilon; a token that the party's own "
    "texts lack goes to the nearest centre",
)
class TextObfuscator(ReadsTokens):
    """Train the head so that tokens of a cluster have like states, and send ``x + noise``.

    Once, the states of the party's own texts are averaged for every token and put into `clusters` clusters by k-means.
    Then ``close * mean (x - centre of its token)^2`` and ``away * mean max(0, 1 - distance / wanted)^2`` over pairs of
    centres are added to the loss, in deviations of the states; centres are trained with the model.  Tokens are read,
    and left as they are; special ones belong to no cluster.  What draws states together is the head's own adapters: a
    head that is not trained sends its states with noise and no more.

    Noise is new at every sending: who sees a text k times averages it away by the root of k, and no epsilon is
    claimed.  An adversary who knows the centres learns at least a token's cluster, if noise is less than what parts
    them.  A token that lies in a cluster of its own is not hidden.

    Parameters
    ----------
    scene : Scene
        See `Defence`.
    noise : float
        0 or more; its deviation in every number, in deviations of the states from their mean.
    law : {"laplace", "gauss"}
        How noise is drawn.
    clusters : int
        K, 2 or more.
    close, away : float
        0 or more; weights in the loss.
    apart : float
        Above 0; how far apart centres are wanted, in mean distances of the first centres.
    label_words : int
        0 or more.  Where texts have classes: how many tokens of each class, those that speak for it most, may not be in
        a cluster with such tokens of another class; who is moved goes to the nearest cluster without.

    Raises
    ------
    ConfigurationError
        A setting is out of range, or the party's own texts have fewer different tokens than there are clusters.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        noise: float = 2.0,
        law: str = "laplace",
        clusters: int = 50,
        close: float = 5.0,
        away: float = 0.1,
        apart: float = 1.0,
        label_words: int = 10,
    ) -> None:
        super().__init__(scene)
        self.noise = check_weight("noise", noise)
        one_of("law", law, ("laplace", "gauss"))
        self.law = law
        if clusters < 2:
            raise ConfigurationError(f"clusters is {clusters}; tokens are put into 2 or more.")
        self.close, self.away = check_weight("close", close), check_weight("away", away)
        if not 0 < apart < float("inf"):
            raise ConfigurationError(f"apart is {apart}; it is a distance. Choose one above 0.")
        self.apart = apart
        if label_words < 0:
            raise ConfigurationError(f"label_words is {label_words}; choose 0 (none) or more.")
        self.label_words = label_words
        vocabulary = len(scene.embedding_VD)
        self.centres_KD = nn.Parameter(torch.zeros(clusters, scene.width))
        self.register_buffer("cluster_V", torch.full((vocabulary,), _NOWHERE))
        self.register_buffer("deviation", torch.ones(()))
        self.register_buffer("wanted", torch.ones(()))
        self.cluster_V: Tensor
        self.deviation: Tensor
        self.wanted: Tensor

    @torch.no_grad()
    def prepare(self, preparation: Preparation) -> None:
        """Find the clusters of the party's own tokens, and the size of its states."""
        pairs = list(own_states(preparation, rows=_ROWS))
        ids_N = torch.cat([ids for ids, _ in pairs])
        hidden_ND = torch.cat([hidden for _, hidden in pairs]).float().cpu()
        text_N = ~self.special_V.cpu()[ids_N]
        tokens_S, places_N = ids_N[text_N].unique(return_inverse=True)
        clusters = len(self.centres_KD)
        if len(tokens_S) < clusters:
            raise ConfigurationError(
                f"clusters is {clusters}, and the party's own texts have {len(tokens_S)} different tokens. "
                "Choose fewer."
            )
        means_SD = torch.zeros(len(tokens_S), hidden_ND.shape[1]).index_add_(0, places_N, hidden_ND[text_N])
        means_SD /= torch.bincount(places_N)[:, None]
        seed = int.from_bytes(self.scene.secret.digest(b"clusters")[:4], "little")
        found = KMeans(n_clusters=clusters, n_init=_TRIES, random_state=seed).fit(means_SD.double().numpy())
        cluster_S = torch.from_numpy(found.labels_).long()
        centres_KD = torch.from_numpy(found.cluster_centers_).float()
        words = label_words(preparation.encoded, self.scene.special_ids, self.label_words)
        part_label_words(words, tokens_S, means_SD, cluster_S, centres_KD)
        self.cluster_V.fill_(_NOWHERE)
        self.cluster_V[tokens_S] = cluster_S.to(self.cluster_V)
        self.centres_KD.copy_(centres_KD)
        self.deviation.copy_((hidden_ND - hidden_ND.mean(0)).square().mean().sqrt())
        self.wanted.copy_(self.apart * torch.pdist(centres_KD).mean())
        super().prepare(preparation)

    def smashed(self, hidden_BTD: Tensor, moment: Moment) -> Tensor:
        """Return states with noise, [B, T, D]."""
        if moment.training:
            text_BT, ids_N = self.text_of(moment.mask_BT)
            self._term = self._terms(hidden_BTD[text_BT].float(), ids_N)
        if not self.noise:
            return hidden_BTD
        return hidden_BTD + (self.noise * self.deviation * self._drawn(hidden_BTD)).to(hidden_BTD.dtype)

    def clusters_of(self, ids_N: Tensor, hidden_ND: Tensor) -> Tensor:
        """Return the cluster of every token, int64 [N]; of those never seen, that of the nearest centre."""
        known_N = self.cluster_V[ids_N]
        nearest_N = torch.cdist(hidden_ND.detach(), self.centres_KD.detach()).argmin(-1)
        return torch.where(known_N == _NOWHERE, nearest_N, known_N)

    def _terms(self, hidden_ND: Tensor, ids_N: Tensor) -> Tensor | None:
        terms = []
        if self.close and len(ids_N):
            gaps_ND = hidden_ND - self.centres_KD[self.clusters_of(ids_N, hidden_ND)]
            terms.append(self.close * gaps_ND.square().mean() / self.deviation.square())
        if self.away:
            near = (1 - torch.pdist(self.centres_KD) / self.wanted).clamp_min(0)
            terms.append(self.away * near.square().mean())
        return torch.stack(terms).sum() if terms else None

    def _drawn(self, like: Tensor) -> Tensor:
        """Return noise of deviation 1."""
        generator, drawn = self.scene.noise.on(like.device), torch.empty(like.shape, device=like.device)
        if self.law == "gauss":
            return drawn.normal_(generator=generator)
        # The difference of two exponential numbers is Laplace, of variance 2.
        other = torch.empty_like(drawn).exponential_(generator=generator)
        return (drawn.exponential_(generator=generator) - other) / 2**0.5


def label_words(encoded: Sequence[Encoded], special_ids: frozenset[int], count: int) -> list[list[int]]:
    """Return for each class the tokens that speak for it most: those by which a text's class is likeliest to be told.

    Parameters
    ----------
    encoded : sequence of Encoded
        Texts; those without a class speak for none.
    special_ids : frozenset of int
        Tokens that are no text.
    count : int
        How many for each class, at most.
    """
    texts: dict[int, int] = defaultdict(int)
    having: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for row in encoded:
        if not isinstance(row, EncodedRow) or not isinstance(row.label, int):
            continue
        texts[row.label] += 1
        for token in set(row.input_ids) - special_ids:
            having[token][row.label] += 1
    total = sum(texts.values())
    found: list[list[int]] = []
    for label in sorted(texts):
        share = texts[label] / total
        # How many deviations a token is in more texts of the class than chance would put it.
        scores = {
            token: (by[label] - share * sum(by.values())) / (sum(by.values()) * share * (1 - share) + 1e-9) ** 0.5
            for token, by in having.items()
            if sum(by.values()) >= _LEAST_COUNT
        }
        best = sorted(scores, key=lambda token: (-scores[token], token))[:count]
        found.append([token for token in best if scores[token] > 0])
    return found


def part_label_words(
    words: list[list[int]], tokens_S: Tensor, means_SD: Tensor, cluster_S: Tensor, centres_KD: Tensor
) -> None:
    """Change `cluster_S` and `centres_KD` so that no cluster holds words of two classes, where clusters are enough.

    Parameters
    ----------
    words : list of lists of int
        Of each class.
    tokens_S, means_SD : Tensor
        Every token and its mean state.
    cluster_S, centres_KD : Tensor
        Its cluster, and the centres.
    """
    place_of = {int(token): place for place, token in enumerate(tokens_S)}
    owner: dict[int, int] = {}
    for label, tokens in enumerate(words):
        for place in (place_of[token] for token in tokens if token in place_of):
            order = torch.cdist(means_SD[place][None], centres_KD)[0].argsort().tolist()
            own = int(cluster_S[place])
            free = [one for one in (own, *order) if owner.get(one, label) == label]
            if free:
                cluster_S[place] = free[0]
                owner[free[0]] = label
    for cluster in range(len(centres_KD)):
        held_SD = means_SD[cluster_S == cluster]
        if len(held_SD):
            centres_KD[cluster] = held_SD.mean(0)
