"""SanText+: rare tokens are changed into others of like meaning, and some of the frequent ones too.

N tokens of a call, U of them distinct, C sensitive tokens, V vocabulary.
"""

import hashlib

import torch
from torch import Tensor

from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy.defence import Needs, Place, Preparation, Scene, defence
from vflair_flower.privacy.sanitising import (
    Draws,
    KeptRows,
    Sanitiser,
    check_epsilon,
    distances,
    drawn,
    exponential,
)
from vflair_flower.privacy.vocabulary import rarest_tokens


@defence(
    "santext",
    places=(Place.IDS,),
    needs=Needs.OWN_TEXTS,
    paper="Yue et al. (SanText+), Findings of ACL 2021, on the model's own tokens and word embeddings; a token that "
    "the party's texts lack counts as the rarest and is sensitive; the original draws for it from all words alike",
)
class SanText(Sanitiser):
    """Change sensitive tokens by the exponential mechanism over distances of word embeddings.

    Sensitive are the rarest of the tokens that the party's training texts use, and all that they do not use.  A
    sensitive token x becomes the sensitive token y with probability proportional to ``exp(-epsilon * d(x, y) / 2)``,
    where d is the Euclidean distance of the word embeddings as the session begins with them.  Any other token becomes
    one by the same rule with probability `p`, and stays with ``1 - p``.

    What holds, for one token and one draw (metric differential privacy): for sensitive x and x' no y is more than
    ``exp(epsilon * d(x, x'))`` times as likely from x as from x'.  If one of the two is not sensitive, the factor grows
    by ``1 / p``, and for tokens that stay there is no bound: what is sent is what they are.  Which tokens are sensitive
    tells something of the party's texts, of which nothing is promised.  See `Sanitiser` for what else can be seen.

    Parameters
    ----------
    scene : Scene
        See `Defence`.
    epsilon : float
        Above 0, per unit of distance between word embeddings; near tokens of MiniLM are 0.4 to 1 apart, others 1.6.
    sensitive_share : float
        Above 0 and at most 1, of the distinct tokens of the party's texts; with 1 all tokens are sensitive (SanText).
    p : float
        0 to 1.  With 0 frequent tokens are sent as they are.
    keep_punctuation, keep_numbers, written
        See `Sanitiser`.

    Raises
    ------
    ConfigurationError
        A setting is out of range.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        epsilon: float = 5.0,
        sensitive_share: float = 0.5,
        p: float = 0.2,
        keep_punctuation: bool = False,
        keep_numbers: bool = False,
        written: str = "change",
    ) -> None:
        super().__init__(scene, keep_punctuation=keep_punctuation, keep_numbers=keep_numbers, written=written)
        self.epsilon = check_epsilon(epsilon, "per unit of distance between word embeddings")
        if not 0.0 < sensitive_share <= 1.0:
            raise ConfigurationError(
                f"sensitive_share is {sensitive_share}; choose 0 < sensitive_share <= 1, the part of the party's "
                "vocabulary that is sensitive."
            )
        if not 0.0 <= p <= 1.0:
            raise ConfigurationError(f"p is {p}; choose 0 to 1, how likely a token that is not sensitive is changed.")
        self.sensitive_share = float(sensitive_share)
        self.p = float(p)
        self.register_buffer("sensitive_V", self.changeable_V.clone())
        self.sensitive_V: Tensor
        self._rows: KeptRows | None = None
        self._version = -1

    def prepare(self, preparation: Preparation) -> None:
        """Count the party's tokens, and find the sensitive ones."""
        self.sensitive_V.copy_(rarest_tokens(preparation.encoded, self.changeable_V, share=self.sensitive_share))
        super().prepare(preparation)

    @property
    def drawn_for(self) -> str:
        """What draws depend on besides the text."""
        sensitive = hashlib.sha256(self.sensitive_V.cpu().numpy().tobytes()).hexdigest()
        return f"{super().drawn_for}|{sensitive}"

    def changed(self, tokens_N: Tensor, draws: Draws) -> Tensor:
        """Return what stands in for tokens, int64 [N]."""
        candidates_C, rows = self._now()
        result_N = tokens_N.clone()
        chosen = (self.sensitive_V[tokens_N] | (draws.uniform_N2[:, 1] < self.p)).nonzero()[:, 0]
        for places, sums_C in rows.each(tokens_N[chosen]):
            at = chosen[places]
            result_N[at] = candidates_C[drawn(sums_C, draws.uniform_N2[at, 0])]
        return result_N

    def probabilities(self, token: int) -> Tensor:
        """Return how likely each token is to stand in for one, float64 [V]."""
        candidates_C, rows = self._now()
        ((_, sums_C),) = rows.each(candidates_C.new_tensor([token]))
        found_V = torch.zeros(len(self.sensitive_V), dtype=torch.float64, device=sums_C.device)
        found_V[candidates_C] = sums_C.diff(prepend=sums_C.new_zeros(1)) / sums_C[-1]
        if not bool(self.sensitive_V[token]):
            found_V *= self.p
            found_V[token] = 1.0 - self.p
        return found_V

    def _now(self) -> tuple[Tensor, KeptRows]:
        """Return the candidates and their rows, made anew if other tokens are sensitive now."""
        candidates_C = self.sensitive_V.nonzero()[:, 0]
        if self._rows is None or self._version != self.sensitive_V._version:
            table_VD = self.scene.embedding_VD

            def make(tokens_U: Tensor) -> Tensor:
                return exponential(distances(table_VD, tokens_U, candidates_C) * (-self.epsilon / 2))

            self._rows = KeptRows(make, numbers_per_row=len(candidates_C))
            self._version = self.sensitive_V._version
        return candidates_C, self._rows
