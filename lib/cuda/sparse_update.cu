/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sparse_update.cu
 * W += out^T S in of a sparse S, the update of SparseGrad: one product of S and a dense matrix by
 * lines of S, its rows or its columns, and a dense product of what that gives. The host waits once,
 * for how many lines of each kind have elements.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "operations.h"
#include "packs.cuh"
#include "prefix.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / SEBP_WARP;
constexpr int LIST_THREADS = 1024;
constexpr int PACK = SEBP_PACKED<float>;
constexpr int ROWS_AT_ONCE = 8;                /* of the dense matrix, read together */
constexpr int COLS_AT_ONCE = SEBP_WARP * PACK; /* of a warp */
constexpr double SORT_WORK = 16;               /* multiply-adds that take as long as a comparison */

using counter = unsigned long long; /* what atomicAdd() takes */

/* ---- lines ---- */

/* What the host learns of S's rows, or of its columns: those that have elements. */
struct line_facts {
    int64_t count, first, last;
};

/* The lines of a matrix, of which there are `total`, and those that have elements: line number i,
 * lines[i], has the elements start[i] to start[i + 1] - 1 of the order. */
struct line_list {
    int64_t total;
    counter *counts; /* of each line: its elements; then the number of those before it */
    int64_t *lines, *start;
    line_facts *facts; /* in memory of the host's */
};

__global__ void __launch_bounds__(THREADS)
    count_kernel(const int64_t *indices, int64_t count, int64_t cols, counter *row_counts,
                 counter *col_counts)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count)
        return;
    int64_t row = indices[i] / cols;
    atomicAdd(&row_counts[row], (counter)1);
    atomicAdd(&col_counts[indices[i] - row * cols], (counter)1);
}

/* A block for the rows, one for the columns. */
__global__ void __launch_bounds__(LIST_THREADS)
    list_kernel(line_list rows, line_list cols, int64_t count)
{
    __shared__ int64_t room[SEBP_WARP];
    line_list list = blockIdx.x == 0 ? rows : cols;
    int64_t each = (list.total + LIST_THREADS - 1) / LIST_THREADS;
    int64_t at = (int)threadIdx.x * each, end = at + each;
    if (end > list.total)
        end = list.total;
    int64_t elements = 0, lines = 0;
    for (int64_t i = at; i < end; i++) {
        elements += (int64_t)list.counts[i];
        lines += list.counts[i] != 0;
    }
    elements = sebp_block_before(elements, room);
    lines = sebp_block_before(lines, room);
    for (; at < end; at++) {
        int64_t its = (int64_t)list.counts[at];
        list.counts[at] = (counter)elements;
        if (its == 0)
            continue;
        if (lines == 0)
            list.facts->first = at;
        list.lines[lines] = at;
        list.start[lines++] = elements;
        elements += its;
        if (elements == count) {
            list.facts->last = at;
            list.facts->count = lines;
            list.start[lines] = count;
        }
    }
}

/* The elements of each column, in any order. `next`: where the next one of a column goes. */
__global__ void __launch_bounds__(THREADS)
    place_kernel(const int64_t *indices, int64_t count, int64_t cols, counter *next, int64_t *order)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        order[atomicAdd(&next[indices[i] % cols], (counter)1)] = i;
}

/* Sorts the elements of each line: sums are made in the order of S. A warp to each line, where an
 * element goes behind as many as are smaller. */
__global__ void __launch_bounds__(THREADS)
    sort_kernel(const int64_t *start, int64_t lines, const int64_t *order, int64_t *sorted)
{
    int64_t line = (int64_t)blockIdx.x * WARPS + (int)threadIdx.x / SEBP_WARP;
    if (line >= lines)
        return;
    int64_t first = start[line], end = start[line + 1];
    for (int64_t i = first + (int)threadIdx.x % SEBP_WARP; i < end; i += SEBP_WARP) {
        int64_t at = first;
        for (int64_t j = first; j < end; j++)
            at += order[j] < order[i];
        sorted[at] = order[i];
    }
}

/* ---- sparse times dense ---- */

/* S by lines; `order` NULL: as its elements lie, by rows. */
struct sparse_factor {
    const int64_t *indices, *order, *start;
    const float *values;
    int64_t cols, lines;
    bool by_cols;
};

/* to (lines x n) = S by lines times `from`, of whose rows an element needs that of its column, or
 * of its row. A warp does some columns of a line; its threads look at an element each, and then all
 * at the row of one after the other. */
