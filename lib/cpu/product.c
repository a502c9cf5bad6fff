/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file product.c
 * Products: each is planned once, for the library's own GEMM or for oneDNN, and then run.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "epilogue.h"
#include "operations.h"
#include "product.h"
#include "row_work.h"

enum {
    REUSES = 16, /* from so many on it pays to pack: to us and to oneDNN */
    PACKED_REUSES =
        4,       /* from so many on our own GEMM is faster where B is kept packed, transposed */
    NARROW = 16, /* columns of a tile of 16 registers, as AVX2 has */
    LARGE = 512  /* of a product's sizes */
};

/* What a plan holds for a CPU. */
typedef struct cpu_plan {
    enum { BY_NOBODY, BY_NATIVE, BY_ONEDNN } by; /* none is needed: C has no elements */
    int64_t scratch_bytes;
    union {
        sebp_native_plan native;
        sebp_onednn_plan onednn;
    } how;
} cpu_plan;

_Static_assert(sizeof(cpu_plan) <= SEBP_PLAN_BYTES, "a plan has no room for that of a CPU");

static cpu_plan *plan_of(sebp_plan *plan)
{
    return (cpu_plan *)(void *)plan->device;
}

/* Whether a copy of B that is kept saves what it would take to pack B. Of a B that is not transposed oneDNN
 * makes its own copy as fast. Whether there is room for a copy does not count: the same call is to have the
 * same bits whatever was called before. */
static bool gains_by_copy(const sebp_product *product)
{
    return product->packed_b != NULL && product->b.transposed && product->m >= PACKED_REUSES;
}

/* W is in the caches, or the product makes a dW, and there are too few rows or steps to be worth packing. */
static bool has_few_reuses(const sebp_cpu *cpu, const sebp_product *product)
{
    if (product->a.transposed)
        return product->k < REUSES;
    return product->m <= (product->b.transposed ? REUSES - 1 : REUSES) &&
           !sebp_cpu_streams(cpu, product->n * product->k * 4);
}

/* All sizes are large, and nothing has to be gathered or transposed for oneDNN. */
static bool is_large_and_dense(const sebp_product *product)
{
    return product->a.rows == NULL && product->b.rows == NULL && product->c_rows == NULL &&
           !product->b.transposed &&
           sebp_min(product->m, sebp_min(product->n, product->k)) >= LARGE;
}

/*
 * Whether oneDNN should do a product if it can. Where the choice is ours, this is the model. Of an element of
 * W that `reuses` rows go through, or of dW to which as many steps are added,
 *
 *     our own GEMM takes  reuses + p    multiply-adds: p to pack it, or to find it in C
 *     oneDNN takes        reuses        below REUSES, where it multiplies W as it lies
 *                         reuses + p'   from there on, where it packs W as we do
 *
 * So it gains 1 + p / reuses where the reuses are few. For a W that is not in the caches both wait. From
 * REUSES on p' is not below p: ours is as fast, or faster. REUSES is oneDNN's own limit, which shows in
 * versions 2.6 and 3.2: where W is transposed its time doubles between 15 rows and 16. A W that is not
 * transposed gains at 16 rows too, of which our second tile has but two. Narrow tiles are up to a quarter
 * slower than oneDNN's in large products, so those are its own as well. It has no bf16: there it is faster
 * for few rows alone, and pays for each new number of them.
 *
 * The model knows the product, the size of the last cache and the kernels, and no clock: a rate that is
 * measured differs from run to run, and would change results by rounding.
 */
static bool prefers_onednn(const sebp_cpu *cpu, const sebp_product *product,
                           sebp_arithmetic arithmetic)
{
    if (cpu->gemm != SEBP_GEMM_AUTO)
        return cpu->gemm == SEBP_GEMM_ONEDNN;
    if (arithmetic.by_bf16)
        return false;
    const bool is_narrow = cpu->kernels->shape_f32.cols <= NARROW;
    return (has_few_reuses(cpu, product) && !gains_by_copy(product)) ||
           (is_narrow && is_large_and_dense(product));
}

/* Of a product by our own GEMM, where that is not said by `reason`: what keeps oneDNN away. */
static const char *native_path(const sebp_product *product, sebp_arithmetic arithmetic,
                               bool is_packed, const char *reason)
{
    static const char *const paths[2][SEBP_MAX_PARTS] = {
        {"native:medium", "native:high", "native:split"},
        {"native:medium-packed", "native:high-packed", "native:split-packed"}};
    bool has_f32 = product->a.dtype == SEBP_F32 || product->b.dtype == SEBP_F32;
    if (has_f32 && arithmetic.by_bf16)
        return paths[is_packed][arithmetic.parts - 1];
    return is_packed ? "native:packed" : reason;
}

