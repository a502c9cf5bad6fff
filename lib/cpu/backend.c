/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file backend.c
 * The backend table on CPUs. Each operation cuts its work into pieces and hands them to the
 * threads.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu.h"

enum {
    ALIGNMENT = 64,
    SCAN_BLOCK_BYTES = 64 << 10, /* of dY, to one block of rows */
    SCAN_BLOCK_ROWS = 16,        /* at least, so that threads do not share lines of scores */
    ZERO_PART_BYTES = 128 << 10, /* worth a thread of its own */
    ASSUMED_CACHE = 4 << 20,     /* where the L3 cache is not known */
    SUM_COLS = 512,              /* sums held at a time: 2 KiB */
    SPARSE_COLS = 128,           /* of a sparse product, at a time */
    WALK_PART = 16 << 10,        /* elements worth a thread of their own */
    MIN_DIGITS = 4 << 10,        /* elements worth their digits' counts */
    MAX_DIGITS = 1 << 20,        /* elements to one set of 32-bit counts */
    LARGE = 512                  /* of a product's sizes */
};

/* ---- making and unmaking ---- */

static void destroy(void *device)
{
    sebp_cpu *cpu = device;
    sebp_cpu_unbind(cpu);
    free(cpu->scratch);
    free(cpu);
}

/* Those that the options, the environment or the machine gives. */
static int wanted_threads(const sebp_context_options *options,
                          const sebp_cpu_environment *environment, const sebp_topology *topology)
{
    if (options->threads > 0)
        return options->threads;
    if (environment->omp_threads > 0)
        return environment->omp_threads;
    return (int)sebp_min(sebp_topology_default_threads(topology), SEBP_MAX_THREADS);
}

/* A pool of the host's has as many as that; OpenMP no more than OMP_THREAD_LIMIT, and in a child
   that has lost OpenMP's threads one. */
static int count_threads(const sebp_context_options *options,
                         const sebp_cpu_environment *environment, const sebp_topology *topology)
{
    int threads = wanted_threads(options, environment, topology);
    if (options->parallel_for != NULL)
        return threads;
#ifdef _OPENMP
    if (sebp_cpu_openmp_is_lost())
        return 1;
    return (int)sebp_max(sebp_min(threads, omp_get_thread_limit()), 1);
#else
    return 1;
#endif
}

sebp_status sebp_cpu_create(const sebp_context_options *options,
                            const sebp_cpu_environment *environment, sebp_cpu **made)
{
    sebp_cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu == NULL)
        return SEBP_ERROR_MEMORY;
    sebp_topology_read(&cpu->topology);
    cpu->threads = count_threads(options, environment, &cpu->topology);
    cpu->gemm = options->gemm;
    cpu->placement = options->placement;
    cpu->parallel_for = options->parallel_for;
    cpu->pool = options->pool;
    cpu->forks = sebp_cpu_forks();
    cpu->workspace_bytes = options->workspace_bytes;
    if (cpu->placement != SEBP_PLACEMENT_NONE) {
        cpu->placement_refused =
            cpu->parallel_for != NULL ? "parallel_for" : environment->affinity_variable;
        sebp_status status = cpu->placement_refused == NULL ? sebp_cpu_bind(cpu) : SEBP_SUCCESS;
        if (status != SEBP_SUCCESS) {
            free(cpu);
            return status;
        }
    }
    cpu->kernels = sebp_cpu_kernels(environment->max_isa);
    *made = cpu;
    return SEBP_SUCCESS;
}

void *sebp_cpu_scratch(sebp_cpu *cpu, int64_t bytes)
{
    bytes += cpu->aside_bytes;
    if (bytes > cpu->workspace_bytes)
        return NULL;
    if (bytes > cpu->scratch_bytes || cpu->scratch == NULL) {
        bytes = sebp_min(sebp_max(bytes + ALIGNMENT - 1, ALIGNMENT) / ALIGNMENT * ALIGNMENT,
                         cpu->workspace_bytes);
        free(cpu->scratch); /* before the next is had, so that both never add up */
        cpu->scratch = NULL;
        cpu->scratch_bytes = 0;
        void *scratch = NULL;
        if (posix_memalign(&scratch, ALIGNMENT, (size_t)bytes) != 0)
            return NULL;
        cpu->scratch = scratch;
        cpu->scratch_bytes = bytes;
        cpu->scratch_max = sebp_max(cpu->scratch_max, bytes);
    }
    return cpu->scratch + cpu->aside_bytes;
}

