/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_layer_kernels.c
 * The kernels of row-wise layers on every ISA against the scalar ones, which tests/test_layers.c holds
 * against double precision. Where neither the order of a sum nor an elementary function is involved
 * the results are equal to the last bit.
 */
#include "config.h"

#include <inttypes.h>

#include "kernel_harness.h"

/* Outputs of a kernel: one buffer for the tier, one for scalar, of the same contents. */
typedef struct output {
    buffer tier, scalar;
    int64_t n;
    int is_bf16;
} output;

static buffer random_row(int64_t n, int is_bf16)
{
    buffer made = make(n, bytes_of(is_bf16));
    for (int64_t i = 0; i < n; i++) {
        put(made.data, is_bf16, i, 4 * testing_uniform());
    }
    return made;
}

static output make_output(int64_t n, int is_bf16)
{
    output made = {random_row(n, is_bf16), make(n, bytes_of(is_bf16)), n, is_bf16};
    memcpy(made.scalar.data, made.tier.data, (size_t)n * bytes_of(is_bf16));
    return made;
}

/* The tier's is the scalar's within `relative` of 1 + its magnitude, and one step of bf16. */
static void compare(output *made, double relative, const char *what)
{
    for (int64_t i = 0; i < made->n; i++) {
        double want = get(made->scalar.data, made->is_bf16, i);
        double got = get(made->tier.data, made->is_bf16, i);
        double bound = relative * (1 + fabs(want));
        bound += relative > 0 && made->is_bf16 ? fabs(want) * 0x1p-7 : 0;
        check(fabs(got - want) <= bound || (isnan(got) && isnan(want)) || got == want,
              "%s[%" PRId64 "] is %.9g, not %.9g", what, i, got, want);
    }
    /* What lies around it is as it was: poison. */
    unsigned char *data = made->tier.data, *open = made->tier.open;
    size_t bytes = (size_t)made->n * bytes_of(made->is_bf16);
    for (unsigned char *at = open; at < open + made->tier.open_bytes; at++) {
        check((at >= data && at < data + bytes) || *at == TESTING_POISON, "%s: byte %td is written",
              what, at - data);
    }
    release(&made->tier);
    release(&made->scalar);
}

static int64_t some_length(void)
{
    return testing_between(1, testing_chance(0.1) ? 3000 : 150);
}

static sebp_dropout any_dropout(void)
{
    return (sebp_dropout){testing_random(), testing_random(), 0.3F, 1 / 0.7F};
}

START_TEST(norm_forward)
{
    const sebp_kernels *kernels = kernels_of(_i, "norm_forward");
    for (int round = testing_rounds(1000); round > 0 && kernels != NULL; round--) {
        int is_bf16 = round % 2;
        int64_t n = some_length();
        buffer x = random_row(n, is_bf16), residual = random_row(n, is_bf16);
        buffer gain = random_row(n, 0), shift = random_row(n, 0);
        output h = make_output(n, is_bf16), y = make_output(n, is_bf16);
        const sebp_dropout dropout = any_dropout();
        float mean[2], inverse[2];
        sebp_norm_row row = {.n = n,
                             .is_bf16 = is_bf16,
                             .is_rms = testing_chance(0.5),
                             .epsilon = 0.01F,
                             .gain = testing_chance(0.7) ? (const float *)(void *)gain.data : NULL,
                             .shift =
                                 testing_chance(0.7) ? (const float *)(void *)shift.data : NULL,
                             .x = x.data,
                             .residual = testing_chance(0.5) ? residual.data : NULL,
                             .dropout = testing_chance(0.5) ? &dropout : NULL,
                             .group = testing_random() >> 8};
        bool has_h = row.residual != NULL || row.dropout != NULL || testing_chance(0.5);
        for (int scalar = 0; scalar < 2; scalar++) {
            row.h = !has_h ? NULL : scalar ? h.scalar.data : h.tier.data;
            row.y = scalar ? y.scalar.data : y.tier.data;
            row.stream = (uintptr_t)row.y % 64 == 0;
            row.mean = &mean[scalar];
            row.inverse = &inverse[scalar];
            (scalar ? &sebp_kernels_scalar : kernels)->norm_forward(&row);
            kernels->stream_fence();
        }
        check(fabsf(mean[0] - mean[1]) <= 1e-5F, "mean %g, not %g", (double)mean[0],
              (double)mean[1]);
        check(fabsf(inverse[0] - inverse[1]) <= 1e-5F * (1 + inverse[1]), "1/std %g, not %g",
              (double)inverse[0], (double)inverse[1]);
        compare(&h, 0, "h");
        compare(&y, 1e-4, "y");
        release(&x);
        release(&residual);
        release(&gain);
        release(&shift);
    }
}
END_TEST

