/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file backend.h
 * The table of operations a device offers. The methods are written over it alone; a new device is a
 * new table and changes no method.
 *
 * Arguments are valid when they get here: views checked, shapes fitting, nothing overlapping.
 *
 * Pointers to elements, to lists of rows and to the arrays of a sebp_sparse are the device's own, as
 * alloc() gives them: a method may add to them, and never reads or writes through them. Structs,
 * counts, scores and texts are the host's.
 *
 * Every operation that computes returns a status: SEBP_SUCCESS; SEBP_ERROR_MEMORY, with nothing
 * written; SEBP_ERROR_BACKEND where the device fails, which may leave outputs half written; and
 * what it says itself. It may still be at work when it returns, unless it has a result for the host;
 * operations of one device happen in the order of their calls.
 */
#ifndef SEBP_BACKEND_H
#define SEBP_BACKEND_H

#include <stdalign.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <sebp/context.h>
#include <sebp/info.h>
#include <sebp/matrix.h>
#include <sebp/optim.h>
#include <sebp/sequences.h>
#include <sebp/sparse.h>
#include <sebp/status.h>

#include "layer_work.h"

/** One factor of a product: memory rows picked out of a matrix, possibly transposed. */
typedef struct sebp_operand {
    const void *data;
    int64_t stride;
    const int64_t *rows; /* memory rows; NULL: as they lie */
    bool transposed;     /* the factor is the transpose of what lies in memory */
    sebp_dtype dtype;
} sebp_operand;

/** Packed copies of a matrix, for products whose factor B is that matrix or its transpose: a device's
 * own. */
typedef struct sebp_packed sebp_packed;

/**
 * C (+)= A B + bias + residual, with A: m x k, B: k x n, C: m x n, sums in f32. m, n, k >= 0; k = 0
 * gives what is added, or zero.
 *
 * A and B are of either dtype. Where one is f32, `precision` says how exact the product must be, and a
 * device takes what is fastest of those that are; SEBP_PRECISION_DEFAULT: HIGHEST. `c_rows`
 * scatters: row i of the product goes to row c_rows[i] of C. The residual, `activated` and `before` have
 * C's shape, dtype and rows.
 *
 * Then activated = f(C), or C becomes C f'(before), both of C as it is stored: the same bits as the
 * operation activation() gives of it.
 */
typedef struct sebp_product {
    int64_t m, n, k;
    sebp_precision precision;
    sebp_operand a, b;
    sebp_packed *packed_b; /* copies of B's matrix, whole; NULL: none */
    void *c;
    int64_t c_stride;
    const int64_t *c_rows; /* NULL: as they lie */
    sebp_dtype c_dtype;
    bool accumulate;
    bool other_rows_are_free; /* rows of C not in c_rows hold nothing: the product may use them */
    const void *bias;         /* n elements or NULL; never with accumulate */
    sebp_dtype bias_dtype;
    const void *residual; /* NULL: none; it may be c; never with accumulate */
    int64_t residual_stride;
    sebp_activation activation; /* f */
    void *activated;            /* NULL: not wanted; it may be c or the residual */
    int64_t activated_stride;
    const void *before; /* NULL: C stays; never with activated or accumulate */
    int64_t before_stride;
} sebp_product;

enum {
    SEBP_PLAN_BYTES = 448,
    SEBP_WHY_BYTES = 160 /* room for what is said about a failure */
};

/** A product that is ready to run: how is settled, and there is memory for it. Not to be copied. */
typedef struct sebp_plan {
    sebp_product product;
    const char
        *path; /* who does it, and why: "native:auto"; of a run that failed, what has failed */
    alignas(max_align_t) unsigned char device[SEBP_PLAN_BYTES]; /* the device's own notes */
} sebp_plan;

/**
 * A product of which few elements are wanted: sums[i] (+)= the sum over r < m of A[r][n] B[r][k], in
 * f32, where (n, k) is the i-th element kept. A: m x N and B: m x K, as they lie, of one dtype.
 */
typedef struct sebp_sampled {
    int64_t m;
    sebp_operand a, b;       /* not transposed */
    const sebp_sparse *kept; /* N x K; its values are neither read nor written */
    float *sums;             /* NULL: nothing is computed, and there is memory for it from now on */
    bool accumulate;
} sebp_sampled;

/** What a scan tells of each row. */
typedef enum sebp_measure {
    SEBP_MEASURE_NONZERO,   /* 1 if any element is not +-0, else 0 */
    SEBP_MEASURE_ABOVE,     /* 1 if any magnitude is above the limit, NaN or Inf, else 0 */
    SEBP_MEASURE_SQUARE_SUM /* the sum of squares, in double; Inf for a row with NaN or Inf */
} sebp_measure;

/** The k elements of largest magnitude of a matrix that comes in panels: a device's own. */
typedef struct sebp_top sebp_top;