int64_t sebp_cpu_workspace(const sebp_cpu *cpu)
{
    return cpu->workspace_bytes - cpu->aside_bytes;
}

static int64_t set_aside_max(const void *device)
{
    return ((const sebp_cpu *)device)->workspace_bytes / 2 / ALIGNMENT * ALIGNMENT;
}

static sebp_status set_aside(void *device, int64_t bytes)
{
    sebp_cpu *cpu = device;
    if (bytes > set_aside_max(device))
        return SEBP_ERROR_MEMORY;
    cpu->aside_bytes = sebp_div_ceil(bytes, ALIGNMENT) * ALIGNMENT;
    if (sebp_cpu_scratch(cpu, 0) != NULL)
        return SEBP_SUCCESS;
    cpu->aside_bytes = 0;
    return SEBP_ERROR_MEMORY;
}

static void *aside(const void *device)
{
    return ((const sebp_cpu *)device)->scratch;
}

/* ---- finding rows ---- */

typedef struct scan {
    const sebp_kernels *kernels;
    const sebp_matrix *dy;
    sebp_measure measure;
    float limit;
    double *score;
    int64_t block_rows, blocks, workers;
} scan;

static double measure_row(const scan *scan, int64_t i)
{
    const sebp_kernels *kernels = scan->kernels;
    int64_t at = i * scan->dy->stride, n = scan->dy->cols;
    const float *f32 = scan->dy->dtype == SEBP_F32 ? (const float *)scan->dy->data + at : NULL;
    const uint16_t *bf16 = f32 == NULL ? (const uint16_t *)scan->dy->data + at : NULL;
    switch (scan->measure) {
    case SEBP_MEASURE_NONZERO:
        return f32 ? kernels->any_nonzero_f32(f32, n) : kernels->any_nonzero_bf16(bf16, n);
    case SEBP_MEASURE_ABOVE:
        return f32 ? kernels->any_above_f32(f32, n, scan->limit)
                   : kernels->any_above_bf16(bf16, n, scan->limit);
    case SEBP_MEASURE_SQUARE_SUM:
        break;
    }
    double sum = f32 ? kernels->square_sum_f32(f32, n) : kernels->square_sum_bf16(bf16, n);
    return isfinite(sum) ? sum : INFINITY;
}

/* Blocks in turn: padding, which is read to its end, lies in runs that one thread would get whole.
 */
static void scan_blocks(void *work, int64_t worker)
{
    const scan *scan = work;
    for (int64_t block = worker; block < scan->blocks; block += scan->workers) {
        int64_t first = block * scan->block_rows;
        int64_t end = sebp_min(first + scan->block_rows, scan->dy->rows);
        for (int64_t i = first; i < end; i++)
            scan->score[i] = measure_row(scan, i);
    }
}

/* The largest float that is not above `limit`: for a float v, |v| > limit is |v| > that. */
static float float_below(double limit)
{
    float nearest = (float)limit;
    return (double)nearest > limit || isinf(nearest) ? nextafterf(nearest, 0.0f) : nearest;
}

static void scan_rows(void *device, const sebp_matrix *dy, sebp_measure measure, double limit,
                      double *score)
{
    sebp_cpu *cpu = device;
    int64_t row_bytes = sebp_max(dy->cols * (int64_t)sebp_dtype_bytes(dy->dtype), 1);
    int64_t block_rows = sebp_max(SCAN_BLOCK_BYTES / row_bytes, SCAN_BLOCK_ROWS);
    int64_t blocks = sebp_div_ceil(dy->rows, block_rows);
    scan scan = {.kernels = cpu->kernels,
                 .dy = dy,
                 .measure = measure,
                 .limit = float_below(limit),
                 .score = score,
                 .block_rows = block_rows,
                 .blocks = blocks,
                 .workers = sebp_min(blocks, sebp_cpu_threads(cpu))};
    sebp_cpu_parallel(cpu, scan.workers, scan_blocks, &scan);
}