__global__ void __launch_bounds__(THREADS)
    multiply_kernel(sparse_factor s, sebp_view<const float> from, bool from_is_packed,
                    sebp_view<float> to, bool to_is_packed, int64_t n)
{
    int lane = (int)threadIdx.x % SEBP_WARP;
    int64_t line = (int64_t)blockIdx.x * WARPS + (int)threadIdx.x / SEBP_WARP;
    if (line >= s.lines)
        return;
    int64_t first = s.start[line], end = s.start[line + 1];
    for (int64_t col = (int64_t)blockIdx.y * COLS_AT_ONCE; col < n;
         col += (int64_t)gridDim.y * COLS_AT_ONCE) {
        sebp_pack<float, PACK> sum = {};
        for (int64_t at = first; at < end; at += SEBP_WARP) {
            int64_t place = 0;
            float value = 0;
            if (at + lane < end) {
                int64_t element = s.order != nullptr ? s.order[at + lane] : at + lane;
                int64_t index = s.indices[element], row = index / s.cols;
                place = s.by_cols ? row : index - row * s.cols;
                value = s.values[element];
            }
            int some = end - at < SEBP_WARP ? (int)(end - at) : SEBP_WARP;
            for (int i = 0; i < some; i += ROWS_AT_ONCE) {
                sebp_pack<float, PACK> packs[ROWS_AT_ONCE];
                for (int r = 0; r < ROWS_AT_ONCE; r++) {
                    int64_t row = __shfl_sync(0xFFFFFFFFU, place, i + r);
                    packs[r] = sebp_pack<float, PACK>();
                    if (i + r < some) {
                        packs[r] = sebp_load_pack<PACK>(from.row(row), col + lane * PACK, n,
                                                        from_is_packed);
                    }
                }
                for (int r = 0; r < ROWS_AT_ONCE; r++) {
                    float factor = __shfl_sync(0xFFFFFFFFU, value, i + r);
                    for (int j = 0; j < PACK; j++)
                        sum.at[j] = __fmaf_rn(factor, packs[r].at[j], sum.at[j]);
                }
            }
        }
        sebp_store_pack<PACK>(to.row(line), col + lane * PACK, n, to_is_packed, sum);
    }
}

sebp_status multiply_sparse(sebp_cuda *cuda, const sparse_factor &s, const sebp_matrix *from,
                            const sebp_matrix *to)
{
    dim3 grid((unsigned)sebp_div_ceil(s.lines, WARPS),
              (unsigned)sebp_min(sebp_div_ceil(to->cols, COLS_AT_ONCE), 65535));
    return sebp_launch(cuda, multiply_kernel, grid, THREADS, 0, s, sebp_view_of<const float>(from),
                       sebp_is_packed<float>(from), sebp_view_of<float>(to),
                       sebp_is_packed<float>(to), to->cols);
}

/* ---- the update ---- */

/* S by rows and by columns, in memory that one piece of the device's holds. */
struct sorted_lines {
    line_list rows, cols;
    line_facts facts[2]; /* of both, in this order */
    void *memory, *order_memory;
    int64_t *order; /* of the columns' elements */
};

sebp_status list_lines(sebp_cuda *cuda, const sebp_sparse *s, sorted_lines *made)
{
    int64_t p = s->rows, q = s->cols, words = 3 * (p + q) + 2;
    sebp_status status = sebp_cuda_alloc(cuda, words * (int64_t)sizeof(int64_t), &made->memory);
    if (status != SEBP_SUCCESS)
        return status;
    line_facts *facts = (line_facts *)cuda->results;
    counter *counts = (counter *)made->memory;
    int64_t *lists = (int64_t *)made->memory + p + q;
    made->rows = line_list{p, counts, lists, lists + p, &facts[0]};
    lists += 2 * p + 1;
    made->cols = line_list{q, counts + p, lists, lists + q, &facts[1]};
    status = sebp_cuda_check(
        cuda, cudaMemsetAsync(counts, 0, (size_t)(p + q) * sizeof *counts, cuda->stream));
    if (status == SEBP_SUCCESS) {
        status = sebp_launch(cuda, count_kernel, (unsigned)sebp_div_ceil(s->count, THREADS),
                             THREADS, 0, s->indices, s->count, q, counts, counts + p);
    }
    if (status == SEBP_SUCCESS)
        status =
            sebp_launch(cuda, list_kernel, 2, LIST_THREADS, 0, made->rows, made->cols, s->count);
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_synchronize(cuda);
    for (int i = 0; i < 2 && status == SEBP_SUCCESS; i++)
        made->facts[i] = facts[i];
    return status;
}

sebp_status sort_by_cols(sebp_cuda *cuda, const sebp_sparse *s, sorted_lines *made)
{
    sebp_status status =
        sebp_cuda_alloc(cuda, 2 * s->count * (int64_t)sizeof *made->order, &made->order_memory);
    if (status != SEBP_SUCCESS)
        return status;
    int64_t *placed = (int64_t *)made->order_memory, lines = made->facts[1].count;
    made->order = placed + s->count;
    status = sebp_launch(cuda, place_kernel, (unsigned)sebp_div_ceil(s->count, THREADS), THREADS, 0,
                         s->indices, s->count, s->cols, made->cols.counts, placed);
    if (status != SEBP_SUCCESS)
        return status;
    return sebp_launch(cuda, sort_kernel, (unsigned)sebp_div_ceil(lines, WARPS), THREADS, 0,
                       made->cols.start, lines, placed, made->order);
}

