/* SPDX-License-Identifier: Apache-2.0 */
#include "config.h"

#include <inttypes.h>
#include <math.h>

#include "packed_layer.h"

packed_layer packed_layer_make(int64_t M, int64_t N, int64_t K, testing_values values)
{
    packed_layer l = {.M = M, .N = N, .K = K, .out = testing_dtype()};
    l.dy = testing_random_matrix(M, N, testing_dtype(), values);
    l.x = testing_random_matrix(M, K, testing_dtype(), values);
    l.w = testing_random_matrix(N, K, testing_dtype(), values);
    l.bias = testing_random_matrix(1, N, testing_dtype(), values);
    l.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    uint8_t *mask = malloc((size_t)M + 1);
    ck_assert_ptr_nonnull(mask);
    for (int64_t i = 0; i < M; i++)
        mask[i] = testing_chance(0.6) != 0;
    if (M > 0)
        mask[testing_between(0, M - 1)] = 1;
    if (testing_chance(0.5))
        testing_succeed(sebp_rows_from_mask(mask, M, &l.rows), NULL);
    free(mask);
    return l;
}

/* f32 matrices, all rows. */
packed_layer packed_layer_make_f32(int64_t M, int64_t N, int64_t K)
{
    packed_layer l = {.M = M, .N = N, .K = K, .out = SEBP_F32};
    l.dy = testing_random_matrix(M, N, SEBP_F32, TESTING_REAL);
    l.x = testing_random_matrix(M, K, SEBP_F32, TESTING_REAL);
    l.w = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL);
    l.bias = testing_random_matrix(1, N, SEBP_F32, TESTING_REAL);
    l.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    return l;
}

packed_layer packed_layer_any(testing_values values)
{
    int64_t sizes[3] = {testing_between(1, 90), testing_between(1, 90), testing_between(1, 90)};
    if (testing_chance(0.1))
        sizes[testing_between(1, 2)] = 1;
    if (testing_chance(0.4)) /* more than a block of the depth, in one of the two products */
        sizes[testing_between(1, 2)] = testing_between(500, 1600);
    return packed_layer_make(sizes[0], sizes[1], sizes[2], values);
}

void packed_layer_free(packed_layer *l)
{
    testing_release(&l->dy);
    testing_release(&l->x);
    if (l->w.data != NULL) /* else it was lent */
        testing_release(&l->w);
    testing_release(&l->bias);
    sebp_rows_destroy(l->rows);
}

packed_outputs packed_run(sebp_context *context, packed_layer *l, sebp_packed_weight *packed)
{
    packed_outputs out = {
        {testing_matrix(l->M, l->N, l->N, l->out), testing_matrix(l->M, l->K, l->K + 3, l->out)}};
    l->options.packed_weight = packed;
    testing_succeed(sebp_linear_forward(context, &l->x, &l->w, &l->bias, l->rows, &l->options,
                                        &out.at[PACKED_Y]),
                    context);
    sebp_rows *rows = NULL; /* NULL would have them found */
    testing_succeed(sebp_rows_all(l->M, &rows), NULL);
    testing_succeed(sebp_linear_backward(context, &l->dy, NULL, &l->w,
                                         l->rows != NULL ? l->rows : rows, &l->options,
                                         &out.at[PACKED_DX], NULL, NULL),
                    context);
    sebp_rows_destroy(rows);
    return out;
}

void packed_outputs_free(packed_outputs *out)
{
    for (int i = 0; i < PACKED_OUTPUTS; i++)
        testing_release(&out->at[i]);
}

bool packed_are_same(const packed_outputs *a, const packed_outputs *b)
{
    return testing_same_bits(&a->at[PACKED_Y], &b->at[PACKED_Y]) &&
           testing_same_bits(&a->at[PACKED_DX], &b->at[PACKED_DX]);
}

void packed_check_same(packed_outputs got, const packed_outputs *want, const packed_layer *l,
                       const char *when)
{
    for (int i = 0; i < PACKED_OUTPUTS; i++) {
        ck_assert_msg(testing_same_bits(&got.at[i], &want->at[i]),
                      "%s of %" PRId64 " x %" PRId64 " x %" PRId64 ", %s: other bits",
                      i == PACKED_Y ? "Y" : "dX", l->M, l->N, l->K, when);
        testing_check_matrix(&got.at[i]);
    }
    packed_outputs_free(&got);
}

/* A context on these kernels, in which products of bf16 are free, or cost more than anything. */
sebp_context *packed_context(const sebp_kernels *kernels)
{
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, (int)testing_between(1, 4),
                                            testing_chance(0.5) ? TESTING_MIN_SCRATCH : 0);
    sebp_cpu *cpu = context->device->state;
    bool by_bf16 = testing_chance(0.7);
    cpu->rates = (sebp_rates){.tile_f32 = by_bf16, .tile_bf16 = !by_bf16};
    if (kernels != NULL)
        cpu->kernels = kernels;
    return context;
}

/* Some of a matrix's elements have no finite parts. */
void packed_set_odd(const sebp_matrix *matrix)
{
    static const double odd[] = {INFINITY, -INFINITY, NAN, 0x1.ffp127};
    for (int64_t i = testing_between(1, 5); i > 0; i--) {
        testing_set(matrix, testing_between(0, matrix->rows - 1),
                    testing_between(0, matrix->cols - 1), odd[testing_between(0, 3)]);
    }
}

sebp_packed_weight *packed_make(sebp_context *context, const packed_layer *l, int64_t max_bytes)
{
    sebp_packed_weight *packed = NULL;
    testing_succeed(sebp_packed_weight_create(context, &l->w, max_bytes, &packed), context);
    ck_assert_ptr_nonnull(packed);
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), 0);
    return packed;
}
