/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file packed.c
 * Copies of a factor B that are kept packed from product to product. A copy is of use to a product whose
 * packing would write the same bits to the same places: the same factor, kernel, parts and blocks of the
 * depth. None of these depends on the rows of A, on threads or on the workspace, but the arithmetic may.
 *
 * A plan finds its copy, or makes room for one. The first run packs it: on the way, where a chunk has all
 * rows of C, or beforehand, where several chunks would pack the same slivers.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "operations.h"
#include "product.h"

enum { LARGE_PAGE = 2 << 20, LINE = 64 };

struct sebp_packed_copy {
    sebp_packed_copy *next;
    /* What copies of a matrix differ in: the next five. All else follows from them. */
    bool transposed, by_bf16, is_checked;
    int parts;
    int64_t units;   /* to a block of the depth */
    bool is_planned; /* since the matrix changed last: a plan may hold it */
    bool is_filled;
    int64_t slivers, blocks; /* of columns, and of the depth */
    int64_t bytes;
    float *data;  /* block after block, sliver after sliver, part after part */
    bool *finite; /* of each sliver of each block */
};

struct sebp_packed {
    int64_t max_bytes, bytes;
    sebp_packed_copy *first;
};

sebp_status sebp_cpu_packed_make(void *device, int64_t max_bytes, sebp_packed **packed)
{
    (void)device;
    *packed = calloc(1, sizeof **packed);
    if (*packed == NULL)
        return SEBP_ERROR_MEMORY;
    (*packed)->max_bytes = max_bytes;
    return SEBP_SUCCESS;
}

void sebp_cpu_packed_forget(sebp_packed *packed)
{
    for (sebp_packed_copy *copy = packed->first; copy != NULL; copy = copy->next)
        copy->is_planned = copy->is_filled = false;
}

int64_t sebp_cpu_packed_bytes(const sebp_packed *packed)
{
    return packed->bytes;
}

/* Frees all copies, or those alone that no plan has asked for since the matrix changed. */
static void drop_copies(sebp_packed *packed, bool all)
{
    sebp_packed_copy **at = &packed->first;
    while (*at != NULL) {
        sebp_packed_copy *copy = *at;
        if (copy->is_planned && !all) {
            at = &copy->next;
            continue;
        }
        *at = copy->next;
        packed->bytes -= copy->bytes;
        free(copy->data);
        free(copy);
    }
}

void sebp_cpu_packed_free(void *device, sebp_packed *packed)
{
    (void)device;
    drop_copies(packed, true);
    free(packed);
}

static bool matches(const sebp_packed_copy *copy, const sebp_packed_copy *wanted)
{
    return copy->transposed == wanted->transposed && copy->by_bf16 == wanted->by_bf16 &&
           copy->is_checked == wanted->is_checked && copy->parts == wanted->parts &&
           copy->units == wanted->units;
}

