"""A small GPT in NumPy: pure functions of a tree of parameters, backward pass by hand.

Shapes are named by B sequences, T positions (T <= `Config.context`), C = `Config.width`,
H heads of D = C / H elements, V = `Config.vocab` and N = B * T. Everything between the embedding
and the logits is a matrix of shape (N, C), so that each linear layer is one product. All
arithmetic runs in the dtype of the parameters: float32 to train, float64 to check gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = NDArray[Any]
Params: TypeAlias = dict[str, Any]
Cache: TypeAlias = tuple[Any, ...]

NORM_EPS = 1e-5
GELU_SCALE = (2 / np.pi) ** 0.5
GELU_CUBIC = 0.044715


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model.

    vocab: number of symbols; context: the longest sequence; layers, heads, width: blocks, attention
    heads and elements per position; tied: whether the head is the token embedding transposed.
    Raises ValueError if a size is below 1 or `width` is no multiple of `heads`.
    """

    vocab: int
    context: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 128
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(
                f"width: expected a multiple of heads ({self.heads}), got {self.width}"
            )


def init(rng: np.random.Generator, config: Config, dtype: DTypeLike = np.float32) -> Params:
    """Draw parameters: normal weights, unit gains, zero biases.

    Embeddings have standard deviation 0.02, as in GPT-2, which puts the first loss near log(V);
    matrices have 1 / sqrt(rows), which keeps the size of activations at any width; those that end
    a residual branch are divided by sqrt(2 * layers), so that depth does not add up.
    """

    def normal(rows: int, columns: int, std: float) -> Array:
        return (std * rng.standard_normal((rows, columns))).astype(dtype)

    def linear(rows: int, columns: int, shrink: float = 1.0) -> Params:
        return {
            "w": normal(rows, columns, shrink * rows**-0.5),
            "b": np.zeros(columns, dtype),
        }

    def norm() -> Params:
        return {"g": np.ones(config.width, dtype), "b": np.zeros(config.width, dtype)}

    width, shrink = config.width, (2 * config.layers) ** -0.5
    params: Params = {
        "wte": normal(config.vocab, width, 0.02),
        "wpe": normal(config.context, width, 0.02),
        "blocks": [
            {
                "norm1": norm(),
                "qkv": linear(width, 3 * width),
                "out": linear(width, width, shrink),
                "norm2": norm(),
                "up": linear(width, 4 * width),
                "down": linear(4 * width, width, shrink),
            }
            for _ in range(config.layers)
        ],
        "norm": norm(),
    }
    if not config.tied:
        params["head"] = {"w": normal(width, config.vocab, 0.02)}
    return params


def forward(params: Params, x: Array, config: Config) -> tuple[Array, Cache]:
    """Logits of every next symbol, and what `backward` needs.

    x: integers of shape (B, T), below V. Returns logits (B, T, V) in the parameters' dtype.
    Raises ValueError if T exceeds the context.
    """
    batch, time = x.shape
    if time > config.context:
        raise ValueError(f"x: expected at most {config.context} positions, got {time}")
    hidden = (params["wte"][x] + params["wpe"][:time]).reshape(-1, config.width)
    caches = []
    for block in params["blocks"]:
        normed, norm1 = _norm(hidden, block["norm1"])
        mixed, attention = _attention(normed, block, (batch, time, config.heads))
        hidden = hidden + mixed
        normed, norm2 = _norm(hidden, block["norm2"])
        mixed, mlp = _mlp(normed, block)
        hidden = hidden + mixed
        caches.append((norm1, attention, norm2, mlp))
    normed, norm = _norm(hidden, params["norm"])
    scores = normed @ (params["wte"].T if config.tied else params["head"]["w"])
    return scores.reshape(batch, time, config.vocab), (x, caches, normed, norm)


