/* SPDX-License-Identifier: Apache-2.0 */
#include "config.h"

#include "allocation.h"

static sebp_status call_backward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_backward(context, &on.dy, &on.x, &on.w, on.rows, NULL, &on.dx, &on.dw,
                                &on.db);
}

/* Each product alone, as both share the scratch memory that the larger one asks for. */
static sebp_status call_backward_dx(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_backward(context, &on.dy, NULL, &on.w, on.rows, NULL, &on.dx, NULL, NULL);
}

static sebp_status call_backward_dw(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_backward(context, &on.dy, &on.x, NULL, on.rows, NULL, NULL, &on.dw, NULL);
}

static sebp_status call_backward_found(sebp_context *context, void **result)
{
    (void)result;
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_energy(0.25);
    return sebp_linear_backward(context, &on.dy, &on.x, &on.w, NULL, &options, &on.dx, &on.dw,
                                &on.db);
}

static sebp_status call_backward_sampled(sebp_context *context, void **result)
{
    (void)result;
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_sampled(0.5, 3);
    return sebp_linear_backward(context, &on.dy, &on.x, &on.w, NULL, &options, &on.dx, &on.dw,
                                &on.db);
}

static sebp_status call_forward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_forward(context, &on.x, &on.w, &on.bias, on.rows, NULL, &on.y);
}

static sebp_status call_packed_weight(sebp_context *context, void **result)
{
    sebp_packed_weight *made = NULL;
    sebp_status status = sebp_packed_weight_create(context, &on.w, 0, &made);
    *result = made;
    return status;
}

static sebp_status call_lora_forward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_lora_forward(context, &on.x, &on.w, &on.bias, &on.a, &on.b, 2, on.rows, NULL, &on.h,
                             &on.y);
}

/* H is as good a matrix as any of its shape. */
static sebp_status call_lora_backward(sebp_context *context, void **result)
{
    (void)result;
    sebp_matrix saved = on.x;
    saved.rows = sebp_rows_count(on.rows);
    saved.cols = on.a.cols;
    return sebp_lora_backward(context, &on.dy, &on.x, &on.w, &on.a, &on.b, &saved, 2, on.rows, NULL,
                              &on.dh, &on.dx, &on.da, &on.lora_db);
}

static sebp_status call_meprop(sebp_context *context, void **result)
{
    (void)result;
    return sebp_meprop_gradient(context, &on.dy, &on.x, on.rows, NULL, &on.kept);
}

static sebp_status call_sampled(sebp_context *context, void **result)
{
    (void)result;
    sebp_sparse kept = on.kept; /* whose indices are an input here */
    int64_t indices[ALLOCATION_KEPT];
    for (int64_t i = 0; i < ALLOCATION_KEPT; i++)
        indices[i] = 3 * i;
    kept.indices = indices;
    return sebp_sampled_product(context, &on.dy, &on.x, on.rows, NULL, &kept);
}

static sebp_status call_sparsegrad(sebp_context *context, sebp_rotation rotation)
{
    return sebp_sparsegrad_gradient(context, on.basis, &on.dy, &on.x, on.rows, NULL, rotation,
                                    &on.r);
}

static sebp_status call_sparsegrad_kept(sebp_context *context, void **result)
{
    (void)result;
    sebp_sparse kept = on.kept; /* whose indices are an input here */
    int64_t indices[ALLOCATION_KEPT];
    kept.rows = on.r.rows;
    kept.cols = on.r.cols;
    kept.count = ALLOCATION_KEPT < kept.rows * kept.cols ? ALLOCATION_KEPT : kept.rows * kept.cols;
    for (int64_t i = 0; i < kept.count; i++)
        indices[i] = i;
    kept.indices = indices;
    return sebp_sparsegrad_kept(context, on.basis, &on.dy, &on.x, on.rows, NULL,
                                SEBP_ROTATE_FACTORS, &kept);
}

static sebp_status call_sparsegrad_factors(sebp_context *context, void **result)
{
    (void)result;
    return call_sparsegrad(context, SEBP_ROTATE_FACTORS);
}

static sebp_status call_sparsegrad_dy(sebp_context *context, void **result)
{
    (void)result;
    return call_sparsegrad(context, SEBP_ROTATE_DY);
}

static sebp_status call_sparsegrad_in_out(sebp_context *context, void **result)
{
    (void)result;
    return call_sparsegrad(context, SEBP_ROTATE_IN_OUT);
}

