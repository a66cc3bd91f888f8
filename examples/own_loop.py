"""A training loop of your own: two parties with their own arrays and optimizers, between which only bytes travel.

python examples/own_loop.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import msjax
from msjax import compress, models, wire

UP = compress.MaskEncoded()
DOWN = compress.EntropyMask(error=0.3, signed=True, rounding="stochastic")
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


@functools.partial(jax.jit, static_argnums=0)
def client_forward(apply, params, stats, x, key):
    h, stats = apply(params, stats, x, train=True, key=key)
    return UP.encode(h), stats


@functools.partial(jax.jit, static_argnums=(0, 3))
def server_step(apply, state, payload, like, labels, key):
    params, stats, opt_state = state

    def loss_of(params, h):
        logits, new = apply(params, stats, h, train=True, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    (loss, stats), (grads, g) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(params, UP.decode(payload, like))
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), stats, opt_state), DOWN.encode(g, compress.downlink_key(key)), loss


@functools.partial(jax.jit, static_argnums=(0, 5))
def client_backward(apply, state, x, key, payload, like):
    params, stats, opt_state = state
    _, vjp, new = jax.vjp(lambda params: apply(params, stats, x, train=True, key=key), params, has_aux=True)
    (grads,) = vjp(DOWN.decode(payload, like))
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), new, opt_state


def main(steps: int = 100, batch_size: int = 64) -> list[float]:
    """Returns the losses of the steps."""
    digits, rngs = msjax.data.load("digits"), nnx.Rngs(0)
    inputs, labels = np.float32(digits.train_inputs) / 16, np.int32(digits.train_labels)
    modules = (
        nnx.Sequential(nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.BatchNorm(16, rngs=rngs), nnx.relu),
        nnx.Sequential(lambda h: h.reshape(len(h), -1), nnx.Linear(8 * 8 * 16, 10, rngs=rngs)),
    )
    client, server = models.as_parts(modules, inputs[:batch_size])
    mine, theirs = ((part.params, part.stats, OPTIMIZER.init(part.params)) for part in (client, server))
    like = jax.ShapeDtypeStruct((batch_size, 8, 8, 16), jnp.float32)
    losses, sent = [], 0
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        chosen = np.random.default_rng(step).choice(len(inputs), batch_size, replace=False)
        payload, _ = client_forward(client.apply, *mine[:2], inputs[chosen], key)
        up = wire.encode(payload, UP, like, compression="huffman")  # bytes: send them as you like
        payload = wire.decode(up, expect=(UP, like)).payload  # at the server
        theirs, payload, loss = server_step(server.apply, theirs, payload, like, labels[chosen], key)
        down = wire.encode(payload, DOWN, like)
        payload = wire.decode(down, expect=(DOWN, like)).payload  # at the client
        mine = client_backward(client.apply, mine, inputs[chosen], key, payload, like)
        losses.append(float(loss))
        sent += len(up) + len(down)
    plain = 2 * steps * 4 * int(np.prod(like.shape))
    print(f"loss {losses[0]:.2f}, then {np.mean(losses[-10:]):.2f}; {plain / sent:.1f} times fewer bytes")
    return losses


if __name__ == "__main__":
    main()