def backward(params: Params, cache: Cache, dlogits: Array, config: Config) -> Params:
    """Gradients, in the nesting of `params`, of a loss with the derivative `dlogits` (B, T, V).

    `cache` is what `forward` returned for these params; it is left as it is, so that one
    forward pass serves several backward passes.
    """
    x, caches, normed, norm = cache
    dlogits = dlogits.reshape(-1, config.vocab)
    grads: Params = {}
    if config.tied:
        dwte = dlogits.T @ normed
        dhidden = dlogits @ params["wte"]
    else:
        dwte = np.zeros_like(params["wte"])
        grads["head"] = {"w": normed.T @ dlogits}
        dhidden = dlogits @ params["head"]["w"].T
    dhidden, grads["norm"] = _norm_backward(dhidden, norm, params["norm"])
    blocks = []
    for block, (norm1, attention, norm2, mlp) in zip(
        reversed(params["blocks"]), reversed(caches), strict=True
    ):
        dnormed, dmlp = _mlp_backward(dhidden, mlp, block)
        dbranch, dnorm2 = _norm_backward(dnormed, norm2, block["norm2"])
        dhidden = dhidden + dbranch
        dnormed, dattention = _attention_backward(dhidden, attention, block)
        dbranch, dnorm1 = _norm_backward(dnormed, norm1, block["norm1"])
        dhidden = dhidden + dbranch
        blocks.append({"norm1": dnorm1, **dattention, "norm2": dnorm2, **dmlp})
    grads["blocks"] = blocks[::-1]
    np.add.at(dwte, x.ravel(), dhidden)
    grads["wte"] = dwte
    grads["wpe"] = np.zeros_like(params["wpe"])
    grads["wpe"][: x.shape[1]] = dhidden.reshape(*x.shape, config.width).sum(axis=0)
    return grads


def cross_entropy(logits: Array, y: Array) -> tuple[float, Array]:
    """Mean of -log softmax(logits)[y] in nats, and its derivative by the logits.

    logits: shape (B, T, V); y: integers of shape (B, T). The derivative has the logits' shape.
    """
    targets = y[..., None]
    dlogits = logits - logits.max(axis=-1, keepdims=True)
    picked = np.take_along_axis(dlogits, targets, axis=-1)
    np.exp(dlogits, out=dlogits)
    total = dlogits.sum(axis=-1, keepdims=True)
    loss = float(np.mean(np.log(total) - picked))
    dlogits /= total * y.size
    np.put_along_axis(
        dlogits, targets, np.take_along_axis(dlogits, targets, axis=-1) - 1 / y.size, axis=-1
    )
    return loss, dlogits


def logits(params: Params, x: Array, config: Config) -> Array:
    """Logits of shape (B, T, V) for integers x of shape (B, T): `forward` alone."""
    return forward(params, x, config)[0]


def loss_and_grads(params: Params, x: Array, y: Array, config: Config) -> tuple[float, Params]:
    """Mean cross-entropy in nats of predicting y from x, both (B, T), and all its gradients."""
    scores, cache = forward(params, x, config)
    loss, dlogits = cross_entropy(scores, y)
    return loss, backward(params, cache, dlogits, config)


def evaluate(params: Params, x: Array, y: Array, config: Config, batch: int = 16) -> float:
    """Mean cross-entropy in nats over all windows x, y (count, T), `batch` of them at a time."""
    total = 0.0
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        loss, _ = cross_entropy(logits(params, x[part], config), y[part])
        total += loss * len(x[part])
    return total / len(x)


def sample(
    params: Params,
    prompt: Array,
    count: int,
    config: Config,
    rng: np.random.Generator,
    temperature: float = 0.8,
) -> Array:
    """Continue a non-empty vector of integers by `count` drawn ones; returns only these."""
    ids = list(prompt)
    for _ in range(count):
        window = np.array([ids[-config.context :]])
        scores = logits(params, window, config)[0, -1].astype(np.float64) / temperature
        summed = np.cumsum(np.exp(scores - scores.max()))
        # A draw times the sum can round up to the sum itself, which lies past the last symbol.
        drawn = np.searchsorted(summed, rng.random() * summed[-1], side="right")
        ids.append(min(int(drawn), config.vocab - 1))
    return np.array(ids[len(prompt) :])


def _linear(x: Array, layer: Params) -> Array:
    y: Array = x @ layer["w"]
    y += layer["b"]
    return y