START_TEST(norm_backward)
{
    const sebp_kernels *kernels = kernels_of(_i, "norm_backward");
    for (int round = testing_rounds(1000); round > 0 && kernels != NULL; round--) {
        int is_bf16 = round % 2;
        int64_t n = some_length();
        buffer h = random_row(n, is_bf16), dy = random_row(n, is_bf16), gain = random_row(n, 0);
        output dh = make_output(n, is_bf16), dx = make_output(n, is_bf16);
        output dgain = make_output(n, 0), dshift = make_output(n, 0);
        const sebp_dropout dropout = any_dropout();
        sebp_norm_back_row row = {.n = n,
                                  .is_bf16 = is_bf16,
                                  .is_rms = testing_chance(0.5),
                                  .gain = testing_chance(0.7) ? (float *)(void *)gain.data : NULL,
                                  .h = h.data,
                                  .dy = dy.data,
                                  .mean = (float)testing_uniform(),
                                  .inverse = 0.7F,
                                  .accumulate = testing_chance(0.5),
                                  .dropout = testing_chance(0.5) ? &dropout : NULL,
                                  .group = testing_random() >> 8};
        int wants = (int)testing_between(0, 15);
        for (int scalar = 0; scalar < 2; scalar++) {
            row.dh = !(wants & 1) ? NULL : scalar ? dh.scalar.data : dh.tier.data;
            row.stream = (uintptr_t)row.dh % 64 == 0;
            row.dx = !(wants & 2) ? NULL : scalar ? dx.scalar.data : dx.tier.data;
            row.dgain = !(wants & 4)
                            ? NULL
                            : (float *)(void *)(scalar ? dgain.scalar.data : dgain.tier.data);
            row.dshift = !(wants & 8)
                             ? NULL
                             : (float *)(void *)(scalar ? dshift.scalar.data : dshift.tier.data);
            (scalar ? &sebp_kernels_scalar : kernels)->norm_backward(&row);
        }
        compare(&dh, 1e-4, "dh");
        compare(&dx, 1e-4, "dx");
        compare(&dgain, 1e-5, "dgain");
        compare(&dshift, 0, "dshift");
        release(&h);
        release(&dy);
        release(&gain);
    }
}
END_TEST

