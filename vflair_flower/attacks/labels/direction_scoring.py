"""Direction scoring: rows of one class have gradients that point the same way, those of another class another way.

B rows, T tokens, D hidden, C classes, K clusters.  A row's direction is that of its gradient, summed over its tokens.
Directions tell which rows share a class, not which class it is: for that the adversary needs labelled rows of its own.
A tail that is completed on them (`model_completion`) then votes on what to call each cluster.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from vflair_flower.attacks.guesses import LabelGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.labels.model_completion import model_completion
from vflair_flower.attacks.labels.seen import CLASSIFIES, row_gradients
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.attacks.view import SplitView
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import Mode
from vflair_flower.tasks import EncodedRow


@attack(
    "direction-scoring",
    goal=Goal.LABELS,
    sees=SplitView,
    paper="Li et al., ICLR 2022, arXiv 2102.08504 (two classes, and a row of the rarer one given: here "
    "clusters are found, and the smaller is the rarer); many classes and their names are our own",
    during=Phase.TRAINING,
    kinds=CLASSIFIES,
)
def direction_scoring(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    auxiliary_rows: int = 0,
    epochs: int = 30,
    clusters: int = 0,
    restarts: int = 10,
) -> LabelGuess:
    """Cluster the directions of the rows' gradients.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    auxiliary_rows : int
        How many labelled rows of the adversary's own give the clusters their names (Head-Body-Tail); with 0 there are
        scores alone, and these of two classes: larger nearer to the smaller cluster.
    epochs : int
        For which a tail is trained on them.
    clusters : int
        How many, where fewer classes occur than there are; 0 is one for each class.
    restarts : int
        Of k-means.
    """
    directions_ND = normalize(torch.stack([grad.sum(0) for grad in row_gradients(view)]).double(), dim=-1)
    classes = max(2, len(view.task.label_names))
    if not 0 <= clusters <= classes:
        raise ConfigurationError(
            f"direction-scoring is to find {clusters} clusters, and the task has {classes} classes; ask for 2 or more, "
            "and for no more clusters than classes, or for 0."
        )
    count = min(clusters or classes, len(torch.unique(directions_ND, dim=0)))
    found = KMeans(n_clusters=count, n_init=restarts, random_state=seed).fit(directions_ND.numpy())
    cluster_N = torch.as_tensor(found.labels_, dtype=torch.int64)
    centres_KD = normalize(torch.as_tensor(found.cluster_centers_), dim=-1)
    named = auxiliary_rows > 0 and view.plan.mode is Mode.HBT
    named = named and any(isinstance(row, EncodedRow) for row in knows.auxiliary)
    if not named:
        return LabelGuess(scores=_scores(directions_ND, cluster_N, centres_KD))
    voted = model_completion(view, knows, seed=seed, auxiliary_rows=auxiliary_rows, epochs=epochs)
    assert isinstance(voted, LabelGuess)
    assert voted.labels is not None
    names_K = _names(cluster_N, voted.labels, count, classes)
    scores = None
    if count == classes == 2:
        scores = directions_ND @ (centres_KD[names_K.argmax()] - centres_KD[names_K.argmin()])
    return LabelGuess(labels=names_K[cluster_N], scores=scores)


def _scores(directions_ND: Tensor, cluster_N: Tensor, centres_KD: Tensor) -> Tensor:
    """Return how much nearer each direction is to the smallest cluster's centre than to all others' mean."""
    smallest = int(torch.bincount(cluster_N, minlength=len(centres_KD)).argmin())
    others_KD = torch.cat([centres_KD[:smallest], centres_KD[smallest + 1 :]])
    away_D = others_KD.mean(0) if len(others_KD) else torch.zeros_like(centres_KD[0])
    return directions_ND @ (centres_KD[smallest] - away_D)


def _names(cluster_N: Tensor, voted_N: Tensor, clusters: int, classes: int) -> Tensor:
    """Return a class for each cluster, each class at most once, such that most votes are kept."""
    votes_KC = np.zeros((clusters, classes))
    np.add.at(votes_KC, (cluster_N.numpy(), voted_N.numpy()), 1)
    _, named = linear_sum_assignment(votes_KC, maximize=True)
    return torch.as_tensor(named, dtype=torch.int64)