def _linear_backward(dy: Array, x: Array, layer: Params) -> tuple[Array, Params]:
    return dy @ layer["w"].T, {"w": x.T @ dy, "b": dy.sum(axis=0)}


def _norm(x: Array, layer: Params) -> tuple[Array, Cache]:
    unit = x - x.mean(axis=-1, keepdims=True)
    variance = np.einsum("nc,nc->n", unit, unit)[:, None] / x.shape[-1]
    inverse = 1 / np.sqrt(variance + NORM_EPS)
    unit *= inverse
    return unit * layer["g"] + layer["b"], (unit, inverse)


def _norm_backward(dy: Array, cache: Cache, layer: Params) -> tuple[Array, Params]:
    unit, inverse = cache
    grads = {"g": np.einsum("nc,nc->c", dy, unit), "b": dy.sum(axis=0)}
    dx = dy * layer["g"]
    along = np.einsum("nc,nc->n", dx, unit)[:, None] / dy.shape[-1]
    dx -= dx.mean(axis=-1, keepdims=True)
    dx -= unit * along
    dx *= inverse
    return dx, grads


def _attention(x: Array, block: Params, shape: tuple[int, int, int]) -> tuple[Array, Cache]:
    batch, time, heads = shape
    width = x.shape[-1]
    qkv = _linear(x, block["qkv"]).reshape(batch, time, 3, heads, width // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # views of shape (B, H, T, D)
    weights = q @ k.swapaxes(-1, -2)
    weights *= (width // heads) ** -0.5
    weights += np.triu(np.full((time, time), -np.inf, x.dtype), 1)
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(-1, width)
    return _linear(mixed, block["out"]), (x, (q, k, v), weights, mixed)


def _attention_backward(dy: Array, cache: Cache, block: Params) -> tuple[Array, Params]:
    x, (q, k, v), weights, mixed = cache
    batch, heads, time, size = q.shape
    dmixed, dout = _linear_backward(dy, mixed, block["out"])
    dheads = dmixed.reshape(batch, time, heads, size).transpose(0, 2, 1, 3)
    dqkv = np.empty((batch, time, 3, heads, size), x.dtype)
    dq, dk, dv = dqkv.transpose(2, 0, 3, 1, 4)
    dv[...] = weights.swapaxes(-1, -2) @ dheads
    dscores = dheads @ v.swapaxes(-1, -2)
    dscores -= np.einsum("bhts,bhts->bht", dscores, weights)[..., None]
    dscores *= weights
    dscores *= size**-0.5
    dq[...] = dscores @ k
    dk[...] = dscores.swapaxes(-1, -2) @ q
    dx, dprojection = _linear_backward(dqkv.reshape(x.shape[0], -1), x, block["qkv"])
    return dx, {"qkv": dprojection, "out": dout}


def _mlp(x: Array, block: Params) -> tuple[Array, Cache]:
    raised = _linear(x, block["up"])
    bent = np.square(raised)
    bent *= GELU_SCALE * GELU_CUBIC
    bent += GELU_SCALE
    bent *= raised
    np.tanh(bent, out=bent)
    active = bent + 1
    active *= raised
    active *= 0.5
    return _linear(active, block["down"]), (x, raised, bent, active)


def _mlp_backward(dy: Array, cache: Cache, block: Params) -> tuple[Array, Params]:
    # gelu(u) = u (1 + t) / 2 with t = tanh(s u + s c u^3), so that
    # gelu'(u) = (1 + t) / 2 + u (1 - t^2) (s + 3 s c u^2) / 2
    x, raised, bent, active = cache
    dactive, ddown = _linear_backward(dy, active, block["down"])
    slope = np.square(raised)
    slope *= 3 * GELU_SCALE * GELU_CUBIC
    slope += GELU_SCALE
    slope *= raised
    slope *= 1 - np.square(bent)
    slope += bent
    slope += 1
    slope *= 0.5
    slope *= dactive
    dx, dup = _linear_backward(slope, x, block["up"])
    return dx, {"up": dup, "down": ddown}