START_TEST(activations)
{
    const sebp_kernels *kernels = kernels_of(_i, "activations");
    for (int round = testing_rounds(2000); round > 0 && kernels != NULL; round--) {
        int is_bf16 = round % 2, function = round / 2 % 4;
        int64_t n = some_length();
        buffer x = random_row(n, is_bf16), up = random_row(n, is_bf16), dy = random_row(n, is_bf16);
        output y = make_output(n, is_bf16), dx = make_output(n, is_bf16);
        output dup = make_output(n, is_bf16);
        put(x.data, is_bf16, testing_between(0, n - 1), testing_chance(0.5) ? NAN : -INFINITY);
        int gated = testing_chance(0.5);
        for (int scalar = 0; scalar < 2; scalar++) {
            const sebp_kernels *by = scalar ? &sebp_kernels_scalar : kernels;
            by->activation_forward(
                &(sebp_activation_row){.n = n,
                                       .is_bf16 = is_bf16,
                                       .function = function,
                                       .x = x.data,
                                       .up = gated ? up.data : NULL,
                                       .y = scalar ? y.scalar.data : y.tier.data});
            by->activation_backward(
                &(sebp_activation_back_row){.n = n,
                                            .is_bf16 = is_bf16,
                                            .function = function,
                                            .dy = dy.data,
                                            .x = x.data,
                                            .up = gated ? up.data : NULL,
                                            .dx = scalar ? dx.scalar.data : dx.tier.data,
                                            .dup = !gated   ? NULL
                                                   : scalar ? dup.scalar.data
                                                            : dup.tier.data});
        }
        /* include/sebp/layers.h, on either side, times inputs of up to 4: values within 6 ulp or
         * 2^-22, of the tanh form within 250 ulp where they are below 0.16, in bf16 within 2^-14, which
         * its step covers; derivatives, which dy and up multiply, within 2^-22, in bf16 2^-14. */
        const bool is_exact = function == FUNCTION_RELU;
        const double value = is_exact                         ? 0
                             : function == FUNCTION_GELU_TANH ? 2 * 4 * 0.16 * 250 * 0x1p-23
                                                              : 2 * 4 * 0x1p-22 + 12 * 0x1p-23;
        const double slope = is_exact ? 0 : 2 * 16 * (is_bf16 ? 0x1p-14 : 0x1p-22);
        compare(&y, value, "y");
        compare(&dx, slope, "dx");
        compare(&dup, value, "dup");
        release(&x);
        release(&up);
        release(&dy);
    }
}
END_TEST

START_TEST(dropout)
{
    const sebp_kernels *kernels = kernels_of(_i, "dropout");
    for (int round = testing_rounds(500); round > 0 && kernels != NULL; round--) {
        int is_bf16 = round % 2;
        int64_t n = some_length();
        buffer x = random_row(n, is_bf16);
        output y = make_output(n, is_bf16);
        const sebp_dropout how = any_dropout();
        uint64_t group = testing_random() >> 8;
        kernels->dropout(y.tier.data, x.data, is_bf16, n, &how, group);
        sebp_kernels_scalar.dropout(y.scalar.data, x.data, is_bf16, n, &how, group);
        compare(&y, 0, "y");
        release(&x);
    }
}
END_TEST

START_TEST(softmax)
{
    const sebp_kernels *kernels = kernels_of(_i, "softmax");
    for (int round = testing_rounds(1000); round > 0 && kernels != NULL; round--) {
        int is_bf16 = round % 2, to_bf16 = round / 2 % 2;
        int64_t n = testing_chance(0.02) ? 50000 : some_length();
        buffer x = random_row(n, is_bf16);
        output y = make_output(n, to_bf16);
        if (testing_chance(0.3)) {
            put(x.data, is_bf16, testing_between(0, n - 1), testing_chance(0.3) ? NAN : -INFINITY);
        }
        float max[2];
        double sum[2], plain[2];
        output exps = make_output(n, 0);
        int keeps = testing_chance(0.5);
        kernels->softmax_sum(x.data, is_bf16, n, &max[0], &sum[0],
                             keeps ? (float *)(void *)exps.tier.data : NULL);
        sebp_kernels_scalar.softmax_sum(x.data, is_bf16, n, &max[1], &sum[1],
                                        keeps ? (float *)(void *)exps.scalar.data : NULL);
        if (isnan(sum[1])) { /* which max comes of NaN is not defined */
            memcpy(exps.tier.data, exps.scalar.data, (size_t)n * sizeof(float));
        }
        compare(&exps, 1e-6, "exps");
        const float from = testing_chance(0.5) ? (float)testing_uniform() : 0;
        plain[0] = kernels->row_sum(x.data, is_bf16, n, from);
        plain[1] = sebp_kernels_scalar.row_sum(x.data, is_bf16, n, from);
        check(isnan(sum[1]) ? isnan(sum[0])
                            : max[0] == max[1] && fabs(sum[0] - sum[1]) <= 2e-5 * sum[1],
              "sum of %" PRId64 ": %.9g, not %.9g", n, sum[0], sum[1]);
        check(plain[0] == plain[1] || (isnan(plain[0]) && isnan(plain[1])) ||
                  fabs(plain[0] - plain[1]) <= 1e-12 * (double)n,
              "sum of differences of %" PRId64 ": %.9g, not %.9g", n, plain[0], plain[1]);
        sebp_softmax_row row = {.n = n,
                                .x_is_bf16 = is_bf16,
                                .to_is_bf16 = to_bf16,
                                .x = x.data,
                                .max = 4,
                                .factor = 0.7F,
                                .shift = testing_chance(0.5) ? 0 : 0.01F,
                                .to = y.tier.data};
        kernels->softmax(&row);
        row.to = y.scalar.data;
        sebp_kernels_scalar.softmax(&row);
        compare(&y, 1e-6, "softmax");
        if (!is_bf16) {
            output of_exps = make_output(n, to_bf16);
            row.x_is_exp = true;
            row.to = of_exps.tier.data;
            kernels->softmax(&row);
            row.to = of_exps.scalar.data;
            sebp_kernels_scalar.softmax(&row);
            compare(&of_exps, 1e-6, "softmax of exponentials");
        }
        release(&x);
    }
}
END_TEST