/* W is added to, and stays poison whatever is: so it is zero here, and poison again if it still is. */
static sebp_status call_sparsegrad_update(sebp_context *context, void **result)
{
    (void)result;
    int64_t indices[4] = {3, 77, 80, 1199};
    float values[4] = {1, 2, 3, 4};
    const sebp_sparse s = {indices, values, 4, 30, 40};
    for (int64_t i = 0; i < on.dw.rows * on.dw.cols; i++) {
        testing_set(&on.dw, i / on.dw.cols, i % on.dw.cols, 0);
    }
    sebp_status status = sebp_sparsegrad_update(context, on.basis, &s, &on.dw);
    if (status != SEBP_SUCCESS && testing_nonzeros(&on.dw) == 0) {
        testing_poison(&on.dw);
    }
    return status;
}

static sebp_status call_sparse_top(sebp_context *context, void **result)
{
    (void)result;
    sebp_matrix from = sebp_basis_in(on.basis); /* 40 x 40, finite, as good as any */
    from.rows = on.kept.rows;
    return sebp_sparse_top(context, &from, &on.kept);
}

static sebp_status call_sums_create(sebp_context *context, void **result)
{
    (void)context;
    sebp_basis_sums *made = NULL;
    sebp_status status = sebp_basis_sums_create(30, 40, &made);
    *result = made;
    return status;
}

static sebp_status call_sums_add(sebp_context *context, void **result)
{
    (void)result;
    return sebp_basis_sums_add(context, on.sums, &on.w);
}

static sebp_status call_from_vectors(sebp_context *context, void **result)
{
    (void)context;
    sebp_basis *made = NULL;
    sebp_matrix u_out = sebp_basis_out(on.basis), u_in = sebp_basis_in(on.basis);
    sebp_status status = sebp_basis_from_vectors(&u_out, &u_in, &made);
    *result = made;
    return status;
}

static sebp_status call_basis_save(sebp_context *context, void **result)
{
    (void)result;
    return sebp_basis_save(context, on.basis, allocation_basis_path);
}

static sebp_status call_basis_load(sebp_context *context, void **result)
{
    sebp_basis *made = NULL;
    sebp_status status = sebp_basis_load(context, allocation_basis_path, &made);
    *result = made;
    return status;
}

#ifdef SEBP_HAVE_LAPACK
/* All vectors of one side, and the leading ones of the other. */
static sebp_status call_basis_solve(sebp_context *context, void **result)
{
    sebp_basis *made = NULL;
    sebp_status status = sebp_basis_solve(context, on.sums, 30, 10, &made);
    *result = made;
    return status;
}
#endif

static sebp_status call_sparse_adamw(sebp_context *context, void **result)
{
    (void)context;
    sebp_sparse_adamw *made = NULL;
    sebp_status status = sebp_sparse_adamw_create(30, 40, NULL, 0, &made);
    *result = made;
    return status;
}

static sebp_status call_sparse_adamw_fixed(sebp_context *context, void **result)
{
    (void)context;
    const int64_t support[3] = {2, 5, 6};
    sebp_sparse_adamw *made = NULL;
    sebp_status status = sebp_sparse_adamw_create(30, 40, support, 3, &made);
    *result = made;
    return status;
}

static sebp_status call_create(sebp_context *context, void **result)
{
    (void)context;
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *made = NULL;
    sebp_status status = sebp_context_create(&options, &made);
    *result = made;
    return status;
}

static sebp_status find_by(sebp_context *context, sebp_rule rule, void **result)
{
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_find(context, &on.dy, &rule, &made);
    *result = made;
    return status;
}

static sebp_status call_find_nonzero(sebp_context *context, void **result)
{
    return find_by(context, sebp_rule_nonzero(), result);
}

static sebp_status call_find_threshold(sebp_context *context, void **result)
{
    return find_by(context, sebp_rule_threshold(2), result);
}

static sebp_status call_find_top(sebp_context *context, void **result)
{
    return find_by(context, sebp_rule_top(20), result);
}

static sebp_status call_find_energy(sebp_context *context, void **result)
{
    return find_by(context, sebp_rule_energy(0.5), result);
}

static sebp_status call_sample(sebp_context *context, void **result)
{
    sebp_rows *made = NULL;
    const sebp_rule rule = sebp_rule_sampled(0.5, 3);
    sebp_status status = sebp_rows_sample(context, &on.dy, &on.x, &rule, &made);
    *result = made;
    return status;
}

