/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sebp-bench --layer: row-wise layers, and how near they come to the bandwidth of memory.
 *
 * Each layer counts the bytes that it must move: what it reads and writes once, at its size. The
 * bandwidth is that of the faster of two loops over arrays of one layer's size, a copy (memcpy) and a
 * triad, a = b + 3 c, which take turns with the layers. efficiency = (bytes / bandwidth) / time. Times
 * are the best seen: what other programs move slows down all alike, but not at once.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inputs.h"
#include "layers.h"

enum {
    COPY,
    TRIAD,
    LAYER_NORM,
    LAYER_NORM_RESIDUAL,
    LAYER_NORM_DROPOUT,
    LAYER_NORM_BACK,
    RMS_NORM,
    RMS_NORM_BACK,
    GELU,
    GELU_BACK,
    GELU_TANH,
    SILU_GATED,
    SILU_GATED_BACK,
    RELU,
    DROPOUT,
    ROTARY,
    ROTARY_PAIRS,
    CROSS_ENTROPY,
    EMBEDDING,
    EMBEDDING_BACK,
    NORM,
    SCALE,
    WORKS
};

/* Arrays that are read and written. */
static const struct {
    const char *name;
    double reads, writes;
} works[WORKS] = {
    [COPY] = {"copy", 1, 1},
    [TRIAD] = {"triad", 2, 1},
    [LAYER_NORM] = {"layer norm", 1, 1},
    [LAYER_NORM_RESIDUAL] = {"layer norm residual", 2, 2},
    [LAYER_NORM_DROPOUT] = {"layer norm dropout", 2, 2},
    [LAYER_NORM_BACK] = {"layer norm backward", 2, 1},
    [RMS_NORM] = {"rms norm", 1, 1},
    [RMS_NORM_BACK] = {"rms norm backward", 2, 1},
    [GELU] = {"gelu", 1, 1},
    [GELU_BACK] = {"gelu backward", 2, 1},
    [GELU_TANH] = {"gelu tanh", 1, 1},
    [SILU_GATED] = {"silu gated", 2, 1},
    [SILU_GATED_BACK] = {"silu gated backward", 3, 2},
    [RELU] = {"relu", 1, 1},
    [DROPOUT] = {"dropout", 1, 1},
    [ROTARY] = {"rotary", 1, 1},
    [ROTARY_PAIRS] = {"rotary pairs", 1, 1},
    [CROSS_ENTROPY] = {"cross-entropy", 1, 1},
    [EMBEDDING] = {"embedding", 1, 1},
    [EMBEDDING_BACK] = {"embedding backward", 1, 0}, /* and the table */
    [NORM] = {"gradient norm", 1, 0},
    [SCALE] = {"scale", 1, 1},
};

enum { ARRAYS = 5, CLASSES = 30522, HEAD = 64 };

typedef struct bench {
    const machine *m;
    const options *asked;
    int64_t rows, cols;
    sebp_dtype dtype;
    sebp_matrix at[ARRAYS];
    sebp_matrix gain, shift, dgain, dshift, statistics, angles, table, dtable;
    int64_t *indices, *labels, *positions;
    int count;
    double ms[WORKS][MAX_ROUNDS];
} bench;

static sebp_matrix new_matrix(const bench *b, int64_t rows, int64_t cols, sebp_dtype dtype)
{
    sebp_matrix made = {NULL, rows, cols, cols, dtype};
    made.data = allocate(matrix_bytes(&made));
    fill_random(&made, b->asked->seed + (uint64_t)cols, b->m->memory_threads);
    return made;
}

static void triad(const bench *b)
{
    const int threads = b->m->memory_threads;
    const int64_t bytes = (int64_t)matrix_bytes(&b->at[0]), count = bytes / (int64_t)sizeof(float);
    float *to = b->at[0].data;
    const float *one = b->at[1].data, *other = b->at[2].data;
    EACH_THREAD
    for (int t = 0; t < threads; t++) {
        for (int64_t i = count * t / threads; i < count * (t + 1) / threads; i++) {
            to[i] = one[i] + 3 * other[i];
        }
    }
}

static void copy(const bench *b)
{
    const int threads = b->m->memory_threads;
    const int64_t bytes = (int64_t)matrix_bytes(&b->at[0]);
    EACH_THREAD
    for (int t = 0; t < threads; t++) {
        int64_t first = bytes * t / threads, end = bytes * (t + 1) / threads;
        memcpy((char *)b->at[0].data + first, (const char *)b->at[1].data + first,
               (size_t)(end - first));
    }
}

