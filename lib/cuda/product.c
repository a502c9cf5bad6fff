/* SPDX-License-Identifier: Apache-2.0 */
/** @file product.c Products on NVIDIA GPUs: which kernel does one, and how it is cut. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "matrix_unit.h"
#include "operations.h"
#include "product.h"

enum { COUNTERS_ALIGNMENT = 256 };

/* ---- cutting ---- */

enum {
    MAX_SHARES = 16,
    START_STEPS = 6, /* what a block takes for its first slices and for its sums, in steps */
    ADD_STEPS = 1    /* and what the last one takes for each share that it adds */
};

/* About how long `blocks` of `steps` take, in tenths of the time that a step takes where blocks are in
 * all slots. Where no more than half of them are taken a block has more of its multiprocessor. */
static int64_t time_of(int64_t blocks, int64_t steps, int64_t slots)
{
    const int64_t last = blocks % slots;
    const int64_t waves = blocks / slots * 10 + (last == 0 ? 0 : 2 * last <= slots ? 7 : 10);
    return waves * (steps + START_STEPS);
}

sebp_cuda_cut sebp_cuda_cut_product(const sebp_product *product, int64_t tile_rows,
                                    int64_t tile_cols, int64_t step, int64_t slots,
                                    int64_t min_depth)
{
    sebp_cuda_cut made = {sebp_div_ceil(product->m, tile_rows),
                          sebp_div_ceil(product->n, tile_cols), 1, product->k};
    const int64_t tiles = made.tiles_down * made.tiles_across;
    const int64_t steps = sebp_max(sebp_div_ceil(product->k, step), 1);
    const int64_t max_shares = sebp_min(sebp_max(product->k / min_depth, 1), MAX_SHARES);
    int64_t min_time = INT64_MAX;
    for (int64_t shares = 1; shares <= max_shares; shares++) {
        const int64_t share_steps = sebp_div_ceil(steps, shares);
        const int64_t time =
            time_of(tiles * sebp_div_ceil(steps, share_steps), share_steps, slots) +
            (shares > 1 ? 10 * ADD_STEPS * shares : 0);
        if (time < min_time) {
            min_time = time;
            made.share_depth = share_steps * step;
            made.shares = sebp_div_ceil(steps, share_steps);
        }
    }
    return made;
}

int64_t sebp_cuda_counter_bytes(const sebp_cuda_cut *cut)
{
    const int64_t bytes = cut->tiles_down * cut->tiles_across * (int64_t)sizeof(unsigned);
    return cut->shares > 1 ? sebp_round_up(bytes, COUNTERS_ALIGNMENT) : 0;
}

int64_t sebp_cuda_cut_bytes(const sebp_cuda_cut *cut, int64_t tile_elements)
{
    const int64_t tiles = cut->tiles_down * cut->tiles_across;
    if (cut->shares == 1)
        return 0;
    return sebp_cuda_counter_bytes(cut) +
           cut->shares * tiles * tile_elements * (int64_t)sizeof(float);
}

sebp_status sebp_cuda_clear_counters(sebp_cuda *cuda, const sebp_cuda_cut *cut, void *scratch)
{
    const int64_t bytes = sebp_cuda_counter_bytes(cut);
    if (bytes == 0)
        return SEBP_SUCCESS;
    return sebp_cuda_check(cuda, cudaMemsetAsync(scratch, 0, (size_t)bytes, cuda->stream));
}

/* ---- the table's operations ---- */

typedef enum way {
    WAY_NOTHING,
    WAY_PLAIN,
    WAY_TENSOR,
    WAY_MATRIX_UNIT,
    WAY_CUBLAS,
    WAY_GATHERED
} way;

/* What a plan remembers. */
typedef struct notes {
    way way;
    sebp_cuda_cut cut;
    sebp_plain_cut plain;
    sebp_cublas_plan cublas;
    int64_t scratch_bytes;
} notes;

_Static_assert(sizeof(notes) <= SEBP_PLAN_BYTES, "the notes do not fit in a plan");

/* By the library's own kernels. */
static void settle_native(const sebp_cuda *cuda, const sebp_product *product, notes *settled,
                          const char **path)
{
    settled->scratch_bytes = 0;
    if (sebp_cuda_takes_matrix_unit(cuda, product)) {
        settled->way = WAY_MATRIX_UNIT;
        *path = "cuda:wgmma";
    } else if (sebp_cuda_takes_tensor(product)) {
        settled->way = WAY_TENSOR;
        settled->cut = sebp_cuda_cut_tensor(cuda, product);
        settled->scratch_bytes = sebp_cuda_tensor_bytes(&settled->cut);
        *path = product->a.dtype == SEBP_BF16 ? "cuda:tensor" : "cuda:tf32";
    } else {
        settled->way = WAY_PLAIN;
        settled->plain = sebp_cuda_cut_plain(cuda, product);
        settled->scratch_bytes = sebp_cuda_plain_bytes(&settled->plain);
        *path = "cuda:plain";
    }
}

