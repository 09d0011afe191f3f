"""What changes logits before a token is chosen: biases, stop tokens that come too early, penalties.

Formulas and their order are vLLM's (``vllm/v1/sample/sampler.py``): stop tokens, biases, and the
penalties for repetition, frequency and presence; the last two as OpenAI defines them.

The tokens of a sequence so far are read through its block table, as attention reads their keys and
values: the cache keeps the token of each position. So they are right wherever keys and values are,
whether a sequence shares its prefix, runs in chunks, or is computed again.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int32

from moelora_jax.buckets import Batch
from moelora_jax.workspace import MAX_BIASES


def adjusted(
    logits: Float[Array, "rows vocab"],
    cached: Int32[Array, "blocks block_size"],
    biases: Int32[Array, "seats 2 biases"],
    batch: Batch,
) -> Float[Array, "rows vocab"]:
    """Logits with what each row asks for; those of a row that asks for nothing keep their bits.

    Args:
        logits: float32 scores of the tokens that follow the last token of each row.
        cached: tokens of all positions in the cache, those of this step among them.
        biases: of each seat, as the device state has them.
        batch: the step.
    """
    rows, vocab = logits.shape
    row = jnp.arange(rows)[:, None]

    # A seat beyond the last one is of a row that samples nothing.
    tokens, bits = jnp.moveaxis(biases.at[batch.seat].get(mode="clip"), 1, 0)
    applies = jnp.arange(MAX_BIASES) >= batch.first_bias[:, None]
    tokens = jnp.where(applies, tokens, vocab)
    added = lax.bitcast_convert_type(bits, jnp.float32)
    logits = logits.at[row, tokens].add(added, mode="drop")

    tokens = cached[batch.block_table].reshape(rows, -1)
    position = jnp.arange(tokens.shape[1])
    known = position <= batch.positions[batch.last_token][:, None]
    generated = known & (position >= batch.num_prompt[:, None])
    seen = jnp.zeros((rows, vocab), jnp.bool).at[row, jnp.where(known, tokens, vocab)]
    times = jnp.zeros((rows, vocab), jnp.int32).at[row, jnp.where(generated, tokens, vocab)]
    count = times.add(1, mode="drop").astype(jnp.float32)

    repetition = batch.repetition_penalty[:, None]
    repetition = jnp.where(seen.set(True, mode="drop"), repetition, 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= batch.frequency_penalty[:, None] * count
    return logits - jnp.where(count > 0, batch.presence_penalty[:, None], 0.0)
