"""What external attention's kernels share: products with the memory, and the softmax of a block of a head's tokens.

Pointers to tokens are to the block's first row, so that offsets inside of a tile fit into 32 bits.
"""

import triton
import triton.language as tl


@triton.jit
def by_memory(
    tokens, memory, count, M, size, stride,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_S, BLOCK_M] tokens·memoryᵀ in fp32, of `count` rows and M slots."""
    row, slot, channel = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    for start in range(0, size, BLOCK_D):
        k = start + channel
        left = tl.load(tokens + row * stride + k, mask=(row < count) & (k < size), other=0.0)
        right = tl.load(memory + slot * size + k, mask=(slot < M) & (k < size), other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    return acc


@triton.jit
def operand(value, like, WIDE: tl.constexpr):
    """A factor of a product that is no input, or is multiplied with one."""
    return value.to(tl.float32 if WIDE else like.dtype.element_ty)


@triton.jit
def store_by_channels(
    weights, memory, out, count, M, size, stride,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [count, size] ← weights [BLOCK_S, BLOCK_M]·memory"""
    row, slot, channel = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_D)[None, :]
    left = operand(weights, memory, WIDE)
    for start in range(0, size, BLOCK_D):
        k = start + channel
        right = tl.load(memory + slot * size + k, mask=(slot < M) & (k < size), other=0.0)
        values = tl.dot(left, operand(right, memory, WIDE), input_precision=PRECISION)
        tl.store(out + row * stride + k, values.to(out.dtype.element_ty), mask=(row < count) & (k < size))


@triton.jit
def softmax_of_block(
    x, mk, statistics, count, M, size, x_row,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """P and A [BLOCK_S, BLOCK_M], zero outside, and r [BLOCK_S]."""
    row, slot = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M)
    logits = by_memory(x, mk, count, M, size, x_row, PRECISION, BLOCK_S, BLOCK_M, BLOCK_D)
    largest = tl.load(statistics + slot, mask=slot < M, other=0.0)
    total = tl.load(statistics + M + slot, mask=slot < M, other=1.0)
    softmax = tl.exp(logits - largest[None, :]) / total[None, :]
    softmax = tl.where((row < count)[:, None] & (slot < M)[None, :], softmax, 0.0)
    total = 1e-9 + tl.sum(softmax, 1)
    # Rounded correctly: a token that only one slot attends to has A = 1, and no gradient.
    return softmax, tl.div_rn(softmax, total[:, None]), total