/* Whether a product takes more scratch memory than there is. */
static bool is_larger(const sebp_cpu *cpu, const cpu_plan *plan)
{
    return plan->scratch_bytes + cpu->reserved_bytes > cpu->scratch_bytes;
}

sebp_status sebp_cpu_plan_product(void *device, sebp_plan *plan)
{
    sebp_cpu *cpu = device;
    const sebp_product *product = &plan->product;
    cpu_plan *made = plan_of(plan);
    const sebp_arithmetic arithmetic = sebp_choose_arithmetic(cpu, product);
    made->by = BY_NATIVE;
    plan->path = cpu->gemm == SEBP_GEMM_NATIVE ? "native:asked" : "native:auto";
    if (product->m == 0 || product->n == 0) {
        made->by = BY_NOBODY;
        plan->path = "none:empty";
        return SEBP_SUCCESS;
    }
#ifdef SEBP_HAVE_ONEDNN
    if (prefers_onednn(cpu, product, arithmetic)) {
        plan->path = sebp_onednn_plan_product(cpu, product, &made->how.onednn);
        if (plan->path == NULL) {
            made->by = BY_ONEDNN;
            made->scratch_bytes = sebp_onednn_scratch(&made->how.onednn);
            plan->path = cpu->gemm == SEBP_GEMM_ONEDNN ? "onednn:asked" : "onednn:auto";
        }
    }
#else
    (void)prefers_onednn;
#endif
    if (made->by == BY_NATIVE) {
        sebp_native_plan_product(cpu, product, arithmetic, &made->how.native);
        plan->path = native_path(product, arithmetic, made->how.native.copy != NULL, plan->path);
        made->scratch_bytes = sebp_native_scratch(&made->how.native);
    }
    if (cpu->scratch_is_settled && is_larger(cpu, made)) {
        plan->path = "a product was not planned before the first one ran";
        return SEBP_ERROR_BACKEND;
    }
    return sebp_cpu_scratch(cpu, made->scratch_bytes) != NULL ? SEBP_SUCCESS : SEBP_ERROR_MEMORY;
}

#ifdef SEBP_HAVE_ONEDNN

/* The epilogue of a product that is done, over all threads. */
typedef struct finish_job {
    const sebp_kernels *kernels;
    const sebp_product *product;
    int64_t pieces;
} finish_job;

static void finish_piece(void *work, int64_t piece)
{
    const finish_job *job = work;
    int64_t m = job->product->m;
    sebp_cpu_finish(job->kernels, job->product, m * piece / job->pieces,
                    m * (piece + 1) / job->pieces, 0, job->product->n);
}

static sebp_status run_onednn(sebp_cpu *cpu, sebp_plan *plan, void *scratch)
{
    const sebp_product *product = &plan->product;
    sebp_cpu_bind_now(cpu);
    sebp_status status =
        sebp_onednn_product(cpu, product, &plan_of(plan)->how.onednn, scratch, &plan->path);
    if (status == SEBP_SUCCESS && sebp_has_epilogue(product)) {
        finish_job job = {cpu->kernels, product, sebp_cpu_pieces(cpu, product->m, product->n)};
        sebp_cpu_parallel(cpu, job.pieces, finish_piece, &job);
    }
    return status;
}

#endif

sebp_status sebp_cpu_run_product(void *device, sebp_plan *plan)
{
    sebp_cpu *cpu = device;
    const cpu_plan *made = plan_of(plan);
    if (made->by == BY_NOBODY)
        return SEBP_SUCCESS;
    if (is_larger(cpu, made)) {
        plan->path = "a product was not planned"; /* what a method has in scratch would be lost */
        return SEBP_ERROR_BACKEND;
    }
    cpu->scratch_is_settled = cpu->reserved_bytes > 0;
    void *scratch = sebp_cpu_scratch(cpu, made->scratch_bytes);
#ifdef SEBP_HAVE_ONEDNN
    if (made->by == BY_ONEDNN)
        return run_onednn(cpu, plan, scratch);
#endif
    sebp_native_product(cpu, &made->how.native, scratch);
    return SEBP_SUCCESS;
}