/** An attention, as attention.h has it, its options settled. */
typedef struct sebp_attention {
    int64_t heads, kv_heads, head_size;
    double scale, softcap;             /* softcap 0: none */
    int64_t window_left, window_right; /* >= 0; SEBP_UNLIMITED: all keys */
    double dropout;
    uint64_t seed, offset;
    bool zero_other_rows; /* of the outputs, outside the texts */
    const sebp_sequences *q_sequences, *k_sequences;
    const sebp_matrix *q, *k, *v, *out;
    const sebp_matrix *bias, *lse;           /* or NULL: none, not wanted */
    const sebp_matrix *dout;                 /* of the backward, as the next */
    const sebp_matrix *dq, *dk, *dv, *dbias; /* NULL: not wanted */
} sebp_attention;

static const int64_t SEBP_UNLIMITED = INT64_MAX / 8;

typedef struct sebp_backend {
    const char *name; /* "cpu" */
    /** Whether the device works on the host's memory: what the host has needs no copy. */
    bool uses_host_memory;

    /* Memory. */

    /** At least one byte, aligned for any element. SEBP_ERROR_MEMORY. */
    sebp_status (*alloc)(void *device, int64_t bytes, void **memory);
    /** NULL: nothing. Any thread may call it, at any time. */
    void (*free)(void *device, void *memory);
    /** From the host's memory; returns when that may be changed. */
    sebp_status (*upload)(void *device, void *to, const void *from, int64_t bytes);
    /** To the host's memory; returns when all is there. */
    sebp_status (*download)(void *device, void *to, const void *from, int64_t bytes);
    /** Returns when all that was asked for is done; an error that comes to light is its status. */
    sebp_status (*synchronize)(void *device);
    /** Whether it can read and write there. What cannot be told is true. */
    bool (*owns)(void *device, const void *memory);
    /** After SEBP_ERROR_BACKEND, what failed in the device's own words; "": it has none. */
    const char *(*why)(const void *device);

    /**
     * Says that the operations from now on do not need each other's results and write to different
     * places, so that they may be at work at once; `overlap` false: no more. What comes after waits for
     * all of them, and they wait for all before. Rows that a product was free to use may be zeroed
     * among them: a device whose products use such rows has to see to the order.
     */
    void (*let_overlap)(void *device, bool overlap);

    /* Scratch memory reserved for a method, for what it has between its products. */

    /** SEBP_ERROR_MEMORY over max_scratch(). 0 gives it back. Its address, scratch(), is settled, and
     * what it holds is kept, once every product that will run is planned. */
    sebp_status (*reserve_scratch)(void *device, int64_t bytes);
    int64_t (*max_scratch)(const void *device);
    void *(*scratch)(const void *device);

    /* Products. */

    /** Settles how a product is done, and has the memory for it: a run cannot fail for want of it.
     * plan->product is filled in by the caller. SEBP_ERROR_MEMORY. */
    sebp_status (*plan_product)(void *device, sebp_plan *plan);
    /** May run any number of times, while the scratch memory reserved for the method is as it was. */
    sebp_status (*run_product)(void *device, sebp_plan *plan);

    /* Copies of a factor, kept from product to product. They change no product's status. */

    /** Copies of one matrix, none of them made yet, of at most max_bytes >= 1 together. *packed NULL: the
     * device keeps none, and the next three are not called. SEBP_ERROR_MEMORY. */
    sebp_status (*packed_make)(void *device, int64_t max_bytes, sebp_packed **packed);
    /** The matrix may hold other values from now on. No plan is waiting to run. */
    void (*packed_forget)(sebp_packed *packed);
    int64_t (*packed_bytes)(const sebp_packed *packed);
    void (*packed_free)(void *device, sebp_packed *packed);

    /* Rows. */

    /** score: dy->rows results, on the host. */
    sebp_status (*scan_rows)(void *device, const sebp_matrix *dy, sebp_measure measure,
                             double limit, double *score);
    /** Zeroes the rows of `to` that are not among the `count` rows listed. */
    sebp_status (*zero_other_rows)(void *device, const sebp_matrix *to, const int64_t *rows,
                                   int64_t count);
    /** to (1 x n) (+)= the sum of the `count` rows of `from` listed; rows NULL: the first ones. */
    sebp_status (*sum_rows)(void *device, const sebp_matrix *from, const int64_t *rows,
                            int64_t count, const sebp_matrix *to, bool accumulate);
    /** to: f32, count x to->cols, = the rows of `from`, either dtype, that are listed; rows NULL:
     * the first ones. Row i of `to` is then multiplied by weights[i]; NULL: by nothing. */
    sebp_status (*widen_rows)(void *device, const sebp_matrix *from, const int64_t *rows,
                              const float *weights, int64_t count, const sebp_matrix *to);

    /* Elements. */

    /**
     * One AdamW step of all elements (optim.h); with step_alone `w` is not read, becomes the step,
     * and may be `gradient` itself. All four are of one shape, the moments f32.
     */
    sebp_status (*adamw)(void *device, const sebp_adamw_options *options, int64_t step,
                         const sebp_matrix *gradient, const sebp_matrix *w,
                         const sebp_matrix *moment1, const sebp_matrix *moment2, bool step_alone);
    /** matrix *= factor, in f32; of bf16 the product is then rounded. */
    sebp_status (*scale)(void *device, const sebp_matrix *matrix, double factor);
    /** w = keep w + d, rounded stochastically (optim.h). w: bf16; d: f32, of its shape, or NULL for 0. */
    sebp_status (*add_stochastic)(void *device, const sebp_matrix *d, double keep, uint64_t seed,
                                  uint64_t offset, const sebp_matrix *w);
    /** Whether `count` indices ascend, each once, each in [0, end). */
    sebp_status (*check_indices)(void *device, const int64_t *indices, int64_t count, int64_t end,
                                 bool *valid);
    /** The values of the kept elements that lie in whole rows, f32, of which `first` is the index of
     * the first element; those of others stay. SEBP_ERROR_NONFINITE, and nothing written, where one is
     * NaN or Inf. */
    sebp_status (*take_elements)(void *device, const sebp_matrix *from, int64_t first,
                                 const sebp_sparse *kept);
    /** to += s, each element rounded once. */
    sebp_status (*add_elements)(void *device, const sebp_sparse *s, const sebp_matrix *to);

    /* Top-k: exactly k, ties by the lowest index; NaN and Inf rank above all others. */

    /** k >= 1. SEBP_ERROR_OVERFLOW, SEBP_ERROR_MEMORY. */
    sebp_status (*top_begin)(void *device, int64_t k, sebp_top **top);
    /** The next rows, f32; `first` is the index of their first element, row * cols. Panels come in
     * order, each element once. */
    sebp_status (*top_feed)(void *device, sebp_top *top, const sebp_matrix *panel, int64_t first);
    /** Writes the k elements, of at least k fed, into `to`; SEBP_ERROR_NONFINITE, and nothing
     * written, where one is NaN or Inf. */
    sebp_status (*top_finish)(void *device, const sebp_top *top, const sebp_sparse *to);
    void (*top_end)(void *device, sebp_top *top);

    /** SEBP_ERROR_MEMORY. What was found to have memory has it while the scratch memory reserved for
     * the method is as it was. */
    sebp_status (*sampled_product)(void *device, const sebp_sampled *product);

    /** Whether that takes less time than the whole product of A^T and B, N x K, by panels of its rows,
     * and taking the elements from there: by a model of the cost, never by a clock. */
    bool (*sampled_is_cheaper)(const void *device, const sebp_sampled *product);

    /* The update of SparseGrad. */

    /** W += out^T S in, either dtype, with out: p x N, in: q x K, both f32, S: p x q of at least one
     * element, W: N x K. SEBP_ERROR_MEMORY. */
    sebp_status (*sparse_update)(void *device, const sebp_sparse *s, const sebp_matrix *out,
                                 const sebp_matrix *in, const sebp_matrix *w);

    /* Attention (attention.h). SEBP_ERROR_MEMORY where there is no scratch memory; then nothing is
     * written. Sequences are the host's: a device that reads them there makes copies. */

    sebp_status (*attention_forward)(void *device, const sebp_attention *attention);
    sebp_status (*attention_backward)(void *device, const sebp_attention *attention);

    /* Eigenvectors, of matrices in the host's memory. */

    /**
     * The eigenvectors of the largest eigenvalues of a symmetric matrix, as many as `vectors` has
     * rows, n of n elements, by ascending eigenvalue; values: n floats of room, of which the first
     * vectors->rows are set. sum: n x n, f32 without gaps, its upper triangle; the lower one is
     * overwritten. What fails says why: "LAPACK's ssyevd finds no eigenvectors: 3".
     * SEBP_ERROR_NONFINITE where what comes out of finite numbers is not;
     * SEBP_ERROR_UNSUPPORTED where the device, or the build, cannot.
     */
    sebp_status (*eigenvectors)(void *device, const sebp_matrix *sum, const sebp_matrix *vectors,
                                float *values, char why[SEBP_WHY_BYTES]);

    /*
     * Row-wise layers (layer_work.h). SEBP_ERROR_MEMORY where there is no scratch memory; then nothing
     * is written.
     */

    sebp_status (*norm_forward)(void *device, const sebp_norm_work *work);
    sebp_status (*norm_backward)(void *device, const sebp_norm_back_work *work);
    sebp_status (*activation)(void *device, const sebp_activation_work *work);
    sebp_status (*dropout)(void *device, const sebp_dropout_work *work);
    sebp_status (*rotary)(void *device, const sebp_rotary_work *work);
    sebp_status (*cross_entropy)(void *device, const sebp_cross_entropy_work *work);
    /** *loss = scale times the sum of the losses of the rows of a list whose state knows all chunks,
     * always in the same order; `logits` and what follows it do not matter. Needs no memory. */
    sebp_status (*sum_losses)(void *device, const sebp_cross_entropy_work *work, double *loss);
    sebp_status (*gather)(void *device, const sebp_gather_work *work);
    sebp_status (*sum_groups)(void *device, const sebp_group_sums *sums);

    /* What there is to know. */

    int64_t (*scratch_bytes)(const void *device);      /* the most held so far */
    void (*info)(const void *device, sebp_info *info); /* the machine; placement, gemm, refusal */
    void (*destroy)(void *device);
} sebp_backend;

#endif
