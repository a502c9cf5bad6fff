/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file optim.h
 * AdamW: the fused dense step, and the sparse step, whose state is as large as the number of
 * elements that train. Sums in bf16 that are rounded stochastically.
 *
 * Step t (1 is the first) of an element w with gradient g and moments m and v, all in f32:
 *
 *     m <- beta1 m + (1 - beta1) g
 *     v <- beta2 v + (1 - beta2) g^2
 *     s  = - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
 *     w <- (1 - lr weight_decay) w + s
 *
 * This is torch.optim.AdamW's step: the bias of both moments is corrected before epsilon is added,
 * and weight decay is decoupled from the gradient. Factors that are the same for all elements are
 * computed in double precision and rounded once. A bf16 weight is rounded once, after the whole
 * step; moments are always f32.
 *
 * Each element is computed from its own numbers alone. So the bits do not depend on the number of
 * threads, nor, without weight decay, on whether the step is dense or sparse.
 *
 * A gradient that holds a NaN or an Inf is refused with SEBP_ERROR_NONFINITE. Weights, moments and
 * the count of steps stay as they were. The weights themselves are not checked. A finite gradient
 * above 1.8e19 makes g^2 and v Inf, in PyTorch as well: that element has steps of 0 from then on.
 */
#ifndef SEBP_OPTIM_H
#define SEBP_OPTIM_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/sparse.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * All have to be finite as f32, and so do the products lr weight_decay and, in a step,
 * lr / (1 - beta1^t). Anything else, NaN included, is SEBP_ERROR_VALUE.
 */
typedef struct sebp_adamw_options {
    size_t size_bytes;    /**< sizeof(sebp_adamw_options), so that the struct can grow */
    double learning_rate; /**< lr, >= 0 */
    double beta1;         /**< in [0, 1) */
    double beta2;         /**< in [0, 1) */
    double epsilon;       /**< > 0, also as an f32 */
    double weight_decay;  /**< >= 0 */
} sebp_adamw_options;

/** torch.optim.AdamW's defaults, with size_bytes set. */
#define SEBP_ADAMW_OPTIONS_INIT                                                                    \
    {                                                                                              \
        sizeof(sebp_adamw_options), 1e-3, 0.9, 0.999, 1e-8, 1e-2                                   \
    }

/**
 * One dense step. A first pass over the gradient checks that it is finite; a second one updates the
 * weight and both moments.
 *
 * @param gradient  any size, either dtype, any stride.
 * @param step      t >= 1.
 * @param options   NULL: the defaults.
 * @param w         of the gradient's shape, either dtype.
 * @param moment1   m, of the same shape, f32; zeros before the first step.
 * @param moment2   v, likewise, and never negative.
 *
 * w, moment1 and moment2 overlap nothing.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (a moment not f32); SEBP_ERROR_VALUE (an option, step);
 *         SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS; SEBP_ERROR_NONFINITE.
 */
SEBP_API sebp_status sebp_adamw_step(sebp_context *context, const sebp_matrix *gradient,
                                     int64_t step, const sebp_adamw_options *options,
                                     const sebp_matrix *w, const sebp_matrix *moment1,
                                     const sebp_matrix *moment2);

/**
 * W <- (1 - lr weight_decay) W. Methods with a sparse step S call it before S is added. Rotating W
 * is linear, so decay is the same in a rotated space. With leading vectors alone, the part of W
 * outside their span decays, too.
 *
 * @param options  NULL: the defaults. All are checked, but only learning_rate and weight_decay are
 *                 used. If their product is 0 nothing is read or written.
 * @param w        any size, either dtype, any stride. bf16 weights round a decay of less than about
 *                 2^-9 away, here as in the dense step.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_VALUE (an option).
 */
SEBP_API sebp_status sebp_weight_decay(sebp_context *context, const sebp_adamw_options *options,
                                       const sebp_matrix *w);

/* ---- sums rounded stochastically ---- */

/** What a sum in bf16 is rounded by; see sebp_stochastic_add(). */
typedef struct sebp_stochastic_options {
    size_t size_bytes; /**< sizeof(sebp_stochastic_options), so that the struct can grow */
    uint64_t seed;     /**< of the random numbers (random.h) */
    uint64_t offset;   /**< another one for each call of a training run */
    double decay;      /**< in [0, 1]; 0: none */
} sebp_stochastic_options;

