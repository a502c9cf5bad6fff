/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file vocabulary.cuh
 * What kernels are written in, beside CUDA C++ itself: launches, elements of either dtype, sums over
 * a warp and a block, lists of rows.
 *
 * The same sources are compiled by nvcc, and by a host's C++ compiler on top of tests/cuda, which
 * runs their threads one at a time: so they are tested where there is no GPU. Kernels keep to what
 * that knows.
 */
#ifndef SEBP_CUDA_VOCABULARY_CUH
#define SEBP_CUDA_VOCABULARY_CUH

#include <type_traits>

#include <cuda_runtime.h>

#include "cuda.h"

/* ---- launches ---- */

enum { SEBP_WARP = 32 };

#ifdef __CUDACC__
/** Whether the kernels of this build see to the order that sebp_overlapping promises, on a GPU of a
 * compute capability: those that are compiled for 9.0 or later. A GPU may run what is compiled for an
 * earlier one. */
inline bool sebp_may_overlap(int capability)
{
    constexpr int compiled[] = {__CUDA_ARCH_LIST__};
    for (int arch : compiled) {
        if (arch >= 900 && arch <= 10 * capability)
            return true;
    }
    return false;
}
#endif

/** sebp_launch() and sebp_launch_overlapping(). */
template <class... Parameters, class... Arguments>
sebp_status sebp_launch_kernel(sebp_cuda *cuda, bool begins_early, void (*kernel)(Parameters...),
                               dim3 grid, dim3 block, int64_t shared_bytes, Arguments... arguments)
{
    sebp_status status = sebp_cuda_check_current(cuda);
    if (status == SEBP_SUCCESS && shared_bytes > 48 * 1024) {
        status =
            sebp_cuda_check(cuda, cudaFuncSetAttribute((const void *)kernel,
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       (int)shared_bytes));
    }
    if (status != SEBP_SUCCESS)
        return status;
#ifdef __CUDACC__
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t how = {};
    how.gridDim = grid;
    how.blockDim = block;
    how.dynamicSmemBytes = (size_t)shared_bytes;
    how.stream = cuda->stream;
    how.attrs = &early;
    how.numAttrs = begins_early && sebp_may_overlap(cuda->capability) ? 1 : 0;
    return sebp_cuda_check(cuda,
                           cudaLaunchKernelEx(&how, kernel, static_cast<Parameters>(arguments)...));
#else
    (void)begins_early; /* kernels are done when they have been launched */
    return sebp_cuda_check(cuda, sebp_emulate(kernel, grid, block, (size_t)shared_bytes,
                                              static_cast<Parameters>(arguments)...));
#endif
}

/** Launches kernel(arguments...) on the device's stream. Zero blocks: nothing. */
template <class... Parameters, class... Arguments>
sebp_status sebp_launch(sebp_cuda *cuda, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        int64_t shared_bytes, Arguments... arguments)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
        return SEBP_SUCCESS;
    return sebp_launch_kernel(cuda, false, kernel, grid, block, shared_bytes, arguments...);
}

/** The same of an operation's first kernel. It need not wait for the operations that this one may
 * overlap with: see sebp_cuda_begins_early(). */
template <class... Parameters, class... Arguments>
sebp_status sebp_launch_overlapping(sebp_cuda *cuda, void (*kernel)(Parameters...), dim3 grid,
                                    dim3 block, int64_t shared_bytes, Arguments... arguments)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
        return SEBP_SUCCESS;
    const bool early = sebp_cuda_begins_early(cuda);
    return sebp_launch_kernel(cuda, early, kernel, grid, block, shared_bytes, arguments...);
}

/**
 * Stands at the top of a kernel that sebp_launch_overlapping() launches: lets the next one begin. The
 * kernel has ended when the one before it has, too, so that what comes after waits for both. One block
 * sees to that; a block that waits has no room for others.
 */
struct sebp_overlapping {
    __device__ __forceinline__ sebp_overlapping()
    {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.launch_dependents;");
#endif
    }
    __device__ __forceinline__ ~sebp_overlapping()
    {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
        if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0)
            asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    }
};

/** A block's dynamic shared memory. */
template <class T> __device__ __forceinline__ T *sebp_shared()
{
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char sebp_shared_bytes[];
    return reinterpret_cast<T *>(sebp_shared_bytes);
#else
    return reinterpret_cast<T *>(sebp_emulated_shared());
#endif
}

/* ---- elements ---- */

/** A bfloat16, as it lies in memory. */
struct alignas(2) sebp_bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float sebp_widen(float x)
{
    return x;
}

__device__ __forceinline__ float sebp_widen(sebp_bf16 x)
{
    return __uint_as_float((uint32_t)x.bits << 16);
}

/** Rounds to the nearest, ties to even; NaN stays NaN. */
template <class T> __device__ __forceinline__ T sebp_narrow(float x);

template <> __device__ __forceinline__ float sebp_narrow<float>(float x)
{
    return x;
}

template <> __device__ __forceinline__ sebp_bf16 sebp_narrow<sebp_bf16>(float x)
{
    sebp_bf16 made;
#ifdef __CUDACC__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(made.bits) : "f"(x));
#else
    uint32_t bits = __float_as_uint(x);
    made.bits = x != x ? 0x7FFF : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#endif
    return made;
}

/** Calls `body` with an element of the type that a dtype stands for. */
template <class Body> auto sebp_with_dtype(sebp_dtype dtype, Body body)
{
    return dtype == SEBP_BF16 ? body(sebp_bf16()) : body(float());
}

/** Calls `body` with a constant, which a template can take. */
template <class Body> auto sebp_with_bool(bool value, Body body)
{
    return value ? body(std::true_type()) : body(std::false_type());
}

/** A matrix, as a kernel takes it. */
template <class T> struct sebp_view {
    T *data;
    int64_t stride;

    __device__ __forceinline__ T *row(int64_t i) const
    {
        return data + i * stride;
    }
};

template <class T> sebp_view<T> sebp_view_of(const sebp_matrix *matrix)
{
    return matrix == nullptr ? sebp_view<T>{nullptr, 0}
                             : sebp_view<T>{(T *)matrix->data, matrix->stride};
}

/** The memory row of a list's i-th. */
__device__ __forceinline__ int64_t sebp_row_at(const int64_t *rows, int64_t i)
{
    return rows != nullptr ? rows[i] : i;
}

/* ---- sums ---- */

/** Of a warp's 32 threads, all of which call it: each gets the result. */
template <class T> __device__ __forceinline__ T sebp_warp_sum(T x)
{
    for (int step = SEBP_WARP / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(0xFFFFFFFFU, x, step);
    return x;
}

template <class T> __device__ __forceinline__ T sebp_warp_max(T x)
{
    for (int step = SEBP_WARP / 2; step > 0; step /= 2) {
        T other = __shfl_xor_sync(0xFFFFFFFFU, x, step);
        x = other > x ? other : x;
    }
    return x;
}

/** Of a block of 32 to 1024 threads, all of which call it; `room`: 32 elements of shared memory that
 * nothing else uses. Each gets the result, always from the same order. */
template <class T> __device__ T sebp_block_sum(T x, T *room)
{
    int lane = (int)threadIdx.x % SEBP_WARP, warp = (int)threadIdx.x / SEBP_WARP;
    x = sebp_warp_sum(x);
    __syncthreads(); /* the room may still be read */
    if (lane == 0)
        room[warp] = x;
    __syncthreads();
    return sebp_warp_sum(lane * SEBP_WARP < (int)blockDim.x ? room[lane] : T(0));
}

#endif