/* What cuBLASLt can do, whole matrices as they lie, it does faster (doc/performance.md). */
static void settle(sebp_cuda *cuda, const sebp_product *product, notes *settled, const char **path)
{
    if (product->m == 0 || product->n == 0) {
        *path = "nothing";
    } else if (cuda->gemm == SEBP_GEMM_AUTO && sebp_cublas_takes(cuda, product) &&
               sebp_cublas_plan_product(cuda, product, &settled->cublas)) {
        settled->way = WAY_CUBLAS;
        settled->scratch_bytes = settled->cublas.scratch_bytes;
        *path = "cuda:cublaslt";
    } else if (cuda->gemm == SEBP_GEMM_AUTO &&
               sebp_cuda_plan_gathered(cuda, product, &settled->cublas, &settled->scratch_bytes)) {
        settled->way = WAY_GATHERED;
        *path = "cuda:gathered";
    } else {
        settle_native(cuda, product, settled, path);
    }
}

/* Where there is no room for scratch memory each tile is summed by one block. */
static void settle_without_scratch(const sebp_cuda *cuda, const sebp_product *product,
                                   notes *settled, const char **path)
{
    settle_native(cuda, product, settled, path);
    settled->cut.shares = 1;
    settled->cut.share_depth = product->k;
    sebp_cuda_plain_whole(&settled->plain);
    settled->scratch_bytes = 0;
}

sebp_status sebp_cuda_plan_product(void *device, sebp_plan *plan)
{
    sebp_cuda *cuda = device;
    notes *settled = (notes *)plan->device;
    *settled = (notes){.way = WAY_NOTHING};
    plan->path = cuda->why;
    sebp_status status = sebp_cuda_check_current(cuda);
    if (status != SEBP_SUCCESS)
        return status;
    settle(cuda, &plan->product, settled, &plan->path);
    if (settled->scratch_bytes > 0)
        sebp_cuda_scratch(cuda, settled->scratch_bytes, &status);
    if (status == SEBP_ERROR_MEMORY) {
        settle_without_scratch(cuda, &plan->product, settled, &plan->path);
        status = SEBP_SUCCESS;
    }
    if (status != SEBP_SUCCESS)
        plan->path = cuda->why;
    return status;
}

sebp_status sebp_cuda_run_product(void *device, sebp_plan *plan)
{
    sebp_cuda *cuda = device;
    notes settled = *(const notes *)plan->device;
    void *scratch = NULL;
    sebp_status status = SEBP_SUCCESS;
    if (settled.scratch_bytes > 0)
        scratch = sebp_cuda_scratch(cuda, settled.scratch_bytes, &status);
    /* What the plan took is lost where an operation in between found no memory for more. */
    if (status == SEBP_ERROR_MEMORY) {
        settle_without_scratch(cuda, &plan->product, &settled, &plan->path);
        status = SEBP_SUCCESS;
    }
    if (status == SEBP_SUCCESS && settled.way == WAY_CUBLAS)
        status = sebp_cublas_run_product(cuda, &plan->product, &settled.cublas, scratch);
    else if (status == SEBP_SUCCESS && settled.way == WAY_GATHERED)
        status = sebp_cuda_run_gathered(cuda, &plan->product, &settled.cublas, scratch);
    else if (status == SEBP_SUCCESS && settled.way == WAY_MATRIX_UNIT)
        status = sebp_cuda_run_matrix_unit(cuda, &plan->product);
    else if (status == SEBP_SUCCESS && settled.way == WAY_TENSOR)
        status = sebp_cuda_run_tensor(cuda, &plan->product, &settled.cut, scratch);
    else if (status == SEBP_SUCCESS && settled.way == WAY_PLAIN)
        status = sebp_cuda_run_plain(cuda, &plan->product, &settled.plain, scratch);
    if (status != SEBP_SUCCESS)
        plan->path = cuda->why;
    return status;
}

/* ---- packed copies: a GPU reads matrices as they lie ---- */

sebp_status sebp_cuda_packed_make(void *device, int64_t max_bytes, sebp_packed **packed)
{
    (void)device;
    (void)max_bytes;
    *packed = NULL;
    return SEBP_SUCCESS;
}

void sebp_cuda_packed_forget(sebp_packed *packed)
{
    (void)packed;
}

int64_t sebp_cuda_packed_bytes(const sebp_packed *packed)
{
    (void)packed;
    return 0;
}

void sebp_cuda_packed_free(void *device, sebp_packed *packed)
{
    (void)device;
    (void)packed;
}
