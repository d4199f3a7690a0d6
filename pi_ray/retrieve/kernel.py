"""Compiled loops of retrieval, which release the GIL: BLEU of pairs of texts, and the k best of a bank.

A product of precisions needs no logarithms: BLEU to the power of its order is factor(length) x matches, where the order
is four or, for texts with fewer tokens, their number. The root is taken only of scores that may be among the k best.
`bank` and `asked` are the NgramCounts of the bank and of the references. The bank's arrays are read-only, since
processes share them; everything else may be written to.
"""

import numpy as np
from numba import njit

from pi_ray.retrieve.ngrams import ORDER


@njit(nogil=True, cache=True)
def offer(ids, scores, filled, position, score):
    """Put (position, score) where it belongs in the descending `scores`, equals by position; return their number."""
    k = len(scores)
    if filled == k and (score < scores[k - 1] or (score == scores[k - 1] and position > ids[k - 1])):
        return filled
    at = min(filled, k - 1)
    while at > 0 and (scores[at - 1] < score or (scores[at - 1] == score and ids[at - 1] > position)):
        scores[at], ids[at] = scores[at - 1], ids[at - 1]
        at -= 1
    scores[at], ids[at] = score, position
    return min(filled + 1, k)


@njit(nogil=True, cache=True)
def top_of_scores(found, positions, groups, q_groups, ids, scores):
    """As `bleu_top`, of bank texts positions[i] (-1: none) with scores found[i]."""
    for i in range(len(found)):
        filled = 0
        for c in range(found.shape[1]):
            j = positions[i, c]
            if j >= 0 and groups[j] != q_groups[i]:
                filled = offer(ids[i], scores[i], filled, j, found[i, c])


@njit(nogil=True, cache=True)
def factors(longest, reference):
    """Brevity penalty ** order / the product of the numbers of n-grams, for hypotheses of 0 to `longest` tokens."""
    found = np.zeros(longest + 1)
    for length in range(1, longest + 1):
        order = min(length, ORDER)
        found[length] = np.exp(order * min(0.0, 1.0 - reference / length))
        for n in range(order):
            found[length] /= length - n
    return found


@njit(nogil=True, cache=True)
def power(m1, m2, m3, m4, length, factor):
    """(BLEU / 100) ** order, 0 without a matching word. The i-th order without a match counts as 1/2^i of one."""
    if m1 == 0:
        return 0.0
    smooth, value, higher = 1.0, m1 * factor, (m2, m3, m4)
    for n in range(min(length, ORDER) - 1):
        smooth *= 1.0 if higher[n] else 0.5
        value *= higher[n] if higher[n] else smooth
    return value


@njit(nogil=True, cache=True)
def matched(bound, held, begin, end, bank):
    """Clipped matches of bank.ids[begin:end] below `bound` with `held`, the reference's counts; and the next begin."""
    matches, ids, times = 0, bank.ids, bank.times
    while begin < end and ids[begin] < bound:
        matches += min(held[ids[begin]], times[begin])
        begin += 1
    return matches, begin


@njit(nogil=True, cache=True)
def offer_power(ids, scores, filled, least, position, value, order):
    """Offer a text whose (BLEU / 100) ** order is `value`; returns how many are filled.

    Then least[n] = (k-th best score / 100) ** n, less a little for rounding, so that equal scores are still looked at.
    """
    filled = offer(ids, scores, filled, position, 100.0 * value ** (1.0 / order))
    if filled == len(scores):
        for n in range(1, ORDER + 1):
            least[n] = (scores[-1] / 100.0) ** n * (1.0 - 1e-12) if scores[-1] else -1.0
    return filled


@njit(nogil=True, cache=True)
def vectors(places, asked, out):
    """Set out[i], zeros, to the unit vector of the summed signs of text i's n-grams in their BleuIndex.places."""
    for i in range(len(asked.lengths)):
        for e in range(asked.indptr[i], asked.indptr[i + 1]):
            place = places[asked.ids[e]]
            if place >= 0:
                out[i, place >> 1] += asked.times[e] if place & 1 else -asked.times[e]
        size = np.sqrt(np.sum(out[i] * out[i]))
        if size:
            out[i] /= size
        else:
            out[i, 0] = 1.0  # a text that shares no n-gram needs a direction too