/* ---- products ---- */

/* Whether oneDNN does a product, and in *path who does it and why. */
static bool choose_onednn(const sebp_cpu *cpu, const sebp_product *product, const char **path)
{
    *path = cpu->gemm == SEBP_GEMM_NATIVE ? "native:asked" : "native:auto";
#ifdef SEBP_HAVE_ONEDNN
    /* Left to choose, oneDNN has the large products of f32 that it takes as they lie, where it
     * measures a few percent faster. Where rows must be gathered for it, where few are left, with
     * B transposed (the forward) and with bf16, our own does. */
    bool is_dense = product->a.rows == NULL && product->b.rows == NULL && product->c_rows == NULL &&
                    !product->b.transposed;
    bool is_large = sebp_min(product->m, sebp_min(product->n, product->k)) >= LARGE;
    bool suits = product->dtype == SEBP_F32 && is_dense && is_large;
    if (cpu->gemm == SEBP_GEMM_ONEDNN || (cpu->gemm == SEBP_GEMM_AUTO && suits)) {
        *path = sebp_onednn_refusal(cpu, product);
        if (*path != NULL)
            return false;
        *path = cpu->gemm == SEBP_GEMM_ONEDNN ? "onednn:asked" : "onednn:auto";
        return true;
    }
#endif
    (void)product;
    return false;
}

static int64_t product_scratch(const sebp_cpu *cpu, const sebp_product *product)
{
#ifdef SEBP_HAVE_ONEDNN
    const char *path;
    if (choose_onednn(cpu, product, &path))
        return sebp_onednn_scratch(cpu, product);
#endif
    return sebp_native_scratch(cpu, product);
}

static sebp_status reserve_product(void *device, const sebp_product *product)
{
    sebp_cpu *cpu = device;
    if (product->m == 0 || product->n == 0)
        return SEBP_SUCCESS;
    int64_t bytes = product_scratch(cpu, product);
    return sebp_cpu_scratch(cpu, bytes) != NULL ? SEBP_SUCCESS : SEBP_ERROR_MEMORY;
}

static sebp_status run_product(void *device, const sebp_product *product, const char **path)
{
    sebp_cpu *cpu = device;
    if (product->m == 0 || product->n == 0) {
        *path = "none:empty";
        return SEBP_SUCCESS;
    }
    int64_t bytes = product_scratch(cpu, product);
    if (cpu->aside_bytes > 0 && bytes + cpu->aside_bytes > cpu->scratch_bytes) {
        *path = "a product was not reserved"; /* what is set aside would be lost */
        return SEBP_ERROR_BACKEND;
    }
    void *scratch = sebp_cpu_scratch(cpu, bytes);
    bool onednn = choose_onednn(cpu, product, path);
#ifdef SEBP_HAVE_ONEDNN
    if (onednn) {
        sebp_cpu_bind_now(cpu);
        return sebp_onednn_product(cpu, product, scratch, path);
    }
#endif
    (void)onednn;
    sebp_native_product(cpu, product, scratch);
    return SEBP_SUCCESS;
}

/* ---- filling the other rows with zeros ---- */

typedef struct zeroing {
    const sebp_kernels *kernels;
    char *data;
    int64_t row_bytes, stride_bytes;
    const int64_t *rows; /* `count` rows that are left as they are */
    int64_t count;
    int64_t others; /* the number of rows to zero */
    int64_t parts;
    bool stream;
} zeroing;

static void zero_rows(const zeroing *zeroing, int64_t first, int64_t rows)
{
    char *at = zeroing->data + first * zeroing->stride_bytes;
    if (zeroing->stride_bytes == zeroing->row_bytes) {
        zeroing->kernels->zero(at, rows * zeroing->row_bytes, zeroing->stream);
        return;
    }
    for (int64_t i = 0; i < rows; i++)
        zeroing->kernels->zero(at + i * zeroing->stride_bytes, zeroing->row_bytes, zeroing->stream);
}

/* How many listed rows lie before the other row number `other`: the i-th listed row has
 * rows[i] - i other rows before it. */
