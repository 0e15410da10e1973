"""Routers: from features to one coefficient a slot. Parameters stay fp32 whatever the model is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .format import FormatError, Router

SMALL = 0.01  # standard deviation of a fresh router's weights
SHARP = 100.0  # how fast a learning router's outputs fade below the k-th largest


class RouterModule(nn.Module):
    """One router's parameters, in the shapes that its description gives.

    linear: W h + b. mlp: W_2 relu(W_1 h + b_1) + b_2, on each token. constant: b. twin: two hidden
    layers of width 2d with batch norm, leaky ReLU and dropout. centroid: -|h - m_k|^2. projection:
    nothing of its own; layers score tokens by their codes' gates (scope module).
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        width, outputs, fp32 = router.inputs, router.outputs, torch.float32
        hidden = router.hidden or width
        if router.kind == "constant":
            self.bias = nn.Parameter(torch.empty(outputs, dtype=fp32))
        elif router.kind == "centroid":
            self.centroids = nn.Parameter(torch.empty(outputs, width, dtype=fp32))
        elif router.kind not in ("linear", "mlp", "twin", "projection"):
            raise FormatError(f"there is no router of kind '{router.kind}'")
        if router.kind in ("mlp", "twin"):
            self.first = nn.Linear(width, hidden, dtype=fp32)
        if router.kind == "twin":
            self.norm1 = nn.BatchNorm1d(hidden, dtype=fp32)
            self.second = nn.Linear(hidden, hidden, dtype=fp32)
            self.norm2 = nn.BatchNorm1d(hidden, dtype=fp32)
        if router.kind in ("linear", "mlp", "twin"):
            last = width if router.kind == "linear" else hidden
            self.last = nn.Linear(last, outputs, dtype=fp32)
        self.temperature = nn.Parameter(torch.empty((), dtype=fp32), requires_grad=False)

    def fresh(self) -> RouterModule:
        """Itself, set to what an untrained router says: every coefficient near `init`.

        Weights are N(0, 0.01^2) by the description's seed, biases 0, the last one `init`.
        """
        draw = torch.Generator().manual_seed(self.router.seed)
        with torch.no_grad():
            for name, value in self.named_parameters():
                if value.is_meta:
                    return self
                if value.dim() > 1:
                    value.normal_(0, SMALL, generator=draw)
                else:
                    value.fill_(float(name.startswith("norm") and name.endswith("weight")))
            if self.router.kind == "constant":
                self.bias.fill_(self.router.init)
            elif self.router.kind in ("linear", "mlp", "twin"):
                self.last.bias.fill_(self.router.init)
            self.temperature.fill_(1.0)
            for name, buffer in self.named_buffers():
                buffer.fill_(1 if name.endswith("running_var") else 0)
        return self

    def forward(self, tokens: Tensor, mask: Tensor | None = None, index: int = 0) -> Tensor:
        """The router's raw outputs for the valid tokens of each sample.

        Shapes: tokens [B,T,d], or features that are pooled [B,inputs], mask [B,T] or None ->
        [B,outputs].
        """
        h = tokens.to(self.temperature)
        if self.router.code:
            place = layer_code(index, self.router.code).to(h)
            h = torch.cat([place.expand(*h.shape[:-1], -1), h], -1)
        if self.router.kind == "constant":
            return self.bias.expand(len(h), -1)
        if self.router.kind == "mlp":  # the last map is linear: the mean may come before it
            pooled = pool(torch.relu(self.first(h)), mask)
        else:
            pooled = pool(h, mask, self.router.pool)
        if self.router.kind == "centroid":
            return -torch.cdist(pooled, self.centroids).square()
        if self.router.kind == "twin":
            leak, drop = nn.functional.leaky_relu, nn.functional.dropout
            pooled = drop(leak(self.norm1(self.first(pooled))), 0.5, self.training)
            pooled = drop(leak(self.norm2(self.second(pooled))), 0.5, self.training)
        raw: Tensor = self.last(pooled)
        return raw

    def coefficients(self, raw: Tensor) -> Tensor:
        """What mixes the slots: softmax at the temperature, top-k, hard choices.

        The k largest probabilities keep their share of their sum, the others get `rest`; from the
        largest `hard` on, it counts as 1. Without softmax the k largest outputs stay as they are,
        and while it learns the others fade, so that they learn too.
        """
        asked = self.router
        if asked.activation == "none":
            c = raw
        else:
            c = torch.softmax(raw / self.temperature, -1)
            if asked.hard < 1:
                best, place = c.max(-1, keepdim=True)
                sure = torch.zeros_like(c).scatter_(-1, place, 1.0)
                c = torch.where(best >= asked.hard, sure, c)
        if asked.activation == "none" and 0 < asked.top_k < c.shape[-1]:
            return c * self._chosen(c)
        return keep_top(c, asked.top_k, asked.rest) if asked.top_k else c

    def _chosen(self, c: Tensor) -> Tensor:
        """1 for the k largest and 0 for the others; in training 1 / (1 + exp(-100 (c - c_k)))."""
        value, place = c.topk(self.router.top_k, -1)
        if self.training:
            return torch.sigmoid(SHARP * (c - value[..., -1:].detach()))
        return torch.zeros_like(c).scatter(-1, place, 1.0)


def keep_top(c: Tensor, k: int, rest: float = 0.0) -> Tensor:
    """The k largest over their sum, the others `rest`: [...,S] -> [...,S]."""
    value, place = c.topk(min(k, c.shape[-1]), -1)
    return torch.full_like(c, rest).scatter(-1, place, value / value.sum(-1, keepdim=True))


def pool(tokens: Tensor, mask: Tensor | None, how: str = "mean") -> Tensor:
    """What is known of all valid tokens: [B,T,d] -> their mean [B,d], or their statistics [B,2d],
    the mean and the standard deviation side by side; what is [B,d] stays."""
    if tokens.dim() == 2:
        return tokens
    tokens = tokens.flatten(1, -2)
    weight = None if mask is None else mask.to(tokens.dtype).unsqueeze(-1)
    mean = _mean(tokens, weight)
    if how == "mean":
        return mean
    return torch.cat([mean, _mean((tokens - mean.unsqueeze(1)).square(), weight).sqrt()], 1)


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """[B,T,d], weight [B,T,1] or None -> [B,d]."""
    if weight is None:
        return values.mean(1)
    return (values * weight).sum(1) / weight.sum(1).clamp_min(1)


def layer_code(index: int, width: int) -> Tensor:
    """sin then cos of index / 10000^(2i/width), i < width/2: [width]."""
    steps = torch.arange(width // 2, dtype=torch.float32)
    angles = index / 10000 ** (2 * steps / width)
    return torch.cat([angles.sin(), angles.cos()])


def projections(tokens: Tensor, gate: Tensor, slots: int) -> Tensor:
    """The norm of each token's projection on the rows of each slot's gate.

    Shapes: tokens [...,d], gate [slots*k,d] -> [...,slots].
    """
    scores = nn.functional.linear(tokens.float(), gate.float())
    norms: Tensor = torch.linalg.vector_norm(scores.view(*scores.shape[:-1], slots, -1), dim=-1)
    return norms