/* Pages as large as there are: a product of few rows reads a copy once, and would wait for addresses. */
static void ask_for_large_pages(void *data, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    if (bytes >= LARGE_PAGE)
        madvise(data, (size_t)(bytes / LARGE_PAGE * LARGE_PAGE), MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

/* Of the copies that have to stay. */
static int64_t planned_bytes(const sebp_packed *packed)
{
    int64_t bytes = 0;
    for (const sebp_packed_copy *copy = packed->first; copy != NULL; copy = copy->next)
        bytes += copy->is_planned ? copy->bytes : 0;
    return bytes;
}

/* Memory for the slivers and, behind them, what is known of each. */
static bool allocate(sebp_packed *packed, sebp_packed_copy *copy, int64_t sliver_units)
{
    int64_t count, units, bytes;
    void *data = NULL;
    if (__builtin_mul_overflow(copy->slivers, copy->blocks, &count) ||
        __builtin_mul_overflow(count, sliver_units, &units) ||
        __builtin_mul_overflow(units, (int64_t)sizeof(float), &bytes) ||
        __builtin_add_overflow(bytes, count, &copy->bytes))
        return false;
    if (copy->bytes > packed->max_bytes - planned_bytes(packed))
        return false;
    if (copy->bytes > packed->max_bytes - packed->bytes)
        drop_copies(packed, false);
    const size_t alignment = copy->bytes >= LARGE_PAGE ? LARGE_PAGE : LINE;
    if (posix_memalign(&data, alignment, (size_t)copy->bytes) != 0)
        return false;
    ask_for_large_pages(data, copy->bytes);
    copy->data = data;
    copy->finite = (bool *)data + bytes;
    return true;
}

sebp_packed_copy *sebp_cpu_find_copy(const sebp_native_plan *plan)
{
    const sebp_product *product = plan->product;
    sebp_packed *packed = product->packed_b;
    if (packed == NULL)
        return NULL;
    const sebp_tile_shape *shape = plan->shape;
    const sebp_packed_copy wanted = {
        .transposed = product->b.transposed,
        .by_bf16 = plan->by_bf16,
        .is_checked = plan->b.is_checked,
        .parts = plan->b.parts,
        .units = plan->units,
        .is_planned = true,
        .slivers = sebp_div_ceil(product->n, shape->cols),
        .blocks = sebp_div_ceil(sebp_div_ceil(product->k, shape->unit_elements), plan->units)};
    for (sebp_packed_copy *copy = packed->first; copy != NULL; copy = copy->next) {
        if (matches(copy, &wanted)) {
            copy->is_planned = true;
            return copy;
        }
    }
    sebp_packed_copy *made = malloc(sizeof *made);
    if (made == NULL)
        return NULL;
    *made = wanted;
    if (!allocate(packed, made, plan->b.sliver_units)) {
        free(made);
        return NULL;
    }
    made->next = packed->first;
    packed->first = made;
    packed->bytes += made->bytes;
    return made;
}

/* The index of a sliver: that of column j, and of the block of the depth that begins at `at`. */
static int64_t sliver_at(const sebp_native_plan *plan, int64_t at, int64_t j)
{
    const int64_t block = at / (plan->units * plan->shape->unit_elements);
    return block * plan->copy->slivers + j / plan->shape->cols;
}

float *sebp_cpu_copy_sliver(const sebp_native_plan *plan, int64_t at, int64_t j)
{
    return plan->copy->data + sliver_at(plan, at, j) * plan->b.sliver_units;
}

bool *sebp_cpu_copy_finite(const sebp_native_plan *plan, int64_t at, int64_t j)
{
    return plan->copy->is_checked ? plan->copy->finite + sliver_at(plan, at, j) : NULL;
}

bool sebp_cpu_copy_is_filled(const sebp_packed_copy *copy)
{
    return copy->is_filled;
}

void sebp_cpu_mark_copy_filled(sebp_packed_copy *copy)
{
    copy->is_filled = true;
}

/* A copy being made. */
typedef struct copy_job {
    const sebp_native_plan *plan;
    char *scratch;
} copy_job;

static void copy_share(void *work, int64_t worker)
{
    const copy_job *job = work;
    const sebp_native_plan *plan = job->plan;
    const int64_t slivers = sebp_max(SEBP_COPIED_SLIVERS, plan->b_group);
    const int64_t cols = slivers * plan->shape->cols, n = plan->product->n, k = plan->product->k;
    const int64_t k_block = plan->units * plan->shape->unit_elements;
    const int64_t groups = sebp_div_ceil(n, cols), all = groups * plan->copy->blocks;
    sebp_native_room room;
    sebp_native_lay_out(plan, job->scratch + worker * plan->worker_bytes, &room);
    for (int64_t i = all * worker / plan->workers; i < all * (worker + 1) / plan->workers; i++) {
        const int64_t at = i / groups * k_block, j = i % groups * cols;
        sebp_pack_lanes(plan->kernels, &plan->b, sebp_cpu_copy_sliver(plan, at, j), j,
                        sebp_min(cols, n - j), at, sebp_min(k_block, k - at),
                        sebp_cpu_copy_finite(plan, at, j), room.converted);
    }
}

void sebp_cpu_fill_copy(sebp_cpu *cpu, const sebp_native_plan *plan, void *scratch)
{
    copy_job job = {plan, scratch};
    if (plan->copy->is_filled)
        return;
    sebp_cpu_parallel(cpu, plan->workers, copy_share, &job);
    plan->copy->is_filled = true;
}