static int64_t listed_before(const zeroing *zeroing, int64_t other)
{
    int64_t low = 0, high = zeroing->count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (zeroing->rows[middle] - middle <= other)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void zero_part(void *work, int64_t part)
{
    const zeroing *zeroing = work;
    int64_t other = zeroing->others * part / zeroing->parts;
    int64_t end = zeroing->others * (part + 1) / zeroing->parts;
    for (int64_t listed = listed_before(zeroing, other); other < end; listed++) {
        /* the others from here up to the next listed row */
        int64_t until = listed < zeroing->count ? zeroing->rows[listed] - listed : zeroing->others;
        int64_t run = sebp_min(until, end) - other;
        if (run > 0)
            zero_rows(zeroing, other + listed, run);
        other += run;
    }
    if (zeroing->stream)
        zeroing->kernels->stream_fence();
}

bool sebp_cpu_streams(const sebp_cpu *cpu, int64_t bytes)
{
    int64_t cache = cpu->topology.l3_bytes > 0 ? (int64_t)cpu->topology.l3_bytes : ASSUMED_CACHE;
    return bytes > cache / 2;
}

static void zero_other_rows(void *device, const sebp_matrix *to, const int64_t *rows, int64_t count)
{
    sebp_cpu *cpu = device;
    int64_t element = (int64_t)sebp_dtype_bytes(to->dtype);
    int64_t row_bytes = to->cols * element, others = to->rows - count;
    int64_t bytes = others * row_bytes;
    zeroing zeroing = {.kernels = cpu->kernels,
                       .data = to->data,
                       .row_bytes = row_bytes,
                       .stride_bytes = to->stride * element,
                       .rows = rows,
                       .count = count,
                       .others = others,
                       .parts =
                           sebp_min(sebp_div_ceil(bytes, ZERO_PART_BYTES), sebp_cpu_threads(cpu)),
                       .stream = sebp_cpu_streams(cpu, bytes)};
    sebp_cpu_parallel(cpu, zeroing.parts, zero_part, &zeroing);
}

/* ---- sums of columns ---- */

typedef struct column_sums {
    const sebp_kernels *kernels;
    const sebp_matrix *from;
    const int64_t *rows;
    int64_t count;
    const sebp_matrix *to;
    bool accumulate;
    int64_t part_cols;
} column_sums;

/* The sums are taken apart from `to`, so that a bf16 result is rounded once. */
static void sum_chunk(const column_sums *sums, int64_t first, int64_t cols)
{
    const sebp_kernels *kernels = sums->kernels;
    const sebp_matrix *from = sums->from;
    float sum[SUM_COLS] = {0}, held[SUM_COLS];
    /* With no rows `from` may have no data, and any stride. */
    if (sums->count > 0 && from->dtype == SEBP_F32)
        kernels->add_rows_f32(sum, (const float *)from->data + first, from->stride, sums->rows,
                              sums->count, cols);
    else if (sums->count > 0)
        kernels->add_rows_bf16(sum, (const uint16_t *)from->data + first, from->stride, sums->rows,
                               sums->count, cols);
    void *to = (char *)sums->to->data + first * (int64_t)sebp_dtype_bytes(sums->to->dtype);
    if (sums->accumulate) {
        if (sums->to->dtype == SEBP_F32)
            memcpy(held, to, (size_t)cols * sizeof *held);
        else
            kernels->f32_from_bf16(held, to, cols);
        for (int64_t j = 0; j < cols; j++)
            sum[j] += held[j];
    }
    if (sums->to->dtype == SEBP_F32)
        memcpy(to, sum, (size_t)cols * sizeof *sum);
    else
        kernels->bf16_from_f32(to, sum, cols);
}

static void sum_part(void *work, int64_t part)
{
    const column_sums *sums = work;
    int64_t first = part * sums->part_cols;
    int64_t end = sebp_min(first + sums->part_cols, sums->to->cols);
    for (; first < end; first += SUM_COLS)
        sum_chunk(sums, first, sebp_min(SUM_COLS, end - first));
}

/* Each column is summed by one thread, in the order of its rows: the bits do not depend on how many
 * threads there are. */
static void sum_rows(void *device, const sebp_matrix *from, const int64_t *rows, int64_t count,
                     const sebp_matrix *to, bool accumulate)
{
    sebp_cpu *cpu = device;
    const int64_t line = ALIGNMENT / (int64_t)sizeof(float);
    int64_t cols = to->cols;
    int64_t part_cols = sebp_div_ceil(sebp_div_ceil(cols, sebp_cpu_threads(cpu)), line) * line;
    column_sums sums = {.kernels = cpu->kernels,
                        .from = from,
                        .rows = rows,
                        .count = count,
                        .to = to,
                        .accumulate = accumulate,
                        .part_cols = part_cols};
    if (cols > 0)
        sebp_cpu_parallel(cpu, sebp_div_ceil(cols, part_cols), sum_part, &sums);
}

/* ---- element by element ---- */

/* Matrices of one shape that are walked together. */
typedef struct walk {
    const sebp_kernels *kernels;
    const sebp_matrix *matrices[4];
    int64_t rows, cols; /* one row where no matrix has gaps */
    int64_t parts;
    sebp_adamw_work step;
    float factor;
} walk;

static walk start_walk(sebp_cpu *cpu, const sebp_matrix *const *matrices, int count)
{
    walk walk = {.kernels = cpu->kernels, .rows = matrices[0]->rows, .cols = matrices[0]->cols};
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
    walk.parts = sebp_min(sebp_div_ceil(elements, WALK_PART), sebp_cpu_threads(cpu));
    return walk;
}

/* Where part `part` starts among all elements: at a line of each matrix, where they start at one. */
static int64_t part_start(const walk *walk, int64_t part)
{
    enum { LINE_ELEMENTS = 32 };
    int64_t lines = sebp_div_ceil(walk->rows * walk->cols, LINE_ELEMENTS);
    return sebp_min(lines * part / walk->parts * LINE_ELEMENTS, walk->rows * walk->cols);
}

/* Element `at` of all of the walk's i-th matrix. */
static void *element_of(const walk *walk, int i, int64_t at)
{
    const sebp_matrix *matrix = walk->matrices[i];
    int64_t element = at / walk->cols * matrix->stride + at % walk->cols;
    return (char *)matrix->data + element * (int64_t)sebp_dtype_bytes(matrix->dtype);
}

/* How many elements from `at` on lie in one row and before `end`. */
static int64_t run_length(const walk *walk, int64_t at, int64_t end)
{
    return sebp_min(end - at, walk->cols - at % walk->cols);
}

static void adamw_part(void *work, int64_t part)
{
    const walk *walk = work;
    sebp_adamw_work step = walk->step;
    int64_t end = part_start(walk, part + 1);
    for (int64_t at = part_start(walk, part); at < end; at += step.n) {
        step.g = element_of(walk, 0, at);
        step.w = element_of(walk, 1, at);
        step.moment1 = element_of(walk, 2, at);
        step.moment2 = element_of(walk, 3, at);
        step.n = run_length(walk, at, end);
        walk->kernels->adamw(&step);
    }
}

static void adamw(void *device, const sebp_adamw_options *options, int64_t step,
                  const sebp_matrix *gradient, const sebp_matrix *w, const sebp_matrix *moment1,
                  const sebp_matrix *moment2, bool step_alone)
{
    sebp_cpu *cpu = device;
    const sebp_matrix *matrices[] = {gradient, w, moment1, moment2};
    walk walk = start_walk(cpu, matrices, 4);
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
    sebp_cpu_parallel(cpu, walk.parts, adamw_part, &walk);
}

static void scale_part(void *work, int64_t part)
{
    const walk *walk = work;
    int64_t end = part_start(walk, part + 1);
    for (int64_t n, at = part_start(walk, part); at < end; at += n) {
        n = run_length(walk, at, end);
        if (walk->matrices[0]->dtype == SEBP_F32)
            walk->kernels->scale_f32(element_of(walk, 0, at), n, walk->factor);
        else
            walk->kernels->scale_bf16(element_of(walk, 0, at), n, walk->factor);
    }
}

static void scale(void *device, const sebp_matrix *matrix, double factor)
{
    sebp_cpu *cpu = device;
    walk walk = start_walk(cpu, &matrix, 1);
    walk.factor = (float)factor;
    sebp_cpu_parallel(cpu, walk.parts, scale_part, &walk);
}

/* ---- rows widened ---- */

typedef struct widening {
    const sebp_kernels *kernels;
    const sebp_matrix *from;
    const int64_t *rows;
    int64_t count;
    const sebp_matrix *to;
    int64_t parts;
} widening;

static void widen_part(void *work, int64_t part)
{
    const widening *widening = work;
    const sebp_matrix *from = widening->from, *to = widening->to;
    int64_t end = widening->count * (part + 1) / widening->parts;
    for (int64_t i = widening->count * part / widening->parts; i < end; i++) {
        int64_t at = (widening->rows != NULL ? widening->rows[i] : i) * from->stride;
        float *row = (float *)to->data + i * to->stride;
        if (from->dtype == SEBP_F32)
            memcpy(row, (const float *)from->data + at, (size_t)to->cols * sizeof *row);
        else
            widening->kernels->f32_from_bf16(row, (const uint16_t *)from->data + at, to->cols);
    }
}

static void widen_rows(void *device, const sebp_matrix *from, const int64_t *rows, int64_t count,
                       const sebp_matrix *to)
{
    sebp_cpu *cpu = device;
    widening widening = {.kernels = cpu->kernels,
                         .from = from,
                         .rows = rows,
                         .count = count,
                         .to = to,
                         .parts = sebp_min(count, sebp_cpu_threads(cpu))};
    sebp_cpu_parallel(cpu, widening.parts, widen_part, &widening);
}

/* ---- sparse times dense ---- */

typedef struct sparse_product {
    const sebp_kernels *kernels;
    const sebp_sparse_lines *lines;
    const sebp_matrix *from, *to;
} sparse_product;

static void sparse_part(void *work, int64_t part)
{
    const sparse_product *product = work;
    const sebp_sparse_lines *lines = product->lines;
    int64_t first = part * SPARSE_COLS;
    int64_t cols = sebp_min(SPARSE_COLS, product->to->cols - first);
    const float *from = (const float *)product->from->data + first;
    float *to = (float *)product->to->data + first;
    for (int64_t i = 0; i < lines->count; i++) {
        int64_t start = lines->start[i];
        product->kernels->sum_scaled_rows(to + i * product->to->stride, from, product->from->stride,
                                          lines->places + start, lines->values + start,
                                          lines->start[i + 1] - start, cols);
    }
}

/* Lines differ in length, columns do not: each thread has columns of its own, so few at a time that
 * those of all rows stay in its caches. */
static void multiply_sparse(void *device, const sebp_sparse_lines *lines, const sebp_matrix *from,
                            const sebp_matrix *to)
{
    sebp_cpu *cpu = device;
    sparse_product product = {.kernels = cpu->kernels, .lines = lines, .from = from, .to = to};
    if (to->cols > 0)
        sebp_cpu_parallel(cpu, sebp_div_ceil(to->cols, SPARSE_COLS), sparse_part, &product);
}

/* ---- what is large ---- */

/* Elements of a matrix, as they follow each other, in blocks that threads take in turn: what is
 * large may lie in one corner. */
typedef struct ranking {
    const sebp_kernels *kernels;
    const sebp_matrix *from;
    int64_t cols; /* one row where there are no gaps */
    int64_t elements, size, blocks, workers;
    uint32_t mask, found, min;
    int shift;
    int64_t *counts;
    sebp_block *counted;
    const sebp_block *listed;
    int64_t first;
    const sebp_sparse *list;
} ranking;

static ranking start_ranking(const sebp_cpu *cpu, const sebp_matrix *from, int64_t size)
{
    ranking ranking = {.kernels = cpu->kernels, .from = from, .cols = from->cols, .size = size};
    ranking.elements = from->rows * from->cols;
    if (from->stride == from->cols)
        ranking.cols = ranking.elements;
    ranking.blocks = sebp_div_ceil(ranking.elements, size);
    ranking.workers = sebp_min(ranking.blocks, sebp_cpu_threads(cpu));
    return ranking;
}

/* The elements from `at` on that lie in one row and before `end`, and how many they are. */
static const float *run_of(const ranking *ranking, int64_t at, int64_t end, int64_t *n)
{
    int64_t row = at / ranking->cols, col = at % ranking->cols;
    *n = sebp_min(end - at, ranking->cols - col);
    return (const float *)ranking->from->data + row * ranking->from->stride + col;
}

static int64_t block_end(const ranking *ranking, int64_t block)
{
    return sebp_min((block + 1) * ranking->size, ranking->elements);
}

static uint32_t magnitude_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFF;
}