/*
 * With S by rows: T = S in, p' x K, then W += out[I]^T T, in panels of W's columns. With S by
 * columns: T = S^T out, q' x N, then W += T^T in[J], in panels of W's rows. Each element of W is
 * added to once. The first pass reserves memory for the products, the second runs them.
 */
sebp_status add_lines(sebp_cuda *cuda, const sparse_factor &s, const int64_t *lines,
                      const line_facts &facts, const sebp_matrix *out, const sebp_matrix *in,
                      const sebp_matrix *w)
{
    const sebp_matrix *near = s.by_cols ? out : in; /* T is the product of S and it */
    const sebp_matrix *far = s.by_cols ? in : out;
    int64_t width = near->cols, room = sebp_cuda_max_scratch(cuda) / (int64_t)sizeof(float);
    int64_t panel = sebp_min(sebp_max(room / s.lines / PACK * PACK, 1), width);
    int64_t step = (s.by_cols ? w->stride : 1) * (int64_t)sebp_dtype_bytes(w->dtype);
    /* Lines that follow each other, as all of them do, are a matrix that is read in place. */
    bool is_run = facts.last - facts.first == s.lines - 1;
    const float *far_data = (const float *)far->data + (is_run ? facts.first * far->stride : 0);

    sebp_status status = sebp_cuda_reserve_scratch(cuda, s.lines * panel * (int64_t)sizeof(float));
    for (int runs = 0; runs < 2 && status == SEBP_SUCCESS; runs++) {
        float *t = (float *)sebp_cuda_method_scratch(cuda);
        for (int64_t j = 0; j < width && status == SEBP_SUCCESS; j += panel) {
            int64_t some = sebp_min(panel, width - j);
            sebp_operand of_t{t, some, nullptr, s.by_cols, SEBP_F32};
            sebp_operand of_far{far_data, far->stride, is_run ? nullptr : lines, !s.by_cols,
                                SEBP_F32};
            sebp_plan plan{};
            plan.product.m = s.by_cols ? some : w->rows;
            plan.product.n = s.by_cols ? w->cols : some;
            plan.product.k = s.lines;
            plan.product.a = s.by_cols ? of_t : of_far;
            plan.product.b = s.by_cols ? of_far : of_t;
            plan.product.c = (char *)w->data + j * step;
            plan.product.c_stride = w->stride;
            plan.product.c_dtype = w->dtype;
            plan.product.accumulate = true;
            status = sebp_cuda_plan_product(cuda, &plan);
            if (runs == 0 || status != SEBP_SUCCESS)
                continue;
            sebp_matrix from{(float *)near->data + j, near->rows, some, near->stride, SEBP_F32};
            sebp_matrix to = sebp_matrix_f32(t, s.lines, some);
            status = multiply_sparse(cuda, s, &from, &to);
            if (status == SEBP_SUCCESS)
                status = sebp_cuda_run_product(cuda, &plan);
        }
    }
    sebp_cuda_reserve_scratch(cuda, 0);
    return status;
}

/* Whether S by columns is less work, which is to be sorted first. */
bool prefers_cols(const sebp_sparse *s, const sebp_matrix *w, const line_facts facts[2])
{
    double n = (double)w->rows, k = (double)w->cols, kept = (double)s->count;
    double rows = (double)facts[0].count, cols = (double)facts[1].count;
    double sort = SORT_WORK * kept * kept / cols;
    return n * k * cols + kept * n + sort < n * k * rows + kept * k;
}

} // namespace

sebp_status sebp_cuda_sparse_update(void *device, const sebp_sparse *s, const sebp_matrix *out,
                                    const sebp_matrix *in, const sebp_matrix *w)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    if (w->rows == 0 || w->cols == 0)
        return SEBP_SUCCESS;
    sorted_lines lines{};
    sebp_status status = list_lines(cuda, s, &lines);
    bool by_cols = status == SEBP_SUCCESS && prefers_cols(s, w, lines.facts);
    if (by_cols)
        status = sort_by_cols(cuda, s, &lines);
    if (status == SEBP_SUCCESS) {
        const line_list &list = by_cols ? lines.cols : lines.rows;
        line_facts facts = lines.facts[by_cols];
        sparse_factor factor{s->indices, lines.order, list.start, s->values,
                             s->cols,    facts.count, by_cols};
        status = add_lines(cuda, factor, list.lines, facts, out, in, w);
    }
    sebp_cuda_free(cuda, lines.order_memory);
    sebp_cuda_free(cuda, lines.memory);
    return status;
}