static sebp_status run_norm(const bench *b, int what)
{
    sebp_context *context = b->m->contexts[b->m->gemm];
    const sebp_matrix *at = b->at;
    sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
    options.norm = what == RMS_NORM || what == RMS_NORM_BACK ? SEBP_RMS_NORM : SEBP_LAYER_NORM;
    options.dropout = what == LAYER_NORM_DROPOUT ? 0.1 : 0;
    const sebp_matrix *shift = options.norm == SEBP_LAYER_NORM ? &b->shift : NULL;
    const sebp_matrix *dshift = options.norm == SEBP_LAYER_NORM ? &b->dshift : NULL;
    if (what == LAYER_NORM_BACK || what == RMS_NORM_BACK) {
        return sebp_norm_backward(context, &at[1], &at[2], &b->statistics, &b->gain, NULL, &options,
                                  &at[0], NULL, &b->dgain, dshift);
    }
    if (what == LAYER_NORM || what == RMS_NORM) {
        return sebp_norm_forward(context, &at[1], NULL, &b->gain, shift, NULL, &options, NULL,
                                 &at[0], &b->statistics);
    }
    return sebp_norm_forward(context, &at[1], &at[2], &b->gain, shift, NULL, &options, &at[3],
                             &at[0], &b->statistics);
}

static sebp_status run_activation(const bench *b, int what)
{
    sebp_context *context = b->m->contexts[b->m->gemm];
    const sebp_matrix *at = b->at;
    switch (what) {
    case GELU:
        return sebp_activation_forward(context, SEBP_GELU, &at[1], NULL, NULL, NULL, &at[0]);
    case GELU_BACK:
        return sebp_activation_backward(context, SEBP_GELU, &at[2], &at[1], NULL, NULL, NULL,
                                        &at[0], NULL);
    case GELU_TANH:
        return sebp_activation_forward(context, SEBP_GELU_TANH, &at[1], NULL, NULL, NULL, &at[0]);
    case SILU_GATED:
        return sebp_activation_forward(context, SEBP_SILU, &at[1], &at[2], NULL, NULL, &at[0]);
    case SILU_GATED_BACK:
        return sebp_activation_backward(context, SEBP_SILU, &at[4], &at[1], &at[2], NULL, NULL,
                                        &at[0], &at[3]);
    default:
        return sebp_activation_forward(context, SEBP_RELU, &at[1], NULL, NULL, NULL, &at[0]);
    }
}

static sebp_status run_other(const bench *b, int what)
{
    sebp_context *context = b->m->contexts[b->m->gemm];
    const sebp_matrix *at = b->at;
    sebp_rotary_options rotary = SEBP_ROTARY_OPTIONS_INIT;
    sebp_matrix logits = at[1], dlogits = at[0];
    const sebp_embedding word = {b->table, b->indices};
    double result;
    switch (what) {
    case DROPOUT:
        return sebp_dropout_apply(context, &at[1], NULL, NULL, &at[0]);
    case ROTARY:
    case ROTARY_PAIRS:
        rotary.head_size = HEAD;
        rotary.interleaved = what == ROTARY_PAIRS;
        return sebp_rotary_forward(context, &at[1], b->positions, &b->angles, NULL, &rotary,
                                   &at[0]);
    case CROSS_ENTROPY:
        logits.rows = dlogits.rows = b->rows * b->cols / CLASSES;
        logits.cols = dlogits.cols = logits.stride = dlogits.stride = CLASSES;
        return sebp_cross_entropy(context, &logits, b->labels, NULL, &result, &dlogits);
    case EMBEDDING:
        return sebp_embedding_forward(context, &word, 1, NULL, NULL, &at[0]);
    case EMBEDDING_BACK:
        return sebp_embedding_backward(context, &at[1], b->indices, NULL, NULL, &b->dtable);
    case NORM:
        return sebp_gradient_norm(context, &at[1], 1, &result);
    default:
        return sebp_scale(context, &at[0], 1, 0.999);
    }
}

static void perform(const bench *b, int what)
{
    sebp_status status = SEBP_SUCCESS;
    if (what == COPY) {
        copy(b);
    } else if (what == TRIAD) {
        triad(b);
    } else if (what <= RMS_NORM_BACK) {
        status = run_norm(b, what);
    } else if (what <= RELU) {
        status = run_activation(b, what);
    } else {
        status = run_other(b, what);
    }
    if (status != SEBP_SUCCESS) {
        die(FAILED, "%s: %s", works[what].name, sebp_context_message(b->m->contexts[b->m->gemm]));
    }
}

/* The first output is finite and mostly not zero; what is right is for the tests to know. */
static void verify(const bench *b, int what)
{
    const sebp_matrix *to = what == EMBEDDING_BACK ? &b->dtable : &b->at[0];
    int64_t nonzero = 0, elements = 0;
    if (what != NORM && what != SCALE) {
        memset(to->data, 0xff, matrix_bytes(to));
    }
    perform(b, what);
    int64_t rows =
        what == CROSS_ENTROPY ? b->rows * b->cols / CLASSES * CLASSES / b->cols : to->rows;
    for (int64_t i = 0; i < rows; i += 97) {
        for (int64_t j = 0; j < to->cols; j++) {
            double value = element(to, i, j);
            if (!isfinite(value)) {
                die(FAILED, "%s: element %" PRId64 ",%" PRId64 " is %g", works[what].name, i, j,
                    value);
            }
            nonzero += value != 0;
            elements++;
        }
    }
    if (what != EMBEDDING_BACK && nonzero * 3 < elements) {
        die(FAILED, "%s: only %" PRId64 " of %" PRId64 " elements are not zero", works[what].name,
            nonzero, elements);
    }
}