/* Two counts for each digit, so that equal ones that follow each other need not wait. */
static void count_digits_part(void *work, int64_t worker)
{
    const ranking *ranking = work;
    int64_t *counts = ranking->counts + worker * SEBP_DIGITS;
    memset(counts, 0, SEBP_DIGITS * sizeof *counts);
    for (int64_t block = worker; block < ranking->blocks; block += ranking->workers) {
        uint32_t held[SEBP_DIGITS][2] = {{0}};
        int64_t end = block_end(ranking, block);
        for (int64_t n, at = block * ranking->size; at < end; at += n) {
            const float *run = run_of(ranking, at, end, &n);
            for (int64_t i = 0; i < n; i++) {
                uint32_t bits = magnitude_bits(run[i]);
                uint32_t digit = bits >> ranking->shift & (SEBP_DIGITS - 1);
                held[digit][i & 1] += (bits & ranking->mask) == ranking->found;
            }
        }
        for (int d = 0; d < SEBP_DIGITS; d++)
            counts[d] += (int64_t)held[d][0] + held[d][1];
    }
}

static void count_digits(void *device, const sebp_matrix *from, uint32_t mask, uint32_t found,
                         int shift, int64_t *counts)
{
    sebp_cpu *cpu = device;
    int64_t share = sebp_div_ceil(from->rows * from->cols, sebp_cpu_threads(cpu));
    ranking ranking = start_ranking(cpu, from, sebp_min(sebp_max(share, MIN_DIGITS), MAX_DIGITS));
    ranking.mask = mask;
    ranking.found = found;
    ranking.shift = shift;
    ranking.counts = counts;
    sebp_cpu_parallel(cpu, ranking.workers, count_digits_part, &ranking);
    for (int64_t worker = 1; worker < ranking.workers; worker++)
        for (int d = 0; d < SEBP_DIGITS; d++)
            counts[d] += counts[worker * SEBP_DIGITS + d];
}