@njit(nogil=True, cache=True)
def bleu_of_pairs(bounds, bank, asked, candidates, out):
    """out[i, c] = BLEU of bank text candidates[i, c] against reference i, by merging their ascending n-grams."""
    longest = bank.lengths.max() if len(bank.lengths) else 0
    for i in range(len(asked.lengths)):
        factor = factors(longest, asked.lengths[i])
        for c in range(candidates.shape[1]):
            j = candidates[i, c]
            matches = np.zeros(ORDER, np.int64)
            a, b, n = asked.indptr[i], bank.indptr[j], 0
            while a < asked.indptr[i + 1] and b < bank.indptr[j + 1]:
                if asked.ids[a] < bank.ids[b]:
                    a += 1
                elif asked.ids[a] > bank.ids[b]:
                    b += 1
                else:
                    while bank.ids[b] >= bounds[n + 1]:
                        n += 1
                    matches[n] += min(asked.times[a], bank.times[b])
                    a += 1
                    b += 1
            length = bank.lengths[j]
            value = power(matches[0], matches[1], matches[2], matches[3], length, factor[length])
            out[i, c] = 100.0 * value ** (1.0 / min(max(length, 1), ORDER))


@njit(nogil=True, cache=True)
def bleu_top(bounds, holding, lengths, groups, asked, q_groups, ids, scores):
    """Write the best bank texts outside each reference's own group into `ids` (-1: no more) and `scores`, (q, k).

    `holding` are (indptr, rows, times), the bank's texts that hold each n-gram.
    """
    indptr, rows, times = holding
    matches, longest = np.zeros((ORDER, len(lengths)), np.int32), lengths.max()
    least = np.empty(ORDER + 1)
    for i in range(len(asked.lengths)):
        matches[:] = 0
        n = 0
        for e in range(asked.indptr[i], asked.indptr[i + 1]):
            gram, most = asked.ids[e], asked.times[e]
            while gram >= bounds[n + 1]:
                n += 1
            count = matches[n]
            if most == 1:
                for p in range(indptr[gram], indptr[gram + 1]):
                    count[rows[p]] += 1
            else:
                for p in range(indptr[gram], indptr[gram + 1]):
                    count[rows[p]] += min(most, times[p])
        factor, filled = factors(longest, asked.lengths[i]), 0
        least[:] = -1.0
        m1, m2, m3, m4 = matches[0], matches[1], matches[2], matches[3]
        for j in range(len(lengths)):
            length = lengths[j]
            value = power(m1[j], m2[j], m3[j], m4[j], length, factor[length])
            order = min(max(length, 1), ORDER)
            if value > least[order] and groups[j] != q_groups[i]:
                filled = offer_power(ids[i], scores[i], filled, least, j, value, order)


@njit(nogil=True, cache=True)
def bleu_top_among(bounds, bank, groups, asked, q_groups, among, ids, scores):
    """As `bleu_top`, among the bank texts among[i] alone (-1: none).

    No order has more matches than the order below it, since each of its n-grams begins with an n-gram of that order. So
    most texts are ruled out when their words are counted, or their pairs; all the sooner when good texts come first.
    """
    longest, held, least = bank.lengths.max(), np.zeros(bounds[ORDER], np.int32), np.empty(ORDER + 1)
    for i in range(len(asked.lengths)):
        for e in range(asked.indptr[i], asked.indptr[i + 1]):
            held[asked.ids[e]] = asked.times[e]
        factor, filled = factors(longest, asked.lengths[i]), 0
        least[:] = -1.0
        for j in among[i]:
            if j < 0 or groups[j] == q_groups[i]:
                continue
            length, at, end = bank.lengths[j], bank.indptr[j], bank.indptr[j + 1]
            order, weight = min(max(length, 1), ORDER), factor[length]
            m1, at = matched(bounds[1], held, at, end, bank)
            if power(m1, min(m1, length - 1), min(m1, length - 2), min(m1, length - 3), length, weight) <= least[order]:
                continue
            m2, at = matched(bounds[2], held, at, end, bank)
            if power(m1, m2, min(m2, length - 2), min(m2, length - 3), length, weight) <= least[order]:
                continue
            m3, at = matched(bounds[3], held, at, end, bank)
            m4, at = matched(bounds[4], held, at, end, bank)
            value = power(m1, m2, m3, m4, length, weight)
            if value > least[order]:
                filled = offer_power(ids[i], scores[i], filled, least, j, value, order)
        for e in range(asked.indptr[i], asked.indptr[i + 1]):
            held[asked.ids[e]] = 0
