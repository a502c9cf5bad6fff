/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit.cu
 * Products on Hopper's matrix units: which they are, the size of the tiles and the parts of the
 * depth, the launch. matrix_unit_kernel.cuh does it.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "matrix_unit.h"

#ifdef __CUDACC__

#include "matrix_unit_kernel.cuh"

namespace matrix_unit {
namespace {

constexpr fence FENCE = fence::BY_READERS;

/* ---- how ---- */

/** The width of the tiles, 128 or 256, and the blocks to a tile. */
struct shape {
    int width, splits;
};

/* How many blocks run at once, one to an SM. A cluster's blocks are on SMs of one group of 16 or more. */
int64_t blocks_at_once(int multiprocessors, int splits)
{
    const int group = 16;
    if (splits <= 2)
        return sebp_max(multiprocessors / splits, 1) * splits;
    return sebp_max(multiprocessors / group, 1) * (group / splits) * splits;
}

/* Clock cycles of an SM, roughly: of a step of the depth with its copies, of a block's beginning and
 * end, of the sum over a cluster. */
double cycles(const sebp_product *product, int multiprocessors, shape how)
{
    const double step = how.width == 256 ? 1150 : 680, ends = 3000, sum_of_cluster = 2500;
    int64_t tiles = sebp_div_ceil(product->m, TILE_M) * sebp_div_ceil(product->n, how.width);
    int64_t steps = sebp_div_ceil(product->k, TILE_DEPTH);
    int64_t rounds = sebp_div_ceil(tiles * how.splits, blocks_at_once(multiprocessors, how.splits));
    return (double)rounds * ((double)sebp_div_ceil(steps, how.splits) * step + ends +
                             (how.splits > 1 ? sum_of_cluster : 0));
}

shape choose(const sebp_product *product, int multiprocessors)
{
    const int64_t min_steps = 4;   /* of a block */
    const int64_t many_rounds = 8; /* a last one that is not full costs little */
    int64_t steps = sebp_div_ceil(product->k, TILE_DEPTH);
    int64_t most = sebp_max(sebp_min(steps / min_steps, MAX_SPLITS), 1);
    if (sebp_div_ceil(product->m, TILE_M) * sebp_div_ceil(product->n, 256) >
        many_rounds * multiprocessors)
        most = 1;
    shape best = {128, 1};
    for (int width = 128; width <= 256; width += 128) {
        for (int splits = 1; splits <= most; splits++) {
            if (cycles(product, multiprocessors, {width, splits}) <
                cycles(product, multiprocessors, best))
                best = {width, splits};
        }
    }
    return best;
}

/* ---- the launch ---- */

operand operand_of(const sebp_operand &x, int64_t size)
{
    return {(const char *)x.data, x.stride * 2, x.rows, (int)size};
}

work work_of(const sebp_product *product, shape how)
{
    work w = {};
    w.a = operand_of(product->a, product->m);
    w.b = operand_of(product->b, product->n);
    w.c = (char *)product->c;
    w.c_stride = product->c_stride;
    w.c_rows = product->c_rows;
    w.m = (int)product->m;
    w.n = (int)product->n;
    w.depth = (int)product->k;
    w.m_tiles = sebp_div_ceil(product->m, TILE_M);
    w.n_tiles = sebp_div_ceil(product->n, how.width);
    w.m_first = w.m_tiles <= w.n_tiles; /* the smaller factor is read again, out of the cache */
    w.splits = how.splits;
    w.c_is_bf16 = product->c_dtype == SEBP_BF16;
    w.accumulate = product->accumulate;
    uintptr_t four_bytes = w.c_is_bf16 ? 8 : 16;
    w.c_in_fours = (uintptr_t)product->c % four_bytes == 0 && product->c_stride % 4 == 0;
    return w;
}

template <fence FENCE, int N, bool A_ACROSS, bool B_ACROSS>
cudaError_t launch(const work &w, int multiprocessors, cudaStream_t stream)
{
    const void *kernel = (const void *)multiply<N, A_ACROSS, B_ACROSS, FENCE>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (error != cudaSuccess)
        return error;
    int64_t tiles = w.m_tiles * w.n_tiles;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)w.splits;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    /* A block alone takes tile after tile; a cluster takes one. */
    config.gridDim =
        w.splits == 1 ? (unsigned)sebp_min(tiles, multiprocessors) : (unsigned)(tiles * w.splits);
    config.blockDim = THREADS;
    config.dynamicSmemBytes = SHARED_BYTES;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = w.splits > 1 ? 1 : 0;
    work copy = w;
    void *arguments[] = {&copy};
    return cudaLaunchKernelExC(&config, kernel, arguments);
}

template <fence FENCE, int N>
cudaError_t launch_width(const work &w, bool a_across, bool b_across, int multiprocessors,
                         cudaStream_t stream)
{
    if (a_across && b_across)
        return launch<FENCE, N, true, true>(w, multiprocessors, stream);
    if (a_across)
        return launch<FENCE, N, true, false>(w, multiprocessors, stream);
    if (b_across)
        return launch<FENCE, N, false, true>(w, multiprocessors, stream);
    return launch<FENCE, N, false, false>(w, multiprocessors, stream);
}

template <fence FENCE> sebp_status run(sebp_cuda *cuda, const sebp_product *product, shape how)
{
    work w = work_of(product, how);
    bool a_across = product->a.transposed, b_across = !product->b.transposed;
    cudaError_t error =
        how.width == 256
            ? launch_width<FENCE, 256>(w, a_across, b_across, cuda->multiprocessors, cuda->stream)
            : launch_width<FENCE, 128>(w, a_across, b_across, cuda->multiprocessors, cuda->stream);
    return sebp_cuda_check(cuda, error);
}

/* ---- which ---- */

/* x lies there as rows of `width` elements. */
bool lies_in_chunks(const sebp_operand &x, int64_t width)
{
    return x.dtype == SEBP_BF16 && (uintptr_t)x.data % 16 == 0 && x.stride % CHUNK == 0 &&
           width % CHUNK == 0;
}

bool fits(int64_t size)
{
    return size > 0 && size <= INT32_MAX - 512; /* with a tile beyond the end */
}

} // namespace
} // namespace matrix_unit