static void count_at_least_part(void *work, int64_t worker)
{
    const ranking *ranking = work;
    for (int64_t block = worker; block < ranking->blocks; block += ranking->workers) {
        int64_t end = block_end(ranking, block), at_least = 0, above = 0;
        for (int64_t n, at = block * ranking->size; at < end; at += n) {
            const float *run = run_of(ranking, at, end, &n);
            ranking->kernels->count_at_least(run, n, ranking->min, &at_least, &above);
        }
        ranking->counted[block] = (sebp_block){.at_least = at_least, .above = above};
    }
}

static void count_at_least(void *device, const sebp_matrix *from, uint32_t min, int64_t size,
                           sebp_block *blocks)
{
    sebp_cpu *cpu = device;
    ranking ranking = start_ranking(cpu, from, size);
    ranking.min = min;
    ranking.counted = blocks;
    sebp_cpu_parallel(cpu, ranking.workers, count_at_least_part, &ranking);
}

/* A run of a block of whose ties some, but not all, are listed: there is one such block at most. */
static int64_t list_some_ties(const float *run, int64_t n, uint32_t min, int64_t *ties,
                              int64_t first, int64_t *indices, float *values)
{
    int64_t listed = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = magnitude_bits(run[i]);
        if (bits > min || (bits == min && (*ties)-- > 0)) {
            indices[listed] = first + i;
            values[listed++] = run[i];
        }
    }
    return listed;
}

