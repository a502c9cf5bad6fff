/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file hopper.cuh
 * Instructions of compute capability 9.0a that C++ has no words for: barriers in shared memory that
 * copies arrive at, products by a warpgroup's matrix unit, clusters of blocks. Written from the PTX
 * ISA. nvcc alone.
 *
 * Addresses in shared memory are 32 bits, as sebp_shared_address() gives them.
 */
#ifndef SEBP_CUDA_HOPPER_CUH
#define SEBP_CUDA_HOPPER_CUH

#include "vocabulary.cuh"

__device__ __forceinline__ uint32_t sebp_shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

namespace hopper {

/* ---- barriers ---- */

/** A barrier whose phase ends when `count` threads have arrived. */
__device__ __forceinline__ void barrier_make(uint32_t barrier, uint32_t count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive_if(uint32_t barrier, bool arrive)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %1, 0;\n"
                 "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
                 "}" ::"r"(barrier),
                 "r"((int)arrive)
                 : "memory");
}

/** The thread arrives when all of its copies so far are done; it does not wait. */
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/** Waits for the end of the phase of that parity. The one before the first has parity 1. */
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra finished;\n"
                 "bra again;\n"
                 "finished:\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/** A barrier of some of the block's warps; index 0 is that of __syncthreads(). */
template <int INDEX, int THREADS> __device__ __forceinline__ void barrier_of_some()
{
    asm volatile("bar.sync %0, %1;" ::"n"(INDEX), "n"(THREADS) : "memory");
}

/* ---- copies ---- */

/** Begins to copy 16 bytes, or zeroes them if not `present`; then `from` is not read. */
__device__ __forceinline__ void copy_16(uint32_t to, const void *from, bool present)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(present ? 16 : 0)
                 : "memory");
}

/** Brings the 128 bytes around it into the L2 cache. */
__device__ __forceinline__ void prefetch(const void *from)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

/* ---- shared memory, by address ---- */

__device__ __forceinline__ void store_shared(uint32_t to, uint32_t x)
{
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t to, float4 x)
{
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t from)
{
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}

/** What was written to shared memory by threads comes before what the matrix unit reads after it. */
__device__ __forceinline__ void fence_for_matrix_unit()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- registers: a warpgroup gives some back, others take them ---- */

template <int COUNT> __device__ __forceinline__ void registers_fewer()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* ---- the matrix unit ---- */

/**
 * Where an operand lies in shared memory, swizzled by 128 bytes. `advance` 16-byte units are added to
 * it for another start.
 */
__device__ __forceinline__ uint64_t matrix_place(uint32_t address, uint32_t leading_bytes,
                                                 uint32_t stride_bytes)
{
    const uint64_t swizzle_128 = 1;
    return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(leading_bytes >> 4) << 16 |
           (uint64_t)(stride_bytes >> 4) << 32 | swizzle_128 << 62;
}

__device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/** Waits until at most `LEFT` of the warpgroup's groups of products are under way. */
template <int LEFT> __device__ __forceinline__ void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

/** Keeps the compiler from moving a sum across. */
__device__ __forceinline__ void pin(float &x)
{
    asm volatile("" : "+f"(x)::"memory");
}

#define SEBP_SUMS_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define SEBP_SUMS_16(i)                                                                            \
    SEBP_SUMS_4(i), SEBP_SUMS_4((i) + 4), SEBP_SUMS_4((i) + 8), SEBP_SUMS_4((i) + 12)
#define SEBP_SUMS_64(i)                                                                            \
    SEBP_SUMS_16(i), SEBP_SUMS_16((i) + 16), SEBP_SUMS_16((i) + 32), SEBP_SUMS_16((i) + 48)

/**
 * d += A B, with A: 64 x 16 and B: 16 x 128 of bf16 at their places, each with its
 * depth contiguous or across. It is asynchronous, and by all four warps of a warpgroup. Thread t
 * (warp w, lane l) has, for j < 16: d[4 j + 2 h + e] = D[16 w + l / 4 + 8 h][8 j + 2 (l % 4) + e].
 */
template <bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void product(float (&d)[64], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, 1, 1, 1, %66, %67;"
                 : SEBP_SUMS_64(0)
                 : "l"(a), "l"(b), "n"(A_ACROSS ? 1 : 0), "n"(B_ACROSS ? 1 : 0));
}

/** The same with B: 16 x 192 and j < 24. */
template <bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void product(float (&d)[96], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
                 "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
                 "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
                 "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "
                 "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
                 "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
                 "%96, %97, 1, 1, 1, %98, %99;"
                 : SEBP_SUMS_64(0), SEBP_SUMS_16(64), SEBP_SUMS_16(80)
                 : "l"(a), "l"(b), "n"(A_ACROSS ? 1 : 0), "n"(B_ACROSS ? 1 : 0));
}

/** The same with B: 16 x 256 and j < 32. */
template <bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void product(float (&d)[128], uint64_t a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
        "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "
        "%125, %126, %127}, "
        "%128, %129, 1, 1, 1, %130, %131;"
        : SEBP_SUMS_64(0), SEBP_SUMS_64(64)
        : "l"(a), "l"(b), "n"(A_ACROSS ? 1 : 0), "n"(B_ACROSS ? 1 : 0));
}

#undef SEBP_SUMS_4
#undef SEBP_SUMS_16
#undef SEBP_SUMS_64

/* ---- elements ---- */

/** Two bf16, the first in the low half. */
__device__ __forceinline__ uint32_t narrow_two(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* ---- clusters ---- */

/** All threads of the cluster's blocks wait for each other, and see what was written before. */
__device__ __forceinline__ void cluster_barrier()
{
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/** Where another block of the cluster has what this one has at `address`. */
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, int block)
{
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

__device__ __forceinline__ float4 load_from_block(uint32_t there)
{
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(there));
    return x;
}

} // namespace hopper

#endif