static sebp_status call_dropped(sebp_context *context, void **result)
{
    (void)result;
    return sebp_rows_dropped(context, &on.dy, on.rows, &on.dropped);
}

static sebp_status call_all(sebp_context *context, void **result)
{
    (void)context;
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_all(50, &made);
    *result = made;
    return status;
}

static sebp_status call_from_mask(sebp_context *context, void **result)
{
    (void)context;
    const uint8_t mask[6] = {0, 1, 1, 0, 0, 1};
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_from_mask(mask, 6, &made);
    *result = made;
    return status;
}

static sebp_status call_from_lengths(sebp_context *context, void **result)
{
    (void)context;
    const int64_t lengths[3] = {2, 0, 3};
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_from_lengths(lengths, 3, 4, &made);
    *result = made;
    return status;
}

static sebp_status call_from_indices(sebp_context *context, void **result)
{
    (void)context;
    const int64_t indices[3] = {2, 5, 6};
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_from_indices(indices, 3, 7, &made);
    *result = made;
    return status;
}

/* Row-wise layers, on the layer's matrices. */

/* Of each of the 200 rows. */
static const int64_t *row_numbers(int64_t end)
{
    static int64_t numbers[200];
    for (int64_t i = 0; i < 200; i++) {
        numbers[i] = i % end;
    }
    return numbers;
}

static sebp_status call_norm_forward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_norm_forward(context, &on.x, NULL, NULL, NULL, NULL, NULL, NULL, &on.dx, NULL);
}

static sebp_status call_norm_backward(sebp_context *context, void **result)
{
    (void)result;
    static float numbers[400];
    const sebp_matrix statistics = {numbers, 200, 2, 2, SEBP_F32};
    sebp_matrix dgain = on.dw;
    dgain.rows = 1;
    return sebp_norm_backward(context, &on.x, &on.x, &statistics, NULL, NULL, NULL, &on.dx, NULL,
                              &dgain, NULL);
}

static sebp_status call_cross_entropy(sebp_context *context, void **result)
{
    (void)result;
    return sebp_cross_entropy(context, &on.x, row_numbers(40), NULL, &on.loss, &on.dx);
}

static sebp_status call_head(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_cross_entropy(context, &on.x, &on.w, &on.bias, row_numbers(30), NULL,
                                     &on.loss, &on.dx, &on.dw, &on.db);
}

static sebp_status call_embedding_backward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_embedding_backward(context, &on.dy, row_numbers(77), NULL, NULL, &on.y);
}

static sebp_status call_sequences(sebp_context *context, void **result)
{
    (void)context;
    const int64_t lengths[3] = {2, 0, 3};
    sebp_sequences *made = NULL;
    sebp_status status = sebp_sequences_from_padded(lengths, 3, 4, &made);
    *result = made;
    return status;
}

static sebp_status call_sequences_mask(sebp_context *context, void **result)
{
    (void)context;
    const uint8_t mask[6] = {0, 1, 1, 1, 0, 0};
    sebp_sequences *made = NULL;
    sebp_status status = sebp_sequences_from_mask(mask, 2, 3, &made);
    *result = made;
    return status;
}

static sebp_status call_sequences_offsets(sebp_context *context, void **result)
{
    (void)context;
    const int64_t offsets[4] = {0, 2, 2, 5};
    sebp_sequences *made = NULL;
    sebp_status status = sebp_sequences_from_offsets(offsets, 3, &made);
    *result = made;
    return status;
}

static sebp_status call_sequences_rows(sebp_context *context, void **result)
{
    (void)context;
    sebp_rows *made = NULL;
    sebp_status status = sebp_sequences_rows(on.sequences, &made);
    *result = made;
    return status;
}

static sebp_status call_attention(sebp_context *context, void **result)
{
    (void)result;
    return sebp_attention_forward(context, &on.texts_q, &on.texts_q, &on.texts_q, NULL,
                                  on.sequences, NULL, NULL, &on.texts_out, &on.texts_lse);
}

static sebp_status call_attention_backward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_attention_backward(context, &on.texts_q, &on.texts_q, &on.texts_q, &on.texts_q,
                                   NULL, &on.texts_q, &on.texts_sums, on.sequences, NULL, NULL,
                                   &on.texts_dq, &on.texts_dk, NULL, NULL);
}