/** Without decay, with size_bytes set. */
#define SEBP_STOCHASTIC_OPTIONS_INIT                                                               \
    {                                                                                              \
        sizeof(sebp_stochastic_options), 0, 0, 0                                                   \
    }

/**
 * W <- (1 - decay) W + D in f32, each element then rounded stochastically to one of its two
 * neighbours in bf16: to the upper one with a probability that is the share of the way to it, so that
 * the mean is the sum itself (Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep learning
 * with limited numerical precision", ICML 2015). A step below 2^-9 of a weight, which rounding to
 * nearest always loses, moves the weight then in the mean. No master copy in f32 is needed. What f32 itself
 * loses stays lost: 1 - decay and the sum are rounded to it, so a decay is one of multiples of 2^-24.
 *
 * Of the sum's bits as an f32 the lower 16 are dropped after floor(2^16 u) was added to them, with u
 * of random.h. Row i of W begins at element i * 64 * ceil(columns / 64). So the bits depend on seed,
 * offset, W and D alone: not on threads, the CPU or the device. A sum that is exact in bf16 stays. A
 * sum above the largest bf16 may become Inf; Inf and NaN are as rounding to nearest leaves them.
 *
 * D is what sebp_sparsegrad_update(), sebp_sparse_add() or sebp_lora_merge() add to an f32 matrix of
 * zeros, which all layers may share.
 *
 * @param d        f32, of W's shape, any stride. NULL: 0, as for a decay alone.
 * @param options  NULL: the defaults.
 * @param w        bf16, any size, any stride; overlaps nothing.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (d not f32, w not bf16); SEBP_ERROR_VALUE (decay); SEBP_ERROR_SHAPE;
 *         SEBP_ERROR_ALIAS; SEBP_ERROR_NONFINITE (a NaN or Inf in D); SEBP_ERROR_BACKEND. Only the
 *         last may leave W half written.
 */
SEBP_API sebp_status sebp_stochastic_add(sebp_context *context, const sebp_matrix *d,
                                         const sebp_stochastic_options *options,
                                         const sebp_matrix *w);

/* ---- the sparse step ---- */

/**
 * Moments of the elements of one matrix that train, and the number of steps taken. Owns its memory,
 * belongs to no context, and is used by one thread at a time.
 *
 * The support is the set of elements that train. With a **fixed support** the state holds 16 bytes
 * for each of its k elements: index, m, v. Where the support is **chosen anew** in each step, it
 * holds every element that was in any gradient so far, in a hash table with places of 16 bytes and a
 * bit. The table is filled to three quarters at most and doubles when it is full: 22 to 43 bytes an
 * element. sebp_sparse_adamw_drop_unused() bounds it.
 *
 * The step is lazy, like that of torch.optim.SparseAdam, with which SparseGrad was trained. An
 * element that is not in a gradient does not move, and its moments stay as they are, however many
 * steps pass. t counts the steps of the whole matrix, not those of an element. On a gradient of all
 * elements the step equals the dense one bit for bit. (SparseAdam adds epsilon before it corrects
 * the bias. This step adds it after, as AdamW does.)
 */
typedef struct sebp_sparse_adamw sebp_sparse_adamw;

/**
 * Makes a state for a matrix of rows x cols, before the first step.
 *
 * @param support  the elements of a fixed support: `count` indices row * cols + col, ascending,
 *                 each once; copied. NULL: chosen anew in each step; `count` is then 0.
 * @param state    where the state is put, untouched on error; free it with
 *                 sebp_sparse_adamw_destroy().
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (state; support is NULL and count is not 0);
 *         SEBP_ERROR_SIZE (negative); SEBP_ERROR_OVERFLOW; SEBP_ERROR_ROWS (indices out of range,
 *         unsorted, repeated); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_sparse_adamw_create(int64_t rows, int64_t cols, const int64_t *support,
                                              int64_t count, sebp_sparse_adamw **state);

/** Frees a state. NULL: nothing. */
SEBP_API void sebp_sparse_adamw_destroy(sebp_sparse_adamw *state);

