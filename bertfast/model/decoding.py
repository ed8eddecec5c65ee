"""Greedy and beam search with a cache: what transformers' `generate` gives, for less.

A step costs what is still undecided: sequences that have ended leave the batch. The sources' keys
and values are made once, and all beams of a source read them where they are.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch

from .steps import Steps

if TYPE_CHECKING:
    from .steps_cpu import CpuSteps

_FEWER = 0.85  # rows move together once at most this share of them goes on
_NEVER = -1e9  # a score that is below any sequence's


class Generated(NamedTuple):
    """Sequences as `generate` of transformers has them, and what they scored."""

    sequences: torch.Tensor  # int64 [batch, 1 + longest]: the start, tokens, padding behind the end
    # fp32 [batch]: the sum of the tokens' log-probabilities over (their number, end included) **
    # length_penalty; None of greedy search, where it wasn't asked for
    scores: torch.Tensor | None

    def tokens(self, ends: Collection[int]) -> list[list[int]]:
        """Of each sequence, without its start, its end and padding."""
        found = []
        for row in self.sequences[:, 1:].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            found.append(row[:end])
        return found


class Rules(NamedTuple):
    """When a sequence starts and ends."""

    start: int
    ends: tuple[int, ...]
    pad: int
    most: int  # tokens to make, the end included
    least: int  # before which there is no end


class Search(NamedTuple):
    """Of beams; see transformers' `GenerationConfig`, whose names these are."""

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False


@torch.inference_mode()
def greedy(
    steps: "Steps | CpuSteps", rules: Rules, scored: bool = False, length_penalty: float = 1.0
) -> Generated:
    """The likeliest token each time."""
    count, device = steps.count, steps.device
    found = torch.full((count, 1 + rules.most), rules.pad, device=device)
    found[:, 0] = rules.start
    total, length = torch.zeros(count, device=device), torch.zeros(count, device=device)
    ends = torch.tensor(rules.ends, dtype=torch.int64, device=device)
    where, ids = torch.arange(count, device=device), found[:, 0]  # where: which sequence a row is
    going = torch.ones_like(ids, dtype=torch.bool)
    longest = 0
    for i in range(rules.most if count else 0):
        if scored or i < rules.least:
            logits = steps(ids).float()
            if i < rules.least:
                logits[:, ends] = -torch.inf
            ids = logits.argmax(1)
        else:
            ids = steps.best(ids)
        real = where[going]
        found[real, i + 1] = ids[going]
        if scored:
            log_p = logits.log_softmax(1).gather(1, ids.unsqueeze(1)).squeeze(1)
            total[real] += log_p[going]
            length[real] += 1
        longest, going = i + 1, going & ~torch.isin(ids, ends)
        left = int(going.sum())
        if not left:
            break
        if left <= _FEWER * len(going):
            rows = going.nonzero().squeeze(1)
            steps.select(rows, rows)
            where, ids, going = where[rows], ids[rows], going[rows]
    scores = total / length.clamp(min=1) ** length_penalty if scored else None
    return Generated(found[:, : 1 + longest], scores)


class _Beams(NamedTuple):
    """The beams of the sources that aren't decided, best first."""

    tokens: torch.Tensor  # int64 [sources, beams, 1 + most]
    scores: torch.Tensor  # fp32 [sources, beams]
    lengths: torch.Tensor | None = None  # int64 [sources, beams] of finished ones; 0: there is none

    def at(self, places):
        """places int64 [sources, n]: the chosen of each source."""
        return _Beams(*(t if t is None else _chosen(t, places) for t in self))

    def merged(self, others: "_Beams"):
        """The best of both, as many as there are."""
        both = _Beams(*(torch.cat(pair, 1) for pair in zip(self, others, strict=True)))
        return both.at(both.scores.topk(self.scores.shape[1])[1])

    def of(self, sources):
        """Those of some sources, int64 [n]."""
        return _Beams(*(t if t is None else t[sources] for t in self))


def _chosen(t, places):
    places = places.view(*places.shape, *[1] * (t.dim() - 2))
    return torch.take_along_dim(t, places, 1)


@torch.inference_mode()
def beam(steps: "Steps | CpuSteps", rules: Rules, search: Search) -> Generated:
    """The best of `num_beams` sequences that are followed side by side.

    A source is decided when its finished sequences can't be beaten any more, as transformers
    estimates it: with early_stopping=True as soon as there are `num_beams`; with False when the
    best beam, as long as now, scores less than the worst of them; with "never" the best beam as
    long as it may become, where length_penalty > 0.
    """
    k, count, device = search.num_beams, steps.count, steps.device
    best = torch.full((count, 1 + rules.most), rules.pad, device=device)
    score = torch.full((count,), _NEVER, device=device)
    tokens = torch.full((count, k, 1 + rules.most), rules.pad, device=device)
    tokens[:, :, 0] = rules.start
    none = torch.full((count, k), _NEVER, device=device)
    running = _Beams(tokens, none.index_fill(1, none.new_zeros(1, dtype=torch.int64), 0))
    finished = _Beams(tokens.clone(), none, torch.zeros_like(none, dtype=torch.int64))
    ends = torch.tensor(rules.ends, dtype=torch.int64, device=device)
    where, kept = torch.arange(count, device=device), max(2, 1 + len(rules.ends)) * k
    longest = 0
    for i in range(rules.most if count else 0):
        log_p = steps(running.tokens[:, :, i].flatten()).float().log_softmax(1)
        if i < rules.least:
            log_p[:, ends] = -torch.inf
        words = log_p.shape[1]
        log_p = (log_p.view(len(where), k, words) + running.scores.unsqueeze(2)).flatten(1)
        scores, places = log_p.topk(kept)
        parents, last = places // words, places % words
        tokens = _chosen(running.tokens, parents)
        tokens[:, :, i + 1] = last
        over = torch.isin(last, ends) | (i + 1 == rules.most)
        going, places = (scores + over * _NEVER).topk(k)
        running = _Beams(_chosen(tokens, places), going)
        # Only of the first k: the others stand in for those that end.
        done = over & (torch.arange(kept, device=device) < k)
        scores = scores / (i + 1) ** search.length_penalty + ~done * _NEVER
        finished = finished.merged(_Beams(tokens, scores, done * (i + 1)))
        settled = _settled(running, finished, search, i + 1, rules.most)
        if i + 1 == rules.most:
            settled[:] = True
        out = settled.nonzero().squeeze(1)
        if len(out):
            best[where[out]], score[where[out]] = finished.tokens[out, 0], finished.scores[out, 0]
            longest = max(longest, int(finished.lengths[out, 0].max()))
        parents = torch.take_along_dim(parents, places, 1)
        rows = torch.arange(len(where), device=device).unsqueeze(1) * k + parents
        keep = None
        if len(out):
            keep = (~settled).nonzero().squeeze(1)
            if not len(keep):
                break
            where, rows = where[keep], rows[keep]
            running, finished = running.of(keep), finished.of(keep)
        steps.select(rows.flatten(), keep)
    return Generated(best[:, : 1 + longest], score)


def _settled(running: _Beams, finished: _Beams, search: Search, length: int, most: int):
    """bool [sources]: of which nothing better is expected."""
    full = (finished.lengths > 0).all(1)
    if search.early_stopping is True:
        return full
    hoped = most if search.early_stopping == "never" and search.length_penalty > 0 else length
    possible = running.scores[:, 0] / hoped**search.length_penalty
    return full & (possible <= finished.scores[:, -1])