static void destroy_context(void *context)
{
    sebp_context_destroy(context);
}

void allocation_destroy_rows(void *set)
{
    sebp_rows_destroy(set);
}

static void destroy_sequences(void *made)
{
    sebp_sequences_destroy(made);
}

static void destroy_basis(void *made)
{
    sebp_basis_destroy(made);
}

static void destroy_packed_weight(void *made)
{
    sebp_packed_weight_destroy(made);
}

static void destroy_sums(void *made)
{
    sebp_basis_sums_destroy(made);
}

static void destroy_state(void *state)
{
    sebp_sparse_adamw_destroy(state);
}

const allocation_target allocation_targets[] = {
    {"context_create", call_create, destroy_context, 1},
    {"rows_all", call_all, allocation_destroy_rows, 1},
    {"rows_from_mask", call_from_mask, allocation_destroy_rows, 1},
    {"rows_from_lengths", call_from_lengths, allocation_destroy_rows, 1},
    {"rows_from_indices", call_from_indices, allocation_destroy_rows, 1},
    {"sequences_from_padded", call_sequences, destroy_sequences, 2},
    {"sequences_from_mask", call_sequences_mask, destroy_sequences, 2},
    {"sequences_from_offsets", call_sequences_offsets, destroy_sequences, 2},
    {"sequences_rows", call_sequences_rows, allocation_destroy_rows, 3},
    {"attention_forward", call_attention, NULL, 1},
    {"attention_backward", call_attention_backward, NULL, 1},
    {"rows_find nonzero", call_find_nonzero, allocation_destroy_rows, 1},
    {"rows_find threshold", call_find_threshold, allocation_destroy_rows, 1},
    {"rows_find top", call_find_top, allocation_destroy_rows, 1},
    {"rows_find energy", call_find_energy, allocation_destroy_rows, 1},
    {"rows_sample", call_sample, allocation_destroy_rows, 5},
    {"rows_dropped", call_dropped, NULL, 0},
    {"linear_backward", call_backward, NULL, 1},
    {"linear_backward dx", call_backward_dx, NULL, 1},
    {"linear_backward dw", call_backward_dw, NULL, 1},
    {"linear_backward found", call_backward_found, NULL, 1},
    {"linear_backward sampled", call_backward_sampled, NULL, 8},
    {"linear_forward", call_forward, NULL, 1},
    {"linear packed weight", call_packed_weight, destroy_packed_weight, 2},
    {"norm_forward", call_norm_forward, NULL, 1},
    {"norm_backward", call_norm_backward, NULL, 1},
    {"cross_entropy", call_cross_entropy, NULL, 1},
    {"linear_cross_entropy", call_head, NULL, 4},
    {"embedding_backward", call_embedding_backward, NULL, 1},
    {"lora_forward", call_lora_forward, NULL, 1},
    {"lora_backward", call_lora_backward, NULL, 1},
    {"meprop_gradient", call_meprop, NULL, 3},
    {"sampled_product", call_sampled, NULL, 2},
    {"sparsegrad_gradient factors", call_sparsegrad_factors, NULL, 1},
    {"sparsegrad_gradient dy", call_sparsegrad_dy, NULL, 1},
    {"sparsegrad_gradient in-out", call_sparsegrad_in_out, NULL, 1},
    {"sparsegrad_kept", call_sparsegrad_kept, NULL, 2},
    {"sparsegrad_update", call_sparsegrad_update, NULL, 9},
    {"sparse_top", call_sparse_top, NULL, 2},
    {"basis_sums_create", call_sums_create, destroy_sums, 3},
    {"basis_sums_add", call_sums_add, NULL, 1},
    {"basis_from_vectors", call_from_vectors, destroy_basis, 3},
    {"basis_save", call_basis_save, NULL, 1},
    {"basis_load", call_basis_load, destroy_basis, 3},
#ifdef SEBP_HAVE_LAPACK
    {"basis_solve", call_basis_solve, destroy_basis, 3 + 3 + 5},
#endif
    {"sparse_adamw_create", call_sparse_adamw, destroy_state, 1},
    {"sparse_adamw_create fixed", call_sparse_adamw_fixed, destroy_state, 4},
};

const int allocation_target_count = (int)(sizeof allocation_targets / sizeof allocation_targets[0]);
