/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file elements.c
 * Operations on elements: AdamW, scaling, and the few elements that are kept.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <math.h>

#include "operations.h"

enum { WALK_PIECE = 16 << 10 /* elements worth a thread of their own */ };

/* ---- element by element ---- */

/* Matrices of one shape, gone through together. */
typedef struct element_walk {
    const sebp_kernels *kernels;
    const sebp_matrix *matrices[4];
    int64_t rows, cols; /* one row where no matrix has gaps */
    int64_t pieces;
    sebp_adamw_work step;
    float factor;
} element_walk;

static element_walk start_walk(sebp_cpu *cpu, const sebp_matrix *const *matrices, int count)
{
    element_walk walk = {
        .kernels = cpu->kernels, .rows = matrices[0]->rows, .cols = matrices[0]->cols};
    bool has_gaps = false;
    for (int i = 0; i < count; i++) {
        walk.matrices[i] = matrices[i];
        has_gaps = has_gaps || matrices[i]->stride != walk.cols;
    }
    int64_t elements = walk.rows * walk.cols;
    if (!has_gaps) {
        walk.rows = elements > 0;
        walk.cols = elements;
    }
    walk.pieces = sebp_min(sebp_div_ceil(elements, WALK_PIECE), sebp_cpu_threads(cpu));
    return walk;
}

/* The index of the first element of piece number `piece`. It begins at a cache line of each matrix,
 * if the matrix does. */
static int64_t piece_start(const element_walk *walk, int64_t piece)
{
    enum { LINE_ELEMENTS = 32 };
    int64_t lines = sebp_div_ceil(walk->rows * walk->cols, LINE_ELEMENTS);
    return sebp_min(lines * piece / walk->pieces * LINE_ELEMENTS, walk->rows * walk->cols);
}

/* The walk's i-th matrix at element `at`, counted without the gaps between rows. */
static void *element_of(const element_walk *walk, int i, int64_t at)
{
    const sebp_matrix *matrix = walk->matrices[i];
    int64_t element = at / walk->cols * matrix->stride + at % walk->cols;
    return (char *)matrix->data + element * (int64_t)sebp_dtype_bytes(matrix->dtype);
}

/* How many elements from `at` on lie in one row and before `end`. */
static int64_t run_length(const element_walk *walk, int64_t at, int64_t end)
{
    return sebp_min(end - at, walk->cols - at % walk->cols);
}

static void adamw_piece(void *work, int64_t piece)
{
    const element_walk *walk = work;
    sebp_adamw_work step = walk->step;
    int64_t end = piece_start(walk, piece + 1);
    for (int64_t at = piece_start(walk, piece); at < end; at += step.n) {
        step.g = element_of(walk, 0, at);
        step.w = element_of(walk, 1, at);
        step.moment1 = element_of(walk, 2, at);
        step.moment2 = element_of(walk, 3, at);
        step.n = run_length(walk, at, end);
        walk->kernels->adamw(&step);
    }
}

sebp_status sebp_cpu_adamw(void *device, const sebp_adamw_options *options, int64_t step,
                           const sebp_matrix *gradient, const sebp_matrix *w,
                           const sebp_matrix *moment1, const sebp_matrix *moment2, bool step_alone)
{
    sebp_cpu *cpu = device;
    const sebp_matrix *matrices[] = {gradient, w, moment1, moment2};
    element_walk walk = start_walk(cpu, matrices, 4);
    double t = (double)step;
    walk.step = (sebp_adamw_work){
        .beta1 = (float)options->beta1,
        .gain1 = (float)(1 - options->beta1),
        .beta2 = (float)options->beta2,
        .gain2 = (float)(1 - options->beta2),
        .root2 = (float)(1 / sqrt(1 - pow(options->beta2, t))),
        .epsilon = (float)options->epsilon,
        .rate = (float)(-options->learning_rate / (1 - pow(options->beta1, t))),
        .keep = (float)(1 - options->learning_rate * options->weight_decay),
        .g_is_bf16 = gradient->dtype == SEBP_BF16,
        .w_is_bf16 = w->dtype == SEBP_BF16,
        .step_alone = step_alone,
    };
    sebp_cpu_parallel(cpu, walk.pieces, adamw_piece, &walk);
    return SEBP_SUCCESS;
}

