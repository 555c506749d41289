"""Split-and-Denoise: noise of one direction and one radius per token, and a denoiser at home for what comes back.

B rows, T tokens, E numbers of an embedding, D hidden, O numbers of an answer at one place, K places that are answered.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy.defence import Defence, Moment, Needs, Place, Preparation, Scene, defence
from vflair_flower.privacy.denoiser import Denoiser, Lesson, train_denoiser
from vflair_flower.privacy.public_texts import drawn_public, read_public
from vflair_flower.privacy.radial import radial_noise, remembered_noise
from vflair_flower.settings import TaskKind, one_of
from vflair_flower.tasks import padded_ids

_log = logging.getLogger(__name__)
_BATCH_ROWS = 16
_EMBEDDINGS, _SMASHED = "embeddings", "smashed"


@defence(
    "split-and-denoise",
    places=(Place.EMBEDDING, Place.SMASHED, Place.ANSWER),
    needs=Needs.PUBLIC_TEXTS,
    paper="Mai et al., Split-and-Denoise, ICML 2024, arXiv 2310.09130; the denoiser is trained by the party itself, "
    "not by the server, reads one place per token, not three, and cleans all of an answer, not one vector",
)
class SplitAndDenoise(Defence):
    """Add radial noise to each token, and clean the answers with a small network that knows the noise.

    What is guaranteed: at ``where=embeddings``, each token's embedding is eta-d_chi-private in one release: what is
    made of it by the head, and sent, is at most ``exp(eta * distance)`` times likelier under another token whose
    embedding is at that Euclidean distance.  All tokens are treated alike, special ones too.  A text of T tokens is
    protected by the sum of its tokens' distances, so for whole texts the bound is weak.  A text that is sent again gets
    the same noise again, so nothing is gained by waiting; who sees two texts begin alike learns that they do.  Tokens
    that are written through a cache get new noise, once.  Not covered: lengths, positions and returned gradients, and
    what the head's trained weights tell.

    At ``where=smashed`` noise is new at every release, and the bound is on the distance of two hidden states, which
    nothing limits, and which other tokens of the text move too: it says nothing of a token, and k releases add up to k
    times eta.

    The denoiser learns from texts that are nobody's secret, which are sent clean and noisy, with noise of its own, and
    are marked as public; the job's other defences are left out there.  It stays as it is while the model is trained on,
    unless it is `tuned`.  In a model that writes through a cache, it cleans each new token by itself.

    Parameters
    ----------
    scene : Scene
        See `Defence`.
    eta : float
        Above 0, in units of one over a length; the mean length of the noise is E / eta, or D / eta.  Small is private.
    where : {"embeddings", "smashed"}
        What the noise is added to: word embeddings, or hidden states at the cut.
    clip : bool
        Whether noisy embeddings that are longer than the longest embedding are shortened to its length.
    denoise : bool
        Whether answers are cleaned; without, no public texts are needed.
    public : str
        A file of texts that are nobody's secret, see `read_public`; without, tokens are drawn from the vocabulary,
        which trains a worse denoiser for texts than texts do.
    texts, tokens : int
        The most public texts, at least 32, and the most tokens of one, at least 4.
    draws : int
        Noisy answers to each public text, at least 1.
    epochs : int
        Of training, at least 1.
    width, blocks : int
        Of the denoiser; width is a multiple of 4.
    memory_mib : int
        The most memory for answers while it learns; texts are left out beyond.
    tuned : bool
        Whether the denoiser is trained on with the model.

    Raises
    ------
    ConfigurationError
        A setting is out of range, or the task reads images.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        eta: float = 100.0,
        where: str = _EMBEDDINGS,
        clip: bool = True,
        denoise: bool = True,
        public: str = "",
        texts: int = 512,
        tokens: int = 32,
        draws: int = 2,
        epochs: int = 20,
        width: int = 128,
        blocks: int = 2,
        memory_mib: int = 1024,
        tuned: bool = False,
    ) -> None:
        super().__init__(scene)
        if not 0 < eta < float("inf"):
            raise ConfigurationError(f"eta is {eta}; noise has a length of E / eta, so choose a number above 0.")
        one_of("where", where, (_EMBEDDINGS, _SMASHED))
        least = {
            "texts": 2 * _BATCH_ROWS,
            "tokens": 4,
            "draws": 1,
            "epochs": 1,
            "blocks": 1,
            "width": 4,
            "memory_mib": 1,
        }
        chosen = {
            **{"texts": texts, "tokens": tokens, "draws": draws, "epochs": epochs},
            **{"blocks": blocks, "width": width, "memory_mib": memory_mib},
        }
        for name, bound in least.items():
            if chosen[name] < bound:
                raise ConfigurationError(f"{name} is {chosen[name]}; choose {bound} or more.")
        if width % 4:
            raise ConfigurationError(f"width is {width}; the denoiser has 4 heads, so choose a multiple of 4.")
        if scene.task.kind is TaskKind.IMAGE_TEXT_TO_TEXT:
            raise ConfigurationError(
                "split-and-denoise adds noise to tokens, and this task has images, which would stay as they are. "
                "Choose a defence of smashed data."
            )
        self.eta, self.at_embeddings, self.clips, self.denoises = eta, where == _EMBEDDINGS, clip, denoise
        self.public, self.texts, self.tokens, self.draws, self.epochs = public, texts, tokens, draws, epochs
        self.memory_bytes = memory_mib * 2**20
        self.longest = float(scene.embedding_VD.float().norm(dim=-1).max())
        self.denoiser: Denoiser | None = None
        if denoise:
            self.denoiser = Denoiser(
                outputs=scene.outputs,
                vectors=scene.embedding_VD.shape[-1] if self.at_embeddings else scene.width,
                width=width,
                blocks=blocks,
                causal=scene.task.kind.writes,
            ).requires_grad_(tuned)
        self._added: tuple[Tensor, Tensor] | None = None

    @property
    def places(self) -> frozenset[Place]:
        """Embeddings or smashed data, and answers if they are cleaned."""
        sent = Place.EMBEDDING if self.at_embeddings else Place.SMASHED
        return frozenset({sent, Place.ANSWER} if self.denoises else {sent})

    @property
    def ready(self) -> bool:
        """Whether the denoiser was trained, if there is one."""
        return not self.denoises or bool(self.prepared)

    def embedding(self, embeds_BTD: Tensor, moment: Moment) -> Tensor:
        """Return noisy embeddings, [B, T, E]."""
        if not self.at_embeddings:
            return embeds_BTD
        noise = self.scene.noise
        if moment.first:
            noise_BTD = remembered_noise(
                embeds_BTD, moment.mask_BT, eta=self.eta, secret=self.scene.secret, noise=noise
            )
        else:  # what stood before is not known here
            noise_BTD = radial_noise(*embeds_BTD.shape, eta=self.eta, generator=noise.on(embeds_BTD.device))
        return self._noisy(embeds_BTD, noise_BTD)

    def smashed(self, hidden_BTD: Tensor, moment: Moment) -> Tensor:
        """Return noisy hidden states, [B, T, D], unless embeddings were noisy before."""
        if self.at_embeddings:
            return hidden_BTD
        generator = self.scene.noise.on(hidden_BTD.device)
        return self._noisy(hidden_BTD, radial_noise(*hidden_BTD.shape, eta=self.eta, generator=generator))

    def answer(self, answer: Tensor, moment: Moment) -> Tensor:
        """Return the answer, [B, O] or [B, K, O], with less of the noise."""
        added, self._added = self._added, None
        if self.denoiser is None or added is None:
            return answer
        mask_BT = moment.mask_BT.to(answer.device)
        cleaned: Tensor = self.denoiser(answer, *added, mask_BT, alone=not moment.first)
        return cleaned

    def prepare(self, preparation: Preparation) -> None:
        """Train the denoiser on public texts.

        Raises
        ------
        ConfigurationError
            The file of public texts is none.
        """
        if self.denoiser is not None:
            generator = self.scene.secret.generator("split-and-denoise", "public")
            lessons = self._lessons(preparation, generator)
            learns = [(one, one.requires_grad) for one in self.denoiser.parameters()]
            self.denoiser.requires_grad_()
            learnt = train_denoiser(self.denoiser, lessons, epochs=self.epochs, generator=generator)
            for one, before in learns:
                one.requires_grad_(before)
                one.grad = None
            _log.info(
                "%s: an answer's error is %.3g of its size, and %.3g cleaned (public texts that it was not trained on)",
                self.text,
                learnt.before / learnt.size,
                learnt.after / learnt.size,
            )
        super().prepare(preparation)

    def _noisy(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Return vectors with noise, shortened where that is asked for; remembers both."""
        noisy = clean + noise.to(clean.dtype)
        if self.at_embeddings and self.clips:
            noisy = noisy * (self.longest / noisy.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
        self._added = (clean.detach(), (noisy - clean).detach()) if self.denoises else None
        return noisy

    def _lessons(self, preparation: Preparation, generator: torch.Generator) -> list[Lesson]:
        """Have public texts answered, clean and noisy."""
        # Longer than the party's own are not needed, and a job may not let them be sent.
        tokens = min(self.tokens, max((len(one.input_ids) for one in preparation.encoded), default=self.tokens))
        table_VD = self.scene.embedding_VD
        wanted, fit = self.texts, self.memory_bytes // (4 * (self.draws + 1) * tokens * self.scene.outputs)
        count = max(2 * _BATCH_ROWS, min(wanted, fit))
        if count < wanted:
            _log.warning("%s learns from %d public texts, not %d: memory_mib allows no more", self.text, count, wanted)
        if self.public:
            rows = read_public(Path(self.public), self.scene.tokenizer, count=count, tokens=tokens)
        else:
            rows = drawn_public(
                self.scene.tokenizer, count=count, tokens=tokens, vocabulary=len(table_VD), generator=generator
            )
        if len(rows) <= _BATCH_ROWS:
            raise ConfigurationError(
                f"{self.public} has {len(rows)} public texts; a denoiser needs more than {_BATCH_ROWS}. Add some."
            )
        rows.sort(key=len)
        starts = range(0, len(rows), _BATCH_ROWS)
        return [self._lesson(rows[at : at + _BATCH_ROWS], preparation, generator) for at in starts]

    @torch.no_grad()
    def _lesson(self, rows: Sequence[Sequence[int]], preparation: Preparation, generator: torch.Generator) -> Lesson:
        device = self.scene.embedding_VD.device
        ids_BT, mask_BT = (one.to(device) for one in padded_ids(rows, pad_token_id=preparation.pad_token_id))

        def noisy(clean: Tensor) -> Tensor:
            return self._noisy(clean, radial_noise(*clean.shape, eta=self.eta, generator=generator).to(clean.device))

        hidden_BTD = preparation.head(ids_BT, mask_BT)
        answer = preparation.ask(hidden_BTD, mask_BT)
        pairs: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.draws):
            sent_BTD = preparation.head_changed(ids_BT, mask_BT, noisy) if self.at_embeddings else noisy(hidden_BTD)
            assert self._added is not None
            clean, added = self._added
            pairs.append((added, preparation.ask(sent_BTD, mask_BT)))
        self._added = None
        return Lesson(clean_BTE=clean, mask_BT=mask_BT, answer=answer, noisy=pairs)
