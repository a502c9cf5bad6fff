/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file tensor_core.cuh
 * Products by a warp's tensor cores, and the copies that feed them, for compute capability 8.0 and
 * later; with an emulation of each (see vocabulary.cuh).
 *
 * A product is D += A B with A: 16 x 16 and B: 16 x 8, bf16, and D: 16 x 8, f32. Thread t of the warp
 * holds, with g = t / 4 and p = 2 (t % 4) (PTX ISA, "Matrix fragments for mma.m16n8k16"):
 *
 *     d[0], d[1]: (g, p), (g, p + 1)      d[2], d[3]: (g + 8, p), (g + 8, p + 1)
 *     a[0]: (g, p..)    a[1]: (g + 8, p..)    a[2]: (g, p + 8..)    a[3]: (g + 8, p + 8..)
 *     b[0]: (p.., g)    b[1]: (p + 8.., g)
 *
 * where p.. are the two elements p and p + 1, the first one in the lower half. D is the same where A and B
 * are TF32.
 */
#ifndef SEBP_CUDA_TENSOR_CORE_CUH
#define SEBP_CUDA_TENSOR_CORE_CUH

#include "vocabulary.cuh"

/** Two elements as a register of a fragment. */
__device__ __forceinline__ uint32_t sebp_pair(sebp_bf16 first, sebp_bf16 second)
{
    return (uint32_t)first.bits | (uint32_t)second.bits << 16;
}

/** Two numbers, rounded. */
__device__ __forceinline__ uint32_t sebp_narrow_pair(float first, float second)
{
#ifdef __CUDACC__
    uint32_t made;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(second), "f"(first));
    return made;
#else
    return sebp_pair(sebp_narrow<sebp_bf16>(first), sebp_narrow<sebp_bf16>(second));
#endif
}

__device__ __forceinline__ float sebp_first_of(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float sebp_second_of(uint32_t pair)
{
    return __uint_as_float(pair & 0xFFFF0000U);
}

#ifndef __CUDACC__
/** d += a b of fragments where A has `depth` columns, 16 or 8. A register holds depth / 8 elements, of which
 * `element` gives one. */
template <int depth, class Element>
void sebp_emulate_mma(float d[4], const uint32_t a[4], const uint32_t b[2], Element element)
{
    constexpr int half = depth / 2, in_register = depth / 8;
    struct fragments {
        uint32_t a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, all[SEBP_WARP];
    sebp_emulated_exchange(&mine, sizeof mine, all);
    int lane = sebp_emulated_lane(), g = lane / 4, p = 2 * (lane % 4);
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, col = p + i % 2;
        float sum = 0;
        for (int k = 0; k < depth; k++) {
            int owner = k % half / in_register;
            uint32_t from_a = all[row % 8 * 4 + owner].a[row / 8 + k / half * 2];
            uint32_t from_b = all[col * 4 + owner].b[k / half];
            sum += element(from_a, k % in_register) * element(from_b, k % in_register);
        }
        d[i] += sum;
    }
}
#endif

/** d += a b, by all threads of a warp. */
__device__ __forceinline__ void sebp_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    sebp_emulate_mma<16>(d, a, b, [](uint32_t pair, int which) {
        return which == 0 ? sebp_first_of(pair) : sebp_second_of(pair);
    });
#endif
}

/**
 * An f32, made ready for tensor cores. They read it as TF32: of its 23 bits of mantissa they ignore the last
 * 13. That alone would make every number smaller. So x 2/3 2^-11 is added first, which is half a unit of the
 * last bit that stays, on average. Numbers that TF32 holds stay as they are. The error is below 2^-10.5 of the
 * number. NaN stays NaN: cut off, one might become Inf.
 */
__device__ __forceinline__ uint32_t sebp_to_tf32(uint32_t x)
{
    constexpr float added = 0x1.555p-12F; /* 2/3 2^-11 */
    return __float_as_uint(fmaf(__uint_as_float(x), added, __uint_as_float(x)));
}

/** d += a b with TF32, A: 16 x 8 and B: 8 x 8: a[0]: (g, t % 4), a[1]: 8 rows below, a[2], a[3]: 4 columns
 * right of these; b[0]: (t % 4, g), b[1]: 4 rows below. */
__device__ __forceinline__ void sebp_mma_tf32(float d[4], const uint32_t a[4], const uint32_t b[2])
{
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    sebp_emulate_mma<8>(d, a, b, [](uint32_t x, int) { return __uint_as_float(x & 0xFFFFE000U); });
#endif
}

/** Of elements T: sebp_bf16, or float as TF32. */
template <class T>
__device__ __forceinline__ void sebp_mma(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    if constexpr (sizeof(T) == 2)
        sebp_mma_bf16(d, a, b);
    else
        sebp_mma_tf32(d, a, b);
}

/**
 * Four 8 x 8 matrices of bf16 from shared memory: thread t names row t % 8 of matrix t / 8, 16 bytes
 * at a multiple of 16. Thread t gets elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4 of matrix i in
 * got[i]; with `transposed` of column t / 4.
 */
template <bool transposed>
__device__ __forceinline__ void sebp_load_matrices(uint32_t got[4], const sebp_bf16 *row)
{
#ifdef __CUDACC__
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    if (transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(got[0]), "=r"(got[1]), "=r"(got[2]), "=r"(got[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(got[0]), "=r"(got[1]), "=r"(got[2]), "=r"(got[3])
                     : "r"(address)
                     : "memory");
    }
#else
    const sebp_bf16 *all[SEBP_WARP];
    sebp_emulated_exchange(&row, sizeof row, all);
    int lane = sebp_emulated_lane(), p = 2 * (lane % 4), g = lane / 4;
    for (int i = 0; i < 4; i++) {
        got[i] = transposed ? sebp_pair(all[8 * i + p][g], all[8 * i + p + 1][g])
                            : sebp_pair(all[8 * i + g][p], all[8 * i + g][p + 1]);
    }
#endif
}

/** Starts to copy 16 bytes to shared memory, both at multiples of 16; of them the first `bytes`, the
 * rest becomes zero. With 0 bytes `from` is not read. */
__device__ __forceinline__ void sebp_copy_async(void *to, const void *from, int bytes)
{
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
#else
    sebp_emulated_copy(to, from, bytes, 16);
#endif
}

/** Starts to copy 4 bytes to shared memory, both at multiples of 4, or with `bytes` 0 zeros. */
__device__ __forceinline__ void sebp_copy_four_async(void *to, const void *from, int bytes)
{
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
#else
    sebp_emulated_copy(to, from, bytes, 4);
#endif
}

/** Starts to copy 8 bytes to shared memory, both at multiples of 8. */
__device__ __forceinline__ void sebp_copy_eight_async(void *to, const void *from)
{
#ifdef __CUDACC__
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
        "l"(__cvta_generic_to_global(from))
        : "memory");
#else
    sebp_emulated_copy(to, from, 8, 8);
#endif
}

/** Ends a group of copies of this thread. */
__device__ __forceinline__ void sebp_copies_end_group()
{
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    sebp_emulated_copies_end_group();
#endif
}

/** Waits until no more than `groups` of this thread's groups are under way. The other threads see the
 * copies after the next barrier. */
template <int groups> __device__ __forceinline__ void sebp_copies_wait()
{
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#else
    sebp_emulated_copies_wait(groups);
#endif
}

#endif
