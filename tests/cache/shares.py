"""How a budget is shared out among heads, by definition, on lists of Python objects."""

import math


def best(candidates, count):
    """The ``count`` best of ``{place: score}``; among equals the earlier place. Minus infinity is no candidate."""
    ranked = sorted((place for place in candidates if candidates[place] > -math.inf), key=lambda p: -candidates[p])
    return ranked[:count]


def naive_shares(scores, budget, allocation, most=None):
    """What each head of one row keeps.

    Args:
        scores: for each layer, for each head, its candidates' scores.
        budget: mean number of entries per head.
        allocation: "global", "layer" or "uniform".
        most: no head keeps more; None if there is no such bound.

    Returns:
        For each layer, for each head, the sorted places of what it keeps.
    """
    if allocation == "layer":
        return [naive_shares([layer], budget, "global", most)[0] for layer in scores]
    kept = [[[] for _ in layer] for layer in scores]
    if allocation == "uniform":
        for heads, layer in zip(kept, scores, strict=True):
            heads[:] = [sorted(best(dict(enumerate(head)), budget)) for head in layer]
        return kept
    everything, slots = {}, budget * sum(map(len, scores))
    for index, layer in enumerate(scores):
        for head, row in enumerate(layer):
            candidates = dict(enumerate(row))
            ranked = best(candidates, len(row) if most is None else most)
            # Each head keeps a fifth of the mean for itself, and one entry at least.
            own = ranked[: max(1, round(0.2 * budget))]
            kept[index][head] += own
            slots -= len(own)
            for place in sorted(ranked[len(own) :]):
                everything[index, head, place] = candidates[place]
    for index, head, place in best(everything, slots):
        kept[index][head].append(place)
    return [[sorted(head) for head in layer] for layer in kept]
