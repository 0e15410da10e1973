"""What routers minimise, each a loss per sample; all in fp32 whatever the model is."""

from __future__ import annotations

from math import exp, log, sqrt

from mowmerge.tensors import Tensor, torch

GOLDEN = (sqrt(5) - 1) / 2
SECTIONS = 50  # each leaves 0.618 of the interval


def entropy(logits: Tensor) -> Tensor:
    """H(softmax z) = logsumexp(z) - sum p z, in nats: [B,C] -> [B]. arXiv:2402.00433."""
    z = logits.float()
    return torch.logsumexp(z, -1) - (torch.softmax(z, -1) * z).sum(-1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(softmax t || softmax s) in nats: [...,C] -> [...]."""
    p, q = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def next_token(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """The mean of -log p(token) over the counted tokens of each text.

    Shapes: logits [B,T,V], ids [B,T], counted bool [B,T] -> [B].
    """
    flat = logits[:, :-1].float().transpose(1, 2)
    each = torch.nn.functional.cross_entropy(flat, ids[:, 1:], reduction="none")
    return mean_over(each, counted[:, 1:])


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """Each row's mean over what is counted: [B,T] -> [B]; 0 where nothing is."""
    weight = counted.to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp_min(1)


def prompt(mask: Tensor) -> Tensor:
    """The first half of each text's tokens, at least one: what routers may see, as they see a
    prompt. The other half is what is to be said: [B,T] -> bool [B,T]."""
    place = mask.cumsum(1)
    return (place <= (place[:, -1:] + 1) // 2) & mask.bool()


def temperature(raw: Tensor, labels: Tensor) -> float:
    """The T that minimises the NLL of softmax(raw / T), by golden section over log T.

    Labels are smoothed by 1 / (n + 2) (after Platt), so that T > 0 also where all are right.

    Shapes: raw [n,K], labels [n].
    """
    raw, smoothing = raw.double(), 1 / (len(labels) + 2)

    def loss(log_t: float) -> float:
        scaled = raw / exp(log_t)
        found = torch.nn.functional.cross_entropy(scaled, labels, label_smoothing=smoothing)
        return float(found)

    middle = log(float(raw.std()) or 1.0)
    low, high = middle - 6, middle + 6
    for _ in range(SECTIONS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return exp((low + high) / 2)