extern "C" bool sebp_cuda_takes_matrix_unit(const sebp_cuda *cuda, const sebp_product *product)
{
    using namespace matrix_unit;
    return cuda->capability == 90 && cuda->shared_bytes >= SHARED_BYTES && fits(product->m) &&
           fits(product->n) && fits(product->k) &&
           lies_in_chunks(product->a, product->a.transposed ? product->m : product->k) &&
           lies_in_chunks(product->b, product->b.transposed ? product->k : product->n) &&
           product->bias == nullptr && product->residual == nullptr &&
           product->activated == nullptr && product->before == nullptr;
}

extern "C" int64_t sebp_cuda_matrix_unit_bytes(const sebp_cuda *, const sebp_product *)
{
    return 0; /* a cluster's sums stay in its shared memory */
}

extern "C" sebp_status sebp_cuda_run_matrix_unit(sebp_cuda *cuda, const sebp_product *product,
                                                 void *)
{
    using namespace matrix_unit;
    return run<FENCE>(cuda, product, choose(product, cuda->multiprocessors));
}

#else /* the emulated GPU has no matrix units */

extern "C" bool sebp_cuda_takes_matrix_unit(const sebp_cuda *, const sebp_product *)
{
    return false;
}

extern "C" int64_t sebp_cuda_matrix_unit_bytes(const sebp_cuda *, const sebp_product *)
{
    return 0;
}

extern "C" sebp_status sebp_cuda_run_matrix_unit(sebp_cuda *, const sebp_product *, void *)
{
    return SEBP_ERROR_UNSUPPORTED;
}

#endif