static void list_at_least_part(void *work, int64_t worker)
{
    const ranking *ranking = work;
    uint32_t min = ranking->min;
    for (int64_t block = worker; block < ranking->blocks; block += ranking->workers) {
        const sebp_block *its = &ranking->listed[block];
        int64_t end = block_end(ranking, block), ties = its->ties;
        int64_t *indices = ranking->list->indices + its->at;
        float *values = ranking->list->values + its->at;
        bool some = ties > 0 && ties < its->at_least - its->above;
        for (int64_t n, listed, at = block * ranking->size; at < end; at += n) {
            const float *run = run_of(ranking, at, end, &n);
            int64_t first = ranking->first + at;
            if (some)
                listed = list_some_ties(run, n, min, &ties, first, indices, values);
            else
                listed = ranking->kernels->list_at_least(run, n, min + (ties == 0), first, indices,
                                                         values);
            indices += listed;
            values += listed;
        }
    }
}

static void list_at_least(void *device, const sebp_matrix *from, uint32_t min, int64_t first,
                          int64_t size, const sebp_block *blocks, const sebp_sparse *list)
{
    sebp_cpu *cpu = device;
    ranking ranking = start_ranking(cpu, from, size);
    ranking.min = min;
    ranking.listed = blocks;
    ranking.first = first;
    ranking.list = list;
    sebp_cpu_parallel(cpu, ranking.workers, list_at_least_part, &ranking);
}