static void scale_piece(void *work, int64_t piece)
{
    const element_walk *walk = work;
    int64_t end = piece_start(walk, piece + 1);
    for (int64_t n, at = piece_start(walk, piece); at < end; at += n) {
        n = run_length(walk, at, end);
        if (walk->matrices[0]->dtype == SEBP_F32)
            walk->kernels->scale_f32(element_of(walk, 0, at), n, walk->factor);
        else
            walk->kernels->scale_bf16(element_of(walk, 0, at), n, walk->factor);
    }
}

sebp_status sebp_cpu_scale(void *device, const sebp_matrix *matrix, double factor)
{
    sebp_cpu *cpu = device;
    element_walk walk = start_walk(cpu, &matrix, 1);
    walk.factor = (float)factor;
    sebp_cpu_parallel(cpu, walk.pieces, scale_piece, &walk);
    return SEBP_SUCCESS;
}

/* ---- sums rounded stochastically ---- */

typedef struct stochastic_sum {
    const sebp_kernels *kernels;
    const sebp_matrix *d, *w;
    float keep;
    sebp_dropout source;
    int64_t pieces;
} stochastic_sum;

static void stochastic_piece(void *work, int64_t piece)
{
    const stochastic_sum *sum = work;
    const sebp_matrix *w = sum->w, *d = sum->d;
    uint64_t groups = (uint64_t)sebp_div_ceil(w->cols, SEBP_RANDOM_GROUP);
    int64_t end = w->rows * (piece + 1) / sum->pieces;
    for (int64_t i = w->rows * piece / sum->pieces; i < end; i++) {
        const float *row = d == NULL ? NULL : (const float *)d->data + i * d->stride;
        sum->kernels->add_stochastic((uint16_t *)w->data + i * w->stride, row, w->cols, sum->keep,
                                     &sum->source, (uint64_t)i * groups);
    }
}

sebp_status sebp_cpu_add_stochastic(void *device, const sebp_matrix *d, double keep, uint64_t seed,
                                    uint64_t offset, const sebp_matrix *w)
{
    sebp_cpu *cpu = device;
    int64_t pieces = sebp_min(sebp_div_ceil(w->rows * w->cols, WALK_PIECE), sebp_cpu_threads(cpu));
    stochastic_sum sum = {.kernels = cpu->kernels, .d = d, .w = w, .keep = (float)keep};
    sum.source = (sebp_dropout){.seed = seed, .offset = offset};
    sum.pieces = sebp_min(pieces, w->rows);
    if (sum.pieces > 0)
        sebp_cpu_parallel(cpu, sum.pieces, stochastic_piece, &sum);
    return SEBP_SUCCESS;
}

/* ---- kept elements ---- */

sebp_status sebp_cpu_check_indices(void *device, const int64_t *indices, int64_t count, int64_t end,
                                   bool *valid)
{
    (void)device;
    int64_t min = 0, i = 0;
    while (i < count && indices[i] >= min && indices[i] < end)
        min = indices[i++] + 1;
    *valid = i == count;
    return SEBP_SUCCESS;
}

static int64_t place_of(const sebp_matrix *matrix, int64_t index)
{
    return index / matrix->cols * matrix->stride + index % matrix->cols;
}

/* How many kept elements have an index below `end`. */
static int64_t count_below(const sebp_sparse *kept, int64_t end)
{
    int64_t low = 0, high = kept->count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (kept->indices[middle] < end)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

sebp_status sebp_cpu_take_elements(void *device, const sebp_matrix *from, int64_t first,
                                   const sebp_sparse *kept)
{
    (void)device;
    const float *data = from->data;
    const int64_t start = count_below(kept, first);
    const int64_t end = count_below(kept, first + from->rows * from->cols);
    for (int64_t i = start; i < end; i++) {
        if (!isfinite(data[place_of(from, kept->indices[i] - first)]))
            return SEBP_ERROR_NONFINITE;
    }
    for (int64_t i = start; i < end; i++)
        kept->values[i] = data[place_of(from, kept->indices[i] - first)];
    return SEBP_SUCCESS;
}

sebp_status sebp_cpu_add_elements(void *device, const sebp_sparse *s, const sebp_matrix *to)
{
    const sebp_kernels *kernels = ((const sebp_cpu *)device)->kernels;
    for (int64_t i = 0; i < s->count; i++) {
        int64_t place = place_of(to, s->indices[i]);
        if (to->dtype == SEBP_F32) {
            ((float *)to->data)[place] += s->values[i];
        } else {
            uint16_t *element = (uint16_t *)to->data + place;
            float sum;
            kernels->f32_from_bf16(&sum, element, 1);
            sum += s->values[i];
            kernels->bf16_from_f32(element, &sum, 1);
        }
    }
    return SEBP_SUCCESS;
}
