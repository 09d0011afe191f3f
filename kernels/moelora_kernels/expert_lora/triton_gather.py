"""Rows of x in sorted order, in Triton: each row is read once and written for all of its pairs."""

import jax
import triton
import triton.language as tl

from moelora_kernels.backend import Launch, launch
from moelora_kernels.types import Buffer, TokenSort

#: Columns of a program.
BLOCK = 2048


def gather_rows(x: Buffer, sort: TokenSort, top_k: int, out: Buffer | None) -> Buffer:
    """The token's row of ``x`` ``[tokens, width]`` for each sorted row.

    ``out`` is None or ``[>= pairs, width]``. Rows past the last real pair are not written.
    """
    tokens, width = x.shape
    return launch(
        copy_token,
        (x, sort.row_of_pair),
        [jax.ShapeDtypeStruct((tokens * top_k, width), x.dtype)],
        None if out is None else [out],
        Launch((tokens, triton.cdiv(width, BLOCK)), num_warps=4),
        WIDTH=width,
        TOP_K=top_k,
        TOP_K_POW2=triton.next_power_of_2(top_k),
        BLOCK=BLOCK,
    )[0]


@triton.jit
def copy_token(
    x_ptr,
    row_of_pair_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and block of columns per program.

    All rows are looked up before the first is written: a look-up cannot overtake a store.
    """
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, TOP_K_POW2)
    row = tl.load(row_of_pair_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x_ptr + token * WIDTH + column, mask=inside)
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :],
        tl.broadcast_to(value[None, :], (TOP_K_POW2, BLOCK)),
        mask=(row >= 0)[:, None] & inside[None, :],
    )
