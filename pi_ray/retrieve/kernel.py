"""Compiled loops of retrieval: pairs of texts are scored, and the k best kept. They release the GIL, so threads run
side by side.

A product of precisions needs no logarithms: BLEU to the power of its order is factor(length) x matches, where the order
is four or, for texts with fewer tokens, their number. The root is taken only of scores that may be among the k best.
The bank's arrays are read-only, since processes share them; everything else may be written to.
"""

from __future__ import annotations

import numpy as np
from numba import njit

ORDER = 4


@njit(nogil=True, cache=True)
def offer(ids, scores, filled, position, score):
    """Put (position, score) into the descending `scores` if it belongs there; among equal scores the lower position
    comes first.

    Returns how many are filled.
    """
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
    """(BLEU / 100) ** order. The i-th order without a match counts as 1/2^i of one; without a matching word BLEU is 0.
    """
    if m1 == 0:
        return 0.0
    smooth, value = 1.0, m1 * factor
    if length > 1:
        if m2 == 0:
            smooth *= 0.5
        value *= m2 if m2 else smooth
    if length > 2:
        if m3 == 0:
            smooth *= 0.5
        value *= m3 if m3 else smooth
    if length > 3:
        if m4 == 0:
            smooth *= 0.5
        value *= m4 if m4 else smooth
    return value


@njit(nogil=True, cache=True)
def matched(bound, held, begin, end, ids, times):
    """Clipped matches of the ascending n-grams ids[begin:end] below `bound` with `held`, and where the next order
    begins.

    `held` has the times of each n-gram in the reference.
    """
    matches = 0
    while begin < end and ids[begin] < bound:
        matches += min(held[ids[begin]], times[begin])
        begin += 1
    return matches, begin


@njit(nogil=True, cache=True)
def raise_least(least, score):
    """least[order] = (score / 100) ** order, less a little for rounding, so that equal scores are still looked at."""
    for order in range(1, ORDER + 1):
        least[order] = (score / 100.0) ** order * (1.0 - 1e-12) if score else -1.0


@njit(nogil=True, cache=True)
def vectors(places, indptr, ids, times, out):
    """Set out[i], zeros, to the unit vector of the summed signs of text i's n-grams in their places (BleuIndex.places).
    """
    for i in range(len(indptr) - 1):
        for e in range(indptr[i], indptr[i + 1]):
            place = places[ids[e]]
            if place >= 0:
                out[i, place >> 1] += times[e] if place & 1 else -times[e]
        size = np.sqrt(np.sum(out[i] * out[i]))
        if size:
            out[i] /= size
        else:
            out[i, 0] = 1.0  # a text that shares no n-gram needs a direction too


@njit(nogil=True, cache=True)
def bleu_of_pairs(bounds, indptr, ids, times, lengths, q_indptr, q_ids, q_times, q_lengths, candidates, out):
    """out[i, c] = BLEU of bank text candidates[i, c] against reference i, by merging their ascending n-grams."""
    longest = lengths.max() if len(lengths) else 0
    for i in range(len(q_lengths)):
        factor = factors(longest, q_lengths[i])
        for c in range(candidates.shape[1]):
            j = candidates[i, c]
            matches = np.zeros(ORDER, np.int64)
            a, b, n = q_indptr[i], indptr[j], 0
            while a < q_indptr[i + 1] and b < indptr[j + 1]:
                if q_ids[a] < ids[b]:
                    a += 1
                elif q_ids[a] > ids[b]:
                    b += 1
                else:
                    while ids[b] >= bounds[n + 1]:
                        n += 1
                    matches[n] += min(q_times[a], times[b])
                    a += 1
                    b += 1
            value = power(matches[0], matches[1], matches[2], matches[3], lengths[j], factor[lengths[j]])
            out[i, c] = 100.0 * value ** (1.0 / min(max(lengths[j], 1), ORDER))


@njit(nogil=True, cache=True)
def bleu_top(
    bounds, indptr, rows, times, lengths, groups, q_indptr, q_ids, q_times, q_lengths, q_groups, ids, scores,
):
    """Write the best bank texts of each reference into `ids` and `scores` (q, k); ids stay -1 where the bank has no
    more.

    (indptr, rows, times) are the bank's texts that hold each n-gram. Texts of the reference's own group are left out.
    """
    k, matches, longest = ids.shape[1], np.zeros((ORDER, len(lengths)), np.int32), lengths.max()
    least = np.empty(ORDER + 1)  # (k-th best score / 100) ** order
    for i in range(len(q_lengths)):
        matches[:] = 0
        n = 0
        for e in range(q_indptr[i], q_indptr[i + 1]):
            gram, most = q_ids[e], q_times[e]
            while gram >= bounds[n + 1]:
                n += 1
            count = matches[n]
            if most == 1:
                for p in range(indptr[gram], indptr[gram + 1]):
                    count[rows[p]] += 1
            else:
                for p in range(indptr[gram], indptr[gram + 1]):
                    count[rows[p]] += min(most, times[p])
        factor, filled = factors(longest, q_lengths[i]), 0
        least[:] = -1.0
        m1, m2, m3, m4 = matches[0], matches[1], matches[2], matches[3]
        for j in range(len(lengths)):
            length = lengths[j]
            value = power(m1[j], m2[j], m3[j], m4[j], length, factor[length])
            order = min(max(length, 1), ORDER)
            if value > least[order] and groups[j] != q_groups[i]:
                filled = offer(ids[i], scores[i], filled, j, 100.0 * value ** (1.0 / order))
                if filled == k:
                    raise_least(least, scores[i, k - 1])


