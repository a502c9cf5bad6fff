/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file cuda_runtime.h
 * As much of CUDA C++ as the library's kernels use, for a host's compiler. Written from CUDA's
 * documentation.
 */
#ifndef FAKE_CUDA_RUNTIME_H
#define FAKE_CUDA_RUNTIME_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__
#define __grid_constant__
#define __shared__ static /* one block runs at a time */

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z)
    {
    }
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
inline float2 make_float2(float x, float y)
{
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y)
{
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}

extern dim3 threadIdx, blockIdx, blockDim, gridDim; /* of the thread that runs */

/* The machine underneath (fake_runtime.cc). */

/** Runs body() for each thread of each block; the error of a launch. */
cudaError_t sebp_emulate_grid(dim3 grid, dim3 block, size_t shared_bytes,
                              const std::function<void()> &body);
void *sebp_emulated_shared();
/** Waits for all threads of the block that have not returned; the sum of what they bring. */
int sebp_emulated_barrier(int value);
/** Hands each thread of a warp what all its 32 threads bring: lane i's at all + i * bytes. The bits of
 * the lanes that are there. */
unsigned sebp_emulated_exchange(const void *mine, size_t bytes, void *all);
/** Begins an asynchronous copy of the thread's: of `size` bytes at `to` the first `bytes` will be those at
 * `from`, and the others zero. It is done as late as may be: when the thread waits for its group, or else
 * when it returns. Until then there is NaN. */
void sebp_emulated_copy(void *to, const void *from, int bytes, int size);
/** The thread's copies since the last group are a group. */
void sebp_emulated_copies_end_group();
/** Waits until no more than `groups` of the thread's groups are under way. */
void sebp_emulated_copies_wait(int groups);

template <class... Parameters, class... Arguments>
cudaError_t sebp_emulate(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                         Arguments... arguments)
{
    return sebp_emulate_grid(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

inline void __syncthreads()
{
    sebp_emulated_barrier(0);
}
inline int __syncthreads_count(int x)
{
    return sebp_emulated_barrier(x != 0);
}
inline int __syncthreads_or(int x)
{
    return sebp_emulated_barrier(x != 0) != 0;
}
inline int __syncthreads_and(int x)
{
    return sebp_emulated_barrier(x == 0) == 0;
}
inline void __threadfence()
{
}
inline void __threadfence_block()
{
}

inline int sebp_emulated_lane()
{
    return (int)(threadIdx.x % 32);
}

template <class T> T sebp_emulated_from(T x, int lane)
{
    T all[32];
    unsigned there = sebp_emulated_exchange(&x, sizeof x, all);
    return lane >= 0 && lane < 32 && (there >> lane & 1) ? all[lane] : x;
}

inline void __syncwarp(unsigned = 0xFFFFFFFFU)
{
    char nothing = 0, all[32];
    sebp_emulated_exchange(&nothing, 1, all);
}
template <class T> T __shfl_sync(unsigned, T x, int lane, int width = 32)
{
    return sebp_emulated_from(x, sebp_emulated_lane() / width * width + (lane & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask, int = 32)
{
    return sebp_emulated_from(x, sebp_emulated_lane() ^ mask);
}
template <class T> T __shfl_down_sync(unsigned, T x, unsigned step, int width = 32)
{
    int lane = sebp_emulated_lane(), to = lane + (int)step;
    return sebp_emulated_from(x, to / width == lane / width ? to : lane);
}
template <class T> T __shfl_up_sync(unsigned, T x, unsigned step, int width = 32)
{
    int lane = sebp_emulated_lane(), to = lane - (int)step;
    return sebp_emulated_from(x, to >= 0 && to / width == lane / width ? to : lane);
}
inline unsigned __ballot_sync(unsigned, int x)
{
    int all[32];
    unsigned there = sebp_emulated_exchange(&x, sizeof x, all), bits = 0;
    for (int i = 0; i < 32; i++) {
        if (there >> i & 1)
            bits |= (unsigned)(all[i] != 0) << i;
    }
    return bits;
}
inline int __any_sync(unsigned mask, int x)
{
    return __ballot_sync(mask, x) != 0;
}
inline int __all_sync(unsigned mask, int x)
{
    return __ballot_sync(mask, x == 0) == 0;
}

template <class T> T atomicAdd(T *to, std::type_identity_t<T> x)
{
    T had = *to;
    *to = had + x;
    return had;
}
template <class T> T atomicMax(T *to, std::type_identity_t<T> x)
{
    T had = *to;
    *to = x > had ? x : had;
    return had;
}
template <class T> T atomicMin(T *to, std::type_identity_t<T> x)
{
    T had = *to;
    *to = x < had ? x : had;
    return had;
}
template <class T> T atomicOr(T *to, std::type_identity_t<T> x)
{
    T had = *to;
    *to = had | x;
    return had;
}
template <class T> T atomicExch(T *to, std::type_identity_t<T> x)
{
    T had = *to;
    *to = x;
    return had;
}
template <class T> T atomicCAS(T *to, std::type_identity_t<T> want, std::type_identity_t<T> x)
{
    T had = *to;
    if (had == want)
        *to = x;
    return had;
}

template <class T> T __ldg(const T *from)
{
    return *from;
}
template <class T> T __ldcg(const T *from)
{
    return *from;
}
template <class T> T __ldcs(const T *from)
{
    return *from;
}
template <class T> void __stcs(T *to, T x)
{
    *to = x;
}
template <class T> void __stwb(T *to, T x)
{
    *to = x;
}

template <class To, class From> To sebp_emulated_bits(From x)
{
    static_assert(sizeof(To) == sizeof(From));
    To made;
    std::memcpy(&made, &x, sizeof made);
    return made;
}
inline unsigned __float_as_uint(float x)
{
    return sebp_emulated_bits<unsigned>(x);
}
inline float __uint_as_float(unsigned x)
{
    return sebp_emulated_bits<float>(x);
}
inline int __float_as_int(float x)
{
    return sebp_emulated_bits<int>(x);
}
inline float __int_as_float(int x)
{
    return sebp_emulated_bits<float>(x);
}
inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)((uint64_t)a * b >> 32);
}
inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
inline int __clz(int x)
{
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}
inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
inline float __fmul_rn(float a, float b)
{
    return a * b;
}
inline float __fadd_rn(float a, float b)
{
    return a + b;
}
inline float __fsub_rn(float a, float b)
{
    return a - b;
}
inline float __fmaf_rn(float a, float b, float c)
{
    return std::fma(a, b, c);
}
inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
inline float __fdividef(float a, float b)
{
    return a / b;
}
inline float __fsqrt_rn(float a)
{
    return std::sqrt(a);
}
inline double __dmul_rn(double a, double b)
{
    return a * b;
}
inline double __dadd_rn(double a, double b)
{
    return a + b;
}
inline float rsqrtf(float x)
{
    return 1 / std::sqrt(x);
}
inline double rsqrt(double x)
{
    return 1 / std::sqrt(x);
}
using std::isfinite;
using std::isinf;
using std::isnan;

#endif