/**
 * One step: updates the state, and replaces `gradient->values` by S, which the caller then *adds*
 * to the weights (sparse.h). Weights do not decay here: see sebp_weight_decay().
 *
 * @param state     of a matrix of the gradient's shape.
 * @param options   NULL: the defaults. weight_decay is checked, but not used.
 * @param gradient  With a fixed support it has exactly those elements. Its indices may then be the
 *                  array of sebp_sparse_adamw_support() itself, so that gradient and state together
 *                  take 20 bytes an element. A gradient without elements only increases t.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; SEBP_ERROR_OVERFLOW; SEBP_ERROR_VALUE (an
 *         option); SEBP_ERROR_ROWS (indices out of range, unsorted, repeated, or not the fixed
 *         support's); SEBP_ERROR_SHAPE; SEBP_ERROR_NONFINITE; SEBP_ERROR_MEMORY (the table cannot
 *         grow).
 */
SEBP_API sebp_status sebp_sparse_adamw_step(sebp_context *context, sebp_sparse_adamw *state,
                                            const sebp_adamw_options *options,
                                            const sebp_sparse *gradient);

/**
 * Drops the moments of the elements that no gradient has had since the last call of this function,
 * or since the state was made or imported: they begin at 0 when they are chosen again. Called after
 * each n-th step, it drops what has not been chosen for n to 2 n steps. The state then holds at most
 * the elements of 2 n gradients. With a fixed support nothing is done.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_MEMORY (of the smaller table). On error the
 *         state is as it was.
 */
SEBP_API sebp_status sebp_sparse_adamw_drop_unused(sebp_sparse_adamw *state);

/** How many elements the state has moments of. 0 for NULL. */
SEBP_API int64_t sebp_sparse_adamw_count(const sebp_sparse_adamw *state);

/** t: how many steps were taken. 0 for NULL. */
SEBP_API int64_t sebp_sparse_adamw_steps(const sebp_sparse_adamw *state);

/** The indices of a fixed support, ascending, for as long as the state lives. NULL for NULL, and
 * for a support that is chosen anew. */
SEBP_API const int64_t *sebp_sparse_adamw_support(const sebp_sparse_adamw *state);

/** Bytes of memory that the state takes. 0 for NULL. */
SEBP_API int64_t sebp_sparse_adamw_bytes(const sebp_sparse_adamw *state);

/**
 * Copies the state out, for a checkpoint: sebp_sparse_adamw_count() elements, by ascending index,
 * so that equal states give equal bytes. The caller has to keep the shape, the number of steps and
 * the kind of support.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (an array may be NULL only where the count is 0);
 *         SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_sparse_adamw_export(const sebp_sparse_adamw *state, int64_t *indices,
                                              float *moment1, float *moment2);

/**
 * Replaces what the state holds by an exported state. Training then goes on bit for bit.
 *
 * @param steps    t, in [0, 2^53].
 * @param indices  `count` of them, as exported; with a fixed support exactly its elements.
 * @param moment1  finite.
 * @param moment2  not negative, not NaN.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (an array may be NULL only where count is 0);
 *         SEBP_ERROR_SIZE (count negative); SEBP_ERROR_VALUE (steps, a moment); SEBP_ERROR_ROWS (as
 *         sebp_sparse_adamw_step()); SEBP_ERROR_OVERFLOW (count); SEBP_ERROR_MEMORY. On error the
 *         state is as it was.
 */
SEBP_API sebp_status sebp_sparse_adamw_import(sebp_sparse_adamw *state, int64_t steps,
                                              const int64_t *indices, const float *moment1,
                                              const float *moment2, int64_t count);

/**
 * Which of the exported elements the next sebp_sparse_adamw_drop_unused() keeps: 1, or 0 for those
 * that it drops. All are kept after an import, so a run that drops saves this beside the state.
 *
 * @param used  sebp_sparse_adamw_count() numbers; 1 with a fixed support.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (used may be NULL only where the count is 0);
 *         SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_sparse_adamw_export_used(const sebp_sparse_adamw *state, uint8_t *used);

/**
 * Puts exported numbers back, after sebp_sparse_adamw_import(). With a fixed support they are
 * checked only.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (used may be NULL only where count is 0); SEBP_ERROR_SIZE
 *         (count is not the state's); SEBP_ERROR_VALUE (neither 0 nor 1); SEBP_ERROR_MEMORY. On
 *         error the state is as it was.
 */
SEBP_API sebp_status sebp_sparse_adamw_import_used(sebp_sparse_adamw *state, const uint8_t *used,
                                                   int64_t count);

SEBP_END_DECLS

#endif