START_TEST(rotary)
{
    const sebp_kernels *kernels = kernels_of(_i, "rotary");
    for (int round = testing_rounds(1000); round > 0 && kernels != NULL; round--) {
        int is_bf16 = round % 2, in_place = testing_chance(0.5);
        int64_t heads = testing_between(1, 4), size = testing_between(1, 150);
        size = testing_chance(0.05) ? 700 : size;
        int64_t dims = testing_between(0, size / 2) * 2, n = heads * size;
        buffer x = random_row(n, is_bf16), cosine = random_row(dims / 2, 0);
        buffer sine = random_row(dims / 2, 0);
        output y = make_output(n, is_bf16);
        sebp_rotary_row row = {.heads = heads,
                               .head_size = size,
                               .dims = dims,
                               .is_bf16 = is_bf16,
                               .interleaved = testing_chance(0.5),
                               .inverse = testing_chance(0.5),
                               .cosine = (float *)(void *)cosine.data,
                               .sine = (float *)(void *)sine.data};
        row.y = y.tier.data;
        row.x = in_place ? y.tier.data : x.data;
        kernels->rotary(&row);
        row.y = y.scalar.data;
        row.x = in_place ? y.scalar.data : x.data;
        sebp_kernels_scalar.rotary(&row);
        compare(&y, 0, "y");
        release(&x);
        release(&cosine);
        release(&sine);
    }
}
END_TEST

START_TEST(sum_vectors)
{
    const sebp_kernels *kernels = kernels_of(_i, "sum_vectors");
    for (int round = testing_rounds(500); round > 0 && kernels != NULL; round--) {
        int is_bf16 = round % 2, count = (int)testing_between(1, 4);
        int64_t n = length();
        buffer from[4];
        const void *rows[4];
        for (int i = 0; i < count; i++) {
            from[i] = random_row(n, is_bf16);
            rows[i] = from[i].data;
        }
        output to = make_output(n, is_bf16);
        kernels->sum_vectors(to.tier.data, rows, count, is_bf16, n);
        sebp_kernels_scalar.sum_vectors(to.scalar.data, rows, count, is_bf16, n);
        compare(&to, 0, "sum");
        for (int i = 0; i < count; i++) {
            release(&from[i]);
        }
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("layer kernels");
    TCase *all = tcase_create("layer kernels");
    tcase_add_loop_test(all, norm_forward, 0, TIERS);
    tcase_add_loop_test(all, norm_backward, 0, TIERS);
    tcase_add_loop_test(all, activations, 0, TIERS);
    tcase_add_loop_test(all, dropout, 0, TIERS);
    tcase_add_loop_test(all, softmax, 0, TIERS);
    tcase_add_loop_test(all, rotary, 0, TIERS);
    tcase_add_loop_test(all, sum_vectors, 0, TIERS);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