static double bytes_of(const bench *b, int what)
{
    double array = (double)matrix_bytes(&b->at[0]);
    double table = what == EMBEDDING_BACK ? (double)matrix_bytes(&b->dtable) : 0;
    return array * (works[what].reads + works[what].writes) + table;
}

static void print_results(bench *b)
{
    double fastest[WORKS], best = 0;
    for (int what = 0; what < WORKS; what++) {
        qsort(b->ms[what], (size_t)b->count, sizeof(double), compare_doubles);
        fastest[what] = b->ms[what][0];
        if (what <= TRIAD) {
            best = fmax(best, bytes_of(b, what) / fastest[what]);
        }
    }
    for (int what = 0; what < WORKS; what++) {
        double ms = fastest[what], speed = bytes_of(b, what) / ms;
        if (b->asked->csv) {
            printf("%s,%" PRId64 ",%" PRId64 ",%s,%d,%s,%d,%.4f,%.2f,%.3f\n", works[what].name,
                   b->rows, b->cols, sebp_dtype_name(b->dtype), b->m->threads, sebp_isa(), b->count,
                   ms, speed * 1e-6, speed / best);
        } else {
            printf("%-20s %10.3f %10.1f %12.2f\n", works[what].name, ms, speed * 1e-6,
                   speed / best);
        }
    }
}

static void measure(bench *b)
{
    double begin = now_ms();
    for (b->count = 0; b->count < MAX_ROUNDS; b->count++) {
        if (b->count >= b->asked->repetitions &&
            now_ms() - begin >= b->asked->seconds * WORKS * 100) {
            break;
        }
        for (int what = 0; what < WORKS; what++) {
            if (b->count == 0) {
                perform(b, what);
            }
            double start = now_ms();
            perform(b, what);
            b->ms[what][b->count] = now_ms() - start;
        }
    }
}

static void run_bench(const machine *m, const options *o, int64_t cols, sebp_dtype dtype)
{
    bench *b = allocate(sizeof *b);
    memset(b, 0, sizeof *b);
    b->m = m;
    b->asked = o;
    b->cols = cols;
    b->rows = (o->quick ? INT64_C(1) << 20 : INT64_C(8) << 20) / cols;
    b->dtype = dtype;
    for (int i = 0; i < ARRAYS; i++) {
        b->at[i] = new_matrix(b, b->rows, cols, dtype);
    }
    b->gain = new_matrix(b, 1, cols, SEBP_F32);
    b->shift = new_matrix(b, 1, cols, SEBP_F32);
    b->dgain = new_matrix(b, 1, cols, SEBP_F32);
    b->dshift = new_matrix(b, 1, cols, SEBP_F32);
    b->statistics = new_matrix(b, b->rows, 2, SEBP_F32);
    b->angles = new_matrix(b, 512, HEAD, SEBP_F32);
    b->table = new_matrix(b, CLASSES, cols, dtype);
    b->dtable = new_matrix(b, CLASSES, cols, dtype);
    b->indices = allocate((size_t)b->rows * sizeof(int64_t));
    b->labels = allocate((size_t)b->rows * sizeof(int64_t));
    b->positions = allocate((size_t)b->rows * sizeof(int64_t));
    for (int64_t i = 0; i < b->rows; i++) {
        b->indices[i] = (int64_t)(random_bits(o->seed, (uint64_t)i) % CLASSES);
        b->labels[i] = b->indices[i];
        b->positions[i] = i % 512;
    }
    if (!o->csv) {
        printf("\n%" PRId64 " rows of %" PRId64 ", %s\n", b->rows, cols, sebp_dtype_name(dtype));
    }
    for (int what = 0; what < WORKS; what++) {
        verify(b, what);
    }
    if (o->verify_only) {
        puts("verified");
    } else {
        if (!o->csv) {
            printf("%-20s %10s %10s %12s\n", "layer", "ms", "GB/s", "efficiency");
        }
        measure(b);
        print_results(b);
    }
    sebp_matrix *all[] = {&b->gain,       &b->shift,  &b->dgain, &b->dshift,
                          &b->statistics, &b->angles, &b->table, &b->dtable};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]->data);
    }
    for (int i = 0; i < ARRAYS; i++) {
        free(b->at[i].data);
    }
    free(b->indices);
    free(b->labels);
    free(b->positions);
    free(b);
}

void measure_layers(const machine *m, const options *o)
{
    if (o->csv) {
        puts("layer,rows,cols,dtype,threads,isa,repetitions,ms,gbs,efficiency");
    } else {
        print_machine_line(m);
        puts("Times are the best seen. efficiency = bytes that must move / bandwidth / time;\n"
             "the bandwidth is that of the copy or the triad");
    }
    for (int bf16 = 0; bf16 < 2; bf16++) {
        if (o->dtypes >> bf16 & 1) {
            const sebp_dtype dtype = bf16 ? SEBP_BF16 : SEBP_F32;
            run_bench(m, o, 768, dtype);
            if (!o->quick) {
                run_bench(m, o, 4096, dtype);
            }
        }
    }
    if (fflush(stdout) != 0) {
        die(FAILED, "cannot write: %s", strerror(errno));
    }
}
