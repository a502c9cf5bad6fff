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

/* ---- how ---- */

/** The width of the tiles, 128, 192 or 256; how many of them single blocks make; and the blocks in a
 * cluster for each of the others. */
struct shape {
    int width, splits;
    int64_t alone;
};

/** What a product costs, in microseconds: fitted to times of 20 products on an H200, of which it chooses
 * a shape within 4% of the best. */
struct costs {
    double step, ends; /* of 64 of the depth, and of a tile's beginning and end */
};

costs costs_of(const sebp_product *product, int width)
{
    double step = width == 256 ? 0.728 : width == 192 ? 0.574 : 0.443;
    double stored = (product->c_dtype == SEBP_BF16 ? 1 : 2) * (product->accumulate ? 2 : 1);
    return {step, 1.81 * width / 128 * stored};
}

constexpr double LAUNCH = 2.2, SUM_OF_CLUSTER = 4.6;

double time_of_rounds(const sebp_product *product, int64_t tiles, int width, int splits,
                      int64_t clusters_at_once)
{
    if (tiles == 0)
        return 0;
    costs c = costs_of(product, width);
    int64_t steps = sebp_div_ceil(sebp_div_ceil(product->k, TILE_DEPTH), splits);
    return LAUNCH + (double)sebp_div_ceil(tiles, clusters_at_once) *
                        ((double)steps * c.step + c.ends + (splits > 1 ? SUM_OF_CLUSTER : 0));
}

double time_of(const sebp_cuda *cuda, const sebp_product *product, shape how)
{
    int64_t tiles = sebp_div_ceil(product->m, TILE_M) * sebp_div_ceil(product->n, how.width);
    if (how.splits == 1)
        return time_of_rounds(product, tiles, how.width, 1, cuda->multiprocessors);
    return time_of_rounds(product, how.alone, how.width, 1, cuda->multiprocessors) +
           time_of_rounds(product, tiles - how.alone, how.width, how.splits,
                          cuda->clusters_at_once[how.splits]);
}

shape choose(const sebp_cuda *cuda, const sebp_product *product)
{
    const int64_t min_steps = 4;   /* of a block */
    const int64_t many_rounds = 8; /* a last one that is not full costs little */
    int64_t most = sebp_div_ceil(product->k, TILE_DEPTH) / min_steps;
    shape best = {128, 1, 0};
    auto look_at = [&](shape how) {
        if (time_of(cuda, product, how) < time_of(cuda, product, best))
            best = how;
    };
    for (int width = 128; width <= 256; width += 64) {
        int64_t tiles = sebp_div_ceil(product->m, TILE_M) * sebp_div_ceil(product->n, width);
        int64_t rounds = tiles / cuda->multiprocessors;
        look_at({width, 1, 0});
        for (int splits = 2; splits <= sebp_min(most, MAX_SPLITS) && rounds < many_rounds;
             splits++) {
            if (cuda->clusters_at_once[splits] == 0)
                continue;
            look_at({width, splits, 0});
            look_at({width, splits, rounds * cuda->multiprocessors});
        }
    }
    return best;
}

/* ---- the launch ---- */

operand operand_of(const sebp_operand &x, int64_t size)
{
    return {(const char *)x.data, x.stride * 2, x.rows, (int)size};
}

/* C and all that goes into it lie there in whole vectors of 16 bytes, the bias in pairs. */
finish finish_of(const sebp_product *product)
{
    const int64_t element = product->c_dtype == SEBP_BF16 ? 2 : 4;
    const uintptr_t pair = product->bias_dtype == SEBP_BF16 ? 4 : 8;
    if ((uintptr_t)product->c % 16 != 0 || product->c_stride * element % 16 != 0 ||
        product->n * element % 16 != 0 || product->residual != nullptr ||
        product->activated != nullptr || product->before != nullptr)
        return finish::ANY;
    if (product->bias == nullptr)
        return product->accumulate ? finish::ACCUMULATE : finish::STORE;
    return product->accumulate || (uintptr_t)product->bias % pair != 0 ? finish::ANY
                                                                       : finish::ADD_BIAS;
}

work work_of(const sebp_product *product, int width)
{
    work w = {};
    w.a = operand_of(product->a, product->m);
    w.b = operand_of(product->b, product->n);
    w.to = sebp_cuda_epilogue_of(product);
    w.how = finish_of(product);
    w.m = (int)product->m;
    w.n = (int)product->n;
    w.depth = (int)product->k;
    w.m_tiles = sebp_div_ceil(product->m, TILE_M);
    w.n_tiles = sebp_div_ceil(product->n, width);
    w.m_first = w.m_tiles <= w.n_tiles; /* the smaller factor is read again, out of the cache */
    return w;
}

