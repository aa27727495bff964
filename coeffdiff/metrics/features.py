"""Scores from features of pictures and texts: cosines, diversity, drift."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coeffdiff.errors import ShapeError


def mean_pairwise_cosine(features: Tensor, references: Tensor) -> float:
    """Mean of the cosines of all N * M pairs of unit-length features [N, D] and [M, D]: DINO's and CLIP's fidelity.

    Source: DreamBooth, section 4.
    """
    return float((features @ references.T).mean())


def mean_paired_cosine(features: Tensor, partners: Tensor) -> float:
    """Mean of the cosines of row and row, both [N, D]: CLIP-T with the pictures' own texts as partners.

    Raises: ShapeError if they are not as many.
    """
    if features.shape != partners.shape:
        raise ShapeError(f"{list(features.shape)} features cannot be paired with {list(partners.shape)}.")
    return float((features * partners).sum(dim=-1).mean())


def mean_cosine_among(features: Tensor) -> float:
    """Mean of the cosines of the N * (N - 1) / 2 distinct pairs of unit-length features [N, D].

    Of photos this is the row "real images" in DreamBooth's table: how near pictures of one subject are to each other.
    Raises: ShapeError for fewer than two.
    """
    count = len(features)
    if count < 2:
        raise ShapeError(f"Pairs need two pictures or more, not {count}.")
    cosines = features @ features.T
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def diversity(groups: Sequence[Tensor]) -> float | None:
    """1 - the mean cosine among the pictures of one prompt, averaged over prompts: 0 if all seeds look the same.

    DreamBooth's diversity is the mean LPIPS of such pairs (section 4.3). LPIPS needs one more network with weights of
    its own, so DINO's cosines take its place: the same pairs, another distance, not comparable in numbers.

    Args:
        groups: per prompt the DINO features [N, D] of its pictures, seed by seed.
    Returns: None if no prompt has two pictures.
    """
    spreads = [1.0 - mean_cosine_among(features) for features in groups if len(features) > 1]
    return sum(spreads) / len(spreads) if spreads else None


def drift(adapted: Tensor, base: Tensor) -> float:
    """1 - the mean cosine of the adapter's and the base model's pictures, [N, D] both, row by row.

    Row i of both is of the same prompt, seed and settings, and the prompts do not hold the token: every change is
    unwanted. 0 if the adapter changes nothing. Our own score; DINO features.
    Raises: ShapeError if they are not as many.
    """
    return 1.0 - mean_paired_cosine(adapted, base)