@njit(nogil=True, cache=True)
def bleu_top_among(
    bounds, indptr, bank_ids, bank_times, lengths, groups, q_indptr, q_ids, q_times, q_lengths, q_groups, among,
    ids, scores,
):
    """As `bleu_top`, among the bank texts among[i] alone (-1: none). (indptr, bank_ids, bank_times) are their n-grams.

    No order has more matches than the order below it, since each of its n-grams begins with an n-gram of that order. So
    most texts are ruled out when their words are counted, or their pairs; all the sooner when good texts come first.
    """
    k, longest, held = ids.shape[1], lengths.max(), np.zeros(bounds[ORDER], np.int32)
    least = np.empty(ORDER + 1)
    for i in range(len(q_lengths)):
        for e in range(q_indptr[i], q_indptr[i + 1]):
            held[q_ids[e]] = q_times[e]
        factor, filled = factors(longest, q_lengths[i]), 0
        least[:] = -1.0
        for j in among[i]:
            if j < 0 or groups[j] == q_groups[i]:
                continue
            length, at, end = lengths[j], indptr[j], indptr[j + 1]
            order, weight = min(max(length, 1), ORDER), factor[length]
            m1, at = matched(bounds[1], held, at, end, bank_ids, bank_times)
            if power(m1, min(m1, length - 1), min(m1, length - 2), min(m1, length - 3), length, weight) <= least[order]:
                continue
            m2, at = matched(bounds[2], held, at, end, bank_ids, bank_times)
            if power(m1, m2, min(m2, length - 2), min(m2, length - 3), length, weight) <= least[order]:
                continue
            m3, at = matched(bounds[3], held, at, end, bank_ids, bank_times)
            m4, at = matched(bounds[4], held, at, end, bank_ids, bank_times)
            value = power(m1, m2, m3, m4, length, weight)
            if value > least[order]:
                filled = offer(ids[i], scores[i], filled, j, 100.0 * value ** (1.0 / order))
                if filled == k:
                    raise_least(least, scores[i, k - 1])
        for e in range(q_indptr[i], q_indptr[i + 1]):
            held[q_ids[e]] = 0


@njit(nogil=True, cache=True)
def mark(masks, words, begin, end):
    """Set the bits of the reference's words: bit b of masks[w, v] says that word 64 v + b of the reference is w."""
    for p in range(begin, end):
        if words[p] >= 0:
            masks[words[p], (p - begin) >> 6] |= np.uint64(1) << np.uint64((p - begin) & 63)


@njit(nogil=True, cache=True)
def unmark(masks, words, begin, end):
    """Clear the bits that `mark` set."""
    for p in range(begin, end):
        if words[p] >= 0:
            masks[words[p], (p - begin) >> 6] = np.uint64(0)


@njit(nogil=True, cache=True)
def common(masks, size, row, words, begin, end):
    """Length of the longest common subsequence of words[begin:end] and the marked reference of `size` words.

    `row` is scratch space for its bits.
    """
    used = (size + 63) >> 6
    for v in range(used):
        row[v] = ~np.uint64(0)
    for p in range(begin, end):
        carry = np.uint64(0)
        for v in range(used):
            same = row[v] & masks[words[p], v]
            half = row[v] + same
            total = half + carry
            carry = np.uint64(1) if half < same or total < half else np.uint64(0)
            row[v] = total | (row[v] - same)
    length = 0
    for b in range(size):
        if not (row[b >> 6] >> np.uint64(b & 63)) & np.uint64(1):
            length += 1
    return length


@njit(nogil=True, cache=True)
def widest(ends):
    """How many 64-bit masks the longest of these texts takes, at least one."""
    most = 64
    for i in range(len(ends) - 1):
        most = max(most, ends[i + 1] - ends[i])
    return (most + 63) >> 6


@njit(nogil=True, cache=True)
def rouge(masks, size, row, words, begin, end):
    """ROUGE-L of words[begin:end] and the marked reference."""
    if size == 0 or end == begin:
        return 0.0
    return 200.0 * common(masks, size, row, words, begin, end) / (size + end - begin)


@njit(nogil=True, cache=True)
def rouge_of_pairs(vocabulary, words, ends, q_words, q_ends, candidates, out):
    """out[i, c] = ROUGE-L of bank text candidates[i, c] and reference i."""
    width = widest(q_ends)
    masks, row = np.zeros((vocabulary, width), np.uint64), np.zeros(width, np.uint64)
    for i in range(len(q_ends) - 1):
        size = q_ends[i + 1] - q_ends[i]
        mark(masks, q_words, q_ends[i], q_ends[i + 1])
        for c in range(candidates.shape[1]):
            j = candidates[i, c]
            out[i, c] = rouge(masks, size, row, words, ends[j], ends[j + 1])
        unmark(masks, q_words, q_ends[i], q_ends[i + 1])


@njit(nogil=True, cache=True)
def rouge_top(vocabulary, words, ends, groups, q_words, q_ends, q_groups, among, ids, scores):
    """As `bleu_top`; among the bank texts among[i] alone, where `among` has columns."""
    width = widest(q_ends)
    masks, row = np.zeros((vocabulary, width), np.uint64), np.zeros(width, np.uint64)
    for i in range(len(q_ends) - 1):
        size, filled = q_ends[i + 1] - q_ends[i], 0
        mark(masks, q_words, q_ends[i], q_ends[i + 1])
        for j in np.sort(among[i]) if among.shape[1] else np.arange(len(groups)):
            if j >= 0 and groups[j] != q_groups[i]:
                filled = offer(ids[i], scores[i], filled, j, rouge(masks, size, row, words, ends[j], ends[j + 1]))
        unmark(masks, q_words, q_ends[i], q_ends[i + 1])