/* ---- kept elements ---- */

static int64_t place_of(const sebp_matrix *matrix, int64_t index)
{
    return index / matrix->cols * matrix->stride + index % matrix->cols;
}

static bool take_elements(void *device, const sebp_matrix *from, const sebp_sparse *kept)
{
    (void)device;
    const float *data = from->data;
    for (int64_t i = 0; i < kept->count; i++) {
        if (!isfinite(data[place_of(from, kept->indices[i])]))
            return false;
    }
    for (int64_t i = 0; i < kept->count; i++)
        kept->values[i] = data[place_of(from, kept->indices[i])];
    return true;
}

static void add_elements(void *device, const sebp_sparse *s, const sebp_matrix *to)
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
}

/* ---- what there is to know ---- */

static int64_t scratch_bytes(const void *device)
{
    return ((const sebp_cpu *)device)->scratch_max;
}

static int threads(const void *device)
{
    return sebp_cpu_threads(device);
}

static int openmp_threads(const void *device)
{
    const sebp_cpu *cpu = device;
    return cpu->parallel_for != NULL ? 1 : sebp_cpu_threads(cpu);
}

static void fill_info(const void *device, sebp_info *info)
{
    const sebp_cpu *cpu = device;
    sebp_topology topology;
    if (cpu != NULL) {
        topology = cpu->topology;
        info->placement = cpu->placement;
        info->placement_refused = cpu->placement_refused;
        info->gemm = cpu->gemm;
    } else {
        sebp_topology_read(&topology);
        info->placement = SEBP_PLACEMENT_NONE;
        info->gemm = SEBP_GEMM_AUTO;
    }
    info->cores = topology.cores;
    info->logical_cpus = topology.logical_cpus;
    info->numa_nodes = topology.numa_nodes;
    info->core_kinds = topology.core_kinds;
    info->cpu_quota = topology.cpu_quota;
    info->l2_bytes = topology.l2_bytes;
    info->l3_bytes = topology.l3_bytes;
    memcpy(info->hwloc, topology.hwloc, sizeof info->hwloc);
}

const sebp_backend sebp_cpu_backend = {
    .scan_rows = scan_rows,
    .reserve_product = reserve_product,
    .product = run_product,
    .zero_other_rows = zero_other_rows,
    .sum_rows = sum_rows,
    .set_aside = set_aside,
    .set_aside_max = set_aside_max,
    .aside = aside,
    .widen_rows = widen_rows,
    .sparse_product = multiply_sparse,
    .count_digits = count_digits,
    .count_at_least = count_at_least,
    .list_at_least = list_at_least,
    .take_elements = take_elements,
    .add_elements = add_elements,
    .adamw = adamw,
    .scale = scale,
    .attention_forward = sebp_cpu_attention_forward,
    .attention_backward = sebp_cpu_attention_backward,
    .scratch_bytes = scratch_bytes,
    .threads = threads,
    .openmp_threads = openmp_threads,
    .info = fill_info,
    .destroy = destroy,
};