/** The launch of a kernel with clusters of `splits` blocks; the attributes are part of it. */
struct launch_config {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};

    launch_config(int64_t blocks, int splits, cudaStream_t stream, bool begins_early)
    {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = (unsigned)splits;
        attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        config.gridDim = (unsigned)blocks;
        config.blockDim = THREADS;
        config.dynamicSmemBytes = SHARED_BYTES;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = begins_early ? 2 : 1;
    }
};

cudaError_t let_have_shared_memory(const void *kernel)
{
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
}

/* How many clusters of each size run at once: a cluster's blocks are on SMs of one group, and groups
 * are not of one size. All kernels need the same. */
cudaError_t count_clusters(sebp_cuda *cuda)
{
    const void *kernel = (const void *)multiply<256, false, false>;
    cudaError_t error = let_have_shared_memory(kernel);
    for (int splits = 1; splits <= MAX_SPLITS && error == cudaSuccess; splits++) {
        launch_config with((int64_t)splits * cuda->multiprocessors, splits, nullptr, false);
        error =
            cudaOccupancyMaxActiveClusters(&cuda->clusters_at_once[splits], kernel, &with.config);
    }
    return error;
}

template <int N, bool A_ACROSS, bool B_ACROSS>
cudaError_t launch(sebp_cuda *cuda, work w, shape how)
{
    const void *kernel = (const void *)multiply<N, A_ACROSS, B_ACROSS>;
    const int64_t tiles = w.m_tiles * w.n_tiles, alone = how.splits == 1 ? tiles : how.alone;
    void *arguments[] = {&w};
    cudaError_t error = let_have_shared_memory(kernel);
    if (error == cudaSuccess && alone > 0) { /* a block takes tile after tile */
        w.splits = 1;
        w.end_tile = alone;
        launch_config with(sebp_min(alone, cuda->multiprocessors), 1, cuda->stream,
                           sebp_cuda_begins_early(cuda));
        error = cudaLaunchKernelExC(&with.config, kernel, arguments);
    }
    if (error == cudaSuccess &&
        tiles > alone) { /* a cluster takes one, and need not wait for others */
        w.splits = how.splits;
        w.first_tile = alone;
        w.end_tile = tiles;
        launch_config with((tiles - alone) * how.splits, how.splits, cuda->stream,
                           sebp_cuda_begins_early(cuda) || alone > 0);
        error = cudaLaunchKernelExC(&with.config, kernel, arguments);
    }
    return error;
}

template <int N> cudaError_t launch_width(sebp_cuda *cuda, const sebp_product *product, shape how)
{
    work w = work_of(product, N);
    bool a_across = product->a.transposed, b_across = !product->b.transposed;
    if (a_across && b_across)
        return launch<N, true, true>(cuda, w, how);
    if (a_across)
        return launch<N, true, false>(cuda, w, how);
    if (b_across)
        return launch<N, false, true>(cuda, w, how);
    return launch<N, false, false>(cuda, w, how);
}

sebp_status run(sebp_cuda *cuda, const sebp_product *product, shape how)
{
    cudaError_t error = how.width == 256   ? launch_width<256>(cuda, product, how)
                        : how.width == 192 ? launch_width<192>(cuda, product, how)
                                           : launch_width<128>(cuda, product, how);
    return sebp_cuda_check(cuda, error);
}

/* ---- which ---- */

/* x lies there as rows of `width` elements. Listed rows are counted in 32 bits: with rows this far apart
 * more of them would take 512 GiB. */
bool lies_in_chunks(const sebp_operand &x, int64_t width)
{
    const int64_t min_listed_stride = 64;
    return (x.rows == nullptr || x.stride >= min_listed_stride) && x.dtype == SEBP_BF16 &&
           (uintptr_t)x.data % 16 == 0 && x.stride % CHUNK == 0 && x.stride <= INT32_MAX &&
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
           lies_in_chunks(product->b, product->b.transposed ? product->k : product->n);
}

extern "C" sebp_status sebp_cuda_run_matrix_unit(sebp_cuda *cuda, const sebp_product *product)
{
    using namespace matrix_unit;
    if (cuda->clusters_at_once[1] == 0) {
        sebp_status status = sebp_cuda_check(cuda, count_clusters(cuda));
        if (status != SEBP_SUCCESS)
            return status;
    }
    return run(cuda, product, choose(cuda, product));
}

#else /* the emulated GPU has no matrix units */

extern "C" bool sebp_cuda_takes_matrix_unit(const sebp_cuda *, const sebp_product *)
{
    return false;
}

extern "C" sebp_status sebp_cuda_run_matrix_unit(sebp_cuda *, const sebp_product *)
{
    return SEBP_ERROR_UNSUPPORTED;
}

#endif
